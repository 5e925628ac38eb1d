"""The kernel of a ragged batch: decode, chunked prefill and mixed.

A block is read as (token, head) rows, whole and contiguous.  One product of all query heads of a
few tokens (64 rows a warpgroup) with a tile of rows gives every score; those of foreign heads are
masked with the rest, so their weights are exactly zero and the second product gives every head its
own output.  The softmax is online, as in FlashAttention (Dao et al., 2022); the roles are those of
FlashAttention-3 (Shah et al., 2024): one warpgroup copies, the others compute.

    CTA c takes items c, c + num_ctas, ... of the work list

    producer    table -> block ids -> TMA: query rows, K tile, V tile ... into rings of slots
    consumers   each its own 64 query rows of the item, all of them the same tiles:
                wait K | S = Q K' | free K | softmax | wait V | O += P V | free V
                after the item: O, lse -> shared memory -> TMA
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
from .plan import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    WARPGROUP_ROWS,
    Item,
    KeyTiles,
    Plan,
    swizzle_bytes,
)


class Inputs(NamedTuple):
    """Refs in device memory."""

    query: Any  # (num_items, consumers, query_rows, head_dim)
    keys: Any  # (num_layers * num_blocks, rows_per_block, head_dim)
    values: Any
    table: Any  # int32 (batch, max_blocks_per_seq)
    work: Any  # int32 (num_tiles, fields of an Item)
    slopes: Any  # float32 (parts * consumers, WARPGROUP_ROWS)
    numbers: Any  # int32 (2,), the first block of the layer and keys.blocks_per_tile


class Cta(NamedTuple):
    """What one CTA works with: the problem, device memory and shared memory."""

    problem: Problem
    plan: Plan
    inputs: Inputs
    query: Ring  # slots (consumers, WARPGROUP_ROWS, head_dim)
    keys: Ring
    values: Ring
    out: Any  # (consumers, WARPGROUP_ROWS, head_dim)
    lse: Any  # (consumers, WARPGROUP_ROWS)
    padding_full: Any
    tail_clear: Any

    def loop(self, visit: Any) -> Any:
        """Calls `visit(index, number of the item, item, steps)` for each item of this CTA.

        `steps` counts the key tiles of all items before.  Returns the number of items and of steps.
        """
        cta, plan = lax.axis_index("cta"), self.plan
        count = divide(plan.num_items - 1 - cta, plan.num_ctas) + 1

        def body(index, steps):
            number = cta + index * plan.num_ctas
            tile = divide(number, plan.parts)
            item = Item(*(self.inputs.work[tile, i] for i in range(len(Item._fields))))
            visit(index, number, item, steps)
            return steps + item.num_visits

        return count, lax.fori_loop(0, count, body, jnp.int32(0))


def body(*refs: Any, problem: Problem, plan: Plan, is_simulated: bool, **smem: Any) -> None:
    *inputs, out_ref, lse_ref = refs
    ring = lambda x: Ring(smem[f"{x}_smem"], smem[f"{x}_full"], smem[f"{x}_empty"])
    cta = Cta(
        problem,
        plan,
        Inputs(*inputs),
        *(ring(x) for x in ("query", "key", "value")),
        *(smem[x] for x in ("out_smem", "lse_smem", "padding_full", "tail_clear")),
    )
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(cta)

    @pl.when(warpgroup < plan.consumers)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS[plan.consumers], action="increase")
        _consume(cta, warpgroup, out_ref, lse_ref, is_simulated)


def _produce(cta: Cta) -> None:
    """Brings the query rows and the key tiles of every item, in the order of the visits."""
    plan, inputs = cta.plan, cta.inputs
    first_block, count = inputs.numbers[0], inputs.numbers[1]
    if plan.keys.padding_rows:
        _zero_padding(cta)

    def visit(index, number, item, steps):
        cta.query.await_empty(index)
        slot = cta.query.slot(index)
        for w in range(plan.consumers):
            rows = cta.query.slots.at[slot, w, pl.ds(0, plan.query_rows)]
            plgpu.copy_gmem_to_smem(inputs.query.at[number, w], rows, cta.query.full.at[slot])

        @pl.loop(0, item.num_visits)
        def _(i):
            copy = partial(
                blocks.copy_tile,
                keys=plan.keys,
                table_ref=inputs.table,
                item=item,
                tile=item.visited(i),
                first_block=first_block,
                count=count,
            )
            for ring, pool in ((cta.keys, inputs.keys), (cta.values, inputs.values)):
                ring.await_empty(steps + i)
                copy(pool, ring, steps + i)

    num_items, steps = cta.loop(visit)
    cta.keys.drain(steps)
    cta.values.drain(steps)
    cta.query.drain(num_items)


def _zero_padding(cta: Cta) -> None:
    """Rows of a value tile that no block fills: their weights are 0, and 0 * NaN is NaN."""
    rows, start = cta.plan.keys.padding_rows, cta.plan.keys.rows - cta.plan.keys.padding_rows
    none = cta.inputs.values.shape[0]
    for stage in range(cta.plan.stages):
        plgpu.copy_gmem_to_smem(
            cta.inputs.values.at[jnp.int32(none), pl.ds(0, rows)],
            cta.values.slots.at[stage, pl.ds(start, rows)],
            cta.padding_full,
        )
    plgpu.barrier_wait(cta.padding_full)


def _consume(cta: Cta, warpgroup: Any, out_ref: Any, lse_ref: Any, is_simulated: bool) -> None:
    """Attends from this warpgroup's rows of every item."""
    plan, head_dim = cta.plan, cta.problem.cache.head_dim

    def visit(index, number, item, steps):
        rows = _Rows.of(cta, warpgroup, number, item)
        cta.query.await_full(index)
        query = cta.query.slots.at[cta.query.slot(index), warpgroup]

        def step(i, state, *, is_edge):
            return _attend_tile(
                cta, rows, query, item.visited(i), steps + i, state, is_edge, is_simulated
            )

        state = softmax.State(
            plgpu.layout_cast(
                jnp.full((WARPGROUP_ROWS,), softmax.FLOOR, jnp.float32), blocks.PER_ROW
            ),
            plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), 0.0, jnp.float32), blocks.PER_ROW),
            plgpu.layout_cast(jnp.full((WARPGROUP_ROWS, head_dim), 0.0, jnp.float32), WGMMA),
        )
        num_masked = item.num_edges if plan.has_maskless_loop else item.num_visits
        state = lax.fori_loop(0, num_masked, partial(step, is_edge=True), state)
        if plan.has_maskless_loop:
            state = lax.fori_loop(num_masked, item.num_visits, partial(step, is_edge=False), state)
        cta.query.release(index)
        _store(cta, warpgroup, state, out_ref.at[number, warpgroup], lse_ref.at[number, warpgroup])

    cta.loop(visit)
    plgpu.wait_smem_to_gmem(0)


