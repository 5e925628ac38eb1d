"""The skewed step of the decode kernel: three groups of items at once, none of which needs another.

    scores of the next group  |  softmax of this group  |  values of the group before

The latencies of products, reductions and exponentials hide behind each other, across sequences
too.  Scores and weights pass from step to step through VMEM; what a step starts copying is used
three steps later (keys) or one (values), so that no wait has nothing queued behind it.

Two false dependencies hold the list scheduler back where it would be greedy.  Copies, which nothing
seems to need, would come last: a product's left operand waits for them (`tied`).  Exponentials,
which much needs, would come first, and spill: their maximum waits for scores two chunks earlier
(`Passed`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core import softmax
from ..core.variant import LOG2E, Variant
from .decode_append import KEYS, VALUES, NewTokens
from .decode_copies import Copies, Paced, clear_pads, rows_of, tied
from .decode_plan import SETS, STATS, UNIT_ROWS, DecodePlan
from .plan import LANES
from .worklist import Item

DECAY, TOP, SUM, LANE_TOP, OUTPUT = range(STATS)  # what `stats` keeps of an item
FOREIGN = 1 << 30  # position of the keys of other heads: no query sees them
ROWS = softmax.Rows(
    reduce=lambda op, x: op(x, axis=-1, keepdims=True),
    expand=jnp.broadcast_to,
)


class Passed(NamedTuple):
    """Arrays in VMEM that pass from chunk to chunk of a step: MAXIMUM and, of many heads, sums.

    Two zeros are part of the addresses, and the compiler cannot know that they are.  It has to keep
    loads behind the stores that come before them, and what was stored leaves its registers.
    """

    refs: tuple[Any, ...]  # (2, num_heads, LANES), float32
    stored: Any
    loaded: Any

    def put(self, which: int, value: Any) -> None:
        self.refs[which][self.stored] = value

    def get(self, which: int) -> Any:
        return self.refs[which][self.loaded]

    def wait(self, which: int, value: Any) -> None:
        """What is got from now on is not loaded before `value`, a register, is there."""
        self.refs[which][1 + self.stored, :8] = value


MAXIMUM, LANE_MAXIMUM, WEIGHT, VALUE = range(4)  # what is passed


def of_last_token(variant: Variant) -> Variant:
    """The variant as a query that is its sequence's last token sees it: no key is to its right."""
    window = None if variant.left is None else (variant.left, 0)
    return replace(variant, is_causal=False, window=window)


@dataclass(frozen=True)
class Step:
    """What all steps share: the plan, operands in VMEM, and the sets of scratch."""

    plan: DecodePlan
    variant: Variant
    copies: Copies
    new: NewTokens
    query: Any  # (rows_per_program, num_heads, head_dim)
    slopes: Any  # (num_heads, LANES) or None
    out: Any
    lse: Any
    scores: tuple[Any, ...]  # (num_heads, step_rows), float32
    weights: tuple[Any, ...]  # (num_heads, step_rows), bfloat16
    stats: tuple[Any, ...]  # (items_per_step, STATS, num_heads, LANES)
    passed: Passed
    token: Any  # (num_heads, LANES): of a lane's key, within its register; or FOREIGN

    def pass_on(self, which: int, value: Any) -> Any:
        """A chunk's sum for the next chunk, through memory if registers are few."""
        if not self.plan.passes_sums:
            return value
        self.passed.put(which, value)
        return None

    def passed_on(self, which: int, value: Any) -> Any:
        """What `pass_on` made of a sum, as a sum."""
        return self.passed.get(which) if value is None else value


