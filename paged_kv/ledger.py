"""Every block's state: free, held by one or more sequences, or cached and held by none."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from .free_blocks import FreeBlocks
from .prefix import PrefixIndex


class Ledger:
    """Counts the holders of blocks, and remembers what is to be copied and scrubbed.

    `shares` has the holders of a block beyond the first, so a pool that nobody forks costs nothing
    per block.  Copies and scrubs speak of contents as of the last time they were taken.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex, is_scrubbing: bool) -> None:
        self.num_blocks, self.index = num_blocks, index
        self.free = FreeBlocks(num_blocks)
        self.shares: dict[int, int] = {}
        self.copies: dict[int, int] = {}  # target -> source
        self.scrubs: dict[int, None] = {}
        self.peak_used = 0
        self._is_scrubbing = is_scrubbing

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds."""
        return self.free.count + len(self.index.idle)

    def take(self, num_blocks: int, after: int = -1) -> array:
        """Hands out blocks, which there must be; cached ones last, the longest idle first."""
        missing = num_blocks - self.free.count
        if missing <= 0:
            blocks = self.free.take(num_blocks, after)
        elif self.free.count:
            blocks = self.free.take(self.free.count, after) + self.index.evict(missing)
        else:
            blocks = self.index.evict(missing)
        if self._is_scrubbing:
            self.scrubs.update(dict.fromkeys(blocks))
        self._note_peak()
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Gives blocks, held or cached, one holder more."""
        shares, idle = self.shares, self.index.idle
        for block in blocks:
            if block in idle:
                idle.remove(block)
            else:
                shares[block] = shares.get(block, 0) + 1
        self._note_peak()

    def release(self, blocks: array) -> None:
        """Takes one holder from each block; of those cached the last is evicted first."""
        shares = self.shares
        if shares and not shares.keys().isdisjoint(blocks):
            left = array("i")
            for block in blocks:
                if block in shares:
                    self._unshare(block)
                else:
                    left.append(block)
            blocks = left
        freed = self.index.set_aside(blocks)
        self.free.give(freed)
        if self.copies:
            for block in freed:
                self.copies.pop(block, None)

    def copy(self, source: int, target: int) -> None:
        """Moves one holder of a shared block to a new block that will hold the same."""
        self._unshare(source)
        self.copies[target] = self.copies.get(source, source)
        self.scrubs.pop(target, None)

    def forget_cached(self) -> None:
        """Makes all blocks unknown; those that nobody holds become free."""
        self.free.give(array("i", self.index.idle.in_order()))
        self.index.forget_all()

    def move(self, new_id: dict[int, int]) -> None:
        """Blocks have moved: block b is at `new_id[b]`."""
        old, new = set(new_id), set(new_id.values())
        self.free.give(array("i", old - new))
        self.free.remove(new - old)
        self.shares = {new_id.get(block, block): n for block, n in self.shares.items()}
        self.index.rename(new_id)

    def problems(self, rows: Sequence[array]) -> list[str]:
        """What contradicts `rows`, the blocks that each sequence holds."""
        holders = Counter(block for row in rows for block in row)
        idle, cached = set(self.index.idle.in_order()), set(self.index.known_blocks())
        shares = {block: count - 1 for block, count in holders.items() if count > 1}
        free = set(range(self.num_blocks)) - holders.keys() - idle
        good = {
            "a block is in two hands, or lost": self.free.check(free),
            "a held block is outside the pool": all(0 <= b < self.num_blocks for b in holders),
            "a block's holders are miscounted": shares == self.shares,
            "a held block is idle": idle.isdisjoint(holders),
            "an idle block is not cached": idle <= cached,
            "a cached block is free": cached <= holders.keys() | idle,
            "a copy is due to a block that nobody holds": self.copies.keys() <= holders.keys(),
        }
        return [problem for problem, is_good in good.items() if not is_good]

    def _note_peak(self) -> None:
        used = self.num_blocks - self.num_available
        if used > self.peak_used:
            self.peak_used = used

    def _unshare(self, block: int) -> None:
        count = self.shares[block]
        if count == 1:
            del self.shares[block]
        else:
            self.shares[block] = count - 1
