"""Positions, slots and table entries against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.kernels.core import layout

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, MAX_BLOCKS, BLOCK_SIZE, NUM_BLOCKS, NUM_TOKENS = 3, 4, 5, 9, 12

lengths = st.lists(st.integers(0, MAX_BLOCKS * BLOCK_SIZE + 3), min_size=BATCH, max_size=BATCH)
counts = st.lists(st.integers(0, 4), min_size=BATCH, max_size=BATCH)
entries = st.sampled_from([*range(NUM_BLOCKS), -1, -7, NUM_BLOCKS, 2**30, -(2**31)])
tables = st.lists(
    st.lists(entries, min_size=MAX_BLOCKS, max_size=MAX_BLOCKS), min_size=BATCH, max_size=BATCH
)

locate_tokens = jax.jit(layout.locate_tokens, static_argnums=2)
locate_slots = jax.jit(layout.locate_slots, static_argnames=("block_size", "num_blocks"))
lengths_if_valid = jax.jit(layout.lengths_if_valid, static_argnames=("block_size", "num_blocks"))


def int32(values):
    return np.asarray(values, np.int32)


def starts_of(query_lengths):
    return int32([0, *np.cumsum(query_lengths)])


@given(counts, lengths)
def test_query_tokens_are_the_last_ones_of_their_sequence(query_lengths, seq_lengths):
    tokens = locate_tokens(starts_of(query_lengths), int32(seq_lengths), NUM_TOKENS)
    expected = [
        (b, i, length - count + i)
        for b, (length, count) in enumerate(zip(seq_lengths, query_lengths, strict=True))
        for i in range(count)
    ]
    located = list(zip(*map(np.ndarray.tolist, map(np.asarray, tokens)), strict=True))
    assert located[: len(expected)] == expected


@given(counts, lengths)
def test_padding_tokens_have_no_position_and_a_safe_sequence(query_lengths, seq_lengths):
    tokens = locate_tokens(starts_of(query_lengths), int32(seq_lengths), NUM_TOKENS)
    padding = slice(sum(query_lengths), None)
    assert not np.asarray(tokens.is_real)[padding].any()
    assert ((np.asarray(tokens.sequence) >= 0) & (np.asarray(tokens.sequence) < BATCH)).all()


def slots_of(table, starts, seq_lengths):
    """Where the tokens of a step go."""
    tokens = locate_tokens(starts, int32(seq_lengths), NUM_TOKENS)
    sizes = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
    return locate_slots(int32(table), tokens.sequence, tokens.position, **sizes)


@given(tables, counts, lengths)
def test_slots_are_those_of_the_oracle(table, query_lengths, seq_lengths):
    starts = starts_of(query_lengths)
    slots = slots_of(table, starts, seq_lengths)
    expected = oracle.slots(
        int32(table), int32(seq_lengths), BLOCK_SIZE, NUM_BLOCKS, starts, NUM_TOKENS
    )
    np.testing.assert_array_equal(slots.is_valid, expected >= 0)
    flat = np.asarray(slots.block) * BLOCK_SIZE + np.asarray(slots.offset)
    np.testing.assert_array_equal(flat[expected >= 0], expected[expected >= 0])


@given(tables, counts, lengths)
def test_an_invalid_slot_lies_past_the_pool(table, query_lengths, seq_lengths):
    """So that a write there can be dropped; as an index, -1 would be the last block."""
    slots = slots_of(table, starts_of(query_lengths), seq_lengths)
    assert (np.asarray(slots.block)[~np.asarray(slots.is_valid)] == NUM_BLOCKS).all()


borders = st.sampled_from([0, 1, 4, 5, 6, 9, 10, 11, 14, 15, 16, 19, 20, 21, 24])
ranges = st.tuples(borders, borders).map(sorted)


@given(tables, st.lists(ranges, min_size=BATCH, max_size=BATCH))
def test_lengths_stay_where_every_key_of_the_range_lies_in_the_pool(table, ranges):
    start, stop = int32(ranges).T
    lengths = int32(range(7, 7 + BATCH))
    actual = lengths_if_valid(
        int32(table), lengths, start, stop, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS
    )
    is_valid = [
        stop <= MAX_BLOCKS * BLOCK_SIZE
        and all(0 <= row[key // BLOCK_SIZE] < NUM_BLOCKS for key in range(start, stop))
        for row, (start, stop) in zip(table, ranges, strict=True)
    ]
    np.testing.assert_array_equal(actual, np.where(is_valid, lengths, 0))


def test_a_table_without_columns_holds_no_key():
    sizes = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
    start, stop = int32([0, 0]), int32([0, 1])
    lengths = lengths_if_valid(jnp.zeros((2, 0), jnp.int32), int32([3, 3]), start, stop, **sizes)
    np.testing.assert_array_equal(lengths, [3, 0])


@given(tables, st.lists(borders, min_size=BATCH, max_size=BATCH))
def test_a_range_without_a_start_begins_at_the_first_key(table, stop):
    sizes = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
    arrays = int32(table), int32(range(7, 7 + BATCH))
    lengths = [lengths_if_valid(*arrays, x, int32(stop), **sizes) for x in (None, int32(stop) * 0)]
    np.testing.assert_array_equal(*lengths)


def test_no_start_locations_stand_for_one_token_each():
    np.testing.assert_array_equal(layout.start_locations(None, 3), [0, 1, 2, 3])
    starts = int32([0, 2, 2, 5])
    assert layout.start_locations(starts, 3) is starts


def test_as_layers_adds_a_layer_axis_only_where_there_is_none():
    pool = jnp.zeros((2, 4, 1, 8))
    assert layout.as_layers(pool, is_stacked=False).shape == (1, 2, 4, 1, 8)
    stack = jnp.zeros((3, 2, 4, 1, 8))
    assert layout.as_layers(stack, is_stacked=True) is stack
