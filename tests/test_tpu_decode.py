"""The TPU decode kernel, in the interpreter, against the float64 oracle."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from poison import poisoned_cache
from tolerances import of_output, tolerance
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv
from paged_kv.kernels.core import problem as kernel_problems
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.tpu import decode_copies
from paged_kv.kernels.tpu import decode_plan as plans

pytestmark = pytest.mark.usefixtures("quick_compiles")

BLOCK = 16
EDGES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1)


@contextlib.contextmanager
def plan_limits(**limits):
    """Tiles of a few blocks, so that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(plans, name, value)
        jax.clear_caches()
        yield


def decode_problem(lengths, heads=(8, 4), seed=0, options=None, **cache):
    """A decode step in bfloat16 at head_dim 128 over a poisoned cache."""
    rng = np.random.default_rng(seed)
    cache = {"block_size": BLOCK, "dtype": jnp.bfloat16, "head_dim": 128} | cache
    poisoned = poisoned_cache(rng, lengths, num_kv_heads=heads[1], **cache)
    form = problems.plain_form("bfloat16", **(options or {}))
    query = rng.standard_normal((len(lengths), heads[0], 128))
    slopes = jnp.asarray(rng.random(heads[0]), jnp.float32) if form.has_slopes else None
    layer = None if poisoned.cache.key_pool.ndim == 4 else jnp.int32(1)
    query = jnp.asarray(query, form.query_dtype)
    return problems.Problem("decode", form, query, poisoned, None, layer, None, slopes)


def attend(problem, mode):
    with no_races():
        actual = problems.attend(problem, implementation="mosaic_tpu", interpret=INTERPRETERS[mode])
        return jax.block_until_ready(actual)


def assert_matches_oracle(problem, actual):
    (out, lse), (expected_out, expected_lse) = actual, problem.expected()
    assert (out.dtype, lse.dtype) == (problem.query.dtype, jnp.float32)
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose(out, expected_out, **of_output("kernel", "bfloat16"))
    row = "kernel float32" if problem.form.query_dtype == "bfloat16" else "kernel lse"
    np.testing.assert_allclose(lse, expected_lse, **tolerance(row))


CASES = {
    # what it is, lengths, heads, limits of the plan, more
    "ragged": ((*EDGES, 130, 64), (8, 4), {}, {}),
    "two_rows_a_step": (
        (0, 64, *EDGES, 64, 64, 64, 64, 40),
        (8, 4),
        {"STEP_ROWS": 512},
        {"max_blocks_per_seq": 4},
    ),
    "one_kv_head": ((*EDGES, 300, 256, 192), (8, 1), {}, {}),
    "one_step": ((40, 17, 0, 64), (8, 4), {"STEP_ROWS": 1024}, {}),
    "one_full_step": (
        (64, 64),
        (8, 4),
        {"STEP_ROWS": 1024},
        {"max_blocks_per_seq": 4, "options": {"is_causal": False}},
    ),
    "two_programs": (
        (5, 0, 0, 40, 17, 64, 1, 0, 0, 33, 130),
        (8, 2),
        {"QUERY_BYTES": 1},
        {
            "num_layers": 3,
            "options": {"logits_soft_cap": 2.5, "has_slopes": True, "local_window_size": (80, 3)},
        },
    ),
    # three chunks of a tile, sums pass through memory
    "many_heads": (
        (160, 17, 256),
        (40, 8),
        {"MAX_TILE_ROWS": 1024, "STEP_ROWS": 1024, "LONG_CHUNK_ROWS": 256},
        {},
    ),
    "many_kv_heads": ((17, 0, 40), (32, 32), {"MAX_TILE_ROWS": 512}, {}),
    "window_with_filled_heads": (
        (200, 5, 90, 17, 64),
        (6, 2),
        {},
        {
            "first_kept": (159, 0, 49, 0, 23),
            "options": {"local_window_size": (40, 0), "query_dtype": "float32"},
        },
    ),
    "itself_alone": ((33, 0, 1), (8, 4), {}, {"options": {"local_window_size": 0}}),
}


