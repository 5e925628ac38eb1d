"""Writing new tokens into the pools on TPU, in place.

New tokens go in units: aligned groups of tokens of one block.  A program takes one unit of keys and
of values through VMEM, puts the new rows in, bit by bit, and hands it back to the memory it came
from; no two programs share a unit, and nothing else is touched.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import layout
from ..core.layout import result
from ..core.problem import AppendProblem
from . import packed
from . import plan as plans
from .blocks import COMPILER_PARAMS, as_rows, from_rows, row_bits, words
from .plan import AppendPlan


def unsupported(problem: AppendProblem) -> str | None:
    """Why the kernel cannot run the problem, with the way out; None if it can."""
    if reason := packed.unsupported(problem.cache):
        return f'{reason}, or implementation="xla"'
    problem = packed.by_rows(problem)
    cache, way_out = problem.cache, 'implementation="xla", which writes in place too'
    if cache.dtype not in ("bfloat16", "float32"):
        return (
            f"a TPU kernel takes no {cache.dtype} pool; use bfloat16 or float32 pools, or {way_out}"
        )
    if cache.head_dim not in plans.HEAD_DIMS:
        return f"head_dim={cache.head_dim} is none of {plans.HEAD_DIMS}; use {way_out}"
    if not any(plans.BlockRows.of(cache).units(cache.dtype)):
        return f"{plans.no_whole_register(cache)}, or {way_out}"
    plan = plans.plan_append(problem)
    if plan is None:
        return (
            f"tokens of {cache.num_kv_heads} heads by {cache.head_dim} do not fit "
            f"{plans.VMEM_BYTES >> 20} MiB of VMEM; use {way_out}"
        )
    if plan.num_units * 16 > plans.SMEM_BYTES:
        return (
            f"{problem.num_tokens} tokens make {plan.num_units} units, more than "
            f"{plans.SMEM_BYTES // 16}; append fewer at a time, or use {way_out}"
        )
    return None


def append(
    problem: AppendProblem,
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
    *,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Both pools with the new tokens written; `keys` and `values` are in the pools' dtype."""
    if packed.heads_per_row(problem.cache) > 1:
        arrays = (keys, values, key_pool, value_pool, block_table, seq_lengths, query_start_loc)
        return packed.append(append, problem, *arrays, layer, interpret=interpret)
    plan = plans.plan_append(problem)
    assert plan is not None, "unsupported() comes first"
    units = _units(problem, plan, block_table, seq_lengths, query_start_loc)
    new = [_gather(x, units.first_token, plan) for x in (keys, values)]
    pools = [_as_runs(pool, plan) for pool in (key_pool, value_pool)]
    scalars = (units.block, units.unit, units.start, units.stop, layer.reshape(1))
    pools = _make_call(problem, plan, pools[0], interpret)(*scalars, *new, *pools)
    pools = [pool.reshape(*pool.shape[:2], plan.rows.count, pool.shape[-1]) for pool in pools]
    return from_rows(pools[0], plan.rows), from_rows(pools[1], plan.rows)


def _as_runs(pool: Array, plan: AppendPlan) -> Array:
    """(layers, blocks, runs, rows of a run, head_dim)."""
    rows = as_rows(pool, plan.rows)
    return rows.reshape(*rows.shape[:2], plan.num_runs, -1, rows.shape[-1])


class _Units(NamedTuple):
    """The work list, int32 (num_units,) each; units with nothing to do come last."""

    block: Array  # physical
    unit: Array  # within the block
    start: Array  # tokens [start, stop) of the unit are new
    stop: Array
    first_token: Array  # packed index of the unit's token 0, new or not; may be negative


