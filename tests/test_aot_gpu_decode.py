"""Decode and append as benchmarks/cases.py has them, and decode of any shape, for Hopper."""

import hlo
import jax
import pytest
import steps
from pairwise import pairwise_rows
from test_aot_gpu import ALL_AT_ONCE, IDS, assert_compiles, problem_of
from test_aot_gpu import pytestmark as pytestmark

import paged_kv
from benchmarks import cases
from benchmarks.workload import APPEND
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import decode_plan, plan
from tools.gpu_compile import compiler
from tools.gpu_compile.__main__ import compile_case

BFLOAT16, FLOAT16 = ("bfloat16", "bfloat16"), ("float16", "float32")  # of pools, of the query
PLAIN = Variant(1.0)
AXES = {
    "head_dim": plan.HEAD_DIMS,
    "block_size": (8, 16, 32, 64, 128),
    # kv heads, query heads per kv head: MQA to MHA, groups of 1 to 64, one and two warpgroups' rows
    "heads": (
        *((1, 1), (1, 8), (1, 40), (1, 64), (1, 128), (2, 64), (4, 16), (3, 5)),
        *((8, 4), (8, 1), (32, 1), (64, 1), (66, 1)),
    ),
    "dtypes": (BFLOAT16, FLOAT16),
    "variant": (
        PLAIN,
        Variant(1.0, window=(127, 0)),
        Variant(1.0, is_causal=False, window=(7, 5)),
        Variant(1.0, logits_soft_cap=30.0),
        Variant(1.0, has_alibi=True),
        ALL_AT_ONCE,
    ),
    "tokens": (None,),
}
# a producer of many small blocks, or of wide ones beside one consumer, once had too few registers
SPILLED_ONCE = [
    (64, 16, (1, 8), BFLOAT16, PLAIN, None),
    (80, 8, (3, 5), BFLOAT16, PLAIN, None),
    (256, 16, (1, 64), BFLOAT16, PLAIN, None),
]


@pytest.mark.parametrize("row", SPILLED_ONCE, ids=IDS)
def test_decode_compiles_where_it_once_spilled(row):
    assert_compiles(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise_rows(AXES, 90), ids=IDS)
def test_decode_of_any_shape_compiles(row):
    """Every pair of values of the table meets."""
    assert_compiles(row)


def is_taken(case):
    """One token per sequence, or append, in a dtype that has a kernel."""
    is_decode = case.query_lengths is None and case.dtype in plan.DTYPES
    return is_decode or case.op == APPEND


TABLE = [case.name for case in cases.CASES.values() if is_taken(case)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_case_compiles_without_spills_and_fits_an_sm(name):
    kernels = compile_case(name, "H100").kernels
    assert kernels
    for kernel in kernels:
        assert kernel.target == "sm_90a"
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
        assert kernel.smem_bytes is not None
        assert kernel.smem_bytes <= plan.SMEM_BYTES
        assert kernel.blocks_per_sm


@pytest.mark.timeout(100)
def test_a_score_is_scaled_and_compared_by_one_instruction():
    """A multiple of a dot product, in the exponent: of 32 per thread and loop, no other sum.

    One kv head in whole tiles: without a mask, values that no one read once had layouts that the
    compiler searched for without end.
    """
    kernels = compile_case("70btp8_b64_8k_block64", "H100").kernels
    ops = {kernel.kernel: kernel for kernel in kernels}["paged_decode"].ops
    assert ops is None or ops["FFMA"] - ops["FADD"] >= 32


SIZES = steps.Sizes(num_kv_heads=8, group=4, head_dim=128, num_blocks=1 << 14)


def compile_step(sizes, *, is_fused):
    """A decode step of one layer, appended and attended over at once or in turn."""
    query, _, cache = steps.arguments(sizes)
    new = jax.ShapeDtypeStruct((sizes.batch, sizes.num_kv_heads, sizes.head_dim), sizes.dtype)

    def step(cache, query, new):
        options = {"layer": 1, "implementation": "mosaic_gpu"}
        if is_fused:
            return paged_kv.append_and_attend(query, new, new, cache, **options)
        cache = paged_kv.append_tokens(cache, new, new, **options)
        return paged_kv.paged_attention(query, cache, **options), cache

    return compiler.compile_for("H100", jax.jit(step, donate_argnums=0), cache, query, new)


def test_a_fused_step_launches_one_kernel_less_and_copies_no_pool():
    fused, in_turn = (compile_step(SIZES, is_fused=is_fused) for is_fused in (True, False))
    assert {kernel.kernel for kernel in fused.kernels} == {"paged_decode", "paged_combine"}
    assert all(kernel.spill_stores == kernel.spill_loads == 0 for kernel in fused.kernels)
    counts = [len(hlo.launches(report.compiled)) for report in (fused, in_turn)]
    assert counts[0] == counts[1] - 1
    assert counts[0] == 4 + 2  # those of the schedule, and both kernels
    hlo.assert_updated_in_place(fused.compiled, SIZES.layer_elements)


@pytest.mark.slow
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 8), (2, 4), (8, 4), (32, 1), (66, 1)])
@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
def test_a_step_compiles_without_spills(head_dim, num_kv_heads, group):
    """Fused where the plan of that fits, and where no decode plan does by the ragged kernel."""
    heads = {"num_kv_heads": num_kv_heads, "group": group}
    sizes = steps.Sizes(**heads, head_dim=head_dim, num_blocks=1 << 14)
    report = compile_step(sizes, is_fused=True)
    names = {kernel.kernel for kernel in report.kernels}
    assert {"paged_decode", "paged_combine"} <= names or "paged_attention" in names
    assert all(kernel.spill_stores == kernel.spill_loads == 0 for kernel in report.kernels)


def test_a_step_is_not_fused_where_the_producer_has_no_register_left():
    problem = problem_of((64, 16, (1, 8), BFLOAT16, PLAIN, None))
    assert decode_plan.plan_of(problem) is not None
    assert decode_plan.plan_of(problem, appends=True) is None
