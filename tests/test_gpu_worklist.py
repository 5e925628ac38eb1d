"""The work list of GPU decode: every tile once, in equal shares, each piece in its own place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_kv.kernels.core import schedule
from paged_kv.kernels.core.problem import CacheShape
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import decode_plan, worklist
from paged_kv.kernels.gpu.worklist import Stretch

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANTS = [Variant(1.0), Variant(1.0, window=(100, 0))]
CACHES = [
    CacheShape(1, 4096, block_size, heads, head_dim, "bfloat16", 24, 512)
    for block_size, heads, head_dim in [(16, 8, 128), (8, 1, 128), (24, 7, 64), (128, 66, 64)]
]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def lists(cache, variant, num_ctas, lengths):
    made_for = schedule.MadeFor.of(cache, 8, False, variant)
    table = jnp.zeros((cache.batch, cache.max_blocks_per_seq), jnp.int32)
    step = schedule.make(made_for, table, lengths, None)
    line = decode_plan.Line(decode_plan.key_tiles(cache), num_ctas)
    return worklist.make(line, variant, step)


def random_lengths(rng, kind, batch):
    if kind == 0:
        return np.zeros(batch, np.int32)
    if kind == 1:  # one alone
        return np.where(np.arange(batch) == rng.integers(batch), 3000, 0).astype(np.int32)
    most = (12, 3000)[kind - 2]
    return np.where(rng.random(batch) < 0.3, 0, rng.integers(1, most, batch)).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS, ids=["causal", "window"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_every_tile_is_in_one_share(cache, variant):
    rng = np.random.default_rng(3)
    keys = decode_plan.key_tiles(cache)
    for num_ctas in (4, 33):
        for kind in range(4):
            lengths = random_lengths(rng, kind, cache.batch)
            work = lists(cache, variant, num_ctas, lengths)
            tiles, places = walk(work)
            first = lengths - 1 - (variant.left if variant.left is not None else lengths)
            expected = {
                (b, tile)
                for b, length in enumerate(lengths)
                for tile in range(
                    int(keys.whole_before(np.int32(max(first[b], 0)))),
                    int(keys.covering(np.int32(length))),
                )
                if length
            }
            assert sorted(tiles) == sorted(expected)  # none twice
            pieces = {b: sorted(place for who, place in places if who == b) for b in range(24)}
            for b, (start, count) in enumerate(np.asarray(work.pieces)):
                assert pieces[b] == list(range(start, start + count))
            assert len({place for _, place in places}) == len(places)


def walk(work):
    """(sequence, tile) of every visit, and (sequence, place) of every piece, as the CTAs go."""
    tiles, places, counts = [], [], []
    for cta, parts in enumerate(work.parts_of_ctas()):
        for part in parts:
            assert 0 <= part.num_edges <= part.num_visits > 0
            tiles += [(part.sequence, part.visited(i)) for i in range(part.num_visits)]
            places.append((part.sequence, cta + part.sequence))
        counts.append(sum(part.num_visits for part in parts))
    used = [count for count in counts if count]
    assert not used or max(used) - min(used) <= 1
    return tiles, places


def test_a_part_is_whole_where_no_other_cta_has_tiles_of_the_sequence():
    lengths = np.zeros(24, np.int32)
    lengths[[3, 5, 9]] = 8 * 3, 8 * 20, 8 * 5  # tokens of so many tiles
    work = lists(CACHES[0], VARIANTS[0], 4, lengths)
    pieces = np.asarray(work.pieces)
    assert pieces[[3, 5, 9], 1].tolist() == [1, 4, 1]
    shares, stretches = np.asarray(work.shares).tolist(), np.asarray(work.stretches).tolist()
    for row, parts in zip(shares, work.parts_of_ctas(), strict=True):
        stretch = Stretch(*row[: worklist.NUM_SHARED])
        for part in parts:
            assert bool(stretch.is_whole(part)) == (pieces[part.sequence, 1] == 1)
            stretch = Stretch(*stretches[stretch.next])


def test_small_work_is_not_cut_below_a_tile_for_each_consumer():
    lengths = np.zeros(24, np.int32)
    lengths[5] = 8 * 20  # tokens of 20 tiles
    work = lists(CACHES[0], VARIANTS[0], 132, lengths)
    counts = np.asarray(work.shares[:, worklist.NUM_SHARED])
    assert sorted(counts[counts > 0]) == [decode_plan.MIN_SHARE] * 10


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_edge_tiles_are_those_with_tokens_that_are_not_there(cache):
    keys = decode_plan.key_tiles(cache)
    lengths = np.arange(24, dtype=np.int32) * 37
    work = lists(cache, VARIANTS[0], 4, lengths)
    for length, row in zip(lengths, np.asarray(work.stretches), strict=True):
        stretch = Stretch(*row.tolist())
        assert stretch.full_stop == int(keys.whole_before(np.int32(length)))


def test_where_a_condition_fails_there_is_nothing_to_do():
    work = lists(CACHES[0], VARIANTS[0], 4, np.full(24, 9, np.int32))
    np.testing.assert_array_equal(work.only_if(jnp.bool_(True)).rows, work.rows)
    assert np.asarray(work.rows).any()
    assert not np.asarray(work.only_if(jnp.bool_(False)).rows).any()
