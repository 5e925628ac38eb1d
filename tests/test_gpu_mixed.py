"""Mixed batches on GPU: single query tokens through decode, the others through prefill."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import NEEDS_JAX
from kernel_checks import assert_matches_oracle
from test_gpu_attention import attend_with_a_schedule, one_problem

import paged_kv
from paged_kv.kernels.core import schedule
from paged_kv.kernels.core.problem import CacheShape, Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import prefill_list, prefill_plan, worklist
from paged_kv.kernels.gpu.prefill_list import Item

CACHE = CacheShape(1, 64, 16, 2, 128, "bfloat16", 4, 32)
# two kernels in the interpreter
TIME_LIMIT = pytest.mark.timeout(240, method="thread")


def kernels_of(num_tokens, cache=CACHE):
    """Names of the kernels of a packed batch."""
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    pool = jax.ShapeDtypeStruct(cache.pool_shape[1:], cache.dtype)
    paged = paged_kv.PagedKVCache(
        pool, pool, int32(cache.batch, cache.max_blocks_per_seq), int32(cache.batch)
    )

    def call(query, paged, starts):
        return paged_kv.paged_attention(
            query, paged, query_start_loc=starts, implementation="mosaic_gpu"
        )

    query = jax.ShapeDtypeStruct((num_tokens, 8, cache.head_dim), cache.dtype)
    text = str(jax.make_jaxpr(call)(query, paged, int32(cache.batch + 1)))
    names = ("paged_prefill", "paged_decode", "paged_combine", "paged_attention")
    return {name for name in names if name in text}


@NEEDS_JAX
def test_long_chunks_and_short_batches_are_not_mixed():
    """Where a single token would be a small part of the work, the launches cost more."""
    assert kernels_of(256) >= {"paged_prefill", "paged_decode", "paged_combine"}
    assert "paged_decode" not in kernels_of(640 * CACHE.batch)
    assert kernels_of(63 * CACHE.batch) == {"paged_attention"}


@NEEDS_JAX
def test_many_kv_heads_take_shorter_chunks():
    """The kernel that multiplies with all of them at once does more then."""
    many = replace(CACHE, num_kv_heads=8)
    assert "paged_prefill" in kernels_of(16 * CACHE.batch, many)
    assert kernels_of(16 * CACHE.batch - 1, many) == {"paged_attention"}
    assert kernels_of(63, replace(many, batch=1)) == {"paged_attention"}  # less than a tile


def test_prefill_has_no_tiles_of_sequences_apart():
    starts = np.int32([0, 1, 130, 131, 200])
    is_apart = np.array([True, False, True, False])
    variant = Variant(1.0)
    made_for = schedule.MadeFor.of(CACHE, 8, True, variant)
    step = schedule.Schedule(
        jnp.full(4, 300, jnp.int32), jnp.asarray(starts), made_for, is_apart=jnp.asarray(is_apart)
    )
    cut = prefill_plan.plan_of(Problem(CACHE, 256, 8, "bfloat16", True, variant)).cut
    made = prefill_list.make(cut, variant, step)
    rows = []
    for row in np.asarray(made.items)[: int(made.num_items[0])].tolist():
        item = Item(*row)
        base = item.row_group * prefill_plan.ROW_GROUP
        rows += range(base + item.row_start, base + item.row_stop)
    assert sorted(rows) == [row for row in range(256) if row not in (0, 130)]


@NEEDS_JAX
@TIME_LIMIT
@pytest.mark.usefixtures("quick_compiles")
def test_a_mixed_batch_takes_the_lists_of_its_schedule(mutate):
    """One token alone, none, a chunk, and padding."""
    problem = one_problem([40, 150], [1, 129], block_size=32)
    makers = [worklist, prefill_list]
    assert_matches_oracle(problem, attend_with_a_schedule(problem, mutate, makers))
