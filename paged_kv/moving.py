"""Whole blocks that move: copies that an allocator asks for, to host memory and back, to the front.

All are pure functions of arrays.  Donate the cache where it is jitted, or each makes a new pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from . import validate, validate_values
from .allocator import BlockAllocator, PendingBlocks
from .cache import PagedKVCache
from .kernels.core import layout
from .padding import padded_ids
from .state import copy_blocks, in_pool, scrub_blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class HostBlocks:
    """Blocks in host memory, pinned where the platform has such: what `swap_out` returns.

    Attributes:
      keys, values: (n, block_size, num_kv_heads, head_dim), or with num_layers in front: the pools'
        shape, packed or not, with n blocks in place of num_blocks.

    Source: the preemption by swapping of vLLM (Kwon et al., 2023); JAX's memory kinds.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that they take."""
        return self.keys.nbytes + self.values.nbytes


def apply_pending(cache: PagedKVCache, pending: PendingBlocks) -> PagedKVCache:
    """Copies and scrubs the blocks that `BlockAllocator.take_pending` lists, all layers.

    Do it before the next tokens are written.

    Args:
      cache: of one layer or a stack, whose blocks the allocator hands out.
      pending: from `take_pending`; pass it through `jit` as it is.

    Raises:
      ValueError: an id is past the pool (concrete values only; under jit it is skipped).

    Source: the copy-on-write of vLLM (Kwon et al., 2023).
    """
    source, target, scrubbed = map(jnp.asarray, pending)
    cache = copy_blocks(cache, source, target) if source.size else cache
    return scrub_blocks(cache, scrubbed) if scrubbed.size else cache


def swap_out(
    cache: PagedKVCache, block_ids: Sequence[int] | np.ndarray | Int32[Array, "n"]
) -> HostBlocks:
    """Copies blocks, keys and values of all layers, to host memory; the cache stays as it is.

    The copy is asynchronous.  Once this returns, the blocks may be given to others.

    Args:
      cache: of one layer or a stack.
      block_ids: as from `BlockAllocator.blocks`, filled up here to a power of two so that few
        programs are compiled; or int32 (n,) of jax, taken as they are.  Ids below 0 are skipped.

    Raises:
      ValueError: the ids are not int32 (n,), or one is past the pool (concrete values only).

    Source: the preemption by swapping of vLLM (Kwon et al., 2023); JAX's memory kinds.
    """
    ids = _as_ids(block_ids)
    validate_values.block_ids("block_ids", ids, cache.num_blocks)
    ids = jnp.where(in_pool(ids, cache), ids, cache.num_blocks)

    def fetch(pool: Array) -> Array:
        blocks = jnp.take(pool, ids, axis=_block_axis(cache), mode="fill", fill_value=0)
        return jax.device_put(blocks, jax.memory.Space.Host)

    with jax.named_scope("paged_kv.swap_out"):
        return HostBlocks(fetch(cache.key_pool), fetch(cache.value_pool))


