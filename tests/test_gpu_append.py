"""The GPU append kernel, in the Mosaic GPU interpreter, against the oracle, bit by bit."""

import functools

import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from gpu_interpreter import NEEDS_JAX, TIME_LIMIT, interpreter
from jax.sharding import PartitionSpec as P
from kernel_checks import AppendForm, appended, random_append
from poison import poisoned_cache

import paged_kv

pytestmark = [NEEDS_JAX, TIME_LIMIT]

FORMS = [
    AppendForm(None, 16, 1, 64, "bfloat16"),
    AppendForm(None, 8, 2, 128, "float32", num_layers=2),
    AppendForm(7, 16, 3, 80, "float16"),
    AppendForm(40, 24, 1, 192, "bfloat16", num_layers=3),
    AppendForm(33, 16, 5, 96, "bfloat16", num_layers=2),
    AppendForm(70, 5, 1, 8, "float32", batch=3),
    AppendForm(19, 64, 8, 256, "float16", batch=1),
    AppendForm(21, 16, 8, 64, "bfloat16", num_layers=2),
]


@functools.partial(jax.jit, static_argnums=0)
def append(options, cache, keys, values, starts, layer):
    return paged_kv.append_tokens(
        cache, keys, values, query_start_loc=starts, layer=layer, **dict(options)
    )


def options():
    return (("implementation", "mosaic_gpu"), ("interpret", interpreter()))


def check(form, seed):
    step = random_append(form, seed)
    layer = None if form.num_layers is None else seed % form.num_layers
    traced = None if layer is None else jnp.int32(layer)
    after = gpu_interpreter.run(append, options(), *step, traced)
    assert_same_bits((after.key_pool, after.value_pool), appended(*step, layer))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_new_tokens_are_written_and_nothing_else(form):
    """Missing slots, negative positions and padding are dropped."""
    for seed in range(6):
        check(form, seed)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_many_steps(form):
    for seed in range(10, 30):
        check(form, seed)


def poisoned_step(seed):
    """(cache, keys, values) of a decode step that eager use takes."""
    rng = np.random.default_rng(seed)
    sizes = {"num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "num_blocks": 12}
    lengths = [3, 15, 16, 0]
    poisoned = poisoned_cache(rng, lengths, capacity=[4, 16, 17, 1], max_blocks_per_seq=2, **sizes)
    keys, values = (jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.bfloat16) for _ in range(2))
    return paged_kv.advance(poisoned.cache, 1), keys, values


def test_append_works_eagerly_and_keeps_its_inputs():
    step = poisoned_step(3)
    before = jax.tree.map(jnp.copy, step)
    call = lambda *step: paged_kv.append_tokens(*step, **dict(options()))
    after = gpu_interpreter.run(call, *step)
    assert_same_bits(step, before)
    assert_same_bits((after.key_pool, after.value_pool), appended(*step, None, None))


def test_append_under_vmap_runs_once_per_element():
    steps = [poisoned_step(seed) for seed in (4, 5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    call = jax.vmap(lambda *step: append(options(), *step, None, None))
    after = gpu_interpreter.run(call, *stacked)
    for i, step in enumerate(steps):
        assert_same_bits((after.key_pool[i], after.value_pool[i]), appended(*step, None, None))


def test_append_inside_a_shard_map_that_checks_varying_axes():
    """Which no ref may vary over."""
    step = poisoned_step(6)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("heads",))
    over_heads = lambda ndim: P(*[None] * (ndim - 2), "heads")
    specs = jax.tree.map(lambda x: over_heads(x.ndim) if x.ndim > 2 else P(), step)
    call = lambda *step: paged_kv.append_tokens(*step, **dict(options()))
    sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0])
    after = gpu_interpreter.run(jax.jit(sharded), *step)
    assert_same_bits((after.key_pool, after.value_pool), appended(*step, None, None))


def test_a_chunk_that_is_not_waited_for_shows(monkeypatch):
    from paged_kv.kernels.gpu import append as kernel

    jax.clear_caches()
    monkeypatch.setattr(kernel.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises(Exception, match=r"(?i)race|barrier|phase"):
        check(FORMS[0], 0)
    jax.clear_caches()
