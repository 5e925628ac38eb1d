"""Cache blocks in memory: pools as matrices of rows, copies of blocks, the table's slices, bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .plan import TABLE_WINDOW, AttentionPlan, BlockRows, Buffer, round_up

# A copy's addresses are right by construction, and the scalar unit has no time to check each.
COMPILER_PARAMS: dict[str, Any] = {"disable_bounds_checks": True, "disable_semaphore_checks": True}


def interpreter(interpret: Any) -> Any:
    """What `pallas_call` is given for `interpret`, for kernels with copies of traced sizes."""
    if interpret is True:  # the interpreter of all backends knows fixed sizes only
        return pltpu.InterpretParams()
    return interpret or False


def allocate(buffers: list[Buffer]) -> list[Any]:
    """The buffers, as `scratch_shapes`."""
    spaces = {"vmem": pltpu.VMEM, "smem": pltpu.SMEM}
    return [
        pltpu.SemaphoreType.DMA(buffer.shape)
        if buffer.space == "semaphore"
        else spaces[buffer.space](buffer.shape, jnp.dtype(buffer.dtype))
        for buffer in buffers
    ]


def as_rows(pool: Array, rows: BlockRows) -> Array:
    """(layers, blocks, block_size, heads, head_dim) to (layers, blocks, rows, width)."""
    if rows.is_head_major:
        pool = pool.swapaxes(2, 3)
    return pool.reshape(*pool.shape[:2], rows.count, rows.width)


def from_rows(pool: Array, rows: BlockRows, shape: tuple[int, ...]) -> Array:
    """The inverse of `as_rows`: the pool in its own shape."""
    layers, blocks, block_size, heads, head_dim = shape
    if rows.is_head_major:
        return pool.reshape(layers, blocks, heads, block_size, head_dim).swapaxes(2, 3)
    return pool.reshape(shape)


def table_windows(block_table: Array, num_blocks: int) -> Array:
    """The table in windows: (batch * windows per row, 1, TABLE_WINDOW).

    Entries that no tile uses are the only ones that can lie outside the pool; clipped, none does.
    """
    columns = block_table.shape[1]
    table = jnp.clip(block_table, 0, num_blocks - 1)
    table = jnp.pad(table, ((0, 0), (0, round_up(columns, TABLE_WINDOW) - columns)))
    return table.reshape(-1, 1, TABLE_WINDOW)


def row_bits(shape: tuple[int, int], packing: int, keep: Callable[[Array], Array]) -> Array:
    """int32 words over `packing` rows of `shape` each, all ones in the rows that `keep` names."""
    row = lax.broadcasted_iota(jnp.int32, (shape[0] // packing, shape[1]), 0) * packing
    if packing == 1:
        return jnp.where(keep(row), -1, 0)
    return jnp.where(keep(row), 0xFFFF, 0) | jnp.where(keep(row + 1), -0x10000, 0)


def words(x: Array) -> Array:
    """The bits of a tile, rows packed into int32."""
    return pltpu.bitcast(x, jnp.int32)


def rows_of(words: Array) -> Array:
    """bfloat16 rows of words that hold two of them: the inverse of `words`."""
    return pltpu.bitcast(words, jnp.bfloat16)


def float16_numbers(bits: Array) -> Array:
    """float32 values of float16 bits in int16."""
    bits = bits.astype(jnp.int32)
    exponent, mantissa = (bits >> 10) & 31, bits & 1023
    value = pltpu.bitcast(((bits & 0x7FFF) << 13) + ((127 - 15) << 23), jnp.float32)
    value = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * 2.0**-24, value)
    value = jnp.where(exponent == 31, jnp.where(mantissa == 0, jnp.inf, jnp.nan), value)
    return jnp.where(bits < 0, -value, value)


@dataclass(frozen=True)
class TileCopies:
    """Copies of one sequence's blocks [first_block, stop_block), tile by tile, into two buffers.

    Tile `i` uses buffer, table window and semaphores `i % 2`.  Its window must be there before its
    blocks are started, and its blocks before they are read.
    """

    plan: AttentionPlan
    table: Any  # HBM, (windows, 1, TABLE_WINDOW)
    first_window: Any  # of the sequence's row
    layer: Any
    first_block: Any
    stop_block: Any
    pools: tuple[Any, Any]  # HBM, (layers, blocks, rows, head_dim): keys, values
    buffers: tuple[Any, Any]  # VMEM, (2, tile_rows, head_dim)
    windows: Any  # SMEM, (2, TABLE_WINDOW)
    semaphores: tuple[Any, Any, Any]  # of keys, values, windows

    @property
    def count(self) -> Any:
        """Tiles that hold the blocks."""
        plan = self.plan
        tiles = lax.div(
            self.stop_block - self._base + (plan.blocks_per_tile - 1), plan.blocks_per_tile
        )
        return jnp.maximum(tiles, 0) * plan.tiles_per_block

    @property
    def _base(self) -> Any:
        return self.first_block - lax.rem(self.first_block, self.plan.blocks_per_tile)

    def block(self, i: Any) -> Any:
        """The first (logical) block of tile `i`."""
        plan = self.plan
        return self._base + lax.div(i, plan.tiles_per_block) * plan.blocks_per_tile

    def part(self, i: Any) -> Any:
        """Which part of its block tile `i` is."""
        return lax.rem(i, self.plan.tiles_per_block)

    def window(self, i: Any) -> Any:
        """The copy of the slice of the table that names the blocks of tile `i`."""
        slot, window = lax.rem(i, 2), lax.div(self.block(i), TABLE_WINDOW)
        return pltpu.make_async_copy(
            self.table.at[self.first_window + window, 0],
            self.windows.at[slot],
            self.semaphores[2].at[slot],
        )

    def start(self, i: Any) -> None:
        """Starts a copy per used block of tile `i`, of keys and of values."""
        slot, entry = lax.rem(i, 2), lax.rem(self.block(i), TABLE_WINDOW)

        def each(j: Any, _: None) -> None:
            for copy in self._copies(i, j, self.windows[slot, entry + j]):
                copy.start()

        self._over_blocks(i, each)

    def wait(self, i: Any) -> None:
        """Waits for what `start` started."""

        def each(j: Any, _: None) -> None:
            for copy in self._copies(i, j, 0):  # any block: all copies are of one size
                copy.wait()

        self._over_blocks(i, each)

    def _over_blocks(self, i: Any, each: Callable[[Any, None], None]) -> None:
        block = self.block(i)
        first = jnp.maximum(self.first_block - block, 0)
        stop = jnp.minimum(self.stop_block - block, self.plan.blocks_per_tile)
        lax.fori_loop(first, stop, each, None)

    def _copies(self, i: Any, j: Any, physical_block: Any) -> list[Any]:
        n, slot = self.plan.copy_rows, lax.rem(i, 2)
        source = pl.ds(pl.multiple_of(self.part(i) * n, n), n)
        target = pl.ds(pl.multiple_of(j * n, n), n)
        return [
            pltpu.make_async_copy(
                pool.at[self.layer, physical_block, source],
                buffer.at[slot, target],
                semaphore.at[slot],
            )
            for pool, buffer, semaphore in zip(
                self.pools, self.buffers, self.semaphores[:2], strict=True
            )
        ]
