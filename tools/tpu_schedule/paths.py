"""Loops of a kernel, and the way that most of their iterations take.

The hot loop is the innermost one that takes at least half of the time, has the matrix unit's work
(if the kernel has any) and brings in keys and values.  A body of several variants behind branches
is measured on the one that takes at least half of the loop's time, full tiles if a case has any
number of them; if none does, on all together.  A kernel without such a loop is measured from end
to end.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from .dump import Dump
from .machine import Trace, Visit

LARGE = 20  # a block that takes this part of an iteration decides which way it is


@dataclass(frozen=True)
class Path:
    """One way through the hot loop: averages over the iterations that take it.

    passes: how often each bundle runs in an iteration.
    """

    iterations: int
    cycles: float
    copies: float
    granules: float
    passes: Mapping[int, float]


def hot_path(dump: Dump, trace: Trace) -> Path:
    """The way through the hot loop that the kernel is measured on."""
    has_products = dump.uses_matrix_unit(range(len(dump.bundles)))
    for start, stop in sorted(_loops(trace), key=lambda loop: loop[1] - loop[0]):
        iterations = list(_iterations(trace, start, stop))
        visits = list(chain.from_iterable(iterations))
        if 2 * _cycles(visits) < trace.cycles or not any(visit.copies for visit in visits):
            continue
        if has_products and not dump.uses_matrix_unit(_bundles(visits)):
            continue
        return _commonest(iterations)
    return _commonest([trace.visits])


def _loops(trace: Trace) -> list[tuple[int, int]]:
    """Every loop as [first bundle, behind the last branch back to it)."""
    stops: dict[int, int] = {}
    for block in {visit.block for visit in trace.visits}:
        if block.target is not None and block.target <= block.start:
            stops[block.target] = max(block.stop, stops.get(block.target, 0))
    return list(stops.items())


def _iterations(trace: Trace, start: int, stop: int) -> Iterator[list[Visit]]:
    """The visits of each passage from the loop's first bundle to itself or out of the loop."""
    current: list[Visit] = []
    for visit in trace.visits:
        at = visit.block.start
        if current and (at == start or not start <= at < stop):
            yield current
            current = []
        if at == start or (current and start <= at < stop):
            current.append(visit)
    if current:
        yield current


def _commonest(iterations: Sequence[Sequence[Visit]]) -> Path:
    """The iterations that pass the same large blocks, if they take half of the time; else all."""
    groups = defaultdict(list)
    for visits in iterations:
        if any(visit.copies for visit in visits):
            least = _cycles(visits) / LARGE
            large = frozenset(v.block.start for v in visits if v.block.cycles >= least)
            groups[large].append(visits)
    group = max(groups.values(), key=_total, default=iterations)
    if 2 * _total(group) < _total(iterations):
        group = iterations
    count = len(group)
    copies = [copy for visits in group for visit in visits for copy in visit.copies]
    passes = Counter(_bundles(chain.from_iterable(group)))
    return Path(
        iterations=count,
        cycles=_total(group) / count,
        copies=len(copies) / count,
        granules=sum(copy.size for copy in copies) / count,
        passes={at: times / count for at, times in passes.items()},
    )


def _total(iterations: Sequence[Sequence[Visit]]) -> int:
    return sum(map(_cycles, iterations))


def _cycles(visits: Iterable[Visit]) -> int:
    return sum(visit.block.cycles for visit in visits)


def _bundles(visits: Iterable[Visit]) -> Iterator[int]:
    return chain.from_iterable(range(visit.block.start, visit.block.stop) for visit in visits)
