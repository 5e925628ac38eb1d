"""How an append is cut: runs of tokens that copies move, or units of tokens that are rewritten."""

from dataclasses import dataclass

import numpy as np

from ..core.problem import AppendProblem, CacheShape
from .plan import (
    LANES,
    SMEM_BYTES,
    VMEM_BYTES,
    BlockRows,
    Buffer,
    fills_memory_tiles,
    vmem_bytes,
)

AHEAD = 32  # runs whose copies are under way at once
WORDS_PER_ITEM = 4  # a run or a unit in SMEM


@dataclass(frozen=True)
class RunsPlan:
    """Runs of one call: the new tokens of a sequence that go into one block."""

    block_size: int
    num_runs: int  # that always suffice
    ahead: int = AHEAD


def plan_runs(problem: AppendProblem) -> RunsPlan | None:
    """None if tokens cannot be copied one by one, or there are more runs than SMEM holds."""
    size = problem.cache.block_size
    num_runs = num_items(problem, size)
    if not fills_tiles(problem.cache) or num_runs * 4 * WORDS_PER_ITEM > SMEM_BYTES:
        return None
    return RunsPlan(size, num_runs)


def fills_tiles(cache: CacheShape) -> bool:
    """Whether the heads of a token fill whole tiles of its memory, with no other token in them."""
    rows = BlockRows.of(cache)
    packing = 4 // np.dtype(cache.dtype).itemsize
    is_whole = fills_memory_tiles(rows.num_heads) and rows.num_heads % packing == 0
    return is_whole and cache.head_dim % LANES == 0 and rows.group_tokens == 1


def num_items(problem: AppendProblem, tokens_per_item: int) -> int:
    """Items that suffice for any step: those of a sequence start at multiples of their size."""
    tokens, batch = problem.num_tokens, problem.cache.batch
    if not problem.is_packed:
        return batch
    # a sequence's first and last item may be partial
    return min(tokens, tokens // tokens_per_item + 2 * batch)


@dataclass(frozen=True)
class UnitsPlan:
    """Units of one call: aligned groups of tokens of a block, rewritten as one."""

    rows: BlockRows
    unit: BlockRows  # a unit is laid out as a small block
    num_units: int  # that always suffice

    @property
    def num_runs(self) -> int:
        """Runs of adjacent rows that a unit is made of: one per head, or one."""
        return self.rows.num_heads if self.rows.is_head_major else 1

    @property
    def unit_shape(self) -> tuple[int, int]:
        return self.num_runs, self.unit.count // self.num_runs


def plan_units(problem: AppendProblem) -> UnitsPlan | None:
    """Units about as long as a sequence's new tokens; None if none fits."""
    cache, rows = problem.cache, BlockRows.of(problem.cache)
    mean = -(-problem.num_tokens // cache.batch) if problem.is_packed else 1
    best = None
    for unit in rows.units(cache.dtype):
        plan = UnitsPlan(rows, unit, num_items(problem, unit.block_size))
        if vmem_bytes(units_buffers(problem, plan)) > VMEM_BYTES:
            break
        best = plan
        if unit.block_size >= mean:
            break
    return best


def units_buffers(problem: AppendProblem, plan: UnitsPlan) -> list[Buffer]:
    """Old, new and blended keys and values, two of each, and their bits."""
    tiles = (16, plan.unit.count, plan.unit.width)
    return [Buffer("vmem", tiles, problem.cache.dtype)]
