"""Writes new tokens into the pools, in place: keys and values in one kernel.

CTA c takes chunks c, c + num_ctas, ... of the packed tokens

keys, values --TMA--> shared memory --one TMA per token--> its slot, where it has one
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import layout
from ..core.problem import AppendProblem, CacheShape
from . import blocks
from .blocks import divide, pl, plgpu
from .plan import (
    INT32_MAX,
    MAX_SIMULATED_CTAS,
    NUM_SMS,
    SMEM_BYTES,
    Barriers,
    Buffer,
    Union,
    smem_bytes,
)

COPY_ALIGNMENT = 128  # bytes, of a copy's end in shared memory
ROW_ALIGNMENT = 16  # bytes, of a copy's rows
CHUNK_BYTES = 16384  # of keys, as many of values: several CTAs share an SM
MAX_BOX = 256  # elements of a copy along one axis


@dataclass(frozen=True)
class Plan:
    """How the tokens of a call are cut."""

    chunk_tokens: int
    num_chunks: int
    token_rows: int  # num_kv_heads, padded so that every token starts aligned
    num_ctas: int


def make_plan(problem: AppendProblem, *, is_simulated: bool = False) -> Plan:
    token_rows = _token_rows(problem.cache)
    token_bytes = token_rows * _row_bytes(problem.cache)
    # small calls are spread over all SMs, large ones are cut by what a CTA holds
    spread = -(-problem.num_tokens // (MAX_SIMULATED_CTAS if is_simulated else NUM_SMS))
    chunk_tokens = max(1, min(CHUNK_BYTES // token_bytes, spread, MAX_BOX))
    num_chunks = -(-problem.num_tokens // chunk_tokens)
    num_ctas = min(num_chunks, MAX_SIMULATED_CTAS) if is_simulated else num_chunks
    return Plan(chunk_tokens, num_chunks, token_rows, num_ctas)


def scratch(problem: AppendProblem, plan: Plan) -> dict[str, Buffer | Union | Barriers]:
    """The shared memory of one CTA, by the names of the kernel's parameters."""
    cache = problem.cache
    chunk = Buffer((plan.chunk_tokens, plan.token_rows, cache.head_dim), cache.dtype)
    return {"key_smem": chunk, "value_smem": chunk, "full": Barriers(1, 2)}


def _row_bytes(cache: CacheShape) -> int:
    return cache.head_dim * np.dtype(cache.dtype).itemsize


