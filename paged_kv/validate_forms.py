"""Checks of arrays that come in another form than packed tokens, pools and a table."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .validate import is_concrete

if TYPE_CHECKING:
    from .cache import PagedKVCache


# ---- rows of tokens ------------------------------------------------------------------------------


def rows(name: str, array: Any, cache: "PagedKVCache") -> None:
    """Tokens as (batch, T, heads, head_dim)."""
    batch = cache.block_table.shape[0]
    if array.ndim != 4 or array.shape[0] != batch:
        raise ValueError(
            f"{name} {array.shape} must be (batch, T, heads, head_dim), and the cache has "
            f"{batch=}; packed tokens go to paged_attention and append_tokens"
        )


def same_rows(name: str, array: Any, batch_and_width: tuple[int, int]) -> None:
    if array.ndim != 4 or array.shape[:2] != batch_and_width:
        raise ValueError(
            f"{name} {array.shape} must have the (batch, T) of the others, {batch_and_width}"
        )


def row_counts(counts: Any, width: int) -> None:
    """No row has more tokens than there are columns."""
    if is_concrete(counts) and ((np.asarray(counts) < 0) | (np.asarray(counts) > width)).any():
        raise ValueError(
            f"query_seq_lengths={np.asarray(counts).tolist()} must be in [0, {width}]: a row has "
            f"T={width} tokens, padding included"
        )


# ---- one sequence of a batch ---------------------------------------------------------------------


def one_sequence(cache: "PagedKVCache") -> None:
    table, lengths = cache.block_table, cache.seq_lengths
    if table.ndim != 1 or lengths.ndim != 0:
        raise ValueError(
            f"block_table {table.shape} and seq_lengths {lengths.shape} must be one sequence's, "
            "(max_blocks_per_seq,) and (): call it under vmap with sequence_axes(cache), or take "
            "append_and_attend_rows for a batch"
        )


def shared_pools(is_mapped: bool) -> None:
    if is_mapped:
        raise ValueError(
            "vmap maps the pools, which all sequences share: give the cache in_axes and out_axes "
            "of sequence_axes(cache)"
        )
