"""The reader of HLO finds what it is there to find."""

import types

import jax
import jax.numpy as jnp
import pytest
from hlo import assert_updated_in_place, collectives, large_copies, large_parameters
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS, BLOCKS = 3, 512
LAYER_ELEMENTS = BLOCKS * 4 * 8


def step(pool, block, rows):
    """Writes rows to every layer and reads them back."""

    def body(carry, layer):
        pool, rows = carry
        pool = pool.at[layer, block, 1].set(rows, mode="drop")
        return (pool, rows + pool[layer, block, 1]), None

    return jax.lax.scan(body, (pool, rows), jnp.arange(LAYERS))[0]


def compile_step(step, **options):
    pool = jax.ShapeDtypeStruct((LAYERS, BLOCKS, 4, 8), jnp.float32)
    block = jax.ShapeDtypeStruct((4,), jnp.int32)
    rows = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    return jax.jit(step, **options).lower(pool, block, rows).compile()


def test_donated_step_in_place_passes():
    assert_updated_in_place(compile_step(step, donate_argnums=0), LAYER_ELEMENTS, num_pools=1)


def test_undonated_pool_is_reported():
    compiled = compile_step(step)
    assert large_parameters(compiled, LAYER_ELEMENTS) == ({0}, set())
    assert len(large_copies(compiled, LAYER_ELEMENTS)) == 1
    with pytest.raises(AssertionError, match="not aliased"):
        assert_updated_in_place(compiled, LAYER_ELEMENTS, num_pools=1)


@pytest.mark.parametrize(
    "wasteful",
    [
        lambda pool, block, rows: step(pool * 2, block, rows),
        lambda pool, block, rows: step(jnp.flip(pool, 0), block, rows),
        lambda pool, block, rows: (step(pool, block, rows)[0], jnp.sort(pool[1], axis=0)[block]),
        lambda pool, block, rows: (step(pool, block, rows)[0], pool[0, block]),
    ],
    ids=["rewritten", "flipped", "layer_sorted", "old_and_new_alive"],
)
def test_copy_of_a_pool_or_of_a_layer_is_reported(wasteful):
    compiled = compile_step(wasteful, donate_argnums=0)
    with pytest.raises(AssertionError, match="copies of a pool"):
        assert_updated_in_place(compiled, LAYER_ELEMENTS, num_pools=1)


def compile_on_a_mesh(function, spec):
    """Of an array of 8 rows, shared out by four devices."""
    mesh = jax.make_mesh((4,), ("x",))
    rows = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    return jax.jit(function, out_shardings=NamedSharding(mesh, spec)).lower(rows).compile()


@pytest.mark.parametrize(
    ("function", "spec", "found"),
    [
        (lambda rows: rows * 2, P("x"), []),
        (lambda rows: rows * 2, P(), [("all-gather", 24)]),
        (lambda rows: rows.sum(0), P(), [("all-reduce", 3)]),
    ],
)
def test_where_devices_meet_is_reported(function, spec, found):
    assert collectives(compile_on_a_mesh(function, spec)) == found


ASYNC = """HloModule m
ENTRY %main (p: f32[6,2]) -> f32[6,2] {
  %p = f32[6,2]{1,0} parameter(0)
  %start = ((f32[6,2]{1,0}), f32[6,2]{1,0}) all-reduce-start(%p), channel_id=1, to_apply=%max
  ROOT %done = f32[6,2]{1,0} all-reduce-done(%start)
}
"""


def test_a_meeting_that_starts_and_is_done_later_counts_once():
    assert collectives(types.SimpleNamespace(as_text=lambda: ASYNC)) == [("all-reduce", 12)]
