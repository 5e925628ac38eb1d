"""Append is in place: with the cache donated, no copy of a pool in the compiled program (CPU)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from hlo import assert_updated_in_place
from poison import poisoned_cache

import paged_kv

HALF_POOLS = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA's CPU backend of jax 0.10 turns a whole 16-bit pool to float32 for a scatter",
)
DTYPES = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=HALF_POOLS)])


@DTYPES
@pytest.mark.parametrize("num_tokens", [None, 24], ids=["decode", "prefill"])
def test_donated_step_over_a_stack_copies_no_pool(dtype, num_tokens):
    """A scan over layers: pools fully aliased, no copy of a pool nor of a layer of one."""
    sizes = steps.Sizes(dtype=dtype, head_dim=64)
    compiled = steps.compile_donated(sizes, num_tokens)
    assert_updated_in_place(compiled, sizes.layer_elements)
    assert scratch_bytes(compiled) < sizes.layer_elements


def scratch_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


OPS = {
    "append_layer_0": lambda x, cache: paged_kv.append_tokens(cache, x, x, layer=0),
    "copy_blocks": lambda x, cache: paged_kv.copy_blocks(
        cache, cache.block_table[:, 0], cache.block_table[:, 1]
    ),
    "scrub_blocks": lambda x, cache: paged_kv.scrub_blocks(cache, cache.block_table[:, 0]),
    "reset_sequences": lambda x, cache: paged_kv.reset_sequences(cache, cache.seq_lengths > 3),
    "truncate": lambda x, cache: paged_kv.truncate(cache, cache.seq_lengths // 2),
    "set_block_table": lambda x, cache: paged_kv.set_block_table(cache, cache.block_table + 1),
}


@DTYPES
@pytest.mark.parametrize("op", list(OPS))
def test_donated_op_copies_no_pool(op, dtype):
    sizes = steps.Sizes(dtype=dtype, head_dim=64, group=1)
    activations, _, cache = steps.arguments(sizes)
    compiled = jax.jit(OPS[op], donate_argnums=1).lower(activations, cache).compile()
    assert_updated_in_place(compiled, sizes.layer_elements)
    assert scratch_bytes(compiled) < sizes.layer_elements


def test_donated_step_over_layers_in_a_python_loop_copies_no_pool():
    """One single-layer cache per layer, a tuple of them donated."""
    sizes = steps.Sizes(dtype="float32", head_dim=64)
    x, _, stack = steps.arguments(sizes)
    pool = jax.ShapeDtypeStruct(stack.key_pool.shape[1:], stack.key_pool.dtype)
    cache = paged_kv.PagedKVCache(pool, pool, stack.block_table, stack.seq_lengths)

    def step(x, caches):
        caches = [paged_kv.advance(cache, 1) for cache in caches]
        for i, cache in enumerate(caches):
            new = x[:, :2]
            out, caches[i] = paged_kv.append_and_attend(x, new, -new, cache)
            x = x + out
        return x, tuple(caches)

    compiled = jax.jit(step, donate_argnums=1).lower(x, (cache,) * 3).compile()
    assert_updated_in_place(compiled, sizes.layer_elements, num_pools=6)


@functools.partial(jax.jit, donate_argnums=0)
def append_donated(cache, keys):
    return paged_kv.append_tokens(cache, keys, keys)


def test_donated_pool_keeps_its_memory_when_run():
    """The arrays that come back lie where those that went in did, and those are gone."""
    cache = poisoned_cache(
        np.random.default_rng(0), [3, 5], capacity=[4, 6], num_kv_heads=2, head_dim=8
    ).cache
    cache = paged_kv.advance(cache, 1)
    before = [pool.unsafe_buffer_pointer() for pool in (cache.key_pool, cache.value_pool)]
    after = append_donated(cache, jnp.ones((2, 2, 8)))
    assert cache.key_pool.is_deleted()
    pools = (after.key_pool, after.value_pool)
    assert [pool.unsafe_buffer_pointer() for pool in pools] == before
