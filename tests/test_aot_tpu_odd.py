"""Odd problems compile for every generation of TPU: a tile that does not fit gets smaller."""

import random

import aot_tpu
import jax
import pytest

import paged_kv

pytestmark = [pytest.mark.aot, pytest.mark.slow, pytest.mark.timeout(600)]

AXES = {
    "head_dim": (64, 80, 96, 128, 128, 128, 192, 256),
    "block_size": (16, 32, 64, 128),
    # kv heads, query heads per kv head
    "heads": ((1, 1), (1, 128), (2, 20), (3, 5), (4, 7), (5, 3), (8, 8), (16, 1), (32, 4), (64, 1)),
    "dtype": ("bfloat16", "bfloat16", "float32", "float16"),
    "batch": (1, 2, 7, 33, 256),
    "max_blocks_per_seq": (1, 3, 129, 1 << 16),
    "tokens": (None, None, 1, 300, 5000),  # of a packed step
}
PER_TARGET = 12


def odd_cases(target):
    """`PER_TARGET` problems, and the largest table that there is."""
    draw = random.Random(target)
    for _ in range(PER_TARGET):
        picked = {name: draw.choice(values) for name, values in AXES.items()}
        kv_heads, group = picked.pop("heads")
        yield aot_tpu.Case(target, num_kv_heads=kv_heads, group=group, num_blocks=64, **picked)
    yield aot_tpu.Case(target, batch=256, max_blocks_per_seq=1 << 16, tokens=300)


CASES = [case for target in aot_tpu.TOPOLOGIES for case in odd_cases(target)]


def name(case):
    parts = case.target, f"{case.num_kv_heads}x{case.group}", case.head_dim, case.block_size
    rest = case.dtype, case.tokens, case.batch, case.max_blocks_per_seq
    return "-".join(map(str, parts + rest))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_an_odd_problem_compiles(case):
    def run(cache, query, new, starts):
        return paged_kv.append_and_attend(query, new, new, cache, query_start_loc=starts)

    arrays = case.packed(case.num_kv_heads * case.group), case.packed(case.num_kv_heads)
    compiled = jax.jit(run, donate_argnums=0).lower(case.cache, *arrays, case.starts).compile()
    memory = compiled.memory_analysis()
    pools = 2 * case.pool_elements * (4 if case.dtype == "float32" else 2)
    assert memory.alias_size_in_bytes >= pools
