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

from .idle_blocks import IdleBlocks

TOKEN_BYTES = NUMBER_BYTES = 4

Tokens = Sequence[int] | np.ndarray
Salt = str | bytes | None

# Fewer blocks than this are handled one by one; NumPy's calls take longer.
FEW = 8
# Dead nodes looked at for each block stored, and whenever one dies by itself.
SWEEP = 2
# A node of -1 among others as bytes.  Other nodes' bytes may look like it: it may be, or is not.
UNKNOWN = array("i", [-1]).tobytes()


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

    Somebody waits for the blocks that are evicted, so that is one write to each; nodes that died
    by it are dropped a few at a time as others are stored.

    Source: the block hashes of vLLM, the tree of SGLang's RadixAttention (Zheng et al., 2024).
    """

    def __init__(
        self, num_blocks: int, block_size: int, record: Callable[..., None] | None
    ) -> None:
        self.evictions = 0
        self.num_known = 0  # cached blocks
        self.idle = IdleBlocks(num_blocks)  # those that no sequence holds
        self._node_of = array("i", [-1]) * num_blocks  # by block; -1: not cached
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
        return self._node_of[block] >= 0

    def known_blocks(self) -> list[int]:
        """All cached blocks."""
        return np.flatnonzero(self._nodes >= 0).tolist()

    def root(self, salt: Salt) -> int:
        """Where a tenant's prefixes start: a node to `stand` on."""
        return self._child(-1, salt_bytes(salt))

    def has_root(self, salt: Salt) -> bool:
        """Whether anything of a tenant is known."""
        return _number(-1) + salt_bytes(salt) in self._find

    def walk(self, node: int, data: bytes) -> Iterator[tuple[int, int]]:
        """(node, block) along the longest known prefix of `data`, from the child of `node` on."""
        chunk, find, blocks, nodes = self._chunk, self._find, self._blocks, self._node_of
        for start in range(0, len(data) - chunk + 1, chunk):
            node = find.get(_number(node) + data[start : start + chunk], -1)
            if node < 0 or nodes[block := blocks[node]] != node:
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
                self._blocks[node], self._node_of[block] = block, node
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
        if not self.num_known:
            return blocks
        if len(blocks) < FEW:
            for block in reversed(blocks):
                if self._node_of[block] >= 0:
                    self.idle.add_one(block)
            return array("i", [block for block in blocks if self._node_of[block] < 0])
        ids = np.frombuffer(blocks, np.int32)
        nodes = self._nodes.take(ids)
        known = len(ids)  # without those at the end that were not committed, if they are few
        while known > len(ids) - FEW and self._node_of[blocks[known - 1]] < 0:
            known -= 1
        if UNKNOWN not in nodes[:known].tobytes():
            self.idle.add(ids[:known][::-1])
            return blocks[known:]
        is_known = nodes >= 0
        self.idle.add(ids[is_known][::-1])
        return array("i", ids[~is_known].tobytes())

    def evict(self, num_blocks: int) -> array:
        """Forgets blocks that were idle for longest; returns them, each sequence's in its order."""
        blocks = self.idle.take(num_blocks)
        self.evictions += num_blocks
        self._forget(blocks)
        return array("i", blocks[::-1].tobytes())

    def forget(self, block: int) -> None:
        """Makes a block unknown."""
        self._forget(np.array([block], np.int32))
        self._sweep(SWEEP)

    def forget_all(self) -> None:
        """Makes all blocks unknown; none is idle."""
        self.idle.clear()
        self._forget(np.flatnonzero(self._nodes >= 0).astype(np.int32))
        while self._dead:
            self._sweep(len(self._dead))

    def _forget(self, blocks: np.ndarray) -> None:
        nodes = self._nodes.take(blocks)
        if self._record:
            for node, block in zip(nodes.tolist(), blocks.tolist(), strict=True):
                self._record(BlockRemoved(self._hashes[node], block))
        self._nodes.put(blocks, -1)
        self.num_known -= len(blocks)
        self._dead.frombytes(nodes.tobytes())

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
        old = np.flatnonzero(self._nodes >= 0)
        nodes, new = self._nodes[old], [new_id.get(block, block) for block in old.tolist()]
        self._nodes[old] = -1
        self._nodes[new] = nodes
        np.frombuffer(self._blocks, np.int32)[nodes] = new
        self.idle.rename(new_id)

    def is_sound(self, standing: Iterable[int]) -> bool:
        """Whether the tree agrees with itself and with the nodes that sequences stand on."""
        nodes = self._find.values()
        uses = Counter(standing)
        uses.update(self._parents[node] for node in nodes if self._parents[node] >= 0)
        return (
            uses.keys() <= set(nodes)
            and all(self._find[self._keys[node]] == node for node in nodes)
            and all(self._uses[node] == uses[node] for node in nodes)
            and all(self._is_filled(n) or uses[n] for n in set(nodes).difference(self._dead))
            and {self._blocks[node]: node for node in nodes if self._is_filled(node)}
            == {block: self._node_of[block] for block in self.known_blocks()}
            and self.num_known == len(self.known_blocks())
            and self.idle.is_sound()
            and sorted([*nodes, *self._unused]) == list(range(len(self._keys)))
        )

    def _is_filled(self, node: int) -> bool:
        return self._node_of[self._blocks[node]] == node  # -1, too, names a block, of another node

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
