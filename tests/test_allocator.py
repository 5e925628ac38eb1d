"""`BlockAllocator`, one promise at a time; test_allocator_model has them all together."""

import itertools
import threading

import numpy as np
import pytest
from allocators import BLOCK_SIZE, NUM_BLOCKS, allocator, cached

import paged_kv
from benchmarks import allocator as benchmark


def pending(blocks):
    """(source, target) pairs to copy, and blocks to scrub."""
    sources, targets, scrubs = (ids[ids >= 0].tolist() for ids in blocks.take_pending())
    return list(zip(sources, targets, strict=True)), scrubs


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (40, 10)])
def test_allocate_gives_as_many_blocks_as_the_tokens_fill(num_tokens, expected):
    blocks = allocator()
    given = blocks.allocate("a", num_tokens)
    assert given == blocks.blocks("a")
    assert len(set(given)) == len(given) == expected
    assert blocks.num_free_blocks == NUM_BLOCKS - expected


def test_extend_fills_the_last_block_before_it_takes_another():
    blocks = allocator()
    first = blocks.allocate("a", 3)
    assert blocks.extend("a", 1) == []
    added = blocks.extend("a", 1)
    assert len(added) == 1
    assert blocks.blocks("a") == first + added


def test_free_gives_all_blocks_back():
    blocks = allocator()
    blocks.allocate("a", 40)
    blocks.free("a")
    assert blocks.num_free_blocks == NUM_BLOCKS
    assert sorted(blocks.allocate("b", 40)) == list(range(NUM_BLOCKS))


def test_a_freed_sequence_may_be_allocated_again():
    blocks = allocator()
    blocks.allocate("a", 4)
    blocks.free("a")
    assert len(blocks.allocate("a", 8)) == 2


@pytest.mark.parametrize("request_more", [
    lambda blocks: blocks.allocate("b", 33),
    lambda blocks: blocks.extend("a", 40),
], ids=["allocate", "extend"])  # fmt: skip
def test_running_out_changes_nothing(request_more):
    blocks = allocator()
    held = blocks.allocate("a", 8)
    with pytest.raises(paged_kv.OutOfBlocksError, match="of 10 are free"):
        request_more(blocks)
    assert blocks.blocks("a") == held
    assert blocks.num_free_blocks == NUM_BLOCKS - 2
    # the tokens that were refused are not counted either
    assert blocks.extend("a", 1) != []
    assert len(blocks.allocate("b", 4 * 7)) == 7


def test_out_of_blocks_is_a_value_error():
    assert issubclass(paged_kv.OutOfBlocksError, ValueError)


def test_lists_handed_out_are_the_callers_own():
    blocks = allocator()
    for handed_out in (blocks.allocate("a", 8), blocks.extend("a", 4), blocks.blocks("a")):
        before = blocks.blocks("a")
        handed_out.append(99)
        assert blocks.blocks("a") == before


def test_any_hashable_names_a_sequence():
    blocks = allocator()
    for name in ("a", 0, ("user", 3), None):
        blocks.allocate(name, 1)
    assert blocks.num_free_blocks == NUM_BLOCKS - 4


# ---- sharing -------------------------------------------------------------------------------------


def test_a_fork_costs_nothing_until_it_writes():
    blocks = allocator()
    row = blocks.allocate("a", 6)
    assert blocks.fork("a", "b") == row
    assert blocks.num_free_blocks == NUM_BLOCKS - 2 and pending(blocks) == ([], [])
    assert blocks.extend("b", 1) == []
    first, second = blocks.blocks("b")
    assert first == row[0] and second not in row
    assert pending(blocks) == ([(row[1], second)], [])
    blocks.extend("a", 1)  # the block is its own by now
    assert blocks.blocks("a") == row and pending(blocks) == ([], [])


def test_a_fork_of_full_blocks_copies_nothing():
    blocks = allocator()
    row = blocks.allocate("a", 8)
    blocks.fork("a", "b")
    added = blocks.extend("b", 1)
    assert blocks.blocks("b") == row + added and pending(blocks) == ([], [])


