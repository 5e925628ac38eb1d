"""The kernel of prefill: persistent CTAs over a list of query tiles, those with most keys first.

The roles are those of FlashAttention-3 (Shah et al., 2024).

    CTA c takes one item of each round of the list: a query tile, for two heads of one kv head

    copies      table -> block ids -> TMA: one warp or two bring K, as many bring V (and Q)
    consumers   each its own 64 rows of queries: two heads, or two tiles of one head
                prefill_step.py for the tiles of keys, from the diagonal down
                after the item: (O, lse) -> shared memory -> TMA

Results go to the packed rows of their tokens.  At an end of a sequence a tile holds rows of others,
so its own are copied apart.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.arrays import AttentionArrays
from ..core.problem import Problem
from . import blocks, prefill_step, step_work
from .blocks import divide, pl, plgpu
from .plan import WARPGROUP_ROWS
from .prefill_copies import produce
from .prefill_cta import Cta, Inputs, Outputs, Work
from .prefill_plan import (
    CONSUMERS,
    ROW_GROUP,
    PrefillPlan,
    scratch,
)


def attend(
    problem: Problem,
    plan: PrefillPlan,
    arrays: AttentionArrays,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse), as `attention.attend`; `interpret`: None, or the interpreter's parameters."""
    cache = problem.cache
    work = step_work.prefill_tiles(plan.cut, problem.variant, arrays.schedule)
    slices = cache.num_layers * cache.num_blocks * plan.slices_per_block(cache.block_size)
    pool = (slices, plan.keys.block_size, *cache.pool_shape[3:])
    query, slopes = arrays.query, arrays.alibi_slopes
    if slopes is None:
        slopes = jnp.zeros((1,), jnp.float32)  # never read; more of them would be a launch
    inputs = Inputs(
        query=jnp.pad(query.astype(cache.dtype), ((0, -len(query) % ROW_GROUP), (0, 0), (0, 0))),
        keys=arrays.key_pool.reshape(pool),
        values=arrays.value_pool.reshape(pool),
        table=arrays.block_table,
        items=work.items,
        num_items=work.num_items,
        layer=arrays.layer.reshape(1),
        slopes=slopes.astype(jnp.float32),
    )
    outputs = Outputs(*blocks.run_locally(_call(problem, plan, interpret), *inputs))
    return outputs.out[: problem.num_tokens], outputs.lse[:, : problem.num_tokens].T


