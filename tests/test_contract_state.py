"""The contract of lengths, tables and whole blocks, one test per line of it.

Every op runs both eagerly and under jit, and pools are compared bitwise, poison included.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from ragged import NUM_TOKENS, STARTS, cache_of, int32, slots_of

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def run(jit, op, *args, **kwargs):
    """The op on its arrays: under jit all positional arguments are traced, keywords closed over."""
    op = getattr(paged_kv, op)
    call = lambda *arrays: op(*arrays, **kwargs)
    return (jax.jit(call) if jit else call)(*args)


# --- advance, truncate, reset_sequences, set_block_table


@JIT
@pytest.mark.parametrize("count", [3, int32([0, 1, 2, 3, 4, 5])], ids=["int", "array"])
def test_advance_adds_to_the_lengths_alone(jit, count):
    cache = cache_of().cache
    after = run(jit, "advance", cache, count)
    expected = dataclasses.replace(cache, seq_lengths=cache.seq_lengths + count)
    assert_same_bits(after, expected)


@JIT
def test_truncate_rolls_lengths_back_and_keeps_the_blocks(jit):
    cache = cache_of().cache
    shorter = int32([0, 0, 3, 16, 16, 40])
    assert_same_bits(
        run(jit, "truncate", cache, shorter), dataclasses.replace(cache, seq_lengths=shorter)
    )


def test_truncate_under_jit_never_makes_a_sequence_longer():
    cache = cache_of().cache
    after = run(True, "truncate", cache, int32([5, 5, 5, -3, 99, 39]))
    np.testing.assert_array_equal(after.seq_lengths, [0, 1, 5, 0, 17, 39])


@JIT
def test_reset_empties_the_masked_rows_alone(jit):
    cache = cache_of().cache
    mask = np.array([False, True, False, False, True, False])
    after = run(jit, "reset_sequences", cache, mask)
    table = np.where(mask[:, None], -1, cache.block_table)
    lengths = np.where(mask, 0, cache.seq_lengths)
    expected = dataclasses.replace(cache, block_table=int32(table), seq_lengths=int32(lengths))
    assert_same_bits(after, expected)


@JIT
@pytest.mark.parametrize("mask", [None, np.array([True, False] * 3)], ids=["all", "masked"])
def test_set_block_table_replaces_rows_and_keeps_lengths(jit, mask):
    cache = cache_of().cache
    new = jnp.arange(cache.block_table.size, dtype=jnp.int32).reshape(cache.block_table.shape)
    after = run(jit, "set_block_table", cache, new, *([] if mask is None else [mask]))
    rows = True if mask is None else mask[:, None]
    expected = dataclasses.replace(cache, block_table=int32(np.where(rows, new, cache.block_table)))
    assert_same_bits(after, expected)


def test_set_block_table_shares_a_block_on_purpose():
    """Two sequences with one prefix block both see it."""
    poisoned = cache_of()
    table = np.array(poisoned.cache.block_table)
    table[4, 0] = table[5, 0]
    cache = paged_kv.set_block_table(poisoned.cache, int32(table))
    np.testing.assert_array_equal(paged_kv.gather_kv(cache, 4)[0][:16], poisoned.keys[5][:16])


# --- copy_blocks and scrub_blocks


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_copy_copies_keys_and_values_of_all_layers(jit, num_layers):
    cache = cache_of(num_layers=num_layers).cache
    after = run(jit, "copy_blocks", cache, int32([2, 4]), int32([9, 7]))
    assert_same_bits(after, with_blocks(cache, lambda pool: pool[..., [2, 4], :, :, :], [9, 7]))


@JIT
def test_copy_reads_all_sources_before_it_writes(jit):
    cache = cache_of().cache
    after = run(jit, "copy_blocks", cache, int32([2, 4]), int32([4, 2]))
    assert_same_bits(after, with_blocks(cache, lambda pool: pool[[2, 4]], [4, 2]))


@JIT
@pytest.mark.parametrize(
    ("source", "target"), [([-1, 2], [3, -1]), ([-7, -(2**31)], [3, 4])], ids=["mixed", "source"]
)
def test_copy_skips_pairs_with_an_id_below_zero(jit, source, target):
    cache = cache_of().cache
    assert_same_bits(run(jit, "copy_blocks", cache, int32(source), int32(target)), cache)


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_scrub_leaves_nothing_in_the_blocks_of_any_layer(jit, num_layers):
    cache = cache_of(num_layers=num_layers).cache
    after = run(jit, "scrub_blocks", cache, int32([0, 5]))
    assert_same_bits(after, with_blocks(cache, lambda pool: 0, [0, 5]))


@JIT
def test_scrub_skips_ids_below_zero(jit):
    cache = cache_of().cache
    assert_same_bits(run(jit, "scrub_blocks", cache, int32([-1, -7, -(2**31)])), cache)


@pytest.mark.parametrize("past", [0, 2**30])
def test_block_ids_past_the_pool_are_skipped_under_jit(past):
    cache = cache_of().cache
    wild = int32([cache.num_blocks + past])
    assert_same_bits(run(True, "scrub_blocks", cache, wild), cache)
    assert_same_bits(run(True, "copy_blocks", cache, wild, int32([1])), cache)
    assert_same_bits(run(True, "copy_blocks", cache, int32([1]), wild), cache)


def with_blocks(cache, read, target):
    """The cache with blocks `target` of both pools replaced by what `read` makes of the pool."""

    def replaced(pool):
        new = np.array(pool)
        new[..., target, :, :, :] = read(new)
        return jnp.asarray(new)

    return dataclasses.replace(
        cache, key_pool=replaced(cache.key_pool), value_pool=replaced(cache.value_pool)
    )


# --- slot_mapping


@JIT
@pytest.mark.parametrize("starts", [None, STARTS], ids=["decode", "ragged"])
def test_slot_mapping_is_block_times_size_plus_offset(jit, starts):
    cache = cache_of().cache
    starts = None if starts is None else int32(starts)
    num_tokens = 6 if starts is None else NUM_TOKENS
    call = lambda cache, starts: paged_kv.slot_mapping(
        cache, query_start_loc=starts, num_tokens=num_tokens
    )
    slots = (jax.jit(call) if jit else call)(cache, starts)
    assert slots.dtype == jnp.int32
    np.testing.assert_array_equal(slots, slots_of(cache, starts, num_tokens))
    assert (slots[0 if starts is None else STARTS[-1] :][:1] == -1).all()
