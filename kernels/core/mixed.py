"""Mixed batches: sequences with one query token apart from the others.

Which they are is known on the device alone, so that a program has a call for each kind.  Tokens
stay where they are: the one call is given a query per sequence, the other one cuts no tiles of
sequences with one token, and each packed row is that of one of the two results.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from .arrays import AttentionArrays
from .problem import Problem
from .schedule import Schedule


def single_tokens(problem: Problem) -> Problem | None:
    """The problem of the sequences with one query token; None if there is nothing to mix."""
    batch = problem.cache.batch
    if not problem.is_packed or batch == 1:
        return None
    return replace(problem, is_packed=False, num_tokens=batch)


def split(arrays: AttentionArrays) -> tuple[AttentionArrays, AttentionArrays]:
    """Of a packed batch: what the call for single tokens takes, and what the other one does."""
    singles, others = split_schedule(arrays.schedule)
    queries = arrays.query[rows_of_singles(arrays)]
    apart = arrays._replace(query=queries, schedule=singles)
    return apart, arrays._replace(schedule=others)


def split_schedule(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The schedule of the single tokens, and that of the other sequences."""
    is_single = schedule.query_lengths == 1
    made_for = replace(schedule.made_for, is_packed=False, num_tokens=None)
    lengths = jnp.where(is_single, schedule.seq_lengths, 0)
    singles = Schedule(lengths, None, made_for, schedule.work)
    return singles, replace(schedule, is_apart=is_single)


def rows_of_singles(arrays: AttentionArrays) -> Array:
    """int32 (batch,), the packed row of each sequence's first query token; any, if it has none."""
    return jnp.clip(arrays.schedule.query_start_loc[:-1], 0, arrays.query.shape[0] - 1)
