"""The visits of a prefill, and the copies they need.

A visit is a query tile at a tile of keys; programs go through all of them in one order, across the
bounds of programs.  While a visit computes, the blocks of the one after the next arrive, and the
slice of the table for the one after that.  All copies of a share have one size, so that a wait
needs no count: where no key is used, the table names some block of the pool.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.problem import Problem
from ..core.schedule import QueryTiles
from ..core.variant import Variant
from .plan import TABLE_WINDOW
from .prefill_plan import KEY_SLOTS, PrefillPlan


class Programs(NamedTuple):
    """What is known of each query tile, int32 (num_query_tiles,) each; unused tiles come last."""

    sequence: Any
    seq_length: Any
    num_tokens: Any
    first_position: Any
    kv_start: Any
    kv_stop: Any
    full_start: Any  # keys [full_start, full_stop) are seen by every token
    full_stop: Any
    first_tile: Any  # tiles of keys [first_tile, stop_tile) are visited, at least one
    stop_tile: Any
    first_visit: Any
    num_used: Any  # (1,)
    layer: Any  # (1,)


def programs_of(plan: PrefillPlan, variant: Variant, tiles: QueryTiles, layer: Array) -> Programs:
    """The query tiles as scalars of the kernel."""
    last = tiles.first_position + tiles.num_tokens - 1
    full = variant.full_range(tiles.first_position, last, tiles.seq_length)
    first_tile = tiles.kv_start // plan.tile_keys
    stop_tile = (tiles.kv_stop + (plan.tile_keys - 1)) // plan.tile_keys
    stop_tile = jnp.maximum(stop_tile, first_tile + 1)
    visits = jnp.cumsum(stop_tile - first_tile, dtype=jnp.int32) - (stop_tile - first_tile)
    return Programs(
        tiles.sequence,
        tiles.seq_length,
        tiles.num_tokens,
        tiles.first_position,
        tiles.kv_start,
        tiles.kv_stop,
        *full,
        first_tile,
        stop_tile,
        visits,
        jnp.sum(tiles.num_tokens > 0, dtype=jnp.int32).reshape(1),
        layer.reshape(1),
    )


class Visit(NamedTuple):
    """A query tile at a tile of keys, and its number."""

    program: Any
    tile: Any
    number: Any

    @property
    def next_of_program(self) -> "Visit":
        """At the next tile."""
        return self.at(self.tile + 1)

    def at(self, tile: Any) -> "Visit":
        """The same program's visit to another of its tiles."""
        return Visit(self.program, tile, self.number + (tile - self.tile))

    @property
    def slot(self) -> Any:
        return lax.rem(self.number, 2)

    @property
    def key_slot(self) -> Any:
        """Of prepared keys."""
        return lax.rem(self.number, KEY_SLOTS)


def following(programs: Programs, visit: Visit) -> Visit:
    """The visit after this one; the last one again, if there is none."""
    i, t, number = visit
    within = t + 1 < programs.stop_tile[i]
    is_last = i + 1 >= programs.num_used[0]
    j = jnp.where(within | is_last, i, i + 1)
    tile = jnp.where(within, t + 1, jnp.where(is_last, t, programs.first_tile[j]))
    return Visit(j, tile, number + 1)


@dataclass(frozen=True)
class VisitCopies:
    """Copies of the blocks of visits into raw tiles, and of their slices of the table."""

    problem: Problem
    plan: PrefillPlan
    programs: Programs
    table: Any  # HBM, (windows, 1, TABLE_WINDOW)
    pools: tuple[Any, Any]  # HBM, (layers, blocks, rows, head_dim): keys, values
    raw: tuple[Any, Any]  # VMEM, (2, tile rows, head_dim)
    windows: Any  # SMEM, (2, TABLE_WINDOW)
    semaphores: tuple[Any, Any, Any]  # of keys and values, (2, shares), and of windows, (2,)

    def window(self, visit: Visit) -> Any:
        """The copy of the slice of the table that names a visit's blocks."""
        per_row = -(-self.problem.cache.max_blocks_per_seq // TABLE_WINDOW)
        block = visit.tile * self.plan.tile_blocks
        # tiles past the row's end are of keys that nobody sees
        window = jnp.minimum(lax.div(block, TABLE_WINDOW), per_row - 1)
        return pltpu.make_async_copy(
            self.table.at[self.programs.sequence[visit.program] * per_row + window, 0],
            self.windows.at[visit.slot],
            self.semaphores[2].at[visit.slot],
        )

    def start(self, visit: Visit, share: Any, block: int) -> None:
        """Starts the copies of block `block` of a share; the visit's window must be there."""
        plan, slot = self.plan, visit.slot
        n = plan.block_size * plan.num_kv_heads
        index = share * plan.share_blocks + block
        entry = lax.rem(visit.tile * plan.tile_blocks, TABLE_WINDOW) + index
        physical_block = self.windows[slot, entry]
        target = pl.ds(pl.multiple_of(index * n, n), n)
        for pool, raw, semaphore in zip(self.pools, self.raw, self.semaphores[:2], strict=True):
            pltpu.make_async_copy(
                pool.at[self.programs.layer[0], physical_block],
                raw.at[slot, target],
                semaphore.at[slot, share],
            ).start()

    def wait(self, kind: int, visit: Visit, share: Any) -> None:
        """Waits for all blocks of a share, of keys (kind 0) or of values (1)."""
        n = self.plan.share_rows
        rows = self.raw[kind].at[visit.slot, pl.ds(pl.multiple_of(share * n, n), n)]
        pltpu.make_async_copy(rows, rows, self.semaphores[kind].at[visit.slot, share]).wait()
