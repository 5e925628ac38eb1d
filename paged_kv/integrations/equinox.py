"""Equinox: models written for one sequence, under `vmap`, on one paged cache.

    axes = sequence_axes(cache)
    jax.vmap(step, in_axes=(0, axes), out_axes=(0, axes))(tokens, cache)

Inside, `cache` is one sequence's view of it: `block_table` (max_blocks_per_seq,), `seq_lengths` (),
and the whole pools.  `attend` there is one call for the whole batch: `vmap` turns the calls of all
sequences into one append and one attention, so pools are neither copied nor batched.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import rows
from ..cache import PagedKVCache
from . import check_one_sequence, check_shared_pools, missing

try:
    import equinox as eqx
except ImportError as error:
    raise missing("equinox", "equinox", error) from error


def sequence_axes(cache: PagedKVCache) -> PagedKVCache:
    """`in_axes` and `out_axes` of a cache for `jax.vmap` over its sequences: pools are shared.

    Args:
      cache: of one layer or a stack; only its form is looked at.
    """
    return replace(cache, key_pool=None, value_pool=None, block_table=0, seq_lengths=0)


def attend(
    query: Float[Array, "T num_query_heads head_dim"],
    keys: Float[Array, "T num_kv_heads head_dim"],
    values: Float[Array, "T num_kv_heads head_dim"],
    cache: PagedKVCache,
    *,
    num_new_tokens: int | Int32[Array, ""] | None = None,
    **attention: Any,
) -> tuple[Float[Array, "T num_query_heads head_dim"], PagedKVCache]:
    """Appends one sequence's new tokens and attends over the sequence; alone or under `vmap`.

    Args:
      query: (T, num_query_heads, head_dim), the new tokens.
      keys, values: (T, num_kv_heads, head_dim), of the same tokens.
      cache: one sequence's view, advanced already by T or `num_new_tokens`.
      num_new_tokens: real tokens, int32 () in [0, T]; the rest is padding at the end.  None: all.
      **attention: keywords of `append_and_attend` but `query_start_loc`; arrays among them are
        shared by all sequences.

    Returns:
      out, shaped and typed as the query, and the cache with the new tokens.  No gradient flows
      through it.

    Raises:
      ValueError: the cache is not one sequence's, `vmap` maps its pools, or as
        `append_and_attend_rows`.
      NotImplementedError: as `append_and_attend_rows`.
    """
    check_one_sequence(cache)
    counts = None if num_new_tokens is None else jnp.asarray(num_new_tokens, jnp.int32)
    arrays, static = eqx.partition(attention, eqx.is_array)

    def batched(query, keys, values, counts, table, lengths, pools, arrays):
        kv = replace(
            cache, key_pool=pools[0], value_pool=pools[1], block_table=table, seq_lengths=lengths
        )
        out, kv = rows.append_and_attend_rows(
            query, keys, values, kv, query_seq_lengths=counts, **eqx.combine(arrays, static)
        )
        return out, (kv.key_pool, kv.value_pool)

    @jax.custom_batching.custom_vmap
    def call(per_sequence, shared):
        out, pools = batched(*jax.tree.map(lambda x: x[None], per_sequence), *shared)
        return out[0], pools

    @call.def_vmap
    def _(axis_size, is_batched, per_sequence, shared):
        check_shared_pools(any(jax.tree.leaves(is_batched[1])))
        fill = lambda x, is_mapped: x if is_mapped else jnp.stack([x] * axis_size)
        out, pools = batched(*jax.tree.map(fill, per_sequence, is_batched[0]), *shared)
        return (out, pools), (True, (False, False))

    per_sequence = (query, keys, values, counts, cache.block_table, cache.seq_lengths)
    out, pools = call(per_sequence, ((cache.key_pool, cache.value_pool), arrays))
    return out, replace(cache, key_pool=pools[0], value_pool=pools[1])


def multihead_attention(
    module: eqx.nn.MultiheadAttention,
    x: Float[Array, "T query_size"],
    cache: PagedKVCache,
    *,
    process_heads: Callable | None = None,
    **attention: Any,
) -> tuple[Float[Array, "T output_size"], PagedKVCache]:
    """Self-attention by the weights of an `eqx.nn.MultiheadAttention`, over a paged cache.

    Args:
      module: `num_heads` are query and kv heads, `qk_size` equals `vo_size`; dropout is left out.
      x: (T, query_size), the new tokens of one sequence.
      cache: one sequence's view, advanced already.
      process_heads: from (query, keys, values), each (T, num_heads, head_dim), to the same, such as
        a rotary embedding at the tokens' positions.
      **attention: keywords of `attend`.

    Returns:
      (T, output_size), and the cache with the new tokens.

    Raises:
      ValueError, NotImplementedError: as `attend`.
    """
    projections = (module.query_proj, module.key_proj, module.value_proj)
    heads = [jax.vmap(p)(x).reshape(len(x), module.num_heads, -1) for p in projections]
    if process_heads is not None:
        heads = process_heads(*heads)
    out, cache = attend(*heads, cache=cache, **attention)
    return jax.vmap(module.output_proj)(out.reshape(len(x), -1)), cache
