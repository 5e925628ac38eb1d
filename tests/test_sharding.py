"""A cache over a mesh gives what caches of one device give: eight simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from ragged import normal
from sharded import AUTO, EXPLICIT, World
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")


def everything(heads):
    """Each variant of attention at once."""
    return {
        "local_window_size": (5, 2),
        "is_causal": False,
        "logits_soft_cap": 3.0,
        "alibi_slopes": abs(normal(5, heads)),
        "sinks": normal(6, heads),
    }


def assert_same(world, **options):
    """Results and caches of one call over the mesh, and of one call per data rank."""
    options = {**options, "return_residual": True}
    (results, cache), (expected, caches) = world.actual(**options), world.expected(**options)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance("reference float32"))
    assert_same_bits(jax.device_get(cache), jax.device_get(caches))
    specs = paged_kv.cache_partition_specs(cache, **world.axes)
    for array, spec in zip(jax.tree.leaves(cache), jax.tree.leaves(specs), strict=True):
        placed = jax.sharding.NamedSharding(world.mesh, spec)
        assert array.sharding.is_equivalent_to(placed, array.ndim)


# Each axis and each product of them: a world, and whether it attends with everything at once.
WORLDS = {
    "heads shared by chips": (World(tensor=4, heads=8, kind=EXPLICIT), True),
    "data": (World(data=4, is_packed=False, kind=EXPLICIT), True),
    "context decode": (World(context=4, kv_heads=1, is_packed=False, kind=EXPLICIT), False),
    "data and tensor": (World(data=2, tensor=4, kv_heads=1), False),
    "data and context": (World(data=2, context=4), True),
    "tensor and context": (World(tensor=4, context=2, heads=8, is_packed=False), True),
    "all three": (World(data=2, tensor=2, context=2, kv_heads=1, kind=EXPLICIT), False),
}
MORE_WORLDS = [
    dataclasses.replace(world, kind=kind)
    for kind in (AUTO, EXPLICIT)
    for world in (
        World(tensor=8, kv_heads=1, heads=8),
        World(tensor=4, kv_heads=8, heads=16),
        World(data=4),
        World(data=2, tensor=4, kv_heads=4, heads=4),
        World(context=8),
        World(context=2),
        World(data=2, context=4),
        World(tensor=4, context=2, kv_heads=2, heads=8),
        World(data=2, tensor=2, context=2, kv_heads=1),
    )
]


@pytest.mark.parametrize("name", list(WORLDS))
def test_sharded_is_unsharded(name):
    world, has_everything = WORLDS[name]
    assert_same(world, **(everything(world.heads) if has_everything else {}))


@pytest.mark.slow
@pytest.mark.parametrize("has_everything", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("world", MORE_WORLDS, ids=str)
def test_sharded_is_unsharded_on_more_meshes(world, is_packed, has_everything):
    world = dataclasses.replace(world, is_packed=is_packed)
    assert_same(world, **(everything(world.heads) if has_everything else {}))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_ops_on_lengths_and_tables_take_a_sharded_cache(kind):
    """Eagerly and under jit; what they return lies where it lay."""
    world = World(data=2, tensor=2, context=2, kind=kind)
    placed = world.placed()
    whole = jax.device_get(placed)

    def change(cache):
        cache = paged_kv.advance(cache, 1)
        cache = paged_kv.reset_sequences(cache, cache.seq_lengths > 17)
        cache = paged_kv.set_block_table(cache, jnp.asarray(np.asarray(whole.block_table)))
        table = jnp.flip(cache.block_table, 1)
        cache = paged_kv.set_block_table(cache, table, cache.seq_lengths > 3)
        return paged_kv.truncate(cache, jnp.minimum(cache.seq_lengths, 9))

    whole = jax.tree.map(jnp.asarray, whole)
    for run in (change, jax.jit(change)):
        changed = run(placed)
        assert_same_bits(jax.device_get(changed), jax.device_get(change(whole)))
        assert changed.block_table.sharding.is_equivalent_to(placed.block_table.sharding, 2)


def test_a_fresh_cache_lies_on_the_mesh():
    world = World(data=2, tensor=4)
    cache = paged_kv.init_sharded_cache(
        world.mesh, **world.axes, num_kv_heads=1, num_blocks=6, block_size=4, head_dim=8,
        batch_size=2, max_blocks_per_seq=3, dtype=jnp.bfloat16, num_layers=3,
    )  # fmt: skip
    assert {s.data.shape for s in cache.value_pool.addressable_shards} == {(3, 3, 4, 1, 8)}
    assert {s.data.shape for s in cache.block_table.addressable_shards} == {(1, 3)}
