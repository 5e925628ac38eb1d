"""The memory that the reference takes, as XLA plans it."""

import jax
import jax.numpy as jnp
import pytest

import paged_kv


def scratch_bytes(max_blocks_per_seq, block_size, differentiate=False, batch=4):
    """Scratch memory of the compiled call, as XLA plans it."""
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    pool = array(64, block_size, 2, 64)
    table = array(batch, max_blocks_per_seq, dtype=jnp.int32)
    cache = paged_kv.PagedKVCache(pool, pool, table, array(batch, dtype=jnp.int32))
    attend = lambda query, cache: paged_kv.paged_attention(query, cache, implementation="xla").sum()
    run = jax.grad(attend) if differentiate else attend
    compiled = jax.jit(run).lower(array(batch, 4, 64), cache).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_memory_does_not_grow_with_batch_times_blocks_times_block_size(differentiate):
    """Gathered, the keys of 4 x 2**16 x 128 slots would take 16 GiB.  Scratch is a tile of keys;
    a table twice as wide may add two masks of itself, a block twice as large nothing."""
    small, large = (scratch_bytes(*sizes, differentiate) for sizes in [(2**15, 64), (2**16, 128)])
    assert large < 64 * 2**20
    assert large - small <= 2 * 4 * 2**15
