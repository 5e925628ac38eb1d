"""How decode is cut for an SM: the line of tiles that all sequences make, and a CTA's memory."""

from dataclasses import dataclass

from ..core.problem import CacheShape, Problem
from . import device
from .plan import (
    DTYPES,
    HEAD_DIMS,
    MAX_SIMULATED_CTAS,
    SMEM_BYTES,
    WARPGROUP_ROWS,
    Barriers,
    Buffer,
    KeyTiles,
    Union,
    smem_bytes,
    swizzle_bytes,
)

TILE_BYTES = 16384  # of keys, as many of values: what is copied at once
MAX_COPIES = 8  # per tile: a producer keeps the ids of its next blocks in registers
MAX_STAGES = 8
RING_BYTES = 131072  # in flight; half of that is enough
MIN_SHARE = 2  # tiles of a CTA: one for each consumer
MAX_HEADS = 2 * WARPGROUP_ROWS
LANES = 128  # of a warpgroup
# Copies of a tile from which on a producer that knows the ids of two tiles needs more registers.
MANY_COPIES = 5


@dataclass(frozen=True)
class Line:
    """The tiles of all sequences, one after the other, in shares of the CTAs."""

    keys: KeyTiles
    num_ctas: int

    @classmethod
    def of(cls, cache: CacheShape, *, is_simulated: bool = False) -> "Line":
        limit = MAX_SIMULATED_CTAS if is_simulated else device.num_sms()
        return cls(key_tiles(cache), min(limit, device.num_sms()))


@dataclass(frozen=True)
class DecodePlan:
    """Sizes of one decode call.

    Each of `row_groups` warpgroups has its own 64 heads and meets every tile; where one group is
    enough, the consumers take turns with the tiles.
    """

    line: Line
    row_groups: int
    turns: int
    query_rows: int  # heads of a row group, in memory
    query_stages: int
    stages: int
    has_maskless_loop: bool  # a second loop, for tiles that are seen whole
    reads_ahead: bool  # block ids are read one tile ahead
    appends: bool  # writes the step's new tokens too

    @property
    def keys(self) -> KeyTiles:
        return self.line.keys

    @property
    def consumers(self) -> int:
        return self.row_groups * self.turns

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer, and of a consumer; see plan.py."""
        if self.consumers == 1:
            return 232, 248
        return (104, 200) if self.keys.blocks_per_tile >= MANY_COPIES else (72, 216)

    @property
    def rows(self) -> int:
        """Rows of a token's query in memory, all heads and padding."""
        return self.row_groups * self.query_rows


def key_tiles(cache: CacheShape) -> KeyTiles:
    """The tiles that waste the fewest rows, and of those the ones nearest to `TILE_BYTES`."""
    row_bytes = cache.token_bytes // cache.num_kv_heads
    sizes = (64, 128) if cache.head_dim <= 80 else (64,)
    candidates = [KeyTiles.of_rows(cache.block_size, cache.num_kv_heads, rows) for rows in sizes]

    def merit(tiles: KeyTiles) -> tuple[bool, float, int]:
        is_short = tiles.blocks_per_tile <= MAX_COPIES
        return is_short, tiles.efficiency, -abs(tiles.rows * row_bytes - TILE_BYTES)

    return max(candidates, key=merit)


def is_supported(cache: CacheShape, num_query_heads: int) -> bool:
    """Whether decode over such a cache has this kernel, if its plan fits."""
    return (
        cache.dtype in DTYPES
        and cache.head_dim in HEAD_DIMS
        and cache.block_size % 8 == 0
        and num_query_heads <= MAX_HEADS
    )


