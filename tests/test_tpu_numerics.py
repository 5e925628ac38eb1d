"""What other kernels get wrong: sums of very long sequences, and slots that a window hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from jax.experimental.pallas import tpu as pltpu

import paged_kv


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sum_over_256k_tokens_keeps_its_digits():
    """Uniform attention: 1/262144 each, which a bfloat16 sum of weights would lose."""
    length, block_size, num_blocks = 1 << 18, 128, 64
    draw = lambda key: jax.random.normal(key, (num_blocks, block_size, 1, 128), jnp.bfloat16)
    keys, values = draw(jax.random.key(0)), 1 + draw(jax.random.key(1))
    table = np.arange(length // block_size, dtype=np.int32)[None] * 7 % num_blocks
    cache = paged_kv.PagedKVCache(keys, values, jnp.asarray(table), jnp.array([length], jnp.int32))
    out, lse = paged_kv.paged_attention(
        jnp.zeros((1, 8, 128), jnp.bfloat16),
        cache,
        return_residual=True,
        implementation="mosaic_tpu",
        interpret=pltpu.InterpretParams(),
    )
    expected = np.asarray(values, np.float64)[table[0]].mean((0, 1))
    np.testing.assert_allclose(np.asarray(out[0], np.float64), np.tile(expected, (8, 1)), atol=1e-2)
    np.testing.assert_allclose(lse, np.full((1, 8), np.log(length)), atol=1e-5)


def test_a_windowed_prefill_writes_every_slot():
    """Also those that no query of the step, nor of a later one, can see; bit by bit."""
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=24, block_size=16, num_kv_heads=2, head_dim=128, batch_size=2,
        max_blocks_per_seq=12, dtype=jnp.bfloat16,
    )  # fmt: skip
    cache = paged_kv.set_block_table(cache, np.arange(24, dtype=np.int32).reshape(2, 12))
    cache = paged_kv.advance(cache, jnp.array([90, 77], jnp.int32))
    keys, values = jax.random.normal(jax.random.key(0), (2, 121, 2, 128), jnp.bfloat16)
    query = jax.random.normal(jax.random.key(1), (121, 4, 128), jnp.bfloat16)
    step = lambda **how: paged_kv.append_and_attend(
        query, keys, values, cache, local_window_size=(20, 0),
        query_start_loc=jnp.array([0, 60, 121], jnp.int32), **how,
    )[1]  # fmt: skip
    after = step(implementation="mosaic_tpu", interpret=True)
    expected = step(implementation="xla")
    assert_same_bits((after.key_pool, after.value_pool), (expected.key_pool, expected.value_pool))
    written = jnp.any(after.key_pool[:6] != 0, axis=(2, 3)).reshape(-1)
    assert written[30:90].all() and not written[:30].any() and not written[90:].any()
