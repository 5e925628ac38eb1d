"""Gradients of attention, through the one VJP of all implementations, against the float64 oracle.

The loss is `<out, c> + <lse, d>` over the finite lse, for random cotangents c and d.  Its slope
along random directions is measured on the oracle, by central differences in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from poison import poisoned_cache
from tolerances import tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTHS, STARTS, NUM_TOKENS = [9, 0, 3, 12], [0, 4, 4, 7, 8], 10
SHAPE = (NUM_TOKENS, 6, 8)
POOLS = ("key_pool", "value_pool")


def problem(operands=(), num_layers=None):
    """The arrays to differentiate, by name, and the poisoned cache that their pools belong to."""
    rng = np.random.default_rng(11)
    poisoned = poisoned_cache(
        rng, LENGTHS, block_size=4, num_kv_heads=2, head_dim=8, num_layers=num_layers
    )
    arrays = {"query": jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)}
    arrays |= {name: getattr(poisoned.cache, name) for name in POOLS}
    arrays |= {name: jnp.asarray(rng.random(6), jnp.float32) for name in operands}
    return arrays, poisoned


def cotangents():
    rng = np.random.default_rng(12)
    return rng.standard_normal(SHAPE), rng.standard_normal(SHAPE[:2])


def gradient(arrays, cache, layer=None, d_lse=True, **options):
    c, d = (jnp.asarray(x, jnp.float32) for x in cotangents())
    options = {"implementation": "xla", **options}
    return _gradient(arrays, cache, layer, c, d if d_lse else None, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=5)
@jax.grad
def _gradient(arrays, cache, layer, c, d, options):
    query, *pools = (arrays[name] for name in ("query", *POOLS))
    operands = {name: x for name, x in arrays.items() if name in ("sinks", "alibi_slopes")}
    result = paged_kv.paged_attention(
        query,
        paged_kv.PagedKVCache(*pools, cache.block_table, cache.seq_lengths),
        query_start_loc=jnp.asarray(STARTS, jnp.int32),
        layer=layer,
        return_residual=d is not None,
        **operands,
        **dict(options),
    )
    out, lse = result if d is not None else (result, None)
    loss = jnp.sum(out.astype(jnp.float32) * c)
    return loss if d is None else loss + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * d)


def oracle_loss(arrays, cache, layer=None, **options):
    """The same loss by the oracle; keys and values are read back from the pools."""
    arrays = dict(arrays)
    query, *pools = (arrays.pop(name) for name in ("query", *POOLS))
    dense = [dense_of(pool if layer is None else pool[layer], cache) for pool in pools]
    out, lse = oracle.attention(query, *dense, STARTS, **arrays, **options)
    c, d = cotangents()
    return np.sum(out * c) + np.sum(np.where(np.isfinite(lse), lse, 0.0) * d)


def dense_of(pool, cache):
    """Each sequence's tokens of one layer's pool."""
    table, size = np.asarray(cache.block_table), cache.block_size
    lengths = np.asarray(cache.seq_lengths)
    return [
        pool[table[b, np.arange(n) // size], np.arange(n) % size] for b, n in enumerate(lengths)
    ]


def assert_gradient_is_the_oracles(arrays, cache, layer=None, **options):
    actual = gradient(arrays, cache, layer, **options)
    exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    rng, step = np.random.default_rng(5), 1e-5
    for name, x in exact.items():
        assert np.isfinite(actual[name]).all(), f"poison reached the gradient of {name}"
        for _ in range(3):
            direction = rng.standard_normal(x.shape)
            above, below = (
                oracle_loss({**exact, name: x + h * direction}, cache, layer, **options)
                for h in (step, -step)
            )
            along = np.sum(np.asarray(actual[name], np.float64) * direction)
            np.testing.assert_allclose(
                along, (above - below) / (2 * step), **tolerance("gradient"), err_msg=name
            )


EVERYTHING = {"local_window_size": (6, 2), "logits_soft_cap": 1.5, "scale": 0.7}


@pytest.mark.parametrize(
    ("operands", "options"),
    [
        ((), {}),
        ((), {"is_causal": False, "local_window_size": (3, 5)}),
        (("sinks", "alibi_slopes"), EVERYTHING),
    ],
    ids=["causal", "two_sided_window", "cap_scale_window_sinks_slopes"],
)
def test_gradients_are_those_of_the_oracle(operands, options):
    arrays, poisoned = problem(operands)
    assert_gradient_is_the_oracles(arrays, poisoned.cache, **options)


def test_gradients_of_one_layer_of_a_stack():
    """Those of the oracle in that layer, zero in the others."""
    arrays, poisoned = problem(num_layers=3)
    assert_gradient_is_the_oracles(arrays, poisoned.cache, layer=1)
    actual = gradient(arrays, poisoned.cache, layer=1)
    for name in POOLS:
        np.testing.assert_array_equal(actual[name][np.array([0, 2])], 0)


def test_gradient_is_zero_in_slots_that_no_one_owns():
    arrays, poisoned = problem()
    actual = gradient(arrays, poisoned.cache)
    for name in POOLS:
        np.testing.assert_array_equal(np.asarray(actual[name])[~poisoned.owned], 0)


def test_gradient_of_a_shared_block_is_the_sum_over_its_sequences():
    arrays, poisoned = problem()
    table = np.array(poisoned.cache.block_table)
    table[3, 0] = table[0, 0]
    cache = paged_kv.set_block_table(poisoned.cache, jnp.asarray(table))
    assert_gradient_is_the_oracles(arrays, cache)


def test_gradient_without_the_residual_is_that_of_out_alone():
    """`return_residual=False` takes the other path through the VJP."""
    arrays, poisoned = problem(("sinks", "alibi_slopes"))
    both = gradient(arrays, poisoned.cache, **EVERYTHING)
    out_only = gradient(arrays, poisoned.cache, d_lse=False, **EVERYTHING)
    exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    direction, step = np.random.default_rng(6).standard_normal(SHAPE), 1e-5
    without_lse = [
        np.sum(cotangents()[0] * attention_out(exact, poisoned.cache, h * direction))
        for h in (step, -step)
    ]
    along = np.sum(np.asarray(out_only["query"], np.float64) * direction)
    slope = (without_lse[0] - without_lse[1]) / (2 * step)
    np.testing.assert_allclose(along, slope, **tolerance("gradient"))
    assert not np.allclose(both["query"], out_only["query"], **tolerance("gradient"))


def attention_out(arrays, cache, query_change):
    arrays = {**arrays, "query": arrays["query"] + query_change}
    query, *pools = (arrays.pop(name) for name in ("query", *POOLS))
    dense = [dense_of(pool, cache) for pool in pools]
    return oracle.attention(query, *dense, STARTS, **arrays, **EVERYTHING)[0]


def appended(arrays, cache):
    """The arrays with new keys and values written to the pools, by the oracle."""
    slots = oracle.slots(
        np.asarray(cache.block_table),
        np.asarray(cache.seq_lengths),
        cache.block_size,
        cache.num_blocks,
        STARTS,
        NUM_TOKENS,
    )
    arrays = dict(arrays)
    for pool, new in zip(POOLS, ("keys", "values"), strict=True):
        arrays[pool] = oracle.append(arrays[pool], arrays.pop(new), slots)
    return arrays


def test_gradient_through_append_is_the_oracles():
    """In the query, the new keys and values, and the pools, where a slot written over counts 0."""
    arrays, poisoned = problem()
    rng = np.random.default_rng(14)
    new = {
        name: jnp.asarray(rng.standard_normal((NUM_TOKENS, 2, 8)), jnp.float32)
        for name in ("keys", "values")
    }
    arrays, cache, c = {**arrays, **new}, poisoned.cache, cotangents()[0]

    @jax.jit
    @jax.grad
    def gradient(arrays):
        query, keys, values, *pools = (arrays[k] for k in ("query", "keys", "values", *POOLS))
        pooled = paged_kv.PagedKVCache(*pools, cache.block_table, cache.seq_lengths)
        out, _ = paged_kv.append_and_attend(
            query, keys, values, pooled, query_start_loc=jnp.asarray(STARTS, jnp.int32)
        )
        return jnp.sum(out * jnp.asarray(c, jnp.float32))

    def loss(arrays):
        arrays = appended(arrays, cache)
        query, *pools = (arrays[name] for name in ("query", *POOLS))
        return np.sum(c * oracle.attention(query, *(dense_of(p, cache) for p in pools), STARTS)[0])

    actual, step = gradient(arrays), 1e-5
    exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    for name, x in exact.items():
        assert np.isfinite(actual[name]).all(), f"poison reached the gradient of {name}"
        direction = rng.standard_normal(x.shape)
        above, below = (loss({**exact, name: x + h * direction}) for h in (step, -step))
        along = np.sum(np.asarray(actual[name], np.float64) * direction)
        np.testing.assert_allclose(
            along, (above - below) / (2 * step), **tolerance("gradient"), err_msg=name
        )


def test_gradient_is_the_references_whatever_ran_forward():
    """One backward pass for all implementations; here behind the TPU kernel in its interpreter."""
    rng = np.random.default_rng(13)
    cache = poisoned_cache(rng, [19], num_kv_heads=1).cache
    query = jnp.asarray(rng.standard_normal((1, 2, 64)), jnp.float32)

    def loss(query, key_pool, value_pool, **options):
        pooled = paged_kv.PagedKVCache(key_pool, value_pool, *jax.tree.leaves(cache)[2:])
        return jnp.sum(jnp.sin(paged_kv.paged_attention(query, pooled, **options)))

    arrays = query, cache.key_pool, cache.value_pool
    actual, expected = (
        jax.grad(functools.partial(loss, **options), argnums=(0, 1, 2))(*arrays)
        for options in ({"implementation": "mosaic_tpu", "interpret": True}, {})
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance("gradient"))


def test_gradients_have_the_dtypes_of_their_arguments():
    arrays, poisoned = problem(("sinks", "alibi_slopes"))
    dtypes = {"query": "float16", "sinks": "float16", "alibi_slopes": "bfloat16"}
    dtypes |= dict.fromkeys(POOLS, "bfloat16")
    arrays = {name: x.astype(dtypes[name]) for name, x in arrays.items()}
    actual = gradient(arrays, poisoned.cache)
    assert {name: x.dtype for name, x in actual.items()} == dtypes
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in actual.values())


def test_forward_mode_is_refused_rather_than_wrong():
    """No JVP: JAX's own error for a custom VJP."""
    arrays, poisoned = problem()
    attend = functools.partial(
        paged_kv.paged_attention,
        cache=poisoned.cache,
        query_start_loc=jnp.asarray(STARTS, jnp.int32),
        implementation="xla",
    )
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(attend, (arrays["query"],), (arrays["query"],))
