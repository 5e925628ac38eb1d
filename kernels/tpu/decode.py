"""Paged attention of single query tokens on TPU: every step of a decode loop.

All query heads of a row meet all (token, kv head) rows of a tile of blocks in one product, the
scores of foreign heads are masked together with the tokens past the end, and so one second product
gives every head its own output.  No row is extracted, shifted or transposed.

`pipeline` has the step that the time goes to, `one_step` that of a call that has no other,
`decode_copies` what they wait for, `worklist` what they work on; `decode_append` writes new tokens
on the way.  Rows are single tokens, one per sequence here; the list may as well be the one-token
rows of a packed batch.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.arrays import AttentionArrays, NewTokens
from ..core.layout import result
from ..core.problem import Problem
from . import decode_plan as plans
from . import one_step, pipeline, step_work
from .blocks import COMPILER_PARAMS, allocate, interpreter
from .decode_append import KEYS, VALUES, Slots, TokenWriter, in_units
from .decode_copies import Copies, Stream, clear_pads, sliced_table
from .decode_plan import SETS, DecodePlan
from .device import vmem_bytes
from .pipeline import Groups, ScoreStage, Step
from .plan import LANES
from .worklist import DecodeRows, Work


def plan_of(problem: Problem, *, appends: bool = False) -> DecodePlan | None:
    """The plan for the chip that the program is traced for; None: not for this kernel."""
    return plans.plan_decode(problem, vmem_bytes(), appends=appends)


def attend(
    problem: Problem, plan: DecodePlan, arrays: AttentionArrays, *, interpret: Any = None
) -> tuple[Array, Array]:
    """(out, lse) of one query token per sequence, over pools with a leading layer axis."""
    out, lse = _attend(problem, plan, arrays, None, interpret)
    return out, lse


def append_and_attend(
    problem: Problem, arrays: AttentionArrays, new: NewTokens, *, interpret: Any = None
) -> tuple[Array, Array, Array, Array]:
    """(out, lse, key_pool, value_pool): each sequence's last token is written, then attends."""
    plan = plan_of(problem, appends=True)
    assert plan is not None, "can_append() comes first"
    written = (
        Slots.of(problem, plan, arrays, new.seq_lengths),
        in_units(plan, new.keys, new.values),
    )
    out, lse, *pools = _attend(problem, plan, arrays, written, interpret)
    key_pool, value_pool = (pool.reshape(arrays.key_pool.shape) for pool in pools)
    return out, lse, key_pool, value_pool


def _attend(
    problem: Problem,
    plan: DecodePlan,
    arrays: AttentionArrays,
    new: tuple[Slots, Array] | None,
    interpret: Any,
) -> list[Array]:
    """out and lse, and views of the pools if there are new tokens."""
    query, key_pool, value_pool, block_table, schedule, alibi_slopes, layer = arrays
    num_heads = problem.num_query_heads
    rows = step_work.decode_rows(problem, plan, schedule)
    scalars = [*rows, *(new[0] if new else ())]
    pad = plan.num_heads - num_heads
    inputs = [jnp.pad(query.astype(jnp.bfloat16), ((0, 0), (0, pad), (0, 0)))]
    if alibi_slopes is not None:
        slopes = jnp.pad(alibi_slopes.astype(jnp.float32), (0, pad))
        inputs.append(jnp.broadcast_to(slopes[:, None], (plan.num_heads, LANES)))
    if new:
        inputs.append(new[1])
    pools = [x.reshape(-1, plans.UNIT_ROWS, plan.head_dim) for x in (key_pool, value_pool)]
    table = _seen_columns(problem, block_table, schedule.seq_lengths)
    table = sliced_table(plan, table, layer * problem.cache.num_blocks)
    call = _make_call(problem, plan, query, pools, interpret)
    out, lse, *pools = call(*scalars, *inputs, table, *pools)
    return [out[:, :num_heads].astype(query.dtype), lse[:, :num_heads], *pools]