def _store(cta: Cta, warpgroup: Any, state: softmax.State, out_ref: Any, lse_ref: Any) -> None:
    """Through shared memory, whose last contents must have left it."""
    out, lse = softmax.finish(blocks.ROWS, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    cta.out[warpgroup] = out.astype(cta.out.dtype)
    cta.lse[warpgroup] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(cta.out.at[warpgroup, pl.ds(0, cta.plan.query_rows)], out_ref)
    plgpu.copy_smem_to_gmem(cta.lse.at[warpgroup], lse_ref)


class _Rows(NamedTuple):
    """The query rows of a warpgroup: (WARPGROUP_ROWS,) each, spread over a tile only where used.

    Wider values, kept over a loop, would cost registers that the accumulator needs.
    """

    warpgroup: Any
    query_position: Any
    kv_head: Any
    slope: Any  # or None
    seq_length: Any

    @classmethod
    def of(cls, cta: Cta, warpgroup: Any, number: Any, item: Item) -> "_Rows":
        problem = cta.problem
        part = remainder(number, cta.plan.parts) * cta.plan.consumers + warpgroup
        row = (
            plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=blocks.PER_ROW)
            + part * WARPGROUP_ROWS
        )
        slope = None
        if problem.variant.has_alibi:
            source = cta.inputs.slopes.at[part]
            slope = plgpu.load(source, layout=blocks.PER_ROW, optimized=False)
        return cls(
            warpgroup,
            item.first_position + divide(row, problem.num_query_heads),
            divide(remainder(row, problem.num_query_heads), problem.group),
            slope,
            item.seq_length,
        )

    def score(self, problem: Problem, keys: KeyTiles, dots: Any, tile: Any, is_edge: bool) -> Any:
        """Masked scores, in units of log 2, of the dot products with a tile of keys."""
        variant, shape = problem.variant, dots.shape
        per_row = lambda x: lax.broadcast_in_dim(x, shape, (0,))
        per_column = lambda x: lax.broadcast_in_dim(x, shape, (1,))
        token, first_row = keys.origin(tile)
        column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=blocks.PER_COLUMN)
        # held back here: what follows from it would leave the loop and stay in registers
        row = lax.optimization_barrier(column) + first_row
        query_position = per_row(self.query_position)
        key_position = per_column(token + divide(row, keys.num_heads))
        slope = None if self.slope is None else per_row(self.slope)
        scores = variant.score(dots, query_position, key_position, slope, LOG2E)
        is_seen = []
        if keys.num_heads > 1:
            is_seen.append(per_row(self.kv_head) == per_column(remainder(row, keys.num_heads)))
        if not keys.is_exact:
            is_seen.append(per_column(row) < keys.blocks_per_tile * keys.block_rows)
        if is_edge:
            is_seen.append(variant.keep(query_position, key_position, self.seq_length))
        if not is_seen:
            return scores
        return jnp.where(reduce(operator.and_, is_seen), scores, softmax.MASK)


