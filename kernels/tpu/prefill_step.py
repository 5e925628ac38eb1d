"""The steps of a prefill: the items of a query tile against a tile, or a part, of prepared keys.

Scores are transposed, keys on sublanes and query rows on lanes: `S^T = K Q^T` with the queries
stationary in the matrix unit and `O^T += V^T P^T` with the weights stationary, which fills it both
ways; maximum and sum need no reduction over lanes.  Items are skewed in one basic block: the scores
of an item are computed `plan.ahead` items before its softmax, its values one item after.  Groups of
items, and tiles that follow each other in whole, are one such stream: `fill` begins it, `advance`
goes on by a group, `drain` ends it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core import softmax
from ..core.variant import LOG2E, Variant
from .blocks import rows_of
from .plan import LANES
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
    limits: Any  # (LIMITS, row blocks, part keys, rows): the most a score may be
    keys: Any  # words, (slots, parts, heads, part keys / 2, head_dim)
    values: Any  # words, (slots, keys / LANES, heads, value rows / 2, LANES)


class Place(NamedTuple):
    """Where a step's queries, keys and values are."""

    first_item: Any
    key_slot: Any  # slots of tiles
    value_slot: Any
    part: Any  # the first one, of tiles
    position: Any  # of the part's first key
    limits: Any = 0  # slot of what masks the group


@dataclass(frozen=True)
class Step:
    """A group of items at some parts of a prepared tile: at all of them, or at one."""

    plan: PrefillPlan
    variant: Variant
    buffers: Buffers
    query: Any  # (operand tiles, items by head, head_dim, rows)
    slopes: Any  # (heads, rows) or None
    first_position: Any  # of the query tile
    here: Place
    before: Place  # of the step before in the stream; if there is none, any
    after: Place  # of the step after, likewise
    is_whole: bool  # takes in all parts of a tile
    is_masked: bool
    is_half: bool  # no query sees the latter half of the part, so that it may be left out

    @property
    def num_parts(self) -> int:
        return self.plan.num_parts if self.is_whole else 1

    @property
    def group_items(self) -> int:
        return self.plan.group_items if self.is_whole else self.plan.part_group_items

    def keys_of(self, i: int) -> int:
        """Keys of a part that item `i` takes in: half, if no other step has to do with it."""
        is_half = self.is_half and 0 <= i < self.group_items - 1
        return self.plan.part_keys // 2 if is_half else self.plan.part_keys

    @property
    def is_tied(self) -> bool:
        """Whether a softmax waits for scores ahead: not where a part's are soon computed."""
        return self.is_whole or not self.plan.sums_on_matrix_unit

    def query_positions(self, row_block: Any) -> Any:
        """Positions of an item's rows, (1, rows)."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.plan.item_rows), 1)
        token = lax.div(row, jnp.int32(self.plan.group))
        return self.first_position + row_block * self.plan.item_tokens + token


class Item(NamedTuple):
    """One of a step's items, counted from the step's first; those outside are its neighbours'."""

    place: Place
    index: Any  # in the query tile
    head: Any
    block: Any
    block_in_group: Any


