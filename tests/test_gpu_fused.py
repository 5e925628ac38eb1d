"""GPU decode that appends too, in the interpreter, bit by bit as one after the other."""

import functools

import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from gpu_interpreter import NEEDS_JAX, TIME_LIMIT, interpreter
from kernel_checks import appended
from poison import poisoned_cache

import paged_kv

pytestmark = [NEEDS_JAX, TIME_LIMIT]

EDGES = (0, 1, 15, 16, 17, 90)
FORMS = {
    # row 3 has an entry outside the pool before its new token, row 4 for its new token
    "gqa": ({"num_kv_heads": 2, "num_layers": 2}, 3, {}, ((3, 0), (4, 1))),
    "mqa_window": ({"num_kv_heads": 1, "head_dim": 128}, 4, {"local_window_size": (20, 0)}, ()),
    "tiles_within_blocks": ({"num_kv_heads": 8, "head_dim": 80}, 1, {"logits_soft_cap": 2.5}, ()),
    "wide": ({"num_kv_heads": 1, "head_dim": 256}, 4, {"is_causal": False}, ()),
    "two_groups_of_rows": ({"num_kv_heads": 2}, 33, {"local_window_size": 0}, ()),
}


def step_of(form, lengths=EDGES):
    """(query, keys, values, cache, layer), advanced already; slots of new tokens are poison."""
    sizes, group, _, wild = FORMS[form]
    rng = np.random.default_rng(3)
    sizes = {"block_size": 16, "head_dim": 64, "dtype": jnp.bfloat16} | sizes
    before = np.maximum(np.array(lengths) - 1, 0)
    cache = poisoned_cache(rng, before, capacity=lengths, **sizes).cache
    table = np.array(cache.block_table)
    for i, at in enumerate(wild):
        table[at] = (-1, cache.num_blocks)[i % 2]
    lengths = jnp.asarray(lengths, jnp.int32)
    cache = paged_kv.PagedKVCache(cache.key_pool, cache.value_pool, jnp.asarray(table), lengths)
    heads, dim = sizes["num_kv_heads"], sizes["head_dim"]
    normal = lambda n: jnp.asarray(rng.standard_normal((len(lengths), n, dim)), jnp.bfloat16)
    layer = jnp.int32(1) if "num_layers" in sizes else None
    return normal(heads * group), normal(heads), normal(heads), cache, layer


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(form, is_fused, query, keys, values, cache, layer):
    options = {"implementation": "mosaic_gpu", "interpret": interpreter(), "layer": layer}
    attention = {"return_residual": True, **FORMS[form][2]}
    if is_fused:
        return paged_kv.append_and_attend(query, keys, values, cache, **options, **attention)
    cache = paged_kv.append_tokens(cache, keys, values, **options)
    return paged_kv.paged_attention(query, cache, **options, **attention), cache


def check(form, monkeypatch):
    from paged_kv.kernels.gpu import append

    step = step_of(form)
    *_, keys, values, cache, layer = step
    expected = gpu_interpreter.run(run, form, False, *step)
    with monkeypatch.context() as patch:
        # the kernel of append has no part in it
        patch.setattr(append, "append", None)
        result, after = gpu_interpreter.run(run, form, True, *step)
    assert_same_bits((result, after), expected)
    number = None if layer is None else int(layer)
    pools = appended(cache, keys, values, None, number)
    assert_same_bits((after.key_pool, after.value_pool), pools)


QUICK = ("gqa",)


@pytest.mark.parametrize("form", QUICK)
def test_bits_are_those_of_one_after_the_other(form, monkeypatch):
    check(form, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form not in QUICK])
def test_bits_are_those_of_one_after_the_other_in_any_form(form, monkeypatch):
    check(form, monkeypatch)


def test_a_token_that_is_stored_late_shows(monkeypatch):
    """The copies of its block must wait for it."""
    from paged_kv.kernels.gpu import decode_append

    jax.clear_caches()
    monkeypatch.setattr(decode_append.plgpu, "wait_smem_to_gmem", lambda *args, **kwargs: None)
    with pytest.raises(Exception, match=r"(?i)race"):
        gpu_interpreter.run(run, "mqa_window", True, *step_of("mqa_window", (5,)))
    jax.clear_caches()
