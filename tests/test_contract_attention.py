"""The contract of `paged_attention`, one test per line of it.

Numbers are in test_reference; here is what a call means: positions, empty rows, variants, and what
is never read.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bitwise import assert_same_bits
from ragged import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    STARTS,
    attend,
    cache_of,
    int32,
    random_query,
)
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOSE = tolerance("reference float32")


def assert_is_oracles(actual, query, poisoned, starts=None, layer=None, **options):
    expected = oracle.attention(query, *poisoned.dense(layer), starts, **options)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


# --- packed queries and their positions


def test_without_starts_each_sequence_has_one_query_token():
    poisoned, query = cache_of(), random_query(6)
    assert_is_oracles(attend(query, poisoned.cache), query, poisoned)


def test_query_tokens_are_the_last_ones_of_their_sequences():
    poisoned, query = cache_of(), random_query()
    assert_is_oracles(attend(query, poisoned.cache, STARTS), query, poisoned, STARTS)


def test_eager_use_is_bitwise_what_jit_gives():
    poisoned, query = cache_of(), random_query()
    eager = paged_kv.paged_attention(
        query, poisoned.cache, query_start_loc=int32(STARTS), return_residual=True
    )
    assert_same_bits(eager, attend(query, poisoned.cache, STARTS))


def test_causality_is_by_position_not_top_left():
    """A query token sees all that came before its chunk, whatever its place in the chunk."""
    poisoned, query = cache_of(lengths=[40]), random_query(4)
    out, _ = attend(query, poisoned.cache, [0, 4])
    for token in range(4):
        shorter = paged_kv.truncate(poisoned.cache, int32([37 + token]))
        alone, _ = attend(query[token : token + 1], shorter, [0, 1])
        np.testing.assert_allclose(out[token], alone[0], **CLOSE)


def test_padding_tokens_return_zero_and_minus_infinity():
    out, lse = attend(random_query(), cache_of().cache, STARTS)
    np.testing.assert_array_equal(out[STARTS[-1] :], 0)
    np.testing.assert_array_equal(lse[STARTS[-1] :], -np.inf)


def test_padding_queries_may_hold_anything():
    poisoned, query = cache_of(), random_query()
    dirty = query.at[STARTS[-1] :].set(jnp.nan)
    assert_same_bits(attend(dirty, poisoned.cache, STARTS), attend(query, poisoned.cache, STARTS))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_row_of_length_zero_is_inactive_without_starts(jit):
    """Output 0, lse -inf, no error: a slot of a serving batch that no request holds."""
    call = functools.partial(paged_kv.paged_attention, return_residual=True)
    out, lse = (jax.jit(call) if jit else call)(random_query(6), cache_of().cache)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], -np.inf)
    assert np.isfinite(lse[1:]).all()


def test_batch_without_any_query_token_is_all_padding():
    out, lse = attend(random_query(), cache_of().cache, [0] * 7)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_no_query_tokens_at_all_give_an_empty_result():
    out, lse = attend(random_query(0), cache_of().cache, [0] * 7)
    assert (out.shape, lse.shape) == ((0, HEADS, HEAD_DIM), (0, HEADS))


def test_query_that_sees_no_key_returns_zero_and_minus_infinity_with_sinks_too():
    sinks = jnp.ones(HEADS, jnp.float32)
    out, lse = attend(random_query(6), cache_of().cache, sinks=sinks)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], -np.inf)


def test_query_at_a_negative_position_sees_no_key_under_jit():
    """Three query tokens of a sequence of one: the last is its token, two are before its start."""
    poisoned, query = cache_of(lengths=[1, 20]), random_query(5)
    out, lse = attend(query, poisoned.cache, [0, 3, 5], is_causal=False)
    np.testing.assert_array_equal(out[:2], 0)
    np.testing.assert_array_equal(lse[:2], -np.inf)
    assert_is_oracles((out, lse), query, poisoned, [0, 3, 5], is_causal=False)


# --- dtypes


@pytest.mark.parametrize(("dtype", "pool_dtype"), [("float32", "bfloat16"), ("float16", "float32")])
def test_out_has_the_querys_dtype_and_lse_is_float32(dtype, pool_dtype):
    out, lse = attend(random_query(6, dtype), cache_of(dtype=pool_dtype).cache)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)


def test_statistics_are_float32_for_half_precision_inputs():
    """4096 keys of score 0 and value 1: a half-precision sum of weights would stop at 2048."""
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=64, block_size=64, num_kv_heads=1, head_dim=8, batch_size=1,
        max_blocks_per_seq=64, dtype=jnp.float16,
    )  # fmt: skip
    cache = dataclasses.replace(
        cache,
        value_pool=jnp.ones_like(cache.value_pool),
        block_table=jnp.arange(64, dtype=jnp.int32)[None],
        seq_lengths=int32([4096]),
    )
    out, lse = attend(jnp.ones((1, 1, 8), jnp.float16), cache)
    np.testing.assert_array_equal(out, 1)
    np.testing.assert_allclose(lse, [[math.log(4096)]], **CLOSE)


# --- variants


def test_default_scale_is_one_over_the_root_of_head_dim():
    poisoned, query = cache_of(), random_query(6)
    implicit = attend(query, poisoned.cache)
    explicit = attend(query, poisoned.cache, scale=1 / math.sqrt(HEAD_DIM))
    assert_same_bits(implicit, explicit)


def test_int_window_is_the_pair_of_itself():
    poisoned, query = cache_of(), random_query()
    options = {"is_causal": False}
    assert_same_bits(
        attend(query, poisoned.cache, STARTS, local_window_size=3, **options),
        attend(query, poisoned.cache, STARTS, local_window_size=(3, 3), **options),
    )


def test_window_counts_keys_beside_the_query_itself():
    """(0, 0) leaves the query's own key: out is its value."""
    poisoned, query = cache_of(), random_query(6)
    out, _ = attend(query, poisoned.cache, local_window_size=0)
    for b, values in enumerate(poisoned.values):
        if len(values):
            own = np.repeat(values[-1], HEADS // KV_HEADS, axis=0)
            np.testing.assert_allclose(out[b], own, **CLOSE)


@pytest.mark.parametrize("side", [2**31 - 1, 2**40])
def test_window_wider_than_any_sequence_is_no_window(side):
    """Also where a position plus the window is past what an int32 holds."""
    poisoned, query = cache_of(), random_query()
    wide, none = (
        attend(query, poisoned.cache, STARTS, is_causal=False, local_window_size=window)
        for window in ((side, side), None)
    )
    assert_same_bits(wide, none)


def test_causality_removes_the_right_side_of_a_window():
    poisoned, query = cache_of(), random_query()
    actual = attend(query, poisoned.cache, STARTS, local_window_size=(5, 2))
    assert_is_oracles(actual, query, poisoned, STARTS, local_window_size=(5, 0))


def test_everything_at_once_is_in_the_order_of_the_contract():
    poisoned, query = cache_of(), random_query()
    rng = np.random.default_rng(2)
    options = {
        "scale": 0.7, "logits_soft_cap": 2.0, "local_window_size": (9, 3), "is_causal": False,
        "sinks": jnp.asarray(rng.standard_normal(HEADS), jnp.float32),
        "alibi_slopes": jnp.asarray(rng.random(HEADS), jnp.float32),
    }  # fmt: skip
    actual = attend(query, poisoned.cache, STARTS, **options)
    assert_is_oracles(actual, query, poisoned, STARTS, **options)


def test_alibi_distance_is_absolute():
    """A non-causal query pays for keys ahead of it too."""
    poisoned, query = cache_of(), random_query()
    options = {"is_causal": False, "alibi_slopes": jnp.full(HEADS, 0.3, jnp.float32)}
    actual = attend(query, poisoned.cache, STARTS, **options)
    assert_is_oracles(actual, query, poisoned, STARTS, **options)


def test_sinks_scale_out_by_a_sigmoid_and_leave_lse_alone():
    poisoned, query = cache_of(), random_query()
    sinks = jnp.linspace(-2, 2, HEADS, dtype=jnp.float32)
    plain = attend(query, poisoned.cache, STARTS)
    out, lse = attend(query, poisoned.cache, STARTS, sinks=sinks)
    assert_same_bits(lse, plain[1])
    expected = plain[0] * jax.nn.sigmoid(lse - sinks[None, :])[..., None]
    np.testing.assert_allclose(out, expected, **CLOSE)
    assert_same_bits(out, paged_kv.apply_sinks(*plain, sinks))


def test_merged_halves_then_sinks_are_the_whole():
    """Partial results over disjoint keys merge to the result over all; sinks come last, once."""
    query, sinks = random_query(1), jnp.ones(HEADS, jnp.float32)
    whole = cache_of(lengths=[40])
    first = paged_kv.truncate(whole.cache, int32([32]))
    rest = dataclasses.replace(
        whole.cache, block_table=whole.cache.block_table[:, 2:], seq_lengths=int32([8])
    )
    merged = paged_kv.merge_attention_states(*attend(query, first), *attend(query, rest))
    expected, lse = attend(query, whole.cache, sinks=sinks)
    np.testing.assert_allclose(merged[1], lse, **CLOSE)
    np.testing.assert_allclose(paged_kv.apply_sinks(*merged, sinks), expected, **CLOSE)


# --- what is never read


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_no_one_owns_never_influences_a_result(poison):
    """Unowned slots, tails of blocks, and wild ids: bitwise the same whatever they hold."""
    query = random_query()
    clean, dirty = cache_of(poison=0.0), cache_of(poison=poison)
    assert_same_bits(attend(query, dirty.cache, STARTS), attend(query, clean.cache, STARTS))


def test_block_order_never_influences_a_result():
    query = random_query()
    results = []
    for seed in range(2):
        poisoned = cache_of()
        order = np.random.default_rng(seed).permutation(poisoned.cache.num_blocks)
        results.append(attend(query, renumbered(poisoned.cache, order), STARTS))
    assert_same_bits(*results)


def renumbered(cache, order):
    """The same cache with its physical blocks in another order."""
    table = np.array(cache.block_table)
    inside = (table >= 0) & (table < cache.num_blocks)
    table[inside] = np.argsort(order)[table[inside]]
    return dataclasses.replace(
        cache,
        key_pool=cache.key_pool[order],
        value_pool=cache.value_pool[order],
        block_table=int32(table),
    )


def test_non_finite_key_in_a_valid_slot_stays_with_its_own_sequence():
    poisoned, query = cache_of(), random_query()
    block = poisoned.cache.block_table[5, 1]
    pools = {
        name: getattr(poisoned.cache, name).at[block, 3].set(jnp.nan)
        for name in ("key_pool", "value_pool")
    }
    out, lse = attend(query, dataclasses.replace(poisoned.cache, **pools), STARTS)
    assert np.isnan(out[9:11]).all()
    expected = attend(query, poisoned.cache, STARTS)
    assert_same_bits((out[:9], lse[:9]), (expected[0][:9], expected[1][:9]))


def test_window_may_have_given_its_first_blocks_back():
    """Their entries are wild and their slots poisoned, in eager use too: that is no error."""
    window = (9, 0)
    lengths = np.array(LENGTHS)
    first_kept = np.maximum(lengths - np.diff(STARTS) - window[0], 0)
    poisoned, query = cache_of(first_kept=first_kept), random_query()
    assert not 0 <= poisoned.cache.block_table[5, 0] < poisoned.cache.num_blocks
    actual = paged_kv.paged_attention(
        query, poisoned.cache, query_start_loc=int32(STARTS), local_window_size=window,
        return_residual=True,
    )  # fmt: skip
    assert_is_oracles(actual, query, poisoned, STARTS, local_window_size=window)


def test_sequence_without_query_tokens_may_hold_any_entries():
    poisoned, query = cache_of(), random_query()
    table = poisoned.cache.block_table.at[3].set(2**30)  # no query tokens in STARTS
    cache = dataclasses.replace(poisoned.cache, block_table=table)
    actual = paged_kv.paged_attention(
        query, cache, query_start_loc=int32(STARTS), return_residual=True
    )
    assert_same_bits(actual, attend(query, poisoned.cache, STARTS))


@pytest.mark.parametrize("entry", ["minus_one", "num_blocks", "wild", "most_negative"])
def test_sequence_with_a_used_entry_outside_the_pool_attends_as_empty_under_jit(entry):
    """Never another tenant's block; the other sequences are bitwise as they were."""
    poisoned, query = cache_of(), random_query()
    value = {
        "minus_one": -1,
        "num_blocks": poisoned.cache.num_blocks,
        "wild": 2**30,
        "most_negative": -(2**31),
    }[entry]
    table = poisoned.cache.block_table.at[5, 1].set(value)
    cache = dataclasses.replace(poisoned.cache, block_table=table)
    out, lse = attend(query, cache, STARTS)
    np.testing.assert_array_equal(out[9:11], 0)
    np.testing.assert_array_equal(lse[9:11], -np.inf)
    expected = attend(query, poisoned.cache, STARTS)
    assert_same_bits((out[:9], lse[:9]), (expected[0][:9], expected[1][:9]))


def test_sequence_longer_than_its_row_attends_as_empty_under_jit():
    poisoned, query = cache_of(), random_query()
    cache = poisoned.cache
    room = cache.max_blocks_per_seq * cache.block_size
    full = dataclasses.replace(  # every entry of its row is a block: only the length is wrong
        cache,
        block_table=cache.block_table.at[5].set(cache.block_table[5, 0]),
        seq_lengths=cache.seq_lengths.at[5].set(room + 1),
    )
    out, lse = attend(query, full, STARTS)
    np.testing.assert_array_equal(out[9:11], 0)
    np.testing.assert_array_equal(lse[9:11], -np.inf)