def lane_tokens(plan: DecodePlan, group: int) -> Any:
    shape = (plan.num_heads, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    is_own = lax.rem(lane, plan.num_kv_heads) == lax.div(row, group)
    return jnp.where(is_own, lax.div(lane, plan.num_kv_heads), FOREIGN)


class Groups(NamedTuple):
    """Items of the steps around one."""

    before: list[Item]  # its values are taken in
    this: list[Item]
    next: list[Item]  # its scores are made, its values fetched
    second: list[Item]  # the table's slices for its values are fetched
    third: list[Item]  # its keys are fetched
    fourth: list[Item]  # the table's slices for its keys are fetched


class ScoreStage:
    """Masked scores of a group, and the maximum of each lane.

    are_full: every token of the tiles is there.
    filling: a buffer whose copies have to start first, or None.
    """

    def __init__(self, step: Step, slot: int, items: list[Item], *, are_full: bool, filling: Any):
        self.step, self.slot, self.items = step, slot, items
        self.are_full, self.filling = are_full, filling
        self.top: Any = None
        self.seen: list[Any] = []

    def chunk(self, u: int, first: int) -> None:
        step, plan, item = self.step, self.step.plan, self.items[u]
        keys = step.copies.keys.buffers
        query = step.query[step.copies.work.query(item)]
        if self.filling is not None:
            query = tied(plan, query, self.filling)
        at = u * plan.tile_rows + first
        dots = lax.dot_general(
            query,
            rows_of(keys[self.slot], at // UNIT_ROWS, plan.chunk_rows // UNIT_ROWS),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        top: Any = None if first == 0 else step.passed_on(LANE_MAXIMUM, self.top)
        for j in range(0, plan.chunk_rows, LANES):
            token = (first + j) // plan.num_kv_heads
            scores = self._masked(item.left, token, dots[:, j : j + LANES])
            step.scores[self.slot][:, pl.ds(at + j, LANES)] = scores
            top = scores if top is None else jnp.maximum(top, scores)
        self.seen.append(top[:8])
        if first + plan.chunk_rows == plan.tile_rows:
            step.stats[self.slot][u, LANE_TOP] = top
        else:
            self.top = step.pass_on(LANE_MAXIMUM, top)

    def _masked(self, left: Any, token: int, dots: Any) -> Any:
        """Scores of a register; positions count from its first token."""
        step = self.step
        slope = None if step.slopes is None else step.slopes[...]
        has_positions = slope is not None or step.variant.left is not None
        # without positions, the other heads' keys are all that a full tile hides
        stop = FOREIGN if self.are_full and not has_positions else left - token
        position = stop - 1 if has_positions else 0  # any that is not negative
        scores = step.variant.score(dots, position, step.token, slope, LOG2E)
        keep = step.variant.keep(position, step.token, stop)
        return jnp.where(keep, scores, softmax.MASK)


class SoftmaxStage:
    """Weights of a group, from its scores."""

    def __init__(self, step: Step, slot: int, items: list[Item]):
        self.step, self.slot, self.items = step, slot, items
        stats, before = step.stats[slot], step.stats[(slot + 2) % SETS]
        m, self.l = before[-1, TOP], before[-1, SUM]
        for u, item in enumerate(items):
            before = jnp.where(item.tile == 0, softmax.FLOOR, m)
            m = jnp.maximum(before, jnp.max(stats[u, LANE_TOP], axis=-1, keepdims=True))
            stats[u, DECAY] = jnp.exp2(before - m)
            stats[u, TOP] = m

    def chunk(self, u: int, first: int, seen: Any) -> None:
        """`seen`: a lane maximum that the exponentials wait for, or None."""
        step, plan, slot = self.step, self.step.plan, self.slot
        stats = step.stats[slot]
        if first == 0:
            total = self.l if u == 0 else stats[u - 1, SUM]
            total = jnp.where(self.items[u].tile == 0, 0.0, total * stats[u, DECAY])
            step.passed.put(MAXIMUM, stats[u, TOP])
        else:
            total = step.passed_on(WEIGHT, self.l)
        if seen is not None:
            step.passed.wait(MAXIMUM, seen)
        top = step.passed.get(MAXIMUM)
        at = u * plan.tile_rows + first
        for j in range(at, at + plan.chunk_rows, LANES):
            weights = jnp.exp2(step.scores[slot][:, pl.ds(j, LANES)] - top)
            total = total + weights
            step.weights[slot][:, pl.ds(j, LANES)] = weights.astype(jnp.bfloat16)
        if first + plan.chunk_rows == plan.tile_rows:
            stats[u, SUM] = total
        else:
            self.l = step.pass_on(WEIGHT, total)


class ValueStage:
    """Outputs of a group, from its weights; every tile writes what its row has so far."""

    def __init__(self, step: Step, slot: int, items: list[Item], filling: Any):
        self.step, self.slot, self.items, self.filling = step, slot, items, filling
        self.acc = step.stats[(slot + 2) % SETS][-1, OUTPUT]

    def chunk(self, u: int, first: int) -> None:
        step, plan, slot, item = self.step, self.step.plan, self.slot, self.items[u]
        values, stats = step.copies.values.buffers, step.stats[self.slot]
        if first == 0:
            acc = self.acc if u == 0 else stats[u - 1, OUTPUT]
            acc = jnp.where(item.tile == 0, 0.0, acc * stats[u, DECAY])
        else:
            acc = step.passed_on(VALUE, self.acc)
        at = u * plan.tile_rows + first
        weights = step.weights[slot][:, pl.ds(at, plan.chunk_rows)]
        if self.filling is not None:
            parts = [weights[:, i : i + LANES] for i in range(0, plan.chunk_rows, LANES)]
            weights = jnp.concatenate([tied(plan, parts[0], self.filling), *parts[1:]], axis=1)
        rows = rows_of(values[slot], at // UNIT_ROWS, plan.chunk_rows // UNIT_ROWS)
        acc += jnp.dot(weights, rows, preferred_element_type=jnp.float32)
        if first + plan.chunk_rows < plan.tile_rows:
            self.acc = step.pass_on(VALUE, acc)
            return
        stats[u, OUTPUT] = acc
        total = jnp.sum(stats[u, SUM], axis=-1, keepdims=True)
        write(step, item, softmax.State(stats[u, TOP], total, acc))


def write(step: Step, item: Item, state: softmax.State) -> None:
    """Stores a row's output, and its lse as a row of lanes."""
    work = step.copies.work
    row = work.query(item)
    out, lse = softmax.finish(ROWS, state)
    # before the first item and past the last one there is nothing but what stands in the buffers
    is_item = item.left > 0
    step.out[row] = jnp.where(is_item, out.astype(step.out.dtype), step.out[row])
    shape = (step.plan.num_heads, LANES)
    is_own = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
    lse = jnp.sum(jnp.where(is_own, lse, 0.0), axis=0, keepdims=True)
    step.lse[pl.ds(row, 1), :] = jnp.where(is_item, lse, step.lse[pl.ds(row, 1), :])


def run(step: Step, slot: int, way: str, groups: Groups) -> None:
    """One step in one block of code, `way` being how its blocks are copied."""
    plan, copies = step.plan, step.copies
    ahead, behind = (slot + 1) % SETS, (slot + 2) % SETS
    is_tied = way != "general"
    keys, values = [], []
    if is_tied:
        count = plan.run if way == "runs" else 1
        keys = copies.listed(slot, copies.keys, groups.third, slot, count)
        values = copies.listed(slot, copies.values, groups.next, ahead, count)
    else:
        copies.start(slot, copies.keys, groups.third, slot)
        copies.start_full(slot, copies.values, groups.next, ahead)
    chunks = plan.chunks
    pace = partial(Paced, num_chunks=len(chunks), spread=plan.spread)
    keys, values = pace(keys), pace(values)
    weigh = SoftmaxStage(step, slot, groups.this)
    fillings = copies.keys.buffers[slot], copies.values.buffers[ahead]
    fillings = fillings if is_tied else (None, None)
    score = ScoreStage(step, ahead, groups.next, are_full=is_tied, filling=fillings[0])
    take = ValueStage(step, behind, groups.before, fillings[1])
    for i, (u, first) in enumerate(chunks):
        score.chunk(u, first)
        keys.after(i)
        if i == 0:
            copies.start_slices(ahead, copies.keys, groups.fourth)
            copies.start_slices(ahead, copies.values, groups.second)
        weigh.chunk(u, first, score.seen[i - 2] if i >= 2 else None)
        take.chunk(u, first)
        values.after(i)


def run_once(step: Step, items: list[Item]) -> None:
    """All of a call in one step: no items before or after to hide behind."""
    copies, slot = step.copies, 0
    clear_pads(step.plan, (copies.keys, copies.values))
    for stream in (copies.keys, copies.values):
        copies.start_slices(slot, stream, items)
    copies.wait_slices(slot)
    is_whole = copies.work.are_whole(items)
    lax.cond(is_whole, partial(_once_full, step, items), partial(_once_cut, step, items))


def _once_full(step: Step, items: list[Item]) -> None:
    """Nothing but full tiles: one block of code.  Values are fetched beside the first scores."""
    copies, slot = step.copies, 0
    keys, values = (
        copies.listed(slot, stream, items, slot, 1) for stream in (copies.keys, copies.values)
    )
    some = len(values) // 4  # so that memory has work while the others are started
    for start in keys + values[:some]:
        start()
    copies.wait_whole(copies.keys, slot)
    step.new.put(KEYS, items, copies.keys.buffers[slot])
    pace = Paced(values[some:], len(step.plan.chunks), 0.25)
    _score_and_weigh(step, items, pace)
    copies.wait_whole(copies.values, slot)
    step.new.put(VALUES, items, copies.values.buffers[slot])
    _take(step, items)
    step.new.wait(items, items)


def _once_cut(step: Step, items: list[Item]) -> None:
    copies, slot = step.copies, 0
    for stream in (copies.keys, copies.values):
        copies.start(slot, stream, items, slot)
    copies.wait(copies.keys, items, slot)
    step.new.put(KEYS, items, copies.keys.buffers[slot])
    _score_and_weigh(step, items, None)
    copies.wait(copies.values, items, slot)
    step.new.put(VALUES, items, copies.values.buffers[slot])
    copies.clear(items, slot)
    _take(step, items)
    step.new.wait(items, items)


def _score_and_weigh(step: Step, items: list[Item], values: Paced | None) -> None:
    filling = None if values is None else step.copies.values.buffers[0]
    score = ScoreStage(step, 0, items, are_full=values is not None, filling=filling)
    for i, chunk in enumerate(step.plan.chunks):
        score.chunk(*chunk)
        if values is not None:
            values.after(i)
    weigh = SoftmaxStage(step, 0, items)
    for chunk in step.plan.chunks:
        weigh.chunk(*chunk, None)


def _take(step: Step, items: list[Item]) -> None:
    take = ValueStage(step, 0, items, None)
    for chunk in step.plan.chunks:
        take.chunk(*chunk)
