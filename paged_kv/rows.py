"""Callers whose tokens are (batch, T, heads, head_dim), as `jax.nn` and the frameworks have them.

A row that has fewer than T tokens is padded at its end, and `query_seq_lengths` says how many are
real.  Rows of equal length are packed by a reshape; ragged ones by one gather each way.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from . import ops, validate, validate_forms
from .cache import PagedKVCache
from .kernels.core import layout
from .ops import Implementation


def paged_dot_product_attention(
    query: Float[Array, "*batch T num_query_heads head_dim"],
    cache: PagedKVCache,
    *,
    query_seq_lengths: int | Int32[Array, "batch"] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    **attention: Any,
) -> Any:
    """`jax.nn.dot_product_attention` where keys and values are what the cache holds.

    For models whose queries are (batch, T, heads, head_dim), T = 1 in decode.  Each row's T queries
    are the last tokens of its sequence, already in the cache: `append_rows` puts them there.
    Unlike `jax.nn`, causality and window go by position in the sequence, and causal is the default.

    Args:
      query: (batch, T, num_query_heads, head_dim), or without batch for a cache of one sequence.
      cache: of one layer, or a stack with `layer`; its batch is the query's.
      query_seq_lengths: real queries of each row, int32 (batch,) in [0, T]; the rest is padding at
        the end of a row and gives 0.  None: all T.
      scale, is_causal, local_window_size, return_residual, implementation: as in `paged_attention`,
        which has them from `jax.nn`.
      **attention: every other keyword of `paged_attention` but `query_start_loc`.  A `schedule` is
        one of `query_start_loc = row_starts(batch, T, query_seq_lengths)`.

    Returns:
      out, shaped and typed as the query; with `return_residual` also lse, float32, (batch, T,
      num_query_heads), -inf where a query sees no key.

    Raises:
      ValueError: the query's batch is not the cache's, a row has more queries than T, or as
        `paged_attention`.
      NotImplementedError: as `paged_attention`.

    Source: the signature is that of `jax.nn.dot_product_attention`.
    """
    is_batched = query.ndim != 3
    rows = Rows.of("query", query if is_batched else query[None], cache, query_seq_lengths)
    out, lse = ops.paged_attention(
        rows.pack(query if is_batched else query[None]),
        cache,
        query_start_loc=rows.starts,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        return_residual=True,
        implementation=implementation,
        **attention,
    )
    out, lse = rows.unpack(out), rows.unpack(lse, -jnp.inf)
    if not is_batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def append_rows(
    cache: PagedKVCache,
    keys: Float[Array, "batch T num_kv_heads head_dim"],
    values: Float[Array, "batch T num_kv_heads head_dim"],
    *,
    query_seq_lengths: int | Int32[Array, "batch"] | None = None,
    **append: Any,
) -> PagedKVCache:
    """`append_tokens` for new tokens that are (batch, T, num_kv_heads, head_dim).

    Args:
      cache: advanced already, by T or by `query_seq_lengths`.
      keys, values: (batch, T, num_kv_heads, head_dim), cast to the pools' dtype.
      query_seq_lengths: real tokens of each row, int32 (batch,) in [0, T]; None: all T.
      **append: `layer`, `implementation` and `interpret` of `append_tokens`.

    Raises:
      ValueError: the batch is not the cache's, a row has more tokens than T, or as `append_tokens`.
      NotImplementedError: as `append_tokens`.
    """
    rows = Rows.of("keys", keys, cache, query_seq_lengths)
    rows.check("values", values)
    return ops.append_tokens(
        cache, rows.pack(keys), rows.pack(values), query_start_loc=rows.starts, **append
    )


def append_and_attend_rows(
    query: Float[Array, "batch T num_query_heads head_dim"],
    keys: Float[Array, "batch T num_kv_heads head_dim"],
    values: Float[Array, "batch T num_kv_heads head_dim"],
    cache: PagedKVCache,
    *,
    query_seq_lengths: int | Int32[Array, "batch"] | None = None,
    return_residual: bool = False,
    **attention: Any,
) -> tuple[Any, PagedKVCache]:
    """`append_and_attend` for tokens that are (batch, T, heads, head_dim).

    Args:
      query: (batch, T, num_query_heads, head_dim), the new tokens of each row.
      keys, values: (batch, T, num_kv_heads, head_dim), of the same tokens.
      cache: advanced already, by T or by `query_seq_lengths`; donate it.
      query_seq_lengths: real tokens of each row, int32 (batch,) in [0, T]; None: all T.
      return_residual: also return lse, (batch, T, num_query_heads).
      **attention: every other keyword of `append_and_attend` but `query_start_loc`.

    Returns:
      What `paged_dot_product_attention` returns, and the cache with the new tokens.

    Raises:
      ValueError: batch or T differ, a row has more tokens than T, or as `append_and_attend`.
      NotImplementedError: as `append_and_attend`.
    """
    rows = Rows.of("query", query, cache, query_seq_lengths)
    rows.check("keys", keys)
    rows.check("values", values)
    (out, lse), cache = ops.append_and_attend(
        *map(rows.pack, (query, keys, values)),
        cache=cache,
        query_start_loc=rows.starts,
        return_residual=True,
        **attention,
    )
    out = rows.unpack(out)
    return ((out, rows.unpack(lse, -jnp.inf)) if return_residual else out), cache


def row_starts(
    batch: int, width: int, query_seq_lengths: Int32[Array, "batch"] | None = None
) -> Int32[Array, "batch_plus_1"] | None:
    """The `query_start_loc` of packed rows, for `make_schedule`.

    Args:
      batch: rows.
      width: T, tokens of a row, padding included.
      query_seq_lengths: real tokens of each row, int32 (batch,); None: all T.

    Returns:
      int32 (batch + 1,), prefix sums of tokens per row; None where every row has one token.
    """
    if query_seq_lengths is not None:
        counts = jnp.clip(query_seq_lengths, 0, width)
        return jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    return None if width == 1 else width * jnp.arange(batch + 1, dtype=jnp.int32)


def row_positions(
    cache: PagedKVCache, width: int, query_seq_lengths: int | Int32[Array, "batch"] | None = None
) -> Int32[Array, "batch width"]:
    """Position in its sequence of each token of (batch, T) rows, for embeddings of positions.

    Args:
      cache: advanced already: the step's tokens are the last of each sequence.
      width: T, tokens of a row, padding included.
      query_seq_lengths: real tokens of each row, an int or int32 (batch,); None: all T.

    Returns:
      int32 (batch, T); past the real tokens of a row it goes on counting.

    Raises:
      ValueError: `query_seq_lengths` is not an int or int32 (batch,).
    """
    counts = width if query_seq_lengths is None else query_seq_lengths
    counts = validate.token_counts("query_seq_lengths", counts, cache)
    return (cache.seq_lengths - counts)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of (batch, width, ...) arrays stand when they are packed.

    Attributes:
      batch, width: rows, and tokens of each, padding included.
      starts: their `query_start_loc`.
      source: int32 (batch * width,), for each packed token its index among all; None: the same.
      target: int32 (batch * width,), the inverse, past the end for padding.
    """

    batch: int
    width: int
    starts: Array | None
    source: Array | None = None
    target: Array | None = None

    @classmethod
    def of(cls, name: str, array: Array, cache: PagedKVCache, query_seq_lengths: Any) -> "Rows":
        """The rows of `array`, called `name` in errors, checked against the cache."""
        validate_forms.rows(name, array, cache)
        batch, width = array.shape[:2]
        if query_seq_lengths is None:
            return cls(batch, width, row_starts(batch, width))
        counts = validate.token_counts("query_seq_lengths", query_seq_lengths, cache)
        validate_forms.row_counts(counts, width)
        starts = row_starts(batch, width, counts)
        assert starts is not None
        token = layout.locate_tokens(starts, jnp.diff(starts), batch * width)
        source = jnp.where(token.is_real, token.sequence * width + token.step_index, 0)
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        target = jnp.where(column < counts[:, None], starts[:-1, None] + column, batch * width)
        return cls(batch, width, starts, source, target.reshape(-1))

    def check(self, name: str, array: Array) -> None:
        """That another array has these rows."""
        validate_forms.same_rows(name, array, (self.batch, self.width))

    def pack(self, array: Array) -> Array:
        """(batch, width, ...) as (batch * width, ...), real tokens first."""
        flat = array.reshape(-1, *array.shape[2:])
        return flat if self.source is None else flat[self.source]

    def unpack(self, packed: Array, padding: float = 0.0) -> Array:
        """The inverse of `pack`; padding tokens become `padding`."""
        if self.target is not None:
            packed = packed.at[self.target].get(mode="fill", fill_value=padding)
        return packed.reshape(self.batch, self.width, *packed.shape[1:])