def _call(problem: Problem, plan: PrefillPlan, interpret: Any) -> Any:
    """The kernel, as a function of `Inputs` that returns `Outputs`."""
    heads = problem.num_query_heads
    # a swizzled copy is of an array of whole row groups
    tokens = -(-problem.num_tokens // ROW_GROUP) * ROW_GROUP
    return blocks.kernel(
        partial(_body, problem=problem, plan=plan, is_simulated=interpret is not None),
        name="paged_prefill",
        cost=problem.cost,
        out_type=Outputs(
            jax.ShapeDtypeStruct((tokens, heads, problem.cache.head_dim), problem.query_dtype),
            jax.ShapeDtypeStruct((heads, tokens), jnp.float32),
        ),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        scratch_types=blocks.allocate(scratch(problem, plan)),
        interpret=interpret,
    )


def _body(*refs: Any, problem: Problem, plan: PrefillPlan, is_simulated: bool, **smem: Any) -> None:
    num_inputs = len(Inputs._fields)
    inputs, outputs = Inputs(*refs[:num_inputs]), Outputs(*refs[num_inputs:])
    cta = Cta(problem, plan, is_simulated, inputs, outputs, smem)
    warpgroup = lax.axis_index("warpgroup")

    def copies():
        plgpu.set_max_registers(plan.producer_registers, action="decrease")
        produce(cta)

    def computes():
        plgpu.set_max_registers(plan.consumer_registers, action="increase")
        _consume(cta, warpgroup)

    # two branches of one: what consumers need is not kept through the producer's code
    lax.cond(warpgroup == CONSUMERS, copies, computes)


def _consume(cta: Cta, warpgroup: Any) -> None:
    """Attends with this warpgroup's rows of every item."""

    def visit(carry: tuple[Any, Any, Work]) -> tuple[Any, Any, Work]:
        index, steps, work = carry
        # what follows from it is computed again: kept over all items, it would take registers
        consumer = lax.optimization_barrier(warpgroup)
        plgpu.barrier_wait(cta.query_full(consumer))
        keys = prefill_step.attend(cta, consumer, index, work, steps)
        last = steps + work.item.num_visits - 1
        # read as the tensor core has the last product: kept through the loop over the keys, what a
        # result needs would take its registers
        work, following = cta.work(index), cta.work(index + 1)
        state = prefill_step.finish(cta, steps, last, keys)
        _store(cta, consumer, work, softmax.finish(blocks.ROWS, state))
        return index + 1, last + 1, following

    first = jnp.int32(0), jnp.int32(0), cta.work(jnp.int32(0))
    has_visits = lambda carry: carry[2].item.num_visits > 0

    @pl.when(has_visits(first))
    def _():
        prefill_step.take_first_turn(cta, warpgroup)
        lax.while_loop(has_visits, visit, first)
        prefill_step.take_last_turn(cta, warpgroup)

    plgpu.wait_smem_to_gmem(0)


def _store(cta: Cta, consumer: Any, work: Work, result: tuple[Any, Any]) -> None:
    """Through shared memory, whose last contents must have left it."""
    out, lse = result
    outputs, columns = cta.outputs, cta.plan.out_columns
    strips = cta.problem.cache.head_dim // columns
    views = cta.smem["out_smem"]  # of whole tiles, and of some rows of one
    views = views if cta.plan.has_swizzled_out else (views, views)
    whole_smem, part_smem, lse_smem = (x.at[consumer] for x in (*views, cta.smem["lse_smem"]))
    head, offset = cta.rows_of(consumer, work)
    start = jnp.clip(work.item.row_start - offset, 0, WARPGROUP_ROWS)
    stop = jnp.clip(work.item.row_stop - offset, 0, WARPGROUP_ROWS)
    first_row = pl.multiple_of(work.item.row_group * ROW_GROUP + offset, ROW_GROUP)
    is_whole = stop - start == WARPGROUP_ROWS
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out = out.astype(cta.problem.query_dtype)
    lse_smem[...] = lse

    def put(smem: Any, strip: int) -> Any:
        """Columns of the result into shared memory; where they go."""
        if strips == 1:
            smem[...], target = out, outputs.out
        else:
            if strip:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[...] = out[:, strip * columns : (strip + 1) * columns]
            target = outputs.out.at[:, :, pl.ds(strip * columns, columns)]
        plgpu.commit_smem()
        return target

    @pl.when(is_whole)
    def _():
        rows = pl.ds(first_row, WARPGROUP_ROWS)
        for strip in range(strips):
            target = put(whole_smem, strip)
            plgpu.copy_smem_to_gmem(whole_smem, target.at[rows, head])
        plgpu.copy_smem_to_gmem(lse_smem, outputs.lse.at[head, rows])

    @pl.when(jnp.logical_not(is_whole))
    def _():
        for strip in range(strips):
            _copy_rows(part_smem, put(part_smem, strip), head, first_row, start, stop)

        @pl.loop(start, stop)
        def _(row):
            outputs.lse[head, first_row + row] = lse_smem[row]

        plgpu.commit_smem()  # all threads have read the lse before the next item's is written


def _copy_rows(smem: Any, out_ref: Any, head: Any, first_row: Any, start: Any, stop: Any) -> None:
    """Rows [start, stop) of a tile: 8 at once, then one by one."""

    def copy(rows: int, row: Any) -> None:
        target = out_ref.at[pl.ds(first_row + row, rows), head]
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(row, rows)], target)

    groups = divide(stop - start, ROW_GROUP)
    pl.loop(0, groups)(lambda i: copy(ROW_GROUP, start + i * ROW_GROUP))
    pl.loop(start + groups * ROW_GROUP, stop)(lambda row: copy(1, row))
