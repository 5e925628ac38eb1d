"""Cached blocks that no sequence holds, in the order in which they may be evicted."""

from array import array

import numpy as np

# A list is written anew once it has this many more lapsed entries than others.
LAPSED = 1024


class IdleBlocks:
    """A set of blocks, in order of arrival.

    One list of all arrivals, and for each block its place there.  A block is here if its place is
    not behind the beginning; an entry whose block has another place by now has lapsed, and is
    dropped when its turn comes.  So no call does Python work per block, and each takes constant
    time per block on average.
    """

    def __init__(self, num_blocks: int) -> None:
        self._count = 0
        self._arrivals = array("i")
        self._first, self._dropped = 0, 0  # of the list: next to go, and entries cut off before it
        self._place = array("q", bytes(8 * num_blocks))  # from 1, cut off ones counted
        self._places = np.frombuffer(self._place, np.int64)  # the same memory

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return self._place[block] > self._dropped + self._first

    def in_order(self) -> list[int]:
        """All of them, the longest here first."""
        return self._rest().tolist()

    def add(self, blocks: np.ndarray) -> None:
        """Takes blocks in that are not here: int32, the first to go first."""
        place = self._dropped + len(self._arrivals) + 1
        self._places.put(blocks, np.arange(place, place + len(blocks)))
        self._arrivals.frombytes(blocks.tobytes())
        self._count += len(blocks)

    def add_one(self, block: int) -> None:
        """Takes in a block that is not here."""
        self._arrivals.append(block)
        self._place[block] = self._dropped + len(self._arrivals)
        self._count += 1

    def remove(self, block: int) -> None:
        """Lets a block go that is here."""
        self._place[block] = 0
        self._count -= 1
        if len(self._arrivals) - self._first > 2 * self._count + LAPSED:
            self._rewrite(self._rest())

    def take(self, num_blocks: int) -> np.ndarray:
        """Lets those go that are here for longest, `num_blocks` of at least as many: int32."""
        found = self._next(num_blocks)
        while len(found) < num_blocks:  # some had lapsed
            found = np.concatenate([found, self._next(num_blocks - len(found))])
        if self._first > LAPSED and self._first > len(self._arrivals) // 2:
            self._dropped += self._first
            del self._arrivals[: self._first]
            self._first = 0
        return found

    def clear(self) -> None:
        """Lets all go."""
        self._rewrite(np.empty(0, np.int32))

    def rename(self, new_id: dict[int, int]) -> None:
        """Blocks have moved: block b is at `new_id[b]`."""
        names = [new_id.get(block, block) for block in self.in_order()]
        self._rewrite(np.array(names, np.int32))

    def is_sound(self) -> bool:
        """Whether list and places agree."""
        here = np.flatnonzero(self._places > self._dropped + self._first).tolist()
        return self._count == len(here) and sorted(self.in_order()) == here

    def _rest(self) -> np.ndarray:
        blocks = np.frombuffer(self._arrivals[self._first :], np.int32)
        return blocks[self._is_here(blocks, self._first)]

    def _next(self, limit: int) -> np.ndarray:
        """Lets those of the next `limit` entries go that have not lapsed."""
        first, size = self._first, len(self._arrivals)
        blocks = np.frombuffer(self._arrivals[first : first + limit], np.int32)
        if size - first > self._count:
            blocks = blocks[self._is_here(blocks, first)]
        self._first = min(first + limit, size)
        self._count -= len(blocks)
        return blocks

    def _is_here(self, blocks: np.ndarray, index: int) -> np.ndarray:
        """Which of the entries from `index` on, which are `blocks`, have not lapsed."""
        place = self._dropped + index + 1
        return self._places.take(blocks) == np.arange(place, place + len(blocks))

    def _rewrite(self, blocks: np.ndarray) -> None:
        """The list has these and no others."""
        self._dropped += len(self._arrivals)  # whoever was here is behind the beginning
        self._arrivals, self._first, self._count = array("i"), 0, 0
        self.add(blocks)
