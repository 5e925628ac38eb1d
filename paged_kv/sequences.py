"""The sequences of an allocator: which blocks each holds, from its start to its end."""

import threading
from array import array
from collections.abc import Hashable, Iterable

import numpy as np

from . import validate
from .ledger import Ledger
from .prefix import PrefixIndex, Salt


class OutOfBlocksError(ValueError):
    """Fewer blocks are free than a request needs; nothing was changed.

    From `BlockAllocator.allocate` and `extend`: free or swap out a sequence, then ask again.
    """


class Sequence:
    """What a sequence holds; the first `trimmed` of its blocks are -1."""

    __slots__ = ("blocks", "committed", "node", "num_tokens", "trimmed")

    def __init__(self, blocks: array, num_tokens: int, node: int) -> None:
        self.blocks, self.num_tokens, self.trimmed = blocks, num_tokens, 0
        self.node, self.committed = node, 0  # the prefix of its first `committed` blocks

    @property
    def held(self) -> array:
        return self.blocks[self.trimmed :] if self.trimmed else self.blocks

    def rename(self, new_id: dict[int, int]) -> None:
        """Blocks have moved: block b is at `new_id[b]`."""
        old: list[int] = self.blocks.tolist()
        self.blocks = array("i", [new_id.get(block, block) for block in old])

    def is_sound(self, block_size: int) -> bool:
        """Whether it has the blocks that its tokens need, and -1 where a window has left."""
        return (
            len(self.blocks) == -(-self.num_tokens // block_size)
            and all(block == -1 for block in self.blocks[: self.trimmed])
            and self.committed <= self.num_tokens // block_size
        )


class Sequences:
    """Starts, lengthens, shares, shortens and ends sequences; `BlockAllocator` without a memory."""

    def __init__(self, num_blocks: int, block_size: int, index: PrefixIndex, is_scrubbing: bool):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._lock = threading.Lock()
        self._index = index
        self._ledger = Ledger(num_blocks, index, is_scrubbing)
        self._sequences: dict[Hashable, Sequence] = {}

    def __contains__(self, seq_id: Hashable) -> bool:
        """Whether a sequence is allocated: `seq_id in allocator`.

        Args:
          seq_id: the name to look for.
        """
        return seq_id in self._sequences

    def allocate(self, seq_id: Hashable, num_tokens: int, *, salt: Salt = None) -> list[int]:
        """Starts a sequence of `num_tokens` tokens and returns its blocks.

        Args:
          seq_id: its name from now on.
          num_tokens: tokens to make room for.
          salt: its tenant, a str or bytes; what it commits is found under the same salt only.

        Returns:
          Ids of its blocks, one for every `block_size` tokens begun.

        Raises:
          OutOfBlocksError: too few blocks are free.
          ValueError: the id is taken, `num_tokens` is not an int of at least 0, or `salt` is of
            another type.
        """
        with self._lock:
            self._check_new(seq_id)
            if type(num_tokens) is not int or num_tokens < 0:
                validate.not_negative("num_tokens", num_tokens)
            needed = -(-num_tokens // self.block_size)
            self._check_room(seq_id, needed, num_tokens)
            root = self._index.stand(self._index.root(salt))
            blocks = self._ledger.take(needed)
            self._sequences[seq_id] = Sequence(blocks, num_tokens, root)
            return blocks.tolist()

    def extend(self, seq_id: Hashable, num_tokens: int) -> list[int]:
        """Makes room for `num_tokens` more tokens and returns the blocks added at the end.

        If the next token falls into a block that other sequences hold, a new block takes its place
        (it is not among those returned, and it is in `blocks` and `block_table`), and a copy is
        pending.

        Args:
          seq_id: the sequence.
          num_tokens: tokens to make room for, besides those it has room for.

        Returns:
          Ids of the blocks added, none while its last block has room.

        Raises:
          OutOfBlocksError: too few blocks are free.
          ValueError: no such sequence, or `num_tokens` is not an int of at least 0.
        """
        with self._lock:
            sequence = self._get(seq_id)
            if type(num_tokens) is not int or num_tokens < 0:
                validate.not_negative("num_tokens", num_tokens)
            blocks, total = sequence.blocks, sequence.num_tokens + num_tokens
            missing = -(-total // self.block_size) - len(blocks)
            tail = blocks[-1] if blocks else -1
            is_written = num_tokens > 0 and sequence.num_tokens % self.block_size > 0
            is_copied = is_written and tail in self._ledger.shares
            if missing or is_copied:
                self._check_room(seq_id, missing + is_copied, total)
                added = self._ledger.take(missing + is_copied, after=tail)
            else:
                added = array("i")
            if is_copied:
                blocks[-1] = added.pop(0)
                self._ledger.copy(tail, blocks[-1])
            elif is_written and self._index.knows(tail):  # committed, then truncated into
                self._index.forget(tail)
            blocks += added
            sequence.num_tokens = total
            return added.tolist()

    def truncate(self, seq_id: Hashable, num_tokens: int) -> None:
        """Rolls a sequence back to `num_tokens` tokens, and gives the blocks past them back.

        Args:
          seq_id: the sequence.
          num_tokens: tokens that stay, from its first on.

        Raises:
          ValueError: no such sequence, `num_tokens` is negative or more than it has, or
            `trim_window` has given back the block of the last token that is left.
        """
        with self._lock:
            sequence = self._get(seq_id)
            validate.not_negative("num_tokens", num_tokens)
            low = sequence.trimmed * self.block_size
            if not low <= num_tokens <= sequence.num_tokens:
                raise ValueError(
                    f"sequence {seq_id!r} cannot be truncated to {num_tokens} tokens: it has "
                    f"{sequence.num_tokens}, and trim_window gave the first {low} of them back"
                )
            keep = -(-num_tokens // self.block_size)
            released = sequence.blocks[keep:]
            del sequence.blocks[keep:]
            sequence.num_tokens = num_tokens
            full = num_tokens // self.block_size
            if full < sequence.committed:
                node = self._index.ancestor(sequence.node, sequence.committed - full)
                self._stand_at(sequence, node, full)
            self._ledger.release(released)

    def fork(self, seq_id: Hashable, new_id: Hashable) -> list[int]:
        """Starts a sequence with the tokens of another, in the same blocks, and returns them.

        The tokens must have been written.  Costs no block until one of the two writes into their
        last block: see `extend`.

        Args:
          seq_id: the sequence to go on from.
          new_id: name of the new one.

        Returns:
          Ids of the blocks, which both hold now.

        Raises:
          ValueError: no such sequence, or the new id is taken.
        """
        with self._lock:
            parent = self._get(seq_id)
            self._check_new(new_id)
            self._ledger.share(parent.held)
            child = Sequence(parent.blocks[:], parent.num_tokens, self._index.stand(parent.node))
            child.trimmed, child.committed = parent.trimmed, parent.committed
            self._sequences[new_id] = child
            return child.blocks.tolist()

    def free(self, seq_id: Hashable) -> None:
        """Ends a sequence.  Blocks that nobody else holds are free, or cached if committed.

        Args:
          seq_id: the sequence; its name can be used again.

        Raises:
          ValueError: no such sequence.
        """
        with self._lock:
            sequence = self._get(seq_id)
            del self._sequences[seq_id]
            self._ledger.release(sequence.held)
            self._index.leave(sequence.node)

    def trim_window(
        self,
        seq_id: Hashable,
        local_window_size: int | tuple[int, int],
        *,
        next_position: int | None = None,
    ) -> int:
        """Gives back the blocks that a sliding window has left; their table entries become -1.

        For tables whose layers all have the window, or a smaller one.

        Args:
          seq_id: the sequence.
          local_window_size: keys on the (left, right) or an int, as in `paged_attention`.
          next_position: the first position still to be computed; by default all tokens that there
            is room for have been.  A later `truncate` below it is too late for these blocks.

        Returns:
          How many blocks were given back.

        Raises:
          ValueError: no such sequence, a negative window, or a position outside the sequence.
        """
        with self._lock:
            sequence = self._get(seq_id)
            is_int = isinstance(local_window_size, int)
            left = local_window_size if is_int else local_window_size[0]
            validate.not_negative("local_window_size", left)
            position = sequence.num_tokens if next_position is None else next_position
            validate.in_range("next_position", position, sequence.num_tokens + 1)
            start, stop = sequence.trimmed, max(position - left, 0) // self.block_size
            if stop <= start:
                return 0
            released = sequence.blocks[start:stop]
            sequence.blocks[start:stop] = array("i", [-1]) * (stop - start)
            sequence.trimmed = stop
            self._ledger.release(released)
            return stop - start

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones included: what can be handed out."""
        return self._ledger.num_available

    def blocks(self, seq_id: Hashable) -> list[int]:
        """Ids of a sequence's blocks, in order; -1 for those trimmed.

        Args:
          seq_id: the sequence.

        Raises:
          ValueError: no such sequence.
        """
        with self._lock:
            return self._get(seq_id).blocks.tolist()

    def num_tokens(self, seq_id: Hashable) -> int:
        """Tokens that a sequence has room for, as asked of `allocate` and `extend`.

        Args:
          seq_id: the sequence.

        Raises:
          ValueError: no such sequence.
        """
        return self._get(seq_id).num_tokens

    def block_table(
        self,
        seq_ids: Iterable[Hashable],
        max_blocks: int,
        *,
        num_rows: int | None = None,
        allow_missing: bool = False,
    ) -> np.ndarray:
        """The table for `set_block_table`: one row per id, and -1 where nothing is.

        Args:
          seq_ids: the sequences, one for each row.
          max_blocks: columns: `max_blocks_per_seq` of the cache.
          num_rows: rows, those past the ids empty; by default as many as ids.
          allow_missing: an id that is not allocated is an empty row, not an error.

        Returns:
          int32 (rows, max_blocks), a new array.

        Raises:
          ValueError: no such sequence, one with more blocks than columns, or more ids than rows.
        """
        with self._lock:
            names = list(seq_ids)
            if num_rows is not None and len(names) > num_rows:
                raise ValueError(f"{len(names)} sequences do not fit into {num_rows=}")
            table = np.full(
                (len(names) if num_rows is None else num_rows, max_blocks), -1, np.int32
            )
            for row, name in zip(table, names, strict=False):
                if allow_missing and name not in self._sequences:
                    continue
                blocks = self._get(name).blocks
                if len(blocks) > max_blocks:
                    raise ValueError(
                        f"sequence {name!r} has {len(blocks)} blocks, its row {max_blocks=}; make "
                        "the cache with a larger max_blocks_per_seq"
                    )
                row[: len(blocks)] = blocks
            return table

    def _get(self, seq_id: Hashable) -> Sequence:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            raise ValueError(f"sequence {seq_id!r} is not allocated; call allocate first")
        return sequence

    def _check_new(self, seq_id: Hashable) -> None:
        if seq_id in self._sequences:
            raise ValueError(
                f"sequence {seq_id!r} is allocated already; extend it or free it first"
            )

    def _check_room(self, seq_id: Hashable, missing: int, num_tokens: int) -> None:
        available = self._ledger.num_available
        if missing > available:
            raise OutOfBlocksError(
                f"sequence {seq_id!r} needs {missing} more blocks for {num_tokens} tokens, "
                f"{available} of {self.num_blocks} are free; free a sequence or make the pool "
                "larger"
            )

    def _stand_at(self, sequence: Sequence, node: int, committed: int) -> None:
        """Its first `committed` blocks are the prefix `node`."""
        self._index.stand(node)
        self._index.leave(sequence.node)
        sequence.node, sequence.committed = node, committed
