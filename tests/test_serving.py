"""The serving engine: the tokens of each request alone, whoever shares and whoever makes room."""

import argparse

import numpy as np
import pytest
from batches import stand_in_programs
from default_model import default_model
from dense_llama import DenseLlama

import paged_kv
from tools import serve_bench
from tools.serving import workload
from tools.serving.engine import Engine, Options
from tools.serving.request import Arrival, Request, RequestError
from tools.serving.scheduler import Scheduler

BLOCK, MAX_TOKENS, HEAD = 4, 10, 18  # tokens; 4 whole blocks of the head are shared
# One shape for all tests that compile: a mixed step, a decode step, and the swaps.
OPTIONS = {
    "num_blocks": 16,
    "block_size": BLOCK,
    "max_length": 52,
    "row_buckets": (6,),
    "token_buckets": (16,),
    "is_clock_wall": False,
}


def shared_prompts(num_prompts, tail=12, seed=0):
    """Tokens of tiny_gguf's vocabulary behind one head."""
    rng = np.random.default_rng(seed)
    draw = lambda count: rng.integers(3, 259, count).tolist()
    head = draw(HEAD)
    return [head + draw(int(rng.integers(1, tail))) for _ in range(num_prompts)]


@pytest.fixture(scope="module")
def arrivals():
    return workload.poisson_arrivals(0, 0.6, shared_prompts(8), MAX_TOKENS)


@pytest.fixture(scope="module")
def alone(tiny, arrivals):
    """Each request by the definition, in float64 and with a dense cache."""
    dense = DenseLlama(tiny.config, tiny.weights, np.float64)
    return {a.number: dense.greedy(list(a.prompt), a.max_tokens)[0] for a in arrivals}


def serve(model, arrivals, stop_tokens=frozenset(), **options):
    """The engine after a run, in which every step leaves its allocator sound."""
    server = Engine(model.config, model.weights, stop_tokens, Options(**{**OPTIONS, **options}))
    step = server.step

    def checked_step():
        step()
        server.allocator.check_invariants()

    server.step = checked_step
    server.run(arrivals)
    return server


@pytest.mark.usefixtures("quick_compiles_here")
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("is_caching", [False, True], ids=["unshared", "shared"])
def test_every_request_gets_the_tokens_it_gets_alone(tiny, arrivals, alone, preemption, is_caching):
    server = serve(tiny, arrivals, prefix_caching=is_caching, preemption=preemption)
    record = server.record
    assert record.outputs == alone
    assert record.total("preempted") > 0
    assert max(step.running for step in record.steps) > 1
    assert any(step.prefill > 0 and step.generated > 1 for step in record.steps)  # mixed
    is_swapping = preemption == "swap"
    assert (record.total("swapped") > 0, record.total("again") > 0) == (
        is_swapping,
        not is_swapping,
    )
    assert len(server.programs) <= 2
    assert server.allocator.num_free_blocks == server.allocator.num_blocks


@pytest.mark.usefixtures("quick_compiles_here")
def test_prefill_shrinks_by_the_shared_blocks_of_every_request_after_the_first(tiny):
    arrivals = workload.poisson_arrivals(0, 0.1, shared_prompts(8), 3)  # room for all that overlap
    off, on = (
        serve(tiny, arrivals, prefix_caching=is_caching).record for is_caching in (False, True)
    )
    assert off.total("preempted") == on.total("preempted") == 0
    assert off.total("prefill") == sum(len(arrival.prompt) for arrival in arrivals)
    saved = off.total("prefill") - on.total("prefill")
    assert saved == (len(arrivals) - 1) * (HEAD - HEAD % BLOCK) == on.total("found")
    assert on.total("asked") == off.total("prefill")
    assert saved == workload.shared_tokens([a.prompt for a in arrivals], BLOCK)
    assert on.outputs == off.outputs


@pytest.mark.usefixtures("quick_compiles_here")
def test_a_stop_token_ends_a_request(tiny, arrivals, alone):
    stop = alone[1][4]
    served = serve(tiny, arrivals[:1], {stop}).record.outputs[1]
    assert served == alone[1][: alone[1].index(stop) + 1]


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_in_a_small_cache_comes_to_its_end(tiny, monkeypatch, seed):
    compiled = stand_in_programs(monkeypatch)
    prompts = shared_prompts(20, tail=30, seed=seed)
    crowd = workload.poisson_arrivals(seed, 0.8, prompts, 6)
    preemption = ("recompute", "swap")[seed % 2]
    buckets = {"row_buckets": (2, 5), "token_buckets": (8, 16)}
    server = serve(tiny, crowd, num_blocks=14, preemption=preemption, **buckets)
    record = server.record
    for arrival in crowd:
        length = len(arrival.prompt)
        assert record.outputs[arrival.number] == list(range(10 + length, 16 + length))
    assert [request.number for request in record.requests] == list(range(1, 21))
    assert len(compiled) <= 4 and record.total("preempted") > 0
    assert max(step.running for step in record.steps) <= 5
    assert record.total("found") > 0 and server.allocator.stats().evictions > 0


