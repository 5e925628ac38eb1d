"""Cached blocks that no sequence holds, in the order in which they may be evicted."""

from array import array
from itertools import filterfalse

import numpy as np

# What is known of a block: not cached, cached and held, cached and idle.
UNKNOWN, HELD, IDLE = range(3)
NOT_CACHED = bytes([UNKNOWN])
# Fewer blocks than this are handled one by one; NumPy's calls take longer.
FEW = 8
# A list is written anew once it has this many more lapsed entries than others.
LAPSED = 1024


class IdleBlocks:
    """A set of cached blocks, in order of arrival.

    One list of all arrivals, and for each block its state and how many of its entries have lapsed,
    because it was removed since.  Those are a block's first ones, and are dropped when their turn
    comes.  So no call does Python work per block unless some have lapsed, each takes constant time
    per block on average, and an arrival writes a byte for each block.

    Args:
      states: a byte for each block of the pool: UNKNOWN, HELD or IDLE.
    """

    def __init__(self, states: bytearray) -> None:
        self._count = 0
        self._arrivals, self._first = array("i"), 0  # and the next of them to go
        self._state, self._states = states, np.frombuffer(states, np.uint8)  # the same memory
        self._lapses = array("i", bytes(4 * len(states)))
        self._lapsed = np.frombuffer(self._lapses, np.int32)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return self._state[block] == IDLE

    def in_order(self) -> list[int]:
        """All of them, the longest here first."""
        return self._rest().tolist()

    def add(self, blocks: array) -> array:
        """Takes in those of its blocks that are cached, and held till now; returns the others.

        The last go first.
        """
        if len(blocks) < FEW:
            cached = array("i", [block for block in blocks if self._state[block]])
            for block in cached:
                self._state[block] = IDLE
            others = array("i", [block for block in blocks if not self._state[block]])
        else:
            ids = np.array(blocks, np.intp)
            states = self._states[ids].tobytes()
            num_cached = len(states.rstrip(NOT_CACHED))  # those not committed are the last
            if UNKNOWN not in states[:num_cached]:
                self._states[ids[:num_cached]] = IDLE
                cached, others = blocks[:num_cached], blocks[num_cached:]
            else:
                is_cached = self._states[ids] != UNKNOWN
                self._states[ids[is_cached]] = IDLE
                cached, others = (
                    array("i", ids[which].astype(np.int32).tobytes())
                    for which in (is_cached, ~is_cached)
                )
        cached.reverse()
        self._arrivals += cached
        self._count += len(cached)
        return others

    def remove(self, block: int) -> None:
        """Lets a block go that is here: it is held."""
        self._state[block] = HELD
        self._lapses[block] += 1
        self._count -= 1
        if len(self._arrivals) - self._first > 2 * self._count + LAPSED:
            self._rewrite(self._rest())

    def take(self, num_blocks: int) -> array:
        """Lets those go that are here for longest, `num_blocks` of at least as many: ids.

        They are unknown from now on.
        """
        found = self._next(num_blocks)
        while len(found) < num_blocks:  # some had lapsed
            found += self._next(num_blocks - len(found))
        self._states[np.array(found, np.intp)] = UNKNOWN
        if self._first > LAPSED and self._first > len(self._arrivals) // 2:
            del self._arrivals[: self._first]
            self._first = 0
        return found

    def clear(self) -> None:
        """Lets all go; the caller says what is known of them now."""
        self._rewrite(array("i"))

    def rename(self, new_id: dict[int, int]) -> None:
        """Blocks move: block b to `new_id[b]`; the caller moves the states, after this."""
        self._rewrite(array("i", [new_id.get(block, block) for block in self.in_order()]))

    def is_sound(self) -> bool:
        """Whether list and states agree."""
        here = np.flatnonzero(self._states == IDLE).tolist()
        return (
            sorted(self.in_order()) == here
            and self._count == len(here) == self._num_entries - self._lapsed.sum()
        )

    @property
    def _num_entries(self) -> int:
        return len(self._arrivals) - self._first

    def _rest(self) -> array:
        rest = self._arrivals[self._first :]
        if len(rest) == self._count:
            return rest
        blocks = np.frombuffer(rest, np.int32)
        number = np.arange(len(blocks), dtype=np.int32)
        last = np.empty(len(self._state), np.int32)
        last[blocks] = number  # of several entries of a block, the last
        is_here = (last[blocks] == number) & (self._states[blocks] == IDLE)
        return array("i", blocks[is_here].tobytes())

    def _next(self, limit: int) -> array:
        """Lets those of the next `limit` entries go that have not lapsed."""
        blocks = self._arrivals[self._first : self._first + limit]
        has_lapsed = self._num_entries > self._count
        self._first += len(blocks)
        if has_lapsed and self._lapsed.take(np.frombuffer(blocks, np.int32)).any():
            blocks = array("i", filterfalse(self._drop_lapsed, blocks))
        self._count -= len(blocks)
        return blocks

    def _drop_lapsed(self, block: int) -> bool:
        """Whether the next entry of a block has lapsed, which is one less then."""
        has_lapsed = self._lapses[block] > 0
        self._lapses[block] -= has_lapsed
        return has_lapsed

    def _rewrite(self, blocks: array) -> None:
        """The list has these and no others."""
        self._lapsed.put(self._arrivals[self._first :], 0)
        self._arrivals, self._first, self._count = blocks, 0, len(blocks)
