"""Writing new tokens into the pools on TPU unit by unit, in place.

Where a tile of memory holds more than one token, new tokens go in units: aligned groups of tokens
of one block.  A program takes one unit of keys and of values through VMEM, puts the new rows in,
bit by bit, and hands it back to the memory it came from; no two programs share a unit, and nothing
else is touched.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.layout import result
from ..core.problem import AppendProblem
from .append_items import find_items
from .append_plan import UnitsPlan
from .blocks import COMPILER_PARAMS, as_rows, from_rows, row_bits, words


def append(
    problem: AppendProblem,
    plan: UnitsPlan,
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
    interpret: Any,
) -> tuple[Array, Array]:
    """Both pools with the new tokens written; `keys` and `values` are in the pools' dtype."""
    units = _find_units(problem, plan, block_table, seq_lengths, query_start_loc)
    new = [_gather(x, units.first_token, plan) for x in (keys, values)]
    pools = [_as_runs(pool, plan) for pool in (key_pool, value_pool)]
    scalars = (units.block, units.unit, units.start, units.stop, layer.reshape(1))
    pools = _make_call(problem, plan, pools[0], interpret)(*scalars, *new, *pools)
    shape = problem.cache.pool_shape
    return from_rows(pools[0], plan.rows, shape), from_rows(pools[1], plan.rows, shape)


def _as_runs(pool: Array, plan: UnitsPlan) -> Array:
    """(layers, blocks, runs, rows of a run, width)."""
    rows = as_rows(pool, plan.rows)
    return rows.reshape(*rows.shape[:2], plan.num_runs, -1, rows.shape[-1])


class _Units(NamedTuple):
    """The work list, int32 (num_units,) each; units with nothing to do come last."""

    block: Array  # physical
    unit: Array  # within the block
    start: Array  # tokens [start, stop) of the unit are new
    stop: Array
    first_token: Array  # packed index of the unit's token 0, new or not; may be negative


def _find_units(problem: AppendProblem, plan: UnitsPlan, *where: Array) -> _Units:
    size = plan.unit.block_size
    items = find_items(problem, size, plan.num_units, *where)
    units = _Units(items.block, items.offset // size, *items[2:])
    # a program without work stays on the unit before it, so that none is fetched or written twice
    is_used = units.start < units.stop
    number = jnp.arange(plan.num_units, dtype=jnp.int32)
    num_used = jnp.sum(is_used, dtype=jnp.int32)
    order = jnp.argsort(~is_used, stable=True)
    order = order[jnp.minimum(number, jnp.maximum(num_used - 1, 0))]
    units = _Units(*(x[order] for x in units))
    return units._replace(stop=jnp.where(number < num_used, units.stop, 0))


def _gather(tokens: Array, first_token: Array, plan: UnitsPlan) -> Array:
    """New tokens as units: (num_units, runs, rows of a run, width)."""
    token = first_token[:, None] + jnp.arange(plan.unit.block_size, dtype=jnp.int32)[None, :]
    unit = tokens[jnp.clip(token, 0, tokens.shape[0] - 1)]
    if plan.rows.is_head_major:
        unit = unit.swapaxes(1, 2)
    return unit.reshape(plan.num_units, *plan.unit_shape, plan.unit.width)


def _make_call(problem: AppendProblem, plan: UnitsPlan, pool: Array, interpret: Any) -> Any:
    tile = (*plan.unit_shape, plan.unit.width)
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


def _kernel(plan: UnitsPlan, *refs: Any) -> None:
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


def _new_bits(plan: UnitsPlan, tile: Any, start: Any, stop: Any) -> Any:
    def is_new(row: Any) -> Any:
        token = plan.unit.token_of_values(row)
        return (token >= start) & (token < stop)

    return row_bits(tile.shape, 4 // tile.dtype.itemsize, is_new)
