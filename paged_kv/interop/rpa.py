"""Ragged paged attention of tpu-inference (RPA v3): its arguments from a cache, and back."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import validate, validate_forms
from ..cache import PagedKVCache
from ..kernels.core import layout
from .pools import from_layout, to_layout


class RpaArguments(NamedTuple):
    """What `ragged_paged_attention` of tpu-inference takes besides queries, keys and values.

    Attributes:
      kv_cache: the pools of one layer in the layout "rpa_v3".
      kv_lens: int32 (batch,), tokens of each sequence, those of the step included.
      page_indices: int32 (batch * max_blocks_per_seq,), the table, row after row, 0 where unused.
      cu_q_lens: int32 (batch + 1,), our `query_start_loc`.
      distribution: int32 (3,): sequences before the first are decoded, one token each, those before
        the second are chunks of one static size (none here), those before the third are the rest.

    Source: vllm-project/tpu-inference, kernels/ragged_paged_attention/v3.
    """

    kv_cache: Float[Array, "num_blocks block_size head_rows heads_per_row width"]
    kv_lens: Int32[Array, "batch"]
    page_indices: Int32[Array, "entries"]
    cu_q_lens: Int32[Array, "batch_plus_1"]
    distribution: Int32[Array, "3"]


def to_rpa(
    cache: PagedKVCache, query_start_loc: Int32[Array, "batch_plus_1"] | None = None
) -> RpaArguments:
    """A single layer's cache as RPA v3 takes it.

    Sequences with one token of the step profit where they come first.  A window of `(W - 1, 0)`
    here is `sliding_window=W` there, and `sm_scale` there has no default of 1/sqrt(head_dim).

    Args:
      cache: of one layer, advanced already; without the step's tokens, which RPA writes itself.
      query_start_loc: int32 (batch + 1,); None: one token per sequence.

    Raises:
      ValueError: the cache is stacked, or `query_start_loc` does not fit it.

    Source: vllm-project/tpu-inference, kernels/ragged_paged_attention/v3.
    """
    validate.single_layer("to_rpa", cache)
    validate.start_locations(cache, query_start_loc, None)
    starts = layout.start_locations(query_start_loc, cache.batch_size)
    is_decode = (jnp.diff(starts) == 1).astype(jnp.int32)
    num_decodes = jnp.sum(jnp.cumprod(is_decode), dtype=jnp.int32)
    return RpaArguments(
        to_layout(cache, "rpa_v3"),
        cache.seq_lengths,
        jnp.where(cache.block_table < 0, 0, cache.block_table).reshape(-1),
        starts,
        jnp.stack([num_decodes, num_decodes, jnp.int32(cache.batch_size)]),
    )


def from_rpa(
    kv_cache: Float[Array, "num_blocks block_size head_rows heads_per_row width"],
    kv_lens: Int32[Array, "batch"],
    page_indices: Int32[Array, "entries"],
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> PagedKVCache:
    """A cache of RPA v3's arrays: the inverse of `to_rpa`.

    Args:
      kv_cache, kv_lens, page_indices: as in `RpaArguments`.
      num_kv_heads, head_dim: heads, and values of each, where `kv_cache` is padded; by default
        nothing is.

    Returns:
      The cache; entries of its table past a sequence's length are -1.

    Raises:
      ValueError: `page_indices` is not a whole row for each sequence, or as `from_layout`.
    """
    rows = validate_forms.table_rows(page_indices, kv_lens)
    table = jnp.asarray(page_indices).reshape(rows)
    cache = from_layout(
        kv_cache, "rpa_v3", table, kv_lens, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    first = jnp.arange(rows[1], dtype=jnp.int32)[None, :] * cache.block_size
    is_used = first < cache.seq_lengths[:, None]
    return PagedKVCache(
        cache.key_pool, cache.value_pool, jnp.where(is_used, table, -1), cache.seq_lengths
    )
