"""The arrays of one call, as every backend is given them."""

from typing import NamedTuple

from jax import Array

from .schedule import Schedule


class AttentionArrays(NamedTuple):
    """What `attend` of a backend works on."""

    query: Array  # (num_tokens, num_query_heads, head_dim)
    key_pool: Array  # (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    value_pool: Array
    block_table: Array  # int32 (batch, max_blocks_per_seq)
    schedule: Schedule
    alibi_slopes: Array | None  # (num_query_heads,)
    layer: Array  # int32 (), inside the stack


class NewTokens(NamedTuple):
    """One per sequence, to be written to the pools before they are attended over."""

    keys: Array  # (batch, num_kv_heads, head_dim), in the pools' dtype
    values: Array
    seq_lengths: Array  # int32 (batch,), new tokens included
