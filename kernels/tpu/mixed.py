"""Mixed batches on TPU: sequences with one query token go through the decode kernel.

A kernel that no sequence needs is not launched, and of the two results each row of the packed one
takes its own.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..core import mixed
from ..core.arrays import AttentionArrays
from ..core.layout import locate_tokens
from ..core.problem import Problem

Attend = Callable[[AttentionArrays], tuple[Array, Array]]


def attend(
    problem: Problem, singles: Attend, others: Attend, arrays: AttentionArrays
) -> tuple[Array, Array]:
    """(out, lse) of packed queries; `singles` takes one query token per sequence."""
    schedule = arrays.schedule
    counts, starts = schedule.query_lengths, schedule.query_start_loc
    is_single = counts == 1
    apart, rest = mixed.split(arrays)
    out, lse = _unless_idle(singles, apart, is_single)
    packed_out, packed_lse = _unless_idle(others, rest, counts > 1)
    token = locate_tokens(starts, schedule.seq_lengths, problem.num_tokens)
    is_mine = (token.is_real & is_single[token.sequence])[:, None]
    return (
        jnp.where(is_mine[..., None], out[token.sequence], packed_out),
        jnp.where(is_mine, lse[token.sequence], packed_lse),
    )


def _unless_idle(call: Attend, arrays: AttentionArrays, has_queries: Array) -> tuple[Array, Array]:
    """`call`, if there is a query with keys to see; else what queries get that see none."""
    is_needed = jnp.any(has_queries & (arrays.schedule.seq_lengths > 0))

    def idle(query: Array, schedule: Any) -> tuple[Array, Array]:
        del schedule
        # made of the query, so that it varies over the same axes of a mesh
        out = jnp.where(is_needed, query, jnp.zeros_like(query))
        return out, jnp.where(is_needed, query[..., 0].astype(jnp.float32), -jnp.inf)

    def busy(query: Array, schedule: Any) -> tuple[Array, Array]:
        return call(arrays._replace(query=query, schedule=schedule))

    return lax.cond(is_needed, busy, idle, arrays.query, arrays.schedule)
