"""Packed pools on TPU: blocks as rows of 128 values, wherever in a row a kv head begins.

A query row is laid out as the rows that its kv head lies in, zeros around it: then its product with
those rows is that with its head, and of their weighted sum it takes its own part.

- Where head_dim divides 128 and the heads of a token fill whole rows, a row is a kv head of width
  128 to which the query heads of all its heads belong, and every kernel for head_dim 128 will do.
- Else a head may lie across two rows, whose scores are added, and rows may hold heads of several
  tokens: then a query head comes once for each of these tokens, and its results are merged.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..core.arrays import AttentionArrays, NewTokens
from ..core.layout import LANES
from ..core.merge import merge_states
from ..core.problem import AppendProblem, CacheShape, Problem
from .plan import BlockRows, rows_per_head


def are_apart(cache: CacheShape) -> bool:
    """Whether rows of packed pools are something else than kv heads."""
    return cache.has_packed_pools and cache.head_dim != LANES


def by_rows(problem: Problem) -> Problem:
    """The problem that a kernel is given: rows for kv heads, or a query head per token of a row."""
    cache = problem.cache
    if not are_apart(cache):
        return problem
    rows = BlockRows.of(cache)
    if rows.group_tokens == rows_per_head(cache) == 1:
        return replace(problem, cache=replace(cache, num_kv_heads=rows.num_heads, head_dim=LANES))
    if rows.group_tokens == 1:
        return problem
    heads = problem.num_query_heads * rows.group_tokens
    return replace(problem, num_query_heads=heads, query_dtype="float32")


def attend(
    attend_rows: Callable[..., tuple[Array, Array]],
    problem: Problem,
    arrays: AttentionArrays,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) of the problem by `attend_rows`, which takes it `by_rows`."""
    cache, rows, query = problem.cache, by_rows(problem), arrays.query
    tokens = BlockRows.of(cache).group_tokens
    if tokens > 1:
        query = jnp.repeat(query.astype(jnp.float32), tokens, axis=1)
        if arrays.alibi_slopes is not None:
            arrays = arrays._replace(alibi_slopes=jnp.repeat(arrays.alibi_slopes, tokens))
    first = _first_values(problem, tokens)
    query = _spread(query, first, rows_per_head(cache) * LANES)
    out, lse = attend_rows(rows, _with_rows(arrays, rows, query), **options)
    out = _own(out, first, cache.head_dim)
    if tokens > 1:
        out = out.reshape(problem.num_tokens, problem.num_query_heads, tokens, -1)
        lse = lse.reshape(problem.num_tokens, problem.num_query_heads, tokens)
        merge = lambda a, b: merge_states(*a, *b)
        out, lse = reduce(merge, [(out[:, :, i], lse[:, :, i]) for i in range(tokens)])
    return out.astype(arrays.query.dtype), lse


def append_by_rows(problem: AppendProblem) -> AppendProblem:
    """The append that a kernel is given: rows for kv heads, if a token fills whole rows."""
    cache, rows = problem.cache, BlockRows.of(problem.cache)
    if not are_apart(cache) or rows.group_tokens > 1:
        return problem
    return replace(problem, cache=replace(cache, num_kv_heads=rows.num_heads, head_dim=LANES))


def append(
    append_rows: Callable[..., tuple[Array, Array]],
    problem: AppendProblem,
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    *where: Array,
    **options: Any,
) -> tuple[Array, Array]:
    """Both pools with the new tokens written by `append_rows`, which takes it `append_by_rows`."""
    rows, shape = append_by_rows(problem), problem.cache.pool_shape
    new = (x.reshape(problem.num_tokens, -1, LANES) for x in (keys, values))
    pools = (pool.reshape(rows.cache.pool_shape) for pool in (key_pool, value_pool))
    key_pool, value_pool = append_rows(rows, *new, *pools, *where, **options)
    return key_pool.reshape(shape), value_pool.reshape(shape)


def append_and_attend(
    append_and_attend_rows: Callable[..., tuple[Array, Array, Array, Array]],
    problem: Problem,
    arrays: AttentionArrays,
    new: NewTokens,
) -> tuple[Array, Array, Array, Array]:
    """(out, lse, key_pool, value_pool), where rows are whole kv heads of one token."""
    cache, rows = problem.cache, by_rows(problem)
    first = _first_values(problem, 1)
    keys, values = (x.reshape(problem.num_tokens, -1, LANES) for x in new[:2])
    arrays = _with_rows(arrays, rows, _spread(arrays.query, first, LANES))
    new = new._replace(keys=keys, values=values)
    out, lse, key_pool, value_pool = append_and_attend_rows(rows, arrays, new)
    pools = key_pool.reshape(cache.pool_shape), value_pool.reshape(cache.pool_shape)
    return _own(out, first, cache.head_dim), lse, *pools


def _with_rows(arrays: AttentionArrays, rows: Problem, query: Array) -> AttentionArrays:
    """The arrays as the problem `by_rows` has them."""
    keys, values = (pool.reshape(rows.cache.pool_shape) for pool in arrays[1:3])
    return arrays._replace(query=query, key_pool=keys, value_pool=values)


def row_and_token(problem: Problem, rows: BlockRows, query_head: Any) -> tuple[Any, Any]:
    """Which row of a group its kv head begins in, and which token of the group it is for.

    The token is None where groups are single tokens.  int32 arrays, of a problem `by_rows`.
    """
    cache = problem.cache
    kv_head = lax.div(query_head, problem.group)
    if not cache.has_packed_pools:
        return kv_head, None
    if rows.group_tokens == 1:
        return lax.div(kv_head * cache.head_dim, LANES), None
    token = lax.rem(query_head, rows.group_tokens)
    head = token * cache.num_kv_heads + kv_head
    return lax.div(head * cache.head_dim, LANES), token


def _first_values(problem: Problem, tokens: int) -> list[int]:
    """Where in its first row the kv head of each query head (of each token) begins."""
    cache = problem.cache
    return [
        (token * cache.num_kv_heads + head // problem.group) * cache.head_dim % LANES
        for head in range(problem.num_query_heads)
        for token in range(tokens)
    ]


def _spread(query: Array, first: list[int], width: int) -> Array:
    """(num_tokens, heads, head_dim) to (num_tokens, heads, width), zeros around it."""
    head_dim = query.shape[2]
    place = lambda start: jnp.pad(query, ((0, 0), (0, 0), (start, width - head_dim - start)))
    return _by_first(first, place)


def _own(out: Array, first: list[int], head_dim: int) -> Array:
    """The inverse of `_spread`: the part of its rows that is a head's own."""
    return _by_first(first, lambda start: out[:, :, start : start + head_dim])


def _by_first(first: list[int], make: Callable[[int], Array]) -> Array:
    """`make` of where a head begins, for each head."""
    where, result = jnp.asarray(first)[None, :, None], make(first[0])
    for start in sorted(set(first) - {first[0]}):
        result = jnp.where(where == start, make(start), result)
    return result
