"""How a prefill is cut: rows of queries, tiles and parts of keys, and the memory they take.

A program of the prefill kernel has a tile of query tokens.  Its rows, (token, query head of the
group), lie in `row_blocks` blocks of `ITEM_ROWS` per kv head; an item is one such block against
keys of its head.  Items are ordered by block, then head, so that a group of them is a stripe of
tokens.  Keys come in tiles of whole parts: a tile that every query sees is taken in whole, others
part by part, by the stripes that see the part.  While a group takes a whole tile in, one share of
another tile is made ready.  No Pallas import.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..core.problem import Problem
from ..core.schedule import num_query_tiles
from .plan import LANES, SMEM_BYTES, TABLE_WINDOW, Buffer, min_rows, round_up, vmem_bytes

WIDE_UNIT = 256  # a matrix unit of 256 x 256
ITEM_ROWS = WIDE_UNIT  # queries of an item fill its width
PART_KEYS = 256  # keys of a part
TILE_PARTS = 4  # parts of a tile, where memory allows
MAX_ITEMS = 64  # of a program
OPERAND_ITEMS = 32  # of a tile of operands: XLA takes long to compile larger transposes
MIN_ITEMS = 2  # weights of an item are computed beside the products of the last one's
GROUP_ITEMS = 8  # of a group at a whole tile: what compiles in time
PART_GROUP_ITEMS = 16  # of a group at a part
LIMITS = 3  # of groups at a part: this one's, the next one's, and those of one that is not masked
NO_LIMITS = LIMITS - 1  # a slot of limits that mask nothing
MIN_TOKENS = 64  # query tokens per sequence, on average, below which items are mostly empty
AHEAD = 3  # scores are computed so many items before their softmax, where there are as many
KEY_SLOTS = 3  # tiles of prepared keys: this visit's, the next one's, a share of the one after
ACC_ROWS = 16  # of a bfloat16 register: rows of ones below the values, whose product is the sum
SUBLANES = 8
SCALAR_BYTES = 52  # of scalar memory, for what a program is told


class Chip(NamedTuple):
    """What a plan depends on of the chip it is for."""

    vmem_bytes: int
    is_wide: bool  # a matrix unit of 256 x 256


@dataclass(frozen=True)
class PrefillPlan:
    """Tiles of one prefill call."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    row_blocks: int
    item_rows: int
    item_tokens: int
    part_keys: int
    num_parts: int
    num_query_tiles: int
    sums_on_matrix_unit: bool
    vmem_limit: int

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a program."""
        return self.item_tokens * self.row_blocks

    @property
    def num_items(self) -> int:
        return self.num_kv_heads * self.row_blocks

    @property
    def operand_blocks(self) -> int:
        """Row blocks of a tile of queries and results as operands, which XLA transposes."""
        return min(self.row_blocks, max(1, OPERAND_ITEMS // self.num_kv_heads))

    @property
    def operand_tiles(self) -> int:
        """Of a program."""
        return self.row_blocks // self.operand_blocks

    @property
    def operand_items(self) -> int:
        return self.operand_blocks * self.num_kv_heads

    @property
    def group_items(self) -> int:
        """Items of a group at a whole tile, which has a share of LANES keys for each, or more."""
        least = self.num_items * LANES // self.tile_keys
        return min(self.num_items, max(GROUP_ITEMS, least))

    @property
    def part_group_items(self) -> int:
        return min(self.num_items, PART_GROUP_ITEMS)

    @property
    def part_groups(self) -> int:
        return self.num_items // self.part_group_items

    @property
    def part_group_blocks(self) -> int:
        """Row blocks that a group at a part has items of."""
        return max(1, self.part_group_items // self.num_kv_heads)

    @property
    def part_group_tokens(self) -> int:
        """Query tokens that a group at a part has rows of."""
        return self.item_tokens * self.part_group_blocks

    @property
    def part_shares(self) -> int:
        """Shares that are made ready beside a masked group at a part."""
        return max(1, self.part_group_items // self.group_items)

    @property
    def ahead(self) -> int:
        """Scores are computed so many items before their softmax."""
        return min(AHEAD, self.group_items - 1)

    @property
    def num_shares(self) -> int:
        """Shares of a tile, one for each group."""
        return self.num_items // self.group_items

    @property
    def key_lead(self) -> int:
        """Shares that keys are ahead of values: where there is one share, it comes too late."""
        return min(1, self.num_shares - 1)

    @property
    def tile_keys(self) -> int:
        return self.part_keys * self.num_parts

    @property
    def share_keys(self) -> int:
        return self.tile_keys // self.num_shares

    @property
    def share_rows(self) -> int:
        """(token, kv head) rows of a share."""
        return self.share_keys * self.num_kv_heads

    @property
    def share_blocks(self) -> int:
        return self.share_keys // self.block_size

    @property
    def tile_blocks(self) -> int:
        return self.share_blocks * self.num_shares

    @property
    def resets_values(self) -> bool:
        """Whether a program's values are set to 0 behind it; else the next one's first decay is.

        That saves stores, and costs a selection per step.  Rows that see no key keep them; of
        those no result is kept, since a token sees itself.
        """
        return not self.sums_on_matrix_unit

    @property
    def value_rows(self) -> int:
        """Rows of transposed values, those of ones included."""
        return self.head_dim + (ACC_ROWS if self.sums_on_matrix_unit else 0)


def plan_prefill(problem: Problem, chip: Chip) -> PrefillPlan | None:
    """The largest tiles that fit; None if the problem is none of this kernel."""
    if not _suits(problem):
        return None
    for num_parts in (TILE_PARTS >> shift for shift in range(TILE_PARTS.bit_length())):
        for row_blocks in _row_blocks(problem):
            plan = _make(problem, chip, row_blocks, num_parts)
            if plan.share_keys % problem.cache.block_size:
                continue
            is_small = plan.tile_blocks <= TABLE_WINDOW and TABLE_WINDOW % plan.tile_blocks == 0
            is_small &= plan.num_query_tiles * SCALAR_BYTES <= SMEM_BYTES
            if is_small and vmem_bytes(prefill_buffers(problem, plan)) <= plan.vmem_limit:
                return plan
    return None


def _suits(problem: Problem) -> bool:
    cache = problem.cache
    return (
        problem.is_packed
        and cache.dtype == "bfloat16"
        and cache.head_dim == LANES
        and cache.num_kv_heads in (1, 2, 4, 8)
        and problem.group <= ITEM_ROWS // 2
        and PART_KEYS % cache.block_size == 0
        and cache.rows_per_block % min_rows(cache.dtype) == 0
        and problem.num_tokens >= MIN_TOKENS * cache.batch
    )


def _row_blocks(problem: Problem) -> list[int]:
    """Row blocks of a tile, best first: no more than an average sequence fills."""
    mean = -(-problem.num_tokens // problem.cache.batch)
    heads = problem.cache.num_kv_heads
    least = -(-MIN_ITEMS // heads)
    most = max(least, MAX_ITEMS // heads)
    while most > least and most // 2 * (ITEM_ROWS // problem.group) >= mean:
        most //= 2
    return [most >> shift for shift in range(most.bit_length()) if most >> shift >= least]


def _make(problem: Problem, chip: Chip, row_blocks: int, num_parts: int) -> PrefillPlan:
    cache, item_tokens = problem.cache, ITEM_ROWS // problem.group
    return PrefillPlan(
        num_kv_heads=cache.num_kv_heads,
        group=problem.group,
        head_dim=cache.head_dim,
        block_size=cache.block_size,
        row_blocks=row_blocks,
        item_rows=ITEM_ROWS,
        item_tokens=item_tokens,
        part_keys=PART_KEYS,
        num_parts=num_parts,
        num_query_tiles=num_query_tiles(
            problem.num_tokens, cache.batch, item_tokens * row_blocks, problem.is_packed
        ),
        sums_on_matrix_unit=chip.is_wide,
        vmem_limit=chip.vmem_bytes * 15 // 16,
    )


def prefill_scratch(plan: PrefillPlan) -> list[Buffer]:
    """Scratch of the kernel, in the order that `prefill._kernel` takes it apart."""
    rows, keys, items = plan.item_rows, plan.tile_keys, plan.num_items
    raw = Buffer("vmem", (2, plan.num_shares * plan.share_rows, plan.head_dim), "bfloat16")
    limits = LIMITS, plan.part_group_blocks, plan.part_keys, rows
    row = Buffer("vmem", (SUBLANES, rows), "float32")
    # words of two rows: as bfloat16, registers would be stored and loaded by halves
    key_part = plan.num_kv_heads, plan.part_keys // 2, plan.head_dim
    values = 2, keys // LANES, plan.num_kv_heads, plan.value_rows // 2, LANES
    return [
        *[Buffer("vmem", (keys, rows), "float32")] * (plan.ahead + 1),
        *[row] * (plan.ahead + 1),
        *[Buffer("vmem", (keys, rows), "bfloat16")] * 2,
        row,
        Buffer("vmem", (items, SUBLANES, rows), "float32"),
        Buffer("vmem", (items, SUBLANES, rows), "float32"),
        Buffer("vmem", (items, plan.value_rows, rows), "float32"),
        Buffer("vmem", limits, "float32"),
        Buffer("vmem", (KEY_SLOTS, plan.num_parts, *key_part), "int32"),
        Buffer("vmem", values, "int32"),
        raw,
        raw,
        Buffer("smem", (2, TABLE_WINDOW), "int32"),
        *[Buffer("semaphore", (2, plan.num_shares))] * 2,
        Buffer("semaphore", (2,)),
    ]


def prefill_buffers(problem: Problem, plan: PrefillPlan) -> list[Buffer]:
    """All that the kernel holds: scratch, tiles of operands (two each), and spilled registers."""
    items, rows = plan.num_items, plan.item_rows
    query = Buffer("vmem", (2, items, plan.head_dim, rows), "bfloat16")
    out = Buffer("vmem", (2, items, plan.head_dim, rows), out_dtype(problem))
    lse = Buffer("vmem", (2, round_up(items, SUBLANES), rows), "float32")
    # about one register is spilled per register of scores
    spills = Buffer("vmem", (plan.group_items, plan.tile_keys, rows), "float32")
    return [*prefill_scratch(plan), query, out, lse, spills]


def out_dtype(problem: Problem) -> str:
    """What the kernel writes: it has no float16."""
    return "float32" if problem.query_dtype == "float16" else problem.query_dtype
