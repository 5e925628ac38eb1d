"""`BlockAllocator`: no block in two hands, none lost, nothing changed by a refusal."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import paged_kv

NUM_BLOCKS, BLOCK_SIZE = 10, 4


def allocator():
    return paged_kv.BlockAllocator(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


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


class AllocatorAgainstCounting(RuleBasedStateMachine):
    """Random requests beside a dictionary of token counts."""

    def __init__(self):
        super().__init__()
        self.blocks, self.tokens = allocator(), {}

    def needed(self, tokens):
        return -(-tokens // BLOCK_SIZE)

    @rule(name=st.integers(0, 3), count=st.integers(0, 20))
    def request(self, name, count):
        before = self.tokens.get(name)
        held = self.needed(before or 0)
        more = self.needed((before or 0) + count) - held
        call = self.blocks.allocate if before is None else self.blocks.extend
        if more > self.blocks.num_free_blocks:
            with pytest.raises(paged_kv.OutOfBlocksError):
                call(name, count)
        else:
            assert len(call(name, count)) == more
            self.tokens[name] = (before or 0) + count

    @rule(name=st.integers(0, 3))
    def free(self, name):
        if name in self.tokens:
            self.blocks.free(name)
            del self.tokens[name]

    @invariant()
    def every_block_is_in_one_place(self):
        held = [block for name in self.tokens for block in self.blocks.blocks(name)]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(NUM_BLOCKS))
        assert len(held) == sum(map(self.needed, self.tokens.values()))
        assert self.blocks.num_free_blocks == NUM_BLOCKS - len(held)


TestAllocatorAgainstCounting = AllocatorAgainstCounting.TestCase
TestAllocatorAgainstCounting.settings = settings(max_examples=50, stateful_step_count=20)
