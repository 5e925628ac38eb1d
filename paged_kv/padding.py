"""Sizes rounded up, so that programs are compiled for few of them."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from . import validate


def pad_to_bucket(count: int, buckets: Sequence[int] | None = None) -> int:
    """The size to pad to, so that a program is compiled for few sizes and not for every one.

    For the tokens of a packed step and for the rows of a batch.  Tokens past `query_start_loc[-1]`
    are padding, and so are rows of length 0: `BlockAllocator.block_table(..., num_rows=)`.

    Args:
      count: tokens or rows that there are.
      buckets: tokens or rows to choose from, rising; by default 1, 2, 3, 4, 6, 8, 12, 16, 24 and so
        on: two for each doubling, of which padding is a third at most.

    Returns:
      Tokens or rows to pad to: the smallest bucket that holds `count`.

    Raises:
      ValueError: `count` is not an int of at least 0, or above the last bucket.

    Source: the capture sizes of vLLM's CUDA graphs, the buckets of JetStream and tpu-inference.
    """
    validate.not_negative("count", count)
    if buckets is None:
        power = 1 << max(count - 1, 0).bit_length()
        return power * 3 // 4 if 2 < count <= power * 3 // 4 else power
    index = bisect_left(buckets, count)
    if index == len(buckets):
        raise ValueError(
            f"{count=} is above the last of buckets={list(buckets)}; split the step or add a bucket"
        )
    return buckets[index]


def padded_ids(ids: Iterable[int]) -> np.ndarray:
    """Ids as int32, filled up with -1 to a power of two; none stay none."""
    ids = list(ids)
    size = 1 << (len(ids) - 1).bit_length() if ids else 0
    return np.array(ids + [-1] * (size - len(ids)), np.int32)