def test_a_shared_block_is_free_after_its_last_holder():
    blocks = allocator()
    blocks.allocate("a", 8)
    for name in ("b", "c"):
        blocks.fork("a", name)
    for name, free in (("b", 8), ("a", 8), ("c", 10)):
        blocks.free(name)
        assert blocks.num_free_blocks == free


def test_a_copy_of_a_copy_is_made_from_what_is_there():
    blocks = allocator()
    (source,) = blocks.allocate("a", 2)
    blocks.fork("a", "b")
    blocks.extend("b", 1)
    blocks.truncate("b", 2)
    blocks.fork("b", "c")
    blocks.extend("c", 1)
    copies, _ = pending(blocks)
    assert dict(map(reversed, copies)) == {blocks.blocks(name)[0]: source for name in "bc"}


def test_pending_lists_are_of_few_lengths():
    blocks = allocator(scrub_on_reuse=True)
    blocks.allocate("a", 20)
    assert blocks.take_pending().scrub_ids.tolist()[5:] == [-1] * 3
    assert all(ids.size == 0 for ids in blocks.take_pending())


def test_scrubs_name_what_was_handed_out_and_will_not_be_overwritten():
    blocks = allocator(scrub_on_reuse=True)
    row = blocks.allocate("a", 6)
    assert pending(blocks) == ([], row)
    blocks.fork("a", "b")
    added = blocks.extend("b", 3)
    copies, scrubs = pending(blocks)
    assert copies == [(row[1], blocks.blocks("b")[1])] and scrubs == added


# ---- shorter -------------------------------------------------------------------------------------


def test_truncate_gives_back_what_is_past_the_tokens():
    blocks = allocator()
    row = blocks.allocate("a", 20)
    blocks.truncate("a", 9)
    assert blocks.blocks("a") == row[:3] and blocks.num_tokens("a") == 9
    assert blocks.extend("a", 3) == []


def test_what_is_truncated_and_written_again_is_not_found():
    blocks = allocator(enable_prefix_caching=True)
    blocks.allocate("a", 8)
    blocks.commit("a", range(8))
    blocks.truncate("a", 7)
    assert blocks.find_prefix(range(9)) == 8
    blocks.extend("a", 1)
    assert blocks.find_prefix(range(9)) == 4
    assert blocks.commit("a", [0, 1, 2, 3, 4, 5, 6, 70]) == 8
    assert blocks.find_prefix([0, 1, 2, 3, 4, 5, 6, 70, 0]) == 8
    assert pending(blocks) == ([], [])


@pytest.mark.parametrize(("window", "position", "given"), [
    (8, None, 3), ((8, 0), None, 3), (9, None, 2), (8, 19, 2), (0, None, 5), (20, None, 0),
    (3, 0, 0),
])  # fmt: skip
def test_a_window_gives_back_the_blocks_that_no_later_query_sees(window, position, given):
    blocks = allocator()
    row = blocks.allocate("a", 20)
    assert blocks.trim_window("a", window, next_position=position) == given
    assert blocks.blocks("a") == [-1] * given + row[given:]
    assert blocks.num_free_blocks == 5 + given
    blocks.free("a")
    assert blocks.num_free_blocks == NUM_BLOCKS


# ---- the whole pool ------------------------------------------------------------------------------


def test_sequences_that_grow_in_turns_get_runs():
    blocks = allocator(num_blocks=1000)
    for _, name in itertools.product(range(8), range(20)):
        (blocks.extend if name in blocks else blocks.allocate)(name, BLOCK_SIZE)
    for name in range(20):
        assert (np.diff(blocks.blocks(name)) == 1).all()