def swap_in(
    cache: PagedKVCache,
    host_blocks: HostBlocks,
    block_ids: Sequence[int] | np.ndarray | Int32[Array, "n"],
) -> PagedKVCache:
    """Puts blocks from host memory into the pools, into the same blocks as before or into others.

    Args:
      cache: of one layer or a stack, as the one they are from.
      host_blocks: what `swap_out` returned.
      block_ids: ids to put them under, in the same order, as in `swap_out`.  Ids below 0 are
        skipped.

    Raises:
      ValueError: the blocks are not the cache's in shape or dtype, the ids are more or fewer than
        they, or one is past the pool or named twice (concrete values only; under jit it is
        skipped).

    Source: the preemption by swapping of vLLM (Kwon et al., 2023); JAX's memory kinds.
    """
    ids = _as_ids(block_ids)
    axis = _block_axis(cache)
    expected = (*cache.key_pool.shape[:axis], len(ids), *cache.key_pool.shape[axis + 1 :])
    for name, blocks in (("keys", host_blocks.keys), ("values", host_blocks.values)):
        if blocks.shape != expected or blocks.dtype != cache.key_pool.dtype:
            raise ValueError(
                f"{name} {blocks.dtype}{blocks.shape} of host_blocks must be "
                f"{cache.key_pool.dtype}{expected} for {len(ids)} block_ids of this cache"
            )
    validate_values.block_ids("block_ids", ids, cache.num_blocks)
    validate_values.different_targets(ids)
    ids = jnp.where(in_pool(ids, cache), ids, cache.num_blocks)

    def put(pool: Array, blocks: Array) -> Array:
        blocks = layout.as_layers(jax.device_put(blocks, jax.memory.Space.Device), axis == 1)
        layers = layout.as_layers(pool, axis == 1)
        return layers.at[:, ids].set(blocks, mode="drop").reshape(pool.shape)

    with jax.named_scope("paged_kv.swap_in"):
        return replace(
            cache,
            key_pool=put(cache.key_pool, host_blocks.keys),
            value_pool=put(cache.value_pool, host_blocks.values),
        )


def move_blocks(
    cache: PagedKVCache, source_ids: Int32[Array, "n"], target_ids: Int32[Array, "n"]
) -> PagedKVCache:
    """Moves blocks, contents and table entries, as `BlockAllocator.defragment` lists them.

    All sources are read before any target is written: needs memory for the blocks moved.

    Args:
      cache: of one layer or a stack.
      source_ids, target_ids: int32 (n,), ids before and after.  A pair with one below 0 is skipped.

    Raises:
      ValueError: as `copy_blocks`.
    """
    source, target = validate.id_pairs(source_ids, target_ids)
    cache = copy_blocks(cache, source, target)
    is_pair = in_pool(source, cache) & in_pool(target, cache)
    new_id = jnp.arange(cache.num_blocks, dtype=jnp.int32)
    new_id = new_id.at[jnp.where(is_pair, source, cache.num_blocks)].set(target, mode="drop")
    table = cache.block_table
    moved = new_id[jnp.clip(table, 0, cache.num_blocks - 1)]
    return replace(cache, block_table=jnp.where(in_pool(table, cache), moved, table))


def defragment(
    cache: PagedKVCache, allocator: BlockAllocator, *, max_moves: int | None = None
) -> PagedKVCache:
    """Moves the blocks of every sequence into a run of neighbours, from block 0 on.

    Kernels copy a run at once, and what is free becomes one run too.  Tells the allocator, does
    what it has pending, and rewrites the table.  Tables made before are void: make them anew.

    Args:
      cache: whose blocks `allocator` hands out.
      allocator: it must know every block in use.
      max_moves: blocks to move at most (one more where two change places): the pause, and the
        memory for their contents; call it again for the next.  None moves all.

    Raises:
      ValueError: the allocator has another pool or block size than the cache.
    """
    sizes = (cache.num_blocks, cache.block_size)
    if sizes != (allocator.num_blocks, allocator.block_size):
        raise ValueError(
            f"the allocator has num_blocks={allocator.num_blocks} of "
            f"block_size={allocator.block_size}, the cache {sizes[0]} of {sizes[1]}; pass the "
            "cache's own allocator"
        )
    cache = apply_pending(cache, allocator.take_pending())
    source, target = map(jnp.asarray, allocator.defragment(max_moves))
    return move_blocks(cache, source, target) if source.size else cache


def _block_axis(cache: PagedKVCache) -> int:
    return 0 if cache.num_layers is None else 1


def _as_ids(block_ids: Sequence[int] | np.ndarray | Array) -> Array:
    """Ids as an int32 array; those of the host are filled up."""
    if not isinstance(block_ids, jax.Array):
        block_ids = padded_ids(np.asarray(block_ids, np.int32).reshape(-1).tolist())
    return validate.ids("block_ids", block_ids)
