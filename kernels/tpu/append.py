"""Writing new tokens into the pools on TPU, in place: by copies alone, or unit by unit.

Source: the reshape_and_cache of vLLM (Kwon et al., 2023), the KV update of tpu-inference.
"""

from typing import Any

from jax import Array

from ..core.problem import AppendProblem
from . import append_plan as plans
from . import append_runs, append_units, packed
from .plan import HEAD_DIMS, SMEM_BYTES, VMEM_BYTES, BlockRows, no_whole_register


def unsupported(problem: AppendProblem) -> str | None:
    """Why the kernels cannot run the problem, with the way out; None if one can."""
    problem = packed.append_by_rows(problem)
    cache, way_out = problem.cache, 'implementation="xla", which writes in place too'
    if cache.dtype not in ("bfloat16", "float32"):
        return (
            f"a TPU kernel takes no {cache.dtype} pool; use bfloat16 or float32 pools, or {way_out}"
        )
    if not cache.has_packed_pools and cache.head_dim not in HEAD_DIMS:
        return f"head_dim={cache.head_dim} is none of {HEAD_DIMS}; use {way_out}"
    if plans.plan_runs(problem) is not None:
        return None
    if not any(BlockRows.of(cache).units(cache.dtype)):
        return f"{no_whole_register(cache)}, or {way_out}"
    plan = plans.plan_units(problem)
    if plan is None:
        return (
            f"tokens of {cache.num_kv_heads} heads by {cache.head_dim} do not fit "
            f"{VMEM_BYTES >> 20} MiB of VMEM; use {way_out}"
        )
    most = SMEM_BYTES // (4 * plans.WORDS_PER_ITEM)
    if plan.num_units > most:
        return (
            f"{problem.num_tokens} tokens make {plan.num_units} units, more than "
            f"{most}; append fewer at a time, or use {way_out}"
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
    where = (block_table, seq_lengths, query_start_loc, layer)
    arrays = (keys, values, key_pool, value_pool, *where)
    if packed.append_by_rows(problem) != problem:
        return packed.append(append, problem, *arrays, interpret=interpret)
    runs = plans.plan_runs(problem)
    if runs is not None:
        return append_runs.append(problem, runs, *arrays, interpret)
    units = plans.plan_units(problem)
    assert units is not None, "unsupported() comes first"
    return append_units.append(problem, units, *arrays, interpret)
