"""What one writes without a kernel: gather every block of a row, dense softmax attention, scatter.

The yardstick of every ratio, and the check of the reference: it shares no code with the package.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

QUERY_CHUNK = 256  # rows of a dense score matrix at once


def attention(
    query: jax.Array,
    cache: Any,
    *,
    max_query_length: int,
    query_start_loc: jax.Array | None = None,
    **variant: Any,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of `paged_attention`, for one layer's cache and a table without wild entries."""
    if query_start_loc is None:

        def decode(q, row, length):
            dense = _gather(cache, row, length)
            return _attend(q[None], length[None] - 1, *dense, length, **variant)

        out, lse = jax.vmap(decode)(query, cache.block_table, cache.seq_lengths)
        return out[:, 0], lse[:, 0]

    num_tokens = query.shape[0]
    chunk = min(QUERY_CHUNK, max_query_length)
    firsts = jnp.arange(-(-max_query_length // chunk)) * chunk

    def sequence(results, operands):
        start, count, row, length = operands
        dense = _gather(cache, row, length)

        def rows(results, first):
            index = first + jnp.arange(chunk)
            token = jnp.where(index < count, start + index, num_tokens)
            q = query.at[token].get(mode="clip")
            part = _attend(q, length - count + index, *dense, length, **variant)
            return jax.tree.map(lambda r, p: r.at[token].set(p, mode="drop"), results, part), None

        return jax.lax.scan(rows, results, firsts)[0], None

    empty = jnp.zeros_like(query), jnp.full(query.shape[:2], -jnp.inf, jnp.float32)
    sequences = query_start_loc[:-1], jnp.diff(query_start_loc), cache.block_table
    return jax.lax.scan(sequence, empty, (*sequences, cache.seq_lengths))[0]


def append(
    key_pool: jax.Array, value_pool: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both pools with one row per slot written; a slot of -1 is dropped."""
    num_blocks, block_size = key_pool.shape[:2]
    at = jnp.where(slots < 0, num_blocks, slots // block_size), slots % block_size
    return key_pool.at[at].set(keys, mode="drop"), value_pool.at[at].set(values, mode="drop")


def _gather(cache: Any, row: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values (tokens, num_kv_heads, head_dim) of one table row, zero past its length."""
    held = jnp.arange(row.shape[0] * cache.block_size) < length

    def dense(pool):
        return jnp.where(held[:, None, None], pool[row].reshape(-1, *pool.shape[2:]), 0)

    return dense(cache.key_pool), dense(cache.value_pool)


def _attend(
    query: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    *,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Queries (n, heads, head_dim) at `positions` of one sequence over all its tokens."""
    num_heads, head_dim = query.shape[1:]
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    grouped = query.reshape(len(query), keys.shape[1], -1, head_dim)
    scores = einsum("nkgd,tkd->kgnt", grouped, keys).reshape(num_heads, len(query), -1)
    scores /= math.sqrt(head_dim)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    ahead = jnp.arange(len(keys))[None, :] - positions[:, None]
    if alibi_slopes is not None:
        scores -= alibi_slopes[:, None, None] * jnp.abs(ahead)[None].astype(jnp.float32)

    window = local_window_size
    left, right = (window, window) if isinstance(window, int) else window or (None, None)
    seen = (jnp.arange(len(keys)) < length)[None, :] & (positions >= 0)[:, None]
    if is_causal:
        seen &= ahead <= 0
    elif right is not None:
        seen &= ahead <= right
    if left is not None:
        seen &= ahead >= -left
    scores = jnp.where(seen[None], scores, -jnp.inf)

    lse = jax.nn.logsumexp(scores, axis=-1)
    total = lse if sinks is None else jnp.logaddexp(lse, sinks[:, None])
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0.0, total)[..., None])
    weights = weights.astype(values.dtype).reshape(keys.shape[1], -1, *scores.shape[1:])
    out = einsum("kgnt,tkd->nkgd", weights, values).reshape(query.shape)
    return out.astype(query.dtype), lse.T
