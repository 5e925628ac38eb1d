"""Blocks found by their tokens: tenants, eviction, events."""

from array import array

import numpy as np
import pytest
from allocators import allocator, cached

import paged_kv
from paged_kv import idle_blocks
from paged_kv.prefix import BlockRemoved, BlockStored


def test_a_prefix_is_found_after_its_sequence_is_gone():
    blocks = cached(range(10))
    assert blocks.find_prefix(range(10)) == 8 == blocks.match_prefix("b", range(10))
    assert blocks.extend("b", 2) != []
    assert blocks.stats().hit_rate == 8 / 10


def test_one_token_is_left_to_compute():
    blocks = cached(range(8))
    assert [blocks.find_prefix(range(count)) for count in (0, 4, 5, 8, 9)] == [0, 0, 4, 4, 8]


def test_a_prefix_is_found_by_all_its_tokens():
    blocks = cached(range(12))
    assert blocks.find_prefix([9, *range(1, 12), 12]) == 0
    assert blocks.find_prefix([*range(7), 9, 8, 9, 10, 11, 12]) == 4
    assert blocks.find_prefix(range(4, 13)) == 0


@pytest.mark.parametrize("convert", [list, tuple, np.array, lambda x: np.array(x, np.uint8)])
def test_tokens_come_as_lists_or_arrays(convert):
    assert cached(convert(range(8))).find_prefix(convert(range(9))) == 8


def test_tenants_do_not_find_each_other():
    blocks = allocator(enable_prefix_caching=True)
    for number, salt in enumerate((None, "", "x", b"x")):
        assert blocks.match_prefix(number, range(9), salt=salt) == (8 if salt == b"x" else 0)
        blocks.extend(number, 8 - blocks.num_tokens(number))
        blocks.commit(number, range(8))


def test_without_caching_nothing_is_found():
    blocks = allocator()
    assert blocks.match_prefix("a", range(9)) == 0
    blocks.extend("a", 9)
    assert blocks.commit("a", range(9)) == 0
    blocks.free("a")
    assert blocks.find_prefix(range(9)) == 0


def test_the_longest_unused_goes_first_and_the_ends_before_the_beginnings():
    blocks = cached(range(16))
    blocks.allocate("other", 16)
    blocks.commit("other", range(100, 116))
    blocks.free("other")
    for count, first, other in ((12, 12, 16), (16, 8, 16), (28, 0, 12)):
        blocks.allocate("new", count)
        assert blocks.find_prefix(range(17)) == first
        assert blocks.find_prefix(range(100, 117)) == other
        blocks.free("new")
    assert blocks.stats().evictions == 5


def test_a_prefix_in_use_is_not_evicted():
    blocks = cached(range(8))
    blocks.match_prefix("user", range(9))
    with pytest.raises(paged_kv.OutOfBlocksError, match="8 of 10 are free"):
        blocks.allocate("new", 36)
    assert blocks.find_prefix(range(9)) == 8


def test_reset_forgets_prefixes_and_keeps_sequences():
    blocks = cached(range(16))
    blocks.match_prefix("user", range(9))
    row = blocks.blocks("user")
    blocks.reset_prefix_cache()
    assert blocks.find_prefix(range(17)) == 0 and blocks.blocks("user") == row
    assert blocks.stats().free == 8 and blocks.stats().cached == 0


def test_nothing_is_remembered_of_prefixes_that_are_gone():
    blocks = cached(range(40))
    blocks.match_prefix("a", range(9), salt="tenant")
    blocks.free("a")
    blocks.find_prefix(range(9), salt="another")
    blocks.reset_prefix_cache()
    assert len(blocks._index) == 0


def test_events_tell_what_can_be_found():
    blocks = cached(range(8), record_events=True)
    first, second = blocks.take_events()
    assert isinstance(first, BlockStored) and isinstance(second, BlockStored)
    assert second.parent_hash == first.block_hash
    assert (first.tokens, second.tokens) == ((0, 1, 2, 3), (4, 5, 6, 7))
    blocks.allocate("all", 40)
    assert blocks.take_events() == [
        BlockRemoved(second.block_hash, second.block),
        BlockRemoved(first.block_hash, first.block),
    ]
    again = cached(range(8), record_events=True).take_events()
    assert again[1].block_hash == second.block_hash
    salted = allocator(enable_prefix_caching=True, record_events=True)
    salted.allocate("a", 4, salt="tenant")
    salted.commit("a", range(4))
    assert salted.take_events()[0].block_hash != first.block_hash


def test_what_is_committed_evicted_and_committed_again_leaves_nothing_behind():
    """However often: dead nodes and lapsed entries of the list are dropped as others come."""
    blocks = allocator(enable_prefix_caching=True)
    sizes = []
    for turn in range(3000):
        start = turn % 7 * 100
        blocks.match_prefix("a", range(start, start + 17))
        blocks.extend("a", 16 - blocks.num_tokens("a"))
        blocks.commit("a", range(start, start + 16))
        blocks.free("a")
        index = blocks._index
        sizes.append(len(index._dead) + len(index._keys) + len(index.idle._arrivals))
    blocks.check_invariants()
    assert max(sizes[1500:]) <= max(sizes[:1500]) < 2500
    assert blocks.stats().evictions > 5000


def test_a_prefix_without_blocks_of_its_own_is_stored_behind_a_window():
    """Its blocks were given back; a node that died before is not dropped under its feet."""
    blocks = cached(range(8))
    blocks.allocate("all", 40)  # evicts both, whose nodes die
    blocks.free("all")
    blocks.allocate("a", 8)
    blocks.trim_window("a", 0)
    blocks.commit("a", range(8))
    blocks.check_invariants()
    blocks.free("a")
    blocks.check_invariants()
    assert blocks.find_prefix(range(9)) == 0


def test_idle_blocks_go_in_the_order_in_which_they_came(monkeypatch):
    """Beside a plain list, with lapsed entries in between and lists that are cut and rewritten."""
    monkeypatch.setattr(idle_blocks, "LAPSED", 5)
    rng, here = np.random.default_rng(0), []
    states = bytearray([idle_blocks.HELD]) * 30
    idle = idle_blocks.IdleBlocks(states)
    for _ in range(2000):
        away = rng.permutation([block for block in range(30) if block not in here])
        come = away[: rng.integers(0, 20)].tolist()
        for block in come:
            states[block] = idle_blocks.HELD if rng.random() < 0.9 else idle_blocks.UNKNOWN
        others = [block for block in come if states[block] == idle_blocks.UNKNOWN]
        assert idle.add(array("i", come)).tolist() == others
        come = [block for block in come if block not in others]
        here += come[::-1]
        for block in rng.permutation(here)[: rng.integers(0, 4)].tolist():
            idle.remove(block)
            here.remove(block)
        count = int(rng.integers(0, len(here) + 1)) // 2
        assert idle.take(count).tolist() == here[:count]
        del here[:count]
        assert idle.in_order() == here and len(idle) == len(here) and idle.is_sound()
        assert [block for block in range(30) if block in idle] == sorted(here)
