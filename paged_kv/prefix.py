"""Which cached block holds which tokens: a tree of blocks, one node for each prefix of full blocks.

A dictionary finds a node by its parent and its tokens.  It hashes both, which chains the hashes,
and compares both, so that no collision can find another prefix.  Each tenant's salt is a root.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

TOKEN_BYTES = NUMBER_BYTES = 4

Tokens = Sequence[int] | np.ndarray
Salt = str | bytes | None


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

    A node, which is an int, is one prefix of full blocks.  When its last block is evicted it stays,
    with a block of -1, while it has children: they are found again once it is filled again.  Plain
    ints and bytes in flat tables: a million small objects would make the garbage collector pause.

    Source: the block hashes of vLLM, the tree of SGLang's RadixAttention (Zheng et al., 2024).
    """

    def __init__(self, block_size: int, record: Callable[..., None] | None) -> None:
        self.evictions = 0
        self.node_of: dict[int, int] = {}  # block -> node
        self.idle: OrderedDict[int, None] = OrderedDict()  # cached, held by no sequence
        self._find: dict[bytes, int] = {}  # parent's number and tokens -> node
        self._keys: list[bytes] = []  # by node, like all below
        self._parents, self._blocks = array("i"), array("i")
        self._uses = array("i")  # children, and sequences that stand here
        self._unused = array("i")  # nodes to use again
        self._chunk = block_size * TOKEN_BYTES
        self._record = record
        self._hashes: list[bytes] = []  # where events are recorded

    def __len__(self) -> int:
        """Nodes."""
        return len(self._find)

    def root(self, salt: Salt) -> int:
        """Where a tenant's prefixes start: a node to `stand` on."""
        return self._child(-1, salt_bytes(salt))

    def has_root(self, salt: Salt) -> bool:
        """Whether anything of a tenant is known."""
        return _number(-1) + salt_bytes(salt) in self._find

    def walk(self, node: int, data: bytes) -> Iterator[tuple[int, int]]:
        """(node, block) along the longest known prefix of `data`, from the child of `node` on."""
        chunk, find, blocks = self._chunk, self._find, self._blocks
        for start in range(0, len(data) - chunk + 1, chunk):
            node = find.get(_number(node) + data[start : start + chunk], -1)
            if node < 0 or blocks[node] < 0:
                return
            yield node, blocks[node]

    def store(self, node: int, data: bytes, blocks: Iterable[int]) -> int:
        """Makes `blocks`, which hold `data` after `node`, findable; returns the last node.

        A block whose content is known already, in another block, stays unknown.
        """
        for number, block in enumerate(blocks):
            tokens = data[number * self._chunk : (number + 1) * self._chunk]
            parent, node = node, self._child(node, tokens)
            if self._blocks[node] < 0 <= block:
                self._blocks[node], self.node_of[block] = block, node
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

    def evict(self) -> int:
        """Forgets the block that was idle for longest, and returns it."""
        block, _ = self.idle.popitem(last=False)
        self.evictions += 1
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Makes a block unknown."""
        node = self.node_of.pop(block)
        self._blocks[node] = -1
        if self._record:
            self._record(BlockRemoved(self._hashes[node], block))
        self._prune(node)

    def stand(self, node: int) -> int:
        """Keeps a node, for a sequence that ends there."""
        self._uses[node] += 1
        return node

    def leave(self, node: int) -> None:
        """Undoes `stand`."""
        self._uses[node] -= 1
        self._prune(node)

    def rename(self, new_id: dict[int, int]) -> None:
        """Blocks have moved: block b is at `new_id[b]`."""
        self.node_of = {new_id.get(block, block): node for block, node in self.node_of.items()}
        for block, node in self.node_of.items():
            self._blocks[node] = block
        self.idle = OrderedDict.fromkeys(new_id.get(block, block) for block in self.idle)

    def is_sound(self, standing: Iterable[int]) -> bool:
        """Whether the tree agrees with itself and with the nodes that sequences stand on."""
        nodes = self._find.values()
        uses = Counter(standing)
        uses.update(self._parents[node] for node in nodes if self._parents[node] >= 0)
        return (
            uses.keys() <= set(nodes)
            and all(self._find[self._keys[node]] == node for node in nodes)
            and all(self._uses[node] == uses[node] for node in nodes)
            and all(self._blocks[node] >= 0 or uses[node] for node in nodes)
            and {b: n for n in nodes if (b := self._blocks[n]) >= 0} == self.node_of
            and sorted([*nodes, *self._unused]) == list(range(len(self._keys)))
        )

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

    def _prune(self, node: int) -> None:
        """Drops a node that has neither block nor use, then its parents for the same reason."""
        while node >= 0 and self._blocks[node] < 0 and self._uses[node] == 0:
            del self._find[self._keys[node]]
            self._keys[node] = b""
            self._unused.append(node)
            node = self._parents[node]
            if node >= 0:
                self._uses[node] -= 1


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