def test_the_figures_of_a_run_are_those_of_its_steps(tiny, monkeypatch):
    stand_in_programs(monkeypatch)
    two = [Arrival(1, 0.0, tuple(range(3, 23)), 3), Arrival(2, 1.0, tuple(range(3, 23)), 2)]
    record = serve(tiny, two, num_blocks=40).record
    # 16 tokens; 4 of the first, and the second, of which 16 are found: 4 more; decode
    assert [step.prefill for step in record.steps] == [16, 8, 0, 0]
    assert [step.generated for step in record.steps] == [0, 2, 2, 1]
    assert [step.found for step in record.steps] == [0, 16, 0, 0]
    assert [step.used for step in record.steps] == [5, 6, 8, 6]
    assert [step.cached for step in record.steps] == [0, 0, 0, 0]
    assert record.first_token_times.tolist() == [2.0, 1.0]
    assert record.inter_token_times.tolist() == [1.0, 1.0, 1.0]
    assert record.hit_rate == 16 / 40
    lines = record.lines("steps")
    assert lines["tokens generated"] == "5" and lines["prompt tokens computed"] == "24"
    assert lines["time to first token, steps"] == "median 1.5, 90th 1.9"


def scheduler(num_blocks, **options):
    allocator = paged_kv.BlockAllocator(num_blocks, BLOCK, enable_prefix_caching=True)
    sizes = {"max_rows": 4, "max_step_tokens": 16, "preemption": "recompute", **options}
    return Scheduler(allocator, **sizes)


def test_the_last_to_come_makes_room_and_waits_before_all_others():
    queue = scheduler(4)
    first, second, third = (
        Request.of(Arrival(number, 0.0, tuple(range(number, number + 8)), 5))
        for number in (10, 20, 30)
    )
    for request in (first, second, third):
        queue.add(request)
    step = queue.next_step()
    assert [(work.request, work.num_tokens) for work in step.work] == [(first, 8), (second, 8)]
    assert (queue.running, list(queue.waiting)) == ([first, second], [third])
    for request in (first, second):
        request.cached = request.furthest = 8
        request.tokens.append(1)
    step = queue.next_step()
    assert [(work.request, work.num_tokens) for work in step.work] == [(first, 1)]
    assert step.preempted == 1 and (second.cached, second.remaining) == (0, 9)
    assert (queue.running, list(queue.waiting)) == ([first], [second, third])


def test_what_can_never_run_is_an_error(tiny):
    with pytest.raises(
        RequestError, match="request 7 needs 3 blocks for 11 tokens, and the cache h"
    ):
        scheduler(2).add(Request.of(Arrival(7, 0.0, (5,) * 8, 4)))
    server = Engine(tiny.config, tiny.weights, frozenset(), Options(**OPTIONS))
    with pytest.raises(RequestError, match="request 8 comes to 53 tokens, more than max_length=52"):
        server.add(Arrival(8, 0.0, (5,) * 50, 4))


def test_arrivals_are_a_poisson_process_by_its_seed():
    prompts = [[1]] * 4000
    arrivals = workload.poisson_arrivals(3, 2.0, prompts, 1)
    gaps = np.diff([arrival.time for arrival in arrivals])
    assert arrivals[0].time == 0 and (gaps > 0).all()
    assert abs(gaps.mean() - 0.5) < 0.03 and abs(gaps.std() - 0.5) < 0.03
    assert arrivals == workload.poisson_arrivals(3, 2.0, prompts, 1)
    assert arrivals[1:] != workload.poisson_arrivals(4, 2.0, prompts, 1)[1:]


def test_prompts_share_their_system_prompt_and_no_more(tiny):
    prompts = workload.chat_prompts(tiny.text, 0, 6, num_systems=2, system_tokens=70)
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert len({tuple(prompt[:70]) for prompt in prompts}) == 2
    assert prompts == workload.chat_prompts(tiny.text, 0, 6, num_systems=2, system_tokens=70)
    assert workload.shared_tokens([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [1, 2, 9, 9]], 2) == 6


@pytest.fixture(scope="module")
def real():
    """The model, requests behind one system prompt of 256 tokens, and each one's tokens alone."""
    model = default_model()
    prompts = workload.chat_prompts(model.text, 0, 3, num_systems=1, system_tokens=256)
    arrivals = workload.poisson_arrivals(0, 1.0, prompts, 16)
    alone = serve_bench.generate_alone(model, arrivals, argparse.Namespace(block_size=16))
    return model, arrivals, alone


# Two unshared prompts of 18 blocks fit, and three that share 16; their answers do not.
REAL_BLOCKS = {False: 36, True: 22}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("is_caching", [False, True], ids=["unshared", "shared"])
def test_the_real_model_serves_as_alone_and_preempts(real, preemption, is_caching):
    model, arrivals, alone = real
    prompts = [arrival.prompt for arrival in arrivals]
    options = {
        "num_blocks": REAL_BLOCKS[is_caching],
        "max_length": max(map(len, prompts)) + 16,
        "row_buckets": (3,),
        "token_buckets": (320,),
    }
    same = {"block_size": 16, "prefix_caching": is_caching, "preemption": preemption}
    record = serve(model, arrivals, model.text.stop_tokens, **options, **same).record
    assert record.outputs == alone
    assert record.total("preempted") > 0
    assert (record.total("swapped") > 0) == (preemption == "swap")
    assert (record.total("again") > 0) == (preemption == "recompute")
    saved = sum(map(len, prompts)) - record.total("prefill")
    assert saved == (workload.shared_tokens(prompts, 16) if is_caching else 0)
    assert workload.shared_tokens(prompts, 16) == 2 * 256
