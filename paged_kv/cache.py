"""The cache, and the four eager functions that take Python ints: init, allocate, append, gather.

They are for setting up, tests and small programs; the batched ops in `ops` and `state` are the hot
path.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int32

from . import validate, validate_values
from .kernels.core.layout import LANES


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """Keys and values in pools of fixed-size blocks, and who owns which block.

    One cache serves one layer, or, with a leading layer axis on the pools, a whole model with one
    table.  A pytree: it goes through `jit` (donate it), `scan`, `vmap`, `shard_map` and
    `jax.export`.

    Attributes:
      key_pool, value_pool: (num_blocks, block_size, num_kv_heads, head_dim), or with num_layers in
        front.
      block_table: int32 (batch, max_blocks_per_seq), physical block of each logical one, unused
        entries -1.
      seq_lengths: int32 (batch,), valid tokens per sequence.

    Source: PagedAttention of vLLM (Kwon et al., 2023); the layout is FlashInfer's NHD.
    """

    POOL_AXES: ClassVar = ("num_blocks", "block_size", "num_kv_heads", "head_dim")
    is_packed: ClassVar = False

    key_pool: Float[Array, "*layers num_blocks block_size num_kv_heads head_dim"]
    value_pool: Float[Array, "*layers num_blocks block_size num_kv_heads head_dim"]
    block_table: Int32[Array, "batch max_blocks_per_seq"]
    seq_lengths: Int32[Array, "batch"]

    @property
    def num_blocks(self) -> int:
        """Physical blocks of each layer's pool."""
        return self.key_pool.shape[-4]

    @property
    def block_size(self) -> int:
        """Token slots of a block."""
        return self.key_pool.shape[-3]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.key_pool.shape[-2]

    @property
    def head_dim(self) -> int:
        """Values of a head: the width of its keys and values."""
        return self.key_pool.shape[-1]

    @property
    def num_layers(self) -> int | None:
        """Layers of a stacked cache; None for a single layer's."""
        return self.key_pool.shape[0] if self.key_pool.ndim > len(self.POOL_AXES) else None

    @property
    def batch_size(self) -> int:
        """Rows of the table: sequences."""
        return self.block_table.shape[-2]

    @property
    def max_blocks_per_seq(self) -> int:
        """Entries of a row of the table."""
        return self.block_table.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PackedKVCache(PagedKVCache):
    """A cache whose blocks are stored as rows of 128 values, for TPUs and head_dim below 128.

    A TPU keeps an array's last axis in whole rows of 128: a pool of heads of 64 is doubled, or kept
    in an order that a kernel has to copy.  These pools hold the same values in the same order and
    nothing else, and every op takes them.  `init_paged_kv_cache(..., packed=True)` makes one,
    `interop.pack` and `interop.unpack` convert.

    Attributes:
      key_pool, value_pool: (num_blocks, block_size * num_kv_heads * head_dim / 128, 128), or with
        num_layers in front.
      block_table, seq_lengths: as in `PagedKVCache`.
      token_shape: (num_kv_heads, head_dim), heads of a token and values of a head; static.
    """

    POOL_AXES: ClassVar = ("num_blocks", "block_size * num_kv_heads * head_dim / 128", "128")
    is_packed: ClassVar = True

    key_pool: Float[Array, "*layers num_blocks block_rows 128"]
    value_pool: Float[Array, "*layers num_blocks block_rows 128"]
    token_shape: tuple[int, int] = field(metadata={"static": True})

    @property
    def num_blocks(self) -> int:
        return self.key_pool.shape[-3]

    @property
    def block_size(self) -> int:
        rows, lanes = self.key_pool.shape[-2:]
        return rows * lanes // (self.num_kv_heads * self.head_dim)

    @property
    def num_kv_heads(self) -> int:
        return self.token_shape[0]

    @property
    def head_dim(self) -> int:
        return self.token_shape[1]


