"""Pools as rows of 128 values, and back: a reshape."""

from ..cache import PackedKVCache, PagedKVCache, packed_shape


def pack(cache: PagedKVCache) -> PackedKVCache:
    """The cache with its blocks as rows of 128 values: convert once, then every op takes it.

    On a TPU this copies the pools; `init_paged_kv_cache(..., packed=True)` makes an empty one.

    Args:
      cache: of one layer or a stack; a packed one is returned as it is.

    Raises:
      ValueError: the blocks are not whole rows of 128 values.
    """
    if isinstance(cache, PackedKVCache):
        return cache
    shape = packed_shape(cache.key_pool.shape)
    token_shape = (cache.num_kv_heads, cache.head_dim)
    return PackedKVCache(
        cache.key_pool.reshape(shape),
        cache.value_pool.reshape(shape),
        cache.block_table,
        cache.seq_lengths,
        token_shape,
    )


def unpack(cache: PagedKVCache) -> PagedKVCache:
    """The inverse of `pack`: pools by block, token and head.

    Args:
      cache: of one layer or a stack; one that is not packed is returned as it is.
    """
    if not isinstance(cache, PackedKVCache):
        return cache
    layers = () if cache.num_layers is None else (cache.num_layers,)
    shape = (*layers, cache.num_blocks, cache.block_size, *cache.token_shape)
    return PagedKVCache(
        cache.key_pool.reshape(shape),
        cache.value_pool.reshape(shape),
        cache.block_table,
        cache.seq_lengths,
    )
