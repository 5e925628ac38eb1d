"""How a decode step is cut: tiles of blocks, items of a step, chunks of a product, programs.

The times are the compiler's own schedule (`python -m tools.tpu_schedule`).  What limits decides the
sizes: a tile must be long enough to hide the latency of a chain of products, reductions and
exponentials, short enough not to be mostly empty, and three sets of it must fit VMEM.  On v6e half
the tile takes 15 % longer with 32/8 and 64/8 heads, 9 % with 8/1; with 32/8 twice the tile takes
9 % less, but longer to compile than is allowed (9 s; 8).
No Pallas import.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..core.problem import Problem
from .plan import LANES, TABLE_WINDOW, Buffer, round_up, vmem_bytes

SETS = 3  # of every buffer: one in use, one on its way, one being filled
UNIT_ROWS = 16  # (token, kv head) rows of a unit, one register: pools and tiles are seen as units
STATS = 5  # of an item: decay, maximum, sum, maximum of each lane, output
RUN = 4  # blocks of a merged copy
SMALL_BLOCK = 8 << 10  # bytes; copies of blocks no larger than this take longer to start than to do
MAX_TILE_ROWS = 8192  # (token, kv head) rows of a tile
MAX_TILE_TOKENS = 4096
STEP_ROWS = 8192  # rows of a step below which latencies show
SMALL_STEP_ROWS = 4096  # the same where copies limit
MANY_HEADS = 32  # query heads, more of which take too many registers
CHUNK_ROWS = 256  # (token, kv head) rows of a product
# the same where copies limit, and with many query heads: sums pass through memory half as often
LONG_CHUNK_ROWS = 512
MAX_ITEMS = 8  # of a step
QUERY_BYTES = 2 << 20  # queries, and new tokens, of a program
COMPILER_BYTES = 2 << 20  # left to the compiler


@dataclass(frozen=True)
class DecodePlan:
    """Sizes of one decode call."""

    rows_per_program: int  # of the work list
    num_programs: int
    num_heads: int  # query heads, filled up to whole registers
    num_kv_heads: int
    head_dim: int
    block_size: int
    blocks_per_tile: int
    items_per_step: int
    chunk_rows: int  # rows of one product
    columns: int  # of the table, in whole slices
    run: int  # blocks of a merged copy; 1: none is merged
    spread: float  # share of a step over which its copies are started
    has_one_tile: bool  # no row has more; a step of several items takes one of each row
    is_one_step: bool  # there are never more items than a step takes
    appends: bool  # new tokens are written, too

    @property
    def block_rows(self) -> int:
        return self.block_size * self.num_kv_heads

    @property
    def block_units(self) -> int:
        return self.block_rows // UNIT_ROWS

    @property
    def token_units(self) -> int:
        """Units that a token is part of."""
        return max(1, self.num_kv_heads // UNIT_ROWS)

    @property
    def tile_tokens(self) -> int:
        return self.blocks_per_tile * self.block_size

    @property
    def tile_rows(self) -> int:
        """(token, kv head) rows of a tile."""
        return self.blocks_per_tile * self.block_rows

    @property
    def step_rows(self) -> int:
        return self.items_per_step * self.tile_rows

    @property
    def tiles(self) -> int:
        """Tiles of a row of the table."""
        return self.columns // self.blocks_per_tile

    @property
    def slice_entries(self) -> int:
        """Table entries fetched for a tile."""
        return max(TABLE_WINDOW, self.blocks_per_tile)

    @property
    def slices(self) -> int:
        """Table entries of a step: for its keys, then for its values."""
        return 2 * self.items_per_step * self.slice_entries

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(item, first row) of every product of a step."""
        rows = range(0, self.tile_rows, self.chunk_rows)
        return [(u, row) for u in range(self.items_per_step) for row in rows]

    @property
    def passes_sums(self) -> bool:
        """Whether sums go from chunk to chunk through memory: many heads leave no registers."""
        return self.num_heads > MANY_HEADS

    @property
    def seen_chunks(self) -> int:
        """Exponentials wait for scores so many chunks earlier."""
        return 1 if self.passes_sums else 2

    @property
    def num_passed(self) -> int:
        """Arrays that a step's chunks pass on through memory."""
        return 4 if self.passes_sums else 1

    @property
    def step_units(self) -> int:
        """Units of a step; in a buffer follows one of zeros, that orders compute after copies."""
        return self.step_rows // UNIT_ROWS


