"""Small allocators for tests."""

import paged_kv

NUM_BLOCKS, BLOCK_SIZE = 10, 4


def allocator(num_blocks=NUM_BLOCKS, **options):
    return paged_kv.BlockAllocator(num_blocks, BLOCK_SIZE, **options)


def cached(tokens, **options):
    """An allocator that knows the prefixes of `tokens`, which no sequence holds any more."""
    blocks = allocator(enable_prefix_caching=True, **options)
    blocks.allocate("first", len(tokens))
    blocks.commit("first", tokens)
    blocks.free("first")
    return blocks
