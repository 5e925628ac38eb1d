"""Tables and slots as FlashInfer and vLLM have them."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from .. import validate, validate_forms
from ..cache import PagedKVCache


class CsrTable(NamedTuple):
    """A block table as compressed rows, FlashInfer's `kv_indptr`, `kv_indices`, `last_page_len`.

    Attributes:
      indptr: int32 (batch + 1,), where the blocks of each sequence begin in `indices`.
      indices: int32 (entries,), blocks of all sequences, one after another; past indptr[-1], zeros.
      last_page_len: int32 (batch,), tokens in a sequence's last block, 0 where it has none.

    Source: FlashInfer's paged kv-cache layout (Ye et al., 2025).
    """

    indptr: Int32[Array, "batch_plus_1"]
    indices: Int32[Array, "entries"]
    last_page_len: Int32[Array, "batch"]


def to_csr(cache: PagedKVCache, capacity: int | None = None) -> CsrTable:
    """The table and lengths of a cache as FlashInfer takes them; only blocks that hold tokens.

    FlashInfer's own `last_page_len` is at least 1: leave sequences of length 0 out of its batch.

    Args:
      cache: of one layer or a stack.
      capacity: blocks that `indices` has room for, needed under jit; None: as many as there are.

    Raises:
      ValueError: under jit without a capacity, one that is too small, or a table that has no block
        for some token (concrete values only).

    Source: FlashInfer's paged kv-cache layout (Ye et al., 2025).
    """
    validate.cache_shape(cache)
    validate_forms.held_blocks(cache, capacity)
    needs = -(-cache.seq_lengths // cache.block_size)
    indptr = jnp.pad(jnp.cumsum(needs, dtype=jnp.int32), (1, 0))
    entry = jnp.arange(cache.max_blocks_per_seq, dtype=jnp.int32)[None, :]
    size = int(indptr[-1]) if capacity is None else capacity
    target = jnp.where(entry < needs[:, None], indptr[:-1, None] + entry, size)
    indices = jnp.zeros(size, jnp.int32).at[target].set(cache.block_table, mode="drop")
    last = cache.seq_lengths - jnp.maximum(needs - 1, 0) * cache.block_size
    return CsrTable(indptr, indices, last)


def from_csr(cache: PagedKVCache, csr: CsrTable) -> PagedKVCache:
    """A cache with the table and lengths of a CSR table: the inverse of `to_csr`.

    Args:
      cache: gives pools and the width of rows; its own table and lengths are replaced.
      csr: with any batch; runs on the host.

    Raises:
      ValueError: `indptr` does not rise from 0 within `indices`, a row has more blocks than
        `max_blocks_per_seq`, a block is outside the pool, or `last_page_len` is not 1 to block_size
        (0 for a sequence without blocks).
    """
    indptr, indices, last = (np.asarray(array, np.int32) for array in csr)
    validate_forms.csr(cache, indptr, indices, last)
    table = np.full((len(last), cache.max_blocks_per_seq), -1, np.int32)
    for row, start, stop in zip(table, indptr[:-1], indptr[1:], strict=True):
        row[: stop - start] = indices[start:stop]
    lengths = np.maximum(np.diff(indptr) - 1, 0) * cache.block_size + last
    return replace(
        cache, block_table=jnp.asarray(table), seq_lengths=jnp.asarray(lengths, jnp.int32)
    )


def write_slots(
    cache: PagedKVCache,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slot_mapping: Int32[Array, "num_tokens"],
    *,
    layer: int | Int32[Array, ""] | None = None,
) -> PagedKVCache:
    """Writes tokens where a `slot_mapping` of vLLM's says; table and lengths do not matter.

    In place when the cache is donated; on a device `append_tokens` is faster.

    Args:
      cache: of one layer, or a stack with `layer`.
      keys, values: (num_tokens, num_kv_heads, head_dim), cast to the pools' dtype.
      slot_mapping: int32 (num_tokens,), `block * block_size + offset`; a token with a slot below 0,
        or past the pool under jit, is dropped.
      layer: which layer of a stacked cache, an int or a traced int32.

    Raises:
      ValueError: shapes, dtypes or `layer` do not fit; a slot is past the pool (concrete values).

    Source: the reshape_and_cache of vLLM.
    """
    validate.new_tokens(cache, keys, values)
    at = _slots(cache, slot_mapping, keys.shape[0], layer)

    def write(pool: Array, new: Array) -> Array:
        blocks = pool.reshape(_pool_shape(cache))
        return (
            blocks.at[at].set(jnp.asarray(new).astype(pool.dtype), mode="drop").reshape(pool.shape)
        )

    return replace(
        cache, key_pool=write(cache.key_pool, keys), value_pool=write(cache.value_pool, values)
    )


def read_slots(
    cache: PagedKVCache,
    slot_mapping: Int32[Array, "num_tokens"],
    *,
    layer: int | Int32[Array, ""] | None = None,
) -> tuple[
    Float[Array, "num_tokens num_kv_heads head_dim"],
    Float[Array, "num_tokens num_kv_heads head_dim"],
]:
    """Keys and values of slots: the inverse of `write_slots`.

    Args:
      cache: of one layer, or a stack with `layer`.
      slot_mapping: int32 (num_tokens,), `block * block_size + offset`; a slot below 0, or past the
        pool under jit, gives zeros.
      layer: which layer of a stacked cache, an int or a traced int32.

    Returns:
      Keys and values, (num_tokens, num_kv_heads, head_dim) each.

    Raises:
      ValueError: dtypes or `layer` do not fit; a slot is past the pool (concrete values).
    """
    at = _slots(cache, slot_mapping, None, layer)

    def read(pool: Array) -> Array:
        return pool.reshape(_pool_shape(cache)).at[at].get(mode="fill", fill_value=0)

    return read(cache.key_pool), read(cache.value_pool)


def _slots(
    cache: PagedKVCache, slot_mapping: Array, num_tokens: int | None, layer: object
) -> tuple[Array, Array, Array]:
    """(layer, block, offset) of each slot, past the pool where there is none."""
    slots = validate_forms.slots(slot_mapping, num_tokens, cache.num_blocks * cache.block_size)
    layer = validate.layer_index(cache, layer)
    is_valid = (slots >= 0) & (layer >= 0) & (layer < (cache.num_layers or 1))
    block = jnp.where(is_valid, slots // cache.block_size, cache.num_blocks)
    return layer, block, slots % cache.block_size


def _pool_shape(cache: PagedKVCache) -> tuple[int, ...]:
    """Of pools by layer, block, token and head, packed or not."""
    sizes = (cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim)
    return cache.num_layers or 1, *sizes
