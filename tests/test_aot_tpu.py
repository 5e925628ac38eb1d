"""The TPU kernels compile for real chips, and copy no pool: read from libtpu's own HLO."""

import dataclasses
import itertools

import aot_tpu
import hlo
import jax
import jax.numpy as jnp
import pytest
import steps
from pairwise import pairwise_rows

import paged_kv

pytestmark = pytest.mark.aot

VARIANTS = {
    "plain": (),
    "window": (("local_window_size", (100, 0)),),
    "soft_cap": (("logits_soft_cap", 30.0),),
    "alibi": (("alibi", True),),
    "two_sided": (("is_causal", False), ("local_window_size", (7, 5))),
}
AXES = {
    "target": aot_tpu.TARGETS,
    "head_dim": (64, 80, 96, 128, 192, 256),
    "block_size": (16, 32, 64, 128),
    "heads": ((8, 4), (3, 5), (1, 8), (2, 1)),  # kv heads, query heads per kv head
    "dtype": ("bfloat16", "float16", "float32"),
    "variant": tuple(VARIANTS),
    "step": ((None, 8), (384, 4), (24, 8)),  # packed tokens, sequences
}
PAIRWISE = pairwise_rows(AXES, 18)


def case_of(row):
    target, head_dim, block_size, (kv_heads, group), dtype, variant, (tokens, batch) = row
    options = VARIANTS[variant]
    return aot_tpu.Case(
        target, head_dim, block_size, kv_heads, group, dtype, tokens, batch, options
    )


FUSED = "paged_append_and_decode"


def assert_kernels(compiled, others=frozenset({"paged_append"})):
    """One kernel attends, which one is the plan's choice, or two, of which one takes the rows of
    one token; the others are these."""
    kernels = aot_tpu.kernels_of(compiled)
    attend = {"paged_attention", "paged_decode", "paged_prefill"}
    assert len(kernels - others - {"paged_decode"}) <= 1
    assert kernels - others and kernels - others <= attend
    assert kernels >= others


def assert_compiles(row):
    case = case_of(row)
    others = frozenset({"paged_append"} if case.dtype != "float16" else ())
    assert_kernels(aot_tpu.step(case), others)


IDS = lambda row: "-".join(str(value) for value in row).replace(" ", "")


@pytest.mark.parametrize("row", PAIRWISE, ids=IDS)
def test_kernels_compile(row):
    assert_compiles(row)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
@pytest.mark.parametrize("target", AXES["target"])
def test_kernels_compile_in_every_combination(target, head_dim):
    """Of target, head_dim, block_size, heads and dtype; variants and steps take turns."""
    turns = itertools.cycle(itertools.product(AXES["variant"], AXES["step"]))
    for cut in itertools.product(AXES["block_size"], AXES["heads"], AXES["dtype"]):
        assert_compiles((target, head_dim, *cut, *next(turns)))


@pytest.mark.parametrize(
    "tokens, heads, kernels",
    [
        (None, (64, 1), {"paged_attention"}),
        (128, (8, 4), {"paged_attention", "paged_decode"}),
        (384, (8, 4), {"paged_prefill", "paged_decode"}),
    ],
)
def test_kernels_fit_the_smallest_vmem(tokens, heads, kernels):
    """v4 has 16 MiB; 64 kv heads at block size 128 are copied in parts."""
    case = aot_tpu.Case("v4", 128, 128, *heads, "bfloat16", tokens, 4)
    assert aot_tpu.kernels_of(aot_tpu.step(case)) == {*kernels, "paged_append"}


def test_a_table_of_256_sequences_of_a_million_tokens_compiles():
    """64 MiB of table entries, of which a kernel holds two slices at a time."""
    case = aot_tpu.Case("v6e", batch=256, max_blocks_per_seq=1 << 16)
    assert aot_tpu.kernels_of(aot_tpu.step(case)) == {"paged_decode", "paged_append"}


@pytest.mark.parametrize("heads", [(1, 8), (8, 4), (8, 8)])
def test_decode_kernels_fit_the_smallest_vmem(heads):
    case = aot_tpu.Case("v4", 128, 16, *heads)
    assert aot_tpu.kernels_of(aot_tpu.step(case)) == {"paged_decode", "paged_append"}


ONE_KERNEL = [
    ("v5e", 16, (8, 4)),
    ("v6e", 128, (1, 8)),
    ("tpu7x", 128, (8, 4)),
]
ELSEWHERE = [("v4", 16, (8, 4)), ("v4", 128, (1, 8)), ("v5p", 16, (8, 4)), ("v6e", 16, (1, 8))]


