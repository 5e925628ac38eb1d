"""The contract of layers, schedules and implementations, one test per line of it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bitwise import assert_same_bits
from ragged import HEADS, KV_HEADS, NUM_TOKENS, STARTS, attend, cache_of, int32, random_query
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOSE = tolerance("reference float32")

# --- layers


@pytest.mark.parametrize("layer", [np.int32(2), jnp.int32(1)], ids=str)
def test_layer_picks_one_of_a_stack(layer):
    poisoned, query = cache_of(num_layers=3), random_query()
    actual = attend(query, poisoned.cache, STARTS, layer=layer)
    expected = oracle.attention(query, *poisoned.dense(int(layer)), STARTS)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("layer", [-1, 3, 2**30, -(2**31)])
def test_layer_outside_the_stack_attends_as_empty_under_jit(layer):
    """A negative one included: as an index, -1 would be the last layer."""
    out, lse = attend(random_query(), cache_of(num_layers=3).cache, STARTS, layer=int32(layer))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


# --- schedules and implementations


@pytest.mark.parametrize(
    ("starts", "num_layers"), [(None, None), (STARTS, 3)], ids=["decode", "ragged_stack"]
)
def test_schedule_changes_nothing_but_the_work(starts, num_layers):
    """Made once, it serves every layer."""
    cache = cache_of(num_layers=num_layers).cache
    query = random_query(6 if starts is None else NUM_TOKENS)
    window = {"local_window_size": (20, 0)}
    schedule = paged_kv.make_schedule(
        cache,
        num_query_heads=HEADS,
        query_start_loc=None if starts is None else int32(starts),
        **window,
    )
    for layer in [None] if num_layers is None else map(jnp.int32, range(num_layers)):
        options = window if layer is None else {**window, "layer": layer}
        assert_same_bits(
            attend(query, cache, starts, schedule=schedule, **options),
            attend(query, cache, starts, **options),
        )


@pytest.mark.parametrize("implementation", [None, "mosaic_tpu", "mosaic_gpu", "xla"])
def test_schedule_is_valid_for_every_implementation(implementation):
    """Whatever name it was made with, the reference takes it."""
    cache, query = cache_of().cache, random_query()
    schedule = paged_kv.make_schedule(
        cache,
        num_query_heads=HEADS,
        query_start_loc=int32(STARTS),
        implementation=implementation,
    )
    out = paged_kv.paged_attention(
        query, cache, query_start_loc=int32(STARTS), schedule=schedule, implementation="xla"
    )
    assert_same_bits(out, attend(query, cache, STARTS)[0])


def test_without_an_implementation_the_cpu_runs_the_reference():
    cache, query = cache_of().cache, random_query()
    assert_same_bits(
        attend(query, cache, STARTS), attend(query, cache, STARTS, implementation="xla")
    )


def test_without_the_residual_out_comes_alone():
    cache, query = cache_of().cache, random_query(6)
    out = paged_kv.paged_attention(query, cache)
    assert isinstance(out, jax.Array)
    assert_same_bits(out, attend(query, cache)[0])


@pytest.mark.parametrize(
    ("op", "scope"),
    [
        (lambda q, kv, cache: paged_kv.paged_attention(q, cache), "paged_kv.attention"),
        (lambda q, kv, cache: paged_kv.append_tokens(cache, kv, kv), "paged_kv.append"),
        (lambda q, kv, cache: paged_kv.make_schedule(cache, num_query_heads=6), "paged_kv.sch"),
        (lambda q, kv, cache: paged_kv.copy_blocks(cache, int32([0]), int32([1])), "paged_kv.copy"),
        (lambda q, kv, cache: paged_kv.scrub_blocks(cache, int32([0])), "paged_kv.scrub"),
    ],
    ids=["attention", "append", "schedule", "copy", "scrub"],
)
def test_op_runs_under_a_named_scope(op, scope):
    query, cache = random_query(6), cache_of().cache
    lowered = jax.jit(op).lower(query, query[:, :KV_HEADS], cache)
    assert scope in lowered.as_text(debug_info=True)
