"""The TPU attention kernel, in the interpreter, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import steps
from jax.experimental import pallas as pl
from kernel_checks import assert_matches_oracle, covering_forms
from poison import poisoned_cache
from tolerances import tolerance
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv
from paged_kv.kernels.tpu import blocks
from paged_kv.kernels.tpu import plan as plans

pytestmark = pytest.mark.usefixtures("quick_compiles")

BLOCK_SIZES = [16, 32, 64, 128]
FORMS = covering_forms(block_size=BLOCK_SIZES)
PROBLEMS_PER_FORM = 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few blocks, or of parts of one, so that short sequences have many."""
    monkeypatch.setattr(plans, "MAX_TILE_ROWS", 96)


def check(number, mode):
    for seed in range(number, number + PROBLEMS_PER_FORM * problems.NUM_FORMS, problems.NUM_FORMS):
        problem = problems.random_problem(seed, block_size=BLOCK_SIZES)
        with no_races():
            actual = problems.attend(
                problem, implementation="mosaic_tpu", interpret=INTERPRETERS[mode]
            )
            jax.block_until_ready(actual)
        assert_matches_oracle(problem, actual)


@pytest.mark.parametrize("number", FORMS)
def test_random_problems(number):
    """At least 60 problems, each form in one of the two modes."""
    check(number, MODES[number % 2])


def test_random_problems_are_at_least_60():
    assert len(FORMS) * PROBLEMS_PER_FORM >= 60


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(problems.NUM_FORMS))
def test_random_problems_of_every_form_in_both_modes(number, mode):
    check(number, mode)


@pytest.mark.parametrize("number", FORMS[:2])
def test_the_fast_interpreter_agrees(number):
    """`interpret=True` is Pallas's generic interpreter, which knows neither races nor NaN."""
    problem = problems.random_problem(number, block_size=BLOCK_SIZES)
    actual = problems.attend(problem, implementation="mosaic_tpu", interpret=True)
    assert_matches_oracle(problem, actual)


def attend_one(lengths, interpret=INTERPRETERS["on_wait"], sizes=None, **options):
    """A decode step, two query heads per kv head, over a poisoned cache: (problem, result)."""
    sizes = {"num_kv_heads": 1, "head_dim": 64, **(sizes or {})}
    poisoned = poisoned_cache(np.random.default_rng(5), lengths, **sizes)
    form = problems.plain_form("float32", **options)
    heads = 2 * sizes["num_kv_heads"]
    query = np.random.default_rng(6).standard_normal((len(lengths), heads, sizes["head_dim"]))
    query = jnp.asarray(query, jnp.float32)
    problem = problems.Problem("one", form, query, poisoned, None, None, None, None)
    options = {**form.static_options, "implementation": "mosaic_tpu", "interpret": interpret}
    call = lambda query, cache: paged_kv.paged_attention(
        query, cache, return_residual=True, **options
    )
    return problem, jax.jit(call)(query, problem.cache)


def test_a_row_of_the_table_longer_than_a_window(monkeypatch):
    """2,100 tokens are 132 blocks: the second slice of the table is used, and the third row's."""
    monkeypatch.setattr(plans, "MAX_TILE_ROWS", 512)
    assert_matches_oracle(*attend_one([2100, 1, 2064]))


def test_a_window_starts_in_the_second_slice_of_the_table():
    """Blocks that the window has passed are given back; their entries are wild."""
    sizes = {"first_kept": [2990, 0, 2000]}
    problem, actual = attend_one([3000, 5, 2010], sizes=sizes, local_window_size=(9, 0))
    assert_matches_oracle(problem, actual)


def test_a_batch_of_empty_sequences():
    _, (out, lse) = attend_one([0, 0, 0])
    assert not np.asarray(out).any()
    assert np.all(np.asarray(lse) == -np.inf)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_parts_of_a_block(monkeypatch, num_kv_heads):
    """Three heads at head_dim 128 lie head by head in memory, and parts are then of heads."""
    monkeypatch.setattr(plans, "MAX_TILE_ROWS", 128 if num_kv_heads == 3 else 64)
    sizes = {"block_size": 128, "num_kv_heads": num_kv_heads, "head_dim": 128}
    assert_matches_oracle(*attend_one([200, 127, 128, 1], sizes=sizes))


def test_a_missing_wait_for_values_shows(monkeypatch):
    """The interpreter can fail: without the waits, what is multiplied is NaN.

    No other test has these shapes: a program is cached by them.
    """
    monkeypatch.setattr(blocks.TileCopies, "wait", lambda self, i: None)
    _, (out, _) = attend_one([40, 17], sizes={"block_size": 32})
    assert np.isnan(np.asarray(out)).any()


def test_scan_over_a_donated_stack_matches_the_reference():
    """Append and attend in every layer, the layer traced, as a model does."""
    arguments = steps.ragged_arguments("float32")
    results = []
    for options in ({"implementation": "xla"}, {"implementation": "mosaic_tpu", "interpret": True}):
        step = jax.jit(functools.partial(steps.model_step, **options))
        out, cache = step(*arguments)
        results.append((out, cache.key_pool, cache.value_pool))
    np.testing.assert_allclose(results[0][0], results[1][0], **tolerance("model float32"))
    for reference, kernel in zip(results[0][1:], results[1][1:], strict=True):
        np.testing.assert_allclose(reference, kernel, **tolerance("model float32"))


def test_float16_bits_become_their_numbers():
    """All 65,536 of them."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.int16).reshape(512, 128)

    def kernel(x, out):
        out[...] = blocks.float16_numbers(x[...])

    shape = jax.ShapeDtypeStruct(bits.shape, jnp.float32)
    actual = pl.pallas_call(kernel, out_shape=shape, interpret=True)(jnp.asarray(bits))
    np.testing.assert_array_equal(actual, bits.view(np.float16).astype(np.float32))
