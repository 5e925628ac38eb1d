"""Dense (batch, S, num_kv_heads, head_dim) keys and values, and DLPack views."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import validate, validate_forms
from ..cache import PagedKVCache
from .packing import unpack


def from_dense(
    keys: Float[Array, "*layers batch S num_kv_heads head_dim"],
    values: Float[Array, "*layers batch S num_kv_heads head_dim"],
    seq_lengths: Int32[Array, "batch"] | None = None,
    *,
    block_size: int,
) -> PagedKVCache:
    """A cache of dense keys and values: sequence b has blocks b * n up to (b + 1) * n.

    For more room than S, or blocks shared with others, `append_rows` into a cache of one's own.

    Args:
      keys, values: (batch, S, num_kv_heads, head_dim), or with num_layers in front for a stack.
      seq_lengths: int32 (batch,), valid tokens of each sequence, the first of its row; None: all S.
      block_size: token slots of a block; n = ceil(S / block_size).

    Raises:
      ValueError: shapes disagree, `block_size` is not a positive int, or `seq_lengths` is not int32
        (batch,) within S (concrete values only).
    """
    validate.positive_ints({"block_size": block_size})
    batch, width = validate_forms.dense_pair(keys, values)
    lengths = jnp.full(batch, width, jnp.int32) if seq_lengths is None else seq_lengths
    validate_forms.dense_lengths(lengths, batch, width)
    num_blocks = -(-width // block_size)

    def blocks(rows: Array) -> Array:
        padding = [(0, 0)] * (rows.ndim - 3) + [(0, -width % block_size), (0, 0), (0, 0)]
        shape = (*rows.shape[:-4], batch * num_blocks, block_size, *rows.shape[-2:])
        return jnp.pad(rows, padding).reshape(shape)

    table = jnp.arange(batch * num_blocks, dtype=jnp.int32).reshape(batch, num_blocks)
    return PagedKVCache(blocks(keys), blocks(values), table, jnp.asarray(lengths))


def to_dense(
    cache: PagedKVCache,
) -> tuple[
    Float[Array, "*layers batch S num_kv_heads head_dim"],
    Float[Array, "*layers batch S num_kv_heads head_dim"],
]:
    """All keys and values as dense arrays, S = max_blocks_per_seq * block_size, zeros past lengths.

    Works under jit.  A table entry outside the pool gives zeros.

    Args:
      cache: of one layer or a stack, packed or not.

    Returns:
      Keys and values, (batch, S, num_kv_heads, head_dim) each, or with num_layers in front.

    Raises:
      ValueError: the fields of the cache do not agree.
    """
    validate.cache_shape(cache)
    cache = unpack(cache)
    table = jnp.where(cache.block_table < 0, cache.num_blocks, cache.block_table)
    position = jnp.arange(cache.max_blocks_per_seq * cache.block_size, dtype=jnp.int32)
    is_token = (position[None, :] < cache.seq_lengths[:, None])[..., None, None]

    def rows(pool: Array) -> Array:
        blocks = pool.at[..., table, :, :, :].get(mode="fill", fill_value=0)
        dense = blocks.reshape(*pool.shape[:-4], cache.batch_size, -1, *pool.shape[-2:])
        is_kept = is_token.reshape((1,) * (dense.ndim - 4) + is_token.shape)
        return jnp.where(is_kept, dense, jnp.zeros((), pool.dtype))

    return rows(cache.key_pool), rows(cache.value_pool)


class CacheViews(NamedTuple):
    """The arrays of a cache as another library's, over the same memory.

    Attributes:
      key_pool, value_pool, block_table, seq_lengths: shaped and typed as in `PagedKVCache`, or the
        pools as in `PackedKVCache`.

    Source: the DLPack protocol of the Python array API standard.
    """

    key_pool: Any
    value_pool: Any
    block_table: Any
    seq_lengths: Any


def to_dlpack(cache: PagedKVCache, from_dlpack: Callable[[Any], Any]) -> CacheViews:
    """Views of a cache for another library, without a copy: `to_dlpack(cache, torch.from_dlpack)`.

    JAX arrays never change: write to a view only when nothing else holds the cache, and use no view
    of a cache that was donated.

    Args:
      cache: of one layer or a stack; its shapes stay.
      from_dlpack: the library's; NumPy's knows no bfloat16.

    Source: the DLPack protocol of the Python array API standard.
    """
    arrays = (cache.key_pool, cache.value_pool, cache.block_table, cache.seq_lengths)
    return CacheViews(*map(from_dlpack, arrays))


def from_dlpack(key_pool: Any, value_pool: Any, block_table: Any, seq_lengths: Any) -> PagedKVCache:
    """A cache over another library's arrays, without a copy where JAX can: torch's, NumPy's.

    Args:
      key_pool, value_pool: (num_blocks, block_size, num_kv_heads, head_dim), or with num_layers in
        front; anything with `__dlpack__`.  Other layouts: `from_layout` takes the arrays of
        `jnp.from_dlpack`.
      block_table, seq_lengths: int32, (batch, max_blocks_per_seq) and (batch,).

    Raises:
      ValueError: the arrays are not those of one cache.

    Source: the DLPack protocol of the Python array API standard.
    """
    arrays = (key_pool, value_pool, block_table, seq_lengths)
    cache = PagedKVCache(*map(jax.dlpack.from_dlpack, arrays))
    validate.cache_shape(cache)
    return cache
