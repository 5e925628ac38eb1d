"""Packed pools on TPU: what a row of 128 lanes holds, and the attention over such rows.

Where head_dim divides 128, a row holds `heads_per_row` kv heads of one token, side by side.  That
is one kv head of width 128 to which every query head of those heads belongs: with the query in its
kv head's lanes and zeros in the others, its dot product with the row is that with its own head, and
of the weighted sum of rows it takes its own lanes.  The kernels for head_dim 128 do the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from ..core.layout import LANES
from ..core.problem import AppendProblem, CacheShape, Problem

P = TypeVar("P", Problem, AppendProblem)


def heads_per_row(cache: CacheShape) -> int:
    """kv heads of one token side by side in a row; 1 where rows and heads are one."""
    return LANES // cache.head_dim if cache.has_packed_pools else 1


def unsupported(cache: CacheShape) -> str | None:
    """Why rows are not whole kv heads of one token, for an error; None if they are."""
    if not cache.has_packed_pools:
        return None
    if LANES % cache.head_dim == 0 and cache.num_kv_heads % heads_per_row(cache) == 0:
        return None
    return (
        f"packed rows of {LANES} values are not whole heads of one token at "
        f"num_kv_heads={cache.num_kv_heads}, head_dim={cache.head_dim}; use an unpacked cache"
    )


def by_rows(problem: P) -> P:
    """The same problem with rows for kv heads, where a row holds several."""
    cache = problem.cache
    if heads_per_row(cache) == 1:
        return problem
    heads = cache.num_kv_heads // heads_per_row(cache)
    return replace(problem, cache=replace(cache, num_kv_heads=heads, head_dim=LANES))


def attend(
    attend_rows: Callable[..., tuple[Array, Array]],
    problem: Problem,
    query: Array,
    *arrays: Any,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) of the problem by `attend_rows`, an `attend` of head_dim 128."""
    n, (key_pool, value_pool, *others) = heads_per_row(problem.cache), arrays
    rows = by_rows(problem)
    pools = (pool.reshape(rows.cache.pool_shape) for pool in (key_pool, value_pool))
    is_own = _own_lanes(problem)
    query = jnp.where(is_own, query[:, :, None], 0).reshape(*query.shape[:2], LANES)
    out, lse = attend_rows(rows, query, *pools, *others, **options)
    out = jnp.where(is_own, out.reshape(*out.shape[:2], n, -1), 0).sum(2, dtype=out.dtype)
    return out, lse


def append(
    append_rows: Callable[..., tuple[Array, Array]],
    problem: AppendProblem,
    *arrays: Array,
    **options: Any,
) -> tuple[Array, Array]:
    """Both pools with the new tokens written by `append_rows`, an `append` of head_dim 128."""
    rows = by_rows(problem)
    new = (x.reshape(problem.num_tokens, -1, LANES) for x in arrays[:2])
    pools = (pool.reshape(rows.cache.pool_shape) for pool in arrays[2:4])
    written = append_rows(rows, *new, *pools, *arrays[4:], **options)
    return written[0].reshape(problem.cache.pool_shape), written[1].reshape(
        problem.cache.pool_shape
    )


def _own_lanes(problem: Problem) -> Array:
    """bool (1, num_query_heads, heads_per_row, 1): the part of a row that is a query head's own."""
    n = heads_per_row(problem.cache)
    kv_head = jnp.arange(problem.num_query_heads) // problem.group
    return (kv_head[:, None] % n == jnp.arange(n)[None])[None, ..., None]
