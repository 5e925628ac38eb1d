"""The consumers' part of prefill: all tiles of keys of one item, from the last one down.

    step j    wait K(j) | take the turn | S = Q K(j)', O += P V(j - 1) | give the turn
              free K(j), V(j - 1) | softmax of S gives P | O is scaled

The two products of a step are issued together, and both slots are free before the softmax; while
one consumer is in it, the other one has the tensor core: they take turns, as in FlashAttention-3
(Shah et al., 2024).  The end of the sequence is in the first tile, so the long loop has no mask.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.variant import LOG2E
from . import blocks
from .blocks import WGMMA, pl, plgpu
from .plan import WARPGROUP_ROWS
from .prefill_cta import Cta, Work
from .prefill_list import Item
from .prefill_plan import CONSUMERS
from .tile import Sharing, Tiles, clear_tail, empty_state


class Rows(NamedTuple):
    """What a consumer has of an item: the query rows of one head."""

    item: Item
    first_position: Any
    slope: Any  # of the head, or None

    @classmethod
    def of(cls, cta: Cta, consumer: Any, work: Work) -> "Rows":
        head, offset = cta.rows_of(consumer, work)
        slope = cta.inputs.slopes[head] if cta.problem.variant.has_alibi else None
        return cls(work.item, work.item.first_position + offset, slope)


class Carry(NamedTuple):
    """Between steps: what the keys so far have given, without the values of the last tile."""

    state: softmax.State
    weights: Any  # (WARPGROUP_ROWS, keys.rows) in the pools' dtype


def attend(cta: Cta, consumer: Any, index: Any, work: Work, steps: Any) -> Carry:
    """What all keys of an item give, but for the last values; `steps` counts the tiles of all items
    before."""
    keys, values = cta.keys, cta.values
    matmul = partial(blocks.matmul, is_simulated=cta.is_simulated)
    rows, item = Rows.of(cta, consumer, work), work.item
    keys.await_full(steps)
    query = cta.query(consumer)
    dots = matmul(query, keys.slots.at[keys.slot(steps)], is_transposed=True)
    keys.release(steps)
    carry = _take_in(cta, rows, 0, None, dots, is_edge=True)
    values.await_full(steps)
    is_cut = item.valid_rows < cta.plan.keys.rows
    pl.when(is_cut)(partial(_clear_tail, cta, consumer, item, steps))

    def masked(i: Any, carry: Carry) -> Carry:
        # read again, as few tiles have a mask
        again = Rows.of(cta, consumer, cta.work(index))
        return _step(cta, consumer, again, steps, i, carry, is_edge=True)

    def maskless(i: Any, carry: Carry) -> Carry:
        return _step(cta, consumer, rows, steps, i, carry, is_edge=False)

    has_maskless = cta.plan.has_maskless_loop
    stop = item.edge_visits if has_maskless else item.num_visits
    carry = lax.fori_loop(1, stop, masked, carry)
    if has_maskless:
        carry = lax.fori_loop(item.edge_visits, item.full_visits, maskless, carry)
    if has_maskless and cta.problem.variant.left is not None:
        carry = lax.fori_loop(item.full_visits, item.num_visits, masked, carry)
    plgpu.barrier_arrive(cta.query_empty(consumer))
    return carry


def finish(cta: Cta, steps: Any, last: Any, carry: Carry) -> softmax.State:
    """The state after the values of the last tile of an item, whose steps are `steps` to `last`."""
    values, matmul = cta.values, partial(blocks.matmul, is_simulated=cta.is_simulated)
    _await_value(cta, steps, last - steps)
    value_ref = values.slots.at[values.slot(last)]
    acc = matmul(carry.weights, value_ref, carry.state.acc, is_transposed=False)
    values.release(last)
    return carry.state._replace(acc=acc)


def take_first_turn(cta: Cta, consumer: Any) -> None:
    """Before all items: the second consumer lets the first one begin."""
    pl.when(consumer == 1)(partial(_give_turn, cta, cta.held(consumer)))


def take_last_turn(cta: Cta, consumer: Any) -> None:
    """After all items: what was given is taken, for every completion has to be waited for."""
    pl.when(consumer == 0)(lambda: plgpu.barrier_wait(cta.turn(cta.held(consumer))))


def _give_turn(cta: Cta, consumer: Any) -> None:
    plgpu.barrier_arrive(cta.turn(CONSUMERS - 1 - consumer))


def _step(
    cta: Cta, consumer: Any, rows: Rows, steps: Any, i: Any, carry: Carry, *, is_edge: bool
) -> Carry:
    """Scores of visit `i`, and the values of the one before."""
    keys, values = cta.keys, cta.values
    state, query = carry.state, cta.query(consumer)
    key_step, value_step = steps + i, steps + i - 1
    key_ref, value_ref = (
        keys.slots.at[keys.slot(key_step)],
        values.slots.at[values.slot(value_step)],
    )
    await_value = partial(_await_value, cta, steps, i - 1)
    take_in = partial(_take_in, cta, rows, i, is_edge=is_edge)
    keys.await_full(key_step)
    plgpu.barrier_wait(cta.turn(consumer))
    if cta.is_simulated:
        dots = blocks.matmul(query, key_ref, is_transposed=True, is_simulated=True)
        await_value()
        acc = blocks.matmul(
            carry.weights, value_ref, state.acc, is_transposed=False, is_simulated=True
        )
        _give_turn(cta, consumer)
        keys.release(key_step)
        values.release(value_step)
        return take_in(state._replace(acc=acc), dots)

    def both(dots_ref: Any, acc_ref: Any) -> Carry:
        acc_ref[...] = state.acc
        plgpu.wgmma(dots_ref, query, key_ref.transpose((1, 0)))
        await_value()
        plgpu.wgmma(acc_ref, carry.weights, value_ref)
        _give_turn(cta, consumer)
        # each slot is free once its product is done, and both are before the softmax
        dots = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dots_ref, wait_n=1))
        keys.release(key_step)
        acc = lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc_ref, wait_n=0))
        values.release(value_step)
        return take_in(state._replace(acc=acc), dots)

    accumulator = lambda columns: plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32)
    head_dim = cta.problem.cache.head_dim
    return pl.run_scoped(both, accumulator(cta.plan.keys.rows), accumulator(head_dim))


def _await_value(cta: Cta, steps: Any, i: Any) -> None:
    """Those of the first visit have been waited for, as they may have to be cleared."""
    pl.when(i > 0)(lambda: cta.values.await_full(steps + i))


def _clear_tail(cta: Cta, consumer: Any, item: Item, steps: Any) -> None:
    """Zeroes the values past the sequence in the first tile that is visited."""
    values = cta.values
    tiles = Tiles(cta.problem, cta.plan.keys, cta.keys, values, cta.is_simulated)
    sharing = Sharing(consumer, CONSUMERS, None)
    clear_tail(tiles, sharing, values.slot(steps), item.valid_rows)
    cta.meet(consumer)


def _take_in(
    cta: Cta, rows: Rows, i: Any, state: softmax.State | None, dots: Any, *, is_edge: bool
) -> Carry:
    """The softmax of the tile of a visit: its weights, and what was seen before, scaled to them.

    state: None before the first tile.
    A score that is a multiple of the dot product is scaled in the exponent, where it is free.
    """
    variant, dtype = cta.problem.variant, cta.problem.cache.dtype
    is_plain = variant.logits_soft_cap is None and not variant.has_alibi and variant.scale > 0
    unit = jnp.float32(variant.scale * LOG2E if is_plain else 1.0)
    scores = dots if is_plain else _scores(cta, rows, i, dots)
    if is_edge:
        scores = _mask(cta, rows, i, scores)
    expand, reduce = blocks.ROWS.expand, blocks.ROWS.reduce
    top = reduce(jnp.max, scores) * unit
    m = jnp.maximum(top, softmax.FLOOR if state is None else state.m)
    weights = jnp.exp2(scores * unit - expand(m, scores.shape))
    l = reduce(jnp.sum, weights)
    if state is None:
        return Carry(
            empty_state(cta.problem.cache.head_dim)._replace(m=m, l=l), weights.astype(dtype)
        )
    decay = jnp.exp2(state.m - m)
    acc = state.acc * expand(decay, state.acc.shape)
    return Carry(softmax.State(m, state.l * decay + l, acc), weights.astype(dtype))


def _scores(cta: Cta, rows: Rows, i: Any, dots: Any) -> Any:
    """Of dot products, in units of log 2."""
    variant, shape = cta.problem.variant, dots.shape
    if not variant.has_alibi:
        return variant.score(dots, None, None, None, LOG2E)
    row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=blocks.PER_ROW)
    column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=blocks.PER_COLUMN)
    # held back here: what follows from it would leave the loop and stay in registers
    column = lax.optimization_barrier(column)
    query_position = blocks.ROWS.expand(row + rows.first_position, shape)
    key_position = lax.broadcast_in_dim(column + _first_key(cta, rows, i), shape, (1,))
    return variant.score(dots, query_position, key_position, rows.slope, LOG2E)


def _mask(cta: Cta, rows: Rows, i: Any, scores: Any) -> Any:
    """-inf where a row does not see a key: a finite mask would not outlast a unit.

    What a row sees is a range; two limits per row take fewer registers than a mask per position.
    """
    variant, first_key = cta.problem.variant, _first_key(cta, rows, i)
    row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=blocks.PER_ROW)
    position = row + rows.first_position
    start, stop = variant.kv_range(position, position, rows.item.seq_length)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
    expand = lambda limit: blocks.ROWS.expand(limit - first_key, scores.shape)
    keep = column < expand(stop)
    if variant.left is not None:
        keep &= column >= expand(start)
    return jnp.where(keep, scores, -jnp.inf)


def _first_key(cta: Cta, rows: Rows, i: Any) -> Any:
    """The position of the first key of the tile of a visit."""
    return sum(cta.plan.keys.origin(rows.item.visited(i)))
