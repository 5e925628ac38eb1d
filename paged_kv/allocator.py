"""`BlockAllocator`: who holds which block, and which can be shared; no device is involved."""

from array import array
from collections.abc import Hashable
from itertools import chain
from typing import NamedTuple

import numpy as np

from . import validate
from .moves import plan_moves
from .padding import padded_ids
from .prefix import (
    TOKEN_BYTES,
    BlockRemoved,
    BlockStored,
    PrefixIndex,
    Salt,
    Tokens,
    token_bytes,
)
from .sequences import Sequence, Sequences


class PendingBlocks(NamedTuple):
    """What `apply_pending` does to blocks before the next tokens are written.

    Lengths n and m are powers of two, or 0, filled up with -1: few shapes, few programs.

    Attributes:
      copy_sources: int32 (n,), ids of the blocks to copy.
      copy_targets: int32 (n,), where each is copied to.
      scrub_ids: int32 (m,), ids of the blocks to zero.
    """

    copy_sources: np.ndarray
    copy_targets: np.ndarray
    scrub_ids: np.ndarray


class AllocatorStats(NamedTuple):
    """Blocks in each state now, and counts since the allocator was made.

    Attributes:
      num_blocks: blocks of the pool: `free + used + cached`.
      free: blocks that nobody needs.
      used: blocks held by sequences; a shared block counts once.
      cached: blocks held by no sequence, findable by their tokens until someone needs them.
      sequences: sequences allocated.
      peak_used: the most blocks that were used at once.
      prefix_queries: tokens asked of `match_prefix`.
      prefix_hits: tokens that it found.
      evictions: cached blocks given away.

    Source: the prefix cache statistics of vLLM.
    """

    num_blocks: int
    free: int
    used: int
    cached: int
    sequences: int
    peak_used: int
    prefix_queries: int
    prefix_hits: int
    evictions: int

    @property
    def usage(self) -> float:
        """Share of the pool that sequences hold."""
        return self.used / self.num_blocks

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked of `match_prefix` that it found."""
        return self.prefix_hits / max(self.prefix_queries, 1)


class BlockAllocator(Sequences):
    """Hands out the blocks of a pool to sequences and takes them back.

    Plain Python on the host: no call touches a device.  Sequences go by any hashable id.  Each call
    is atomic, under one lock, so threads may share an allocator.  Blocks come in runs of neighbours
    as far as there are any: kernels copy a run at once.  A call takes constant time, and so does
    each block; the search for a free block skips used ones at 12 us per million.

    A block has one writer.  `fork` and `match_prefix` share blocks, and a sequence that would write
    to a shared one is given another block instead.  What is to be copied waits in `take_pending`,
    to be done before the next tokens are written.

    With prefix caching, blocks that were committed can be found by their tokens after their
    sequence is gone, until blocks run short.  Then those unused for longest are given away, and of
    one sequence's the last first.

    Source: the block manager and prefix cache of vLLM (Kwon et al., 2023), RadixAttention of SGLang
    (Zheng et al., 2024).

    Args:
      num_blocks: blocks of the pool, ids 0 to num_blocks - 1.
      block_size: token slots of a block.
      enable_prefix_caching: keep committed blocks findable; without, `match_prefix` finds nothing.
      scrub_on_reuse: every block handed out is to be scrubbed, so that nobody gets a block with
        another's keys and values in it.
      record_events: keep events until `take_events` takes them.

    Raises:
      ValueError: a size is not a positive int.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = False,
        scrub_on_reuse: bool = False,
        record_events: bool = False,
    ) -> None:
        validate.positive_ints({"num_blocks": num_blocks, "block_size": block_size})
        self.enable_prefix_caching = enable_prefix_caching
        self._events: list[BlockStored | BlockRemoved] = []
        index = PrefixIndex(num_blocks, block_size, self._events.append if record_events else None)
        super().__init__(num_blocks, block_size, index, scrub_on_reuse)
        self._queries = self._hits = 0

    def match_prefix(self, seq_id: Hashable, tokens: Tokens, *, salt: Salt = None) -> int:
        """Starts a sequence with the cached blocks of the longest known prefix of `tokens`.

        `extend` then makes room for the rest.  Takes about 0.3 us per block that is found.

        Args:
          seq_id: its name from now on.
          tokens: ids of all tokens that it starts with: ints, or an int array (num_tokens,).
          salt: its tenant, a str or bytes; only what the same tenant committed is found.

        Returns:
          Tokens found: whole blocks, and never all of `tokens`, for the last one must be computed
          to go on from.

        Raises:
          ValueError: the id is taken, `tokens` are not ints within int32, or `salt` is of another
            type.
        """
        with self._lock:
            self._check_new(seq_id)
            data = self._searchable(tokens)
            root = self._index.root(salt)
            path = list(self._index.walk(root, data))
            node = path[-1][0] if path else root
            blocks = array("i", [block for _, block in path])
            self._ledger.share(blocks)
            found = len(blocks) * self.block_size
            self._sequences[seq_id] = sequence = Sequence(blocks, found, self._index.stand(node))
            sequence.committed = len(blocks)
            self._queries += len(tokens)
            self._hits += found
            return found

    def find_prefix(self, tokens: Tokens, *, salt: Salt = None) -> int:
        """How many tokens `match_prefix` would find; changes nothing.

        Args:
          tokens, salt: as in `match_prefix`.

        Raises:
          ValueError: `tokens` are not ints within int32, or `salt` is of another type.
        """
        with self._lock:
            data = self._searchable(tokens)
            if not self._index.has_root(salt):
                return 0
            return self.block_size * sum(1 for _ in self._index.walk(self._index.root(salt), data))

    def commit(self, seq_id: Hashable, tokens: Tokens) -> int:
        """Makes a sequence's full blocks findable by others, now that their tokens are written.

        Args:
          seq_id: the sequence.
          tokens: ids of its tokens from the first on, ints or (num_tokens,), those that the cache
            holds by now.  What was committed before is not looked at again, but for its last block.

        Returns:
          Tokens committed by now: those of full blocks; 0 without prefix caching.

        Raises:
          ValueError: no such sequence, more tokens than it has, not those committed before, or not
            ints within int32.
        """
        with self._lock:
            sequence = self._get(seq_id)
            start, stop = sequence.committed, len(tokens) // self.block_size
            if len(tokens) > sequence.num_tokens:
                raise ValueError(
                    f"sequence {seq_id!r} has {sequence.num_tokens} tokens, {len(tokens)} cannot "
                    "be committed; extend it first, and commit what has been written"
                )
            if not self.enable_prefix_caching or stop <= start:
                return start * self.block_size
            again = 1 if start else 0
            data = token_bytes(tokens[(start - again) * self.block_size : stop * self.block_size])
            skipped = again * self.block_size * TOKEN_BYTES
            if again and data[:skipped] != self._index.tokens(sequence.node):
                raise ValueError(
                    f"the tokens of sequence {seq_id!r} differ from those committed before, at "
                    f"{(start - 1) * self.block_size} to {start * self.block_size - 1}; pass all "
                    "its tokens from the first on"
                )
            blocks = sequence.blocks[start:stop]
            self._stand_at(sequence, self._index.store(sequence.node, data[skipped:], blocks), stop)
            return stop * self.block_size

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes, as when a model's weights change.  Sequences keep their blocks."""
        with self._lock:
            self._ledger.forget_cached()

    def take_pending(self) -> PendingBlocks:
        """Copies and scrubs of blocks due since the last call, for `apply_pending`."""
        with self._lock:
            ledger = self._ledger
            copies, scrubs = ledger.copies, ledger.scrubs
            ledger.copies, ledger.scrubs = {}, {}
            return PendingBlocks(
                padded_ids(copies.values()), padded_ids(copies), padded_ids(scrubs)
            )

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """What became findable and what no longer is since the last call, in order.

        None without `record_events`.
        """
        with self._lock:
            events = self._events[:]
            self._events.clear()
            return events

    def stats(self) -> AllocatorStats:
        """Blocks in each state now, tokens asked and found, evictions."""
        with self._lock:
            free, cached = self._ledger.free.count, len(self._index.idle)
            return AllocatorStats(
                num_blocks=self.num_blocks,
                free=free,
                used=self.num_blocks - free - cached,
                cached=cached,
                sequences=len(self._sequences),
                peak_used=self._ledger.peak_used,
                prefix_queries=self._queries,
                prefix_hits=self._hits,
                evictions=self._index.evictions,
            )

    def defragment(self, max_moves: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gives blocks new ids: each sequence's in a run, from 0 on, then those cached.

        `paged_kv.defragment` calls it and moves the contents along.

        Args:
          max_moves: blocks to move at most (one more where two change places), longest-running
            sequences first; call again for the next.

        Returns:
          (source_ids, target_ids) of all moves at once, int32 (n,), filled up as `PendingBlocks`.

        Raises:
          ValueError: copies or scrubs are pending, under the old ids.
        """
        with self._lock:
            if self._ledger.copies or self._ledger.scrubs:
                raise ValueError(
                    "copies or scrubs are pending; apply_pending(cache, take_pending()) first, or "
                    "call paged_kv.defragment, which does"
                )
            rows = [sequence.held for sequence in self._sequences.values()]
            order = list(dict.fromkeys(chain(*rows, reversed(self._index.idle.in_order()))))
            new_id = plan_moves(order, max_moves)
            for sequence in self._sequences.values():
                sequence.rename(new_id)
            self._ledger.move(new_id)
            return padded_ids(new_id), padded_ids(new_id.values())

    def check_invariants(self) -> None:
        """Looks at every block and sequence: for tests, in time that grows with the pool.

        Raises:
          AssertionError: the allocator contradicts itself, which no call should bring about.
        """
        with self._lock:
            sequences = list(self._sequences.values())
            problems = self._ledger.problems([sequence.held for sequence in sequences])
            problems += [
                f"sequence {name!r} has a wrong row"
                for name, sequence in self._sequences.items()
                if not sequence.is_sound(self.block_size)
            ]
            if not self._index.is_sound([sequence.node for sequence in sequences]):
                problems.append("the tree of prefixes is broken")
            if problems:
                raise AssertionError("; ".join(problems))

    def _searchable(self, tokens: Tokens) -> bytes:
        """The tokens that may be found: whole blocks, all but the last token."""
        full = max(len(tokens) - 1, 0) // self.block_size if self.enable_prefix_caching else 0
        return token_bytes(tokens[: full * self.block_size])
