"""Paged attention on TPU: one ragged kernel for decode, chunked prefill and mixed batches.

A program takes a tile of whole query tokens of one sequence, all heads, and walks over the keys
that some of them sees.  It is block-diagonal: all (token, query head) rows meet all (token, kv
head) rows of a tile of blocks in one product, the scores of foreign heads are masked together with
the keys a query must not see, and so one second product gives every head its own output.  Copies
of the next tile's blocks run meanwhile; the sequence's table row is streamed in slices.

Source: one kernel for ragged batches as in ragged paged attention of tpu-inference
(arXiv:2604.15464), over the online softmax of FlashAttention (Dao et al., 2022).
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import softmax
from ..core.arrays import AttentionArrays, NewTokens
from ..core.layout import result
from ..core.mixed import single_tokens
from ..core.problem import Problem
from ..core.schedule import gather_tiles, tile_queries, untile
from ..core.variant import LOG2E
from . import decode, mixed, packed, prefill
from . import plan as plans
from .blocks import (
    COMPILER_PARAMS,
    TileCopies,
    allocate,
    as_rows,
    float16_numbers,
    row_bits,
    table_windows,
    words,
)
from .plan import LANES, AttentionPlan

ROWS = softmax.Rows(
    reduce=lambda op, x: op(x, axis=-1, keepdims=True),
    expand=jnp.broadcast_to,
)


def unsupported(problem: Problem) -> str | None:
    """Why the kernel cannot run the problem, with the way out; None if it can."""
    problem = packed.by_rows(problem)
    cache, way_out = problem.cache, 'use implementation="xla"'
    if not cache.has_packed_pools and cache.head_dim not in plans.HEAD_DIMS:
        return f"head_dim={cache.head_dim} is none of {plans.HEAD_DIMS}; {way_out}"
    if cache.dtype not in plans.DTYPES:
        return f"pools of {cache.dtype} are none of {', '.join(plans.DTYPES)}; {way_out}"
    rows = plans.BlockRows.of(cache)
    if not any(rows.parts(cache.dtype)):
        return f'{plans.no_whole_register(cache)}, or implementation="xla"'
    plan = plans.plan_attention(problem)
    if plan is None:
        return (
            f"{problem.num_query_heads} query heads on {rows.count} rows of {cache.head_dim} "
            f"do not fit {plans.VMEM_BYTES >> 20} MiB of VMEM; use a smaller block_size, or "
            'implementation="xla"'
        )
    if plan.num_query_tiles * 16 > plans.SMEM_BYTES:
        return (
            f"{problem.num_tokens} query tokens make {plan.num_query_tiles} tiles, more than "
            f"{plans.SMEM_BYTES // 16}; split the batch, or {way_out}"
        )
    return None


def can_append(problem: Problem) -> bool:
    """Whether `append_and_attend` can run the problem, and writes its new keys and values too."""
    return decode.plan_of(packed.by_rows(problem), appends=True) is not None


def append_and_attend(
    problem: Problem, arrays: AttentionArrays, new: NewTokens, *, interpret: Any = None
) -> tuple[Array, Array, Array, Array]:
    """(out, lse, key_pool, value_pool), pools with a leading layer axis."""
    call = partial(decode.append_and_attend, interpret=interpret)
    if packed.are_apart(problem.cache):
        return packed.append_and_attend(call, problem, arrays, new)
    return call(problem, arrays, new)


def attend(
    problem: Problem, arrays: AttentionArrays, *, interpret: Any = None
) -> tuple[Array, Array]:
    """(out, lse) of packed queries over pools with a leading layer axis."""
    if packed.are_apart(problem.cache):
        return packed.attend(_attend_rows, problem, arrays, interpret=interpret)
    return _attend_rows(problem, arrays, interpret=interpret)


def _attend_rows(
    problem: Problem, arrays: AttentionArrays, *, interpret: Any
) -> tuple[Array, Array]:
    """The kernels for the problem; a row of the query is as wide as the rows its head lies in."""

    def run(problem: Problem, arrays: AttentionArrays) -> tuple[Array, Array]:
        decode_plan, prefill_plan = decode.plan_of(problem), prefill.plan_of(problem)
        if decode_plan is not None:
            return decode.attend(problem, decode_plan, arrays, interpret=interpret)
        if prefill_plan is not None:
            return prefill.attend(problem, prefill_plan, arrays, interpret=interpret)
        return _attend_tiles(problem, arrays, interpret=interpret)

    singles = single_tokens(problem)
    if singles is None or decode.plan_of(singles) is None:
        return run(problem, arrays)
    return mixed.attend(problem, partial(run, singles), partial(run, problem), arrays)


def _attend_tiles(
    problem: Problem, arrays: AttentionArrays, *, interpret: Any
) -> tuple[Array, Array]:
    """The kernel of this module, which runs every problem."""
    plan = plans.plan_attention(problem)
    assert plan is not None, "unsupported() comes first"
    query, key_pool, value_pool, block_table, schedule, alibi_slopes, layer = arrays
    num_heads, width = query.shape[1:]
    tokens, rows = plan.tile_tokens, plan.tile_tokens * num_heads
    pad = (0, plan.query_rows - rows)
    tiles = tile_queries(
        schedule, problem.variant, num_tokens=problem.num_tokens, tile_tokens=tokens
    )
    q = query.astype(problem.cache.dtype).astype(plans.product_dtype(problem.cache.dtype))
    q = gather_tiles(q, tiles, tokens, problem.is_packed)
    q = jnp.pad(q.reshape(-1, rows, width), ((0, 0), pad, (0, 0)))
    scalars = (tiles.sequence, tiles.first_position, tiles.kv_start, tiles.kv_stop)
    inputs = [q]
    if alibi_slopes is not None:
        slopes = jnp.tile(alibi_slopes.astype(jnp.float32), tokens)
        inputs.append(jnp.pad(slopes, pad)[:, None])
    table = table_windows(block_table, problem.cache.num_blocks)
    layer = layer.reshape(1)
    if problem.cache.dtype == "float16":
        key_pool, value_pool = (_layer_bits(pool, layer) for pool in (key_pool, value_pool))
        layer = jnp.zeros_like(layer)
    pools = (as_rows(pool, plan.rows) for pool in (key_pool, value_pool))
    call = _make_call(problem, plan, query, interpret)
    out, lse = call(*scalars, layer, *inputs, table, *pools)
    out = out[:, :rows].reshape(-1, tokens, num_heads, width).astype(query.dtype)
    lse = lse[:, 0, :rows].reshape(-1, tokens, num_heads)
    return untile(schedule, out, lse, num_tokens=problem.num_tokens)


def _layer_bits(pool: Array, layer: Array) -> Array:
    """One layer as int16: the kernel cannot load float16, and retyping a pool copies it."""
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(pool, layer[0], 1), jnp.int16)


def _make_call(problem: Problem, plan: AttentionPlan, query: Array, interpret: Any) -> Any:
    width, n = plan.query_width, plan.num_query_tiles
    tile = lambda *shape: pl.BlockSpec((None, *shape), lambda i, *_: (i, 0, 0))
    shared = lambda *shape: pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    slopes = [shared(plan.query_rows, 1)] if problem.variant.has_alibi else []
    lse_rows = plans.round_up(plan.query_rows, LANES)
    out_dtype = "float32" if problem.query_dtype == "float16" else problem.query_dtype
    flops, num_bytes, transcendentals = problem.cost
    return pl.pallas_call(
        partial(_kernel, problem, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(n,),
            in_specs=[tile(plan.query_rows, width), *slopes, hbm, hbm, hbm],
            out_specs=[tile(plan.query_rows, width), tile(1, lse_rows)],
            scratch_shapes=allocate(plans.attention_scratch(problem, plan)),
        ),
        out_shape=[
            result((n, plan.query_rows, width), jnp.dtype(out_dtype), query),
            result((n, 1, lse_rows), jnp.float32, query),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), **COMPILER_PARAMS),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=num_bytes
        ),
        interpret=False if interpret is None else interpret,
        name="paged_attention",
    )


class _Tile(NamedTuple):
    """What is known of a program's query rows, (rows, 1) each, and of its keys."""

    position: Any
    kv_head: Any  # as `BlockRows.head` counts
    token: Any  # of the tokens that share rows, whose head it is; None: no rows are shared
    slope: Any
    kv_start: Any
    kv_stop: Any


