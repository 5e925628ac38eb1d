"""The copying warpgroup of prefill: some warps bring keys, as many others values.

A copy that a whole warpgroup issues makes every thread announce its bytes; one warp is enough, and
keys and values then wait for their own slots only.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from .blocks import Ring, divide, pl, plgpu, remainder
from .plan import WARPGROUP_ROWS
from .prefill_cta import Cta, Work
from .prefill_list import Item
from .prefill_plan import CONSUMERS, ROW_GROUP


def produce(cta: Cta) -> None:
    """Brings the query rows and the tiles of every item, in the order of the visits."""
    warps, inputs = cta.plan.copy_warps, cta.inputs

    @plgpu.warp_map
    def _(warp):
        @pl.when(warp < warps)
        def _():
            _stream(cta, inputs.keys, cta.keys, warp, has_query=False)

        @pl.when((warp >= warps) & (warp < 2 * warps))
        def _():
            _stream(cta, inputs.values, cta.values, warp - warps, has_query=True)


def _stream(cta: Cta, pool_ref: Any, ring: Ring, part: Any, *, has_query: bool) -> None:
    """Every tile of one pool, or of each tile the part that is this warp's."""
    plan, count = cta.plan, cta.num_items
    first_block = cta.inputs.layer[0] * cta.problem.cache.num_blocks
    ids_of = partial(_ids, cta, pool_ref, part, first_block)

    def visit(index, carry):
        steps, work, ids = carry
        item, following = work.item, cta.work(index + 1)
        head = divide(work.first_head, cta.problem.group)
        if has_query:
            pl.when(part == 0)(partial(_copy_query, cta, index, work))

        def tile(i, carry):
            step, ids = carry
            visited, ids_after = item.visited(i), ()
            ids = ids or ids_of(item, visited)  # before the slot is free
            if plan.reads_ahead:
                # as the copies of this tile wait for their slot
                is_last = i + 1 >= item.num_visits
                either = lambda a, b: jnp.where(is_last, b, a)
                after = Item(*map(either, item, following.item))
                ids_after = ids_of(after, either(item.visited(i + 1), following.item.visited(0)))
            ring.await_empty(step)
            _copy(cta, pool_ref, ring, part, step, ids, head)
            return step + 1, ids_after

        steps, ids = lax.fori_loop(0, item.num_visits, tile, (steps, ids))
        return steps, following, ids

    @pl.when(count > 0)  # a loop of unknown end is none of a warp's
    def _():
        work = cta.work(jnp.int32(0))
        ids = ids_of(work.item, work.item.visited(0)) if plan.reads_ahead else ()
        steps, _, _ = lax.fori_loop(0, count, visit, (jnp.int32(0), work, ids))
        ring.drain(steps)
        if has_query:

            @pl.when(part == 0)
            def _():
                for consumer in range(CONSUMERS):
                    plgpu.barrier_wait(cta.query_empty(consumer))


def _copy_query(cta: Cta, index: Any, work: Work) -> None:
    """The rows of each consumer, once it is done with those of the item before."""
    for consumer in range(CONSUMERS):

        @pl.when(index > 0)
        def _():
            plgpu.barrier_wait(cta.query_empty(consumer))  # noqa: B023

        row, head = work.item.row_group * ROW_GROUP, work.first_head
        if cta.plan.heads_per_item == 1:
            row = row + consumer * WARPGROUP_ROWS
        else:
            head = head + consumer
        plgpu.copy_gmem_to_smem(
            cta.inputs.query.at[pl.ds(row, WARPGROUP_ROWS), head],
            cta.smem["query_smem"].at[consumer],
            cta.query_full(consumer),
        )


def _ids(
    cta: Cta, pool_ref: Any, part: Any, first_block: Any, item: Item, tile: Any
) -> tuple[Any, ...]:
    """The slices of blocks of this warp's part of a tile, in the pool of all layers.

    One that no query can see is outside of the pool, which brings zeros: its table entry is no
    address.
    """
    keys, count, table_ref = cta.plan.keys, cta.plan.copies_per_warp, cta.inputs.table
    slices = cta.plan.slices_per_block(cta.problem.cache.block_size)
    # read within the row, also where there is nothing to see
    last = jnp.maximum(item.block_stop - 1, item.block_start)

    def slice_of(index: Any) -> Any:
        read = jnp.clip(index, item.block_start, last)
        block = first_block + table_ref[item.sequence, divide(read, slices)]
        is_seen = (index >= item.block_start) & (index < item.block_stop)
        return jnp.where(is_seen, block * slices + remainder(read, slices), pool_ref.shape[0])

    first = tile * keys.blocks_per_tile + part * count
    return tuple(slice_of(first + i) for i in range(count))


def _copy(
    cta: Cta, pool_ref: Any, ring: Ring, part: Any, step: Any, ids: tuple[Any, ...], head: Any
) -> None:
    """Starts one TMA copy for each of this warp's slices of a tile."""
    keys, slot, full = cta.plan.keys, ring.slot(step), ring.full.at[ring.barrier(step)]

    def issue(which: int) -> None:  # its number is static, for a slice of a tile has to be
        for i, index in enumerate(ids):
            start = (which * len(ids) + i) * keys.copy_rows
            target = ring.slots.at[slot]
            if keys.copy_rows < keys.rows:
                target = ring.slots.at[slot, pl.ds(start, keys.copy_rows)]
            plgpu.copy_gmem_to_smem(pool_ref.at[index, :, head], target, full)

    for which in range(cta.plan.copy_warps):
        pl.when(part == which)(partial(issue, which))
