"""Loops of a kernel, and the way that most of their iterations take.

The hot loop is the innermost one that takes at least half of the time, has the matrix unit's work
(if the kernel has any) and brings in keys and values.  A body of several variants behind branches
is measured on the variant that takes most of the time: full tiles, if the case has any number of
them.  A kernel without such a loop is measured from end to end.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from .dump import Dump
from .machine import Trace, Visit


@dataclass(frozen=True)
class Path:
    """One way through the hot loop: averages over the iterations that take it.

    bundles: their addresses, each once for every time that an iteration passes it.
    """

    iterations: int
    cycles: float
    copies: float
    granules: float
    bundles: tuple[int, ...]


def hot_path(dump: Dump, trace: Trace) -> Path:
    """The way that takes most of the time in the hot loop."""
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


def _commonest(iterations: list) -> Path:
    """Iterations grouped by the blocks they pass; the group that takes most of the time."""
    groups = defaultdict(list)
    for visits in iterations:
        groups[frozenset(visit.block.start for visit in visits)].append(visits)
    some = {way: group for way, group in groups.items() if any(v.copies for g in group for v in g)}
    group = max((some or groups).values(), key=lambda group: sum(map(_cycles, group)))
    count = len(group)
    copies = [copy for visits in group for visit in visits for copy in visit.copies]
    return Path(
        iterations=count,
        cycles=sum(map(_cycles, group)) / count,
        copies=len(copies) / count,
        granules=sum(copy.size for copy in copies) / count,
        bundles=tuple(_bundles(group[0])),
    )


def _cycles(visits) -> int:
    return sum(visit.block.cycles for visit in visits)


def _bundles(visits) -> Iterator[int]:
    return chain.from_iterable(range(visit.block.start, visit.block.stop) for visit in visits)