def table_columns(problem: Problem) -> int:
    """Blocks of a sequence that its last token can see."""
    cache, left = problem.cache, problem.variant.left
    if left is None:
        return cache.max_blocks_per_seq
    return min(cache.max_blocks_per_seq, (left + 2 * cache.block_size - 1) // cache.block_size)


def first_column(problem: Problem, lengths: Any) -> Any:
    """Of those blocks, which may be fewer than the table's columns."""
    start, _ = problem.variant.range_of_last(lengths)
    return start // problem.cache.block_size


def seen(problem: Problem, lengths: Any) -> tuple[Any, Any]:
    """Keys [start, stop) that each sequence's last token sees, counted from the first column."""
    start, stop = problem.variant.range_of_last(lengths)
    if table_columns(problem) == problem.cache.max_blocks_per_seq:
        return start, stop
    before = first_column(problem, lengths) * problem.cache.block_size
    return start - before, stop - before


def plan_decode(problem: Problem, vmem: int, *, appends: bool = False) -> DecodePlan | None:
    """The best plan whose buffers fit `vmem` bytes; None if the decode kernel has none."""
    cache = problem.cache
    if problem.is_packed or cache.dtype != "bfloat16" or cache.head_dim != LANES:
        return None
    if LANES % cache.num_kv_heads or problem.num_query_heads > LANES:
        return None
    if cache.rows_per_block % UNIT_ROWS:
        return None
    for plan in _plans(problem, appends):
        if vmem_bytes(decode_buffers(problem, plan)) + COMPILER_BYTES <= vmem:
            return plan
    return None


def _plans(problem: Problem, appends: bool) -> Iterator[DecodePlan]:
    """Plans from the largest tile that is not mostly empty, best first."""
    cache, columns = problem.cache, table_columns(problem)
    heads = round_up(problem.num_query_heads, 8)
    token_rows = max(UNIT_ROWS, cache.num_kv_heads)
    row_bytes = (heads + 2 * token_rows * appends) * cache.head_dim * 2
    rows, programs = _rows_per_program(cache.batch, row_bytes)
    is_small = cache.rows_per_block * cache.head_dim * 2 <= SMALL_BLOCK
    step_rows = SMALL_STEP_ROWS if is_small else STEP_ROWS
    is_dense = is_small or heads > MANY_HEADS  # no part of a step has cycles to spare
    blocks = _most_blocks(cache.rows_per_block, cache.block_size, columns)
    while blocks:
        tile_rows = blocks * cache.rows_per_block
        chunk = _chunk_rows(tile_rows, is_long=is_dense)
        most_items = cache.batch * -(-columns // blocks)
        has_one_tile = columns <= blocks
        most = min(MAX_ITEMS, step_rows // tile_rows, most_items) if has_one_tile else 1
        items = max(1, most)
        while items and chunk is not None:
            yield DecodePlan(
                rows_per_program=rows,
                num_programs=programs,
                num_heads=heads,
                num_kv_heads=cache.num_kv_heads,
                head_dim=cache.head_dim,
                block_size=cache.block_size,
                blocks_per_tile=blocks,
                items_per_step=items,
                chunk_rows=chunk,
                columns=round_up(columns, max(TABLE_WINDOW, blocks)),
                run=RUN if is_small and blocks % RUN == 0 else 1,
                spread=1.0 if is_dense else 0.5,
                has_one_tile=has_one_tile,
                is_one_step=most_items <= items,
                appends=appends,
            )
            items //= 2
        blocks //= 2


def _chunk_rows(tile_rows: int, *, is_long: bool) -> int | None:
    """Rows of a product; None if the tile has no whole number of them."""
    most = LONG_CHUNK_ROWS if is_long else CHUNK_ROWS
    return next((n for n in (most, CHUNK_ROWS, LANES) if tile_rows % n == 0), None)


def _rows_per_program(batch: int, row_bytes: int) -> tuple[int, int]:
    """Rows of a program, and programs: as few as hold all queries and new tokens."""
    programs = -(-batch // max(8, QUERY_BYTES // row_bytes))
    return (batch, 1) if programs == 1 else (round_up(-(-batch // programs), 8), programs)


def _most_blocks(block_rows: int, block_size: int, columns: int) -> int:
    """Blocks of the largest tile: a power of two."""
    blocks = 1
    while 2 * blocks * block_rows <= MAX_TILE_ROWS and 2 * blocks * block_size <= MAX_TILE_TOKENS:
        if blocks >= columns and blocks * block_rows % LANES == 0:
            break
        blocks *= 2
    return blocks


def decode_scratch(plan: DecodePlan) -> list[Buffer]:
    """Scratch of the kernel, in order: SETS each of keys, values, scores, weights, states, tables,
    what chunks pass on, then the semaphores of keys, values and tables; units on their way back,
    and a semaphore."""
    heads, step_rows = plan.num_heads, plan.step_rows
    tile = Buffer("vmem", (plan.step_units + 1, UNIT_ROWS, plan.head_dim), "bfloat16")
    each = [
        tile,
        tile,
        Buffer("vmem", (heads, step_rows), "float32"),
        Buffer("vmem", (heads, step_rows), "bfloat16"),
        Buffer("vmem", (plan.items_per_step, STATS, heads, LANES), "float32"),
        Buffer("smem", (plan.slices,), "int32"),
    ]
    semaphores = [Buffer("semaphore", (SETS,))] * 3
    num_units = 2 * plan.items_per_step * plan.token_units
    units = Buffer("vmem", (num_units, UNIT_ROWS, plan.head_dim), "bfloat16")
    new = [units, Buffer("semaphore", (1,))] if plan.appends else []
    passed = [Buffer("vmem", (2, heads, LANES), "float32")] * plan.num_passed
    return [*(buffer for buffer in each for _ in range(SETS)), *passed, *semaphores, *new]


def decode_buffers(problem: Problem, plan: DecodePlan) -> list[Buffer]:
    """All that the kernel holds: scratch, and two each of the operands of a program."""
    rows, heads = plan.rows_per_program, plan.num_heads
    new = Buffer("vmem", (2, rows, 2, plan.token_units * UNIT_ROWS, plan.head_dim), "bfloat16")
    return [
        *decode_scratch(plan),
        Buffer("vmem", (2, rows, heads, plan.head_dim), "bfloat16"),
        Buffer("vmem", (2, rows, heads, plan.head_dim), problem.query_dtype),
        Buffer("vmem", (2, rows, LANES), "float32"),
        Buffer("vmem", (2, heads, LANES), "float32"),
        *([new] if plan.appends else []),
    ]


def vmem_limit(problem: Problem, plan: DecodePlan) -> int:
    """What the compiler may take in all."""
    return vmem_bytes(decode_buffers(problem, plan)) + COMPILER_BYTES
