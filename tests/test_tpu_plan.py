"""How the TPU backend cuts problems: what fits, where rows lie, what it says when it cannot."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from paged_kv.kernels.core.problem import AppendProblem, CacheShape, Problem
from paged_kv.kernels.core.schedule import num_query_tiles
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.tpu import append, append_plan, attention, blocks
from paged_kv.kernels.tpu import plan as plans
from paged_kv.kernels.tpu.plan import BlockRows, Buffer

HEADS = ((1, 1), (1, 8), (2, 5), (3, 3), (4, 8), (5, 7), (8, 4), (12, 1), (16, 8), (64, 1))
SHAPES = list(itertools.product((64, 80, 96, 128, 192, 256), (16, 32, 64, 128), HEADS))
STEPS = ((None, 8), (24, 8), (512, 4), (4096, 1))  # packed tokens, sequences


def problem_of(head_dim=128, block_size=16, heads=(8, 4), dtype="bfloat16", step=(None, 8), **more):
    tokens, batch = step
    cache = CacheShape(1, 64, block_size, heads[0], head_dim, dtype, batch, 100)
    return Problem(
        dataclasses.replace(cache, **more),
        batch if tokens is None else tokens,
        heads[0] * heads[1],
        dtype,
        tokens is not None,
        Variant(1.0),
    )


def append_problem_of(*args, **kwargs):
    problem = problem_of(*args, **kwargs)
    return AppendProblem(problem.cache, problem.num_tokens, problem.is_packed)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", plans.DTYPES)
def test_every_shape_gets_tiles_that_fit(dtype, step):
    for shape in SHAPES:
        problem = problem_of(*shape, dtype, step)
        assert attention.unsupported(problem) is None, shape
        plan = plans.plan_attention(problem)
        assert plan is not None
        assert plans.vmem_bytes(plans.attention_buffers(problem, plan)) <= plans.VMEM_BYTES
        assert plan.query_rows >= plan.tile_tokens * problem.num_query_heads
        assert 1 in (plan.blocks_per_tile, plan.tiles_per_block)
        assert plans.TABLE_WINDOW % plan.blocks_per_tile == 0
        assert plan.copy_rows * plan.tiles_per_block == plan.rows.count
        assert plan.copy_rows % plans.min_rows(dtype) == 0
        assert plan.num_query_tiles == num_query_tiles(
            problem.num_tokens, problem.cache.batch, plan.tile_tokens, problem.is_packed
        )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_shape_gets_units_that_fit(dtype, step):
    for shape in SHAPES:
        problem = append_problem_of(*shape, dtype, step)
        assert append.unsupported(problem) is None, shape
        plan = append_plan.plan_units(problem)
        assert plan is not None
        assert plans.vmem_bytes(append_plan.units_buffers(problem, plan)) <= plans.VMEM_BYTES
        assert plan.rows.block_size % plan.unit.block_size == 0
        assert plan.unit_shape[1] % plans.min_rows(dtype) == 0


def test_decode_takes_the_smallest_unit_and_prefill_whole_blocks():
    def units(*args):
        cut = append_plan.plan_units(append_problem_of(*args))
        assert cut is not None
        return cut.unit.block_size

    assert units(128, 64, (8, 4), "bfloat16", (None, 8)) == 2
    assert units(128, 64, (1, 4), "bfloat16", (None, 8)) == 16
    assert units(128, 64, (8, 4), "bfloat16", (160, 8)) == 32
    assert units(128, 64, (8, 4), "bfloat16", (4096, 1)) == 64
    assert units(128, 64, (3, 4), "bfloat16", (None, 8)) == 16  # head by head in memory


def test_runs_are_for_tokens_that_fill_tiles():
    runs = lambda *args: append_plan.plan_runs(append_problem_of(*args))
    for kv_heads, dtype in itertools.product((1, 2, 3, 4, 8, 12, 16), ("bfloat16", "float32")):
        fills = kv_heads in (2, 4, 8, 16) or (kv_heads == 1 and dtype == "float32")
        assert (runs(128, 16, (kv_heads, 1), dtype) is not None) == fills, (kv_heads, dtype)
    assert runs(64, 16, (8, 4)) is None


def test_short_tables_do_not_make_large_tiles():
    plan = plans.plan_attention(problem_of(max_blocks_per_seq=3))
    assert plan is not None and plan.blocks_per_tile == 4


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_name_the_token_and_head_that_lie_there(num_heads, head_dim):
    cache = CacheShape(2, 3, 16, num_heads, head_dim, "float32", 1, 4)
    rows = BlockRows.of(cache)
    shape = (2, 3, 16, num_heads, head_dim)
    where = jnp.arange(np.prod(shape[:-1]), dtype=jnp.int32).reshape(shape[:-1])
    pool = jnp.broadcast_to(where[..., None], shape)
    view = blocks.as_rows(pool, rows)
    row = jnp.arange(rows.count, dtype=jnp.int32)
    expected = pool[1, 2][rows.token(row), rows.head(row)]
    np.testing.assert_array_equal(view[1, 2], expected)
    np.testing.assert_array_equal(blocks.from_rows(view, rows, shape), pool)
    assert rows.is_head_major == (head_dim == 128 and num_heads in (3, 5, 12))


@pytest.mark.parametrize("heads", [(8, 64), (3, 64), (8, 80), (1, 80), (4, 96), (1, 192), (2, 256)])
def test_packed_rows_name_the_token_of_every_value(heads):
    cache = CacheShape(1, 2, 32, *heads, "float32", 1, 4, has_packed_pools=True)
    rows = BlockRows.of(cache)
    token = jnp.arange(32, dtype=jnp.int32)[None, None, :, None, None]
    view = blocks.as_rows(jnp.broadcast_to(token, cache.pool_shape), rows)[0, 1]
    assert view.shape == (32 * heads[0] * heads[1] // 128, 128)
    row = jnp.broadcast_to(jnp.arange(rows.count, dtype=jnp.int32)[:, None], view.shape)
    np.testing.assert_array_equal(rows.token_of_values(row), view)
    np.testing.assert_array_equal(
        rows.token(row[:, 0]), view[:, 0] // rows.group_tokens * rows.group_tokens
    )


def test_parts_of_a_block_are_whole_tokens_or_heads():
    assert list(BlockRows(16, 8, False).parts("bfloat16")) == [1, 2, 4, 8]
    assert list(BlockRows(16, 8, False).parts("float32")) == [1, 2, 4, 8, 16]
    assert list(BlockRows(16, 6, True).parts("bfloat16")) == [1, 2, 3, 6]
    assert list(BlockRows(8, 1, False).parts("bfloat16")) == []


def test_units_are_whole_registers():
    tokens = lambda rows, dtype: [unit.block_size for unit in rows.units(dtype)]
    assert tokens(BlockRows(16, 8, False), "bfloat16") == [2, 4, 8, 16]
    assert tokens(BlockRows(16, 8, False), "float32") == [1, 2, 4, 8, 16]
    assert tokens(BlockRows(32, 6, True), "bfloat16") == [16, 32]
    assert tokens(BlockRows(8, 6, True), "bfloat16") == []


def test_buffers_count_whole_registers():
    assert Buffer("vmem", (3, 5, 64), "float32").num_bytes == 3 * 8 * 128 * 4
    assert Buffer("vmem", (17, 130), "bfloat16").num_bytes == 32 * 256 * 2
    assert Buffer("smem", (2, 128), "int32").num_bytes == 1024
    assert Buffer("semaphore", (2,)).num_bytes == 0


def test_scratch_is_allocated_as_it_is_described():
    problem = problem_of(dtype="float16")
    plan = plans.plan_attention(problem)
    assert plan is not None
    described = plans.attention_scratch(problem, plan)
    allocated = blocks.allocate(described)
    assert [buffer.shape for buffer in described] == [buffer.shape for buffer in allocated]
    assert allocated[0] == pltpu.VMEM((2, plan.tile_rows, 128), jnp.int16)
    assert allocated[2] == pltpu.SMEM((2, plans.TABLE_WINDOW), jnp.int32)


UNSUPPORTED = {
    "head_dim=40 is none of .* use implementation": problem_of(40),
    "pools of float8_e4m3fn are none of bfloat16, float16, float32": problem_of(
        dtype="float8_e4m3fn"
    ),
    "block_size=8 with num_kv_heads=1 does not fill .* of 16 rows; use a block_size": problem_of(
        block_size=8, heads=(1, 4)
    ),
    "4096 query heads on 16384 rows of 256 do not fit 12 MiB": problem_of(
        256, 16, (1024, 4), "float32"
    ),
    "1000000 query tokens make 125064 tiles, more than 32768; split the batch": problem_of(
        step=(1_000_000, 64)
    ),
}
UNSUPPORTED_APPENDS = {
    "takes no float16 pool; use bfloat16 .* which writes in place too": append_problem_of(
        dtype="float16"
    ),
    "head_dim=40 is none of": append_problem_of(40),
    "block_size=8 with num_kv_heads=1 does not fill": append_problem_of(block_size=8, heads=(1, 4)),
    "tokens of 1001 heads by 256 do not fit 12 MiB of VMEM; use impl": append_problem_of(
        256, 128, (1001, 1), "float32"
    ),
    "2000000 tokens make 125128 units, more than 32768; append fewer": append_problem_of(
        step=(2_000_000, 64)
    ),
}


@pytest.mark.parametrize("text", UNSUPPORTED)
def test_unsupported_attention_says_the_way_out(text):
    assert_says(attention.unsupported(UNSUPPORTED[text]), text)


@pytest.mark.parametrize("text", UNSUPPORTED_APPENDS)
def test_unsupported_append_says_the_way_out(text):
    assert_says(append.unsupported(UNSUPPORTED_APPENDS[text]), text)


def assert_says(reason, text):
    with pytest.raises(NotImplementedError, match=text):
        raise NotImplementedError(reason)
    assert 'implementation="xla"' in reason