def _clear_tail(cta: Cta, warpgroup: Any, slot: Any, valid_rows: Any) -> None:
    """Zeroes value rows past the sequence: no one wrote them, and 0 * NaN is NaN.

    Each consumer takes its share of the columns, then all meet.
    """
    plan, head_dim = cta.plan, cta.problem.cache.head_dim
    width = swizzle_bytes(head_dim, cta.problem.cache.dtype) // cta.values.slots.dtype.itemsize
    row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, width), 0, layout=WGMMA)
    for column in range(0, head_dim, width):

        @pl.when(warpgroup == column // width % plan.consumers)
        def _(column=column):
            for strip in range(0, plan.keys.rows, WARPGROUP_ROWS):
                part = cta.values.slots.at[slot, pl.ds(strip, WARPGROUP_ROWS), pl.ds(column, width)]
                values = plgpu.load(part, layout=WGMMA)
                part[...] = jnp.where(row + strip < valid_rows, values, jnp.zeros_like(values))

    plgpu.commit_smem()
    if plan.consumers > 1:
        plgpu.barrier_arrive(cta.tail_clear)
        plgpu.barrier_wait(cta.tail_clear)


def _attend_tile(
    cta: Cta,
    rows: _Rows,
    query: Any,  # ref (WARPGROUP_ROWS, head_dim)
    tile: Any,
    step: Any,
    state: softmax.State,
    is_edge: bool,  # some query may not see some key of the tile
    is_simulated: bool,
) -> softmax.State:
    """The state after one more tile of keys and values, that of `step`."""
    keys = cta.plan.keys
    matmul = partial(blocks.matmul, is_simulated=is_simulated)
    slot = cta.keys.slot(step)
    is_tail: Any = None
    if is_edge:
        token, first_row = keys.origin(tile)
        valid_rows = (rows.seq_length - token) * keys.num_heads - first_row
        is_tail = valid_rows < keys.rows

        @pl.when(is_tail)
        def _():  # first, while no scores take registers
            cta.values.await_full(step)
            _clear_tail(cta, rows.warpgroup, slot, valid_rows)

    cta.keys.await_full(step)
    dots = matmul(query, cta.keys.slots.at[slot], is_transposed=True)
    cta.keys.release(step)
    scores = rows.score(cta.problem, keys, dots, tile, is_edge)
    m, l, decay, weights = softmax.weights_of(blocks.ROWS, state, scores)
    acc = state.acc * blocks.ROWS.expand(decay, state.acc.shape)
    if is_edge:
        pl.when(jnp.logical_not(is_tail))(partial(cta.values.await_full, step))
    else:
        cta.values.await_full(step)
    weights = weights.astype(cta.problem.cache.dtype)
    acc = matmul(weights, cta.values.slots.at[slot], acc, is_transposed=False)
    cta.values.release(step)
    return softmax.State(m, l, acc)
