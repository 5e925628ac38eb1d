"""Mixed batches on GPU: sequences with one query token go through decode, the others via prefill.

Which they are is known on the device alone, so both kernels are always launched; the one that no
sequence needs finds an empty list.  Tokens stay where they are: decode is given a query per
sequence, prefill's list has no tiles of sequences with one token, and the rows of those are put
into the packed result: each row is written once.
"""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from ..core.problem import Problem
from ..core.schedule import Schedule

# Query tokens per sequence on average from which on the launches cost more than they save: a query
# token alone in its tile of 64 is then less than a tenth of the work.
MANY_TOKENS = 640

Attend = Callable[[Problem, Array, Schedule], tuple[Array, Array]]


def single_tokens(problem: Problem) -> Problem | None:
    """The problem of the sequences with one query token; None if there is little to gain."""
    batch = problem.cache.batch
    if not problem.is_packed or batch == 1 or problem.num_tokens >= MANY_TOKENS * batch:
        return None
    return replace(problem, is_packed=False, num_tokens=batch)


def split(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """Of a packed batch: that of the single tokens, and that of the other sequences."""
    is_single = schedule.query_lengths == 1
    made_for = replace(schedule.made_for, is_packed=False)
    singles = Schedule(jnp.where(is_single, schedule.seq_lengths, 0), None, made_for)
    return singles, replace(schedule, is_apart=is_single)


def attend(
    problem: Problem,
    singles: Problem,
    run: Attend,
    query: Array,
    schedule: Schedule,
) -> tuple[Array, Array]:
    """(out, lse) of packed queries; `singles` is the problem of the sequences with one of them.

    run: attends with the kernel for a problem.
    """
    apart, others = split(schedule)
    row = jnp.clip(schedule.query_start_loc[:-1], 0, problem.num_tokens - 1)
    out, lse = run(problem, query, others)
    # one after the other, as the interpreter holds one kernel at a time
    queries, lse = lax.optimization_barrier((query[row], lse))
    single_out, single_lse = run(singles, queries, apart)
    nowhere = problem.num_tokens + jnp.arange(row.shape[0])  # past the end: dropped
    row = jnp.where(schedule.query_lengths == 1, row, nowhere)
    put = lambda all_rows, rows: all_rows.at[row].set(rows, mode="drop", unique_indices=True)
    return put(out, single_out), put(lse, single_lse)
