"""The steps of a prefill: the items of a query tile against a tile, or a part, of prepared keys.

Scores are transposed, keys on sublanes and query rows on lanes: `S^T = K Q^T` with the queries
stationary in the matrix unit and `O^T += V^T P^T` with the weights stationary, which fills it both
ways; maximum and sum need no reduction over lanes.  Items are skewed in one basic block: the scores
of an item are computed `plan.ahead` items before its softmax, its values one item after.  Groups of
items, and tiles that follow each other in whole, are one such stream: `fill` begins it, `advance`
goes on by a group, `drain` ends it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core import softmax
from ..core.variant import LOG2E, Variant
from .blocks import rows_of
from .prefill_plan import SUBLANES, PrefillPlan

SUB = 128  # keys of one piece of a softmax
LAG = 1  # pieces of new scores that a piece of a softmax stays behind
UNSEEN = 3e38  # above any score


class Buffers(NamedTuple):
    """Scratch that steps work in."""

    scores: tuple[Any, ...]  # (tile keys, rows) each
    tops: tuple[Any, ...]  # (SUBLANES, rows): their maximum
    weights: tuple[Any, ...]  # (tile keys, rows)
    decay: Any  # (SUBLANES, rows): of the last item's values
    m: Any  # (items, SUBLANES, rows)
    l: Any  # sums by sublane; unused where the matrix unit sums
    acc: Any  # (items, value rows, rows)
    limits: Any  # (parts, row blocks, part keys, rows): the most a score may be
    keys: Any  # words, (slots, parts, heads, part keys / 2, head_dim)
    values: Any  # words, (slots, parts, heads, value rows / 2, part keys)


class Place(NamedTuple):
    """Where a step's keys and values are: slots of tiles, and the first part in them."""

    key_slot: Any
    value_slot: Any
    part: Any
    position: Any  # of the part's first key


