"""Who computes what in the next step: first come, first served, whatever phase a request is in.

A step has room for so many tokens.  Requests that run take theirs in the order in which they came
in: one token at decode, a chunk of the prompt before that.  What is left admits those that wait.
When blocks run out, the request that came in last makes room.  Everything happens on the host.

Source: the scheduler of vLLM (Kwon et al., 2023), the chunked prefill of Sarathi (Agrawal et al.,
2023).
"""

import dataclasses
from collections import deque
from typing import Literal, NamedTuple

import paged_kv
from tools.serving.request import Request, RequestError

Preemption = Literal["recompute", "swap"]


class Work(NamedTuple):
    """The next `num_tokens` tokens of a request, of which the cache has `start`."""

    request: Request
    start: int
    num_tokens: int


class Swap(NamedTuple):
    """Blocks of a request to be copied; on the way in, -1 where they are in the cache already."""

    request: Request
    blocks: list[int]


@dataclasses.dataclass
class Step:
    """What the engine does next, in this order."""

    swaps_out: list[Swap] = dataclasses.field(default_factory=list)
    swaps_in: list[Swap] = dataclasses.field(default_factory=list)
    work: list[Work] = dataclasses.field(default_factory=list)
    preempted: int = 0
    asked: int = 0  # prompt tokens of requests that came in for the first time
    found: int = 0  # those of them that the prefix cache had


class Scheduler:
    """Keeps the requests that wait and those that run, and the blocks they hold."""

    def __init__(
        self,
        allocator: paged_kv.BlockAllocator,
        *,
        max_rows: int,
        max_step_tokens: int,
        preemption: Preemption,
    ):
        self.allocator, self.preemption = allocator, preemption
        self.max_rows, self.max_step_tokens = max_rows, max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the first came in first

    def add(self, request: Request) -> None:
        """Takes a request, which waits.

        Raises:
          RequestError: it could never run to its end, not even alone.
        """
        needed, has = self._blocks_for(request.max_cached), self.allocator.num_blocks
        if needed > has:
            raise RequestError(
                f"request {request.number} needs {needed} blocks for {request.max_cached} tokens, "
                f"and the cache has {has}; ask for fewer tokens or make it larger"
            )
        self.waiting.append(request)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    def next_step(self) -> Step:
        """Decides what is computed next, and moves the blocks of those concerned."""
        step, room = Step(), self.max_step_tokens
        queue = deque(self.running)
        while queue and room:
            request = queue.popleft()
            count = min(request.remaining, room)
            while request in self.running and not self._grow(request, count):
                self._preempt(queue.pop() if queue else request, step)
            if request in self.running:
                room -= self._compute(request, count, step)
        while self.waiting and room and not step.preempted and len(self.running) < self.max_rows:
            request = self.waiting[0]
            if not self._admit(request, step):
                break
            room -= self._compute(request, min(request.remaining, room), step)
        return step

    def finish(self, request: Request) -> None:
        """Ends a request; what it committed stays findable until blocks run short."""
        self.running.remove(request)
        self.allocator.free(request.number)

    def _compute(self, request: Request, count: int, step: Step) -> int:
        """Puts tokens into the step.

        They are committed at once, for requests that come in later: in this step at the earliest,
        where every layer appends all tokens before one attends.  A request that is in the step is
        not preempted before it, so what is found has been written.
        """
        step.work.append(Work(request, request.cached, count))
        self.allocator.commit(request.number, request.tokens[: request.cached + count])
        return count

    def _grow(self, request: Request, count: int) -> bool:
        """Makes room for `count` more tokens of a request that runs; False if there is none."""
        missing = request.cached + count - self.allocator.num_tokens(request.number)
        try:
            self.allocator.extend(request.number, max(missing, 0))
        except paged_kv.OutOfBlocksError:
            return False
        return True

    def _admit(self, request: Request, step: Step) -> bool:
        """Lets a request in, with room for all that it has; False if there are too few blocks."""
        number, is_swapped = request.number, request.host_blocks is not None
        tokens = request.tokens[: request.cached + 1] if is_swapped else request.tokens
        found = self.allocator.match_prefix(number, tokens)
        try:
            self.allocator.extend(number, len(request.tokens) - found)
        except paged_kv.OutOfBlocksError:
            self.allocator.free(number)
            return False
        if is_swapped:
            blocks, shared = self.allocator.blocks(number), self._blocks_for(found)
            blocks = [-1] * shared + blocks[shared : self._blocks_for(request.cached)]
            step.swaps_in.append(Swap(request, blocks))
        else:
            request.cached = found
        if request.furthest == 0:  # not after a preemption
            step.asked += len(request.arrival.prompt)
            step.found += found
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self, request: Request, step: Step) -> None:
        """Takes a request's blocks; it waits before all others."""
        if self.preemption == "swap" and request.cached:
            held = self.allocator.blocks(request.number)
            step.swaps_out.append(Swap(request, held[: self._blocks_for(request.cached)]))
        else:
            request.cached = 0
        self.finish(request)
        self.waiting.appendleft(request)
        step.preempted += 1

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.allocator.block_size)
