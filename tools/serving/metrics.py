"""What a run did: every step and every request, and the figures that sum them up.

Times are those of the engine's clock: seconds of computing, without compiling and idle time, or
steps.  Throughput is always per second of computing.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tools.serving.request import Request
from tools.serving.scheduler import Scheduler, Step


class StepRecord(NamedTuple):
    """One step, and how things stood at its end."""

    time: float  # at its end
    seconds: float  # that it took
    prefill: int  # prompt tokens computed, each for the first time
    again: int  # tokens computed once more, for preemption had dropped them
    generated: int
    asked: int  # prompt tokens of requests that came in
    found: int  # those of them that the prefix cache had
    preempted: int
    swapped: int  # blocks copied to the host or back
    running: int
    waiting: int
    used: int  # blocks that requests hold
    cached: int  # blocks kept for their tokens alone

    @classmethod
    def of(cls, step: Step, scheduler: Scheduler, time: float, seconds: float) -> "StepRecord":
        """Taken before its requests are told that their tokens are computed."""
        prefill = again = 0
        for request, start, count in step.work:
            seen = min(max(request.furthest - start, 0), count)
            again += seen
            prefill += max(min(len(request.arrival.prompt) - start, count) - seen, 0)
        stats = scheduler.allocator.stats()
        return cls(
            time=time,
            seconds=seconds,
            prefill=prefill,
            again=again,
            generated=sum(work.num_tokens == work.request.remaining for work in step.work),
            asked=step.asked,
            found=step.found,
            preempted=step.preempted,
            swapped=sum(b >= 0 for s in step.swaps_out + step.swaps_in for b in s.blocks),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used=stats.used,
            cached=stats.cached,
        )


@dataclasses.dataclass
class Record:
    """A run, from its first step to its last."""

    num_blocks: int
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    requests: list[Request] = dataclasses.field(default_factory=list)  # as they came

    def column(self, name: str) -> np.ndarray:
        """A field of every step."""
        return np.array([getattr(step, name) for step in self.steps])

    def total(self, name: str) -> int:
        """The sum of a field over all steps."""
        return int(self.column(name).sum())

    @property
    def outputs(self) -> dict[int, list[int]]:
        """What was generated, by the request's number."""
        return {request.number: request.generated for request in self.requests}

    @property
    def seconds(self) -> float:
        """Of computing."""
        return float(self.column("seconds").sum())

    @property
    def first_token_times(self) -> np.ndarray:
        """From each arrival to the request's first token."""
        return np.array([r.token_times[0] - r.arrival.time for r in self.requests])

    @property
    def inter_token_times(self) -> np.ndarray:
        """From each token of a request to its next, preemption included."""
        return np.concatenate([np.diff(r.token_times) for r in self.requests])

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens that the prefix cache had."""
        return self.total("found") / max(self.total("asked"), 1)

    def lines(self, unit: str) -> dict[str, str]:
        """The figures, by their names; `unit` is that of the clock."""
        generated = self.total("generated")
        used = self.column("used") / self.num_blocks
        return {
            "prompt tokens computed": str(self.total("prefill")),
            "prompt tokens found in the cache": f"{self.total('found')} ({self.hit_rate:.0%})",
            "tokens computed again": str(self.total("again")),
            "tokens generated": str(generated),
            "preemptions": str(self.total("preempted")),
            "blocks swapped, out and in": str(self.total("swapped")),
            "steps": str(len(self.steps)),
            "seconds of computing": f"{self.seconds:.1f}",
            "tokens generated per second": f"{generated / self.seconds:.1f}",
            f"time to first token, {unit}": _quantiles(self.first_token_times),
            f"inter-token latency, {unit}": _quantiles(self.inter_token_times),
            "blocks in use": f"{used.mean():.0%}, at most {used.max():.0%} of {self.num_blocks}",
        }


def table(runs: dict[str, Record], unit: str) -> str:
    """The figures of runs side by side."""
    columns = {name: run.lines(unit) for name, run in runs.items()}
    names = list(next(iter(columns.values())))
    rows = [
        ["", *columns],
        *([name, *(lines[name] for lines in columns.values())] for name in names),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _quantiles(times: np.ndarray) -> str:
    if not times.size:
        return "none"
    median, high = np.quantile(times, (0.5, 0.9))
    return f"median {median:.3g}, 90th {high:.3g}"
