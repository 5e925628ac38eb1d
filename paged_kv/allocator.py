"""Host-side bookkeeping of free blocks: who holds which, no device involved."""

from collections.abc import Hashable

from . import validate


class OutOfBlocksError(ValueError):
    """Fewer blocks are free than a request needs; nothing was changed."""


class BlockAllocator:
    """Hands out the blocks of a pool to sequences and takes them back.

    Plain Python for one thread.  Sequences go by any hashable id.  Blocks come back in the order
    they were freed last, so a hot block is used again soon.

    Source: the free list of vLLM's block manager (Kwon et al., 2023).

    Args:
      num_blocks: blocks of the pool, ids 0 to num_blocks - 1.
      block_size: token slots of a block.

    Raises:
      ValueError: a size is not a positive int.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        validate.positive_ints({"num_blocks": num_blocks, "block_size": block_size})
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[Hashable, list[int]] = {}
        self._tokens: dict[Hashable, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def allocate(self, seq_id: Hashable, num_tokens: int) -> list[int]:
        """Starts a sequence of `num_tokens` tokens and returns its blocks.

        Raises:
          OutOfBlocksError: too few blocks are free.
          ValueError: the id is taken, or `num_tokens` is negative.
        """
        if seq_id in self._blocks:
            raise ValueError(
                f"sequence {seq_id!r} is allocated already; extend it or free it first"
            )
        validate.not_negative("num_tokens", num_tokens)
        blocks = self._take(seq_id, num_tokens, held=0)
        self._blocks[seq_id], self._tokens[seq_id] = blocks, num_tokens
        return list(blocks)

    def extend(self, seq_id: Hashable, num_tokens: int) -> list[int]:
        """Makes room for `num_tokens` more tokens and returns the blocks that were added.

        Raises:
          OutOfBlocksError: too few blocks are free.
          ValueError: no such sequence, or `num_tokens` is negative.
        """
        held = self._held(seq_id)
        validate.not_negative("num_tokens", num_tokens)
        total = self._tokens[seq_id] + num_tokens
        added = self._take(seq_id, total, held=len(held))
        held.extend(added)
        self._tokens[seq_id] = total
        return added

    def free(self, seq_id: Hashable) -> None:
        """Takes a sequence's blocks back.

        Raises:
          ValueError: no such sequence.
        """
        self._free.extend(reversed(self._held(seq_id)))
        del self._blocks[seq_id], self._tokens[seq_id]

    def blocks(self, seq_id: Hashable) -> list[int]:
        """A sequence's blocks, in order.

        Raises:
          ValueError: no such sequence.
        """
        return list(self._held(seq_id))

    def _held(self, seq_id: Hashable) -> list[int]:
        if seq_id not in self._blocks:
            raise ValueError(f"sequence {seq_id!r} is not allocated; call allocate first")
        return self._blocks[seq_id]

    def _take(self, seq_id: Hashable, num_tokens: int, held: int) -> list[int]:
        """Pops the blocks that a sequence of `num_tokens` needs beyond those it holds."""
        missing = -(-num_tokens // self.block_size) - held
        if missing > len(self._free):
            raise OutOfBlocksError(
                f"sequence {seq_id!r} needs {missing} more blocks for {num_tokens} tokens, "
                f"{len(self._free)} of {self.num_blocks} are free; free a sequence or make the "
                "pool larger"
            )
        return [self._free.pop() for _ in range(missing)]
