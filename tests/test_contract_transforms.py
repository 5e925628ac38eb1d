"""The batched ops under jit, scan, vmap, shard_map and jax.export give what they give alone."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import steps
from bitwise import assert_same_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ragged import LENGTHS, cache_of, int32, normal
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOSE = tolerance("reference float32")


def assert_all_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


# --- jit and scan


def test_scan_over_layers_is_the_loop_over_layers():
    """A traced layer, a carried stack, one schedule; against eager calls with int layers."""
    cache, x = cache_of(room=1, num_layers=3).cache, normal(1, 6, 4, 8)
    actual_x, actual_cache = jax.jit(steps.model_step)(x, None, cache)
    cache = paged_kv.advance(cache, 1)
    for layer in range(3):
        out, cache = paged_kv.append_and_attend(x, x[:, :2], -x[:, :2], cache, layer=layer)
        x = x + out
    assert_all_close(actual_x, x)
    written = ~np.isnan(np.asarray(cache.key_pool))
    np.testing.assert_array_equal(np.isnan(actual_cache.key_pool), ~written)
    np.testing.assert_allclose(
        np.asarray(actual_cache.key_pool)[written], np.asarray(cache.key_pool)[written], **CLOSE
    )


def test_step_is_traced_once_for_all_lengths_and_tables():
    """They are data: a second batch of the same shapes compiles nothing."""
    traces = []

    @jax.jit
    def step(*args):
        traces.append(args)
        return steps.model_step(*args)

    x, starts = normal(2, 12, 4, 8), int32([0, 0, 1, 3, 4, 4, 6])
    sizes = {"num_layers": 2, "num_blocks": 20, "max_blocks_per_seq": 4}
    for seed, lengths in enumerate([LENGTHS, [20, 3, 0, 40, 1, 0]]):
        step(x, starts, cache_of(seed, lengths, room=2, **sizes).cache)
    assert len(traces) == 1


def test_no_value_is_looked_at_under_jit():
    """Everything wild and traced: no error and no host sync, and nothing is written."""
    cache = cache_of(room=1, num_layers=2).cache
    wild = dataclasses.replace(
        cache,
        block_table=jnp.full_like(cache.block_table, 2**30),
        seq_lengths=int32([-5, 2**31 - 1, 7, 0, 40, 10**6]),
    )
    x, starts = normal(3, 5, 4, 8), int32([9, 3, 7, 2, 2**30, -4, 1])
    out, after = jax.jit(attend_and_append)(x, wild, starts, int32(-3))
    assert_same_bits((after.key_pool, after.value_pool), (cache.key_pool, cache.value_pool))
    np.testing.assert_array_equal(out, 0)


def attend_and_append(x, cache, starts, layer):
    new = x[:, :2]
    return paged_kv.append_and_attend(x, new, new, cache, query_start_loc=starts, layer=layer)


# --- vmap


def stacked(caches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def decode(query, cache):
    return paged_kv.paged_attention(query, cache, return_residual=True)


def test_vmap_over_caches_attends_to_each():
    caches = [cache_of(seed, room=1).cache for seed in range(3)]
    queries = normal(4, 3, 6, 4, 8)
    actual = jax.jit(jax.vmap(decode))(queries, stacked(caches))
    expected = [decode(query, cache) for query, cache in zip(queries, caches, strict=True)]
    assert_all_close(actual, stacked(expected))


def test_vmap_over_queries_shares_the_cache():
    cache, queries = cache_of(room=1).cache, normal(5, 3, 6, 4, 8)
    actual = jax.jit(jax.vmap(decode, in_axes=(0, None)))(queries, cache)
    assert_all_close(actual, stacked([decode(query, cache) for query in queries]))


def test_vmap_of_append_writes_to_each_cache():
    caches = [paged_kv.advance(cache_of(seed, room=1).cache, 1) for seed in range(3)]
    keys, values = normal(6, 2, 3, 6, 2, 8)
    actual = jax.jit(jax.vmap(paged_kv.append_tokens))(stacked(caches), keys, values)
    expected = [paged_kv.append_tokens(*args) for args in zip(caches, keys, values, strict=True)]
    assert_same_bits(actual, stacked(expected))


def test_vmap_over_layers_of_a_stack():
    poisoned, query = cache_of(room=1, num_layers=3), normal(7, 6, 4, 8)
    attend = lambda layer: paged_kv.paged_attention(query, poisoned.cache, layer=layer)
    out = jax.jit(jax.vmap(attend))(jnp.arange(3, dtype=jnp.int32))
    for layer in range(3):
        expected, _ = oracle.attention(query, *poisoned.dense(layer))
        np.testing.assert_allclose(out[layer], expected, **CLOSE)


STATE_OPS = {
    "advance": lambda cache: paged_kv.advance(cache, 1),
    "truncate": lambda cache: paged_kv.truncate(cache, cache.seq_lengths // 2),
    "reset": lambda cache: paged_kv.reset_sequences(cache, cache.seq_lengths > 3),
    "table": lambda cache: paged_kv.set_block_table(cache, cache.block_table + 1),
    "copy": lambda cache: paged_kv.copy_blocks(cache, int32([0, -1]), int32([1, 2])),
    "scrub": lambda cache: paged_kv.scrub_blocks(cache, cache.block_table[:, 1]),
    "slots": lambda cache: paged_kv.slot_mapping(cache, num_tokens=6),
}


@pytest.mark.parametrize("op", list(STATE_OPS))
def test_vmap_of_the_other_ops(op):
    caches = [cache_of(seed, room=1).cache for seed in range(2)]
    run = jax.jit(STATE_OPS[op])
    assert_same_bits(jax.jit(jax.vmap(run))(stacked(caches)), stacked([run(c) for c in caches]))


# --- shard_map on four simulated devices


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def step(query, keys, values, cache):
    """The op under test, alone and sharded: (out, lse), cache."""
    return paged_kv.append_and_attend(query, keys, values, cache, return_residual=True)


def shards(mesh, heads, cache_spec):
    """`step` under shard_map with head axes or batch axes split over the mesh."""
    specs = (heads, heads, heads, cache_spec)
    out_specs = ((heads, P(*heads[:2])), cache_spec)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out_specs))


def inputs(num_kv_heads, seed=8):
    query = normal(seed, 6, 2 * num_kv_heads, 8)
    return query, *normal(seed + 1, 2, 6, num_kv_heads, 8)


def test_shard_map_over_heads(mesh):
    """Tensor parallelism: each device has its heads of every block, and the whole table."""
    cache = paged_kv.advance(cache_of(room=1, num_kv_heads=4).cache, 1)
    pool = P(None, None, "x")
    cache_spec = paged_kv.PagedKVCache(pool, pool, P(), P())
    arrays = inputs(4)
    sharded = jax.device_put(cache, jax.tree.map(lambda s: NamedSharding(mesh, s), cache_spec))
    (out, lse), after = shards(mesh, P(None, "x"), cache_spec)(*arrays, sharded)
    expected, expected_cache = jax.jit(step)(*arrays, cache)
    assert_all_close((out, lse), expected)
    assert_same_bits(jax.device_get(after), jax.device_get(expected_cache))
    assert after.key_pool.sharding.spec[2] == "x"


def test_shard_map_over_sequences(mesh):
    """Data parallelism: each device has its own sequences and its own blocks, from id 0."""
    parts = [
        paged_kv.advance(
            cache_of(seed, [seed, 17], room=1, num_blocks=6, max_blocks_per_seq=3).cache, 1
        )
        for seed in range(4)
    ]
    cache = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    query, keys, values = normal(9, 8, 4, 8), *normal(10, 2, 8, 2, 8)
    cache_spec = paged_kv.PagedKVCache(P("x"), P("x"), P("x"), P("x"))
    (out, lse), after = shards(mesh, P("x"), cache_spec)(query, keys, values, cache)
    for i, part in enumerate(parts):
        rows = slice(2 * i, 2 * i + 2)
        expected, part = jax.jit(step)(query[rows], keys[rows], values[rows], part)
        assert_all_close((out[rows], lse[rows]), expected)
        assert_same_bits(after.key_pool[6 * i : 6 * i + 6], part.key_pool)


def test_gradient_through_shard_map_over_heads(mesh):
    cache = cache_of(room=1, num_kv_heads=4).cache
    query, pool = normal(11, 6, 8, 8), P(None, None, "x")

    def loss(query, key_pool, value_pool, run):
        attend = lambda query, key_pool, value_pool, table, lengths: paged_kv.paged_attention(
            query, paged_kv.PagedKVCache(key_pool, value_pool, table, lengths)
        )
        out = run(attend)(query, key_pool, value_pool, cache.block_table, cache.seq_lengths)
        return jnp.sum(jnp.sin(out))

    sharded = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "x"), pool, pool, P(), P()),
        out_specs=P(None, "x"),
    )
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    arrays = query, cache.key_pool, cache.value_pool
    actual, expected = gradient(*arrays, sharded), gradient(*arrays, lambda f: f)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance("gradient"))


# --- jax.export


def test_export_round_trip_keeps_the_cache_a_cache():
    """Serialized, read back and called: the pytree is registered for it."""
    x, cache = normal(12, 6, 4, 8), cache_of(room=1, num_layers=2).cache
    exported = jax.export.export(jax.jit(steps.model_step))(x, None, cache)
    restored = jax.export.deserialize(exported.serialize())
    actual = restored.call(x, None, cache)
    assert isinstance(actual[1], paged_kv.PagedKVCache)
    assert_same_bits(actual, jax.jit(steps.model_step)(x, None, cache))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_reference_exports_for_a_device_that_is_not_here(platform):
    x, cache = normal(14, 6, 4, 8), cache_of(room=1, num_layers=2).cache
    step = functools.partial(steps.model_step, implementation="xla")
    exported = jax.export.export(jax.jit(step), platforms=[platform])(x, None, cache)
    assert exported.platforms == (platform,)
