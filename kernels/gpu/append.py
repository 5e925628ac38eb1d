"""Writes new tokens into the pools, in place: keys and values in one kernel, and nothing beside it.

A CTA brings a chunk of packed tokens, works out each one's slot from the table while they are on
their way, and writes those that have one.  Tokens whose row gives every thread of a warpgroup
enough go through registers; others through shared memory:

keys, values --loads--> registers --stores--> slots
keys, values --TMA--> shared memory --one TMA per token--> slots

Source: the reshape_and_cache of vLLM (Kwon et al., 2023).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core.problem import AppendProblem, CacheShape
from . import blocks, device
from .blocks import divide, pl, plgpu, remainder
from .plan import (
    INT32_MAX,
    MAX_SIMULATED_CTAS,
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
THREADS = 128
THREAD_BYTES = 8, 16  # that a thread loads at once, at least and at most
MAX_ROW_BYTES = 16384  # of a token in registers, keys and values each
PAIR_CTAS = 32  # per SM: from twice as many tokens on, a CTA has two of them


@dataclass(frozen=True)
class Plan:
    """How the tokens of a call are cut.

    vector: values that a thread loads at once, 0 for a way through shared memory.
    token_rows: num_kv_heads, there padded so that every token starts aligned.
    """

    vector: int
    chunk_tokens: int
    num_chunks: int
    token_rows: int
    num_ctas: int


class Targets(NamedTuple):
    """Refs in device memory that say where tokens go."""

    table: Any  # int32 (batch, max_blocks_per_seq)
    seq_lengths: Any  # int32 (batch,)
    starts: Any  # int32 (batch + 1,), of a packed batch
    layer: Any  # int32 (1,)


class Inputs(NamedTuple):
    """Refs in device memory; the pools are written in place.

    In registers a token is one row of all its heads, (num_kv_heads * head_dim,), everywhere.
    """

    key_pool: Any  # (num_layers * num_blocks * block_size, num_kv_heads, head_dim)
    value_pool: Any
    keys: Any  # (num_tokens, token_rows, head_dim)
    values: Any
    targets: Targets


def make_plan(problem: AppendProblem, *, is_simulated: bool = False) -> Plan:
    num_tokens, vector, num_sms = problem.num_tokens, _vector(problem.cache), device.num_sms()
    token_rows = problem.cache.num_kv_heads if vector else _token_rows(problem.cache)
    if vector:
        chunk_tokens = 2 if is_simulated or num_tokens >= 2 * PAIR_CTAS * num_sms else 1
    else:
        token_bytes = token_rows * _row_bytes(problem.cache)
        # small calls are spread over all SMs, large ones are cut by what a CTA holds
        spread = -(-num_tokens // (MAX_SIMULATED_CTAS if is_simulated else num_sms))
        chunk_tokens = max(1, min(CHUNK_BYTES // token_bytes, spread, MAX_BOX))
    num_chunks = -(-num_tokens // chunk_tokens)
    num_ctas = min(num_chunks, MAX_SIMULATED_CTAS) if is_simulated else num_chunks
    return Plan(vector, chunk_tokens, num_chunks, token_rows, num_ctas)


def scratch(problem: AppendProblem, plan: Plan) -> dict[str, Buffer | Union | Barriers]:
    """The shared memory of one CTA, by the names of the kernel's parameters."""
    if plan.vector:
        return {}
    cache = problem.cache
    chunk = Buffer((plan.chunk_tokens, plan.token_rows, cache.head_dim), cache.dtype)
    return {"key_smem": chunk, "value_smem": chunk, "full": Barriers(1, 2)}


def _row_bytes(cache: CacheShape) -> int:
    return cache.head_dim * np.dtype(cache.dtype).itemsize


