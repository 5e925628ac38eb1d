"""Packed pools through the TPU kernels, in the interpreter, against the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from kernel_checks import AppendForm, appended, assert_matches_oracle, random_append
from poison import poisoned_cache
from problems import NUM_FORMS, attend, random_problem
from tolerances import of_output, tolerance
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv
from paged_kv import interop, validate
from paged_kv.kernels.core.problem import Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.tpu import decode_plan, prefill_plan
from paged_kv.kernels.tpu import plan as plans
from paged_kv.kernels.tpu.attention import can_append

# two kv heads a row: the kernels see 1, 2 and 3 heads of 128
HEADS = {"head_dim": 64, "num_kv_heads": [2, 4, 6], "block_size": [16, 32], "max_length": 70}
DECODE = {"kind": "decode", "pool_dtype": "bfloat16", "num_kv_heads": [2, 4], "block_size": 16}
PREFILL = {
    "kind": "chunked_prefill", "pool_dtype": "bfloat16", "num_kv_heads": [2, 4], "num_tokens": 80,
}  # fmt: skip
APART = {"head_dim": [80, 96, 192], "num_kv_heads": 8, "block_size": 16, "max_length": 70}
SHARED = {"head_dim": [64, 80], "num_kv_heads": [1, 2], "block_size": 128, "max_length": 150}
SLOW = pytest.mark.slow
CASES = [
    pytest.param(
        2,
        {**SHARED, "head_dim": 80, "num_kv_heads": 2, "block_size": 64},
        id="across_rows_of_four_tokens",
    ),
    pytest.param(24, {**APART, "num_tokens": 16}, id="across_rows", marks=SLOW),
    pytest.param(
        2, {**SHARED, "head_dim": 64, "num_kv_heads": 3}, id="rows_of_two_tokens", marks=SLOW
    ),
    pytest.param(10, {**HEADS, **DECODE}, id="decode_kernel", marks=SLOW),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Short sequences then have many tiles."""
    monkeypatch.setattr(plans, "MAX_TILE_ROWS", 768)
    monkeypatch.setattr(decode_plan, "MAX_TILE_ROWS", 128)
    for name, value in {
        "MIN_TOKENS": 1,
        "ITEM_ROWS": 128,
        "PART_KEYS": 128,
        "MAX_ITEMS": 2,
    }.items():
        monkeypatch.setattr(prefill_plan, name, value)
    jax.clear_caches()


def packed_problem(seed, constraints):
    problem = random_problem(seed, **constraints)
    cache = interop.pack(problem.cache)
    return dataclasses.replace(problem, poisoned=dataclasses.replace(problem.poisoned, cache=cache))


def check(seed, constraints, mode):
    problem = packed_problem(seed, constraints)
    with no_races():
        actual = attend(problem, implementation="mosaic_tpu", interpret=INTERPRETERS[mode])
        jax.block_until_ready(actual)
    assert_matches_oracle(problem, actual)


@pytest.mark.parametrize("seed, constraints", CASES)
def test_packed_problems(seed, constraints):
    check(seed, constraints, MODES[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "constraints",
    [HEADS, {**HEADS, **DECODE}, {**HEADS, **PREFILL}, APART, SHARED],
    ids=["any", "decode", "prefill", "apart", "shared"],
)
@pytest.mark.parametrize("number", range(NUM_FORMS))
def test_packed_problems_of_every_form(number, constraints, mode):
    # at head_dim 192 a scale of 0.25 makes scores whose rounding in bfloat16 shows
    check(number + NUM_FORMS, {**constraints, "scale": None}, mode)


@functools.partial(jax.jit, static_argnums=0)
def append(interpret, cache, keys, values, starts, layer):
    return paged_kv.append_tokens(
        cache, keys, values, query_start_loc=starts, layer=layer, implementation="mosaic_tpu",
        interpret=interpret,
    )  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        AppendForm(40, 32, 3, 64, "bfloat16", 2),
        pytest.param(AppendForm(64, 16, 8, 80, "float32", 2), marks=pytest.mark.slow),
        pytest.param(AppendForm(None, 16, 4, 64, "bfloat16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_new_tokens_are_written_and_nothing_else(form):
    """Bit by bit, missing slots and padding among them, and tokens that share a row."""
    for seed in range(2):
        cache, *step = random_append(form, seed)
        layer = None if form.num_layers is None else seed % 2
        with no_races():
            after = append(
                INTERPRETERS[MODES[1]],
                interop.pack(cache),
                *step,
                layer if layer is None else jnp.int32(layer),
            )
            jax.block_until_ready(after.key_pool)
        after = interop.unpack(after)
        assert_same_bits((after.key_pool, after.value_pool), appended(cache, *step, layer))


def test_one_kernel_appends_and_attends():
    """A decode step over a stack: writes are those of the oracle, the rest is the reference's."""
    rng = np.random.default_rng(4)
    lengths = [33, 0, 17]
    sizes = {"num_kv_heads": 4, "head_dim": 64, "dtype": "bfloat16", "num_layers": 2}
    before = np.maximum(np.array(lengths) - 1, 0)
    cache = poisoned_cache(rng, before, capacity=lengths, **sizes).cache
    cache = dataclasses.replace(cache, seq_lengths=jnp.asarray(lengths, jnp.int32))
    normal = lambda heads: jnp.asarray(rng.standard_normal((3, heads, 64)), jnp.bfloat16)
    query, keys, values = normal(8), normal(4), normal(4)
    slopes = jnp.asarray(rng.random(8), jnp.float32)

    def step(cache, **named):
        call = lambda cache: paged_kv.append_and_attend(
            query, keys, values, cache, layer=jnp.int32(1), local_window_size=(40, 0),
            alibi_slopes=slopes, return_residual=True, **named,
        )  # fmt: skip
        return jax.block_until_ready(jax.jit(call)(cache))

    packed = interop.pack(cache)
    shape = validate.cache_shape(packed)
    assert can_append(Problem(shape, 3, 8, "bfloat16", False, Variant(0.125, True, (40, 0), None)))
    with no_races():
        interpret = INTERPRETERS["eager"]
        (out, lse), after = step(packed, implementation="mosaic_tpu", interpret=interpret)
    after = interop.unpack(after)
    expected = appended(cache, keys, values, None, 1)
    assert_same_bits((after.key_pool, after.value_pool), expected)
    (expected_out, expected_lse), _ = step(cache, implementation="xla")
    out, expected_out = (np.asarray(x, np.float64) for x in (out, expected_out))
    np.testing.assert_allclose(out, expected_out, **of_output("kernel", "bfloat16", 2))
    np.testing.assert_allclose(lse, expected_lse, **tolerance("kernel float32"))