def plan_of(
    problem: Problem, *, is_simulated: bool = False, appends: bool = False
) -> DecodePlan | None:
    """The sizes for a problem, None where another kernel takes it."""
    cache, heads = problem.cache, problem.num_query_heads
    if problem.is_packed or not is_supported(cache, heads):
        return None
    row_groups = -(-heads // WARPGROUP_ROWS)
    line = Line.of(cache, is_simulated=is_simulated)
    if appends and line.keys.blocks_per_tile >= MANY_COPIES:
        return None  # too much for the producer's registers
    if appends and not line.keys.has_whole_tokens:
        return None  # a CTA would read its tile of a token that another one writes
    tile_bytes = line.keys.rows * (cache.token_bytes // cache.num_kv_heads)
    most = min(MAX_STAGES, max(2, RING_BYTES // (2 * tile_bytes)))
    candidates = (
        DecodePlan(
            line=line,
            row_groups=row_groups,
            # a wide accumulator leaves no room for a second one's exchange
            turns=2 if row_groups == 1 and cache.head_dim <= 128 else 1,
            # a swizzled copy moves groups of 8 rows
            query_rows=-(-heads // 8) * 8 if row_groups == 1 else WARPGROUP_ROWS,
            query_stages=query_stages,
            stages=stages,
            # a window cuts the first tiles too, and a second loop beside so wide an accumulator, or
            # such scores, spills registers
            has_maskless_loop=(
                cache.head_dim < 256
                and not problem.variant.has_alibi
                and problem.variant.left is None
            ),
            reads_ahead=cache.head_dim < 256,  # registers again
            appends=appends,
        )
        for stages in range(most, 1, -1)
        for query_stages in (2, 1)
    )
    fitting = (p for p in candidates if p.stages % p.turns == 0)
    return next((p for p in fitting if smem_bytes(scratch(problem, p)) <= SMEM_BYTES), None)


def partial_width(head_dim: int) -> int:
    """Columns of a partial result in memory: a multiple of what a warpgroup reads at once."""
    return -(-head_dim // LANES) * LANES


def result_name(group: int) -> str:
    """Of the shared memory where a row group's results wait for their copy."""
    return f"result_smem_{group}"


def scratch(problem: Problem, plan: DecodePlan) -> dict[str, Buffer | Union | Barriers]:
    """The shared memory of one CTA of the main kernel, by the names of its parameters."""
    head_dim, dtype, out_dtype = problem.cache.head_dim, problem.cache.dtype, problem.query_dtype
    groups, copies = plan.row_groups, plan.keys.blocks_per_tile
    rows = (WARPGROUP_ROWS, head_dim)
    swizzled = lambda shape, dtype: Buffer(shape, dtype, swizzle_bytes(head_dim, dtype))
    tile = swizzled((plan.stages, plan.keys.rows, head_dim), dtype)
    parts = {
        "query_smem": swizzled((plan.query_stages, groups, *rows), dtype),
        "key_smem": tile,
        "value_smem": tile,
        "lse_smem": Buffer((groups, WARPGROUP_ROWS), "float32"),
        "query_full": Barriers(plan.query_stages, groups),
        "query_empty": Barriers(plan.query_stages, plan.consumers),
        "key_full": Barriers(plan.stages, copies),
        "key_empty": Barriers(plan.stages, groups),
        "value_full": Barriers(plan.stages, copies),
        "value_empty": Barriers(plan.stages, groups),
        "padding_full": Barriers(1, plan.stages),
        "tail_clear": Barriers(1, groups),
    }
    for group in range(groups):  # each its own, for one may store a piece while another does not
        parts[result_name(group)] = Union(swizzled(rows, out_dtype), swizzled(rows, "float32"))
    if plan.appends:
        parts |= {
            "new_smem": Buffer((2, problem.cache.num_kv_heads, head_dim), dtype),
            "new_full": Barriers(1, 2),
        }
    if plan.turns > 1:
        parts |= {
            "exchange_smem": swizzled(rows, "float32"),
            "statistics_smem": Buffer((2, WARPGROUP_ROWS), "float32"),
            "exchange_full": Barriers(1),
            "exchange_empty": Barriers(1),
        }
    return parts
