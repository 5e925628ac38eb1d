"""Continuous batching: a step is one program over whatever tokens the scheduler has chosen.

The host keeps requests, blocks and time; the device has weights and one stacked cache, which every
program takes and gives back in place.  Steps are padded to few sizes: one program for each size of
a decode step, and one for each number of tokens of a step that has parts of prompts in it.

Source: continuous batching is Orca's (Yu et al., 2022), padding to few sizes vLLM's.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv
from paged_kv.ops import Implementation
from tools.llama import LlamaConfig, LlamaWeights
from tools.programs import Programs
from tools.serving.metrics import Record, StepRecord
from tools.serving.request import Arrival, Request, RequestError
from tools.serving.scheduler import Preemption, Scheduler, Step


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve."""

    num_blocks: int
    max_length: int  # tokens of the longest request
    block_size: int = 16
    row_buckets: tuple[int, ...] = (2, 8)  # of a decode step; the last: how many run at once
    token_buckets: tuple[int, ...] = (32, 128, 256)  # of other steps; the last: tokens of a step
    prefix_caching: bool = True
    preemption: Preemption = "recompute"
    is_clock_wall: bool = True  # time in seconds of steps, or else in steps
    implementation: Implementation | None = None
    interpret: bool | None = None


class Inputs(NamedTuple):
    """A step as arrays, padded: rows past those of the step are empty."""

    block_table: np.ndarray  # int32 (rows, width)
    seq_lengths: np.ndarray  # int32 (rows,), before the step
    tokens: np.ndarray  # int32 (size,)
    counts: np.ndarray  # int32 (rows,)
    query_start_loc: np.ndarray | None  # int32 (rows + 1,); None at decode


