"""What a program of the prefill kernel does: its visits to tiles of keys, and the work beside them.

A tile that all query tokens see is taken in whole by every stripe of them.  Of another tile each
stripe takes the parts that it sees, with masks only where they cut.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core import softmax
from ..core.problem import Problem
from . import prefill_step as steps
from .plan import LANES
from .prefill_beside import Beside, Chore, beside_of, copying, do_all, making
from .prefill_parts import visit_parts
from .prefill_plan import NO_LIMITS, PrefillPlan
from .prefill_program import Kernel, kernel_of, step_of
from .prefill_step import UNSEEN, Place, Step
from .prefill_visits import Visit, following

ROWS = softmax.Rows(
    reduce=lambda op, x: op(x, axis=0, keepdims=True),
    expand=jnp.broadcast_to,
)
ONES = 0x3F803F80  # two bfloat16


def run(problem: Problem, plan: PrefillPlan, is_interpreted: bool, *refs: Any) -> None:
    """A program: its visits, the first with its preparation, and what it has found."""
    kernel, out, lse = kernel_of(problem, plan, is_interpreted, refs)
    programs = kernel.programs
    i = pl.program_id(0)

    @pl.when(i < programs.num_used[0])
    def _() -> None:
        first = Visit(i, programs.first_tile[i], programs.first_visit[i])
        pl.when(i == 0)(partial(_start, kernel, first))

        def each(t: Any, _: None) -> None:
            _visit(kernel, first.at(t))

        lax.fori_loop(first.tile, programs.stop_tile[i], each, None)
        _finish(kernel, first.at(programs.stop_tile[i] - 1), out, lse)

    @pl.when((i == plan.num_query_tiles - 1) & (programs.num_used[0] > 0))
    def _() -> None:
        _drain(kernel)


def _start(kernel: Kernel, first: Visit) -> None:
    """Before the first visit: its tile is made ready, the second one's on its way."""
    plan, copies, buffers = kernel.plan, kernel.copies, kernel.buffers
    lax.fori_loop(0, plan.num_items, lambda item, _: _reset(kernel, item), None)
    buffers.limits[NO_LIMITS] = jnp.full(buffers.limits.shape[1:], UNSEEN, jnp.float32)
    if plan.sums_on_matrix_unit:
        ones = (*buffers.values.shape[:3], (plan.value_rows - plan.head_dim) // 2, LANES)
        buffers.values[:, :, :, plan.head_dim // 2 :] = jnp.full(ones, ONES, jnp.int32)
    second = following(kernel.programs, first)
    copies.window(first).start()
    copies.window(second).start()
    for visit in (first, second):
        copies.window(visit).wait()
        each = lambda share, _, visit=visit: do_all(copying(kernel, visit, share))
        lax.fori_loop(0, plan.num_shares, each, None)
    copies.window(following(kernel.programs, second)).start()
    if plan.key_lead:
        kernel.preparation.arrived((0, first, 0))
        do_all(making(kernel, 0, first, 0))
    beside = Beside(kernel, first, second)

    def each_share(share: Any, _: None) -> None:
        beside.wait(share)
        do_all(beside.preparing(share))

    lax.fori_loop(0, plan.num_shares, each_share, None)


def _drain(kernel: Kernel) -> None:
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


def _visit(kernel: Kernel, visit: Visit) -> None:
    programs, i, copies = kernel.programs, visit.program, kernel.copies
    beside = beside_of(kernel, visit)
    copies.window(beside.third).wait()
    copies.window(following(programs, beside.third)).start()
    is_full = _is_full(kernel, i, visit.tile)
    is_last = visit.tile + 1 == programs.stop_tile[i]  # the program's end takes its chores
    pl.when(is_full)(partial(_visit_full, kernel, visit, beside))
    pl.when(~is_full & ~is_last)(lambda: beside.do(0))
    pl.when(~is_full)(partial(visit_parts, kernel, visit))


def _visit_full(kernel: Kernel, visit: Visit, beside: Beside) -> None:
    """A tile that every query sees."""
    plan, programs, i = kernel.plan, kernel.programs, visit.program
    follows = (visit.tile > programs.first_tile[i]) & _is_full(kernel, i, visit.tile - 1)
    is_followed = (visit.tile + 1 < programs.stop_tile[i]) & _is_full(kernel, i, visit.tile + 1)
    if not plan.key_lead:  # the next tile's keys are not there in time
        follows, is_followed = jnp.bool(False), jnp.bool(False)
    tokens = plan.item_tokens * max(1, plan.group_items // plan.num_kv_heads)
    count = lax.div(programs.num_tokens[i] + (tokens - 1), jnp.int32(tokens))
    if plan.group_items < plan.num_kv_heads:
        count *= plan.num_kv_heads // plan.group_items
    is_filled = count == plan.num_shares  # or the next tile's keys are ready too late
    follows, is_followed = follows & is_filled, is_followed & is_filled

    def step_at(group: Any) -> Step:
        item = group * plan.group_items
        here = _place(visit, item)
        before = here._replace(first_item=jnp.maximum(item - plan.group_items, 0))
        is_first, is_last = follows & (group == 0), group == count - 1
        last = _place(visit, (count - 1) * plan.group_items)
        before = _choose(is_first, last._replace(value_slot=1 - visit.slot), before)
        after = _choose(
            is_last, _place(visit.next_of_program, 0), _place(visit, item + plan.group_items)
        )
        return step_of(kernel, i, (here, before, after), is_whole=True)

    def each(group: Any, _: None) -> None:
        beside.wait(group)
        steps.advance(step_at(group), beside.chores(group))

    pl.when(~follows)(lambda: steps.fill(step_at(0)))
    lax.fori_loop(0, count, each, None)
    pl.when(~is_followed)(lambda: steps.drain(step_at(count - 1)))
    beside.do(count)


def _is_full(kernel: Kernel, program: Any, tile: Any) -> Any:
    """Every query of the program sees the whole tile."""
    first = tile * kernel.plan.tile_keys
    stop = first + kernel.plan.tile_keys
    programs = kernel.programs
    return (programs.full_start[program] <= first) & (stop <= programs.full_stop[program])


def _place(visit: Visit, first_item: Any) -> Place:
    return Place(first_item, visit.key_slot, visit.slot, 0, 0)


def _choose(condition: Any, some: Place, others: Place) -> Place:
    return Place(*(jnp.where(condition, a, b) for a, b in zip(some, others, strict=True)))


def _finish(kernel: Kernel, last: Visit, out: Any, lse: Any) -> None:
    """What the program has found, and the chores of its last visit if that had no time for them."""
    plan, beside = kernel.plan, beside_of(kernel, last)
    is_done = _is_full(kernel, last.program, last.tile)

    def finish(group: Any, chores: list[Chore]) -> None:
        items = range(plan.group_items)
        placed = [((i + 1) / len(chores), chore) for i, chore in enumerate(chores)]
        for u in items:
            item = steps.item_at(plan, group * plan.group_items, u, plan.group_items)
            _finish_item(kernel, item, out, lse)
            for at, chore in placed:
                if u < at * len(items) <= u + 1:
                    chore()

    def with_chores(group: Any, _: None) -> None:
        beside.wait(group)
        finish(group, beside.chores(group))

    @pl.when(is_done)
    def _() -> None:
        lax.fori_loop(0, plan.num_shares, lambda group, _: finish(group, []), None)

    @pl.when(~is_done)
    def _() -> None:
        lax.fori_loop(0, plan.num_shares, with_chores, None)


def _finish_item(kernel: Kernel, at: tuple[Any, Any, Any], out: Any, lse: Any) -> None:
    plan, variant, buffers = kernel.plan, kernel.problem.variant, kernel.buffers
    item, head, block = at
    acc = buffers.acc[item]
    if plan.sums_on_matrix_unit:
        l = acc[plan.head_dim : plan.head_dim + 1]
    else:
        l = jnp.sum(buffers.l[item], axis=0, keepdims=True)
    m = steps.exponent(variant, buffers.m[item, :1])
    value, row = softmax.finish(ROWS, softmax.State(m, l, acc[: plan.head_dim]))
    tile, place = steps.in_operands(plan, head, block)
    out[tile, place] = value.astype(out.dtype)
    lse[tile, pl.ds(place, 1)] = row
    _reset(kernel, item)


def _reset(kernel: Kernel, item: Any) -> None:
    """For an item that has seen nothing yet."""
    buffers, plan = kernel.buffers, kernel.plan
    buffers.m[item] = jnp.full(buffers.m.shape[1:], softmax.FLOOR, jnp.float32)
    if not plan.sums_on_matrix_unit:
        buffers.l[item] = jnp.zeros(buffers.l.shape[1:], jnp.float32)
    if plan.resets_values:
        buffers.acc[item] = jnp.zeros(buffers.acc.shape[1:], jnp.float32)
