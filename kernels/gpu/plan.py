"""How a problem is cut for a Hopper SM: tiles of rows, rings of stages, and what they weigh.

One description of the scratch both allocates it (`blocks.allocate`) and weighs it (`smem_bytes`),
so that a choice made here cannot drift from the kernel.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..core.problem import CacheShape, Problem
from ..core.schedule import QueryTiles, num_query_tiles
from ..core.variant import Variant
from . import device

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")
QUERY_DTYPES = (*DTYPES, "float32")
WARPGROUP_ROWS = 64  # query rows of a warpgroup: the M of a wgmma
SMEM_BYTES = 232448  # what one CTA may have on Hopper
SMEM_ALIGNMENT = 1024  # of each buffer
MAX_SIMULATED_CTAS = 4  # the interpreter runs CTAs one after the other
MAX_STAGES = 4
INT32_MAX = 2**31 - 1
# After the launch, registers move from the producer to the consumers.  What all warpgroups hold
# must not pass what the launch gave, 65536 / 128 per thread, or they wait for ever.
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = {1: 248, 2: 232}


def divide(x: Any, n: int) -> Any:
    """x // n of non-negative int32."""
    if n & (n - 1) == 0:
        return lax.shift_right_logical(x, jnp.full_like(x, n.bit_length() - 1)) if n > 1 else x
    return lax.div(x, jnp.full_like(x, n))


def remainder(x: Any, n: int) -> Any:
    """x % n of non-negative int32."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.full_like(x, n))


@dataclass(frozen=True)
class KeyTiles:
    """How a sequence's (token, head) rows are cut into tiles of `rows`.

    Either a tile holds `blocks_per_tile` whole blocks, and then rows that no block fills, or a
    block spans `tiles_per_block` tiles, the last of them filled up with rows of zeros.
    """

    block_size: int
    num_heads: int
    rows: int
    blocks_per_tile: int = 1
    tiles_per_block: int = 1

    @classmethod
    def of_rows(cls, block_size: int, num_heads: int, rows: int) -> "KeyTiles":
        block_rows = block_size * num_heads
        return cls(
            block_size, num_heads, rows, max(1, rows // block_rows), max(1, -(-block_rows // rows))
        )

    @property
    def block_rows(self) -> int:
        return self.block_size * self.num_heads

    @property
    def copy_rows(self) -> int:
        """Rows that one copy brings."""
        return min(self.block_rows, self.rows)

    @property
    def padding_rows(self) -> int:
        """Rows at the end of a tile that no copy ever fills."""
        return self.rows - self.blocks_per_tile * self.copy_rows

    @property
    def is_exact(self) -> bool:
        """Every row of every tile belongs to a slot."""
        return self.blocks_per_tile * self.block_rows == self.tiles_per_block * self.rows

    @property
    def has_whole_tokens(self) -> bool:
        """No token has rows in two tiles."""
        return self.tiles_per_block == 1 or self.rows % self.num_heads == 0

    @property
    def heads_repeat(self) -> bool:
        """Row r is of the same head in every tile, and what a thread has is of few of them."""
        is_power = self.num_heads & (self.num_heads - 1) == 0
        return self.is_exact and is_power and self.num_heads <= self.rows

    @property
    def efficiency(self) -> float:
        """Share of the rows that belong to a slot."""
        return self.blocks_per_tile * self.block_rows / (self.tiles_per_block * self.rows)

    def origin(self, tile: Any) -> tuple[Any, Any]:
        """(token, row): row r of the tile is head `(row + r) % num_heads` of the token
        `token + (row + r) // num_heads`."""
        if self.tiles_per_block == 1:
            return tile * (self.blocks_per_tile * self.block_size), 0
        block = lax.div(tile, jnp.int32(self.tiles_per_block))
        within = lax.rem(tile, jnp.int32(self.tiles_per_block))
        return block * self.block_size, within * self.rows

    def whole_before(self, token: Any) -> Any:
        """The number of tiles, from the first, whose rows all belong to tokens before this one."""
        if self.tiles_per_block == 1:
            return divide(token, self.blocks_per_tile * self.block_size)
        within = divide(remainder(token, self.block_size) * self.num_heads, self.rows)
        return divide(token, self.block_size) * self.tiles_per_block + within

    def covering(self, stop: Any) -> Any:
        """The number of tiles, from the first, that hold every row of the tokens before `stop`."""
        if self.tiles_per_block == 1:
            tokens = self.blocks_per_tile * self.block_size
            return divide(stop + (tokens - 1), tokens)
        last = jnp.maximum(stop - 1, 0)
        row = remainder(last, self.block_size) * self.num_heads + (self.num_heads - 1)
        tiles = divide(last, self.block_size) * self.tiles_per_block + divide(row, self.rows) + 1
        return jnp.where(stop > 0, tiles, 0)


@dataclass(frozen=True)
class Plan:
    """Sizes of one attention call.

    A work item is one tile of query tokens, or a part of its rows where it has more than the
    consumers take at once.
    """

    keys: KeyTiles
    tile_tokens: int
    consumers: int  # warpgroups, each with WARPGROUP_ROWS rows of the same item
    query_rows: int  # rows of a consumer that exist in memory
    parts: int  # items per query tile
    query_stages: int
    stages: int
    has_maskless_loop: bool  # a second loop, for tiles that every query sees whole
    num_tiles: int
    num_ctas: int

    @property
    def num_items(self) -> int:
        return self.num_tiles * self.parts


class Buffer(NamedTuple):
    """Shared memory; `swizzle` bytes of a row are spread over the banks (0: stored as it is)."""

    shape: tuple[int, ...]
    dtype: str
    swizzle: int = 0


class Union(NamedTuple):
    """Two buffers in one place, never in use at the same time."""

    first: Buffer
    second: Buffer


class Barriers(NamedTuple):
    num_barriers: int
    arrivals: int = 1


def swizzle_bytes(head_dim: int, dtype: str) -> int:
    """The widest swizzle whose width divides a row."""
    row = head_dim * jnp.dtype(dtype).itemsize
    return next(width for width in (128, 64, 32) if row % width == 0)


def scratch(problem: Problem, plan: Plan) -> dict[str, Buffer | Union | Barriers]:
    """The shared memory of one CTA, by the names of the kernel's parameters."""
    head_dim, dtype, out_dtype = problem.cache.head_dim, problem.cache.dtype, problem.query_dtype
    tile = (plan.stages, plan.keys.rows, head_dim)
    rows = (plan.consumers, WARPGROUP_ROWS)
    swizzle = swizzle_bytes(head_dim, dtype)
    copies = plan.keys.blocks_per_tile
    return {
        "query_smem": Buffer((plan.query_stages, *rows, head_dim), dtype, swizzle),
        "key_smem": Buffer(tile, dtype, swizzle),
        "value_smem": Buffer(tile, dtype, swizzle),
        "out_smem": Buffer((*rows, head_dim), out_dtype, swizzle_bytes(head_dim, out_dtype)),
        "lse_smem": Buffer(rows, "float32"),
        "query_full": Barriers(plan.query_stages, plan.consumers),
        "query_empty": Barriers(plan.query_stages, plan.consumers),
        "key_full": Barriers(plan.stages, copies),
        "key_empty": Barriers(plan.stages, plan.consumers),
        "value_full": Barriers(plan.stages, copies),
        "value_empty": Barriers(plan.stages, plan.consumers),
        "padding_full": Barriers(1, plan.stages),
        "tail_clear": Barriers(1, plan.consumers),
    }