def _kernel(problem: Problem, plan: AttentionPlan, *refs: Any) -> None:
    sequence, first_position, kv_start, kv_stop, layer, query, *rest = refs
    slopes = rest.pop(0) if problem.variant.has_alibi else None
    table, key_pool, value_pool, out, lse, keys, values, windows, *semaphores = rest
    i, block_size = pl.program_id(0), problem.cache.block_size
    start, stop = kv_start[i], kv_stop[i]
    first_block = lax.div(start, block_size)
    windows_per_row = -(-problem.cache.max_blocks_per_seq // plans.TABLE_WINDOW)
    copies = TileCopies(
        plan,
        table,
        sequence[i] * windows_per_row,
        layer[0],
        first_block,
        jnp.where(stop > start, lax.div(stop + (block_size - 1), block_size), first_block),
        (key_pool, value_pool),
        (keys, values),
        windows,
        tuple(semaphores),
    )
    row = lax.broadcasted_iota(jnp.int32, (plan.query_rows, 1), 0)
    query_head = lax.rem(row, problem.num_query_heads)
    tile = _Tile(
        first_position[i] + lax.div(row, problem.num_query_heads),
        *packed.row_and_token(problem, plan.rows, query_head),
        None if slopes is None else slopes[...],
        start,
        stop,
    )

    def each(t: Any, state: softmax.State) -> softmax.State:
        _prefetch(copies, t + 1)
        copies.wait(t)
        return _step(problem, plan, copies, tile, query[...], t, state)

    @pl.when(copies.count > 0)
    def _() -> None:
        copies.window(0).start()

    _prefetch(copies, 0)
    rows = (plan.query_rows, 1)
    state = softmax.State(
        jnp.full(rows, softmax.FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    state = lax.fori_loop(0, copies.count, each, state)
    value, row_lse = softmax.finish(ROWS, state)
    out[...] = value.astype(out.dtype)
    _store_as_row(lse, row_lse)


def _prefetch(copies: TileCopies, t: Any) -> None:
    """Starts the blocks of tile `t`, and the table window of the one after it."""

    @pl.when(t < copies.count)
    def _() -> None:
        copies.window(t).wait()
        copies.start(t)

    @pl.when(t + 1 < copies.count)
    def _() -> None:
        copies.window(t + 1).start()


def _step(
    problem: Problem,
    plan: AttentionPlan,
    copies: TileCopies,
    tile: _Tile,
    query: Any,
    t: Any,
    state: softmax.State,
) -> softmax.State:
    """Takes in tile `t` of keys and values."""
    slot, rows = lax.rem(t, 2), plan.rows
    first = copies.block(t) * rows.block_size
    keys, values = (buffer.at[slot] for buffer in copies.buffers)
    head, token = _head_and_token(plan, copies.part(t), (1, plan.tile_rows), 1)
    key_position = first + token if tile.token is None else first + token + tile.token
    variant, unit = problem.variant, LOG2E
    is_partial = (first < tile.kv_start) | (
        first + plan.blocks_per_tile * rows.block_size > tile.kv_stop
    )

    @pl.when(is_partial)
    def _() -> None:
        # a product may cross into the next token's row, or a row hold two: zero times its keys
        is_token_alone = plan.head_rows == rows.group_tokens == 1
        for ref in (values,) if is_token_alone else (keys, values):
            _clear(plan, copies.part(t), ref, tile.kv_start - first, tile.kv_stop - first)

    dots = _dots(problem, plan, query, _load(problem, keys))
    scores = variant.score(dots, tile.position, key_position, tile.slope, unit)
    # no key past kv_stop is seen, and rows past the tile's tokens must not look there either
    keep = variant.keep(tile.position, key_position, tile.kv_stop) & (head == tile.kv_head)
    scores = jnp.where(keep, scores, softmax.MASK)
    weigh = lambda weights: _weighted(problem, plan, weights, _load(problem, values))
    return softmax.step(ROWS, state, scores, weigh)


def _dots(problem: Problem, plan: AttentionPlan, query: Any, keys: Any) -> Any:
    """Products of query rows with key rows; of a head's rows, the sum stands at the first."""
    width = plan.rows.width
    dots = _product(problem, query[:, :width], keys, 1)
    for i in range(1, plan.head_rows):
        part = _product(problem, query[:, i * width : (i + 1) * width], keys, 1)
        dots += pltpu.roll(part, plan.tile_rows - i, 1)
    return dots


def _weighted(problem: Problem, plan: AttentionPlan, weights: Any, values: Any) -> Any:
    """Weighted sums of each of a head's rows, side by side; weights stand at the first."""
    parts = [_product(problem, weights, values, 0)]
    for i in range(1, plan.head_rows):
        parts.append(_product(problem, pltpu.roll(weights, i, 1), values, 0))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _head_and_token(plan: AttentionPlan, part: Any, shape: tuple[int, int], axis: int) -> tuple:
    """kv head of each row of a tile, and its token counted from the tile's first block."""
    block, row = _locate(plan, part, lax.broadcasted_iota(jnp.int32, shape, axis))
    return plan.rows.head(row), block * plan.rows.block_size + plan.rows.token(row)


def _locate(plan: AttentionPlan, part: Any, row: Any) -> tuple[Any, Any]:
    """Block of a row of a tile, and the row within the block."""
    count = plan.rows.count
    return lax.div(row, count), lax.rem(row, count) + part * plan.copy_rows


def _clear(plan: AttentionPlan, part: Any, values: Any, start: Any, stop: Any) -> None:
    """Zeros the values of tokens outside [start, stop): no weight makes NaN harmless."""

    def keep(row: Any) -> Any:
        block, row = _locate(plan, part, row)
        token = block * plan.rows.block_size + plan.rows.token_of_values(row)
        return (token >= start) & (token < stop)

    value = values[...]
    bits = row_bits(value.shape, 4 // value.dtype.itemsize, keep)
    values[...] = pltpu.bitcast(words(value) & bits, value.dtype)


def _load(problem: Problem, ref: Any) -> Any:
    return float16_numbers(ref[...]) if problem.cache.dtype == "float16" else ref[...]


def _product(problem: Problem, a: Any, b: Any, axis: int) -> Any:
    """a (rows, n) with axis `axis` of b, in the pool's dtype, summed in float32."""
    exact = problem.cache.dtype != "bfloat16"
    return lax.dot_general(
        a.astype(b.dtype),
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _store_as_row(ref: Any, column: Any) -> None:
    """Writes (rows, 1) into (1, rows), a register of lanes at a time."""
    for first in range(0, column.shape[0], LANES):
        part = column[first : first + LANES]
        row = lax.broadcasted_iota(jnp.int32, (part.shape[0], LANES), 0)
        lane = lax.broadcasted_iota(jnp.int32, (part.shape[0], LANES), 1)
        diagonal = jnp.where(row == lane, part, 0.0)
        ref[:, first : first + LANES] = jnp.sum(diagonal, axis=0, keepdims=True)
