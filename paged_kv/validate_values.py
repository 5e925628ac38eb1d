"""Checks of values of concrete arrays: they may wait for the device, and never run under trace.

What runs here is NumPy, so that a concrete array closed over by a traced function is checked too.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from .kernels.core.problem import CacheShape
from .kernels.core.schedule import Schedule
from .kernels.core.variant import Variant
from .validate import is_concrete

if TYPE_CHECKING:
    from .cache import PagedKVCache


def missing_entries(
    cache: "PagedKVCache", row: np.ndarray, length: int, num_new_tokens: int
) -> list[int]:
    """Entries of a row that the next tokens need and that name no block yet."""
    if num_new_tokens == 0:
        return []
    needed = -(-(length + num_new_tokens) // cache.block_size)
    if needed > cache.max_blocks_per_seq:
        raise ValueError(
            f"{length} tokens and {num_new_tokens} new ones need {needed} blocks of "
            f"{cache.block_size}, but max_blocks_per_seq={cache.max_blocks_per_seq}; make the "
            "cache with a wider table"
        )
    return [i for i in range(length // cache.block_size, needed) if row[i] < 0]


def free_ids(
    cache: "PagedKVCache", table: np.ndarray, free_block_ids: Any, count: int
) -> list[int]:
    """The first `count` ids, each in the pool, new to the table and given once."""
    if len(free_block_ids) < count:
        raise ValueError(
            f"{count} more blocks are needed but free_block_ids has {len(free_block_ids)}; free a "
            "sequence or make the pool larger"
        )
    ids = [int(i) for i in free_block_ids[:count]]
    for i in ids:
        if not 0 <= i < cache.num_blocks:
            raise ValueError(
                f"free block id {i} is outside the pool: num_blocks={cache.num_blocks}"
            )
    if len(set(ids)) < count:
        raise ValueError(f"free_block_ids repeats an id among the {count} needed: {ids}")
    held = sorted(set(ids) & set(table.ravel().tolist()))
    if held:
        raise ValueError(
            f"free block ids {held} already stand in the block table; share blocks on purpose "
            "with set_block_table"
        )
    return ids


def allocated_blocks(cache: "PagedKVCache", sequence_idx: int, position: np.ndarray) -> np.ndarray:
    """Block of each position of a sequence."""
    index = position // cache.block_size
    if position.size and index[-1] >= cache.max_blocks_per_seq:
        raise ValueError(
            f"position {position[-1]} of sequence {sequence_idx} needs block {index[-1]} of its "
            f"row, but max_blocks_per_seq={cache.max_blocks_per_seq}"
        )
    block = np.asarray(cache.block_table)[sequence_idx, index]
    bad = (block < 0) | (block >= cache.num_blocks)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"position {position[first]} of sequence {sequence_idx} has no block: table entry "
            f"{index[first]} is {block[first]}, num_blocks={cache.num_blocks}; call "
            "allocate_blocks first"
        )
    return block


# ---- batched ops ---------------------------------------------------------------------------------


def start_locations(cache: "PagedKVCache", query_start_loc: Any, num_tokens: int) -> None:
    """query_start_loc rises from 0 and gives no sequence more query tokens than it has tokens."""
    if query_start_loc is None or not is_concrete(query_start_loc, cache.seq_lengths):
        return
    starts, lengths = np.asarray(query_start_loc), np.asarray(cache.seq_lengths)
    counts = np.diff(starts)
    if starts[0] != 0 or (counts < 0).any() or starts[-1] > num_tokens:
        raise ValueError(
            f"query_start_loc={starts.tolist()} must start at 0, never fall, and end within the "
            f"{num_tokens} tokens"
        )
    if (counts > lengths).any():
        row = int(np.argmax(counts > lengths))
        raise ValueError(
            f"sequence {row} has {counts[row]} query tokens but seq_lengths[{row}]={lengths[row]}, "
            "which must count them too; call advance first"
        )


def used_entries(
    cache: "PagedKVCache", shape: CacheShape, query_start_loc: Any, variant: Variant
) -> None:
    """Every table entry that some query of this call reaches names a block of the pool."""
    if not is_concrete(cache.block_table, cache.seq_lengths, query_start_loc):
        return
    table, lengths = np.asarray(cache.block_table), np.asarray(cache.seq_lengths)
    counts = np.diff(np.asarray(starts_of(query_start_loc, shape.batch)))
    for row in np.flatnonzero((lengths > 0) & (counts > 0)):
        length = int(lengths[row])
        start, stop = variant.kv_range(length - int(counts[row]), length - 1, length)
        _entries_in_pool(table, int(row), start, stop, shape)


def schedule_is_current(
    schedule: Schedule, cache: "PagedKVCache", query_start_loc: Any, batch: int
) -> None:
    """A schedule holds the lengths and starts of the call it is used in."""
    given = {
        "query_start_loc": (schedule.query_start_loc, starts_of(query_start_loc, batch)),
        "seq_lengths": (schedule.seq_lengths, cache.seq_lengths),
    }
    for name, pair in given.items():
        if is_concrete(*pair):
            theirs, ours = map(np.asarray, pair)
            if (theirs != ours).any():
                raise ValueError(
                    f"this schedule was made for {name}={theirs.tolist()}, this call has "
                    f"{ours.tolist()}; make one per step with make_schedule, after advance"
                )


def new_slots(cache: "PagedKVCache", shape: CacheShape, query_start_loc: Any) -> None:
    """Every new token of this call has a slot."""
    if not is_concrete(cache.block_table, cache.seq_lengths, query_start_loc):
        return
    table, lengths = np.asarray(cache.block_table), np.asarray(cache.seq_lengths)
    counts = np.diff(np.asarray(starts_of(query_start_loc, shape.batch)))
    for row in np.flatnonzero((lengths > 0) & (counts > 0)):
        length = int(lengths[row])
        _entries_in_pool(table, int(row), length - int(counts[row]), length, shape)


def starts_of(query_start_loc: Any, batch: int) -> Any:
    """query_start_loc, also where None stands for one token each."""
    return np.arange(batch + 1) if query_start_loc is None else query_start_loc


def _entries_in_pool(table: np.ndarray, row: int, start: int, stop: int, shape: CacheShape) -> None:
    if stop > shape.max_blocks_per_seq * shape.block_size:
        raise ValueError(
            f"sequence {row} has {stop} tokens, but its row holds "
            f"max_blocks_per_seq={shape.max_blocks_per_seq} blocks of {shape.block_size}; make the "
            "cache with a wider table"
        )
    first = start // shape.block_size
    used = table[row, first : -(-stop // shape.block_size)]
    bad = (used < 0) | (used >= shape.num_blocks)
    if bad.any():
        entry = first + int(np.argmax(bad))
        raise ValueError(
            f"block_table[{row}, {entry}]={table[row, entry]} is used by sequence {row} (positions "
            f"{start} to {stop - 1}) but is outside the pool: num_blocks={shape.num_blocks}; "
            "allocate the block and put it there with allocate_blocks or set_block_table"
        )


# ---- lengths, tables and block ids ---------------------------------------------------------------


def advanced(cache: "PagedKVCache", num_new_tokens: Any) -> None:
    """Lengths after `advance` are within the rows."""
    if not is_concrete(cache.seq_lengths, num_new_tokens):
        return
    new, lengths = np.asarray(num_new_tokens), np.asarray(cache.seq_lengths)
    capacity = cache.max_blocks_per_seq * cache.block_size
    after = lengths.astype(np.int64) + new
    if (new < 0).any() or (after > capacity).any():
        raise ValueError(
            f"num_new_tokens={new.tolist()} must be at least 0 and keep seq_lengths="
            f"{lengths.tolist()} within {capacity} tokens (max_blocks_per_seq * block_size); "
            "truncate rolls back"
        )


def truncated(cache: "PagedKVCache", seq_lengths: Any) -> None:
    """Lengths after `truncate` are at most what they were."""
    if not is_concrete(cache.seq_lengths, seq_lengths):
        return
    new, old = np.asarray(seq_lengths), np.asarray(cache.seq_lengths)
    if ((new < 0) | (new > old)).any():
        raise ValueError(
            f"truncate to {new.tolist()}: each length must be in [0, present length], present "
            f"lengths are {old.tolist()}; advance makes a sequence longer"
        )


def block_ids(name: str, ids: Any, num_blocks: int) -> None:
    """Ids of blocks, those below 0 to be skipped."""
    if is_concrete(ids) and (np.asarray(ids) >= num_blocks).any():
        raise ValueError(
            f"{name}={np.asarray(ids).tolist()} must be below {num_blocks=}; ids below 0 are "
            "skipped"
        )


def different_targets(target_ids: Any) -> None:
    """No block is written twice."""
    if not is_concrete(target_ids):
        return
    ids = np.asarray(target_ids)
    ids = ids[ids >= 0]
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"target_ids={ids.tolist()} name a block twice; copy to each block once")
