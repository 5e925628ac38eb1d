"""Prefill on TPU: paged attention of many query tokens per sequence, bound by the matrix unit.

A program takes a tile of whole query tokens of one sequence, all heads, and visits the tiles of
keys that some of them sees: tiles that all of them see in whole, others part by part.  While a
visit computes, it makes the next visit's raw rows ready, and starts the copies of the one after,
share by share, also across programs.  Keys are a share ahead of values, as scores are of weights.

Queries come in and results go out transposed, tokens on lanes; XLA does it in the pass that cuts
packed tokens into tiles.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.arrays import AttentionArrays
from ..core.layout import result
from ..core.problem import Problem
from ..core.schedule import gather_tiles, tile_queries, untile
from . import device, prefill_kernel
from . import prefill_plan as plans
from .blocks import COMPILER_PARAMS, allocate, as_rows, table_windows
from .plan import BlockRows
from .prefill_plan import Chip, PrefillPlan
from .prefill_visits import Programs, programs_of


def plan_of(problem: Problem) -> PrefillPlan | None:
    """How this kernel would run the problem on the chip it is traced for; None if it would not."""
    chip = Chip(device.vmem_bytes(), device.matrix_unit() >= plans.WIDE_UNIT)
    return plans.plan_prefill(problem, chip)


def attend(
    problem: Problem, plan: PrefillPlan, arrays: AttentionArrays, *, interpret: Any = None
) -> tuple[Array, Array]:
    """(out, lse) of packed queries over pools with a leading layer axis."""
    query, key_pool, value_pool, block_table, schedule, alibi_slopes, layer = arrays
    tiles = tile_queries(
        schedule, problem.variant, num_tokens=problem.num_tokens, tile_tokens=plan.tile_tokens
    )
    programs = programs_of(plan, problem.variant, tiles, layer)
    q = gather_tiles(query.astype(problem.cache.dtype), tiles, plan.tile_tokens, True)
    inputs = [_to_items(plan, q)]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(plan.num_kv_heads, 1, plan.group)
        inputs.append(_to_lanes(plan, jnp.tile(slopes, (1, plan.item_tokens, 1))))
    rows = BlockRows.of(problem.cache)
    pools = [as_rows(pool, rows) for pool in (key_pool, value_pool)]
    table = table_windows(block_table, problem.cache.num_blocks)
    call = _make_call(problem, plan, query, interpret)
    out, lse = call(*programs, *inputs, table, *pools)
    out, lse = _from_items(plan, out), _from_items(plan, lse[:, :, None])[..., 0]
    return untile(schedule, out.astype(query.dtype), lse, num_tokens=problem.num_tokens)


def _to_items(plan: PrefillPlan, q: Array) -> Array:
    """(tiles, tile tokens, heads, head_dim) to (operand tiles, items, head_dim, rows)."""
    blocks, heads = plan.operand_blocks, plan.num_kv_heads
    q = q.reshape(-1, blocks, plan.item_tokens, heads, plan.group, q.shape[-1])
    q = q.transpose(0, 3, 1, 5, 2, 4)
    return _to_lanes(plan, q).reshape(-1, plan.operand_items, plan.head_dim, plan.item_rows)


def _to_lanes(plan: PrefillPlan, x: Array) -> Array:
    """(..., item tokens, group) to (..., rows)."""
    x = x.reshape(*x.shape[:-2], -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.item_rows - x.shape[-1])])


def _from_items(plan: PrefillPlan, x: Array) -> Array:
    """(operand tiles, items, n, rows) to (tiles, tile tokens, heads, n)."""
    n = x.shape[2]
    x = x[..., : plan.item_tokens * plan.group]
    blocks, heads = plan.operand_blocks, plan.num_kv_heads
    x = x.reshape(-1, heads, blocks, n, plan.item_tokens, plan.group)
    x = x.transpose(0, 2, 4, 1, 5, 3)
    x = x.reshape(-1, blocks * plan.item_tokens, heads * plan.group, n)
    x = lax.optimization_barrier(x)  # or XLA transposes whole tiles, which takes long to compile
    return x.reshape(-1, plan.tile_tokens, heads * plan.group, n)


def _make_call(problem: Problem, plan: PrefillPlan, query: Array, interpret: Any) -> Any:
    n, items, rows, head_dim = (
        plan.num_query_tiles * plan.operand_tiles,
        plan.operand_items,
        plan.item_rows,
        plan.head_dim,
    )
    tile = lambda *shape: pl.BlockSpec(
        (plan.operand_tiles, *shape), lambda i, *_: (i, *[0] * len(shape))
    )
    shared = lambda *shape: pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    slopes = [shared(plan.num_kv_heads, rows)] if problem.variant.has_alibi else []
    flops, num_bytes, transcendentals = problem.cost
    return pl.pallas_call(
        partial(prefill_kernel.run, problem, plan, bool(interpret)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Programs._fields),
            grid=(plan.num_query_tiles,),
            in_specs=[tile(items, head_dim, rows), *slopes, hbm, hbm, hbm],
            out_specs=[tile(items, head_dim, rows), tile(items, rows)],
            scratch_shapes=allocate(plans.prefill_scratch(plan)),
        ),
        out_shape=[
            result((n, items, head_dim, rows), jnp.dtype(plans.out_dtype(problem)), query),
            result((n, items, rows), jnp.float32, query),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=plan.vmem_limit,
            **COMPILER_PARAMS,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=False if interpret is None else interpret,
        name="paged_prefill",
    )
