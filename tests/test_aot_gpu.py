"""The GPU kernels compile for Hopper with no spilled register, and copy no pool."""

import dataclasses
import itertools

import hlo
import jax
import jax.numpy as jnp
import pytest
import steps
from gpu_interpreter import NEEDS_JAX
from pairwise import pairwise_rows

import paged_kv
from paged_kv.kernels.core.problem import CacheShape, Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import decode_plan, plan, prefill_plan
from tools.gpu_compile import compiler
from tools.gpu_compile.__main__ import compile_case

pytestmark = [
    pytest.mark.aot,
    NEEDS_JAX,
    pytest.mark.skipif(compiler.missing() is not None, reason=f"{compiler.missing()}"),
]

ALL_AT_ONCE = Variant(1.0, window=(100, 0), logits_soft_cap=30.0, has_alibi=True)
AXES = {
    "head_dim": plan.HEAD_DIMS,
    "block_size": (8, 16, 128),
    "heads": ((1, 8), (8, 4), (3, 5)),  # kv heads, query heads per kv head
    "dtypes": (("bfloat16", "bfloat16"), ("float16", "float32")),  # of the pools, of the query
    "variant": (Variant(1.0), Variant(1.0, is_causal=False, window=(7, 5)), ALL_AT_ONCE),
    "tokens": (None, 24, 516),  # packed tokens, also no multiple of 8; None: no packing
}
PAIRWISE = pairwise_rows(AXES, 17)
# the widest accumulators of prefill: with the long loop, and with the most scalars beside it (and
# blocks that divide no tile)
WIDE = [
    (256, 16, (8, 4), ("bfloat16", "bfloat16"), Variant(1.0), 516),
    (256, 24, (3, 5), ("float16", "float32"), ALL_AT_ONCE, 516),
]


def problem_of(row):
    head_dim, block_size, (kv_heads, group), (dtype, query_dtype), variant, tokens = row
    cache = CacheShape(2, 4096, block_size, kv_heads, head_dim, dtype, 8, 64)
    heads = kv_heads * group
    return Problem(cache, tokens or 8, heads, query_dtype, tokens is not None, variant)


def compile_attention(problem, **options):
    """The report of `paged_attention` of a problem."""
    shape, variant = problem.cache, problem.variant
    pool = jax.ShapeDtypeStruct(
        (shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim),
        shape.dtype,
    )
    int32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    cache = paged_kv.PagedKVCache(
        pool, pool, int32(shape.batch, shape.max_blocks_per_seq), int32(shape.batch)
    )
    heads = problem.num_query_heads
    query = (problem.num_tokens, heads, shape.head_dim)
    query = jax.ShapeDtypeStruct(query, problem.query_dtype)
    slopes = jax.ShapeDtypeStruct((heads,), jnp.float32) if variant.has_alibi else None

    def attend(query, cache, starts, slopes):
        return paged_kv.paged_attention(
            query,
            cache,
            query_start_loc=starts,
            layer=1,
            scale=variant.scale,
            is_causal=variant.is_causal,
            local_window_size=variant.window,
            logits_soft_cap=variant.logits_soft_cap,
            alibi_slopes=slopes,
            return_residual=True,
            implementation="mosaic_gpu",
        )

    starts = int32(shape.batch + 1) if problem.is_packed else None
    return compiler.compile_for("H100", jax.jit(attend), query, cache, starts, slopes, **options)


def assert_compiles(row, **options):
    """For Hopper, without a spill, within a CTA's registers and shared memory."""
    problem = problem_of(row)
    kernels = compile_attention(problem, **options).kernels
    kernel = assert_assembled(problem, kernels)
    return smem_bytes_of(problem), kernel


def assert_assembled(problem, kernels):
    """The main one of the kernels that attend, which are those expected and spill nothing."""
    from paged_kv.kernels.gpu import attention

    by_name = {kernel.kernel: kernel for kernel in kernels}
    if (made := decode_plan.plan_of(problem)) is not None:
        names = {"paged_decode", "paged_combine"}
    elif (made := prefill_plan.plan_of(problem)) is not None:
        names = {"paged_prefill"}
        if attention.singles_of(problem) is not None:
            names |= {"paged_decode", "paged_combine"}
    else:
        made, names = plan.make_plan(problem), {"paged_attention"}
    assert set(by_name) == names
    for kernel in kernels:
        assert kernel.target == "sm_90a"
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    main = "paged_prefill" if "paged_prefill" in names else min(names - {"paged_combine"})
    warpgroups = getattr(made, "consumers", prefill_plan.CONSUMERS) + 1
    assert by_name[main].registers * 128 * warpgroups <= 65536
    assert smem_bytes_of(problem) <= plan.SMEM_BYTES
    return by_name[main]