def _units(
    problem: AppendProblem, plan: AppendPlan, table: Array, lengths: Array, starts: Array
) -> _Units:
    batch, size = problem.cache.batch, plan.unit.block_size
    first = jnp.maximum(lengths - (starts[1:] - starts[:-1]), 0)
    first_unit = first // size
    counts = jnp.maximum((lengths + (size - 1)) // size - first_unit, 0)
    counts = jnp.where(lengths > first, counts, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(plan.num_units, dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    is_used = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    position = (first_unit[sequence] + item - (ends - counts)[sequence]) * size
    slots = layout.locate_slots(
        table,
        sequence,
        position,
        block_size=problem.cache.block_size,
        num_blocks=problem.cache.num_blocks,
    )
    is_used &= slots.is_valid
    start = jnp.clip(first[sequence] - position, 0, size)
    stop = jnp.where(is_used, jnp.clip(lengths[sequence] - position, 0, size), 0)
    first_token = starts[sequence + 1] - lengths[sequence] + position
    units = _Units(slots.block, slots.offset // size, start, stop, first_token)
    # a program without work stays on the unit before it, so that none is fetched or written twice
    order = jnp.argsort(~is_used, stable=True)
    order = order[jnp.minimum(item, jnp.maximum(jnp.sum(is_used, dtype=jnp.int32) - 1, 0))]
    units = _Units(*(x[order] for x in units))
    is_repeated = item >= jnp.sum(is_used, dtype=jnp.int32)
    block = jnp.minimum(units.block, problem.cache.num_blocks - 1)
    return units._replace(block=block, stop=jnp.where(is_repeated, 0, units.stop))


def _gather(tokens: Array, first_token: Array, plan: AppendPlan) -> Array:
    """New tokens as units: (num_units, runs, rows of a run, head_dim)."""
    token = first_token[:, None] + jnp.arange(plan.unit.block_size, dtype=jnp.int32)[None, :]
    unit = tokens[jnp.clip(token, 0, tokens.shape[0] - 1)]
    if plan.rows.is_head_major:
        unit = unit.swapaxes(1, 2)
    return unit.reshape(plan.num_units, *plan.unit_shape, tokens.shape[-1])


def _make_call(problem: AppendProblem, plan: AppendPlan, pool: Array, interpret: Any) -> Any:
    tile = (*plan.unit_shape, problem.cache.head_dim)
    new = pl.BlockSpec((None, *tile), lambda i, *_: (i, 0, 0, 0))
    old = pl.BlockSpec(
        (None, None, *tile),
        lambda i, block, unit, start, stop, layer: (layer[0], block[i], 0, unit[i], 0),
    )
    flops, num_bytes, transcendentals = problem.cost
    return pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(plan.num_units,),
            in_specs=[new, new, old, old],
            out_specs=[old, old],
        ),
        out_shape=[result(pool.shape, pool.dtype, pool)] * 2,
        input_output_aliases={7: 0, 8: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), **COMPILER_PARAMS),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=False if interpret is None else interpret,
        name="paged_append",
    )


def _kernel(plan: AppendPlan, *refs: Any) -> None:
    _, _, start, stop, _, *tiles = refs
    i = pl.program_id(0)

    # the first program writes always: what it writes back is what it read, if nothing is new
    @pl.when((start[i] < stop[i]) | (i == 0))
    def _() -> None:
        for new, old, out in (tiles[0::2], tiles[1::2]):
            old_rows, new_rows = (_rows(ref) for ref in (old, new))
            bits = _new_bits(plan, old_rows, start[i], stop[i])
            blended = (words(old_rows) & ~bits) | (words(new_rows) & bits)
            out[...] = pltpu.bitcast(blended, out.dtype).reshape(out.shape)


def _rows(ref: Any) -> Any:
    return ref[...].reshape(-1, ref.shape[-1])


def _new_bits(plan: AppendPlan, tile: Any, start: Any, stop: Any) -> Any:
    def is_new(row: Any) -> Any:
        token = plan.unit.token(row)
        return (token >= start) & (token < stop)

    return row_bits(tile.shape, 4 // tile.dtype.itemsize, is_new)
