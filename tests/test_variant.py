"""`Variant` against brute force: the mask, the range that bounds it, and the score."""

import math

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

from paged_kv.kernels.core.variant import LOG2E, Variant

windows = st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))
variants = st.builds(Variant, scale=st.just(1.0), is_causal=st.booleans(), window=windows)


@st.composite
def query_ranges(draw):
    """A sequence length and the first and last position of a tile of queries; negative ones are
    of queries that the sequence does not have."""
    seq_length = draw(st.integers(0, 20))
    first, last = sorted(draw(st.tuples(*[st.integers(-4, max(seq_length - 1, 0))] * 2)))
    return first, last, seq_length


def keys_seen(variant, first, last, seq_length):
    """Per query of [first, last], the set of keys that `keep` shows it, beyond the length too."""
    keys = range(seq_length + 5)
    return [{k for k in keys if variant.keep(q, k, seq_length)} for q in range(first, last + 1)]


@given(variants, query_ranges())
def test_keep_agrees_with_the_oracle(variant, queries):
    first, last, seq_length = queries
    for position, seen in zip(range(first, last + 1), keys_seen(variant, *queries), strict=True):
        assert seen == set(
            oracle.visible_keys(position, seq_length, variant.is_causal, variant.window)
        )


@given(variants, query_ranges())
def test_kv_range_covers_exactly_what_keep_can_reach(variant, queries):
    start, stop = variant.kv_range(*queries)
    reached = set().union(*keys_seen(variant, *queries))
    assert reached == set(range(start, stop))


@given(variants, query_ranges())
def test_kv_range_of_no_key_is_empty_and_in_order(variant, queries):
    start, stop = variant.kv_range(*queries)
    assert 0 <= start <= stop
    assert (start == stop) == (not any(keys_seen(variant, *queries)))


@given(variants, st.integers(0, 20))
def test_the_range_of_the_last_token_is_its_kv_range(variant, seq_length):
    last = seq_length - 1
    assert variant.range_of_last(seq_length) == variant.kv_range(last, last, seq_length)


@given(variants, query_ranges())
def test_full_range_is_what_every_query_sees(variant, queries):
    start, stop = variant.full_range(*queries)
    shared = set.intersection(*keys_seen(variant, *queries))
    assert shared == set(range(start, stop))


@settings(max_examples=20)
@given(variants, query_ranges())
def test_ranges_of_arrays_are_those_of_ints(variant, queries):
    traced = [jnp.int32(x) for x in queries]
    assert tuple(map(int, variant.kv_range(*traced))) == variant.kv_range(*queries)
    assert tuple(map(int, variant.full_range(*traced))) == variant.full_range(*queries)


@settings(max_examples=20)
@given(variants, st.integers(0, 12))
def test_keep_of_arrays_is_that_of_ints(variant, seq_length):
    queries, keys = np.arange(-2, 14)[:, None], np.arange(16)[None, :]
    expected = [[variant.keep(q, k, seq_length) for k in range(16)] for q in range(-2, 14)]
    np.testing.assert_array_equal(variant.keep(queries, keys, seq_length), expected)


@pytest.mark.parametrize("unit", [1.0, LOG2E], ids=["natural", "log2"])
@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("slope", [None, 0.5])
def test_score_is_scale_then_cap_then_bias(cap, slope, unit):
    dots = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * 8
    query, key = np.arange(4, 7, dtype=np.int32)[:, None], np.arange(8, dtype=np.int32)[None, :]
    variant = Variant(scale=0.25, logits_soft_cap=cap, has_alibi=slope is not None)
    scores = variant.score(dots, query, key, slope, unit)
    expected = 0.25 * dots.astype(np.float64)
    if cap is not None:
        expected = cap * np.tanh(expected / cap)
    if slope is not None:
        expected -= slope * np.abs(query - key)
    np.testing.assert_allclose(scores, expected * unit, **tolerance("reference float32"))


def test_log2e_is_the_unit_of_a_softmax_in_powers_of_two():
    assert math.isclose(2**LOG2E, math.e, rel_tol=1e-15)


def test_equal_variants_hash_alike():
    make = lambda: Variant(scale=0.5, window=(3, 0), logits_soft_cap=30.0)
    assert hash(make()) == hash(make())
    assert make() == make()
    assert make() != Variant(scale=0.5, window=(3, 1), logits_soft_cap=30.0)
