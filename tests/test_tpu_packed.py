"""Packed pools through the TPU kernels, in the interpreter, against the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from bitwise import assert_same_bits
from kernel_checks import AppendForm, appended, assert_matches_oracle, random_append
from problems import NUM_FORMS, attend, random_problem
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv
from paged_kv import interop
from paged_kv.kernels.tpu import decode_plan, prefill_plan
from paged_kv.kernels.tpu import plan as plans

# two kv heads a row: the kernels see 1, 2 and 3 heads of 128
HEADS = {"head_dim": 64, "num_kv_heads": [2, 4, 6], "block_size": [16, 32], "max_length": 70}
DECODE = {"kind": "decode", "pool_dtype": "bfloat16", "num_kv_heads": [2, 4], "block_size": 16}
PREFILL = {
    "kind": "chunked_prefill", "pool_dtype": "bfloat16", "num_kv_heads": [2, 4], "num_tokens": 80,
}  # fmt: skip
APART = {"head_dim": [80, 96, 192], "num_kv_heads": 8, "block_size": 16, "max_length": 70}
SHARED = {"head_dim": [64, 80, 192], "num_kv_heads": [1, 3], "block_size": 128, "max_length": 150}
CASES = {
    "six_heads_of_float16_in_a_stack": (7, HEADS),
    "decode_kernel": (10, {**HEADS, **DECODE}),
    "heads_across_rows": (24, {**APART, "num_tokens": 16}),
    "rows_of_two_tokens": (2, {**SHARED, "head_dim": 64, "num_kv_heads": 3, "block_size": 32}),
}


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


@pytest.mark.parametrize("name", CASES)
def test_packed_problems(name):
    check(*CASES[name], MODES[list(CASES).index(name) % 2])


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
    [AppendForm(64, 16, 8, 80, "float32", 2), AppendForm(40, 32, 3, 64, "bfloat16", 2)],
    ids=str,
)
def test_new_tokens_are_written_and_nothing_else(form):
    """Bit by bit, missing slots and padding among them, and tokens that share a row."""
    for seed in range(3):
        cache, *step = random_append(form, seed)
        layer = seed % 2
        with no_races():
            after = append(INTERPRETERS[MODES[1]], interop.pack(cache), *step, jnp.int32(layer))
            jax.block_until_ready(after.key_pool)
        after = interop.unpack(after)
        assert_same_bits((after.key_pool, after.value_pool), appended(cache, *step, layer))
