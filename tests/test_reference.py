"""The reference (`implementation="xla"`) against the float64 oracle, and numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from poison import poisoned_cache
from tolerances import of_output, tolerance

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

FLOAT32_SEEDS = range(4 * problems.NUM_FORMS)


@pytest.mark.parametrize("number", range(problems.NUM_FORMS))
def test_reference_is_within_2e5_of_the_oracle(number):
    """120 problems, four of each form, float32 queries over pools of every dtype."""
    for seed in FLOAT32_SEEDS[number :: problems.NUM_FORMS]:
        problem = problems.random_problem(seed, query_dtype="float32")
        assert_matches_oracle(problem, problems.attend(problem, implementation="xla"))


@pytest.mark.parametrize(
    ("number", "query_dtype"), [(0, "bfloat16"), (12, "bfloat16"), (7, "float16"), (16, "float16")]
)
def test_reference_rounds_only_its_result_to_a_half_precision_dtype(number, query_dtype):
    problem = problems.random_problem(number, query_dtype=query_dtype)
    assert_matches_oracle(problem, problems.attend(problem, implementation="xla"))


def assert_matches_oracle(problem, actual):
    (out, lse), (expected_out, expected_lse) = actual, problem.expected()
    assert (out.dtype, lse.dtype) == (problem.query.dtype, jnp.float32)
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        expected_out,
        **of_output("reference", out.dtype, 1 + problem.form.has_sinks),
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


def by_oracle(keys, values, **options):
    dense = [np.asarray(numbers, np.float64)[:, None, None] for numbers in (keys, values)]
    return oracle.attention(np.ones((1, 1, 1)), dense[:1], dense[1:], **options)


def by_package(keys, values, **options):
    return paged_kv.paged_attention(
        jnp.ones((1, 1, 1)),
        hand_cache(keys, values),
        return_residual=True,
        implementation="xla",
        **options,
    )


@pytest.mark.parametrize(
    ("attend", "name"),
    [
        *((by_oracle, name) for name in HAND),
        *((by_package, name) for name in ("softmax", "window", "alibi", "sink")),
    ],
)
def test_hand_worked_numbers(attend, name):
    """The oracle gives them, and so does the reference."""
    keys, values, options, expected, expected_lse = HAND[name]
    options = {"scale": 1.0, **options}
    for per_head in ("alibi_slopes", "sinks"):
        if per_head in options:
            options[per_head] = jnp.full(1, options[per_head], jnp.float32)
    out, lse = attend(keys, values, **options)
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


def by_jax_nn(query, poisoned, starts, **options):
    del starts
    keys, values = (jnp.asarray(dense[0]) for dense in poisoned.dense())
    return jax.nn.dot_product_attention(query, keys, values, **options)


def by_reference(query, poisoned, starts, **options):
    return paged_kv.paged_attention(
        query, poisoned.cache, query_start_loc=starts, implementation="xla", **options
    )


@pytest.mark.parametrize(
    ("is_causal", "window"),
    [(True, None), (True, (4, 2)), (False, 3), (False, (2, 5))],
)
def test_reference_agrees_with_jax_nn(is_causal, window):
    length = 23
    rng = np.random.default_rng(length)
    poisoned = poisoned_cache(rng, [length], head_dim=16)
    query = jnp.asarray(rng.standard_normal((length, 6, 16)), jnp.float32)
    starts = jnp.asarray([0, length], jnp.int32)
    options = {"is_causal": is_causal, "local_window_size": window, "return_residual": True}
    actual, expected = (f(query, poisoned, starts, **options) for f in (by_reference, by_jax_nn))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance("reference float32"))
