"""Which implementation runs: chosen when a program is lowered, for its platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import NEEDS_JAX
from jax import export

import paged_kv
from paged_kv.kernels import gpu as gpu_kernels

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _cache():
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=8,
        block_size=16,
        num_kv_heads=2,
        head_dim=128,
        batch_size=2,
        max_blocks_per_seq=4,
        dtype=jnp.bfloat16,
    )
    table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    return paged_kv.advance(paged_kv.set_block_table(cache, table), 20)


def _query():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 128)), jnp.float32)


def _step(query, cache):
    cache = paged_kv.append_tokens(cache, query[:, :2], query[:, 2:])
    return paged_kv.paged_attention(query, cache)


def _fused_step(query, cache):
    return paged_kv.append_and_attend(query, query[:, :2], query[:, 2:], cache)[0]


def test_kernels_of_other_platforms_are_not_traced(monkeypatch):
    from paged_kv.kernels.tpu import append, attention

    jax.clear_caches()

    def fail(*args, **kwargs):
        raise AssertionError("traced for a platform the program does not run on")

    monkeypatch.setattr(attention, "attend", fail)
    monkeypatch.setattr(attention, "append_and_attend", fail)
    monkeypatch.setattr(append, "append", fail)
    jax.jit(lambda query, cache: _step(query, cache)).lower(_query(), _cache()).compile()
    jax.jit(lambda query, cache: _fused_step(query, cache)).lower(_query(), _cache()).compile()


def test_a_program_lowered_for_tpu_without_one_holds_the_kernels():
    traced = jax.jit(lambda query, cache: _step(query, cache)).trace(_query(), _cache())
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


@NEEDS_JAX
def test_a_program_lowered_for_gpu_without_one_holds_the_kernels():
    traced = jax.jit(lambda query, cache: _step(query, cache)).trace(_query(), _cache())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


def test_append_and_attend_is_one_kernel_on_tpu_and_two_on_gpu():
    traced = jax.jit(lambda query, cache: _fused_step(query, cache)).trace(_query(), _cache())
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    if gpu_kernels.unsupported_version() is None:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu") >= 2


@pytest.mark.parametrize("step", [_step, _fused_step])
def test_one_exported_program_serves_several_platforms(step):
    query, cache = _query(), _cache()
    checks = [export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    step = jax.jit(step)
    exported = export.export(step, platforms=("tpu", "cpu"), disabled_checks=checks)(query, cache)
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(query, cache), step(query, cache))


def test_no_kernel_for_a_problem_means_the_reference():
    query, cache = _query(), _cache()
    odd = paged_kv.PagedKVCache(
        cache.key_pool[:, :, :, :40],
        cache.value_pool[:, :, :, :40],
        cache.block_table,
        cache.seq_lengths,
    )
    traced = jax.jit(paged_kv.paged_attention).trace(query[:, :, :40], odd)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("argument", ["keys", "pools"])
def test_append_is_differentiable(argument):
    query, cache = _query(), _cache()

    def loss(keys, key_pool):
        full = paged_kv.PagedKVCache(
            key_pool, cache.value_pool, cache.block_table, cache.seq_lengths
        )
        full = paged_kv.append_tokens(full, keys, query[:, 2:])
        return jnp.sum(full.key_pool.astype(jnp.float32) ** 2)

    pool = cache.key_pool + 1
    if argument == "keys":
        gradient = jax.grad(loss)(query[:, :2], pool)
        expected = 2 * query[:, :2].astype(jnp.bfloat16).astype(jnp.float32)
    else:
        gradient = jax.grad(loss, argnums=1)(query[:, :2], pool)
        # position 19 of each sequence is offset 3 of its second block: overwritten, so no gradient
        expected = (2 * pool).at[jnp.array([1, 5]), 3].set(0)
    np.testing.assert_array_equal(gradient, expected)
