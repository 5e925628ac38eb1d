"""Online softmax and the merge of partial results: any order, any split, empty rows included."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import paged_kv
from paged_kv.kernels.core import softmax

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS = softmax.Rows(
    reduce=lambda op, tile: op(tile, axis=1),
    expand=lambda row, shape: jnp.broadcast_to(row[:, None], shape),
)
NUM_ROWS, NUM_TILES, TILE, HEAD_DIM = 4, 5, 8, 3
seeds = st.integers(0, 2**32 - 1)


def random_tiles(seed):
    """Natural scores, their mask and values, per tile; row 0 sees nothing, row 1 only the last."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((NUM_TILES, NUM_ROWS, TILE)) * rng.choice([1.0, 10.0])
    seen = rng.random((NUM_TILES, NUM_ROWS, TILE)) < rng.choice([0.1, 0.5, 1.0])
    seen[:, 0] = False
    seen[:-1, 1] = False
    seen[-1, 1] = True
    return scores, seen, rng.standard_normal((NUM_TILES, TILE, HEAD_DIM))


def dense(scores, seen, values):
    """(out, lse) over all tiles at once, float64."""
    scores = np.where(seen, scores, -np.inf).swapaxes(0, 1).reshape(NUM_ROWS, -1)
    lse = np.logaddexp.reduce(scores, axis=1)
    weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0.0)[:, None])
    return weights @ values.reshape(-1, HEAD_DIM), lse


def online(scores, seen, values, order):
    """(out, lse) one tile at a time."""
    state = softmax.State(
        jnp.full(NUM_ROWS, softmax.FLOOR, jnp.float32),
        jnp.zeros(NUM_ROWS, jnp.float32),
        jnp.zeros((NUM_ROWS, HEAD_DIM), jnp.float32),
    )
    for i in order:
        tile = np.where(seen[i], scores[i] / softmax.LN2, softmax.MASK)
        value = jnp.asarray(values[i], jnp.float32)
        state = softmax.step(
            ROWS, state, jnp.asarray(tile, jnp.float32), lambda weights, v=value: weights @ v
        )
    return softmax.finish(ROWS, state)


def assert_states_close(actual, expected, name="reference float32"):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance(name))


@settings(max_examples=30)
@given(seeds, st.permutations(range(NUM_TILES)))
def test_steps_in_any_order_give_the_dense_softmax(seed, order):
    tiles = random_tiles(seed)
    assert_states_close(online(*tiles, order), dense(*tiles))


@pytest.mark.parametrize("order", [(), (0,), (4, 0), (0, 4)])
def test_row_that_saw_no_key_is_zero_and_minus_infinity(order):
    out, lse = online(*random_tiles(0), order)
    np.testing.assert_array_equal(out[0], 0)
    assert lse[0] == -jnp.inf


def test_masked_weight_is_exactly_zero():
    """Also in a row whose running maximum is still the floor, so that NaN-free tails suffice."""
    weights = np.exp2(np.float32(softmax.MASK) - np.float32(softmax.FLOOR))
    assert weights == 0
    assert np.isfinite([softmax.MASK, softmax.FLOOR]).all()


def partial_states(seed):
    """The attention over each tile alone, float32, as (out, lse) pairs with a head axis."""
    scores, seen, values = random_tiles(seed)
    for i in range(NUM_TILES):
        only = np.zeros_like(seen)
        only[i] = seen[i]
        out, lse = dense(scores, only, values)
        yield jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)


@settings(max_examples=30)
@given(seeds, st.permutations(range(NUM_TILES)))
def test_merge_in_any_order_gives_the_dense_softmax(seed, order):
    parts = list(partial_states(seed))
    merged = parts[order[0]]
    for i in order[1:]:
        merged = paged_kv.merge_attention_states(*merged, *parts[i])
    assert_states_close(merged, dense(*random_tiles(seed)))


@settings(max_examples=30)
@given(seeds)
def test_merge_is_associative(seed):
    a, b, c, *_ = partial_states(seed)
    both = paged_kv.merge_attention_states
    assert_states_close(both(*both(*a, *b), *c), both(*a, *both(*b, *c)), "merge")


def test_merge_is_commutative_bitwise():
    a, b, *_ = partial_states(3)
    for x, y in zip(
        paged_kv.merge_attention_states(*a, *b),
        paged_kv.merge_attention_states(*b, *a),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_merge_with_nothing_changes_nothing():
    out, lse = next(partial_states(4))
    nothing = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    for merged in (
        paged_kv.merge_attention_states(out, lse, *nothing),
        paged_kv.merge_attention_states(*nothing, out, lse),
    ):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)


def test_merge_weighs_by_the_number_of_equal_keys():
    """Three keys of score 0 and value 1, one of score 0 and value 5: the mean is 2."""
    out, lse = paged_kv.merge_attention_states(
        jnp.ones((1, 1, 2)),
        jnp.full((1, 1), np.log(3.0), jnp.float32),
        jnp.full((1, 1, 2), 5.0),
        jnp.zeros((1, 1)),
    )
    np.testing.assert_allclose(out, np.full((1, 1, 2), 2.0), **tolerance("hand"))
    np.testing.assert_allclose(lse, [[np.log(4.0)]], **tolerance("hand"))


def test_merge_keeps_the_dtype_of_the_outputs_and_float32_statistics():
    half = jnp.ones((1, 1, 2), jnp.bfloat16)
    out, lse = paged_kv.merge_attention_states(half, jnp.zeros((1, 1)), half, jnp.zeros((1, 1)))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_sink_is_one_more_term_of_the_denominator():
    """Two keys of score 0 and a sink of log 2: half of the weight goes to the sink."""
    out = paged_kv.apply_sinks(
        jnp.ones((1, 1, 2)),
        jnp.full((1, 1), np.log(2.0), jnp.float32),
        jnp.full(1, np.log(2.0), jnp.float32),
    )
    np.testing.assert_allclose(out, np.full((1, 1, 2), 0.5), **tolerance("hand"))


def test_sink_of_minus_infinity_changes_nothing():
    out, lse = (x[:, None] for x in next(partial_states(5)))
    sinks = jnp.full(1, -jnp.inf)
    np.testing.assert_array_equal(paged_kv.apply_sinks(out[1:], lse[1:], sinks), out[1:])


def test_sink_leaves_a_row_that_saw_no_key_zero():
    out, lse = (x[:, None] for x in next(partial_states(6)))
    np.testing.assert_array_equal(paged_kv.apply_sinks(out, lse, jnp.ones(1))[0], 0)
