"""Pools as other libraries lay them out."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32

from .. import validate_forms
from ..cache import PagedKVCache
from ..kernels.core.layout import LANES
from .packing import unpack

LAYOUTS = ("NHD", "HND", "heads_first", "flat", "flashinfer", "vllm", "rpa_v2", "rpa_v3")


def to_layout(cache: PagedKVCache, layout: str) -> Any:
    """The pools of a cache in another layout: a pair (keys, values), or one array of both.

    With num_layers in front of each shape for a stack:

    - "NHD": a pair of (num_blocks, block_size, num_kv_heads, head_dim), as they are here.
    - "HND": a pair of (num_blocks, num_kv_heads, block_size, head_dim).
    - "heads_first": a pair of (num_kv_heads, num_blocks, block_size, head_dim).
    - "flat": a pair of (num_blocks * block_size, num_kv_heads, head_dim), a row for each slot.
    - "flashinfer": (num_blocks, 2, block_size, num_kv_heads, head_dim).
    - "vllm": (2, num_blocks, block_size, num_kv_heads, head_dim).
    - "rpa_v2": (num_blocks, block_size, 2 * num_kv_heads, head_dim), heads as k0, v0, k1, v1.
    - "rpa_v3": (num_blocks, block_size, heads / n, n, width): heads as in "rpa_v2", zeros after
      them up to a multiple of n = 4 bytes / itemsize, and head_dim up to one of 128.

    Args:
      cache: of one layer or a stack, packed or not.
      layout: one of `LAYOUTS`.

    Returns:
      One or two arrays, (num_blocks, block_size, ...) or as listed, in the pools' dtype.

    Raises:
      ValueError: the layout has another name.

    Source: FlashInfer's kv layouts, JAX's TPU paged attention ("heads_first"), vLLM's backend of
    FlashAttention, and ragged paged attention as in JAX (v2) and tpu-inference (v3).
    """
    validate_forms.layout_name(layout, LAYOUTS)
    cache = unpack(cache)
    pair = cache.key_pool, cache.value_pool
    match layout:
        case "HND":
            return tuple(jnp.swapaxes(pool, -3, -2) for pool in pair)
        case "heads_first":
            return tuple(jnp.moveaxis(pool, -2, -4) for pool in pair)
        case "flat":
            return tuple(pool.reshape(*pool.shape[:-4], -1, *pool.shape[-2:]) for pool in pair)
        case "flashinfer":
            return jnp.stack(pair, axis=-4)
        case "vllm":
            return jnp.stack(pair, axis=-5)
        case "rpa_v2":
            return _interleaved(*pair)
        case "rpa_v3":
            return _in_registers(_interleaved(*pair))
    return pair


def from_layout(
    pools: Any,
    layout: str,
    block_table: Int32[Array, "batch max_blocks_per_seq"],
    seq_lengths: Int32[Array, "batch"],
    *,
    block_size: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> PagedKVCache:
    """A cache of pools that come in another layout: the inverse of `to_layout`.

    Args:
      pools: a pair of arrays or one, (num_blocks, ...) or as `to_layout` lists for the layout.
      layout: one of `LAYOUTS`.
      block_table, seq_lengths: as in `PagedKVCache`.
      block_size: token slots of a block, for "flat", which does not say it.
      num_kv_heads, head_dim: heads, and values of each, for "rpa_v3", which may be padded; by
        default nothing is padding.

    Raises:
      ValueError: the layout has another name, the pools are no arrays of that layout, or a size it
        does not say is missing or too large.
    """
    validate_forms.layout_name(layout, LAYOUTS)
    validate_forms.layout_pools(pools, layout, block_size)
    match layout:
        case "HND":
            pools = tuple(jnp.swapaxes(pool, -3, -2) for pool in pools)
        case "heads_first":
            pools = tuple(jnp.moveaxis(pool, -4, -2) for pool in pools)
        case "flat":
            assert block_size is not None
            pools = tuple(_in_blocks(pool, block_size) for pool in pools)
        case "flashinfer":
            pools = pools[..., 0, :, :, :], pools[..., 1, :, :, :]
        case "vllm":
            pools = pools[..., 0, :, :, :, :], pools[..., 1, :, :, :, :]
        case "rpa_v2":
            pools = pools[..., 0::2, :], pools[..., 1::2, :]
        case "rpa_v3":
            heads = pools.reshape(*pools.shape[:-3], -1, pools.shape[-1])
            count, width = num_kv_heads or heads.shape[-2] // 2, head_dim or heads.shape[-1]
            validate_forms.unpadded(heads.shape, count, width)
            heads = heads[..., : 2 * count, :width]
            pools = heads[..., 0::2, :], heads[..., 1::2, :]
    keys, values = map(jnp.asarray, pools)
    return PagedKVCache(keys, values, jnp.asarray(block_table), jnp.asarray(seq_lengths))


def _interleaved(keys: Array, values: Array) -> Array:
    """(..., num_kv_heads, head_dim) twice to (..., 2 * num_kv_heads, head_dim): k0, v0, k1, v1."""
    both = jnp.stack((keys, values), axis=-2)
    return both.reshape(*keys.shape[:-2], -1, keys.shape[-1])


def _in_registers(heads: Array) -> Array:
    """Rows of heads, n to a register of 4 bytes, as wide as 128 lanes; zeros fill up."""
    per_register = max(4 // heads.dtype.itemsize, 1)
    count, width = heads.shape[-2:]
    padding = [(0, 0)] * (heads.ndim - 2) + [(0, -count % per_register), (0, -width % LANES)]
    padded = jnp.pad(heads, padding)
    return padded.reshape(*heads.shape[:-2], -1, per_register, padded.shape[-1])


def _in_blocks(pool: Array, block_size: int) -> Array:
    return pool.reshape(*pool.shape[:-3], -1, block_size, *pool.shape[-2:])
