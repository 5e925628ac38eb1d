"""Sizes rounded up, so that a program is compiled for few of them."""

from collections.abc import Iterable

import numpy as np


def padded_ids(ids: Iterable[int]) -> np.ndarray:
    """Ids as int32, filled up with -1 to a power of two; none stay none."""
    ids = list(ids)
    size = 1 << (len(ids) - 1).bit_length() if ids else 0
    return np.array(ids + [-1] * (size - len(ids)), np.int32)
