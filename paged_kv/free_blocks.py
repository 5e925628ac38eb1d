"""Which blocks are free: one byte each, searched at the speed of memory, taken in runs."""

from array import array
from collections.abc import Iterable

import numpy as np

# Free blocks left after each piece handed out, for its sequence to grow into.
GROWTH = 8
# Fewer than one free in so many: going from one to the next is faster than looking at all between.
SPARSE = 500


class FreeBlocks:
    """The free blocks of a pool, handed out in runs of neighbours where there are any.

    Kernels copy neighbouring blocks at once.  So a sequence gets the block after its last one if
    that is free; else the search goes on from where the last one ended and, having found a piece,
    leaves `GROWTH` free blocks after it.  Nothing is reserved: when the search comes round again,
    it takes those too.  Skipping used blocks costs about 12 us for a million of them; no call does
    Python work per block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._flags = bytearray(b"\1") * num_blocks
        self._view = np.frombuffer(self._flags, np.bool_)  # the same bytes
        self._ids = array("i", np.arange(num_blocks, dtype=np.int32).tobytes())  # to cut runs from
        self._cursor = 0

    def take(self, num_blocks: int, after: int = -1) -> array:
        """Removes `num_blocks` free blocks, which there must be, and returns their ids.

        The first ones follow block `after` if they can.
        """
        flags, taken = self._flags, array("i")
        if num_blocks and 0 <= after < len(flags) - 1 and flags[after + 1]:
            taken = self._take_run(after + 1, num_blocks)
        cursor = self._cursor
        while len(taken) < num_blocks:
            missing = num_blocks - len(taken)
            start = flags.find(1, cursor)
            if start < 0:
                cursor = 0
                continue
            stop = flags.find(0, start, start + missing)
            is_run = stop < 0 or stop - start > missing // 4
            if is_run or self.count * SPARSE < len(flags):
                taken += self._take_run(start, missing)
            else:
                taken += self._take_scattered(start, missing)
            cursor = taken[-1] + 1
            self._cursor = cursor + GROWTH
        self.count -= num_blocks
        return taken

    def give(self, blocks: array) -> None:
        """Puts back blocks that are not free."""
        size = len(blocks)
        self.count += size
        if size < 8:
            for block in blocks:
                self._flags[block] = 1
        elif blocks == self._ids[blocks[0] : blocks[0] + size]:
            self._flags[blocks[0] : blocks[0] + size] = b"\1" * size
        else:
            self._view[np.frombuffer(blocks, np.int32)] = True

    def remove(self, blocks: Iterable[int]) -> None:
        """Takes these free blocks."""
        for block in blocks:
            self._flags[block] = 0
            self.count -= 1

    def check(self, expected: set[int]) -> bool:
        """Whether exactly `expected` are free."""
        return self.count == len(expected) and set(np.flatnonzero(self._view).tolist()) == expected

    def _take_run(self, start: int, limit: int) -> array:
        """Takes `start` and what is free right after it, `limit` blocks at most."""
        stop = min(start + limit, len(self._flags))
        used = self._flags.find(0, start, stop)
        stop = stop if used < 0 else used
        self._flags[start:stop] = bytes(stop - start)
        return self._ids[start:stop]

    def _take_scattered(self, start: int, limit: int) -> array:
        """Takes the next free blocks from `start` on, `limit` at most, in a stretch of the pool."""
        expected = limit * len(self._flags) // self.count
        window = self._view[start : start + 2 * expected + 256]
        blocks = np.flatnonzero(window)[:limit].astype(np.int32) + np.int32(start)
        self._view[blocks] = False
        return array("i", blocks.tobytes())