class Engine:
    """Serves requests with greedy decoding; `run` takes them as they arrive."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        stop_tokens: frozenset[int],
        options: Options,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self.allocator = paged_kv.BlockAllocator(
            options.num_blocks, options.block_size, enable_prefix_caching=options.prefix_caching
        )
        self.scheduler = Scheduler(
            self.allocator,
            max_rows=options.row_buckets[-1],
            max_step_tokens=options.token_buckets[-1],
            preemption=options.preemption,
        )
        self.now, self.record = 0.0, Record(options.num_blocks)
        self._weights, self._stop_tokens, self._options = weights, stop_tokens, options
        self.programs = Programs(config, options.implementation, options.interpret, progress)
        self._width = -(-options.max_length // options.block_size)
        self._cache = paged_kv.init_paged_kv_cache(
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            batch_size=1,  # the rows of a step are made for the step
            max_blocks_per_seq=self._width,
            dtype=weights.embedding.dtype,
            num_layers=config.num_layers,
        )
        if options.preemption == "swap":
            self._compile_swaps()

    def run(self, arrivals: Iterable[Arrival]) -> Record:
        """Serves all of them to their ends.

        Time passes while a step is computed.  It stands still while a program is compiled, and
        where there is nothing to do it jumps to the next arrival.

        Raises:
          RequestError: a request could never run, for it is longer than the cache or a row.
        """
        coming = sorted(arrivals, key=lambda arrival: arrival.time, reverse=True)
        while coming or self.scheduler.is_busy:
            if not self.scheduler.is_busy:
                self.now = max(self.now, coming[-1].time)
            while coming and coming[-1].time <= self.now:
                self.add(coming.pop())
            self.step()
        return self.record

    def add(self, arrival: Arrival) -> Request:
        """Takes a request.

        Raises:
          RequestError: it could never run, for it is longer than the cache or a row.
        """
        request = Request.of(arrival)
        if request.max_cached > self._options.max_length:
            raise RequestError(
                f"request {request.number} comes to {request.max_cached} tokens, more than "
                f"max_length={self._options.max_length} of the engine"
            )
        self.scheduler.add(request)
        self.record.requests.append(request)
        return request

    def step(self) -> None:
        """Computes the next step, and gives every request that it completes its next token."""
        step = self.scheduler.next_step()
        inputs = self._inputs(step)
        kind = "decode" if inputs.query_start_loc is None else "mixed"
        program = self.programs.of(kind, self._arguments(inputs))
        start = time.perf_counter()
        self._swap(step)
        sampled = self._compute(program, inputs)
        seconds = time.perf_counter() - start
        self.now += seconds if self._options.is_clock_wall else 1.0
        self.record.steps.append(StepRecord.of(step, self.scheduler, self.now, seconds))
        for row, (request, _, count) in enumerate(step.work):
            request.cached += count
            request.furthest = max(request.furthest, request.cached)
            if request.remaining == 0:
                self._accept(request, int(sampled[row]))

    def _accept(self, request: Request, token: int) -> None:
        """Takes a sampled token; a request at its end leaves."""
        request.tokens.append(token)
        request.token_times.append(self.now)
        is_full = len(request.generated) == request.arrival.max_tokens
        if is_full or token in self._stop_tokens:
            self.scheduler.finish(request)

    def _inputs(self, step: Step) -> Inputs:
        """The step's tokens end to end; a decode step is padded to rows, others to tokens."""
        tokens = [t for r, start, count in step.work for t in r.tokens[start : start + count]]
        is_decode = len(tokens) == len(step.work)
        if is_decode:
            rows = size = paged_kv.pad_to_bucket(len(tokens), self._options.row_buckets)
        else:
            rows = self._options.row_buckets[-1]
            size = paged_kv.pad_to_bucket(len(tokens), self._options.token_buckets)
        names = [work.request.number for work in step.work]
        counts = _padded([work.num_tokens for work in step.work], rows)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return Inputs(
            block_table=self.allocator.block_table(names, self._width, num_rows=rows),
            seq_lengths=_padded([work.start for work in step.work], rows),
            tokens=_padded(tokens, size),
            counts=counts,
            query_start_loc=None if is_decode else starts,
        )

    def _arguments(self, inputs: Inputs) -> tuple:
        """What a program takes: the pools come with the rows of the step."""
        cache = dataclasses.replace(
            self._cache,
            block_table=jnp.asarray(inputs.block_table),
            seq_lengths=jnp.asarray(inputs.seq_lengths),
        )
        rest = (inputs.tokens, inputs.counts, inputs.query_start_loc)
        return (self._weights, cache, *rest, None)  # no draw: the likeliest token

    def _compute(self, program: Callable, inputs: Inputs) -> np.ndarray:
        """The likeliest token after the last of each row."""
        sampled, cache = program(*self._arguments(inputs))
        pools = {"key_pool": cache.key_pool, "value_pool": cache.value_pool}
        self._cache = dataclasses.replace(self._cache, **pools)
        return np.asarray(sampled)

    def _swap(self, step: Step) -> None:
        """Copies blocks to the host before others write to them, and back."""
        for request, blocks in step.swaps_out:
            request.host_blocks = self._swap_out(self._cache, self._ids(blocks))
        for request, blocks in step.swaps_in:
            self._cache = self._swap_in(self._cache, request.host_blocks, self._ids(blocks))
            request.host_blocks = None

    def _compile_swaps(self) -> None:
        """Compiles the one program of each direction, by copying nothing out and back."""
        self._swap_out = jax.jit(paged_kv.swap_out)
        self._swap_in = jax.jit(paged_kv.swap_in, donate_argnames="cache")
        host_blocks = self._swap_out(self._cache, self._ids([]))
        self._cache = self._swap_in(self._cache, host_blocks, self._ids([]))

    def _ids(self, blocks: list[int]) -> np.ndarray:
        """Blocks of a row, always of one shape; those of -1 are skipped."""
        return _padded(blocks, self._width, -1)


def _padded(values: list[int], size: int, filler: int = 0) -> np.ndarray:
    return np.array(values + [filler] * (size - len(values)), np.int32)
