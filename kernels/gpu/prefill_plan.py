"""How prefill is cut for an SM: query tiles of one kv head's heads, and a CTA's memory."""

from dataclasses import dataclass
from math import gcd

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

CONSUMERS = 2  # warpgroups, each with WARPGROUP_ROWS query rows of one head
ROW_GROUP = 8  # rows that a swizzled copy moves at once: query tiles start at a multiple
KEY_ROWS, FEW_KEY_ROWS = 128, 64  # of a tile; few where registers would not hold more scores
# Slots of keys and of values, the most that fit.  One of values is in use for longer than one of
# keys, so an odd one is theirs; needed a step after their keys, they do with one where two do not
# fit.
STAGES = ((4, 4), (3, 4), (3, 3), (2, 3), (2, 2), (2, 1))
# Query tokens per sequence on average: fewer leave most rows of a tile empty.  The other kernel
# multiplies with the keys of all kv heads at once, so the fewer those are the sooner it does less.
MIN_TOKENS, MAX_MIN_TOKENS, MIN_TOKENS_TIMES_HEADS = 16, 64, 128
MAX_IDS, MAX_WIDE_IDS = 4, 2  # block ids that a copying warp reads ahead, of few registers
# A wider head is accumulated in up to 128 registers per thread.  Tiles are of 64 tokens then, so
# that two fit (not of 80: a product over tokens takes multiples of 64), results leave in strips,
# and the consumers take what copies can do without.  So it spills nothing and keeps the overlap of
# narrower heads: both products of a step issued together, a loop without masks.
MAX_NARROW = 128
OUT_COLUMNS = (256, 192, 128, 64)  # of a strip
# See plan.py: what all warpgroups hold must not pass what the launch gave.
PRODUCER_REGISTERS, WIDE_PRODUCER_REGISTERS = 40, 24
CONSUMER_REGISTERS, WIDE_CONSUMER_REGISTERS = 232, 240


@dataclass(frozen=True)
class Cut:
    """What a list of query tiles depends on besides lengths: how queries and keys are cut."""

    keys: KeyTiles  # of one head: a row is a token; its blocks are slices of the cache's
    tile_tokens: int
    num_tokens: int  # packed, padding included

    def num_tiles(self, batch: int) -> int:
        """Tiles that always suffice: each sequence, and the padding, may begin within a row group
        and leave its last tile partly empty."""
        waste = self.tile_tokens + ROW_GROUP - 2
        return (self.num_tokens + (batch + 1) * waste) // self.tile_tokens


@dataclass(frozen=True)
class PrefillPlan:
    """Sizes of one prefill call.

    Blocks of any size are read in slices that divide a tile: whole blocks of 16 or 128 tokens, of
    48 slices of 16, of 40 or 72 slices of 8.
    An item is one tile of query tokens for some heads of one kv head: two heads, a consumer each,
    or one head and twice the tokens where a kv head has an odd number.
    """

    cut: Cut
    heads_per_item: int
    parts: int  # items per query tile
    key_stages: int
    value_stages: int
    copy_warps: int  # that bring keys; as many others bring values
    has_maskless_loop: bool  # a loop without masks, for tiles that every row sees whole
    has_swizzled_out: bool  # whole tiles leave a view of the buffer without bank conflicts
    is_wide: bool  # the accumulator leaves few registers, and the tiles little shared memory
    out_columns: int  # of a result that leave at once; all of them unless it is wide
    num_ctas: int

    @property
    def keys(self) -> KeyTiles:
        return self.cut.keys

    def slices_per_block(self, block_size: int) -> int:
        return block_size // self.keys.block_size

    @property
    def tile_tokens(self) -> int:
        return self.cut.tile_tokens

    @property
    def producer_registers(self) -> int:
        return WIDE_PRODUCER_REGISTERS if self.is_wide else PRODUCER_REGISTERS

    @property
    def consumer_registers(self) -> int:
        return WIDE_CONSUMER_REGISTERS if self.is_wide else CONSUMER_REGISTERS

    @property
    def copies_per_warp(self) -> int:
        return self.keys.blocks_per_tile // self.copy_warps

    @property
    def reads_ahead(self) -> bool:
        """Block ids are read one tile ahead."""
        return self.copies_per_warp <= (MAX_WIDE_IDS if self.is_wide else MAX_IDS)


