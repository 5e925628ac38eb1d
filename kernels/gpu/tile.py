"""One tile of keys and values: masked scores, a softmax step, the product with the values.

A block is read as (token, head) rows, whole and contiguous.  One product of the query rows with a
tile of rows gives every score; those of foreign heads are masked with the rest, so their weights
are exactly zero and the second product gives every head its own output.
"""

import operator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.problem import Problem
from ..core.variant import LOG2E
from . import blocks
from .blocks import WGMMA, Ring, divide, pl, plgpu, remainder
from .plan import WARPGROUP_ROWS, KeyTiles, swizzle_bytes


class Sharing(NamedTuple):
    """The warpgroups that work on the same tile, each with rows of its own."""

    rank: Any  # of this one
    warpgroups: int
    barrier: Any  # that they meet at, if there are several


class Tiles(NamedTuple):
    """Where tiles come from."""

    problem: Problem
    keys: KeyTiles
    key_ring: Ring
    value_ring: Ring
    is_simulated: bool


class Rows(NamedTuple):
    """The query rows of a warpgroup: (WARPGROUP_ROWS,) each, spread over a tile only where used.

    Wider values, kept over a loop, would cost registers that the accumulator needs.
    """

    query_position: Any
    kv_head: Any
    slope: Any  # or None
    seq_length: Any

    def score(self, problem: Problem, keys: KeyTiles, dots: Any, tile: Any, is_edge: bool) -> Any:
        """Masked scores of the dot products with a tile of keys, still without their `unit`."""
        variant, shape = problem.variant, dots.shape
        has_positions = is_edge or not variant.is_linear
        if not has_positions and keys.num_heads == 1 and keys.is_exact:
            return dots
        per_row = lambda x: lax.broadcast_in_dim(x, shape, (0,))
        per_column = lambda x: lax.broadcast_in_dim(x, shape, (1,))
        token, first_row = keys.origin(tile)
        column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=blocks.PER_COLUMN)
        if has_positions or not keys.heads_repeat:
            # held back here: what follows from it would leave the loop and stay in registers
            column = lax.optimization_barrier(column)
        row = column + first_row
        scores, mask, is_seen = dots, -jnp.inf, []
        if has_positions:  # not computed for nothing, for what no one reads may have any layout
            query_position = per_row(self.query_position)
            key_position = per_column(token + divide(row, keys.num_heads))
            if not variant.is_linear:
                slope = None if self.slope is None else per_row(self.slope)
                scores = variant.score(dots, query_position, key_position, slope, LOG2E)
                mask = softmax.MASK
            if is_edge:
                is_seen.append(variant.keep(query_position, key_position, self.seq_length))
        if keys.num_heads > 1:
            is_seen.append(per_row(self.kv_head) == per_column(remainder(row, keys.num_heads)))
        if not keys.is_exact:
            is_seen.append(per_column(row) < keys.blocks_per_tile * keys.block_rows)
        return jnp.where(reduce(operator.and_, is_seen), scores, mask) if is_seen else scores


def empty_state(head_dim: int) -> softmax.State:
    """Of rows that have seen no key."""
    row = lambda value: plgpu.layout_cast(
        jnp.full((WARPGROUP_ROWS,), value, jnp.float32), blocks.PER_ROW
    )
    acc = jnp.full((WARPGROUP_ROWS, head_dim), 0.0, jnp.float32)
    return softmax.State(row(softmax.FLOOR), row(0.0), plgpu.layout_cast(acc, WGMMA))


def attend(
    tiles: Tiles,
    rows: Rows,
    sharing: Sharing,
    query: Any,  # ref (WARPGROUP_ROWS, head_dim)
    tile: Any,
    step: Any,
    state: softmax.State,
    *,
    is_edge: bool,  # some query may not see some key of the tile
) -> softmax.State:
    """The state after one more tile of keys and values, that of `step`."""
    keys, key_ring, value_ring = tiles.keys, tiles.key_ring, tiles.value_ring
    matmul = partial(blocks.matmul, is_simulated=tiles.is_simulated)
    slot = key_ring.slot(step)
    is_tail: Any = None
    if is_edge:
        token, first_row = keys.origin(tile)
        valid_rows = (rows.seq_length - token) * keys.num_heads - first_row
        is_tail = valid_rows < keys.rows

        @pl.when(is_tail)
        def _():  # first, while no scores take registers
            value_ring.await_full(step)
            clear_tail(tiles, sharing, slot, valid_rows)
            if sharing.warpgroups > 1:
                plgpu.barrier_arrive(sharing.barrier)
                plgpu.barrier_wait(sharing.barrier)

    key_ring.await_full(step)
    dots = matmul(query, key_ring.slots.at[slot], is_transposed=True)
    key_ring.release(step)
    scores = rows.score(tiles.problem, keys, dots, tile, is_edge)
    unit = tiles.problem.variant.scale * LOG2E if tiles.problem.variant.is_linear else None
    m, l, decay, weights = softmax.weights_of(blocks.ROWS, state, scores, unit)
    acc = state.acc * blocks.ROWS.expand(decay, state.acc.shape)
    if is_edge:
        pl.when(jnp.logical_not(is_tail))(partial(value_ring.await_full, step))
    else:
        value_ring.await_full(step)
    weights = weights.astype(tiles.problem.cache.dtype)
    acc = matmul(weights, value_ring.slots.at[slot], acc, is_transposed=False)
    value_ring.release(step)
    return softmax.State(m, l, acc)


def clear_tail(tiles: Tiles, sharing: Sharing, slot: Any, valid_rows: Any) -> None:
    """Zeroes value rows past the sequence: no one wrote them, and 0 * NaN is NaN.

    Each of the warpgroups that share the tile takes its share of the columns; then they must meet.
    """
    head_dim, dtype = tiles.problem.cache.head_dim, tiles.problem.cache.dtype
    slots = tiles.value_ring.slots
    width = swizzle_bytes(head_dim, dtype) // slots.dtype.itemsize
    row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, width), 0, layout=WGMMA)

    def clear(column: int) -> None:
        for strip in range(0, tiles.keys.rows, WARPGROUP_ROWS):
            part = slots.at[slot, pl.ds(strip, WARPGROUP_ROWS), pl.ds(column, width)]
            values = plgpu.load(part, layout=WGMMA)
            part[...] = jnp.where(row + strip < valid_rows, values, jnp.zeros_like(values))

    for column in range(0, head_dim, width):
        if sharing.warpgroups == 1:
            clear(column)
        else:
            is_mine = sharing.rank == column // width % sharing.warpgroups
            pl.when(is_mine)(partial(clear, column))
    plgpu.commit_smem()


def zero_padding(keys: KeyTiles, value_ring: Ring, pool_ref: Any, padding_full: Any) -> None:
    """Rows of a value tile that no block fills: their weights are 0, and 0 * NaN is NaN.

    They are brought from outside of the pool.
    """
    rows, start = keys.padding_rows, keys.rows - keys.padding_rows
    nowhere = jnp.int32(pool_ref.shape[0])
    for stage in range(value_ring.stages):
        plgpu.copy_gmem_to_smem(
            pool_ref.at[nowhere, pl.ds(0, rows)],
            value_ring.slots.at[stage, pl.ds(start, rows)],
            padding_full,
        )
    plgpu.barrier_wait(padding_full)
