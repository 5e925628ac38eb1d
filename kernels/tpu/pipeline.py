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
from .decode_append import TokenWriter
from .decode_copies import Copies, Paced, rows_of, tied
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
    new: TokenWriter
    query: Any  # (rows_per_program, num_heads, head_dim)
    slopes: Any  # (num_heads, LANES) or None
    out: Any
    lse: Any
    scores: tuple[Any, ...]  # (num_heads, step_rows), float32
    weights: tuple[Any, ...]  # (num_heads, step_rows), bfloat16
    stats: tuple[Any, ...]  # (items_per_step, STATS, num_heads, LANES)
    passed: Passed
    group: int  # query heads of a kv head
    token: Any  # (num_heads, LANES): of a lane's key, within its register; or FOREIGN

    @property
    def masks_later(self) -> bool:
        """Whether scores are masked a step after they are made, and only where a row ends.

        Many heads leave no registers for it.  What a score depends on by its position comes first.
        """
        return self.plan.passes_sums and not self.has_positions

    @property
    def has_positions(self) -> bool:
        return self.slopes is not None or self.variant.left is not None

    def pass_on(self, which: int, value: Any) -> Any:
        """A chunk's sum for the next chunk, through memory if registers are few."""
        if not self.plan.passes_sums:
            return value
        self.passed.put(which, value)
        return None

    def passed_on(self, which: int, value: Any) -> Any:
        """What `pass_on` made of a sum, as a sum."""
        return self.passed.get(which) if value is None else value


def lane_tokens(plan: DecodePlan, group: int, zero: Any = 0) -> Any:
    """With a `zero` that the compiler does not know, it makes them anew and keeps no registers."""
    shape = (plan.num_heads, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1) + zero
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
        # the first register, or of many the last one that the matrix unit hands over
        self.seen.append(top[-8:] if plan.passes_sums else top[:8])
        if first + plan.chunk_rows == plan.tile_rows:
            step.stats[self.slot][u, LANE_TOP] = top
        else:
            self.top = step.pass_on(LANE_MAXIMUM, top)

    def _masked(self, left: Any, token: int, dots: Any) -> Any:
        """Scores of a register; positions count from its first token."""
        step = self.step
        slope = None if step.slopes is None else step.slopes[...]
        # without positions, the other heads' keys are all that a full tile hides
        stop = FOREIGN if self.are_full and not step.has_positions else left - token
        position = stop - 1 if step.has_positions else 0  # any that is not negative
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


def run(step: Step, slot: int, groups: Groups, is_fast: Any) -> None:
    """One step in one block of code.

    is_fast: whether its copies are started inside of it, by a predicate: all its tiles are full
      and, if the plan merges copies, their blocks lie in runs.  Others are started before it.
      None: all tiles are full, and there is no cycle to spare for a predicate on each block.
    """
    plan, copies = step.plan, step.copies
    ahead, behind = (slot + 1) % SETS, (slot + 2) % SETS
    count = 1 if is_fast is None else plan.run
    keys = copies.listed(slot, copies.keys, groups.third, slot, count)
    values = copies.listed(slot, copies.values, groups.next, ahead, count)
    if is_fast is not None:
        pl.when(~is_fast)(partial(_start_before, copies, slot, groups))
    chunks = plan.chunks
    pace = partial(Paced, num_chunks=len(chunks), spread=plan.spread, when=is_fast)
    keys, values = pace(keys), pace(values)
    weigh = SoftmaxStage(step, slot, groups.this)
    fillings = copies.keys.buffers[slot], copies.values.buffers[ahead]
    are_full = step.masks_later or is_fast is None
    score = ScoreStage(step, ahead, groups.next, are_full=are_full, filling=fillings[0])
    take = ValueStage(step, behind, groups.before, fillings[1])
    for i, (u, first) in enumerate(chunks):
        score.chunk(u, first)
        keys.after(i)
        earlier = i - plan.seen_chunks
        weigh.chunk(u, first, score.seen[earlier] if earlier >= 0 else None)
        take.chunk(u, first)
        values.after(i)
        if i == 0:
            copies.start_slices(ahead, copies.keys, groups.fourth)
            copies.start_slices(ahead, copies.values, groups.second)


def _start_before(copies: Copies, slot: int, groups: Groups) -> None:
    """Starts the copies of a step's blocks, whatever its tiles hold."""
    copies.start(slot, copies.keys, groups.third, slot)
    copies.start_full(slot, copies.values, groups.next, (slot + 1) % SETS)


def mask_ends(step: Step, slot: int, items: list[Item]) -> None:
    """Masks scores past a row's end that were made as if the tiles were full."""
    if not step.masks_later:
        return
    plan = step.plan
    scores, tokens = step.scores[slot], LANES // plan.num_kv_heads

    def mask_end(u: Any, left: Any) -> None:
        at = lambda i: pl.ds(pl.multiple_of(u * plan.tile_rows + i * LANES, LANES), LANES)
        whole = lax.div(jnp.maximum(left, 0), tokens)

        def see(i: Any, top: Any) -> Any:
            return jnp.maximum(top, scores[:, at(i)])

        def cut(i: Any, top: Any) -> Any:
            keep = step.variant.keep(0, token, left - i * tokens)
            kept = jnp.where(keep, scores[:, at(i)], softmax.MASK)
            scores[:, at(i)] = kept
            return jnp.maximum(top, kept)

        token = lane_tokens(plan, step.group, step.passed.loaded)
        top = jnp.full(token.shape, softmax.MASK, jnp.float32)
        top = lax.fori_loop(0, whole, see, top)
        top = lax.fori_loop(whole, plan.tile_rows // LANES, cut, top)
        step.stats[slot][u, LANE_TOP] = top

    def each(u: Any, item: Item) -> None:
        pl.when(item.left < plan.tile_tokens)(partial(mask_end, u, item.left))

    step.copies.work.each(items, each)