def item_of(step: Step, i: int) -> Item:
    count = step.group_items
    place = step.before if i < 0 else step.after if i >= count else step.here
    i %= count
    index, head, block = item_at(step.plan, place.first_item, i, count)
    return Item(place, index, head, block, i // step.plan.num_kv_heads)


def item_at(plan: PrefillPlan, first: Any, i: int, count: int) -> tuple[Any, Any, Any]:
    """(index, head, row block) of item `i` of a group of `count` items."""
    heads = plan.num_kv_heads
    first_block = lax.div(first, jnp.int32(heads))
    if count % heads:  # a group has some heads of one block
        return first + i, lax.rem(first, jnp.int32(heads)) + i, first_block
    return first + i, i % heads, first_block + i // heads


def scales_late(variant: Variant) -> bool:
    """Scores are dot products times a positive number, so their maximum may be taken before it."""
    is_linear = variant.logits_soft_cap is None and not variant.has_alibi
    return is_linear and 1e-6 < variant.scale < 1e6


def in_operands(plan: PrefillPlan, head: Any, block: Any) -> tuple[Any, Any]:
    """Tile and place in it where operands have an item: by head, then block."""
    blocks = jnp.int32(plan.operand_blocks)
    return lax.div(block, blocks), head * blocks + lax.rem(block, blocks)


def fill(step: Step) -> None:
    """Begins a stream: the scores of the first items; the item before them has weights of 0."""
    buffers, plan = step.buffers, step.plan
    buffers.decay[...] = jnp.ones(buffers.decay.shape, jnp.float32)
    keys = step.num_parts * plan.part_keys
    buffers.weights[1][:keys] = jnp.zeros((keys, plan.item_rows), buffers.weights[1].dtype)
    for i in range(plan.ahead):
        scores = _Scores(step, i)
        for part in range(step.num_parts):
            scores.multiply(part)
            for piece in range(0, scores.keys, SUB):
                scores.store(part, piece)
        scores.finish()


def _by_turn(step: Step, chores: Sequence[Callable[[], None]]) -> list[list[Callable[[], None]]]:
    """What is done after each product with values.

    It lies between the products in the program, and the compiler keeps it there: it cannot tell
    what it writes from what the products read.  So none of it piles up behind the group.
    """
    count = step.group_items * step.num_parts
    # not before values of the step before have been read where these go
    first = 0 if not step.is_whole else (step.plan.share_keys - 1) // step.plan.part_keys
    turns: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    for i, action in enumerate(chores):  # early, so that they are done when the group is
        turns[first + i * (count - first) // max(len(chores), count - first)].append(action)
    return turns


def advance(step: Step, chores: Sequence[Callable[[], None]]) -> None:
    """Takes the keys in for the items of a group; `chores` are done on the way."""
    plan = step.plan
    actions = _by_turn(step, chores)
    values = _Values(step, -1, step.buffers.decay[...])
    for i in range(step.group_items):
        scores, weights = _Scores(step, i + plan.ahead), _Weights(step, i)
        for part in range(step.num_parts):
            scores.multiply(part)
            for piece in range(0, max(scores.keys, weights.keys), SUB):
                if piece < scores.keys:
                    scores.store(part, piece)
                if piece < weights.keys:
                    weights.weigh(part, piece, scores)
            values.multiply(part)
            for action in actions[i * step.num_parts + part]:
                action()
        for stage in (scores, weights, values):
            stage.finish()
        values = _Values(step, i, weights.decay)
    step.buffers.decay[...] = values.decay


def drain(step: Step) -> None:
    """Ends a stream: the values of the last item."""
    values = _Values(step, step.group_items - 1, step.buffers.decay[...])
    for part in range(step.num_parts):
        values.multiply(part)
    values.finish()


def store_limits(step: Step, seq_length: Any) -> None:
    """Stores what masks the scores of a group at a part, before a stream comes to it."""
    plan, here = step.plan, step.here
    first_block = lax.div(here.first_item, jnp.int32(plan.num_kv_heads))
    for block in range(plan.part_group_blocks):
        query_position = step.query_positions(first_block + block)
        for first in range(0, plan.part_keys, SUB):
            key_position = here.position + first + _iota((SUB, plan.item_rows))
            keep = step.variant.keep(query_position, key_position, seq_length)
            limits = jnp.where(keep, UNSEEN, softmax.MASK)
            step.buffers.limits[here.limits, block, first : first + SUB] = limits


def _iota(shape: tuple[int, int]) -> Any:
    return lax.broadcasted_iota(jnp.int32, shape, 0)


class _Scores:
    """The scores of an item, and their running maximum."""

    def __init__(self, step: Step, i: int) -> None:
        self.step, self.item, self.keys = step, item_of(step, i), step.keys_of(i)
        self.slot = i % (step.plan.ahead + 1)
        # where a step without masks ends, the next one may have some
        self.is_masked = step.is_masked or not (step.is_whole or i < step.group_items)
        self.tops: list[Any] = []  # after each piece
        self.dots: Any = None  # of a part

    def multiply(self, part: int) -> None:
        step, (place, _, head, block, _) = self.step, self.item
        words = slice(0, self.keys // 2)
        keys = rows_of(step.buffers.keys[place.key_slot, place.part + part, head, words])
        query = step.query[in_operands(step.plan, head, block)]
        self.dots = jnp.dot(keys, query, preferred_element_type=jnp.float32)

    def store(self, part: int, piece: int) -> None:
        key = part * self.step.plan.part_keys + piece
        scores = self._score(self.dots[piece : piece + SUB], key, piece)
        self.step.buffers.scores[self.slot][key : key + SUB] = scores
        top = _over_sublanes(scores, jnp.max)
        self.tops.append(jnp.maximum(self.tops[-1], top) if self.tops else top)

    def _score(self, dots: Any, key: int, piece: int) -> Any:
        step, (place, _, head, block, block_in_group) = self.step, self.item
        if not scales_late(step.variant):
            query_position = step.query_positions(block)
            key_position = place.position + key + _iota(dots.shape)
            slope = None if step.slopes is None else step.slopes[pl.ds(head, 1)]
            dots = step.variant.score(dots, query_position, key_position, slope, LOG2E)
        if self.is_masked:
            limits = step.buffers.limits[place.limits, block_in_group, piece : piece + SUB]
            dots = jnp.minimum(dots, limits)
        return dots

    def finish(self) -> None:
        self.step.buffers.tops[self.slot][...] = self.tops[-1]


class _Weights:
    """The weights of an item, with the maximum of all keys so far."""

    def __init__(self, step: Step, i: int) -> None:
        self.step, self.item, self.keys = step, item_of(step, i).index, step.keys_of(i)
        buffers, variant = step.buffers, step.variant
        slot = i % (step.plan.ahead + 1)
        self.scores, self.weights = buffers.scores[slot], buffers.weights[i % 2]
        top = jnp.max(buffers.tops[slot][...], axis=0, keepdims=True)
        before = buffers.m[self.item]
        self.m = jnp.maximum(before, jnp.broadcast_to(top, before.shape))
        buffers.m[self.item] = self.m
        self.decay = jnp.exp2(exponent(variant, before - self.m))
        self.l = None if step.plan.sums_on_matrix_unit else buffers.l[self.item] * self.decay

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
    """The weighted values of an item."""

    def __init__(self, step: Step, i: int, decay: Any) -> None:
        self.step, self.decay = step, decay
        self.item, self.keys = item_of(step, i), step.keys_of(i)
        self.weights = step.buffers.weights[i % 2]
        self.acc = step.buffers.acc[self.item.index] * decay[:1]
        if not step.plan.resets_values:  # NaN of the program before survives a product with 0
            self.acc = jnp.where(decay[:1] == 0, 0.0, self.acc)

    def multiply(self, part: int) -> None:
        buffers, count = self.step.buffers, self.step.plan.part_keys
        place, _, head, *_ = self.item
        first, pieces = (place.part + part) * (count // LANES), range(self.keys // LANES)
        values = [buffers.values[place.value_slot, first + n, head] for n in pieces]
        values = rows_of(jnp.concatenate(values, axis=1))
        weights = self.weights[part * count : part * count + self.keys]
        self.acc += jnp.dot(values, weights, preferred_element_type=jnp.float32)

    def finish(self) -> None:
        self.step.buffers.acc[self.item.index] = self.acc


def exponent(variant: Variant, difference: Any) -> Any:
    """Of stored scores, in powers of two."""
    return variant.score(difference, None, None, unit=LOG2E) if scales_late(variant) else difference


def _over_sublanes(x: Any, op: Callable) -> Any:
    """(n, rows) to (SUBLANES, rows)."""
    return op(x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1]), axis=0)
