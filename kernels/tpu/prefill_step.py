"""One step of a prefill: all items of a query tile against a tile, or a part, of prepared keys.

Scores are transposed, keys on sublanes and query rows on lanes: `S^T = K Q^T` with the queries
stationary in the matrix unit and `O^T += V^T P^T` with the weights stationary, which fills it both
ways; maximum and sum need no reduction over lanes.  Items are skewed in one basic block: the scores
of an item are computed `AHEAD` items before its softmax, its values one item after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core import softmax
from ..core.variant import LOG2E, Variant
from .plan import LANES
from .prefill_plan import AHEAD, SUBLANES, PrefillPlan

CHUNK = 256  # keys of one product
SUB = 128  # keys of one piece of a softmax
LAG = 1  # pieces of new scores that a piece of a softmax stays behind
UNSEEN = 3e38  # above any score


class Buffers(NamedTuple):
    """Scratch that steps work in."""

    scores: tuple[Any, ...]  # (keys, rows) each
    tops: tuple[Any, ...]  # (SUBLANES, rows): their maximum
    weights: tuple[Any, ...]  # (keys, rows)
    m: Any  # (items, SUBLANES, rows)
    l: Any  # sums by sublane; unused where the matrix unit sums
    acc: Any  # (items, value rows, rows)
    limits: Any  # (row blocks, part keys, rows): the most a score may be
    keys: Any
    values: Any


@dataclass(frozen=True)
class Step:
    """Keys [first_key, first_key + num_keys) of a prepared tile, for every item.

    first_key is a multiple of a part's keys; is_masked: some query does not see some of them.
    """

    plan: PrefillPlan
    variant: Variant
    buffers: Buffers
    query: Any  # (items, head_dim, rows)
    slopes: Any  # (heads, rows) or None
    first_position: Any  # of the query tile
    tile_position: Any  # of the tile's first key
    kv_stop: Any
    first_key: Any
    num_keys: int
    is_masked: bool

    def at(self, first: int, count: int) -> Any:
        return pl.ds(pl.multiple_of(self.first_key + first, LANES), count)

    def query_positions(self, row_block: int) -> Any:
        """Positions of an item's rows, (1, rows)."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.plan.item_rows), 1)
        token = lax.div(row, jnp.int32(self.plan.group))
        return self.first_position + row_block * self.plan.item_tokens + token

    def key_positions(self, first: int, shape: tuple[int, int]) -> Any:
        key = lax.broadcasted_iota(jnp.int32, shape, 0)
        return self.tile_position + self.first_key + first + key


def scales_late(variant: Variant) -> bool:
    """Scores are dot products times a positive number, so their maximum may be taken before it."""
    is_linear = variant.logits_soft_cap is None and not variant.has_alibi
    return is_linear and 1e-6 < variant.scale < 1e6