def _vector(cache: CacheShape) -> int:
    """Values that each thread of a warpgroup loads at once; 0 where that is too little."""
    size, width = np.dtype(cache.dtype).itemsize, cache.num_kv_heads * cache.head_dim
    if width % THREADS or width * size > MAX_ROW_BYTES:
        return 0
    per_thread = int(np.gcd(width // THREADS, THREAD_BYTES[1] // size))
    return per_thread if per_thread * size >= THREAD_BYTES[0] else 0


def _token_rows(cache: CacheShape) -> int:
    step = COPY_ALIGNMENT // np.gcd(COPY_ALIGNMENT, _row_bytes(cache))
    return int(-(-cache.num_kv_heads // step) * step)


def unsupported(problem: AppendProblem) -> str | None:
    """Why the kernel does not take the problem, and the way out; None if it does."""
    cache, way_out = problem.cache, 'use implementation="xla"'
    if (reason := device.lacks("append" if _vector(cache) else "copies")) is not None:
        return reason
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
    width = cache.num_kv_heads * cache.head_dim
    token = (width,) if plan.vector else (cache.num_kv_heads, cache.head_dim)
    padding = ((0, 0), (0, plan.token_rows - cache.num_kv_heads), (0, 0))

    def as_tokens(new: jax.Array) -> jax.Array:
        return new.reshape(-1, width) if plan.vector else jnp.pad(new, padding)

    pools = [jax.new_ref(pool.reshape(-1, *token)) for pool in (key_pool, value_pool)]
    # one token per sequence needs no starts, which XLA would have to make
    starts = query_start_loc if problem.is_packed else seq_lengths
    targets = Targets(block_table, seq_lengths, starts, layer.reshape(1))
    _call(problem, plan, interpret)(*pools, as_tokens(keys), as_tokens(values), *targets)
    written = [jax.freeze(pool).reshape(key_pool.shape) for pool in pools]
    return written[0], written[1]


def _call(problem: AppendProblem, plan: Plan, interpret: Any) -> Any:
    return blocks.kernel(
        partial(_body, problem=problem, plan=plan),
        name="paged_append",
        cost=problem.cost,
        out_type=(),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        scratch_types=blocks.allocate(scratch(problem, plan)),
        interpret=interpret,
    )


def _body(*refs: Any, problem: AppendProblem, plan: Plan, **smem: Any) -> None:
    inputs, cta = Inputs(*refs[:4], targets=Targets(*refs[4:])), lax.axis_index("cta")
    write = partial(_through_registers if plan.vector else _through_smem, problem, plan, inputs)
    if plan.num_ctas == plan.num_chunks:
        write(cta * plan.chunk_tokens, **smem)
        return

    @pl.loop(0, divide(plan.num_chunks - 1 - cta, plan.num_ctas) + 1)
    def _(index):
        write((cta + index * plan.num_ctas) * plan.chunk_tokens, **smem)


def _through_registers(problem: AppendProblem, plan: Plan, inputs: Inputs, first: Any) -> None:
    """A chunk of tokens from `first` on; the last one may pass the end."""
    width = problem.cache.num_kv_heads * problem.cache.head_dim
    layout = plgpu.Layout.WG_STRIDED((width,), plan.vector)
    tokens = [first + i for i in range(plan.chunk_tokens)]
    inside = [jnp.minimum(token, problem.num_tokens - 1) for token in tokens]
    load = partial(plgpu.load, layout=layout)
    loaded = [(load(inputs.keys.at[i]), load(inputs.values.at[i])) for i in inside]
    if device.capability() >= device.HOPPER:  # the only barrier that costs nothing is not older
        # holds the loads here: the compiler would start them only once a slot is known
        plgpu.wait_smem_to_gmem(0)
    slots = [slot_of(problem, inputs.targets, token) for token in tokens]
    for (key, value), slot in zip(loaded, slots, strict=True):

        @pl.when(slot >= 0)
        def _(key=key, value=value, slot=slot):
            inputs.key_pool[slot] = key
            inputs.value_pool[slot] = value


def _through_smem(
    problem: AppendProblem,
    plan: Plan,
    inputs: Inputs,
    first: Any,
    *,
    key_smem: Any,
    value_smem: Any,
    full: Any,
) -> None:
    """The same; rows past the end are zeros in shared memory, and have no slot."""
    chunk = pl.ds(first, plan.chunk_tokens)
    plgpu.copy_gmem_to_smem(inputs.keys.at[chunk], key_smem, full)
    plgpu.copy_gmem_to_smem(inputs.values.at[chunk], value_smem, full)
    plgpu.barrier_wait(full)
    heads = pl.ds(0, problem.cache.num_kv_heads)

    @pl.loop(0, plan.chunk_tokens)
    def _(token):
        slot = slot_of(problem, inputs.targets, first + token)

        @pl.when(slot >= 0)
        def _():
            rows = token, heads
            plgpu.copy_smem_to_gmem(key_smem.at[rows], inputs.key_pool.at[slot])
            plgpu.copy_smem_to_gmem(value_smem.at[rows], inputs.value_pool.at[slot])

    plgpu.wait_smem_to_gmem(0)


def slot_of(problem: AppendProblem, targets: Targets, token: Any) -> Any:
    """Where a token goes in the pool of all layers, -1 for nowhere; nothing outside is read."""
    cache = problem.cache
    sequence = _sequence(problem, targets, token)
    row = jnp.minimum(sequence, cache.batch - 1)
    # a step's tokens are the last ones of their sequence
    end = targets.starts[row + 1] if problem.is_packed else row + 1
    position = targets.seq_lengths[row] - end + token
    index = divide(jnp.maximum(position, 0), cache.block_size)
    is_inside = (sequence < cache.batch) & (position >= 0) & (index < cache.max_blocks_per_seq)
    block = targets.table[row, jnp.minimum(index, cache.max_blocks_per_seq - 1)]
    is_inside &= (block >= 0) & (block < cache.num_blocks)
    offset = remainder(jnp.maximum(position, 0), cache.block_size)
    slot = (targets.layer[0] * cache.num_blocks + block) * cache.block_size + offset
    return jnp.where(is_inside, slot, -1)


def _sequence(problem: AppendProblem, targets: Targets, token: Any) -> Any:
    """The sequence of a token, or a number past the last one: the last that starts before it."""
    batch = problem.cache.batch
    if not problem.is_packed:
        return token
    sequence, step = jnp.int32(0), 1 << (batch.bit_length() - 1)
    while step:  # of a binary search
        candidate = sequence + step
        is_before = targets.starts[jnp.minimum(candidate, batch)] <= token
        sequence = jnp.where((candidate <= batch) & is_before, candidate, sequence)
        step //= 2
    return sequence
