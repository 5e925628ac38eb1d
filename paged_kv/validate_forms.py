"""Checks of arrays that come in another form than packed tokens, pools and a table."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
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


# ---- pools of other libraries --------------------------------------------------------------------


def layout_name(layout: Any, layouts: tuple[str, ...]) -> None:
    if layout not in layouts:
        raise ValueError(f"{layout=} must be one of {', '.join(layouts)}")


def layout_pools(pools: Any, layout: str, block_size: Any) -> None:
    """Arrays of a layout's rank, alike, with what it needs besides."""
    is_pair = layout in ("NHD", "HND", "heads_first", "flat")
    if is_pair != isinstance(pools, tuple | list) or (is_pair and len(pools) != 2):
        raise ValueError(f"{layout=} has {'a pair (keys, values)' if is_pair else 'one array'}")
    rank = {"flat": 3, "NHD": 4, "HND": 4, "heads_first": 4, "rpa_v2": 4}.get(layout, 5)
    first = pools[0] if is_pair else pools
    if first.ndim not in (rank, rank + 1) or (is_pair and pools[1].shape != first.shape):
        shapes = ", ".join(str(pool.shape) for pool in (pools if is_pair else [pools]))
        raise ValueError(
            f"{layout=} has pools of {rank} axes, or one more for layers, not {shapes}"
        )
    pair_axis = {"flashinfer": -4, "vllm": -5}.get(layout)
    if pair_axis is not None and first.shape[pair_axis] != 2:
        raise ValueError(f"{layout=} has keys and values on axis {pair_axis} of {first.shape}")
    if layout == "rpa_v2" and first.shape[-2] % 2:
        raise ValueError(
            f"{layout=} has a value head for each key head, not {first.shape[-2]} heads"
        )
    if layout == "flat" and (block_size is None or first.shape[-3] % block_size):
        raise ValueError(
            f"{layout=} has {first.shape[-3]} slots: pass block_size=, which divides them, not "
            f"{block_size}"
        )


def unpadded(shape: tuple[int, ...], num_kv_heads: int, head_dim: int) -> None:
    if 2 * num_kv_heads > shape[-2] or head_dim > shape[-1]:
        raise ValueError(
            f"{num_kv_heads=} (keys and values) and {head_dim=} must fit the {shape[-2]} heads of "
            f"{shape[-1]} that the pool has"
        )


# ---- tables and slots of other libraries ---------------------------------------------------------


def table_rows(page_indices: Any, kv_lens: Any) -> tuple[int, int]:
    """(batch, max_blocks_per_seq) of a table given row after row."""
    batch = kv_lens.shape[0]
    if page_indices.ndim != 1 or not batch or page_indices.shape[0] % batch:
        raise ValueError(
            f"page_indices {page_indices.shape} must be (batch * max_blocks_per_seq,), kv_lens has "
            f"{batch=}"
        )
    return batch, page_indices.shape[0] // batch


def held_blocks(cache: "PagedKVCache", capacity: int | None) -> None:
    """Blocks of a cache's tokens: each in the pool, all within the capacity."""
    if not is_concrete(cache.block_table, cache.seq_lengths):
        if capacity is None:
            raise ValueError("under jit the size of indices must be known: pass capacity=")
        return
    needs = -(-np.asarray(cache.seq_lengths) // cache.block_size)
    if capacity is not None and needs.sum() > capacity:
        raise ValueError(f"the sequences hold {needs.sum()} blocks, more than {capacity=}")
    table = np.asarray(cache.block_table)
    used = np.arange(table.shape[1])[None, :] < needs[:, None]
    is_bad = used & ((table < 0) | (table >= cache.num_blocks))
    if (needs > table.shape[1]).any() or is_bad.any():
        row = int(np.argmax((needs > table.shape[1]) | is_bad.any(1)))
        raise ValueError(
            f"sequence {row} of {np.asarray(cache.seq_lengths)[row]} tokens has no block in the "
            f"pool for some of them: row {table[row].tolist()}, num_blocks={cache.num_blocks}"
        )


def csr(
    cache: "PagedKVCache", indptr: np.ndarray, indices: np.ndarray, last_page_len: np.ndarray
) -> None:
    """A table in compressed rows that fits the cache's pools and width."""
    counts = np.diff(indptr)
    is_rising = len(indptr) == len(last_page_len) + 1 and indptr[0] == 0 and (counts >= 0).all()
    if not is_rising or indptr[-1] > len(indices):
        raise ValueError(
            f"indptr={indptr.tolist()} must rise from 0 to at most {len(indices)}, the indices "
            f"there are, one more than the {len(last_page_len)} of last_page_len"
        )
    if (counts > cache.max_blocks_per_seq).any():
        raise ValueError(
            f"a sequence has {counts.max()} blocks, rows of this cache "
            f"max_blocks_per_seq={cache.max_blocks_per_seq}; make the cache with a wider table"
        )
    used = indices[: indptr[-1]]
    if ((used < 0) | (used >= cache.num_blocks)).any():
        raise ValueError(f"indices={used.tolist()} must be in the pool: {cache.num_blocks=}")
    is_last = np.where(counts > 0, (last_page_len > 0), last_page_len == 0)
    if not is_last.all() or (last_page_len > cache.block_size).any():
        raise ValueError(
            f"last_page_len={last_page_len.tolist()} must be 1 to block_size={cache.block_size}, "
            "and 0 for a sequence without blocks"
        )


def slots(slot_mapping: Any, num_tokens: int | None, num_slots: int) -> Any:
    """Slots as int32 (n,), below 0 where there is none."""
    array = jnp.asarray(slot_mapping)
    is_count = num_tokens is None or array.shape == (num_tokens,)
    if array.ndim != 1 or array.dtype != jnp.int32 or not is_count:
        count = "num_tokens" if num_tokens is None else num_tokens
        raise ValueError(
            f"slot_mapping {array.dtype}{array.shape} must be int32 ({count},), one for each token"
        )
    if is_concrete(array) and (np.asarray(array) >= num_slots).any():
        raise ValueError(f"slot_mapping has {int(array.max())}, the pool {num_slots} slots")
    return array


# ---- dense rows ----------------------------------------------------------------------------------


def dense_pair(keys: Any, values: Any) -> tuple[int, int]:
    """(batch, S) of dense keys and values."""
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.ndim not in (4, 5):
        raise ValueError(
            f"keys {keys.dtype}{keys.shape} and values {values.dtype}{values.shape} must both be "
            "(batch, S, num_kv_heads, head_dim), or with num_layers in front"
        )
    return keys.shape[-4], keys.shape[-3]


def dense_lengths(seq_lengths: Any, batch: int, width: int) -> None:
    if seq_lengths.shape != (batch,) or seq_lengths.dtype != jnp.int32:
        raise ValueError(
            f"seq_lengths {seq_lengths.dtype}{seq_lengths.shape} must be int32 ({batch},)"
        )
    is_out = is_concrete(seq_lengths) and (
        (np.asarray(seq_lengths) < 0) | (np.asarray(seq_lengths) > width)
    )
    if np.any(is_out):
        raise ValueError(f"seq_lengths={np.asarray(seq_lengths).tolist()} must be in [0, {width}]")