def init_paged_kv_cache(
    *,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    batch_size: int,
    max_blocks_per_seq: int,
    dtype: jax.typing.DTypeLike,
    num_layers: int | None = None,
    packed: bool = False,
) -> PagedKVCache:
    """An empty cache: zeroed pools, a table of -1, lengths 0.

    Args:
      num_blocks: blocks in the pool of each layer; `num_blocks_for` computes it from bytes.
      block_size: token slots of a block.
      num_kv_heads: heads of keys and of values.
      head_dim: values of a head.
      batch_size: sequences the table has rows for.
      max_blocks_per_seq: blocks a row can name; times block_size, the longest sequence.
      dtype: of the pools, floating point.
      num_layers: layers of a stack that serves a whole model; None for one layer's cache.
      packed: make it a `PackedKVCache`, for TPUs and head_dim below 128.

    Raises:
      ValueError: a size is not a positive int, dtype is not floating point, or the blocks of a
        packed cache are not whole rows of 128 values.
    """
    sizes = {
        "num_blocks": num_blocks,
        "block_size": block_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "batch_size": batch_size,
        "max_blocks_per_seq": max_blocks_per_seq,
    }
    if num_layers is not None:
        sizes["num_layers"] = num_layers
    validate.positive_ints(sizes)
    validate.floating("dtype", jnp.dtype(dtype))
    layers = () if num_layers is None else (num_layers,)
    token_shape = (num_kv_heads, head_dim)
    shape = (*layers, num_blocks, block_size, *token_shape)
    make = PagedKVCache
    if packed:
        shape = packed_shape(shape)
        make = partial(PackedKVCache, token_shape=token_shape)
    return make(
        key_pool=jnp.zeros(shape, dtype),
        value_pool=jnp.zeros(shape, dtype),
        block_table=jnp.full((batch_size, max_blocks_per_seq), -1, jnp.int32),
        seq_lengths=jnp.zeros((batch_size,), jnp.int32),
    )


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a packed pool that holds an unpacked pool of `shape`."""
    *outer, block_size, num_kv_heads, head_dim = shape
    packed = (*outer, block_size * num_kv_heads * head_dim // LANES, LANES)
    validate.packed_rows(packed, block_size, num_kv_heads, head_dim)
    return packed


def num_blocks_for(
    memory_bytes: int,
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    num_layers: int = 1,
) -> int:
    """Blocks whose keys and values, over all layers, fit `memory_bytes`.

    Args:
      memory_bytes: bytes to spend on both pools; the table and lengths are not counted.
      block_size: token slots of a block.
      num_kv_heads: heads of keys and of values, on one device where heads are sharded.
      head_dim: values of a head.
      dtype: of the pools.
      num_layers: layers that share the memory.

    Raises:
      ValueError: a size is not a positive int, or not even one block fits.
    """
    sizes = {
        "block_size": block_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_layers": num_layers,
    }
    validate.positive_ints(sizes)
    block_bytes = 2 * jnp.dtype(dtype).itemsize * int(np.prod(list(sizes.values())))
    return validate.enough_memory(memory_bytes, block_bytes)


def allocate_blocks(
    cache: PagedKVCache,
    *,
    sequence_idx: int,
    num_new_tokens: int,
    free_block_ids: Sequence[int] | np.ndarray | Array,
) -> tuple[PagedKVCache, int]:
    """Gives a sequence the blocks that its next tokens need.

    Blocks that its row already holds past its length are used first.  Lengths do not change: the
    tokens come with `append_kv`, or with `advance` and the batched ops.

    Args:
      cache: a single layer's cache.
      sequence_idx: row of the table.
      num_new_tokens: tokens to make room for, past the sequence's length.
      free_block_ids: ids to take from, ints or (n,), in order, as many as needed.

    Returns:
      The cache with the new row, and how many ids of `free_block_ids` were consumed.

    Raises:
      ValueError: `free_block_ids` is too short, a consumed id is outside the pool, repeated or
        already in the table, the row would pass `max_blocks_per_seq`, `num_new_tokens` is negative,
        `sequence_idx` is out of range, or the cache is stacked.  Nothing is changed.
    """
    validate.single_layer("allocate_blocks", cache)
    validate.in_range("sequence_idx", sequence_idx, cache.batch_size)
    validate.not_negative("num_new_tokens", num_new_tokens)
    table = np.asarray(cache.block_table)
    length = int(cache.seq_lengths[sequence_idx])
    missing = validate_values.missing_entries(cache, table[sequence_idx], length, num_new_tokens)
    ids = validate_values.free_ids(cache, table, free_block_ids, len(missing))
    if not ids:
        return cache, 0
    row = jnp.asarray(missing, jnp.int32)
    block_table = cache.block_table.at[sequence_idx, row].set(jnp.asarray(ids, jnp.int32))
    return replace(cache, block_table=block_table), len(ids)


def append_kv(
    cache: PagedKVCache,
    sequence_idx: int,
    keys_new: Float[Array, "num_new_tokens num_kv_heads head_dim"],
    values_new: Float[Array, "num_new_tokens num_kv_heads head_dim"],
) -> PagedKVCache:
    """Appends tokens to one sequence and advances its length.

    Args:
      cache: a single layer's cache.
      sequence_idx: row of the table.
      keys_new, values_new: (num_new_tokens, num_kv_heads, head_dim), cast to the pools' dtype.

    Raises:
      ValueError: shapes disagree with each other or with the pools, a needed block is unallocated,
        the sequence would pass its row, `sequence_idx` is out of range, or the cache is stacked.
    """
    validate.single_layer("append_kv", cache)
    validate.in_range("sequence_idx", sequence_idx, cache.batch_size)
    validate.new_tokens(cache, keys_new, values_new)
    start, count = int(cache.seq_lengths[sequence_idx]), keys_new.shape[0]
    position = np.arange(start, start + count)
    block = validate_values.allocated_blocks(cache, sequence_idx, position)
    offset = jnp.asarray(position % cache.block_size, jnp.int32)
    block = jnp.asarray(block, jnp.int32)

    def write(pool: Array, new: Array) -> Array:
        heads = _as_heads(cache, pool)
        return heads.at[block, offset].set(jnp.asarray(new).astype(pool.dtype)).reshape(pool.shape)

    return replace(
        cache,
        key_pool=write(cache.key_pool, keys_new),
        value_pool=write(cache.value_pool, values_new),
        seq_lengths=cache.seq_lengths.at[sequence_idx].add(count),
    )


def gather_kv(
    cache: PagedKVCache, sequence_idx: int
) -> tuple[
    Float[Array, "seq_len num_kv_heads head_dim"],
    Float[Array, "seq_len num_kv_heads head_dim"],
    int,
]:
    """A sequence's keys and values as dense arrays, and its length.

    Args:
      cache: a single layer's cache.
      sequence_idx: row of the table.

    Returns:
      Keys and values, (seq_len, num_kv_heads, head_dim) each in the pools' dtype, and seq_len,
      tokens as an int.

    Raises:
      ValueError: a block within the length is unallocated, `sequence_idx` is out of range, or the
        cache is stacked.
    """
    validate.single_layer("gather_kv", cache)
    validate.in_range("sequence_idx", sequence_idx, cache.batch_size)
    length = int(cache.seq_lengths[sequence_idx])
    position = np.arange(length)
    block = jnp.asarray(validate_values.allocated_blocks(cache, sequence_idx, position), jnp.int32)
    offset = jnp.asarray(position % cache.block_size, jnp.int32)
    keys, values = (_as_heads(cache, pool) for pool in (cache.key_pool, cache.value_pool))
    return keys[block, offset], values[block, offset], length


def _as_heads(cache: PagedKVCache, pool: Array) -> Array:
    """A single layer's pool, packed or not, by block, token and head."""
    return pool.reshape(-1, cache.block_size, cache.num_kv_heads, cache.head_dim)


export.register_pytree_node_serialization(
    PagedKVCache,
    serialized_name="paged_kv.PagedKVCache",
    serialize_auxdata=lambda auxdata: b"",
    deserialize_auxdata=lambda data: (),
)
export.register_pytree_node_serialization(
    PackedKVCache,
    serialized_name="paged_kv.PackedKVCache",
    serialize_auxdata=lambda auxdata: json.dumps(auxdata).encode(),
    deserialize_auxdata=lambda data: tuple(map(tuple, json.loads(data))),
)