def _seen_columns(problem: Problem, table: Array, lengths: Array) -> Array:
    """The columns of the table that a query sees."""
    columns = plans.table_columns(problem)
    if columns == table.shape[1]:
        return table
    first = plans.first_column(problem, lengths)
    column = first[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(table, jnp.minimum(column, table.shape[1] - 1), axis=1)


def _make_call(
    problem: Problem, plan: DecodePlan, query: Array, pools: list[Array], interpret: Any
) -> Any:
    batch, rows, heads = query.shape[0], plan.rows_per_program, plan.num_heads
    mine = pl.BlockSpec((rows, heads, plan.head_dim), lambda i, *_: (i, 0, 0))
    shared = pl.BlockSpec((heads, LANES), lambda i, *_: (0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    slopes = [shared] if problem.variant.has_alibi else []
    unit = (rows, 2, plan.token_units * plans.UNIT_ROWS, plan.head_dim)
    new = [pl.BlockSpec(unit, lambda i, *_: (i, 0, 0, 0))] if plan.appends else []
    written = [result(x.shape, x.dtype, query) for x in pools if plan.appends]
    num_scalars = len(DecodeRows._fields) + (len(Slots._fields) if plan.appends else 0)
    inputs = [mine, *slopes, *new, hbm, *[hbm] * len(pools)]
    first_pool = num_scalars + len(inputs) - len(pools)
    out_dtype = "float32" if problem.query_dtype == "float16" else problem.query_dtype
    flops, num_bytes, transcendentals = problem.cost
    return pl.pallas_call(
        partial(_kernel, problem, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(plan.num_programs,),
            in_specs=inputs,
            out_specs=[
                mine,
                pl.BlockSpec((rows, LANES), lambda i, *_: (i, 0)),
                *[hbm] * len(written),
            ],
            scratch_shapes=allocate(plans.decode_scratch(plan)),
        ),
        out_shape=[
            result((batch, heads, plan.head_dim), jnp.dtype(out_dtype), query),
            result((batch, LANES), jnp.float32, query),
            *written,
        ],
        input_output_aliases={first_pool + i: 2 + i for i in range(len(written))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=plans.vmem_limit(problem, plan),
            **COMPILER_PARAMS,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=interpreter(interpret),
        name="paged_append_and_decode" if plan.appends else "paged_decode",
    )


def _kernel(problem: Problem, plan: DecodePlan, *refs: Any) -> None:
    step = _step(problem, plan, list(refs))
    work = step.copies.work
    step.new.write_apart()

    @pl.when(work.num_rows < plan.rows_per_program)
    def _() -> None:
        step.out[...] = jnp.zeros(step.out.shape, step.out.dtype)
        step.lse[...] = jnp.full(step.lse.shape, -jnp.inf, jnp.float32)

    @pl.when(work.num_steps > 0)
    def _() -> None:
        if plan.is_one_step:
            one_step.run(step, work.items(work.first()))
        else:
            _pipeline(step)


def _step(problem: Problem, plan: DecodePlan, refs: list[Any]) -> Step:
    """The kernel's refs by name."""
    take = lambda count: tuple(refs.pop(0) for _ in range(count))
    rows = DecodeRows(*take(len(DecodeRows._fields)))
    slots = tokens = units = is_written = None
    if plan.appends:
        slots = Slots(*take(len(Slots._fields)))
    (query,), slopes = take(1), None
    if problem.variant.has_alibi:
        (slopes,) = take(1)
    if plan.appends:
        (tokens,) = take(1)
    (table,) = take(1)
    pools = take(2)
    out, lse = take(2)
    if plan.appends:  # the pools as they are read and written
        pools = take(2)
    keys, values, scores, weights, stats, slices = (take(SETS) for _ in range(6))
    passed, semaphores = take(plan.num_passed), take(3)
    if plan.appends:
        units, is_written = take(2)
    streams = [
        Stream(pool, buffers, semaphore, first)
        for pool, buffers, semaphore, first in zip(
            pools, (keys, values), semaphores, (0, plan.items_per_step), strict=False
        )
    ]
    work = Work(plan, rows, pl.program_id(0), problem.variant.left is not None)
    new = TokenWriter(plan, work, slots, tokens, pools, units, is_written)
    return Step(
        plan=plan,
        variant=pipeline.of_last_token(problem.variant),
        copies=Copies(plan, work, table, slices, semaphores[2], *streams),
        new=new,
        query=query,
        slopes=slopes,
        out=out,
        lse=lse,
        scores=scores,
        weights=weights,
        stats=stats,
        passed=pipeline.Passed(
            passed, jnp.minimum(work.num_rows, 0), jnp.minimum(work.num_steps, 0)
        ),
        group=problem.group,
        token=pipeline.lane_tokens(plan, problem.group),
    )


def _pipeline(step: Step) -> None:
    """All steps of a program."""
    plan, copies = step.plan, step.copies
    num_steps = copies.work.num_steps
    clear_pads(plan, (copies.keys, copies.values))
    cursors = _begin(step)

    def each(i: Any, cursors: tuple[Any, ...]) -> tuple[Any, ...]:
        for slot in range(SETS):
            pl.when(i * SETS + slot < num_steps)(partial(_turn, step, slot, cursors))
            cursors = (*cursors[1:], copies.work.after(cursors[-1]))
        return cursors

    lax.fori_loop(0, lax.div(num_steps + (SETS - 1), SETS), each, cursors)
    for slot in range(SETS):  # what the last step started for one that never comes
        pl.when(lax.rem(num_steps, SETS) == slot)(partial(copies.wait_slices, slot))


def _begin(step: Step) -> tuple[Any, ...]:
    """Makes the first group's scores; on their way are the keys of two more, and its values.

    Returns the cursors of the first step's groups.
    """
    plan, copies = step.plan, step.copies
    work = copies.work
    cursors = [work.first()]
    for _ in range(4):
        cursors.append(work.after(cursors[-1]))
    groups = [work.items(cursor) for cursor in cursors]
    for slot in range(SETS):
        copies.start_slices(slot, copies.keys, groups[slot])
        copies.start_slices(slot, copies.values, groups[slot])
    for slot in range(SETS):
        copies.wait_slices(slot)
        copies.start_full(slot, copies.keys, groups[slot], slot)
        if slot == 0:
            copies.start_full(slot, copies.values, groups[slot], slot)
    copies.start_slices(0, copies.keys, groups[3])
    copies.start_slices(0, copies.values, groups[1])
    copies.wait(copies.keys, groups[0], 0)
    step.new.put(KEYS, groups[0], copies.keys.buffers[0])
    scores = ScoreStage(step, 0, groups[0], are_full=False, filling=None)
    for u, first in plan.chunks:
        scores.chunk(u, first)
    step.new.wait(groups[0], [])
    return work.none(), *cursors


def _turn(step: Step, slot: int, cursors: tuple[Any, ...]) -> None:
    """Waits for what a step needs, and runs it the way its copies allow."""
    copies, work = step.copies, step.copies.work
    groups = Groups(*(work.items(cursor) for cursor in cursors))
    ahead, behind = (slot + 1) % SETS, (slot + 2) % SETS
    copies.wait_slices(slot)

    def put() -> None:
        step.new.put(KEYS, groups.next, copies.keys.buffers[ahead])
        step.new.put(VALUES, groups.before, copies.values.buffers[behind])

    def wait_for_whole() -> None:
        copies.wait_whole(copies.keys, ahead)
        copies.wait_whole(copies.values, behind)
        put()

    def wait() -> None:
        copies.wait(copies.keys, groups.next, ahead)
        copies.wait(copies.values, groups.before, behind)
        put()
        copies.clear(groups.before, behind)

    is_whole = work.are_full(groups.next) & work.are_whole(groups.before)
    lax.cond(is_whole, wait_for_whole, wait)
    pipeline.mask_ends(step, slot, groups.this)
    _run(step, slot, groups)
    step.new.wait(groups.next, groups.before)


def _run(step: Step, slot: int, groups: Groups) -> None:
    """Runs the body for the way that the step's blocks lie."""
    plan, copies, work = step.plan, step.copies, step.copies.work
    is_full = work.are_full([*groups.third, *groups.next])
    if plan.run == 1:
        pipeline.run(step, slot, groups, is_full)
        return
    are_runs = copies.are_runs(slot, copies.keys, groups.third)
    are_runs &= copies.are_runs(slot, copies.values, groups.next)
    run = partial(pipeline.run, step, slot, groups)
    lax.cond(is_full & ~are_runs, partial(run, None), partial(run, is_full & are_runs))
