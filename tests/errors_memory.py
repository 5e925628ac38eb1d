"""Calls of the memory manager that are errors: the allocators, and blocks that move."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from errors_api import Row, cache, int32, stack

import paged_kv


def allocator(do, **options):
    """`do` on an allocator of four blocks of 16 of which "a" holds two."""
    blocks = paged_kv.BlockAllocator(num_blocks=4, block_size=16, **options)
    blocks.allocate("a", 20)
    return do(blocks)


def trimmed(blocks):
    blocks.trim_window("a", 0)
    blocks.truncate("a", 15)


def committed_otherwise(blocks):
    blocks.commit("a", range(16))
    blocks.extend("a", 12)
    blocks.commit("a", range(1, 33))


def shared_tail_in_a_full_pool(blocks):
    blocks.allocate("b", 32)
    blocks.fork("a", "c")
    blocks.extend("c", 1)


def pending(blocks):
    blocks.fork("a", "b")
    blocks.extend("b", 1)
    blocks.defragment()


def pending_elsewhere(blocks):
    """A copy into a block that a smaller pool does not have."""
    return blocks.take_pending()._replace(copy_sources=int32([0]), copy_targets=int32([9]))


def broken(blocks):
    blocks._ledger.free.give(blocks._sequences["a"].blocks)
    blocks._sequences["a"].num_tokens += 13
    blocks._index._uses[0] += 1
    blocks.check_invariants()


ALLOCATOR = [
    Row(
        "allocator size", lambda: paged_kv.BlockAllocator(0, 16), "num_blocks=0 must be a positive"
    ),
    Row("id taken", lambda: allocator(lambda a: a.allocate("a", 1)), "'a' is allocated already"),
    Row("fork onto itself", lambda: allocator(lambda a: a.fork("a", "a")), "'a' is allocated alr"),
    Row("match id", lambda: allocator(lambda a: a.match_prefix("a", [])), "'a' is allocated alr"),
    Row(
        "allocate negative", lambda: allocator(lambda a: a.allocate("b", -1)), "num_tokens=-1 must"
    ),
    Row("allocate float", lambda: allocator(lambda a: a.allocate("b", 1.0)), r"num_tokens=1\.0"),
    Row("extend negative", lambda: allocator(lambda a: a.extend("a", -1)), "num_tokens=-1 must be"),
    Row("extend unknown", lambda: allocator(lambda a: a.extend("b", 1)), "'b' is not allocated"),
    Row("free unknown", lambda: allocator(lambda a: a.free("b")), "'b' is not allocated; call"),
    Row("fork unknown", lambda: allocator(lambda a: a.fork("b", "c")), "'b' is not allocated"),
    Row("blocks of unknown", lambda: allocator(lambda a: a.blocks("b")), "'b' is not allocated"),
    Row("tokens of unknown", lambda: allocator(lambda a: a.num_tokens("b")), "'b' is not alloc"),
    Row("table of unknown", lambda: allocator(lambda a: a.block_table("b", 4)), "'b' is not"),
    Row(
        "table too narrow",
        lambda: allocator(lambda a: a.block_table("a", 1)),
        "'a' has 2 blocks, its row max_blocks=1; make the cache with a larger",
    ),
    Row(
        "table too low",
        lambda: allocator(lambda a: a.block_table("aa", 4, num_rows=1)),
        "2 sequences do not fit into num_rows=1",
    ),
    Row(
        "out of blocks",
        lambda: allocator(lambda a: a.allocate("b", 33)),
        "'b' needs 3 more blocks for 33 tokens, 2 of 4 are free",
        paged_kv.OutOfBlocksError,
    ),
    Row(
        "out of blocks for a copy",
        lambda: allocator(shared_tail_in_a_full_pool),
        "'c' needs 1 more blocks for 21 tokens, 0 of 4 are free",
        paged_kv.OutOfBlocksError,
    ),
    Row(
        "shorten longer",
        lambda: allocator(lambda a: a.truncate("a", 21)),
        "'a' cannot be truncated to 21 tokens: it has 20, and trim_window gave the first 0",
    ),
    Row("shorten trimmed", lambda: allocator(trimmed), "to 15 tokens: .* gave the first 16 of"),
    Row("shorten negative", lambda: allocator(lambda a: a.truncate("a", -1)), "num_tokens=-1"),
    Row("trim window", lambda: allocator(lambda a: a.trim_window("a", -1)), "local_window_size=-1"),
    Row(
        "trim position",
        lambda: allocator(lambda a: a.trim_window("a", 1, next_position=21)),
        r"next_position=21 must be in \[0, 21\)",
    ),
    Row(
        "commit more than there is",
        lambda: allocator(lambda a: a.commit("a", range(21))),
        "'a' has 20 tokens, 21 cannot be committed; extend it first",
    ),
    Row(
        "commit other tokens",
        lambda: allocator(committed_otherwise, enable_prefix_caching=True),
        "tokens of sequence 'a' differ from those committed before, at 0 to 15",
    ),
    Row(
        "tokens that are no ints",
        lambda: allocator(lambda a: a.find_prefix(np.ones(99)), enable_prefix_caching=True),
        "tokens must be a row of ints, each within int32",
    ),
    Row(
        "tokens that are too large",
        lambda: allocator(lambda a: a.find_prefix([2**31] * 99), enable_prefix_caching=True),
        "tokens must be a row of ints, each within int32",
    ),
    Row(
        "salt",
        lambda: allocator(lambda a: a.allocate("b", 1, salt=5)),
        "salt=5 must be a str, bytes or None",
    ),
    Row("defragment pending", lambda: allocator(pending), "copies or scrubs are pending; apply_p"),
    Row(
        "invariants",
        lambda: allocator(broken),
        "two hands, or lost; sequence 'a' has a wrong row; the tree of prefixes is broken",
        AssertionError,
    ),
]


def swapped_out(**changes):
    return dataclasses.replace(paged_kv.swap_out(cache(), [6, 3]), **changes)


device = lambda free_ids=None: paged_kv.init_device_allocator(8, free_ids)

MOVING = [
    Row("swap out past pool", lambda: paged_kv.swap_out(cache(), [8]), "block_ids=.* below num_b"),
    Row("swap out dtype", lambda: paged_kv.swap_out(cache(), jnp.ones(1)), "must be int32"),
    Row(
        "swap in past pool",
        lambda: paged_kv.swap_in(cache(), swapped_out(), [0, 8]),
        "block_ids=.* must be below num_blocks=8",
    ),
    Row("swap in twice", lambda: paged_kv.swap_in(cache(), swapped_out(), [2, 2]), "block twice"),
    Row(
        "swap in count",
        lambda: paged_kv.swap_in(cache(), swapped_out(), [0, 2, 4]),
        r"keys float32\(2, 4, 2, 8\) of host_blocks must be float32\(4, 4, 2, 8\) for 4 block_ids",
    ),
    Row("swap in layers", lambda: paged_kv.swap_in(stack(), swapped_out(), [0, 2]), r"\(3, 2, 4,"),
    Row(
        "swap in dtype",
        lambda: paged_kv.swap_in(
            cache(), swapped_out(values=jnp.zeros((2, 4, 2, 8), jnp.bfloat16)), [0, 2]
        ),
        "values bfloat16",
    ),
    Row(
        "defragment another's",
        lambda: allocator(lambda a: paged_kv.defragment(cache(), a)),
        "allocator has num_blocks=4 of block_size=16, the cache 8 of 4; pass the cache's own",
    ),
    Row(
        "pending past pool",
        lambda: paged_kv.apply_pending(cache(), allocator(pending_elsewhere)),
        r"target_ids=\[9\] must be below num_blocks=8",
    ),
    Row("move pairs", lambda: paged_kv.move_blocks(cache(), int32([0]), int32([])), "pair up"),
    Row("device pool", lambda: paged_kv.init_device_allocator(0), "num_blocks=0 must be a posit"),
    Row("device ids", lambda: device([1, 8]), r"free_ids=\[1, 8\] must be different ids in \[0, 8"),
    Row("device ids twice", lambda: device([1, 1]), r"free_ids=\[1, 1\] must be different"),
    Row(
        "device counts",
        lambda: paged_kv.device_allocate(cache(), device(), int32([1])),
        r"num_new_tokens=.* must be an int or int32 \(batch,\) = \(2,\)",
    ),
    Row(
        "device mask",
        lambda: paged_kv.device_free(cache(), device(), int32([0, 1])),
        "mask int32.* must be bool",
    ),
]

PADDING = [
    Row("bucket negative", lambda: paged_kv.pad_to_bucket(-1), "count=-1 must be an int of at l"),
    Row(
        "bucket missing",
        lambda: paged_kv.pad_to_bucket(65, [16, 64]),
        r"count=65 is above the last of buckets=\[16, 64\]; split the step",
    ),
]

ROWS = [*ALLOCATOR, *MOVING, *PADDING]