def smem_bytes(parts: dict[str, Buffer | Union | Barriers]) -> int:
    """Bytes of shared memory that the scratch takes, alignment included."""
    return sum(map(_bytes_of, parts.values()))


def _bytes_of(part: Buffer | Union | Barriers) -> int:
    if isinstance(part, Union):
        return max(map(_bytes_of, part))
    if isinstance(part, Barriers):
        return 8 * part.num_barriers
    size = prod(part.shape) * jnp.dtype(part.dtype).itemsize
    return -(-size // SMEM_ALIGNMENT) * SMEM_ALIGNMENT


def key_tiles(cache: CacheShape) -> KeyTiles:
    """The tiles that waste the fewest rows, the larger ones among equals."""
    sizes = (64, 128) if cache.head_dim <= 128 else (64,)
    candidates = [KeyTiles.of_rows(cache.block_size, cache.num_kv_heads, rows) for rows in sizes]
    return max(candidates, key=lambda tiles: (tiles.efficiency, tiles.rows))


def make_plan(problem: Problem, *, is_simulated: bool = False) -> Plan:
    """The sizes for a problem that `unsupported` lets pass."""
    candidates = (
        _plan(problem, consumers, query_stages, stages, is_simulated)
        for consumers in _consumers(problem)
        for stages in range(MAX_STAGES, 1, -1)
        for query_stages in (2, 1)
    )
    return next(p for p in candidates if smem_bytes(scratch(problem, p)) <= SMEM_BYTES)


def _consumers(problem: Problem) -> tuple[int, ...]:
    """Two where they have rows enough; one otherwise, and where two do not fit."""
    rows = problem.num_query_heads * (problem.num_tokens if problem.is_packed else 1)
    return (2, 1) if rows > WARPGROUP_ROWS else (1,)


def _plan(
    problem: Problem, consumers: int, query_stages: int, stages: int, is_simulated: bool
) -> Plan:
    heads, rows = problem.num_query_heads, consumers * WARPGROUP_ROWS
    tile_tokens = max(1, min(rows // heads, problem.num_tokens)) if problem.is_packed else 1
    tile_rows = tile_tokens * heads
    parts = -(-tile_rows // rows)
    num_tiles = num_query_tiles(
        problem.num_tokens, problem.cache.batch, tile_tokens, problem.is_packed
    )
    limit = MAX_SIMULATED_CTAS if is_simulated else device.num_sms()
    return Plan(
        keys=key_tiles(problem.cache),
        tile_tokens=tile_tokens,
        consumers=consumers,
        # a swizzled copy moves groups of 8 rows
        query_rows=-(-tile_rows // 8) * 8 if parts * consumers == 1 else WARPGROUP_ROWS,
        parts=parts,
        query_stages=query_stages,
        stages=stages,
        # a second loop beside so wide an accumulator, or such scores, spills registers
        has_maskless_loop=problem.cache.head_dim < 256 and not problem.variant.has_alibi,
        num_tiles=num_tiles,
        num_ctas=min(num_tiles * parts, limit),
    )


class Item(NamedTuple):
    """One row of the work list: a query tile, and its keys in tiles and blocks."""

    sequence: Any
    first_position: Any
    seq_length: Any
    tile_start: Any
    full_start: Any  # key tiles [full_start, full_stop) need no mask
    full_stop: Any
    tile_stop: Any
    block_start: Any  # blocks [block_start, block_stop) hold the keys that are seen
    block_stop: Any

    @property
    def num_edges(self) -> Any:
        """Tiles that need a mask."""
        return self.num_visits - (self.full_stop - self.full_start)

    @property
    def num_visits(self) -> Any:
        return self.tile_stop - self.tile_start

    def visited(self, index: Any) -> Any:
        """The key tile of a visit: first those before the full ones, then those after, then full
        ones."""
        before = self.full_start - self.tile_start
        edge = jnp.where(index < before, self.tile_start, self.full_stop - before) + index
        return jnp.where(index < self.num_edges, edge, self.full_start + index - self.num_edges)


def work_list(tiles: QueryTiles, variant: Variant, keys: KeyTiles) -> Item:
    """What each query tile meets, as arrays."""
    last = tiles.first_position + tiles.num_tokens - 1
    full_start, full_stop = variant.full_range(tiles.first_position, last, tiles.seq_length)
    tile_start = keys.whole_before(tiles.kv_start)
    tile_stop = jnp.where(tiles.kv_stop > tiles.kv_start, keys.covering(tiles.kv_stop), tile_start)
    full_start = jnp.clip(keys.covering(full_start), tile_start, tile_stop)
    full_stop = jnp.clip(keys.whole_before(full_stop), full_start, tile_stop)
    return Item(
        sequence=tiles.sequence,
        first_position=tiles.first_position,
        seq_length=tiles.seq_length,
        tile_start=tile_start,
        full_start=full_start,
        full_stop=full_stop,
        tile_stop=tile_stop,
        block_start=divide(tiles.kv_start, keys.block_size),
        block_stop=divide(tiles.kv_stop + (keys.block_size - 1), keys.block_size),
    )


def unsupported(problem: Problem) -> str | None:
    """Why the kernel does not take the problem, and the way out; None if it does."""
    cache, way_out = problem.cache, 'use implementation="xla"'
    if (reason := device.lacks("attention")) is not None:
        return reason
    if cache.dtype not in DTYPES:
        return f"mosaic_gpu: pools of {cache.dtype} are none of {', '.join(DTYPES)}; {way_out}"
    if problem.query_dtype not in QUERY_DTYPES:
        return (
            f"mosaic_gpu: a query of {problem.query_dtype} is none of {', '.join(QUERY_DTYPES)}; "
            f"cast it, or {way_out}"
        )
    if cache.head_dim not in HEAD_DIMS:
        return (
            f"mosaic_gpu: head_dim={cache.head_dim} is none of {HEAD_DIMS}; pad query and cache, "
            f"or {way_out}"
        )
    if cache.block_size % 8:
        return (
            f"mosaic_gpu: block_size={cache.block_size} must be a multiple of 8; choose another, "
            f"or {way_out}"
        )
    if cache.num_layers * cache.num_blocks > INT32_MAX:
        return (
            f"mosaic_gpu: {cache.num_layers=} times {cache.num_blocks=} must be below 2**31; "
            f"use one cache per layer, or {way_out}"
        )
    return None
