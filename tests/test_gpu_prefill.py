"""The GPU prefill kernel, in the Mosaic GPU interpreter, against the float64 oracle."""

import dataclasses
import functools

import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from gpu_interpreter import NEEDS_JAX, TIME_LIMIT, interpreter
from kernel_checks import assert_matches_oracle
from test_gpu_attention import attend, one_problem

import paged_kv

pytestmark = [NEEDS_JAX, TIME_LIMIT, pytest.mark.usefixtures("quick_compiles")]


@pytest.fixture(autouse=True)
def no_decode(monkeypatch):
    """Single tokens of a batch are prefill's too."""
    monkeypatch.setattr("paged_kv.kernels.gpu.mixed.MANY_TOKENS", 0)


def assert_runs_prefill(problem):
    """The batch is not left to another kernel."""

    def call(query, cache, starts):
        return paged_kv.paged_attention(
            query, cache, query_start_loc=starts, implementation="mosaic_gpu"
        )

    jaxpr = jax.make_jaxpr(call)(problem.query, problem.cache, problem.query_start_loc)
    assert "paged_prefill" in str(jaxpr)


@pytest.mark.parametrize(
    ("lengths", "counts", "sizes"),
    [
        ([150, 75], [70, 75], {"head_dim": 128}),
        ([90, 140, 9], [60, 131, 1], {"head_dim": 64, "block_size": 24, "group": 1}),
        ([70], [68], {"head_dim": 80, "block_size": 128, "group": 3}),
        ([300], [66], {"head_dim": 192, "block_size": 192, "num_kv_heads": 2}),
    ],
    ids=["two_heads", "one_head", "odd_group", "large_wide_block"],
)
def test_ragged_batches(lengths, counts, sizes):
    problem = one_problem(lengths, counts, **{"block_size": 16, **sizes})
    assert_runs_prefill(problem)
    assert_matches_oracle(problem, attend(problem))


@pytest.mark.parametrize(
    ("head_dim", "variant"),
    [
        (128, {"local_window_size": (90, 0), "logits_soft_cap": 5.0, "has_slopes": True}),
        (256, {"local_window_size": (70, 30), "is_causal": False, "scale": 0.3}),
    ],
    ids=["window_cap_alibi", "two_sided_wide"],
)
def test_variants(head_dim, variant):
    """Over several tiles of keys, the first of which no query sees."""
    plain = one_problem([330, 70], [100, 70], head_dim=head_dim, block_size=64)
    slopes = jnp.asarray([0.1, 0.7]) if "has_slopes" in variant else None
    form = dataclasses.replace(plain.form, **variant)
    problem = dataclasses.replace(plain, form=form, alibi_slopes=slopes)
    options = {"implementation": "mosaic_gpu", "interpret": interpreter()}
    actual = gpu_interpreter.run(functools.partial(problems.attend, **options), problem)
    assert_matches_oracle(problem, actual)


STEP = "paged_kv.kernels.gpu.prefill_step"


def test_values_past_the_end_show_where_they_are_not_cleared(mutate):
    mutate(f"{STEP}.clear_tail", lambda *args: None)
    out, _ = attend(one_problem([70], [66]))
    assert np.isnan(np.asarray(out, np.float32)).any()


def test_a_slot_released_too_early_shows(mutate):
    gpu_interpreter.release_early(mutate)
    with pytest.raises(Exception, match=r"(?i)race"):
        attend(one_problem([400], [64], block_size=64, head_dim=128))


def test_consumers_that_do_not_meet_after_clearing_values_show(mutate):
    mutate("paged_kv.kernels.gpu.prefill_cta.Cta.meet", lambda self, consumer: None)
    with pytest.raises(Exception, match=r"(?i)race"):
        attend(one_problem([70], [66]))
