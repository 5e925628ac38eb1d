"""The reference (`implementation="xla"`) against the float64 oracle, and numbers worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from poison import poisoned_cache
from tolerances import of_output, tolerance

import paged_kv

FLOAT32_SEEDS = range(6 * problems.NUM_FORMS)


@pytest.mark.parametrize("number", range(problems.NUM_FORMS))
def test_reference_is_within_2e5_of_the_oracle(number):
    """216 problems, six of each form, float32 queries over pools of every dtype."""
    for seed in FLOAT32_SEEDS[number :: problems.NUM_FORMS]:
        problem = problems.random_problem(seed, query_dtype="float32")
        assert_matches_oracle(problem, problems.attend(problem, implementation="xla"))


@pytest.mark.parametrize("query_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("number", range(0, problems.NUM_FORMS, 6))
def test_reference_rounds_once_to_a_half_precision_query_dtype(number, query_dtype):
    problem = problems.random_problem(number, query_dtype=query_dtype)
    assert_matches_oracle(problem, problems.attend(problem, implementation="xla"))


def assert_matches_oracle(problem, actual):
    (out, lse), (expected_out, expected_lse) = actual, problem.expected()
    assert (out.dtype, lse.dtype) == (problem.query.dtype, jnp.float32)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected_out, **of_output("reference", out.dtype)
    )
    np.testing.assert_allclose(lse, expected_lse, **tolerance("reference float32"))


def test_random_problems_cover_every_value_of_every_axis():
    forms = [problems.random_form(number) for number in range(problems.NUM_FORMS)]
    for axis, values in problems.AXES.items():
        drawn = {getattr(form, axis) for form in forms}
        assert drawn >= set(values) or axis == "num_tokens"


def test_random_problems_cover_rows_that_see_no_key_and_padding():
    empty = [problems.random_problem(seed).expected()[1] == -np.inf for seed in range(36)]
    assert sum(rows.any() and not rows.all() for rows in empty) >= 10


# --- numbers worked by hand


def hand_cache(keys, values):
    """One sequence in blocks of two, head_dim 1, from lists of numbers."""
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=3, block_size=2, num_kv_heads=1, head_dim=1, batch_size=1, max_blocks_per_seq=3,
        dtype=jnp.float32,
    )  # fmt: skip
    cache, _ = paged_kv.allocate_blocks(
        cache, sequence_idx=0, num_new_tokens=len(keys), free_block_ids=[2, 0, 1]
    )
    column = lambda numbers: np.asarray(numbers, np.float32)[:, None, None]
    return paged_kv.append_kv(cache, 0, column(keys), column(values))


LN2 = float(np.log(2.0))
HAND = {
    # weights 1, 2, 1 over values 0, 4, 8: 16 / 4
    "softmax": ([0, LN2, 0], [0, 4, 8], {}, 4.0, np.log(4)),
    # scale 3 turns a score of ln 2 / 3 into ln 2
    "scale": ([0, LN2 / 3, 0], [0, 4, 8], {"scale": 3.0}, 4.0, np.log(4)),
    # a window of one key to the left drops the first: weights 2, 1 over 4, 8
    "window": ([0, LN2, 0], [0, 4, 8], {"local_window_size": (1, 0)}, 16 / 3, np.log(3)),
    # a cap of 1 turns 100 into 1 and 0 into 0: weights 1, e over 0, 1
    "soft_cap": ([0, 100.0], [0, 1], {"logits_soft_cap": 1.0}, np.e / (1 + np.e), np.log(1 + np.e)),
    # slope ln 2 halves the weight per token of distance: weights 1/4, 1/2, 1 over 7, 7, 0
    "alibi": ([0, 0, 0], [7, 7, 0], {"alibi_slopes": LN2}, 3.0, np.log(1.75)),
    # a sink of ln 3 beside weights 1, 2, 1: 16 / 7, and the lse is without it
    "sink": ([0, LN2, 0], [0, 4, 8], {"sinks": float(np.log(3))}, 16 / 7, np.log(4)),
}


@pytest.mark.parametrize("name", list(HAND))
def test_hand_worked_numbers(name):
    keys, values, options, expected, expected_lse = HAND[name]
    options = {"scale": 1.0, **options}
    for per_head in ("alibi_slopes", "sinks"):
        if per_head in options:
            options[per_head] = jnp.full(1, options[per_head], jnp.float32)
    out, lse = paged_kv.paged_attention(
        jnp.ones((1, 1, 1)), hand_cache(keys, values), return_residual=True, implementation="xla",
        **options,
    )  # fmt: skip
    np.testing.assert_allclose(out, np.full((1, 1, 1), expected), **tolerance("hand"))
    np.testing.assert_allclose(lse, [[expected_lse]], **tolerance("hand"))


def test_causality_is_bottom_right_by_hand():
    """Two query tokens at positions 1 and 2 of three: means of the first two values, and of all."""
    out = paged_kv.paged_attention(
        jnp.ones((2, 1, 1)),
        hand_cache([0, 0, 0], [3, 6, 9]),
        query_start_loc=jnp.asarray([0, 2], jnp.int32),
        implementation="xla",
    )
    np.testing.assert_allclose(out[:, 0, 0], [4.5, 6.0], **tolerance("hand"))


# --- jax.nn.dot_product_attention, which means the same where all tokens are queries


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, (4, 0), (2, 5)])
@pytest.mark.parametrize("length", [1, 16, 23])
def test_reference_agrees_with_jax_nn(is_causal, window, length):
    rng = np.random.default_rng(length)
    poisoned = poisoned_cache(rng, [length], head_dim=16, max_blocks_per_seq=3, num_blocks=5)
    query = jnp.asarray(rng.standard_normal((length, 6, 16)), jnp.float32)
    starts = jnp.asarray([0, length], jnp.int32)
    options = {"is_causal": is_causal, "local_window_size": window, "return_residual": True}
    out, lse = paged_kv.paged_attention(
        query, poisoned.cache, query_start_loc=starts, implementation="xla", **options
    )
    expected_out, expected_lse = jax.nn.dot_product_attention(
        query, jnp.asarray(poisoned.keys[0]), jnp.asarray(poisoned.values[0]), **options
    )
    np.testing.assert_allclose(out, expected_out, **tolerance("reference float32"))
    np.testing.assert_allclose(lse, expected_lse, **tolerance("reference float32"))


# --- memory


def temporary_bytes(batch, max_blocks_per_seq, block_size, differentiate=False):
    """Scratch memory of the compiled call, as XLA plans it."""
    arrays = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    pool = arrays(64, block_size, 2, 64)
    cache = paged_kv.PagedKVCache(
        pool,
        pool,
        arrays(batch, max_blocks_per_seq, dtype=jnp.int32),
        arrays(batch, dtype=jnp.int32),
    )

    def attend(query, cache):
        out = paged_kv.paged_attention(query, cache, implementation="xla")
        return out.sum()

    run = jax.grad(attend) if differentiate else attend
    compiled = jax.jit(run).lower(arrays(batch, 4, 64), cache).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_table():
    """Keys of 2**22 tokens per sequence would be 8 GiB gathered; scratch stays within 64 MiB, and
    doubling the table adds less than two bool masks of it."""
    small, large = (temporary_bytes(4, blocks, 64) for blocks in (2**15, 2**16))
    assert large < 64 * 2**20
    assert large - small <= 2 * 4 * 2**15


def test_memory_of_the_gradient_does_not_grow_with_the_table():
    small, large = (temporary_bytes(4, blocks, 64, True) for blocks in (2**15, 2**16))
    assert large < 64 * 2**20
    assert large - small <= 2 * 4 * 2**15


@pytest.mark.parametrize("block_size", [16, 128])
def test_memory_does_not_grow_with_the_block(block_size):
    assert temporary_bytes(4, 2**12, block_size) < 64 * 2**20


# --- gradients


GRADIENT_VARIANTS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"local_window_size": (6, 0)},
    "two_sided": {"is_causal": False, "local_window_size": (3, 5)},
    "soft_cap": {"logits_soft_cap": 1.5},
    "scale": {"scale": 0.7},
    "sinks": {"has_sinks": True},
    "slopes": {"has_slopes": True},
    "all": {
        "local_window_size": (6, 2), "logits_soft_cap": 1.5, "scale": 0.7, "has_sinks": True,
        "has_slopes": True,
    },
}  # fmt: skip
LENGTHS, STARTS, NUM_TOKENS = [9, 0, 3, 12], [0, 4, 4, 7, 8], 10


def gradient_problem(has_sinks=False, has_slopes=False, num_layers=None):
    """Differentiable arguments in a dict, the rest of the cache, and the dense keys and values."""
    rng = np.random.default_rng(11)
    poisoned = poisoned_cache(
        rng, LENGTHS, block_size=4, num_kv_heads=2, head_dim=8, num_layers=num_layers
    )
    arrays = {
        "query": jnp.asarray(rng.standard_normal((NUM_TOKENS, 6, 8)), jnp.float32),
        "key_pool": poisoned.cache.key_pool,
        "value_pool": poisoned.cache.value_pool,
    }
    if has_sinks:
        arrays["sinks"] = jnp.asarray(rng.standard_normal(6), jnp.float32)
    if has_slopes:
        arrays["alibi_slopes"] = jnp.asarray(rng.random(6), jnp.float32)
    cotangents = rng.standard_normal((NUM_TOKENS, 6, 8)), rng.standard_normal((NUM_TOKENS, 6))
    return arrays, poisoned, cotangents


def package_gradient(arrays, poisoned, cotangents, layer=None, **options):
    """Gradients of <out, c> + <lse, d> over the finite lse, where (c, d) are the cotangents."""
    c, d = (jnp.asarray(x, jnp.float32) for x in cotangents)

    def loss(arrays):
        arrays = dict(arrays)
        query = arrays.pop("query")
        cache = paged_kv.PagedKVCache(
            arrays.pop("key_pool"),
            arrays.pop("value_pool"),
            poisoned.cache.block_table,
            poisoned.cache.seq_lengths,
        )
        out, lse = paged_kv.paged_attention(
            query, cache, query_start_loc=jnp.asarray(STARTS, jnp.int32), layer=layer,
            return_residual=True, **arrays, **options,
        )  # fmt: skip
        return jnp.sum(out * c) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * d)

    return jax.jit(jax.grad(loss))(arrays)


def oracle_loss(arrays, poisoned, cotangents, layer=None, **options):
    """The same loss by the oracle, float64; keys and values are read back from the pools."""
    arrays = dict(arrays)
    dense = [
        dense_of(arrays.pop(name) if layer is None else arrays.pop(name)[layer], poisoned.cache)
        for name in ("key_pool", "value_pool")
    ]
    out, lse = oracle.attention(arrays.pop("query"), *dense, STARTS, **arrays, **options)
    c, d = cotangents
    return np.sum(out * c) + np.sum(np.where(np.isfinite(lse), lse, 0.0) * d)


def dense_of(pool, cache):
    """Each sequence's tokens of one layer's pool."""
    table, bs = np.asarray(cache.block_table), cache.block_size
    return [
        np.array([pool[table[b, p // bs], p % bs] for p in range(n)]).reshape(n, *pool.shape[2:])
        for b, n in enumerate(np.asarray(cache.seq_lengths))
    ]


def assert_gradient_is_right(arrays, poisoned, cotangents, layer=None, **options):
    """Against central differences of the float64 oracle, along random directions per argument."""
    gradient = package_gradient(
        arrays, poisoned, cotangents, layer, implementation="xla", **options
    )
    exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    rng, step = np.random.default_rng(5), 1e-5
    for name, x in exact.items():
        assert np.isfinite(gradient[name]).all(), f"{name}: poison reached the gradient"
        for _ in range(3):
            direction = rng.standard_normal(x.shape)
            loss = lambda sign, name=name, x=x, direction=direction: oracle_loss(
                {**exact, name: x + sign * step * direction}, poisoned, cotangents, layer, **options
            )
            slope = (loss(1) - loss(-1)) / (2 * step)
            product = np.sum(np.asarray(gradient[name], np.float64) * direction)
            np.testing.assert_allclose(
                product, slope, **tolerance("gradient"), err_msg=f"gradient of {name}"
            )


@pytest.mark.parametrize("variant", list(GRADIENT_VARIANTS))
def test_gradients_are_those_of_the_oracle(variant):
    options = dict(GRADIENT_VARIANTS[variant])
    operands = {name: options.pop(name, False) for name in ("has_sinks", "has_slopes")}
    assert_gradient_is_right(*gradient_problem(**operands), **options)


def test_gradients_of_a_stack_are_those_of_the_oracle():
    problem = gradient_problem(num_layers=3)
    assert_gradient_is_right(*problem, layer=1)


def test_gradient_of_a_stack_is_zero_in_other_layers():
    gradient = package_gradient(*gradient_problem(num_layers=3), layer=1)
    for name in ("key_pool", "value_pool"):
        np.testing.assert_array_equal(gradient[name][np.array([0, 2])], 0)
        assert np.any(gradient[name][1] != 0)


def test_gradient_is_zero_in_slots_that_no_one_owns():
    arrays, poisoned, cotangents = gradient_problem()
    gradient = package_gradient(arrays, poisoned, cotangents)
    for name in ("key_pool", "value_pool"):
        np.testing.assert_array_equal(np.asarray(gradient[name])[~poisoned.owned], 0)


def test_gradient_without_the_residual_is_that_of_out_alone():
    """The other path through the VJP: `return_residual=False`."""
    arrays, poisoned, (c, d) = gradient_problem(has_sinks=True, has_slopes=True)
    c32 = jnp.asarray(c, jnp.float32)

    def loss(arrays):
        arrays = dict(arrays)
        query, *pools = (arrays.pop(name) for name in ("query", "key_pool", "value_pool"))
        cache = paged_kv.PagedKVCache(*pools, *jax.tree.leaves(poisoned.cache)[2:])
        out = paged_kv.paged_attention(
            query, cache, query_start_loc=jnp.asarray(STARTS, jnp.int32), **arrays
        )
        return jnp.sum(out * c32)

    actual = jax.jit(jax.grad(loss))(arrays)
    expected = package_gradient(arrays, poisoned, (c, np.zeros_like(d)))
    for name in arrays:
        np.testing.assert_allclose(actual[name], expected[name], **tolerance("gradient"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_have_the_dtypes_of_their_arguments(dtype):
    arrays, poisoned, cotangents = gradient_problem(has_sinks=True, has_slopes=True)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    gradient = package_gradient(arrays, poisoned, cotangents)
    assert {name: x.dtype for name, x in gradient.items()} == dict.fromkeys(arrays, dtype)


def test_gradient_runs_for_a_shared_block():
    """Two sequences over one prefix block: its gradient is the sum of both."""
    arrays, poisoned, cotangents = gradient_problem()
    table = np.array(poisoned.cache.block_table)
    table[3, 0] = table[0, 0]
    shared = paged_kv.set_block_table(poisoned.cache, jnp.asarray(table))
    assert_gradient_is_right(arrays, poisoned_with(poisoned, shared), cotangents)


def poisoned_with(poisoned, cache):
    return type(poisoned)(cache, poisoned.keys, poisoned.values, poisoned.owned)


def test_forward_mode_is_refused_rather_than_wrong():
    """No JVP: JAX's own error for a custom VJP."""
    arrays, poisoned, _ = gradient_problem()
    attend = functools.partial(
        paged_kv.paged_attention,
        cache=poisoned.cache,
        query_start_loc=jnp.asarray(STARTS, jnp.int32),
    )
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(attend, (arrays["query"],), (arrays["query"],))