@dataclass(frozen=True)
class Step:
    """Some parts of a prepared tile, for every item: all of them, or one with masks.

    A stream goes from step to step: from tile to tile, or, with masks, from part to part.
    """

    plan: PrefillPlan
    variant: Variant
    buffers: Buffers
    query: Any  # (items, head_dim, rows)
    slopes: Any  # (heads, rows) or None
    first_position: Any  # of the query tile
    kv_stop: Any
    place: Place
    before: Place  # of the step before, if the stream began there; else as `place`
    after: Place  # of the step after, if there is one; else anything
    is_masked: bool

    @property
    def num_parts(self) -> int:
        return 1 if self.is_masked else self.plan.num_parts

    @property
    def is_tied(self) -> bool:
        """Whether a softmax waits for scores ahead: not where a part's are soon computed."""
        return not (self.is_masked and self.plan.sums_on_matrix_unit)

    @property
    def group_items(self) -> int:
        return self.plan.part_group_items if self.is_masked else self.plan.group_items

    @property
    def num_groups(self) -> int:
        return self.plan.num_items // self.group_items

    def query_positions(self, row_block: Any) -> Any:
        """Positions of an item's rows, (1, rows)."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.plan.item_rows), 1)
        token = lax.div(row, jnp.int32(self.plan.group))
        return self.first_position + row_block * self.plan.item_tokens + token

    def key_positions(self, first: Any, shape: tuple[int, int]) -> Any:
        key = lax.broadcasted_iota(jnp.int32, shape, 0)
        return self.place.position + first + key


def scales_late(variant: Variant) -> bool:
    """Scores are dot products times a positive number, so their maximum may be taken before it."""
    is_linear = variant.logits_soft_cap is None and not variant.has_alibi
    return is_linear and 1e-6 < variant.scale < 1e6


def fill(step: Step) -> None:
    """Begins a stream: the scores of the first items; the item before them has weights of 0."""
    buffers, plan = step.buffers, step.plan
    buffers.decay[...] = jnp.ones(buffers.decay.shape, jnp.float32)
    keys = step.num_parts * plan.part_keys
    buffers.weights[1][:keys] = jnp.zeros((keys, plan.item_rows), buffers.weights[1].dtype)
    for item in range(plan.ahead):
        scores = _Scores(step, item, item)
        for part in range(step.num_parts):
            scores.multiply(part)
            for piece in range(0, plan.part_keys, SUB):
                scores.store(part, piece)
        scores.finish()


def _by_turn(step: Step, chores: Sequence[Callable[[], None]]) -> list[list[Callable[[], None]]]:
    """What is done after each product with values.

    It lies between the products in the program, and the compiler keeps it there: it cannot tell
    what it writes from what the products read.  So none of it piles up behind the group.
    """
    count = step.group_items * step.num_parts
    first = step.plan.share_parts - 1  # values of the step before have been read where these go
    turns: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    for i, action in enumerate(chores):  # early, so that they are done when the group is
        turns[first + i * (count - first) // max(len(chores), count - first)].append(action)
    return turns


def advance(step: Step, group: Any, chores: Sequence[Callable[[], None]]) -> None:
    """Takes the keys in for the items of a group; `chores` are done on the way."""
    plan, count = step.plan, step.group_items
    first = group * count
    actions = _by_turn(step, chores)
    values = _Values(step, first - 1, 1, step.buffers.decay[...])
    for u in range(count):
        scores = _Scores(step, first + u + plan.ahead, (u + plan.ahead) % (plan.ahead + 1))
        weights = _Weights(step, first + u, u)
        for part in range(step.num_parts):
            scores.multiply(part)
            for piece in range(0, plan.part_keys, SUB):
                scores.store(part, piece)
                weights.weigh(part, piece, scores)
            values.multiply(part)
            for action in actions[u * step.num_parts + part]:
                action()
        for stage in (scores, weights, values):
            stage.finish()
        values = _Values(step, first + u, u % 2, weights.decay)
    step.buffers.decay[...] = values.decay


def drain(step: Step) -> None:
    """Ends a stream: the values of the last item."""
    values = _Values(step, step.plan.num_items - 1, 1, step.buffers.decay[...])
    for part in range(step.num_parts):
        values.multiply(part)
    values.finish()


def store_limits(step: Step) -> None:
    """Stores what masks the scores of a part, before a stream comes to it."""
    plan = step.plan
    shape = (SUB, plan.item_rows)
    for block in range(plan.row_blocks):
        query_position = step.query_positions(block)
        for first in range(0, plan.part_keys, SUB):
            keep = step.variant.keep(query_position, step.key_positions(first, shape), step.kv_stop)
            limits = jnp.where(keep, UNSEEN, softmax.MASK)
            step.buffers.limits[step.place.part, block, first : first + SUB] = limits


class _Scores:
    """The scores of an item, and their running maximum; past the last item, of the step after."""

    def __init__(self, step: Step, item: Any, score_slot: int) -> None:
        plan = step.plan
        self.score_slot = score_slot
        is_after = item >= plan.num_items
        self.item = jnp.where(is_after, item - plan.num_items, item)
        self.step = replace(step, place=_choose(is_after, step.after, step.place))
        self.head = lax.div(self.item, jnp.int32(plan.row_blocks))
        self.block = lax.rem(self.item, jnp.int32(plan.row_blocks))
        self.tops: list[Any] = []  # after each piece
        self.dots: Any = None  # of a part

    def multiply(self, part: int) -> None:
        step = self.step
        keys = rows_of(step.buffers.keys[step.place.key_slot, step.place.part + part, self.head])
        self.dots = jnp.dot(keys, step.query[self.item], preferred_element_type=jnp.float32)

    def store(self, part: int, piece: int) -> None:
        key = part * self.step.plan.part_keys + piece
        scores = self._score(self.dots[piece : piece + SUB], key, piece)
        self.step.buffers.scores[self.score_slot][key : key + SUB] = scores
        top = _over_sublanes(scores, jnp.max)
        self.tops.append(jnp.maximum(self.tops[-1], top) if self.tops else top)

    def _score(self, dots: Any, key: int, piece: int) -> Any:
        step = self.step
        if not scales_late(step.variant):
            query_position = step.query_positions(self.block)
            key_position = step.key_positions(key, dots.shape)
            slope = None if step.slopes is None else step.slopes[pl.ds(self.head, 1)]
            dots = step.variant.score(dots, query_position, key_position, slope, LOG2E)
        if step.is_masked:
            dots = jnp.minimum(
                dots, step.buffers.limits[step.place.part, self.block, piece : piece + SUB]
            )
        return dots

    def finish(self) -> None:
        self.step.buffers.tops[self.score_slot][...] = self.tops[-1]


class _Weights:
    """The weights of an item, with the maximum of all keys so far."""

    def __init__(self, step: Step, item: Any, u: int) -> None:
        self.step, self.item = step, item
        buffers, variant = step.buffers, step.variant
        slot = u % (step.plan.ahead + 1)
        self.scores, self.weights = buffers.scores[slot], buffers.weights[u % 2]
        top = jnp.max(buffers.tops[slot][...], axis=0, keepdims=True)
        before = buffers.m[item]
        self.m = jnp.maximum(before, jnp.broadcast_to(top, before.shape))
        buffers.m[item] = self.m
        self.decay = jnp.exp2(exponent(variant, before - self.m))
        self.l = None if step.plan.sums_on_matrix_unit else buffers.l[item] * self.decay

    def weigh(self, part: int, piece: int, ahead: _Scores) -> None:
        key = part * self.step.plan.part_keys + piece
        m, shape = self.m, (SUB // SUBLANES, SUBLANES, self.step.plan.item_rows)
        if len(ahead.tops) > LAG and self.step.is_tied:
            # changes nothing, but keeps the softmax behind the products of the scores ahead
            tie = jnp.where(ahead.tops[-1 - LAG] > 0, softmax.MASK, 2 * softmax.MASK)
            m = jnp.maximum(m, tie)
        scores = self.scores[key : key + SUB].reshape(shape)
        weights = jnp.exp2(exponent(self.step.variant, scores - m[None]))
        if self.l is not None:
            self.l += jnp.sum(weights, axis=0)
        weights = weights.reshape(SUB, shape[-1])
        self.weights[key : key + SUB] = weights.astype(self.weights.dtype)

    def finish(self) -> None:
        if self.l is not None:
            self.step.buffers.l[self.item] = self.l


class _Values:
    """The weighted values of an item; before the first item, of the step before."""

    def __init__(self, step: Step, item: Any, weight_slot: int, decay: Any) -> None:
        plan = step.plan
        is_before = item < 0
        self.step, self.decay = step, decay
        self.weights = step.buffers.weights[weight_slot]
        self.place = _choose(is_before, step.before, step.place)
        self.item = jnp.where(is_before, item + plan.num_items, item)
        self.head = lax.div(self.item, jnp.int32(plan.row_blocks))
        self.acc = step.buffers.acc[self.item] * decay[:1]

    def multiply(self, part: int) -> None:
        buffers, count = self.step.buffers, self.step.plan.part_keys
        values = rows_of(buffers.values[self.place.value_slot, self.place.part + part, self.head])
        weights = self.weights[part * count : (part + 1) * count]
        self.acc += jnp.dot(values, weights, preferred_element_type=jnp.float32)

    def finish(self) -> None:
        self.step.buffers.acc[self.item] = self.acc


def _choose(condition: Any, some: Place, others: Place) -> Place:
    return Place(*(jnp.where(condition, a, b) for a, b in zip(some, others, strict=True)))


def exponent(variant: Variant, difference: Any) -> Any:
    """Of stored scores, in powers of two."""
    return variant.score(difference, None, None, unit=LOG2E) if scales_late(variant) else difference


def _over_sublanes(x: Any, op: Callable) -> Any:
    """(n, rows) to (SUBLANES, rows)."""
    return op(x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1]), axis=0)
