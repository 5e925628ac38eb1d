"""The TPU prefill kernel, in the interpreter, against the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from poison import poisoned_cache
from tolerances import of_output, tolerance
from tpu_interpreter import INTERPRETERS, no_races

from paged_kv.kernels.core.problem import CacheShape, Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.tpu import attention, device, prefill
from paged_kv.kernels.tpu import plan as tpu_plans
from paged_kv.kernels.tpu import prefill_plan as plans

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL_CHIP = plans.Chip(device.LEAST_VMEM_BYTES, False)
# lengths and query tokens: chunks behind contexts, whole prompts, a decode row, an empty sequence
LENGTHS = (300, 0, 130, 40, 257)
QUERIES = (70, 0, 20, 40, 1)
SIZES = {"num_layers": None, "num_kv_heads": 2, "group": 4, "head_dim": 128, "block_size": 16}
STACK = {"num_layers": 3, "query_dtype": "float32", "scale": -0.2}
VARIANTS = {
    "window_in_a_stack": {"local_window_size": (40, 0), **STACK},
    "both_sides_capped": {
        "local_window_size": (150, 9), "is_causal": False, "logits_soft_cap": 2.5,
    },
    "all_keys_with_slopes": {
        "is_causal": False, "has_slopes": True, "scale": 0.25, "group": 3, "block_size": 32,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Items in groups of two, and tiles of two short parts, so that there are several of each."""
    monkeypatch.setattr(attention, "single_tokens", lambda problem: None)  # all by the one kernel
    monkeypatch.setattr(plans, "MIN_TOKENS", 1)
    monkeypatch.setattr(plans, "ITEM_ROWS", 128)
    monkeypatch.setattr(plans, "PART_KEYS", 128)
    monkeypatch.setattr(plans, "TILE_PARTS", 2)
    monkeypatch.setattr(plans, "GROUP_ITEMS", 2)
    monkeypatch.setattr(plans, "_row_blocks", lambda problem: [2])
    jax.clear_caches()


def make_problem(lengths=LENGTHS, queries=QUERIES, padding=5, **options):
    form = problems.plain_form("bfloat16", **{"kind": "chunked_prefill", **SIZES, **options})
    rng = np.random.default_rng(3)
    first_kept = problems.first_keys_seen(
        np.array(lengths), np.array(queries), form.local_window_size
    )
    poisoned = poisoned_cache(
        rng,
        lengths,
        block_size=form.block_size,
        num_kv_heads=form.num_kv_heads,
        head_dim=form.head_dim,
        dtype=jnp.dtype(form.pool_dtype),
        num_layers=form.num_layers,
        first_kept=first_kept,
    )
    heads = form.num_query_heads
    query = rng.standard_normal((sum(queries) + padding, heads, form.head_dim))
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    return problems.Problem(
        name="prefill",
        form=form,
        query=jnp.asarray(query, form.query_dtype),
        poisoned=poisoned,
        query_start_loc=jnp.asarray(starts),
        layer=None if form.num_layers is None else jnp.int32(1),
        sinks=None,
        alibi_slopes=jnp.asarray(rng.random(heads), jnp.float32) if form.has_slopes else None,
    )


def check(problem, interpret, lse_row="kernel lse"):
    out, lse = problems.attend(problem, implementation="mosaic_tpu", interpret=interpret)
    jax.block_until_ready(out)
    expected_out, expected_lse = problem.expected()
    assert (out.dtype, lse.dtype) == (problem.query.dtype, jnp.float32)
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose(out, expected_out, **of_output("kernel", "bfloat16"))
    np.testing.assert_allclose(lse, expected_lse, **tolerance(lse_row))


