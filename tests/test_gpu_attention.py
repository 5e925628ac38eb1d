"""The GPU attention kernel, in the Mosaic GPU interpreter, against the float64 oracle."""

import functools

import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import steps
from gpu_interpreter import NEEDS_JAX, TIME_LIMIT, interpreter
from kernel_checks import assert_matches_oracle, covering_forms
from poison import poisoned_cache
from tolerances import tolerance

import paged_kv
from paged_kv.kernels.gpu import worklist

pytestmark = [NEEDS_JAX, TIME_LIMIT]

CONSTRAINTS = {
    "block_size": [8, 16, 24, 32, 64, 128], "pool_dtype": ["bfloat16", "float16"],
    "batch": [3, 5, 1],
}  # fmt: skip
TILE = "paged_kv.kernels.gpu.tile"
FORMS = covering_forms(**CONSTRAINTS)
PROBLEMS_PER_FORM = 6


def check(number, num_problems):
    for seed in range(number, number + num_problems * problems.NUM_FORMS, problems.NUM_FORMS):
        problem = problems.random_problem(seed, **CONSTRAINTS)
        attend = functools.partial(
            problems.attend, implementation="mosaic_gpu", interpret=interpreter()
        )
        assert_matches_oracle(problem, gpu_interpreter.run(attend, problem))


@pytest.mark.parametrize("number", FORMS)
def test_random_problems(number):
    check(number, PROBLEMS_PER_FORM)


def test_random_problems_are_at_least_60():
    assert len(FORMS) * PROBLEMS_PER_FORM >= 60


@pytest.mark.slow
@pytest.mark.parametrize("number", range(problems.NUM_FORMS))
def test_random_problems_of_every_form(number):
    check(number, 12)


def one_problem(lengths, query_lengths=None, *, group=2, poison=np.nan, **sizes):
    """Causal attention over a poisoned bfloat16 cache: one token a sequence, or a packed batch."""
    sizes = {"num_kv_heads": 1, "head_dim": 64, "dtype": "bfloat16", **sizes}
    poisoned = poisoned_cache(np.random.default_rng(5), lengths, poison=poison, **sizes)
    form = problems.plain_form("bfloat16")
    num_tokens, starts = len(lengths), None
    if query_lengths is not None:
        num_tokens = sum(query_lengths) + 2
        starts = jnp.asarray(np.cumsum([0, *query_lengths]), jnp.int32)
    shape = (num_tokens, group * sizes["num_kv_heads"], sizes["head_dim"])
    query = jnp.asarray(np.random.default_rng(6).standard_normal(shape), jnp.bfloat16)
    return problems.Problem("one", form, query, poisoned, starts, None, None, None)


@jax.jit
def call(query, cache, starts):
    return paged_kv.paged_attention(
        query, cache, query_start_loc=starts, return_residual=True,
        implementation="mosaic_gpu", interpret=interpreter(),
    )  # fmt: skip


def attend(problem):
    arguments = problem.query, problem.cache, problem.query_start_loc
    return gpu_interpreter.run(call, *arguments)


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 8, "num_kv_heads": 3},  # tiles of whole blocks, and rows of none
        {"block_size": 136, "num_kv_heads": 1},  # the last tile of a block is partly empty
        {"block_size": 24, "num_kv_heads": 7},  # tiles that start within a token
        {"block_size": 8, "num_kv_heads": 64, "group": 1},  # one token a tile
        {"block_size": 8, "num_kv_heads": 66, "group": 1},  # more heads than a warpgroup has rows
        {
            "block_size": 8,
            "num_kv_heads": 66,
            "group": 2,
        },  # more than two have: not decode's kernel
    ],
    ids=lambda sizes: "-".join(f"{value}" for value in sizes.values()),
)
def test_any_block_size_and_number_of_heads(sizes):
    problem = one_problem([17, 0, sizes["block_size"], 2 * sizes["block_size"] + 1], **sizes)
    assert_matches_oracle(problem, attend(problem))


def test_one_sequence_of_many_tiles_and_queries():
    """Every slot of the rings is used several times, by both consumers."""
    problem = one_problem([700, 3], [40, 2], block_size=32, num_kv_heads=2, group=3)
    assert_matches_oracle(problem, attend(problem))


def test_two_groups_of_rows_store_a_result_and_a_piece_apart():
    """One may be at the sequence that another CTA has a piece of while the other is not yet."""
    assert_matches_oracle(problem := one_problem([64, 130], group=66), attend(problem))


def test_a_batch_of_empty_sequences():
    out, lse = attend(one_problem([0, 0, 0]))
    assert not np.asarray(out).any()
    assert np.all(np.asarray(lse) == -np.inf)


