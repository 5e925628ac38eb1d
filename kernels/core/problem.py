"""What is asked: the static facts of one call, hashable, so that plans and programs key on them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .variant import Variant


class Cost(NamedTuple):
    """Work of a call if every sequence fills its table: what XLA's scheduler is told."""

    flops: int
    bytes_accessed: int
    transcendentals: int


@dataclass(frozen=True)
class CacheShape:
    """The pools and the table.

    Kernels see pools as (num_layers, num_blocks, block_size, num_kv_heads, head_dim), also those of
    a single layer.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    batch: int
    max_blocks_per_seq: int
    has_packed_pools: bool = False  # stored as rows of 128 lanes; kernels see them as above

    @property
    def pool_shape(self) -> tuple[int, int, int, int, int]:
        """Of the pools as kernels see them."""
        return (
            self.num_layers,
            self.num_blocks,
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
        )

    @property
    def rows_per_block(self) -> int:
        """Rows of a block seen as a (token, head) by head_dim matrix."""
        return self.block_size * self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys (or values)."""
        return self.num_kv_heads * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def max_tokens(self) -> int:
        """Tokens that all table rows together can name."""
        return self.batch * self.max_blocks_per_seq * self.block_size


@dataclass(frozen=True)
class Problem:
    """One attention call."""

    cache: CacheShape
    num_tokens: int  # packed query tokens, padding included
    num_query_heads: int
    query_dtype: str
    is_packed: bool  # False: one query token per sequence, no query_start_loc
    variant: Variant

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_query_heads // self.cache.num_kv_heads

    @property
    def cost(self) -> Cost:
        # every query token sees its sequence's whole row at most
        pairs = self.num_tokens * self.cache.max_tokens // self.cache.batch * self.num_query_heads
        query = self.num_tokens * self.num_query_heads * self.cache.head_dim
        return Cost(
            flops=4 * pairs * self.cache.head_dim,
            bytes_accessed=2 * self.cache.max_tokens * self.cache.token_bytes
            + 2 * query * np.dtype(self.query_dtype).itemsize,
            transcendentals=pairs,
        )


@dataclass(frozen=True)
class AppendProblem:
    """One append call."""

    cache: CacheShape
    num_tokens: int  # packed new tokens, padding included
    is_packed: bool

    @property
    def cost(self) -> Cost:
        # keys and values, read once and written once
        return Cost(0, 4 * self.num_tokens * self.cache.token_bytes, 0)