IN_BOTH_MODES = ("ragged", "one_kv_head")
IN_ONE_MODE = [name for name in CASES if name not in IN_BOTH_MODES]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IN_ONE_MODE)
def test_against_the_oracle(name):
    check(name, MODES[IN_ONE_MODE.index(name) % 2])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_a_ragged_batch_and_one_of_empty_sequences(mode):
    check("ragged", mode, emptied)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_lie_anywhere_and_in_runs(mode):
    check("one_kv_head", mode, in_runs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_both_modes(name, mode):
    check(name, mode)


def check(name, mode, *changes):
    """The case, and what each of `changes` makes of it, by one program."""
    lengths, heads, limits, cache = CASES[name]
    limits = {"MAX_TILE_ROWS": 256, "STEP_ROWS": 256, "SMALL_STEP_ROWS": 256} | limits
    problem = decode_problem(lengths, heads, **cache)
    with plan_limits(**limits):
        for each in (problem, *(change(problem) for change in changes)):
            assert_matches_oracle(each, attend(each, mode))


def test_interpret_true_runs_it():
    """JAX's interpreter of all backends would not: it knows no copies of traced sizes."""
    problem = decode_problem((33, 16), (2, 1))
    actual = problems.attend(problem, implementation="mosaic_tpu", interpret=True)
    assert_matches_oracle(problem, actual)


def in_runs(problem):
    """The same problem with every sequence's blocks in order, one after the other."""
    cache = problem.cache
    table, size = np.array(cache.block_table), cache.block_size
    used = np.arange(table.shape[1]) < -(-problem.lengths[:, None] // size)
    old = table[used]
    rest = np.setdiff1d(np.arange(cache.num_blocks), old)
    table[used] = np.arange(len(old))
    order = jnp.asarray(np.concatenate([old, rest]))
    pools = cache.key_pool[order], cache.value_pool[order]
    ordered = paged_kv.PagedKVCache(*pools, jnp.asarray(table), cache.seq_lengths)
    poisoned = dataclasses.replace(problem.poisoned, cache=ordered)
    return dataclasses.replace(problem, poisoned=poisoned)


def emptied(problem):
    """The same problem without a token in any sequence."""
    cache = dataclasses.replace(problem.cache, seq_lengths=jnp.zeros_like(problem.lengths))
    keys, values = ([x[:0] for x in tokens] for tokens in problem.poisoned.dense())
    poisoned = dataclasses.replace(problem.poisoned, cache=cache, keys=keys, values=values)
    return dataclasses.replace(problem, poisoned=poisoned)


@pytest.mark.timeout(300)
def test_a_missing_wait_shows(monkeypatch):
    """The interpreter can fail: without waits for blocks, what is multiplied is NaN."""
    monkeypatch.setattr(decode_copies.Copies, "wait", lambda *_: None)
    options = {"implementation": "mosaic_tpu", "interpret": INTERPRETERS["on_wait"]}
    with plan_limits(MAX_TILE_ROWS=256, STEP_ROWS=256):
        out, _ = problems.attend(decode_problem((100, 64)), **options)
    assert np.isnan(np.asarray(out, np.float32)).any()


def plan_of(vmem=128 << 20, heads=(32, 8), block_size=16, columns=512, **cache):
    cache = {
        "num_layers": 1, "num_blocks": 64, "block_size": block_size, "num_kv_heads": heads[1],
        "head_dim": 128, "dtype": "bfloat16", "batch": 64, "max_blocks_per_seq": columns,
    } | cache  # fmt: skip
    shape = kernel_problems.CacheShape(**cache)
    problem = kernel_problems.Problem(shape, shape.batch, heads[0], "bfloat16", False, Variant(0.1))
    return problem, plans.plan_decode(problem, vmem)


@pytest.mark.parametrize("vmem", [16 << 20, 64 << 20, 128 << 20])
@pytest.mark.parametrize("heads", [(32, 8), (8, 1), (64, 8), (16, 2), (28, 4), (32, 32)])
@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
@pytest.mark.parametrize("columns", [1, 8, 512, 65536])
def test_every_plan_fits(vmem, heads, block_size, columns):
    problem, plan = plan_of(vmem, heads, block_size, columns)
    assert plan is not None
    assert plans.vmem_limit(problem, plan) <= vmem
    assert plan.columns % plan.slice_entries == 0
    assert plan.slice_entries % plan.blocks_per_tile == 0
    assert plan.tile_rows % plan.chunk_rows == 0


@pytest.mark.parametrize(
    "other", [{"head_dim": 64}, {"dtype": "float32"}, {"num_kv_heads": 3}, {"block_size": 5}]
)
def test_shapes_that_are_left_to_the_ragged_kernel(other):
    heads = (24, other.get("num_kv_heads", 1))
    assert plan_of(heads=heads, **other)[1] is None
