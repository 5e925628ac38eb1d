"""Paged attention: one token per sequence is decode's, a long packed batch is prefill's.

Every other packed batch is the ragged kernel's, which gets tiles of query rows and gives (out, lse)
per token.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core.arrays import AttentionArrays, NewTokens
from ..core.problem import Problem
from ..core.schedule import gather_tiles, tile_queries, untile
from . import append, blocks, decode, decode_append, mixed, prefill, ragged
from . import decode_plan as decode_plans
from . import prefill_plan as prefill_plans
from .plan import WARPGROUP_ROWS, Plan, make_plan, scratch, unsupported, work_list

__all__ = ["append_and_attend", "attend", "can_append", "unsupported"]


def attend(
    problem: Problem,
    arrays: AttentionArrays,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a problem that `unsupported` lets pass.

    interpret: None or False to compile; True or `plgpu.InterpretGPUParams` to run on a CPU.
    """
    interpret = blocks.interpreter(interpret)
    is_simulated = interpret is not None

    def run(problem: Problem, arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
        if (plan := decode_plans.plan_of(problem, is_simulated=is_simulated)) is not None:
            out, lse = decode.attend(problem, plan, arrays, interpret=interpret)
            return out, lse
        plan = prefill_plans.plan_of(problem, is_simulated=is_simulated)
        if plan is not None:
            return prefill.attend(problem, plan, arrays, interpret=interpret)
        return _attend_ragged(problem, arrays, interpret=interpret)

    singles = singles_of(problem)
    if singles is None:
        return run(problem, arrays)
    return mixed.attend(problem, singles, run, arrays)


def singles_of(problem: Problem) -> Problem | None:
    """The problem of a mixed batch's sequences with one token, if they have a kernel of their own
    and the others have prefill's."""
    singles = mixed.single_tokens(problem)
    if singles is None or decode_plans.plan_of(singles) is None:
        return None
    return None if prefill_plans.plan_of(problem) is None else singles


def _attend_ragged(
    problem: Problem, arrays: AttentionArrays, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """The kernel that takes every problem."""
    cache, plan = problem.cache, make_plan(problem, is_simulated=interpret is not None)
    tiles = tile_queries(
        arrays.schedule,
        problem.variant,
        num_tokens=problem.num_tokens,
        tile_tokens=plan.tile_tokens,
    )
    tiled = gather_tiles(arrays.query, tiles, plan.tile_tokens, problem.is_packed)
    rows = (cache.num_layers * cache.num_blocks, cache.rows_per_block, cache.head_dim)
    inputs = ragged.Inputs(
        query=_as_items(plan, tiled.astype(cache.dtype)),
        keys=arrays.key_pool.reshape(rows),
        values=arrays.value_pool.reshape(rows),
        table=arrays.block_table,
        work=jnp.stack(work_list(tiles, problem.variant, plan.keys), axis=1),
        slopes=_slope_of_rows(problem, plan, arrays.alibi_slopes),
        numbers=jnp.stack([arrays.layer * cache.num_blocks, jnp.int32(plan.keys.blocks_per_tile)]),
    )
    out, lse = _call(problem, plan, interpret)(*inputs)
    shape = (plan.num_tiles, plan.tile_tokens, problem.num_query_heads)
    out = _from_items(plan, out, (*shape, cache.head_dim))
    return untile(
        arrays.schedule, out, _from_items(plan, lse, shape), num_tokens=problem.num_tokens
    )


def can_append(problem: Problem) -> bool:
    """Whether `append_and_attend` takes a problem that `unsupported` lets pass."""
    fits = decode_plans.plan_of(problem, appends=True) is not None
    return fits and append.unsupported(decode_append.problem_of(problem)) is None


def append_and_attend(
    problem: Problem,
    arrays: AttentionArrays,
    new: NewTokens,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """(out, lse, key_pool, value_pool) of a problem that `can_append` lets pass."""
    interpret = blocks.interpreter(interpret)
    plan = decode_plans.plan_of(problem, is_simulated=interpret is not None, appends=True)
    assert plan is not None, "can_append() comes first"
    return decode.attend(problem, plan, arrays, new, interpret=interpret)


def _as_items(plan: Plan, tiled: jax.Array) -> jax.Array:
    """(num_tiles, tile_tokens, heads, head_dim) to the rows of each consumer of each item."""
    flat = tiled.reshape(plan.num_tiles, -1, tiled.shape[-1])
    rows = plan.parts * plan.consumers * plan.query_rows
    flat = jnp.pad(flat, ((0, 0), (0, rows - flat.shape[1]), (0, 0)))
    return flat.reshape(plan.num_items, plan.consumers, plan.query_rows, -1)


def _from_items(plan: Plan, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The rows of each consumer of each item back to tiles."""
    num_tiles, tile_tokens, heads = shape[:3]
    x = x.reshape(num_tiles, -1, *shape[3:])
    return x[:, : tile_tokens * heads].reshape(shape)


def _slope_of_rows(problem: Problem, plan: Plan, slopes: jax.Array | None) -> jax.Array:
    """The slope of each row of a query tile; all tiles are alike."""
    shape = (plan.parts * plan.consumers, WARPGROUP_ROWS)
    if slopes is None:
        return jnp.zeros((1, 1), jnp.float32)  # never read; more of them would be a launch
    head = jnp.arange(shape[0] * WARPGROUP_ROWS) % problem.num_query_heads
    return slopes.astype(jnp.float32)[head].reshape(shape)


def _call(problem: Problem, plan: Plan, interpret: Any) -> Any:
    rows = (plan.num_items, plan.consumers)
    head_dim = problem.cache.head_dim
    return blocks.kernel(
        partial(ragged.body, problem=problem, plan=plan, is_simulated=interpret is not None),
        name="paged_attention",
        cost=problem.cost,
        out_type=(
            jax.ShapeDtypeStruct((*rows, plan.query_rows, head_dim), problem.query_dtype),
            jax.ShapeDtypeStruct((*rows, WARPGROUP_ROWS), jnp.float32),
        ),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.consumers + 1,
        scratch_types=blocks.allocate(scratch(problem, plan)),
        interpret=interpret,
    )