def cut_of(
    cache: CacheShape, num_query_heads: int, num_tokens: int, *, has_alibi: bool = False
) -> Cut | None:
    """How prefill over such a cache is cut, None where another kernel takes it."""
    has_few = has_alibi or cache.head_dim > MAX_NARROW
    rows = FEW_KEY_ROWS if has_few else KEY_ROWS
    keys = KeyTiles.of_rows(gcd(cache.block_size, rows), 1, rows)
    is_supported = (
        cache.dtype in DTYPES
        and cache.head_dim in HEAD_DIMS
        and cache.block_size % 8 == 0
        and num_tokens >= max(WARPGROUP_ROWS, _min_tokens(cache.num_kv_heads) * cache.batch)
    )
    if not is_supported:
        return None
    heads = _heads_per_item(num_query_heads // cache.num_kv_heads)
    return Cut(keys, CONSUMERS * WARPGROUP_ROWS // heads, num_tokens)


def _min_tokens(num_kv_heads: int) -> int:
    """Per sequence, on average."""
    wanted = -(-MIN_TOKENS_TIMES_HEADS // num_kv_heads)
    return min(max(wanted, MIN_TOKENS), MAX_MIN_TOKENS)


def _heads_per_item(group: int) -> int:
    return 1 if group % 2 else 2


def plan_of(problem: Problem, *, is_simulated: bool = False) -> PrefillPlan | None:
    """The sizes for a problem, None where another kernel takes it."""
    if not problem.is_packed:
        return None
    cut = cut_of(
        problem.cache,
        problem.num_query_heads,
        problem.num_tokens,
        has_alibi=problem.variant.has_alibi,
    )
    if cut is None:
        return None
    head_dim = problem.cache.head_dim
    is_wide = head_dim > MAX_NARROW
    columns = [n for n in OUT_COLUMNS if head_dim % n == 0] if is_wide else [head_dim]
    heads = _heads_per_item(problem.group)
    parts = problem.num_query_heads // heads
    limit = MAX_SIMULATED_CTAS if is_simulated else device.num_sms()
    candidates = (
        PrefillPlan(
            cut=cut,
            heads_per_item=heads,
            parts=parts,
            key_stages=key_stages,
            value_stages=value_stages,
            copy_warps=gcd(2, cut.keys.blocks_per_tile),
            # beside the scores of ALiBi it spills registers
            has_maskless_loop=not problem.variant.has_alibi,
            # the interpreter takes two views of a buffer for one place that warpgroups fight for
            has_swizzled_out=not is_simulated,
            is_wide=is_wide,
            out_columns=out_columns,
            num_ctas=min(parts * cut.num_tiles(problem.cache.batch), limit),
        )
        for key_stages, value_stages in STAGES
        for out_columns in columns
    )
    return next((p for p in candidates if smem_bytes(scratch(problem, p)) <= SMEM_BYTES), None)


def scratch(problem: Problem, plan: PrefillPlan) -> dict[str, Buffer | Union | Barriers]:
    """The shared memory of one CTA, by the names of the kernel's parameters."""
    head_dim, dtype, out_dtype = problem.cache.head_dim, problem.cache.dtype, problem.query_dtype
    rows = (CONSUMERS, WARPGROUP_ROWS)
    swizzled = lambda shape, dtype: Buffer(shape, dtype, swizzle_bytes(shape[-1], dtype))
    tiles = lambda stages: swizzled((stages, plan.keys.rows, head_dim), dtype)
    stages = plan.key_stages + plan.value_stages
    copies, out = plan.keys.blocks_per_tile, (*rows, plan.out_columns)
    plain = Buffer(out, out_dtype)
    return {
        "query_smem": swizzled((*rows, head_dim), dtype),
        "key_smem": tiles(plan.key_stages),
        "value_smem": tiles(plan.value_stages),
        "out_smem": Union(swizzled(out, out_dtype), plain) if plan.has_swizzled_out else plain,
        "lse_smem": Buffer(rows, "float32"),
        # of the keys, then of the values; fewer arrays of barriers take fewer registers
        "full": Barriers(stages, copies),
        "empty": Barriers(stages, CONSUMERS),
        # what a consumer waits for besides: its query, its turn, the other one
        "signals": Barriers(3 * CONSUMERS),
        "query_empty": Barriers(CONSUMERS),
    }
