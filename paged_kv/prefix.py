"""Which cached block holds which tokens: a tree of blocks, one node for each prefix of full blocks.

A dictionary finds a node by its parent and its tokens.  It hashes both, which chains the hashes,
and compares both, so that no collision can find another prefix.  Each tenant's salt is a root.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .idle_blocks import HELD, UNKNOWN, IdleBlocks

TOKEN_BYTES = NUMBER_BYTES = 4

Tokens = Sequence[int] | np.ndarray
Salt = str | bytes | None

# Dead nodes looked at for each block stored, and whenever one dies by itself.
SWEEP = 2


class BlockStored(NamedTuple):
    """A block became findable: an event of `BlockAllocator.take_events`.

    Hashes are chained over all tokens before, BLAKE2b of 16 bytes, the same in every process.

    Attributes:
      block_hash: of the prefix that ends with the block.
      parent_hash: of the prefix before it; of a sequence's first block, the hash of its salt.
      tokens: the block's own tokens, as many as it has slots.
      block: its id.

    Source: the KV events of vLLM.
    """

    block_hash: bytes
    parent_hash: bytes
    tokens: tuple[int, ...]
    block: int


class BlockRemoved(NamedTuple):
    """A block can no longer be found: an event of `BlockAllocator.take_events`.

    Attributes:
      block_hash: as in `BlockStored`.
      block: its id, which is another's from now on.

    Source: the KV events of vLLM.
    """

    block_hash: bytes
    block: int


class PrefixIndex:
    """Finds cached blocks by their tokens, and lists those that may be evicted, oldest first.

    A node, which is an int, is one prefix of full blocks, and filled while the block it names names
    it.  When its last block is evicted it stays while it has children: they are found again once it
    is filled again.  Plain ints and bytes in flat tables: a million small objects would make the
    garbage collector pause.

    Somebody waits for the blocks that are evicted, so that writes one byte for each.  What node it
    was stays beside a block until it is stored again; nodes that are dead then are dropped a few at
    a time.

    Source: the block hashes of vLLM, the tree of SGLang's RadixAttention (Zheng et al., 2024).
    """

    def __init__(
        self, num_blocks: int, block_size: int, record: Callable[..., None] | None
    ) -> None:
        self.evictions = 0
        self.num_known = 0  # cached blocks
        self._state = bytearray(num_blocks)  # by block: UNKNOWN, HELD or IDLE
        self._states = np.frombuffer(self._state, np.uint8)  # the same memory
        self.idle = IdleBlocks(self._state)  # those that no sequence holds
        self._node_of = array("i", [-1]) * num_blocks  # by block: its node, or the last it was
        self._nodes = np.frombuffer(self._node_of, np.int32)  # the same memory
        self._find: dict[bytes, int] = {}  # parent's number and tokens -> node
        self._keys: list[bytes] = []  # by node, like all below
        self._parents, self._blocks = array("i"), array("i")
        self._uses = array("i")  # children, and sequences that stand here
        self._unused = array("i")  # nodes to use again
        self._dead = array("i")  # with neither block nor use, perhaps, when they came here
        self._chunk = block_size * TOKEN_BYTES
        self._record = record
        self._hashes: list[bytes] = []  # where events are recorded

    def __len__(self) -> int:
        """Nodes."""
        return len(self._find)

    def knows(self, block: int) -> bool:
        """Whether a block is cached."""
        return self._state[block] != UNKNOWN

    def known_blocks(self) -> list[int]:
        """All cached blocks."""
        return np.flatnonzero(self._states).tolist()

    def root(self, salt: Salt) -> int:
        """Where a tenant's prefixes start: a node to `stand` on."""
        return self._child(-1, salt_bytes(salt))

    def has_root(self, salt: Salt) -> bool:
        """Whether anything of a tenant is known."""
        return _number(-1) + salt_bytes(salt) in self._find

    def walk(self, node: int, data: bytes) -> Iterator[tuple[int, int]]:
        """(node, block) along the longest known prefix of `data`, from the child of `node` on."""
        chunk, find, blocks = self._chunk, self._find, self._blocks
        nodes, state = self._node_of, self._state
        for start in range(0, len(data) - chunk + 1, chunk):
            node = find.get(_number(node) + data[start : start + chunk], -1)
            if node < 0 or nodes[block := blocks[node]] != node or not state[block]:
                return
            yield node, block

    def store(self, node: int, data: bytes, blocks: Iterable[int]) -> int:
        """Makes `blocks`, which hold `data` after `node`, findable; returns the last node.

        A block whose content is known already, in another block, stays unknown.
        """
        self._sweep(SWEEP * len(data) // self._chunk)  # before: nothing yet keeps the last node
        for number, block in enumerate(blocks):
            tokens = data[number * self._chunk : (number + 1) * self._chunk]
            parent, node = node, self._child(node, tokens)
            if block >= 0 and not self._is_filled(node):
                if self._node_of[block] >= 0:
                    self._dead.append(self._node_of[block])
                self._blocks[node], self._node_of[block], self._state[block] = block, node, HELD
                self.num_known += 1
                if self._record:
                    hashes, ids = self._hashes, tuple(array("i", tokens))
                    self._record(BlockStored(hashes[node], hashes[parent], ids, block))
        return node

    def tokens(self, node: int) -> bytes:
        """The tokens of a node's last block."""
        return self._keys[node][NUMBER_BYTES:]

    def ancestor(self, node: int, steps: int) -> int:
        """The node that many blocks before."""
        for _ in range(steps):
            node = self._parents[node]
        return node

    def set_aside(self, blocks: array) -> array:
        """Of blocks that nobody holds any more, keeps the cached ones and returns the others.

        The last are to be evicted first.
        """
        return self.idle.add(blocks) if self.num_known else blocks

    def evict(self, num_blocks: int) -> array:
        """Forgets blocks that were idle for longest; returns them, each sequence's in its order."""
        blocks = self.idle.take(num_blocks)
        self.evictions += num_blocks
        self._note_removed(blocks)
        blocks.reverse()
        return blocks

    def forget(self, block: int) -> None:
        """Makes a block unknown."""
        self._state[block] = UNKNOWN
        self._note_removed([block])
        self._dead.append(self._node_of[block])
        self._sweep(SWEEP)

    def forget_all(self) -> None:
        """Makes all blocks unknown; none is idle."""
        known = self.known_blocks()
        self.idle.clear()
        self._states.fill(UNKNOWN)
        self._note_removed(known)
        self._dead.frombytes(self._nodes[self._nodes >= 0].tobytes())
        self._nodes.fill(-1)
        while self._dead:
            self._sweep(len(self._dead))

    def _note_removed(self, blocks: Sequence[int]) -> None:
        self.num_known -= len(blocks)
        if self._record:
            for block in blocks:
                self._record(BlockRemoved(self._hashes[self._node_of[block]], block))

    def stand(self, node: int) -> int:
        """Keeps a node, for a sequence that ends there."""
        self._uses[node] += 1
        return node

    def leave(self, node: int) -> None:
        """Undoes `stand`."""
        self._uses[node] -= 1
        if self._uses[node] == 0 and not self._is_filled(node):
            self._dead.append(node)
            self._sweep(SWEEP)

    def rename(self, new_id: dict[int, int]) -> None:
        """Blocks have moved: block b is at `new_id[b]`."""
        self.idle.rename(new_id)
        old = self.known_blocks()
        new = [new_id.get(block, block) for block in old]
        nodes, states = self._nodes[old], self._states[old]
        self._dead.frombytes(self._nodes[self._nodes >= 0].tobytes())  # what others were last
        self._nodes.fill(-1)
        self._states.fill(UNKNOWN)
        self._nodes[new], self._states[new] = nodes, states
        np.frombuffer(self._blocks, np.int32)[nodes] = new

    def is_sound(self, standing: Iterable[int]) -> bool:
        """Whether the tree agrees with itself and with the nodes that sequences stand on."""
        nodes, known = self._find.values(), self.known_blocks()
        dead = {*self._dead, *np.delete(self._nodes, known).tolist()}
        uses = Counter(standing)
        uses.update(self._parents[node] for node in nodes if self._parents[node] >= 0)
        return (
            uses.keys() <= set(nodes)
            and all(self._find[self._keys[node]] == node for node in nodes)
            and all(self._uses[node] == uses[node] for node in nodes)
            and all(self._is_filled(n) or uses[n] for n in set(nodes) - dead)
            and {self._blocks[node]: node for node in nodes if self._is_filled(node)}
            == {block: self._node_of[block] for block in known}
            and self.num_known == len(known)
            and self.idle.is_sound()
            and sorted([*nodes, *self._unused]) == list(range(len(self._keys)))
        )

    def _is_filled(self, node: int) -> bool:
        block = self._blocks[node]  # -1, too, names a block, of another node or unknown
        return self._node_of[block] == node and self._state[block] != UNKNOWN

    def _child(self, parent: int, tokens: bytes) -> int:
        """The node after `parent`, made where there is none."""
        key = _number(parent) + tokens
        node = self._find.get(key, -1)
        return self._new(parent, key) if node < 0 else node

    def _new(self, parent: int, key: bytes) -> int:
        if not self._unused:
            self._unused.append(len(self._keys))
            self._keys.append(b"")
            self._hashes.append(b"")
            for table in (self._parents, self._blocks, self._uses):
                table.append(-1)
        node = self._unused.pop()
        self._find[key], self._keys[node] = node, key
        self._parents[node], self._blocks[node], self._uses[node] = parent, -1, 0
        if parent >= 0:
            self._uses[parent] += 1
        if self._record:
            before = self._hashes[parent] if parent >= 0 else b""
            content = before + key[NUMBER_BYTES:]
            self._hashes[node] = hashlib.blake2b(content, digest_size=16).digest()
        return node

    def _sweep(self, limit: int) -> None:
        """Drops of the next dead nodes those that still have neither block nor use."""
        dead, keys, uses = self._dead, self._keys, self._uses
        for _ in range(min(limit, len(dead))):
            node = dead.pop()
            if self._is_filled(node) or uses[node] or not keys[node]:
                continue  # filled or used again, or dropped already
            del self._find[keys[node]]
            keys[node] = b""
            self._unused.append(node)
            parent = self._parents[node]
            if parent >= 0:
                uses[parent] -= 1
                if uses[parent] == 0 and not self._is_filled(parent):
                    dead.append(parent)


def _number(node: int) -> bytes:
    return node.to_bytes(NUMBER_BYTES, "little", signed=True)


def token_bytes(tokens: Tokens) -> bytes:
    """Tokens as int32 in the machine's order.

    Raises:
      ValueError: they are not a row of ints that fit int32.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.dtype == np.int32 and tokens.ndim == 1:
            return tokens.tobytes()
        tokens = tokens.tolist()
    try:
        return array("i", tokens).tobytes()
    except (TypeError, OverflowError):
        raise ValueError("tokens must be a row of ints, each within int32") from None


def salt_bytes(salt: Salt) -> bytes:
    """A tenant's name as bytes; those of None are no other's.

    Raises:
      ValueError: it is not a str, bytes or None.
    """
    if salt is None:
        return b""
    if not isinstance(salt, str | bytes):
        raise ValueError(f"salt={salt!r} must be a str, bytes or None")
    return b"\1" + (salt.encode() if isinstance(salt, str) else salt)