def test_poison_does_not_change_a_bit():
    results = [attend(one_problem([40, 1, 17], poison=poison)) for poison in (np.nan, np.inf, 3.0)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_same_inputs_give_the_same_bits():
    problem = one_problem([90, 33], [20, 1], num_kv_heads=2)
    jax.tree.map(np.testing.assert_array_equal, attend(problem), attend(problem))


def test_scan_over_a_stack_matches_the_reference():
    """Append and attend in every layer, the layer traced, as a model does."""
    arguments = steps.ragged_arguments("bfloat16")
    kernel = {"implementation": "mosaic_gpu", "interpret": interpreter()}
    expected = jax.jit(functools.partial(steps.model_step, implementation="xla"))(*arguments)
    actual = gpu_interpreter.run(jax.jit(functools.partial(steps.model_step, **kernel)), *arguments)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(a, b, **tolerance("model bfloat16"))


def test_values_past_the_end_show_where_they_are_not_cleared(mutate):
    mutate(f"{TILE}.clear_tail", lambda *args: None)
    out, _ = attend(one_problem([43, 18]))
    assert np.isnan(np.asarray(out, np.float32)).any()


def test_padding_that_is_not_zeroed_shows(mutate):
    mutate(f"{TILE}.zero_padding", lambda *args: None)
    out, _ = attend(one_problem([48, 24], block_size=24, num_kv_heads=3))
    assert np.isnan(np.asarray(out, np.float32)).any()


def test_a_slot_released_too_early_shows(mutate):
    gpu_interpreter.release_early(mutate)
    with pytest.raises(Exception, match=r"(?i)race"):
        attend(one_problem([1500], block_size=32, num_kv_heads=2))


def test_a_missing_wait_shows(mutate):
    mutate("paged_kv.kernels.gpu.blocks.Ring.await_full", lambda self, step: None)
    with pytest.raises(Exception, match=r"(?i)race|phase"):
        attend(one_problem([47, 20]))


def attend_with_a_schedule(problem, mutate, makers):
    """Made outside of the call, which makes no list: each of `makers` is called once."""
    from paged_kv.kernels.gpu.plan import MAX_SIMULATED_CTAS

    mutate("paged_kv.kernels.gpu.device.num_sms", lambda: MAX_SIMULATED_CTAS)
    made, options = [], {"implementation": "mosaic_gpu"}
    for module in makers:

        def counted(*args, module=module, make=module.make):
            made.append(module)
            return make(*args)

        mutate(module, "make", counted)
    starts = problem.query_start_loc
    if starts is not None:
        options["query_start_loc"] = starts

    @jax.jit
    def run(query, cache):
        schedule = paged_kv.make_schedule(
            cache, num_query_heads=query.shape[1], num_tokens=len(query), **options
        )
        assert made == list(makers)
        return paged_kv.paged_attention(
            query, cache, schedule=schedule, return_residual=True, interpret=interpreter(),
            **options,
        )  # fmt: skip

    result = gpu_interpreter.run(run, problem.query, problem.cache)
    assert made == list(makers)
    return result


def test_decode_takes_the_list_of_a_schedule(mutate):
    problem = one_problem([90, 0, 33], num_kv_heads=2)
    expected = attend(problem)
    actual = attend_with_a_schedule(problem, mutate, [worklist])
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_long_sequence_is_cut_for_all_ctas_and_joined():
    """Every consumer works, every CTA has a piece, and four warpgroups join the pieces."""
    from paged_kv.kernels.gpu import combine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combine, "MANY_PIECES", 4)
        jax.clear_caches()
        problem = one_problem([900], num_kv_heads=2, group=3, head_dim=128)
        assert_matches_oracle(problem, attend(problem))
    jax.clear_caches()


def test_states_of_a_head_that_are_joined_too_early_show(mutate):
    """In the second kernel of decode."""
    mutate("paged_kv.kernels.gpu.combine.MANY_PIECES", 4)
    mutate("paged_kv.kernels.gpu.combine._meet", lambda smem: None)
    with pytest.raises(Exception, match=r"(?i)race"):
        attend(one_problem([300], num_kv_heads=2, group=1))


def test_a_state_handed_over_too_early_shows(mutate):
    """Between the consumers of decode."""
    from paged_kv.kernels.gpu import decode

    exchange = decode._exchange

    def without_waiting(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode.plgpu, "barrier_wait", lambda barrier: None)
            exchange(*args)

    mutate(decode, "_exchange", without_waiting)
    with pytest.raises(Exception, match=r"(?i)race"):
        attend(one_problem([300], num_kv_heads=2, group=1))
