"""Callers with (batch, T, heads, head_dim) get what packed tokens give, padding apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bitwise import assert_same_bits
from ragged import HEAD_DIM, HEADS, LENGTHS, cache_of, int32, normal, slots_of
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOSE = tolerance("reference float32")
WIDTH = 5
COUNTS = [0, 1, 3, 0, 5, 2]  # real tokens of each row of ragged.LENGTHS
STARTS = np.concatenate([[0], np.cumsum(COUNTS)])
PADDING = np.arange(WIDTH)[None, :] >= np.array(COUNTS)[:, None]
OPTIONS = {"local_window_size": (9, 0), "logits_soft_cap": 2.0, "scale": 0.4}

attend_rows = jax.jit(
    functools.partial(paged_kv.paged_dot_product_attention, return_residual=True, **OPTIONS)
)


def rows_of(*seeds, heads=HEADS):
    """Normal rows, NaN where padding is, one array per seed."""
    make = lambda seed: normal(seed, len(LENGTHS), WIDTH, heads, HEAD_DIM)
    return [jnp.where(jnp.asarray(PADDING)[..., None, None], jnp.nan, make(s)) for s in seeds]


def real(rows):
    """The tokens of rows, packed."""
    return np.asarray(rows)[~PADDING]


def test_ragged_rows_attend_and_padding_gives_zero():
    poisoned, (query,) = cache_of(), rows_of(1)
    out, lse = attend_rows(query, poisoned.cache, query_seq_lengths=int32(COUNTS))
    expected_out, expected_lse = oracle.attention(real(query), *poisoned.dense(), STARTS, **OPTIONS)
    np.testing.assert_allclose(real(out), expected_out, **CLOSE)
    np.testing.assert_allclose(real(lse), expected_lse, **CLOSE)
    np.testing.assert_array_equal(np.asarray(out)[PADDING], 0)
    np.testing.assert_array_equal(np.asarray(lse)[PADDING], -np.inf)


def test_counts_out_of_range_under_jit_stay_within_the_rows():
    cache, query = cache_of().cache, normal(2, len(LENGTHS), WIDTH, HEADS, HEAD_DIM)
    wild, tame = (
        attend_rows(query, cache, query_seq_lengths=int32([n, *COUNTS[1:]])) for n in (-4, 0)
    )
    assert_same_bits(wild, tame)
    wild, tame = (
        attend_rows(query, cache, query_seq_lengths=int32([*COUNTS[:-1], n])) for n in (2**30, 5)
    )
    assert_same_bits(wild, tame)


def test_it_is_jax_nn_over_the_whole_sequence():
    """Where every token is a query, causal by position is jax.nn's causal."""
    query, key, value = (normal(s, 2, 7, h, HEAD_DIM) for s, h in ((4, 6), (5, 2), (6, 2)))
    cache = paged_kv.advance(cache_of(lengths=[0, 0], room=7).cache, 7)
    out, _ = jax.jit(paged_kv.append_and_attend_rows)(query, key, value, cache)
    expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    np.testing.assert_allclose(out, expected, **CLOSE)


def test_one_token_each_is_decode():
    """The program holds the call that packed tokens make, and a query without batch is a row."""
    cache, query = cache_of(lengths=[20]).cache, normal(3, 1, 1, HEADS, HEAD_DIM)
    packed = lambda query: paged_kv.paged_attention(query.reshape(1, HEADS, HEAD_DIM), cache)
    batched = lambda query: paged_kv.paged_dot_product_attention(query, cache)
    alone = lambda query: paged_kv.paged_dot_product_attention(query[0], cache)
    expected, *calls = (attention_of(f, query) for f in (packed, batched, alone))
    assert calls == [expected] * 2
    for function in (batched, alone):
        shape = jax.eval_shape(function, query).shape
        assert shape == (query.shape if function is batched else query.shape[1:])


def attention_of(function, query):
    """The compiled call of an attention op, as text."""
    (call,) = (
        equation.params["jaxpr"]
        for equation in jax.make_jaxpr(function)(query).eqns
        if equation.params.get("name") == "attend"
    )
    return str(call)


def test_rows_append_and_padding_is_written_nowhere():
    cache = paged_kv.advance(cache_of(room=WIDTH).cache, int32(COUNTS))
    (query,), (keys, values) = rows_of(7), rows_of(8, 9, heads=2)
    slots = slots_of(cache, STARTS, STARTS[-1])
    expected = [
        oracle.append(pool, real(x), slots)
        for pool, x in ((cache.key_pool, keys), (cache.value_pool, values))
    ]
    counts = {"query_seq_lengths": int32(COUNTS)}
    after = jax.jit(paged_kv.append_rows)(cache, keys, values, **counts)
    assert_same_bits([after.key_pool, after.value_pool], expected)
    fused = functools.partial(paged_kv.append_and_attend_rows, return_residual=True)
    (out, lse), _ = jax.eval_shape(fused, query, keys, values, cache, **counts)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:3])


def test_a_schedule_of_the_rows_is_one_of_their_starts():
    cache, query = cache_of(num_layers=2).cache, rows_of(1)[0]

    def attend(query, cache, counts):
        starts = paged_kv.row_starts(len(LENGTHS), WIDTH, counts)
        schedule = paged_kv.make_schedule(cache, num_query_heads=HEADS, query_start_loc=starts)
        return paged_kv.paged_dot_product_attention(
            query, cache, query_seq_lengths=counts, layer=1, schedule=schedule
        )

    assert jax.eval_shape(attend, query, cache, int32(COUNTS)).shape == query.shape
    np.testing.assert_array_equal(paged_kv.row_starts(6, WIDTH, int32(COUNTS)), STARTS)
    np.testing.assert_array_equal(paged_kv.row_starts(2, 3), [0, 3, 6])
    assert paged_kv.row_starts(2, 1) is None
