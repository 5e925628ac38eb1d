"""Prefill on TPU: paged attention of many query tokens per sequence, bound by the matrix unit.

A program takes a tile of whole query tokens of one sequence, all heads, and visits the tiles of
keys that some of them sees: tiles that all of them see in whole and without masks, others part by
part with masks.  While a visit computes, it makes the next visit's raw rows ready, and starts the
copies of the one after, share by share, also across programs.  Keys are a share ahead of values, as
scores are of weights.

Queries come in and results go out transposed, tokens on lanes; XLA does it in the pass that cuts
packed tokens into tiles.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import softmax
from ..core.layout import result
from ..core.problem import Problem
from ..core.schedule import Schedule, gather_tiles, tile_queries, untile
from . import device
from . import prefill_plan as plans
from . import prefill_step as steps
from .blocks import COMPILER_PARAMS, allocate, as_rows, table_windows
from .plan import LANES, BlockRows
from .prefill_plan import Chip, PrefillPlan
from .prefill_prepare import Preparation
from .prefill_step import Buffers, Place, Step
from .prefill_visits import Programs, Visit, VisitCopies, following, programs_of

ROWS = softmax.Rows(
    reduce=lambda op, x: op(x, axis=0, keepdims=True),
    expand=jnp.broadcast_to,
)
Chore = Callable[[], None]
ONES = 0x3F803F80  # two bfloat16
BLOCKS_AT_ONCE = 2  # whose copies are started one after the other


def plan_of(problem: Problem) -> PrefillPlan | None:
    """How this kernel would run the problem on the chip it is traced for; None if it would not."""
    chip = Chip(device.vmem_bytes(), device.matrix_unit() >= plans.WIDE_UNIT)
    return plans.plan_prefill(problem, chip)


def attend(
    problem: Problem,
    plan: PrefillPlan,
    query: Array,
    key_pool: Array,
    value_pool: Array,
    block_table: Array,
    schedule: Schedule,
    alibi_slopes: Array | None,
    layer: Array,
    *,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """(out, lse) of packed queries over pools with a leading layer axis."""
    tiles = tile_queries(
        schedule, problem.variant, num_tokens=problem.num_tokens, tile_tokens=plan.tile_tokens
    )
    programs = programs_of(plan, problem.variant, tiles, layer)
    q = gather_tiles(query.astype(problem.cache.dtype), tiles, plan.tile_tokens, True)
    arrays = [_to_items(plan, q)]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(plan.num_kv_heads, 1, plan.group)
        arrays.append(_to_lanes(plan, jnp.tile(slopes, (1, plan.item_tokens, 1))))
    rows = BlockRows.of(problem.cache)
    pools = [as_rows(pool, rows) for pool in (key_pool, value_pool)]
    table = table_windows(block_table, problem.cache.num_blocks)
    call = _make_call(problem, plan, query, interpret)
    out, lse = call(*programs, *arrays, table, *pools)
    out, lse = _from_items(plan, out), _from_items(plan, lse[:, :, None])[..., 0]
    return untile(schedule, out.astype(query.dtype), lse, num_tokens=problem.num_tokens)


def _to_items(plan: PrefillPlan, q: Array) -> Array:
    """(tiles, tile tokens, heads, head_dim) to (tiles, items, head_dim, rows)."""
    q = q.reshape(-1, plan.row_blocks, plan.item_tokens, plan.num_kv_heads, plan.group, q.shape[-1])
    q = q.transpose(0, 3, 1, 5, 2, 4)
    return _to_lanes(plan, q).reshape(-1, plan.num_items, plan.head_dim, plan.item_rows)


def _to_lanes(plan: PrefillPlan, x: Array) -> Array:
    """(..., item tokens, group) to (..., rows)."""
    x = x.reshape(*x.shape[:-2], -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.item_rows - x.shape[-1])])


def _from_items(plan: PrefillPlan, x: Array) -> Array:
    """(tiles, items, n, rows) to (tiles, tile tokens, heads, n)."""
    n = x.shape[2]
    x = x[..., : plan.item_tokens * plan.group]
    x = x.reshape(-1, plan.num_kv_heads, plan.row_blocks, n, plan.item_tokens, plan.group)
    return x.transpose(0, 2, 4, 1, 5, 3).reshape(
        -1, plan.tile_tokens, plan.num_kv_heads * plan.group, n
    )


def _make_call(problem: Problem, plan: PrefillPlan, query: Array, interpret: Any) -> Any:
    n, items, rows, head_dim = (
        plan.num_query_tiles,
        plan.num_items,
        plan.item_rows,
        plan.head_dim,
    )
    tile = lambda *shape: pl.BlockSpec((None, *shape), lambda i, *_: (i, *[0] * len(shape)))
    shared = lambda *shape: pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    slopes = [shared(plan.num_kv_heads, rows)] if problem.variant.has_alibi else []
    flops, num_bytes, transcendentals = problem.cost
    return pl.pallas_call(
        partial(_kernel, problem, plan, bool(interpret)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Programs._fields),
            grid=(n,),
            in_specs=[tile(items, head_dim, rows), *slopes, hbm, hbm, hbm],
            out_specs=[tile(items, head_dim, rows), tile(items, rows)],
            scratch_shapes=allocate(plans.prefill_scratch(plan)),
        ),
        out_shape=[
            result((n, items, head_dim, rows), jnp.dtype(plans.out_dtype(problem)), query),
            result((n, items, rows), jnp.float32, query),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=plan.vmem_limit,
            **COMPILER_PARAMS,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=False if interpret is None else interpret,
        name="paged_prefill",
    )


class _Kernel(NamedTuple):
    """What the visits of a program share."""

    problem: Problem
    plan: PrefillPlan
    programs: Programs
    query: Any
    slopes: Any
    buffers: Buffers
    copies: VisitCopies
    preparation: Preparation


def _kernel(problem: Problem, plan: PrefillPlan, is_interpreted: bool, *refs: Any) -> None:
    n = len(Programs._fields)
    programs, (query, *rest) = Programs(*refs[:n]), refs[n:]
    slopes = rest.pop(0) if problem.variant.has_alibi else None
    table, key_pool, value_pool, out, lse, *scratch = rest
    *work, raw_keys, raw_values, windows, key_copied, value_copied, window_copied = scratch
    slots = plan.ahead + 1
    scores, tops, weights = work[:slots], work[slots : 2 * slots], work[2 * slots : 2 * slots + 2]
    buffers = Buffers(tuple(scores), tuple(tops), tuple(weights), *work[2 * slots + 2 :])
    copies = VisitCopies(
        problem,
        plan,
        programs,
        table,
        (key_pool, value_pool),
        (raw_keys, raw_values),
        windows,
        (key_copied, value_copied, window_copied),
    )
    preparation = Preparation(
        plan,
        programs,
        copies,
        (buffers.keys, buffers.values),
        is_interpreted,
    )
    kernel = _Kernel(problem, plan, programs, query, slopes, buffers, copies, preparation)
    i = pl.program_id(0)

    @pl.when(i < programs.num_used[0])
    def _() -> None:
        first = Visit(i, programs.first_tile[i], programs.first_visit[i])
        pl.when(i == 0)(partial(_start, kernel, first))
        buffers.m[...] = jnp.full(buffers.m.shape, softmax.FLOOR, jnp.float32)
        buffers.l[...] = jnp.zeros(buffers.l.shape, jnp.float32)
        buffers.acc[...] = jnp.zeros(buffers.acc.shape, jnp.float32)

        def each(t: Any, _: None) -> None:
            _visit(kernel, Visit(i, t, first.number + (t - first.tile)))

        lax.fori_loop(first.tile, programs.stop_tile[i], each, None)
        _finish(kernel, out, lse)

    @pl.when((i == plan.num_query_tiles - 1) & (programs.num_used[0] > 0))
    def _() -> None:
        _drain(kernel)


def _start(kernel: _Kernel, first: Visit) -> None:
    """Before the first visit: its tile is made ready, the second one's on its way."""
    plan, copies = kernel.plan, kernel.copies
    values = kernel.buffers.values
    if plan.sums_on_matrix_unit:
        shape = (*values.shape[:3], (plan.value_rows - plan.head_dim) // 2, plan.part_keys)
        values[:, :, :, plan.head_dim // 2 :] = jnp.full(shape, ONES, jnp.int32)
    second = following(kernel.programs, first)
    copies.window(first).start()
    copies.window(second).start()
    for visit in (first, second):
        copies.window(visit).wait()
        each = lambda share, _, visit=visit: _do(_copying(kernel, visit, share))
        lax.fori_loop(0, plan.num_shares, each, None)
    copies.window(following(kernel.programs, second)).start()
    if plan.key_lead:
        kernel.preparation.arrived((0, first, 0))
        _do(_making(kernel, 0, first, 0))
    each = lambda share, _: _do(_preparing(kernel, first, second, share))
    lax.fori_loop(0, plan.num_shares, each, None)


def _do(chores: Sequence[Chore]) -> None:
    for action in chores:
        action()


def _drain(kernel: _Kernel) -> None:
    """Waits for what was started for visits that never come."""
    programs, plan, copies = kernel.programs, kernel.plan, kernel.copies
    i = programs.num_used[0] - 1
    tile = programs.stop_tile[i] - 1
    last = Visit(i, tile, programs.first_visit[i] + tile - programs.first_tile[i])
    started = following(programs, following(programs, last))
    for kind in (0, 1):
        for share in range(0 if kind else plan.key_lead, plan.num_shares):
            copies.wait(kind, started, share)
    copies.window(following(programs, started)).wait()


def _visit(kernel: _Kernel, visit: Visit) -> None:
    programs, i = kernel.programs, visit.program
    second = following(programs, visit)
    third = following(programs, second)
    kernel.copies.window(third).wait()
    kernel.copies.window(following(programs, third)).start()
    make = partial(_chores, kernel, second, third)
    is_full = _is_full(kernel, i, visit.tile)
    pl.when(is_full)(partial(_visit_full, kernel, visit, make))
    pl.when(~is_full)(partial(_visit_parts, kernel, visit, make))


def _visit_full(kernel: _Kernel, visit: Visit, make: Callable[[Any], list[Chore]]) -> None:
    """A tile that every query sees."""
    plan, programs, i = kernel.plan, kernel.programs, visit.program
    follows = (visit.tile > programs.first_tile[i]) & _is_full(kernel, i, visit.tile - 1)
    is_followed = (visit.tile + 1 < programs.stop_tile[i]) & _is_full(kernel, i, visit.tile + 1)
    if not plan.key_lead:  # the next tile's keys are not there in time
        follows, is_followed = jnp.bool(False), jnp.bool(False)
    place, after = _place(kernel, visit, 0), _place(kernel, visit.next_of_program, 0)
    before = place._replace(value_slot=jnp.where(follows, 1 - visit.slot, visit.slot))
    step = _step(kernel, visit, (place, before, after), is_masked=False)
    pl.when(~follows)(partial(steps.fill, step))
    each = lambda share, _: steps.advance(step, share, make(share))
    lax.fori_loop(0, plan.num_shares, each, None)
    pl.when(~is_followed)(partial(steps.drain, step))


def _visit_parts(kernel: _Kernel, visit: Visit, make: Callable[[Any], list[Chore]]) -> None:
    """A tile that some query sees a part of."""
    plan, programs, i = kernel.plan, kernel.programs, visit.program
    lax.fori_loop(0, plan.num_shares, lambda share, _: _do(make(share)), None)
    first_key = visit.tile * plan.tile_keys
    start = lax.div(jnp.maximum(programs.kv_start[i] - first_key, 0), plan.part_keys)
    stop = jnp.minimum(programs.kv_stop[i] - first_key, plan.tile_keys)
    stop = lax.div(stop + (plan.part_keys - 1), plan.part_keys)

    def step_at(part: Any) -> Step:
        before, after = jnp.maximum(part - 1, start), jnp.minimum(part + 1, plan.num_parts - 1)
        places = (
            _place(kernel, visit, part),
            _place(kernel, visit, before),
            _place(kernel, visit, after),
        )
        return _step(kernel, visit, places, is_masked=True)

    def each(part: Any, _: None) -> None:
        step = step_at(part)
        lax.fori_loop(0, step.num_groups, lambda g, _: steps.advance(step, g, []), None)

    @pl.when(start < stop)
    def _() -> None:
        lax.fori_loop(start, stop, lambda part, _: steps.store_limits(step_at(part)), None)
        steps.fill(step_at(start))
        lax.fori_loop(start, stop, each, None)
        steps.drain(step_at(stop - 1))


def _is_full(kernel: _Kernel, program: Any, tile: Any) -> Any:
    """Every query of the program sees the whole tile."""
    first = tile * kernel.plan.tile_keys
    stop = first + kernel.plan.tile_keys
    programs = kernel.programs
    return (programs.full_start[program] <= first) & (stop <= programs.full_stop[program])


def _chores(kernel: _Kernel, second: Visit, third: Visit, share: Any) -> list[Chore]:
    """What is done beside a share of a visit for the two that follow."""
    return [*_preparing(kernel, second, third, share), *_copying(kernel, third, share)]


def _preparing(kernel: _Kernel, second: Visit, third: Visit, share: Any) -> list[Chore]:
    """Makes values of the next visit ready, and keys a share after them."""
    plan = kernel.plan
    key_visit, key_share = second, share
    if plan.key_lead:
        is_last = share + 1 == plan.num_shares
        key_visit = Visit(*(jnp.where(is_last, a, b) for a, b in zip(third, second, strict=True)))
        key_share = jnp.where(is_last, 0, share + 1)
    kernel.preparation.arrived((1, second, share), (0, key_visit, key_share))
    return [*_making(kernel, 1, second, share), *_making(kernel, 0, key_visit, key_share)]


def _making(kernel: _Kernel, kind: int, visit: Visit, share: Any) -> list[Chore]:
    """Makes a share's keys (0) or values (1) ready, once their rows are there."""
    ready = kernel.preparation
    make = ready.values_of if kind else ready.keys_of
    keys = range(0, kernel.plan.share_keys, LANES)
    return [
        partial(make, visit, share, pair, first) for first in keys for pair in range(ready.pairs)
    ]


def _copying(kernel: _Kernel, visit: Visit, share: Any) -> list[Chore]:
    """Starts the copies of a share's blocks, a few at a time."""
    blocks = range(kernel.plan.share_blocks)

    def some(first: int) -> None:
        for block in blocks[first : first + BLOCKS_AT_ONCE]:
            kernel.copies.start(visit, share, block)

    return [partial(some, first) for first in blocks[::BLOCKS_AT_ONCE]]


def _place(kernel: _Kernel, visit: Visit, part: Any) -> Place:
    position = visit.tile * kernel.plan.tile_keys + part * kernel.plan.part_keys
    return Place(visit.key_slot, visit.slot, part, position)


def _step(
    kernel: _Kernel, visit: Visit, places: tuple[Place, Place, Place], *, is_masked: bool
) -> Step:
    programs, i = kernel.programs, visit.program
    return Step(
        kernel.plan,
        kernel.problem.variant,
        kernel.buffers,
        kernel.query,
        kernel.slopes,
        programs.first_position[i],
        programs.kv_stop[i],
        *places,
        is_masked,
    )


def _finish(kernel: _Kernel, out: Any, lse: Any) -> None:
    plan, variant, buffers = kernel.plan, kernel.problem.variant, kernel.buffers
    for item in range(plan.num_items):
        acc = buffers.acc[item]
        if plan.sums_on_matrix_unit:
            l = acc[plan.head_dim : plan.head_dim + 1]
        else:
            l = jnp.sum(buffers.l[item], axis=0, keepdims=True)
        m = steps.exponent(variant, buffers.m[item, :1])
        value, row = softmax.finish(ROWS, softmax.State(m, l, acc[: plan.head_dim]))
        out[item] = value.astype(out.dtype)
        lse[item : item + 1] = row