def test_a_prompt_gets_the_free_neighbours():
    blocks = allocator(num_blocks=100)
    for name in range(50):
        blocks.allocate(name, 2 * BLOCK_SIZE)
    freed = sorted(block for name in range(20, 40) for block in blocks.blocks(name))
    for name in range(20, 40):
        blocks.free(name)
    neighbours = lambda row: (np.diff(row) == 1).sum()
    row = blocks.allocate("long", 40 * BLOCK_SIZE)
    assert sorted(row) == freed and neighbours(row) >= neighbours(freed) - 1


@pytest.mark.parametrize("count", [1, 7, 8, 300])
def test_scattered_blocks_are_found_too(count):
    blocks = allocator(num_blocks=2000)
    for name in range(2000):
        blocks.allocate(name, 1)
    freed = [blocks.blocks(name)[0] for name in range(0, 2000, 5)]
    for name in range(0, 2000, 5):
        blocks.free(name)
    for number in range(400 // count):
        assert set(blocks.allocate(("new", number), count * BLOCK_SIZE)) <= set(freed)
    blocks.check_invariants()
    assert blocks.num_free_blocks == 400 % count


def test_the_table_is_an_array_of_rows():
    blocks = allocator()
    rows = [blocks.allocate(name, tokens) for name, tokens in (("a", 9), ("b", 0), ("c", 4))]
    table = blocks.block_table(["c", "gone", "a"], 4, allow_missing=True)
    assert table.dtype == np.int32
    assert table.tolist() == [rows[2] + [-1] * 3, [-1] * 4, [*rows[0], -1]]
    assert blocks.block_table([], 4).shape == (0, 4)
    assert blocks.block_table("c", 2, num_rows=3).tolist() == [[rows[2][0], -1], [-1, -1], [-1, -1]]


def test_stats_count_blocks_and_tokens():
    blocks = cached(range(8))
    blocks.match_prefix("a", range(6))
    blocks.allocate("b", 8)
    stats = blocks.stats()
    assert (stats.num_blocks, stats.used, stats.cached, stats.free) == (10, 3, 1, 6)
    assert (stats.sequences, stats.peak_used, stats.evictions) == (2, 3, 0)
    assert (stats.usage, stats.prefix_queries, stats.prefix_hits) == (0.3, 6, 4)
    assert allocator().stats().hit_rate == 0


def test_defragment_brings_sequences_to_the_front():
    blocks = allocator(num_blocks=12)
    for name, count in (("a", 4), ("b", 4), ("c", 8), ("a", 8), ("d", 4), ("c", 4)):
        (blocks.extend if name in blocks else blocks.allocate)(name, count)
    blocks.free("b")
    before = {name: blocks.blocks(name) for name in "acd"}
    sources, targets = blocks.defragment()
    assert [blocks.blocks(name) for name in "acd"] == [[0, 1, 2], [3, 4, 5], [6]]
    new_id = dict(zip(sources.tolist(), targets.tolist(), strict=True))
    for name, row in before.items():
        assert [new_id.get(block, block) for block in row] == blocks.blocks(name)
    assert all(ids.size == 0 for ids in blocks.defragment())
    blocks.check_invariants()


def test_threads_may_share_an_allocator():
    blocks, errors = allocator(num_blocks=64, enable_prefix_caching=True), []

    def work(thread):
        try:
            for number in range(300):
                name = (thread, number)
                found = blocks.match_prefix(name, range(20))
                blocks.extend(name, 20 - found)
                blocks.commit(name, range(20))
                blocks.fork(name, (name, "fork"))
                blocks.extend((name, "fork"), 3)
                blocks.free(name)
                blocks.free((name, "fork"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    blocks.check_invariants()
    assert blocks.num_free_blocks == 64


def test_the_benchmark_runs_and_says_what_each_call_takes(capsys):
    benchmark.main(["--blocks", "1500", "--sequences", "50", "--calls", "600"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("allocate", "extend", "free"):
        assert sum(line.strip().startswith(name) and " us" in line for line in lines) == 2
    assert sum(line.startswith("4096 tokens matched") for line in lines) == 2
