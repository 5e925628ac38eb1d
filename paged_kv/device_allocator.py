"""Blocks handed out and taken back on the device, for decode loops that never leave it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from . import validate
from .cache import PagedKVCache
from .state import reset_sequences


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DeviceAllocator:
    """A stack of free blocks, to carry through a loop beside the cache.

    Attributes:
      free_ids: int32 (num_blocks,), of which the first `num_free` are free, the last of them next;
        the rest has no meaning.
      num_free: int32 (), blocks left.

    Source: the device-side page tables of Levanter and jax-llm-examples.
    """

    free_ids: Int32[Array, "num_blocks"]
    num_free: Int32[Array, ""]


def init_device_allocator(
    num_blocks: int, free_ids: Int32[Array, "n"] | np.ndarray | list[int] | None = None
) -> DeviceAllocator:
    """An allocator over a pool of `num_blocks` of which `free_ids` are free, by default all.

    They are handed out in the order given.  Host and device may work on one pool in turns: give
    the device what a `BlockAllocator` sequence holds, and free that when the loop has ended.

    Args:
      num_blocks: blocks of the pool.
      free_ids: ids of the free blocks, ints or int (n,); None: 0 to num_blocks - 1.

    Raises:
      ValueError: `num_blocks` is not a positive int, an id is outside the pool or named twice.
    """
    validate.positive_ints({"num_blocks": num_blocks})
    ids = np.arange(num_blocks) if free_ids is None else np.asarray(free_ids, np.int64).reshape(-1)
    is_inside = (ids >= 0) & (ids < num_blocks)
    if not is_inside.all() or len(np.unique(ids)) != len(ids):
        raise ValueError(f"free_ids={ids.tolist()} must be different ids in [0, {num_blocks})")
    stack = np.full(num_blocks, -1, np.int32)
    stack[: len(ids)] = ids[::-1]
    return DeviceAllocator(jnp.asarray(stack), jnp.asarray(len(ids), jnp.int32))


def device_allocate(
    cache: PagedKVCache, allocator: DeviceAllocator, num_new_tokens: int | Int32[Array, "batch"]
) -> tuple[PagedKVCache, DeviceAllocator, Bool[Array, "batch"]]:
    """Gives rows the blocks that their next tokens need, under jit, scan and while_loop alike.

    Entries that a row holds already are kept.  Rows are served from the first on, each wholly or
    not at all: once a row is refused, later ones that need blocks are too.  Lengths stay, as in
    `allocate_blocks`; call it before `advance`.

    Args:
      cache: of one layer or a stack.
      allocator: the free blocks.
      num_new_tokens: tokens to make room for past each length, an int or int32 (batch,).

    Returns:
      The cache, the allocator, and bool (batch,): which rows now have room for their tokens.  A row
      that has none (too few blocks, a count below 0 or past the row's end) got nothing: its entries
      are still -1, what is appended there is dropped; do not advance it.

    Raises:
      ValueError: `num_new_tokens` is not an int or int32 (batch,).

    Source: the device-side page tables of Levanter and jax-llm-examples.
    """
    counts = validate.token_counts("num_new_tokens", num_new_tokens, cache)
    lengths, size = cache.seq_lengths, cache.block_size
    batch, width = cache.block_table.shape
    with jax.named_scope("paged_kv.device_allocate"):
        fits_row = (counts >= 0) & (counts <= width * size - lengths)
        counts = jnp.where(fits_row, counts, 0)
        start, stop = lengths // size, -(-(lengths + counts) // size)
        stop = jnp.where(counts > 0, stop, start)
        entry = jnp.arange(width, dtype=jnp.int32)[None]
        is_missing = (entry >= start[:, None]) & (entry < stop[:, None]) & (cache.block_table < 0)
        needed = is_missing.sum(1, dtype=jnp.int32)
        is_served = jnp.cumsum(needed) <= allocator.num_free
        is_taken = is_missing & is_served[:, None]
        rank = jnp.cumsum(is_taken.reshape(-1), dtype=jnp.int32).reshape(batch, width) - 1
        place = jnp.where(is_taken, allocator.num_free - 1 - rank, 0)
        table = jnp.where(is_taken, allocator.free_ids[place], cache.block_table)
        num_free = allocator.num_free - is_taken.sum(dtype=jnp.int32)
        is_allocated = fits_row & (is_served | (needed == 0))
    return (
        replace(cache, block_table=table),
        replace(allocator, num_free=num_free),
        is_allocated,
    )


def device_free(
    cache: PagedKVCache, allocator: DeviceAllocator, mask: Bool[Array, "batch"]
) -> tuple[PagedKVCache, DeviceAllocator]:
    """Empties the rows where `mask` is true (as `reset_sequences`) and takes their blocks back.

    A block that several rows name comes back once, with the last of them.  Every entry of a freed
    row counts, also past its length; those outside the pool are not blocks.

    Args:
      cache: of one layer or a stack.
      allocator: the free blocks.
      mask: bool (batch,), the rows to empty.

    Returns:
      The cache with those rows at -1 and their lengths at 0, and the allocator.

    Raises:
      ValueError: `mask` is not bool (batch,).
    """
    validate.row_mask("mask", mask, cache)
    mask = jnp.asarray(mask)
    num_blocks, table = cache.num_blocks, cache.block_table
    with jax.named_scope("paged_kv.device_free"):
        in_pool = (table >= 0) & (table < num_blocks)
        kept = jnp.where(in_pool & ~mask[:, None], table, num_blocks).reshape(-1)
        gone = jnp.where(in_pool & mask[:, None], table, num_blocks).reshape(-1)
        is_kept = jnp.zeros(num_blocks, jnp.bool_).at[kept].set(True, mode="drop")
        number = jnp.arange(table.size, dtype=jnp.int32)
        first = jnp.full(num_blocks, table.size, jnp.int32).at[gone].min(number, mode="drop")
        block = jnp.minimum(gone, num_blocks - 1)
        is_freed = (gone < num_blocks) & ~is_kept[block] & (first[block] == number)
        place = allocator.num_free + jnp.cumsum(is_freed, dtype=jnp.int32) - 1
        place = jnp.where(is_freed, place, num_blocks)
        free_ids = allocator.free_ids.at[place].set(gone, mode="drop")
        num_free = allocator.num_free + is_freed.sum(dtype=jnp.int32)
    freed = DeviceAllocator(free_ids, jnp.minimum(num_free, num_blocks))
    return reset_sequences(cache, mask), freed
