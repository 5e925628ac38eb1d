"""Errors of the hooks for frameworks: see errors_api."""

import importlib
import sys
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
from errors_api import Row, cache, kv, stack
from flax import nnx

from paged_kv.integrations import equinox as paged_equinox
from paged_kv.integrations import linen as paged_linen
from paged_kv.integrations import nnx as paged_nnx


def without(framework, name):
    """Imports an integration where its framework is not installed."""
    hidden = {framework: None, f"paged_kv.integrations.{name}": None}
    with mock.patch.dict(sys.modules, hidden):
        del sys.modules[f"paged_kv.integrations.{name}"]
        importlib.import_module(f"paged_kv.integrations.{name}")


def nnx_call(width=1, step=1, **options):
    """One attention of a step over `cache()`."""
    paged = paged_nnx.PagedCache(cache())
    attention = paged_nnx.PagedAttention(paged)
    query, keys = kv(2, width, 4, 8), kv(2, width, 2, 8)
    if step is None:
        return attention(query, keys, keys, **options)
    with paged.step(step):
        return attention(query, keys, keys, **options)


def nnx_positions():
    return paged_nnx.PagedCache(cache()).positions()


def nnx_nested():
    paged = paged_nnx.PagedCache(cache())
    with paged.step(1), paged.step(1):
        pass


def nnx_counts_without_width():
    with paged_nnx.PagedCache(cache()).step(jnp.ones(2, jnp.int32)):
        pass


def nnx_attach():
    model = nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 16, decode=True, rngs=nnx.Rngs(0)))
    paged_nnx.attach(model, stack())


NNX = [
    Row(
        "nnx missing",
        lambda: without("flax", "nnx"),
        r"flax.nnx cannot be imported .*; pip install 'paged_kv\[flax\]'",
        ImportError,
    ),
    Row("nnx without step", lambda: nnx_call(step=None), r"in `with cache\.step\(\.\.\.\)`"),
    Row("nnx positions", nnx_positions, r"in `with cache\.step\(\.\.\.\)`"),
    Row("nnx step in a step", nnx_nested, "a step of this cache is under way"),
    Row("nnx counts", nnx_counts_without_width, "is an array; say with width= how wide"),
    Row("nnx mask", lambda: nnx_call(mask=jnp.ones(1)), "a paged cache takes no mask"),
    Row(
        "nnx dropout",
        lambda: nnx_call(dropout_rate=0.1, deterministic=False),
        "dropout_rate=0.1: paged attention has no dropout",
        NotImplementedError,
    ),
    Row("nnx width", lambda: nnx_call(3), r"query \(2, 3, 4, 8\) must have the T of the step, 1"),
    Row("nnx layers", nnx_attach, "has 1 nnx.MultiHeadAttention, the cache num_layers=3"),
]


def linen_step(**variables):
    return paged_linen.PagedCache(name="paged").apply(variables, 1, method="step")


def linen_call(width, **options):
    """A call of the hook in `init`, where there is no cache."""
    attend = paged_linen.Step(None, 1, None).attention_fn()
    return attend(kv(2, width, 4, 8), kv(2, width, 2, 8), kv(2, width, 2, 8), **options)


LINEN = [
    Row(
        "linen missing",
        lambda: without("flax", "linen"),
        r"flax.linen cannot be imported .*; pip install 'paged_kv\[flax\]'",
        ImportError,
    ),
    Row("linen without cache", linen_step, r"call model\.apply with .*'paged': \{'kv': cache\}"),
    Row("linen mask", lambda: linen_call(1, mask=jnp.ones(1)), "a paged cache takes no mask"),
    Row(
        "linen dropout",
        lambda: linen_call(1, dropout_rate=0.1, deterministic=False),
        "dropout_rate=0.1: paged attention has no dropout",
        NotImplementedError,
    ),
    Row("linen width", lambda: linen_call(2), "must have the T of the step, 1"),
]


def equinox_call():
    """`attend` over a batch as if it were one sequence."""
    return paged_equinox.attend(kv(2, 4, 8), kv(2, 2, 8), kv(2, 2, 8), cache())


def one_sequence(**changes):
    """The first sequence of a cache."""
    first = {"block_table": cache().block_table[0], "seq_lengths": cache().seq_lengths[0]}
    return cache(**first, **changes)


def equinox_call_of_one(key_pool):
    """`attend` over the first sequence of a cache with this pool."""
    kv_cache = one_sequence(key_pool=key_pool)
    return paged_equinox.attend(kv(1, 4, 8), kv(1, 2, 8), kv(1, 2, 8), kv_cache)[0]


def equinox_module(kv_cache, **options):
    """A module of two heads of 8."""
    module = eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(0))
    return paged_equinox.multihead_attention(module, kv(1, 16), kv_cache, **options)


EQUINOX = [
    Row(
        "equinox missing",
        lambda: without("equinox", "equinox"),
        r"equinox cannot be imported .*; pip install 'paged_kv\[equinox\]'",
        ImportError,
    ),
    Row(
        "equinox batch",
        equinox_call,
        r"block_table \(2, 3\) and seq_lengths \(2,\) must be one sequence's",
    ),
    Row(
        "equinox pools",
        lambda: jax.vmap(equinox_call_of_one)(jnp.stack([cache().key_pool] * 2)),
        "vmap maps the pools, which all sequences share: .* sequence_axes",
    ),
    Row("equinox module of a batch", lambda: equinox_module(cache()), "must be one sequence's"),
    Row(
        "equinox by a kernel that does not take it",
        lambda: equinox_module(one_sequence(), implementation="mosaic_tpu"),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
]


ROWS = [*NNX, *LINEN, *EQUINOX]