def smem_bytes_of(problem):
    """What the plan of the main kernel says."""
    if (made := decode_plan.plan_of(problem)) is not None:
        return plan.smem_bytes(decode_plan.scratch(problem, made))
    if (made := prefill_plan.plan_of(problem)) is not None:
        return plan.smem_bytes(prefill_plan.scratch(problem, made))
    return plan.smem_bytes(plan.scratch(problem, plan.make_plan(problem)))


IDS = lambda row: "-".join(str(value) for value in row[:4]).replace(" ", "") + f"-{row[5]}"


@pytest.mark.parametrize("row", PAIRWISE + WIDE, ids=IDS)
def test_attention_compiles(row):
    assert_compiles(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", list(itertools.product(*AXES.values())), ids=IDS)
def test_attention_compiles_in_every_combination(row):
    assert_compiles(row)


@pytest.mark.parametrize(
    "row",
    [next(r for r in PAIRWISE if (r[5] is None) == is_decode) for is_decode in (0, 1)],
    ids=["ragged", "decode"],
)
def test_the_plan_weighs_shared_memory_as_the_compiler_does(row):
    """To the byte; and the products are those of the tensor core, the copies those of the TMA."""
    planned, kernel = assert_compiles(row, is_detailed=True)
    assert kernel.smem_bytes == planned
    if kernel.ops is not None:  # nvdisasm is there
        assert kernel.ops["HGMMA"] > 0
        assert kernel.ops["UTMALDG"] > 0


APPENDS = [(None, 8, 128, "bfloat16"), (1000, 3, 80, "float16"), (40, 5, 96, "float32")]


@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim", "dtype"), APPENDS)
def test_donated_append_compiles_and_copies_no_pool(tokens, kv_heads, head_dim, dtype):
    sizes = steps.Sizes(
        num_kv_heads=kv_heads, group=1, head_dim=head_dim, dtype=dtype, num_blocks=1 << 14
    )
    new, starts, cache = steps.arguments(sizes, tokens)

    def append(cache, new, starts):
        return paged_kv.append_tokens(
            cache, new, new, query_start_loc=starts, layer=1, implementation="mosaic_gpu"
        )

    call = jax.jit(append, donate_argnums=0)
    report = compiler.compile_for("H100", call, cache, new, starts)
    (kernel,) = report.kernels
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    hlo.assert_updated_in_place(report.compiled, sizes.layer_elements)


@pytest.mark.parametrize("name", ["append_64", "append_32k"])
def test_an_append_launches_one_kernel(name):
    """And an SM has enough bytes on their way: a row of keys and one of values per token."""
    report = compile_case(name, "H100")
    (kernel,) = report.kernels
    assert (kernel.spill_stores, kernel.spill_loads, kernel.smem_bytes) == (0, 0, 0)
    tokens_per_block = 2 if name == "append_32k" else 1
    assert kernel.blocks_per_sm * tokens_per_block * 2 * 2048 >= 65536
    assert len(hlo.launches(report.compiled)) == 1


SIZES = steps.Sizes(num_blocks=1 << 14)


@pytest.mark.parametrize("num_tokens", [None, 384], ids=["decode", "prefill"])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_donated_step_over_a_stack_copies_no_pool_on_h100(num_kv_heads, num_tokens):
    """The kernels are chosen for the target, inside a scan over the layers."""
    sizes = dataclasses.replace(SIZES, num_kv_heads=num_kv_heads)
    arguments = steps.arguments(sizes, num_tokens)
    call = jax.jit(steps.model_step, donate_argnums=2)
    report = compiler.compile_for("H100", call, *arguments)
    attends = {"paged_decode", "paged_combine"}  # with the append fused in
    mixed = {"paged_append", "paged_prefill", *attends}
    expected = attends if num_tokens is None else mixed
    assert {kernel.kernel for kernel in report.kernels} == expected
    hlo.assert_updated_in_place(report.compiled, sizes.layer_elements)
    assert report.compiled.memory_analysis().temp_size_in_bytes < sizes.layer_elements // 4
    # kernels, queries and results put in their places, lists of no layer emptied: none is made
    assert len(hlo.launches_per_layer(report.compiled)) <= (10 if num_tokens is None else 18)


@pytest.mark.parametrize(
    ("batch", "max_blocks", "window", "most"),
    [(64, 256, None, 4), (128, 512, None, 5), (256, 64, (100, 0), 5), (1, 8192, None, 3)],
)
def test_a_decode_schedule_takes_five_launches_at_most(batch, max_blocks, window, most):
    """Once per step, for all layers."""
    pool = jax.ShapeDtypeStruct((1 << 14, 16, 8, 128), jnp.bfloat16)
    int32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    cache = paged_kv.PagedKVCache(pool, pool, int32(batch, max_blocks), int32(batch))

    def make_schedule(cache):
        return paged_kv.make_schedule(
            cache, num_query_heads=32, local_window_size=window, implementation="mosaic_gpu"
        )

    report = compiler.compile_for("H100", jax.jit(make_schedule), cache)
    assert len(hlo.launches(report.compiled)) <= most
