"""The figures of a case on a topology, from the ways of its kernels."""

from dataclasses import dataclass
from typing import Any

from .chips import Chip
from .dump import Dump
from .machine import Trace
from .paths import Path, hot_path

KIB = 1024


@dataclass(frozen=True)
class Call:
    """One kernel and its way; `filled` is the share of the pools' bytes that is not padding."""

    dump: Dump
    trace: Trace
    filled: float = 1.0


@dataclass(frozen=True)
class Ways:
    """The kernels that a run called, in order, and the work it asked for."""

    calls: tuple[Call, ...]
    num_bytes: int
    useful_flops: int

    @property
    def cycles(self) -> int:
        return sum(call.trace.cycles for call in self.calls)

    @property
    def is_whole(self) -> bool:
        return all(call.trace.is_whole for call in self.calls)


@dataclass(frozen=True)
class Hot:
    """The hot loop of the kernel that takes longest."""

    call: Call
    path: Path

    @property
    def dump(self) -> Dump:
        return self.call.dump

    @property
    def spills(self) -> int:
        return self.dump.spills(self.path.passes)

    @property
    def idle(self) -> float:
        """Share of cycles in which nothing starts."""
        bundles, passes = self.dump.bundles, self.path.passes
        return sum(times for at, times in passes.items() if not bundles[at]) / self.path.cycles

    @property
    def busy(self) -> dict[str, float]:
        """Share of each unit's slots that are filled."""
        slots, path = self.dump.slots, self.path
        filled = [
            sum(times * slots.used[at][unit] for at, times in path.passes.items())
            for unit in range(len(slots.units))
        ]
        each = zip(slots.units, slots.capacity, filled, strict=True)
        return {unit: n / (capacity * path.cycles) for unit, capacity, n in each if capacity}


def hot_of(ways: Ways) -> Hot:
    longest = max(ways.calls, key=lambda call: call.trace.cycles)
    return Hot(longest, hot_path(longest.dump, longest.trace))


def figures(
    chip: Chip,
    dumps: dict[str, Dump],
    ways: Ways,
    context: tuple[Ways, Ways] | None,
    *,
    is_whole: bool,
    asks_sequence: bool,
) -> dict[str, Any]:
    """Figures by the names of the report; None where the case has no such figure.

    is_whole: cycles per KiB are those of all kernels over all bytes, not the hot loop's.
    asks_sequence: the whole sequence's cycles are asked for, over its memory time and its peak.
    """
    hot = hot_of(ways)
    path = hot.path
    hbm = chip.hbm_cycles(KIB)
    in_loop = _ratio(path.cycles, path.granules * chip.granule * hot.call.filled / KIB)
    end_to_end = _ratio(ways.cycles, ways.num_bytes / KIB) if ways.is_whole else None
    sched = end_to_end if is_whole else in_loop
    return {
        "sched_per_kib": _rounded(sched),
        "hbm_per_kib": _rounded(hbm),
        "ratio": _rounded(_ratio(sched, hbm)),
        "sequence_ratio": _rounded(_ratio(end_to_end, hbm) if asks_sequence else None),
        "cycles_per_block_copy": _rounded(_ratio(path.cycles, path.copies), 2),
        "hot_loop_spills": hot.spills,
        "spills": sum(dump.spills(range(len(dump.bundles))) for dump in dumps.values()),
        "vmem_bytes": max(dump.vmem_bytes for dump in dumps.values()),
        "mxu_share": _rounded(_mxu_share(chip, ways, context, asks_sequence)),
    }


def _mxu_share(
    chip: Chip, ways: Ways, context: tuple[Ways, Ways] | None, asks_sequence: bool
) -> float | None:
    """Useful flops over the peak: of the whole run, or of what more context adds, full tiles."""
    if not all(way.is_whole for way in (ways, *(context or ()))):
        return None
    if context is not None:
        less, more = context
        flops, cycles = more.useful_flops - less.useful_flops, more.cycles - less.cycles
    elif asks_sequence:
        flops, cycles = ways.useful_flops, ways.cycles
    else:
        return None
    return flops / cycles / chip.flops_per_cycle


def _ratio(a: float | None, b: float) -> float | None:
    return None if a is None or not b else a / b


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
