"""How an attention problem is cut into tiles of queries and keys, and the memory they take.

Blocks are copied whole and multiplied as matrices of (token, head) rows; a block too large for that
is copied in parts.  The description of a kernel's buffers is what allocates them
(`blocks.allocate`) and what `vmem_bytes` adds up, so an estimate cannot drift from its kernel.
No Pallas import.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from ..core.problem import CacheShape, Problem
from ..core.schedule import num_query_tiles

LANES = 128
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16", "float32")
# Every generation gives a kernel at least 16 MiB of VMEM; the rest is left to the compiler.
VMEM_BYTES = 12 << 20
SMEM_BYTES = 512 << 10  # half of what a core has
TABLE_WINDOW = (
    128  # table entries per slice: a slice of HBM for SMEM starts at a multiple of 128 words
)
QUERY_ROWS = 256  # (token, query head) rows of a tile, where there are enough tokens
MAX_SCORES = 1 << 18  # entries of a tile of scores
MAX_TILE_ROWS = 4096  # (token, kv head) rows of a tile


class Buffer(NamedTuple):
    """A scratch buffer or an operand's tile; `space` is "vmem", "smem" or "semaphore"."""

    space: str
    shape: tuple[int, ...]
    dtype: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory; VMEM pads the last two axes to whole registers."""
        if self.space == "semaphore":
            return 0
        itemsize = np.dtype(self.dtype).itemsize
        if self.space == "smem" or len(self.shape) < 2:
            return prod(self.shape) * itemsize
        *outer, rows, columns = self.shape
        return prod(outer) * round_up(rows, 8 * 4 // itemsize) * round_up(columns, LANES) * itemsize


def vmem_bytes(buffers: Iterable[Buffer]) -> int:
    """What the buffers take of VMEM."""
    return sum(buffer.num_bytes for buffer in buffers if buffer.space == "vmem")


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def min_rows(dtype: Any) -> int:
    """Rows that copies into VMEM are multiples of: those of one register."""
    return 32 // np.dtype(dtype).itemsize


def fills_memory_tiles(num_rows: int) -> bool:
    """Whether XLA keeps arrays (..., num_rows, 128) without padding."""
    return num_rows in (1, 2, 4) or num_rows % 8 == 0


@dataclass(frozen=True)
class BlockRows:
    """A block seen as a matrix: one row per (token, kv head).

    The order of the rows is that of the memory, so that the view costs nothing: XLA keeps a pool
    token by token if a token's heads fill its memory tiles, else head by head.

    A packed block is one row per 128 values, wherever heads begin.  Its "heads" are then the rows
    of a token, or of the fewest tokens that fill whole rows.
    """

    block_size: int
    num_heads: int
    is_head_major: bool
    width: int = LANES  # values of a row
    group_tokens: int = 1  # tokens that `num_heads` rows hold

    @classmethod
    def of(cls, cache: CacheShape) -> "BlockRows":
        heads, head_dim = cache.num_kv_heads, cache.head_dim
        if cache.has_packed_pools:
            tokens = LANES // gcd(LANES, heads * head_dim)
            return cls(cache.block_size, tokens * heads * head_dim // LANES, False, LANES, tokens)
        is_head_major = head_dim % LANES == 0 and not fills_memory_tiles(heads)
        return cls(cache.block_size, heads, is_head_major, head_dim)

    @property
    def count(self) -> int:
        return self.block_size // self.group_tokens * self.num_heads

    def token(self, row: Any) -> Any:
        """Token of a row (an int32 array), within its block; the first if a group of tokens."""
        n = np.int32(self.block_size if self.is_head_major else self.num_heads)
        token = lax.rem(row, n) if self.is_head_major else lax.div(row, n)
        return token if self.group_tokens == 1 else token * np.int32(self.group_tokens)

    def token_of_values(self, row: Any) -> Any:
        """Token of each value of rows, within its block; `row` has the shape of the values."""
        if self.group_tokens == 1:
            return self.token(row)
        token_values = np.int32(self.num_heads * self.width // self.group_tokens)
        lane = lax.broadcasted_iota(np.int32, row.shape, 1)
        return lax.div(row * np.int32(self.width) + lane, token_values)

    def head(self, row: Any) -> Any:
        n = np.int32(self.block_size if self.is_head_major else self.num_heads)
        return lax.div(row, n) if self.is_head_major else lax.rem(row, n)

    def parts(self, dtype: Any) -> Iterator[int]:
        """Into how many equal runs of rows, of whole tokens or heads, a block can be cut."""
        n = self.num_heads if self.is_head_major else self.block_size // self.group_tokens
        for parts in range(1, n + 1):
            if n % parts == 0 and self.count // parts % min_rows(dtype) == 0:
                yield parts

    def units(self, dtype: Any) -> Iterator["BlockRows"]:
        """The aligned groups of tokens that can be rewritten alone, smallest first."""
        for tokens in range(self.group_tokens, self.block_size + 1, self.group_tokens):
            run = tokens if self.is_head_major else tokens // self.group_tokens * self.num_heads
            if self.block_size % tokens == 0 and run % min_rows(dtype) == 0:
                yield replace(self, block_size=tokens)


def no_whole_register(cache: CacheShape) -> str:
    """Why blocks of this size cannot be copied into VMEM, for an error."""
    least = min_rows(cache.dtype)
    step = least
    if cache.has_packed_pools:
        step = least * LANES // gcd(least * LANES, cache.num_kv_heads * cache.head_dim)
    return (
        f"block_size={cache.block_size} with num_kv_heads={cache.num_kv_heads} does not fill "
        f"{cache.dtype} registers of {least} rows; use a block_size that is a multiple of {step}"
    )


def rows_per_head(cache: CacheShape) -> int:
    """Rows over which a kv head extends at most: more than one only in packed pools."""
    if not cache.has_packed_pools:
        return 1
    firsts = range(0, LANES * cache.head_dim, cache.head_dim)
    return max(-(-(first % LANES + cache.head_dim) // LANES) for first in firsts)


@dataclass(frozen=True)
class AttentionPlan:
    """Tiles of one attention call.

    A tile of keys is `blocks_per_tile` blocks, or one of `tiles_per_block` parts of a block.
    """

    rows: BlockRows
    tile_tokens: int  # query tokens of a tile of queries
    num_query_tiles: int
    query_rows: int  # their (token, query head) rows, filled up to whole registers
    blocks_per_tile: int
    tiles_per_block: int
    head_rows: int = 1  # rows over which a kv head extends

    @property
    def query_width(self) -> int:
        """Values of a row of queries, or of results."""
        return self.head_rows * self.rows.width

    @property
    def copy_rows(self) -> int:
        """Rows that one copy brings."""
        return self.rows.count // self.tiles_per_block

    @property
    def tile_rows(self) -> int:
        """(token, kv head) rows of a tile of keys."""
        return self.blocks_per_tile * self.copy_rows


def plan_attention(problem: Problem) -> AttentionPlan | None:
    """The largest tiles whose buffers fit; None if none do."""
    for tile_tokens in _tile_tokens(problem):
        for plan in _key_tiles(problem, tile_tokens):
            scores = plan.query_rows * plan.tile_rows
            small = scores <= MAX_SCORES and plan.tile_rows <= MAX_TILE_ROWS
            # scores of adjacent rows are added, by rotating whole registers
            small &= plan.head_rows == 1 or plan.tile_rows % LANES == 0
            if small and vmem_bytes(attention_buffers(problem, plan)) <= VMEM_BYTES:
                return plan
    return None


def _tile_tokens(problem: Problem) -> Iterator[int]:
    """Tokens of a query tile, best first: no more than an average sequence has."""
    if not problem.is_packed:
        yield 1
        return
    mean = -(-problem.num_tokens // problem.cache.batch)
    tokens = 1
    while tokens < mean and 2 * tokens * problem.num_query_heads <= QUERY_ROWS:
        tokens *= 2
    while tokens:
        yield tokens
        tokens //= 2


def _key_tiles(problem: Problem, tile_tokens: int) -> Iterator[AttentionPlan]:
    """All tiles of keys, largest first."""
    cache, rows = problem.cache, BlockRows.of(problem.cache)
    query_rows = round_up(tile_tokens * problem.num_query_heads, min_rows("bfloat16"))
    num_tiles = num_query_tiles(problem.num_tokens, cache.batch, tile_tokens, problem.is_packed)
    head_rows = rows_per_head(cache)
    queries = (rows, tile_tokens, num_tiles, query_rows)
    make = lambda blocks, parts: AttentionPlan(*queries, blocks, parts, head_rows)
    blocks = TABLE_WINDOW
    fewest = 1 if head_rows == 1 else LANES // gcd(LANES, rows.count)
    while blocks > 1:
        if blocks < 2 * max(cache.max_blocks_per_seq, fewest):
            yield make(blocks, 1)
        blocks //= 2
    for parts in rows.parts(cache.dtype):
        yield make(1, parts)


def attention_scratch(problem: Problem, plan: AttentionPlan) -> list[Buffer]:
    """Scratch of the kernel, in order: keys, values, table windows, and a semaphore each."""
    tile = (2, plan.tile_rows, plan.rows.width)
    keys = Buffer("vmem", tile, stored_dtype(problem.cache.dtype))
    table = Buffer("smem", (2, TABLE_WINDOW), "int32")
    return [keys, keys, table, *[Buffer("semaphore", (2,))] * 3]


def attention_buffers(problem: Problem, plan: AttentionPlan) -> list[Buffer]:
    """All that the kernel holds: scratch, tiles of operands (two each), and intermediate values."""
    rows, width = plan.query_rows, plan.query_width
    query = Buffer("vmem", (2, rows, width), product_dtype(problem.cache.dtype))
    out = Buffer("vmem", (2, rows, width), "float32")
    slopes = Buffer("vmem", (2, rows, 1), "float32")
    scores = Buffer("vmem", (2 + 2 * plan.head_rows, rows, plan.tile_rows), "float32")
    state = Buffer("vmem", (3, rows, width), "float32")
    exact = problem.cache.dtype != "bfloat16"  # a float32 product is made of bfloat16 ones
    operands = Buffer("vmem", (4 if exact else 1, plan.tile_rows, plan.rows.width), "float32")
    return [*attention_scratch(problem, plan), query, out, slopes, scores, state, operands]


def product_dtype(dtype: str) -> str:
    """What the kernel multiplies in."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


def stored_dtype(dtype: str) -> str:
    """What the kernel reads: it has no float16, so it takes its bits."""
    return "int16" if dtype == "float16" else dtype
