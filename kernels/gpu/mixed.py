"""Mixed batches on GPU: sequences with one query token go through decode, the others via prefill.

Both kernels are always launched; the one that no sequence needs finds an empty list.  The rows of
single tokens are put into the packed result: each row is written once.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from ..core import mixed
from ..core.arrays import AttentionArrays
from ..core.problem import Problem

# Query tokens per sequence on average from which on the launches cost more than they save: a query
# token alone in its tile of 64 is then less than a tenth of the work.
MANY_TOKENS = 640

Attend = Callable[[Problem, AttentionArrays], tuple[Array, Array]]


def single_tokens(problem: Problem) -> Problem | None:
    """The problem of the sequences with one query token; None if there is little to gain."""
    if not is_worthwhile(problem.cache.batch, problem.num_tokens):
        return None
    return mixed.single_tokens(problem)


def is_worthwhile(batch: int, num_tokens: int) -> bool:
    """Whether single tokens of a packed batch are taken apart."""
    return batch > 1 and num_tokens < MANY_TOKENS * batch


def attend(
    problem: Problem, singles: Problem, run: Attend, arrays: AttentionArrays
) -> tuple[Array, Array]:
    """(out, lse) of packed queries; `singles` is the problem of the sequences with one of them.

    run: attends with the kernel for a problem.
    """
    apart, others = mixed.split(arrays)
    out, lse = run(problem, others)
    # one after the other, as the interpreter holds one kernel at a time
    queries, lse = lax.optimization_barrier((apart.query, lse))
    single_out, single_lse = run(singles, apart._replace(query=queries))
    row = mixed.rows_of_singles(arrays)
    nowhere = problem.num_tokens + jnp.arange(row.shape[0])  # past the end: dropped
    row = jnp.where(arrays.schedule.query_lengths == 1, row, nowhere)
    put = lambda all_rows, rows: all_rows.at[row].set(rows, mode="drop", unique_indices=True)
    return put(out, single_out), put(lse, single_lse)
