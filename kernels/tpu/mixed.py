"""Mixed batches on TPU: sequences with one query token go through the decode kernel.

Which they are is known on the device alone, so that the program has both kernels; one that no
sequence needs is not launched.  Tokens stay where they are: the decode kernel is given a query per
sequence, the other one cuts no tiles of sequences with one token, and of the two results each row
of the packed one takes its own.
"""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from ..core.layout import locate_tokens
from ..core.problem import Problem
from ..core.schedule import Schedule

Attend = Callable[[Array, Schedule], tuple[Array, Array]]  # (query, schedule) to (out, lse)


def single_tokens(problem: Problem) -> Problem | None:
    """The problem of the sequences with one query token; None if there is nothing to mix."""
    batch = problem.cache.batch
    if not problem.is_packed or batch == 1:
        return None
    return replace(problem, is_packed=False, num_tokens=batch)


def attend(
    problem: Problem, singles: Attend, others: Attend, query: Array, schedule: Schedule
) -> tuple[Array, Array]:
    """(out, lse) of packed queries; `singles` takes one query token per sequence."""
    starts, lengths = schedule.query_start_loc, schedule.seq_lengths
    counts = starts[1:] - starts[:-1]
    is_single = counts == 1
    made_for = replace(schedule.made_for, is_packed=False)
    apart = Schedule(jnp.where(is_single, lengths, 0), None, made_for)
    queries = query[jnp.minimum(starts[:-1], problem.num_tokens - 1)]
    out, lse = _unless_idle(singles, queries, apart, is_single)
    rest = replace(schedule, is_apart=is_single)
    packed_out, packed_lse = _unless_idle(others, query, rest, counts > 1)
    token = locate_tokens(starts, lengths, problem.num_tokens)
    is_mine = (token.is_real & is_single[token.sequence])[:, None]
    return (
        jnp.where(is_mine[..., None], out[token.sequence], packed_out),
        jnp.where(is_mine, lse[token.sequence], packed_lse),
    )


def _unless_idle(
    call: Attend, query: Array, schedule: Schedule, has_queries: Array
) -> tuple[Array, Array]:
    """`call`, if there is a query with keys to see; else what queries get that see none."""
    is_needed = jnp.any(has_queries & (schedule.seq_lengths > 0))

    def idle(query: Array, schedule: Schedule) -> tuple[Array, Array]:
        del schedule
        # made of the query, so that it varies over the same axes of a mesh
        out = jnp.where(is_needed, query, jnp.zeros_like(query))
        return out, jnp.where(is_needed, query[..., 0].astype(jnp.float32), -jnp.inf)

    return lax.cond(is_needed, call, idle, query, schedule)