class Chores:
    """Small actions to be spread over a step, each as soon as it may be done."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    def add(self, earliest: int, action: Callable[[], None]) -> None:
        """Does `action` not before the steps of item `earliest` begin."""
        self._waiting.append((earliest, action))

    def do(self, now: int, share: float) -> None:
        """Does some: `share` is what part of the step remains, this turn included."""
        ready = sorted((e for e in self._waiting if e[0] <= now), key=lambda entry: entry[0])
        for entry in ready[: -(-len(self._waiting) // max(int(share), 1))]:
            self._waiting.remove(entry)
            entry[1]()


def run(step: Step, chores: Chores) -> None:
    """Takes the keys in, for every item; `chores` are done on the way."""
    if step.is_masked:
        _store_limits(step)
    num_items = step.plan.num_items
    chunks = range(0, step.num_keys, min(CHUNK, step.num_keys))
    turns = (num_items + AHEAD + 1) * len(chunks)
    values = None
    for u in range(-AHEAD, num_items + 1):
        scores = _Scores(step, u + AHEAD) if u + AHEAD < num_items else None
        weights = _Weights(step, u) if 0 <= u < num_items else None
        for first in chunks:
            if scores is not None:
                scores.multiply(first)
            for key in range(first, first + min(CHUNK, step.num_keys), SUB):
                if scores is not None:
                    scores.store(key)
                if weights is not None:
                    weights.weigh(key, scores)
            if values is not None:
                values.multiply(first)
            chores.do(u, turns)
            turns -= 1
        for stage in (scores, weights, values):
            if stage is not None:
                stage.finish()
        values = _Values(step, u, weights.decay) if weights is not None else None
    chores.do(num_items + 1, 1)


def _store_limits(step: Step) -> None:
    plan = step.plan
    shape = (SUB, plan.item_rows)
    for block in range(plan.row_blocks):
        query_position = step.query_positions(block)
        for first in range(0, step.num_keys, SUB):
            keep = step.variant.keep(query_position, step.key_positions(first, shape), step.kv_stop)
            limits = jnp.where(keep, UNSEEN, softmax.MASK)
            step.buffers.limits[block, first : first + SUB] = limits


class _Scores:
    """The scores of an item, and their running maximum."""

    def __init__(self, step: Step, item: int) -> None:
        self.step, self.item = step, item
        self.head, self.block = divmod(item, step.plan.row_blocks)
        self.slot = item % (AHEAD + 1)
        self.tops: list[Any] = []  # after each piece
        self.chunk = (0, None)

    def multiply(self, first: int) -> None:
        step = self.step
        count = min(CHUNK, step.num_keys)
        keys = step.buffers.keys[self.head, step.at(first, count)]
        dots = jnp.dot(keys, step.query[self.item], preferred_element_type=jnp.float32)
        self.chunk = (first, dots)

    def store(self, key: int) -> None:
        first, dots = self.chunk
        assert dots is not None, "multiply() comes first"
        scores = self._score(dots[key - first : key - first + SUB], key)
        self.step.buffers.scores[self.slot][key : key + SUB] = scores
        top = _over_sublanes(scores, jnp.max)
        self.tops.append(jnp.maximum(self.tops[-1], top) if self.tops else top)

    def _score(self, dots: Any, key: int) -> Any:
        step = self.step
        if not scales_late(step.variant):
            query_position = step.query_positions(self.block)
            key_position = step.key_positions(key, dots.shape)
            slope = None if step.slopes is None else step.slopes[self.head : self.head + 1]
            dots = step.variant.score(dots, query_position, key_position, slope, LOG2E)
        if step.is_masked:
            dots = jnp.minimum(dots, step.buffers.limits[self.block, key : key + SUB])
        return dots

    def finish(self) -> None:
        self.step.buffers.tops[self.slot][...] = self.tops[-1]


class _Weights:
    """The weights of an item, with the maximum of all keys so far."""

    def __init__(self, step: Step, item: int) -> None:
        self.step, self.item = step, item
        buffers, variant = step.buffers, step.variant
        self.scores = buffers.scores[item % (AHEAD + 1)]
        self.weights = buffers.weights[item % 2]
        top = jnp.max(buffers.tops[item % (AHEAD + 1)][...], axis=0, keepdims=True)
        before = buffers.m[item]
        self.m = jnp.maximum(before, jnp.broadcast_to(top, before.shape))
        buffers.m[item] = self.m
        self.decay = jnp.exp2(exponent(variant, before - self.m))
        self.l = None if step.plan.sums_on_matrix_unit else buffers.l[item] * self.decay

    def weigh(self, key: int, ahead: _Scores | None) -> None:
        m, shape = self.m, (SUB // SUBLANES, SUBLANES, self.step.plan.item_rows)
        if ahead is not None and len(ahead.tops) > LAG:
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

    def __init__(self, step: Step, item: int, decay: Any) -> None:
        self.step, self.item = step, item
        self.head = item // step.plan.row_blocks
        self.acc = step.buffers.acc[item] * decay[:1]

    def multiply(self, first: int) -> None:
        buffers, count = self.step.buffers, min(CHUNK, self.step.num_keys)
        values = buffers.values[self.head, :, self.step.at(first, count)]
        weights = buffers.weights[self.item % 2][first : first + count]
        self.acc += jnp.dot(values, weights, preferred_element_type=jnp.float32)

    def finish(self) -> None:
        self.step.buffers.acc[self.item] = self.acc


def exponent(variant: Variant, difference: Any) -> Any:
    """Of stored scores, in powers of two."""
    return variant.score(difference, None, None, unit=LOG2E) if scales_late(variant) else difference


def _over_sublanes(x: Any, op: Callable) -> Any:
    """(n, rows) to (SUBLANES, rows)."""
    return op(x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1]), axis=0)