def test_causal_attention_and_no_query_at_all():
    problem = make_problem()
    check(problem, True, "kernel float32")  # its sums are exact, where made by lanes
    starts = jnp.zeros_like(problem.query_start_loc)
    padding = dataclasses.replace(problem, query_start_loc=starts)
    out, lse = problems.attend(padding, implementation="mosaic_tpu", interpret=True)
    assert not np.asarray(out, np.float32).any()
    assert np.all(np.asarray(lse) == -np.inf)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    check(make_problem(**VARIANTS[variant]), True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", INTERPRETERS)
def test_copies_and_buffers(mode):
    """The strict interpreter: no race, and nothing read before it is there."""
    with no_races():
        check(make_problem((300, 0, 20), (40, 0, 20)), INTERPRETERS[mode])


def test_a_program_with_few_tokens_leaves_groups_out():
    """Its full tiles still follow each other, and keys of the next are ready in time."""
    check(make_problem((600,), (20,)), True)


@pytest.mark.parametrize("num_kv_heads", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_heads(num_kv_heads, monkeypatch):
    # one head: a program of two items, whose keys cannot be ahead of their values
    monkeypatch.setattr(plans, "_row_blocks", lambda problem: [2 if num_kv_heads == 1 else 1])
    check(make_problem(num_kv_heads=num_kv_heads, group=2), True)


def test_a_wide_matrix_unit_and_parts_left_out_by_half(monkeypatch):
    """It sums weights; stripes that see the former half of a part lie between others."""
    monkeypatch.setattr(device, "LEAST_MATRIX_UNIT", 256)
    monkeypatch.setattr(plans, "PART_KEYS", 256)
    monkeypatch.setattr(plans, "TILE_PARTS", 1)
    monkeypatch.setattr(plans, "PART_GROUP_ITEMS", 2)
    check(make_problem((300, 0, 330, 40, 257), (70, 0, 80, 40, 1)), True)


def test_values_that_are_not_finite_stay_in_their_sequence(monkeypatch):
    """Nor does one behind it, with a wild used entry, see any key; the others are as before."""
    monkeypatch.setattr(device, "LEAST_MATRIX_UNIT", 256)
    problem = make_problem()
    cache, first = problem.cache, problem.cache.block_table[0, 0]
    table = cache.block_table.at[2, 1].set(2**30)
    values = cache.value_pool.at[first].set(np.nan)
    cache = dataclasses.replace(cache, block_table=table, value_pool=values)
    poisoned = dataclasses.replace(problem.poisoned, cache=cache)
    wild = dataclasses.replace(problem, poisoned=poisoned)
    out, lse = problems.attend(wild, implementation="mosaic_tpu", interpret=True)
    out, lse = np.asarray(out, np.float64), np.asarray(lse)
    expected_out, expected_lse = problem.expected()
    spoilt, empty = (slice(*problem.query_start_loc[i : i + 2]) for i in (0, 2))
    assert np.isnan(out[spoilt]).all()
    assert not out[empty].any() and np.all(lse[empty] == -np.inf)
    others = np.delete(np.arange(len(out)), np.r_[spoilt, empty])
    np.testing.assert_allclose(out[others], expected_out[others], **of_output("kernel", "bfloat16"))
    np.testing.assert_allclose(lse[others], expected_lse[others], **tolerance("kernel lse"))


def problem_of(**fields):
    cache = dict(
        num_layers=1, num_blocks=4096, block_size=16, num_kv_heads=8, head_dim=128,
        dtype="bfloat16", batch=1, max_blocks_per_seq=256,
    )  # fmt: skip
    cache |= {name: fields.pop(name) for name in list(fields) if name in cache}
    call = {"num_tokens": 4096, "num_query_heads": 32, "query_dtype": "bfloat16", "is_packed": True}
    return Problem(CacheShape(**cache), **{**call, **fields}, variant=Variant(128**-0.5))


@pytest.mark.parametrize(
    "fields",
    [
        {"is_packed": False},
        {"dtype": "float32"},
        {"head_dim": 64},
        {"num_kv_heads": 3, "num_query_heads": 9},
        {"block_size": 48},
        {"num_tokens": 128, "batch": 128},
    ],
)
def test_other_problems_are_left_to_the_generic_kernel(monkeypatch, fields):
    monkeypatch.undo()
    assert plans.plan_prefill(problem_of(), SMALL_CHIP) is not None
    assert plans.plan_prefill(problem_of(**fields), SMALL_CHIP) is None


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("megabytes", [16, 64, 128])
def test_a_plan_fits_its_chip(monkeypatch, num_kv_heads, megabytes):
    monkeypatch.undo()
    problem = problem_of(num_kv_heads=num_kv_heads)
    plan = plans.plan_prefill(problem, plans.Chip(megabytes << 20, True))
    assert plan is not None
    assert tpu_plans.vmem_bytes(plans.prefill_buffers(problem, plan)) < megabytes << 20


@pytest.mark.parametrize("megabytes", [16, 64, 128])
def test_a_share_of_a_tile_has_whole_blocks(monkeypatch, megabytes):
    monkeypatch.undo()
    for block_size in (16, 32, 64, 128, 256):
        problem = problem_of(block_size=block_size, max_blocks_per_seq=4096 // block_size)
        plan = plans.plan_prefill(problem, plans.Chip(megabytes << 20, True))
        assert plan is not None and plan.share_blocks * block_size == plan.share_keys > 0


def test_a_chip_out_of_sight_is_the_smallest():
    assert prefill.plan_of(problem_of()).vmem_limit < device.LEAST_VMEM_BYTES
