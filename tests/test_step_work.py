"""Lists that all layers of a step share: made by `make_schedule`, taken by calls they are for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from paged_kv.kernels.core import mixed, schedule
from paged_kv.kernels.core.problem import CacheShape, Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import decode_plan, prefill_plan
from paged_kv.kernels.gpu import step_work as of_gpu
from paged_kv.kernels.tpu import decode
from paged_kv.kernels.tpu import step_work as of_tpu

BATCH, NUM_TOKENS, HEADS = 24, 2048, 8
CACHE = CacheShape(1, 64, 16, 2, 128, "bfloat16", BATCH, 512)
FULL, SLIDING = Variant(1.0), Variant(1.0, window=(100, 0))


def trace(check, num_tokens=None, variant=FULL):
    """`check(step)` of the schedule of a step, traced: no list is computed."""
    is_packed = num_tokens is not None

    def traced(lengths, starts):
        made_for = schedule.MadeFor.of(CACHE, HEADS, is_packed, variant, num_tokens)
        table = jnp.zeros((BATCH, 512), jnp.int32)
        check(schedule.make(made_for, table, lengths, starts if is_packed else None))

    shape = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    jax.eval_shape(traced, shape(BATCH), shape(BATCH + 1))


def with_work(module, step):
    work = module.of_step(CACHE, HEADS, step)
    return work, replace(step, work={module.NAME: work})


def test_decode_on_gpu_takes_the_list_that_is_for_its_line():
    line = decode_plan.Line.of(CACHE)

    def check(step):
        work, step = with_work(of_gpu, step)
        assert of_gpu.decode_list(line, FULL, step) is work.decode
        other = decode_plan.Line(line.keys, 4)
        assert of_gpu.decode_list(other, FULL, step).shares.shape[0] == 4
        assert of_gpu.decode_list(line, SLIDING, step) is not work.decode

    trace(check)


def test_prefill_on_gpu_takes_the_tiles_and_single_tokens_their_list():
    cut = prefill_plan.cut_of(CACHE, HEADS, NUM_TOKENS)
    line = decode_plan.Line.of(CACHE)

    def check(step):
        work, step = with_work(of_gpu, step)
        singles, others = mixed.split_schedule(step)
        assert of_gpu.decode_list(line, FULL, singles) is work.decode
        assert of_gpu.prefill_tiles(cut, FULL, others) is work.prefill
        assert of_gpu.prefill_tiles(cut, FULL, step) is not work.prefill  # has the single tokens
        more = replace(cut, num_tokens=2 * NUM_TOKENS)
        assert of_gpu.prefill_tiles(more, FULL, others) is not work.prefill

    trace(check, NUM_TOKENS)


def test_a_long_batch_is_not_mixed():
    def check(step):
        work = of_gpu.of_step(CACHE, HEADS, step)
        assert work.decode is None
        assert not work.prefill.made_for.is_mixed

    trace(check, 640 * BATCH)


@pytest.mark.parametrize("num_tokens", [BATCH, None])
def test_a_ragged_batch_too_short_for_prefill_has_no_list(num_tokens):
    def check(step):
        made_for = replace(step.made_for, num_tokens=num_tokens)
        work = of_gpu.of_step(CACHE, HEADS, replace(step, made_for=made_for))
        assert work == (None, None)

    trace(check, BATCH)


@pytest.mark.parametrize("variant", [FULL, SLIDING], ids=["full", "sliding"])
def test_decode_on_tpu_takes_the_rows_that_are_for_its_plan(variant):
    problem = Problem(CACHE, BATCH, HEADS, "bfloat16", False, variant)
    plan = decode.plan_of(problem)
    assert plan is not None

    def check(step):
        work, step = with_work(of_tpu, step)
        assert of_tpu.decode_rows(problem, plan, step) is work.rows
        other = replace(plan, blocks_per_tile=2 * plan.blocks_per_tile)
        assert of_tpu.decode_rows(problem, other, step) is not work.rows

    trace(check, variant=variant)


def test_a_ragged_batch_has_no_rows_on_tpu():
    trace(lambda step: _is_none(of_tpu.of_step(CACHE, HEADS, step)), NUM_TOKENS)


def _is_none(work):
    assert work is None