@pytest.mark.parametrize(
    "target, block_size, heads",
    [*ONE_KERNEL, *(pytest.param(*row, marks=pytest.mark.slow) for row in ELSEWHERE)],
)
def test_a_decode_step_appends_and_attends_in_one_kernel(target, block_size, heads):
    case = aot_tpu.Case(target, 128, block_size, *heads, num_layers=3, num_blocks=1 << 14)
    compiled = aot_tpu.append_and_attend(case)
    assert aot_tpu.kernels_of(compiled) == {FUSED}
    hlo.assert_updated_in_place(compiled, case.pool_elements)


# More than VMEM holds: a smaller pool may be moved there and back, which is no copy to avoid.
SIZES = steps.Sizes(num_blocks=1 << 16)


@pytest.mark.parametrize(
    "num_kv_heads, num_tokens", [(1, None), (3, None), (8, None), (2, 384), (12, 384)]
)
def test_donated_step_over_a_stack_copies_no_pool_on_v6e(num_kv_heads, num_tokens):
    """The kernels are chosen for the target, and see the pool as it lies in memory."""
    sizes = dataclasses.replace(SIZES, num_kv_heads=num_kv_heads)
    compiled = steps.compile_donated(sizes, num_tokens, aot_tpu.sharding("v6e"))
    if num_tokens is None and num_kv_heads != 3:
        assert aot_tpu.kernels_of(compiled) == {FUSED}
    else:
        assert_kernels(compiled)
    hlo.assert_updated_in_place(compiled, sizes.layer_elements)
    assert compiled.memory_analysis().temp_size_in_bytes < sizes.layer_elements // 4


def test_a_layer_of_decode_makes_no_list():
    """The kernel, the table's entries in the layer, and copies of the loop's own."""
    sizes = dataclasses.replace(SIZES, num_kv_heads=8, head_dim=128)
    query, _, cache = steps.arguments(sizes, sharding=aot_tpu.sharding("v6e"))

    @jax.jit
    def attend(query, cache):
        schedule = paged_kv.make_schedule(cache, num_query_heads=query.shape[1])
        layer = lambda x, i: (paged_kv.paged_attention(x, cache, layer=i, schedule=schedule), None)
        return jax.lax.scan(layer, query, jnp.arange(cache.num_layers))[0]

    compiled = attend.lower(query, cache).compile()
    of_arrays = [i.name for i in hlo.launches_per_layer(compiled) if max(i.sizes) > 1]
    assert len(of_arrays) <= 4, of_arrays


@pytest.mark.parametrize(
    "heads, num_tokens, kernels",
    [
        ((8, 64), None, {FUSED}),
        ((8, 64), 384, {"paged_prefill", "paged_decode", "paged_append"}),
        ((3, 64), None, {"paged_attention", "paged_append"}),
        ((8, 80), None, {"paged_attention", "paged_append"}),
        ((8, 96), None, {"paged_attention", "paged_append"}),
        ((4, 192), 384, {"paged_attention", "paged_append"}),
    ],
)
def test_donated_step_over_a_packed_stack_copies_no_pool_on_v6e(heads, num_tokens, kernels):
    """Pools take the bytes of their tokens, and a step next to nothing besides."""
    num_kv_heads, head_dim = heads
    sizes = dataclasses.replace(
        SIZES, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=32, packed=True
    )
    compiled = steps.compile_donated(sizes, num_tokens, aot_tpu.sharding("v6e"))
    assert aot_tpu.kernels_of(compiled) == kernels
    hlo.assert_updated_in_place(compiled, sizes.layer_elements)
    memory, pools = compiled.memory_analysis(), 2 * 2 * sizes.num_layers * sizes.layer_elements
    assert pools < memory.alias_size_in_bytes <= memory.argument_size_in_bytes < pools + (4 << 20)
    assert memory.temp_size_in_bytes < 8 << 20


@pytest.mark.parametrize("target", aot_tpu.TARGETS)
def test_a_long_append_takes_little_memory_beside_its_pools(target):
    """8192 tokens, in place: both pools are aliased, new tokens are copied from where they are."""
    case = aot_tpu.Case(target, group=1, tokens=8192, batch=4, num_layers=2, num_blocks=1 << 13)
    compiled = aot_tpu.append(case)
    assert aot_tpu.kernels_of(compiled) == {"paged_append"}
    hlo.assert_updated_in_place(compiled, case.pool_elements)
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6


def test_donated_append_to_a_float16_stack_copies_no_pool_on_v6e():
    """By XLA: no kernel can take a float16 pool."""
    case = aot_tpu.Case("v6e", dtype="float16", num_layers=3, num_blocks=1 << 14)
    compiled = aot_tpu.append(case)
    assert not aot_tpu.kernels_of(compiled)
    hlo.assert_updated_in_place(compiled, case.pool_elements)
