"""A kernel's answer to a problem: its plan, its memory, and the list of work, to be drawn."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.workload import Case
from paged_kv import validate
from paged_kv.kernels.core import schedule
from paged_kv.kernels.core.problem import AppendProblem, CacheShape, Problem

MANY = 8  # equal letters in a row that are written as a number


class Visits(NamedTuple):
    """Tiles of a sequence's keys that some of its queries meet, or tokens to be written."""

    sequence: int
    is_whole: bool
    number: int


class Worker(NamedTuple):
    """Who does some of the work, one after the other; what is done at once is a group."""

    name: str
    groups: list[list[Visits]]


class Scratch(NamedTuple):
    """A buffer of the kernel."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Explained:
    """A kernel, and how it takes a problem."""

    kernel: str
    problem: Problem | AppendProblem
    plan: Any
    scratch: list[Scratch]
    num_bytes: int  # of fast memory that a core or SM needs
    limit: int
    workers: list[Worker]
    legend: str  # what a letter is


class Unsupported(ValueError):
    """A problem that a backend's kernels do not take."""


def problem_of(case: Case) -> Problem:
    """The attention that a case asks, as `paged_attention` would."""
    window, cap = case.local_window_size, case.logits_soft_cap
    return Problem(
        cache=cache_of(case),
        num_tokens=case.num_tokens,
        num_query_heads=case.num_query_heads,
        query_dtype=case.dtype,
        is_packed=case.query_lengths is not None,
        variant=validate.variant(case.head_dim, None, case.is_causal, window, cap, case.has_alibi),
    )


def append_problem_of(case: Case) -> AppendProblem:
    """The append that a case asks."""
    return AppendProblem(cache_of(case), case.num_tokens, case.query_lengths is not None)


def cache_of(case: Case) -> CacheShape:
    """The case's cache, of one layer."""
    return CacheShape(
        num_layers=1,
        num_blocks=case.num_blocks,
        block_size=case.block_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        batch=case.batch,
        max_blocks_per_seq=case.max_blocks_per_seq,
    )


def schedule_of(case: Case, problem: Problem) -> schedule.Schedule:
    """The schedule of the case's step, its table sound."""
    starts = jnp.asarray(case.query_start_loc, jnp.int32) if problem.is_packed else None
    made_for = schedule.MadeFor.of(
        problem.cache, problem.num_query_heads, problem.is_packed, problem.variant
    )
    lengths = jnp.asarray(case.seq_lengths, jnp.int32)
    return schedule.Schedule(lengths, starts, made_for)


def tile_visits(
    sequence: int, first: int, stop: int, whole_first: int, whole_stop: int
) -> list[Visits]:
    """Tiles [first, stop) of a sequence, of which [whole_first, whole_stop) need no mask."""
    low = min(max(whole_first, first), stop)
    high = min(max(whole_stop, low), stop)
    parts = ((False, low - first), (True, high - low), (False, stop - high))
    return [Visits(sequence, is_whole, number) for is_whole, number in parts if number > 0]


def new_runs(case: Case, run: int) -> list[list[Visits]]:
    """The new tokens of each sequence, cut where positions are multiples of `run`."""
    groups = []
    lengths = zip(case.seq_lengths, case.queries.tolist(), strict=True)
    for sequence, (length, count) in enumerate(lengths):
        start = length - count
        whole = -(-start // run), length // run
        groups.append(tile_visits(sequence, start // run, -(-length // run), *whole))
    return [group for group, count in zip(groups, case.queries, strict=True) if count]


def rows(*columns: Array | np.ndarray) -> Iterator[tuple[int, ...]]:
    """The rows of arrays, as ints."""
    return zip(*(np.asarray(column).tolist() for column in columns), strict=True)


def draw(workers: Sequence[Worker], num_lines: int, width: int) -> list[str]:
    """A line for each worker, with a letter for each visit; most of many lines are left out."""
    head = len(workers) if len(workers) <= num_lines else num_lines - 2
    shown = [*workers[:head], *(workers[-1:] if head < len(workers) else ())]
    names = max((len(worker.name) for worker in shown), default=0)
    lines = [f"{worker.name:{names}}  {_letters(worker.groups, width)}" for worker in shown]
    if head < len(workers):
        lines.insert(head, f"... {len(workers) - head - 1} more")
    return lines


def _letters(groups: Iterable[list[Visits]], width: int) -> str:
    text = ""
    for group in groups:
        piece = "".join(map(_letter, group))
        if len(text) + len(piece) > width:
            return text + "..."
        text += piece + " "
    return text.rstrip() or "idle"


def _letter(visits: Visits) -> str:
    """Each visit, or many of them as a number."""
    letter = chr(ord("a") + visits.sequence % 26)
    letter = letter if visits.is_whole else letter.upper()
    return letter * visits.number if visits.number <= MANY else f"{letter}*{visits.number} "


def counted(parts: Iterable[Scratch]) -> Iterator[tuple[int, Scratch]]:
    """Equal neighbours as one, and how many there are."""
    for part, equal in groupby(parts):
        yield len(list(equal)), part
