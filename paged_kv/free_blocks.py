"""Which blocks are free: one byte each, searched at the speed of memory, taken in runs."""

from array import array
from collections.abc import Iterable

import numpy as np

# Free blocks left after each piece handed out, for its sequence to grow into.
GROWTH = 8
# Free blocks that one search looks for: a 64th of the pool, within these bounds.
SEARCH_LOW, SEARCH_HIGH = 32, 1024
# Fewer than one free in so many: what is freed waits in hand, and none is left to grow into.
SPARSE = 32


class FreeBlocks:
    """The free blocks of a pool, handed out in runs of neighbours where there are any.

    Kernels copy neighbouring blocks at once.  So a sequence gets the block after its last one if
    that is free; else the next ones in the order of the pool, where a search has collected them.
    Nothing is reserved: blocks left out to grow into are taken when the search comes round again.
    The list of candidates goes stale; a block's byte says whether it is free.

    A pool that is nearly full would be searched in vain.  There what is freed is kept in hand, in
    order, with bytes that say used, and handed out again first, the last of it foremost.

    No call does Python work per block, and a search over a million used blocks takes about a
    millisecond and finds all that are free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._flags = bytearray(b"\1") * num_blocks
        self._view = np.frombuffer(self._flags, np.bool_)  # the same bytes
        self._ids = array("i", np.arange(num_blocks, dtype=np.int32).tobytes())  # to cut runs from
        self._found, self._next = array("i"), 0  # what the last search collected, and how far used
        self._cursor = 0  # where the next search starts
        self._in_hand = array("i")  # freed while few were free

    @property
    def is_sparse(self) -> bool:
        """Whether few blocks are free."""
        return self.count * SPARSE < len(self._flags)

    def take(self, num_blocks: int, after: int = -1) -> array:
        """Removes `num_blocks` free blocks, which there must be, and returns their ids.

        The first ones follow block `after` if they can.
        """
        taken = array("i")
        if num_blocks and 0 <= after < len(self._flags) - 1 and self._flags[after + 1]:
            taken = self._take_run(after + 1, num_blocks)
        if self._in_hand and len(taken) < num_blocks:
            first = max(len(self._in_hand) + len(taken) - num_blocks, 0)
            taken += self._in_hand[first:]
            del self._in_hand[first:]
        while len(taken) < num_blocks:
            taken += self._claim(self._found_blocks(num_blocks - len(taken)))
        self.count -= num_blocks
        return taken

    def give(self, blocks: array) -> None:
        """Puts back blocks that are not free."""
        self.count += len(blocks)
        if self.is_sparse:
            self._in_hand += blocks
            return
        self._lay_down()
        self._mark(blocks)

    def remove(self, blocks: Iterable[int]) -> None:
        """Takes these free blocks."""
        self._lay_down()
        for block in blocks:
            self._flags[block] = 0
            self.count -= 1

    def check(self, expected: set[int]) -> bool:
        """Whether exactly `expected` are free."""
        found = [*np.flatnonzero(self._view).tolist(), *self._in_hand]
        return len(found) == self.count == len(expected) and set(found) == expected

    def _lay_down(self) -> None:
        """Leaves no block in hand."""
        if self._in_hand:
            self._mark(self._in_hand)
            self._in_hand = array("i")

    def _mark(self, blocks: array) -> None:
        """Their bytes say free."""
        if len(blocks) < 8:
            for block in blocks:
                self._flags[block] = 1
        elif self._is_run(blocks):
            self._flags[blocks[0] : blocks[-1] + 1] = b"\1" * len(blocks)
        else:
            self._view[np.frombuffer(blocks, np.int32)] = True

    def _is_run(self, blocks: array) -> bool:
        return blocks == self._ids[blocks[0] : blocks[0] + len(blocks)]

    def _take_run(self, start: int, limit: int) -> array:
        """Takes `start` and what is free right after it, `limit` blocks at most."""
        stop = min(start + limit, len(self._flags))
        used = self._flags.find(0, start, stop)
        stop = stop if used < 0 else used
        self._flags[start:stop] = bytes(stop - start)
        return self._ids[start:stop]

    def _found_blocks(self, limit: int) -> array:
        """Candidates in the order of the pool."""
        if self._next >= len(self._found):
            self._search(limit)
        blocks = self._found[self._next : self._next + limit]
        self._next += limit + (0 if self.is_sparse else GROWTH)
        return blocks

    def _search(self, limit: int) -> None:
        """Collects at least one free block, and about `limit` if there are."""
        size = len(self._flags)
        start = self._flags.find(1, self._cursor + self._next - len(self._found))
        start = start if start >= 0 else self._flags.find(1)
        wanted = max(limit, SEARCH_LOW, min(size // 64, SEARCH_HIGH))
        self._cursor = start + 1 + size * wanted // self.count
        found = np.flatnonzero(self._view[start : self._cursor]) + start
        self._found, self._next = array("i", found.astype(np.int32).tobytes()), 0

    def _claim(self, blocks: array) -> array:
        """Takes those of the candidates that are free."""
        if self._is_run(blocks):
            if self._flags.find(0, blocks[0], blocks[-1] + 1) < 0:
                self._flags[blocks[0] : blocks[-1] + 1] = bytes(len(blocks))
                return blocks
        elif len(blocks) >= 8:
            ids = np.frombuffer(blocks, np.int32)
            if self._view[ids].all():
                self._view[ids] = False
                return blocks
        free = array("i", filter(self._flags.__getitem__, blocks))
        for block in free:
            self._flags[block] = 0
        return free
