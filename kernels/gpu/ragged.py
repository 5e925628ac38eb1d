"""The kernel of a ragged batch: chunked prefill and mixed.

A warpgroup has 64 query rows, all heads of a few tokens, and meets tiles of keys and values as
tile.py says.  The softmax is online, as in FlashAttention (Dao et al., 2022); the roles are those
of FlashAttention-3 (Shah et al., 2024): one warpgroup copies, the others compute.

    CTA c takes items c, c + num_ctas, ... of the work list

    producer    table -> block ids -> TMA: query rows, K tile, V tile ... into rings of slots
    consumers   each its own 64 query rows of the item, all of them the same tiles:
                wait K | S = Q K' | free K | softmax | wait V | O += P V | free V
                after the item: O, lse -> shared memory -> TMA
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.problem import Problem
from . import blocks, tile
from .blocks import Ring, divide, pl, plgpu, remainder
from .plan import CONSUMER_REGISTERS, PRODUCER_REGISTERS, WARPGROUP_ROWS, Item, Plan
from .tile import Rows, Sharing, Tiles


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
            query_tile = divide(number, plan.parts)
            item = Item(*(self.inputs.work[query_tile, i] for i in range(len(Item._fields))))
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
        tile.zero_padding(plan.keys, cta.values, inputs.values, cta.padding_full)

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


def _consume(cta: Cta, warpgroup: Any, out_ref: Any, lse_ref: Any, is_simulated: bool) -> None:
    """Attends from this warpgroup's rows of every item."""
    plan = cta.plan
    tiles = Tiles(cta.problem, plan.keys, cta.keys, cta.values, is_simulated)
    sharing = Sharing(warpgroup, plan.consumers, cta.tail_clear)

    def visit(index, number, item, steps):
        rows = _rows_of(cta, warpgroup, number, item)
        cta.query.await_full(index)
        query = cta.query.slots.at[cta.query.slot(index), warpgroup]

        def step(i, state, *, is_edge):
            return tile.attend(
                tiles, rows, sharing, query, item.visited(i), steps + i, state, is_edge=is_edge
            )

        state = tile.empty_state(cta.problem.cache.head_dim)
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


def _rows_of(cta: Cta, warpgroup: Any, number: Any, item: Item) -> Rows:
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
    return Rows(
        item.first_position + divide(row, problem.num_query_heads),
        divide(remainder(row, problem.num_query_heads), problem.group),
        slope,
        item.seq_length,
    )
