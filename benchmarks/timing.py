"""How long a call takes: on the device's own clock where it has one, on the wall otherwise."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

CUPTI, DEVICE, WALL = "cupti", "device", "wall"
TPU_LINE = "XLA Modules"  # one event per program; a GPU's lines are streams, one event per kernel

Kernels = list[tuple[str, float]]  # names and seconds of the kernels of one call, in order


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and the quartiles around it.

    kernels: where the clock tells them apart, each one's name and median.
    """

    median_us: float
    low_us: float
    high_us: float
    repeats: int
    clock: str
    kernels: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float], clock: str) -> "Timing":
        low, median, high = np.percentile(np.asarray(seconds) * 1e6, [25, 50, 75]).tolist()
        return cls(median, low, high, len(seconds), clock)

    @classmethod
    def of_kernels(cls, calls: Sequence[Kernels]) -> "Timing":
        """A call lasts as long as all of its kernels together."""
        whole = cls.of([sum(seconds for _, seconds in call) for call in calls], CUPTI)
        columns = zip(*calls, strict=True)
        each = tuple((c[0][0], 1e6 * float(np.median([x for _, x in c]))) for c in columns)
        return replace(whole, kernels=each)


def measure(run: Callable[[int], Any], repeats: int, *, warm_up: int = 2) -> Timing:
    """Times `run(0) ... run(repeats - 1)`; each returns arrays, and may donate what it keeps."""
    for index in range(warm_up):
        jax.block_until_ready(run(index))
    if jax.default_backend() == "gpu" and repeats > 1:
        calls = _cupti_kernels(run, repeats)
        if calls is not None:
            return Timing.of_kernels(calls)
    if jax.default_backend() != "cpu":
        seconds = _device_seconds(run, repeats)
        if seconds is not None:
            return Timing.of(seconds, DEVICE)
    return Timing.of([_wall_seconds(run, index) for index in range(repeats)], WALL)


class _Calls:
    """`run(0)`, then `run(0) ... run(count - 1)`: what a profiler takes for a compiled function.

    It keeps every result until the last one is there; those that a later call may have been given
    to donate are left out.
    """

    def __init__(self, run: Callable[[int], Any], count: int):
        self.run, self.count, self.done = run, count, 0

    def __call__(self) -> Any:
        index, self.done = self.done - 1, self.done + 1
        result = self.run(max(index, 0))
        return result if index in (-1, self.count - 1) else None

    trace = lower = __call__  # of `jax.stages.Wrapped`; no one asks for them


def _cupti_kernels(run: Callable[[int], Any], repeats: int) -> list[Kernels] | None:
    """The kernels of each call; None if this profiler does not tell."""
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, calls = profiler.measure(_Calls(run, repeats), aggregate=False, iterations=repeats)()
    except RuntimeError:  # no CUPTI here, or calls that differ in their kernels
        return None
    return calls and [[(name, ms * 1e-3) for name, ms in call] for call in calls]


def _wall_seconds(run: Callable[[int], Any], index: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(index))
    return time.perf_counter() - begin


def _device_seconds(run: Callable[[int], Any], repeats: int) -> list[float] | None:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            results = [run(index) for index in range(repeats)]
            jax.block_until_ready(results[-1])
        planes = [
            plane
            for path in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        ]
    return per_call(device_events(planes), repeats)


def device_events(planes: Iterable[Any]) -> list[tuple[float, float]]:
    """(start, end) in nanoseconds of what the first device ran."""
    devices = sorted((p for p in planes if p.name.startswith("/device:")), key=lambda p: p.name)
    if not devices:
        return []
    lines = list(devices[0].lines)
    modules = [line for line in lines if line.name == TPU_LINE]
    streams = modules or [line for line in lines if line.name.startswith("Stream")]
    events = [event for line in streams for event in line.events]
    return sorted((event.start_ns, event.start_ns + event.duration_ns) for event in events)


def per_call(events: Sequence[tuple[float, float]], calls: int) -> list[float] | None:
    """Busy seconds of each of `calls` equal calls; None if the events do not divide evenly.

    The gap between two kernels of a call is the host's, and does not count.
    """
    if not events or len(events) % calls:
        return None
    each = len(events) // calls
    return [_busy(events[i : i + each]) * 1e-9 for i in range(0, len(events), each)]


def _busy(events: Sequence[tuple[float, float]]) -> float:
    busy, reached = 0.0, float("-inf")
    for start, end in events:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy
