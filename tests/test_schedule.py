"""Work lists against brute force: every query token once, with exactly the keys it can see."""

import functools

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.kernels.core import schedule
from paged_kv.kernels.core.problem import CacheShape
from paged_kv.kernels.core.variant import Variant

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, MAX_BLOCKS, BLOCK_SIZE, NUM_BLOCKS, NUM_TOKENS = 3, 4, 5, 9, 12
CACHE = CacheShape(1, NUM_BLOCKS, BLOCK_SIZE, 1, 8, "float32", BATCH, MAX_BLOCKS)
VARIANTS = [
    Variant(1.0),
    Variant(1.0, is_causal=False),
    Variant(1.0, window=(3, 0)),
    Variant(1.0, is_causal=False, window=(2, 4)),
]
IDS = ["causal", "full", "sliding", "two_sided"]


def made_for(variant, is_packed=True):
    return schedule.MadeFor.of(CACHE, num_query_heads=2, is_packed=is_packed, variant=variant)


make = jax.jit(schedule.make, static_argnums=0)
tile_queries = jax.jit(
    schedule.tile_queries, static_argnames=("variant", "num_tokens", "tile_tokens")
)


@st.composite
def batches(draw, is_packed=True):
    """(lengths, query tokens per sequence), at most NUM_TOKENS in all."""
    lengths = draw(st.lists(st.integers(0, 20), min_size=BATCH, max_size=BATCH))
    if not is_packed:
        return lengths, [1] * BATCH
    counts, room = [], NUM_TOKENS
    for length in lengths:
        counts.append(draw(st.integers(0, min(length, room))))
        room -= counts[-1]
    return lengths, counts


entries = st.sampled_from([*range(NUM_BLOCKS), -1, NUM_BLOCKS, 2**30, -(2**31)])
tables = st.lists(
    st.lists(entries, min_size=MAX_BLOCKS, max_size=MAX_BLOCKS), min_size=BATCH, max_size=BATCH
)


def starts_of(counts):
    return np.asarray([0, *np.cumsum(counts)], np.int32)


def keys_seen(variant, length, positions):
    """All keys that some of the positions sees."""
    seen = [oracle.visible_keys(p, length, variant.is_causal, variant.window) for p in positions]
    return set().union(*seen)


def make_valid(variant, lengths, counts, is_packed=True):
    """A schedule over a table without a wild entry."""
    table = np.zeros((BATCH, MAX_BLOCKS), np.int32)
    starts = starts_of(counts) if is_packed else None
    return make(made_for(variant, is_packed), table, np.asarray(lengths, np.int32), starts)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@settings(max_examples=50)
@given(batch=batches(), table=tables)
def test_sequence_with_a_used_entry_outside_the_pool_attends_as_empty(variant, batch, table):
    lengths, counts = batch
    made = make(
        made_for(variant),
        np.asarray(table, np.int32),
        np.asarray(lengths, np.int32),
        starts_of(counts),
    )
    for row, length, count, scheduled in zip(table, lengths, counts, made.seq_lengths, strict=True):
        used = {k // BLOCK_SIZE for k in keys_seen(variant, length, range(length - count, length))}
        is_valid = all(0 <= row[column] < NUM_BLOCKS for column in used)
        assert scheduled == (length if is_valid else 0)


@pytest.mark.parametrize("tile_tokens", [1, 4, 5])
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@settings(max_examples=25)
@given(batch=batches())
def test_every_query_token_is_in_one_tile_with_the_keys_it_sees(variant, tile_tokens, batch):
    lengths, counts = batch
    tiles = tile_queries(
        make_valid(variant, lengths, counts),
        variant,
        num_tokens=NUM_TOKENS,
        tile_tokens=tile_tokens,
    )
    assert_tiles_are_right(tiles, variant, lengths, counts, tile_tokens)


@settings(max_examples=25)
@given(batch=batches(is_packed=False))
def test_one_tile_per_sequence_when_each_has_one_token(batch):
    lengths, counts = batch
    made = make_valid(VARIANTS[0], lengths, counts, is_packed=False)
    tiles = tile_queries(made, VARIANTS[0], num_tokens=BATCH, tile_tokens=1)
    np.testing.assert_array_equal(tiles.sequence, range(BATCH))
    np.testing.assert_array_equal(tiles.first_position, np.asarray(lengths) - 1)
    np.testing.assert_array_equal(tiles.kv_stop - tiles.kv_start, lengths)


def assert_tiles_are_right(tiles, variant, lengths, counts, tile_tokens):
    tokens = []
    starts = starts_of(counts)
    for b, first, count, position, length, start, stop in zip(
        *(np.asarray(x).tolist() for x in tiles), strict=True
    ):
        if count == 0:
            assert start == stop
            continue
        assert count <= tile_tokens
        assert length == lengths[b]
        assert position == length - counts[b] + first - starts[b]
        assert starts[b] <= first <= first + count <= starts[b + 1]
        assert set(range(start, stop)) == keys_seen(
            variant, length, range(position, position + count)
        )
        tokens.extend(range(first, first + count))
    assert tokens == list(range(sum(counts)))


@pytest.mark.parametrize("tile_tokens", [1, 4, 5])
@settings(max_examples=25)
@given(batch=batches())
def test_untile_puts_results_back_and_padding_is_empty(tile_tokens, batch):
    out, lse = round_trip(*batch, tile_tokens)
    num_real = sum(batch[1])
    np.testing.assert_array_equal(out[:num_real], QUERY[:num_real])
    np.testing.assert_array_equal(lse[:num_real], QUERY[:num_real, :, 0])
    np.testing.assert_array_equal(out[num_real:], 0)
    np.testing.assert_array_equal(lse[num_real:], -np.inf)


QUERY = np.random.default_rng(0).standard_normal((NUM_TOKENS, 2, 3)).astype(np.float32)


def round_trip(lengths, counts, tile_tokens):
    """QUERY through its tiles and back, as `out`, and its first components as `lse`."""
    return _round_trip(make_valid(VARIANTS[0], lengths, counts), tile_tokens)


@functools.partial(jax.jit, static_argnums=1)
def _round_trip(made, tile_tokens):
    tiles = schedule.tile_queries(made, VARIANTS[0], num_tokens=NUM_TOKENS, tile_tokens=tile_tokens)
    rows = schedule.gather_tiles(jax.numpy.asarray(QUERY), tiles, tile_tokens, True)
    return schedule.untile(made, rows, rows[..., 0], num_tokens=NUM_TOKENS)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9), st.integers(1, 6))
def test_number_of_tiles_always_suffices(counts, num_padding, tile_tokens):
    num_tokens = sum(counts) + num_padding
    needed = sum(-(-count // tile_tokens) for count in counts)
    assert schedule.num_query_tiles(num_tokens, len(counts), tile_tokens, True) >= needed


def test_schedule_is_a_pytree_with_static_facts():
    made = make_valid(VARIANTS[2], [5, 0, 7], [2, 0, 1])
    leaves, tree = jax.tree.flatten(made)
    assert all(leaf.dtype == np.int32 for leaf in leaves)
    assert jax.tree.unflatten(tree, leaves).made_for == made_for(VARIANTS[2])