def _token_rows(cache: CacheShape) -> int:
    step = COPY_ALIGNMENT // np.gcd(COPY_ALIGNMENT, _row_bytes(cache))
    return int(-(-cache.num_kv_heads // step) * step)


def unsupported(problem: AppendProblem) -> str | None:
    """Why the kernel does not take the problem, and the way out; None if it does."""
    cache, way_out = problem.cache, 'use implementation="xla"'
    if _row_bytes(cache) % ROW_ALIGNMENT:
        return (
            f"mosaic_gpu: a row of head_dim={cache.head_dim} in {cache.dtype} must be a multiple "
            f"of {ROW_ALIGNMENT} bytes; pad head_dim, or {way_out}"
        )
    if max(_token_rows(cache), cache.head_dim) > MAX_BOX:
        return (
            f"mosaic_gpu: num_kv_heads={cache.num_kv_heads} and head_dim={cache.head_dim} must "
            f"be at most {MAX_BOX}; {way_out}"
        )
    if smem_bytes(scratch(problem, make_plan(problem))) > SMEM_BYTES:
        return (
            f"mosaic_gpu: keys and values of a token, {2 * cache.token_bytes} bytes, must fit "
            f"{SMEM_BYTES} bytes of shared memory; {way_out}"
        )
    if cache.num_layers * cache.num_blocks * cache.block_size > INT32_MAX:
        return (
            f"mosaic_gpu: the {cache.num_layers} x {cache.num_blocks} x {cache.block_size} slots "
            f"of the pool must be fewer than 2**31; use one cache per layer, or {way_out}"
        )
    return None


def append(
    problem: AppendProblem,
    keys: jax.Array,
    values: jax.Array,
    key_pool: jax.Array,
    value_pool: jax.Array,
    block_table: jax.Array,
    seq_lengths: jax.Array,
    query_start_loc: jax.Array,
    layer: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Both pools with the new tokens written; in place where they are donated.

    keys, values: (num_tokens, num_kv_heads, head_dim) in the pools' dtype.
    key_pool, value_pool: (num_layers, num_blocks, block_size, num_kv_heads, head_dim).
    layer: int32 (), inside the stack.
    interpret: None or False to compile; True or `plgpu.InterpretGPUParams` to run on a CPU.
    """
    arrays = (keys, values, key_pool, value_pool, block_table, seq_lengths, query_start_loc, layer)
    call = partial(_append, problem, interpret=blocks.interpreter(interpret))
    return blocks.run_locally(call, *arrays)


def _append(
    problem: AppendProblem,
    keys: jax.Array,
    values: jax.Array,
    key_pool: jax.Array,
    value_pool: jax.Array,
    block_table: jax.Array,
    seq_lengths: jax.Array,
    query_start_loc: jax.Array,
    layer: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    cache, plan = problem.cache, make_plan(problem, is_simulated=interpret is not None)
    token = layout.locate_tokens(query_start_loc, seq_lengths, problem.num_tokens)
    place = layout.locate_slots(
        block_table,
        token.sequence,
        token.position,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
    )
    block = layer * cache.num_blocks + place.block
    slots = jnp.where(place.is_valid, block * cache.block_size + place.offset, -1)
    padding = plan.num_chunks * plan.chunk_tokens - problem.num_tokens
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    padding = ((0, 0), (0, plan.token_rows - cache.num_kv_heads), (0, 0))
    pools = [
        jax.new_ref(pool.reshape(-1, cache.num_kv_heads, cache.head_dim))
        for pool in (key_pool, value_pool)
    ]
    _call(problem, plan, interpret)(*pools, jnp.pad(keys, padding), jnp.pad(values, padding), slots)
    written = [jax.freeze(pool).reshape(key_pool.shape) for pool in pools]
    return written[0], written[1]


def _call(problem: AppendProblem, plan: Plan, interpret: Any) -> Any:
    return blocks.kernel(
        partial(_body, plan=plan),
        name="paged_append",
        cost=problem.cost,
        out_type=(),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        scratch_types=blocks.allocate(scratch(problem, plan)),
        interpret=interpret,
    )


def _body(
    key_pool_ref: Any,  # (slots, num_kv_heads, head_dim), in place
    value_pool_ref: Any,
    keys_ref: Any,  # (num_tokens, token_rows, head_dim)
    values_ref: Any,
    slots_ref: Any,  # int32 (num_chunks * chunk_tokens,), -1 for none
    *,
    plan: Plan,
    key_smem: Any,
    value_smem: Any,
    full: Any,
) -> None:
    cta, num_heads = lax.axis_index("cta"), key_pool_ref.shape[1]

    @pl.loop(0, divide(plan.num_chunks - 1 - cta, plan.num_ctas) + 1)
    def _(index):
        first = (cta + index * plan.num_ctas) * plan.chunk_tokens
        # the last chunk may pass the end: its rows are zeros there, and have no slot
        chunk = pl.ds(first, plan.chunk_tokens)
        plgpu.copy_gmem_to_smem(keys_ref.at[chunk], key_smem, full)
        plgpu.copy_gmem_to_smem(values_ref.at[chunk], value_smem, full)
        plgpu.barrier_wait(full)
        for token in range(plan.chunk_tokens):
            slot = slots_ref[first + token]

            @pl.when(slot >= 0)
            def _(token=token, slot=slot):
                rows = token, pl.ds(0, num_heads)
                plgpu.copy_smem_to_gmem(key_smem.at[rows], key_pool_ref.at[slot])
                plgpu.copy_smem_to_gmem(value_smem.at[rows], value_pool_ref.at[slot])

        plgpu.wait_smem_to_gmem(0)
