"""Writing new tokens into the pools on TPU by copies alone, in place.

Where the heads of a token fill whole tiles of its memory, any number of tokens can be copied: the
new tokens that go into one block are a run, and a run is one copy from the packed array to the
pool.  Every byte moves once, and nothing passes through VMEM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.layout import result
from ..core.problem import AppendProblem
from .append_items import find_items
from .append_plan import RunsPlan
from .blocks import COMPILER_PARAMS, interpreter


def append(
    problem: AppendProblem,
    plan: RunsPlan,
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
    runs = _find_runs(problem, plan, block_table, seq_lengths, query_start_loc)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    flops, num_bytes, transcendentals = problem.cost
    call = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(1,),
            in_specs=[hbm] * 4,
            out_specs=[hbm] * 2,
            scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[result(pool.shape, pool.dtype, pool) for pool in (key_pool, value_pool)],
        input_output_aliases={8: 0, 9: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), **COMPILER_PARAMS),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=interpreter(interpret),
        name="paged_append",
    )
    key_pool, value_pool = call(*runs, layer.reshape(1), keys, values, key_pool, value_pool)
    return key_pool, value_pool


class _Runs(NamedTuple):
    """New tokens of one block each, int32 (num_runs,); one whose slots are missing has none."""

    block: Array  # physical
    offset: Array  # of the first token in its block
    token: Array  # packed index of the first token
    tokens: Array
    used: Array  # (1,), runs up to the last that has tokens


def _find_runs(problem: AppendProblem, plan: RunsPlan, *where: Array) -> _Runs:
    items = find_items(problem, plan.block_size, plan.num_runs, *where)
    token = items.first_token + items.start
    count = jnp.minimum(items.stop - items.start, problem.num_tokens - token)
    count = jnp.where(token >= 0, jnp.maximum(count, 0), 0)
    number = jnp.arange(1, plan.num_runs + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(count > 0, number, 0), keepdims=True)
    return _Runs(items.block, items.start, token, count, used)


def _kernel(plan: RunsPlan, *refs: Any) -> None:
    *runs, layer, keys, values, _, _, key_pool, value_pool, semaphore = refs
    copies = _Copies(_Runs(*runs), layer[0], (keys, values), (key_pool, value_pool), semaphore)
    used = copies.runs.used[0]

    def step(run: Any, _: None) -> None:
        @pl.when(run >= plan.ahead)
        def _() -> None:
            copies.each(run - plan.ahead, lambda copy: copy.wait())

        @pl.when(run < used)
        def _() -> None:
            copies.each(run, lambda copy: copy.start())

    lax.fori_loop(0, used + plan.ahead, step, None)


@dataclass(frozen=True)
class _Copies:
    runs: Any  # _Runs, in SMEM
    layer: Any
    new: tuple[Any, Any]  # HBM, (num_tokens, heads, head_dim)
    pools: tuple[Any, Any]  # HBM, (layers, blocks, block_size, heads, head_dim)
    semaphore: Any

    def each(self, run: Any, act: Callable[[Any], None]) -> None:
        """Does something with the copy of a run's keys, and with that of its values."""
        runs, count = self.runs, self.runs.tokens[run]

        @pl.when(count > 0)
        def _() -> None:
            source = pl.ds(runs.token[run], count)
            target = pl.ds(runs.offset[run], count)
            for at, (new, pool) in enumerate(zip(self.new, self.pools, strict=True)):
                place = pool.at[self.layer, runs.block[run], target]
                act(pltpu.make_async_copy(new.at[source], place, self.semaphore.at[at]))
