"""What a case asks for: shapes, lengths and variant, the tables and facts that follow from them.

Nothing here imports JAX, so tests and tools read cases without paying for it.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ATTEND, APPEND, FUSED = "attend", "append", "append_and_attend"
OPS = (ATTEND, APPEND, FUSED)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload.

    seq_lengths: valid tokens per sequence, the step's own included.
    query_lengths: tokens of this step per sequence; None is one each, without query_start_loc.
    adjacent_blocks: physical blocks lie together in runs of this many, otherwise in random order.
    pool_blocks: for tables that name more blocks than memory holds, the size of a pool they share.
    """

    name: str
    about: str
    seq_lengths: tuple[int, ...]
    query_lengths: tuple[int, ...] | None = None
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    op: str = ATTEND
    adjacent_blocks: int = 1
    pool_blocks: int | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    letter: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: {self.num_query_heads=} % {self.num_kv_heads=} != 0")
        if self.op not in OPS or self.dtype not in ITEM_BYTES:
            raise ValueError(
                f"{self.name}: {self.op=} is one of {OPS}, {self.dtype=} of {[*ITEM_BYTES]}"
            )
        if self.query_lengths is not None:
            if len(self.query_lengths) != self.batch:
                raise ValueError(
                    f"{self.name}: {len(self.query_lengths)} query lengths, {self.batch=}"
                )
            if any(q > s for q, s in zip(self.query_lengths, self.seq_lengths, strict=True)):
                raise ValueError(f"{self.name}: a sequence has more query tokens than tokens")

    @property
    def batch(self) -> int:
        return len(self.seq_lengths)

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def queries(self) -> np.ndarray:
        """Query tokens per sequence; an empty sequence has none."""
        if self.query_lengths is None:
            return np.minimum(self.seq_lengths, 1).astype(np.int32)
        return np.asarray(self.query_lengths, np.int32)

    @property
    def num_tokens(self) -> int:
        """Rows of the packed query: an empty sequence keeps its row when there is one for each."""
        return self.batch if self.query_lengths is None else int(self.queries.sum())

    @property
    def query_start_loc(self) -> np.ndarray | None:
        if self.query_lengths is None:
            return None
        return np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)

    @property
    def options(self) -> dict[str, object]:
        """The static keyword arguments of `paged_attention`."""
        return {
            "is_causal": self.is_causal,
            "local_window_size": self.local_window_size,
            "logits_soft_cap": self.logits_soft_cap,
        }

    @cached_property
    def blocks_per_seq(self) -> np.ndarray:
        return -(-np.asarray(self.seq_lengths, np.int64) // self.block_size)

    @property
    def max_blocks_per_seq(self) -> int:
        return max(1, int(self.blocks_per_seq.max()))

    @property
    def num_blocks(self) -> int:
        """Blocks of a pool that holds the case once, runs filled up."""
        if self.pool_blocks is not None:
            return self.pool_blocks
        run = self.adjacent_blocks
        return max(1, int((-(-self.blocks_per_seq // run)).sum()) * run)

    def block_tables(self, copies: int = 1, seed: int = 0) -> np.ndarray:
        """int32 (copies, batch, max_blocks_per_seq): tables over one pool of `copies * num_blocks`.

        Two copies share no block, so that a call on one finds nothing of another in a cache of the
        chip.  Unused entries are -1.
        """
        rng = np.random.default_rng(seed)
        tables = np.full((copies, self.batch, self.max_blocks_per_seq), -1, np.int32)
        used = np.arange(self.max_blocks_per_seq) < self.blocks_per_seq[:, None]
        if self.pool_blocks is not None:
            ids = rng.integers(0, copies * self.pool_blocks, (copies, int(used.sum())))
            tables[:, used] = ids
            return tables
        run = self.adjacent_blocks
        runs = rng.permutation(copies * self.num_blocks // run).reshape(copies, -1)
        first_run = np.cumsum(-(-self.blocks_per_seq // run)) - -(-self.blocks_per_seq // run)
        row, column = np.nonzero(used)
        tables[:, used] = runs[:, first_run[row] + column // run] * run + column % run
        return tables

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @cached_property
    def _seen(self) -> tuple[int, int]:
        """(keys that some query sees, pairs of a query and a key it sees), over all sequences."""
        window = self.local_window_size
        left, right = (window, window) if isinstance(window, int) else window or (None, None)
        right = 0 if self.is_causal else right
        keys = pairs = 0
        for length, count in zip(self.seq_lengths, self.queries.tolist(), strict=True):
            position = np.arange(length - count, length)
            first = np.maximum(position - left, 0) if left is not None else np.zeros_like(position)
            stop = np.full_like(position, length)
            if right is not None:
                stop = np.minimum(position + right + 1, length)
            pairs += int((stop - first).sum())
            keys += int(stop.max(initial=0) - first.min(initial=length)) if count else 0
        return keys, pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that some query sees, each counted once."""
        return self._seen[0] * self.token_bytes

    @property
    def append_bytes(self) -> int:
        """Bytes an append reads and writes: new keys and values once each."""
        return 2 * int(self.queries.sum()) * self.token_bytes

    @property
    def useful_flops(self) -> int:
        """Multiplications and additions of the pairs that count: 4 x heads x head_dim for each."""
        return 4 * self.num_query_heads * self.head_dim * self._seen[1]

    @property
    def flops(self) -> int:
        """The same for every (query, key) pair of a sequence, masked ones included."""
        pairs = int((self.queries.astype(np.int64) * np.asarray(self.seq_lengths)).sum())
        return 4 * self.num_query_heads * self.head_dim * pairs

    def copies_beyond(self, num_bytes: int) -> int:
        """Disjoint copies of the case's blocks that together pass `num_bytes`, a chip's cache."""
        return max(
            1, ceil(num_bytes / max(1, self.num_blocks * self.block_size * self.token_bytes))
        )
