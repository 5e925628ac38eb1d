"""New tokens of a decode step: put into the tiles that are attended over, and so into the pools.

A row's new token is its last one.  Once the tile it belongs to has arrived, the token is blended
into its unit, the aligned rows of one register, and the unit goes back to the pool from a buffer of
its own, while the tile is multiplied.  A token of many heads is whole units.  No other row reads
the block that a row appends to.

Source: the fused update of ragged paged attention (RPA v3) in tpu-inference.
"""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core.arrays import AttentionArrays
from ..core.layout import locate_slots
from ..core.problem import Problem
from .blocks import row_bits, words
from .decode_plan import UNIT_ROWS, DecodePlan
from .worklist import Item, Work

KEYS, VALUES = range(2)
NONE = -1


class Slots(NamedTuple):
    """Where new tokens go, as scalars.

    slot: int32 (programs * rows_per_program,), counted over all layers, by row of the table.  A row
      without keys to attend over that has a slot nevertheless is written apart: `apart(slot)`.
    num_apart: int32 (programs,), such rows.
    """

    slot: Array
    num_apart: Array

    @classmethod
    def of(
        cls, problem: Problem, plan: DecodePlan, arrays: AttentionArrays, seq_lengths: Array
    ) -> "Slots":
        cache = problem.cache
        rows = jnp.arange(cache.batch, dtype=jnp.int32)
        size, num_blocks = cache.block_size, cache.num_blocks
        found = locate_slots(
            arrays.block_table, rows, seq_lengths - 1, block_size=size, num_blocks=num_blocks
        )
        slot = (arrays.layer * num_blocks + found.block) * size + found.offset
        is_apart = found.is_valid & (arrays.schedule.seq_lengths != seq_lengths)
        slot = jnp.where(found.is_valid, jnp.where(is_apart, apart(slot), slot), NONE)
        pad = (0, plan.rows_per_program * plan.num_programs - cache.batch)
        is_apart = jnp.pad(is_apart, pad).reshape(plan.num_programs, plan.rows_per_program)
        num_apart = jnp.sum(is_apart, axis=1, dtype=jnp.int32)
        return cls(jnp.pad(slot, pad, constant_values=NONE), num_apart)


def apart(slot: Any) -> Any:
    """A slot as a number below NONE, and back."""
    return (NONE - 1) - slot


def in_units(plan: DecodePlan, keys: Array, values: Array) -> Array:
    """New tokens at every place of a unit, (rows, 2, rows of `token_units`, head_dim)."""
    both = jnp.stack([keys, values], axis=1)
    return jnp.tile(both, (1, 1, plan.token_units * UNIT_ROWS // plan.num_kv_heads, 1))


@dataclass(frozen=True)
class TokenWriter:
    """The new tokens of a program; there are none unless `plan.appends`."""

    plan: DecodePlan
    work: Work
    slots: Any  # `Slots` in SMEM
    tokens: Any  # (rows_per_program, 2, rows of `token_units`, head_dim)
    pools: Any  # keys and values in HBM, as units
    units: Any  # VMEM, `token_units` for each of 2 * items_per_step: on their way back
    semaphore: Any

    def put(self, which: int, items: list[Item], buffer: Any) -> None:
        """Puts those that belong to the items into their tiles, and starts writing them back."""
        if self.plan.appends:
            for u, item in enumerate(items):
                pl.when(self._is_here(item))(partial(self._put, which, u, item, buffer))

    def wait(self, keys: list[Item], values: list[Item]) -> None:
        """Waits until the new keys and values of these items are written."""
        if not self.plan.appends:
            return
        count = reduce(jnp.add, [jnp.int32(self._is_here(item)) for item in (*keys, *values)])

        @pl.when(count > 0)
        def _() -> None:
            part = self.units.at[pl.ds(0, count * self.plan.token_units)]
            pltpu.make_async_copy(part, part, self.semaphore.at[0]).wait()

    def write_apart(self) -> None:
        """Writes those of rows that have nothing to attend over."""
        if not self.plan.appends:
            return
        rows = self.plan.rows_per_program

        def each(row: Any, _: None) -> None:
            slot = self.slots.slot[self.work.program * rows + row]
            pl.when(slot < NONE)(partial(self._write, row, apart(slot)))

        is_some = self.slots.num_apart[self.work.program] > 0
        pl.when(is_some)(lambda: lax.fori_loop(0, rows, each, None))

    def _is_here(self, item: Item) -> Any:
        is_last = (item.left > 0) & (item.left <= self.plan.tile_tokens)
        return is_last & (self._slot(item) > NONE)

    def _slot(self, item: Item) -> Any:
        return self.slots.slot[self.work.sequence(item)]

    def _put(self, which: int, u: int, item: Item, buffer: Any) -> None:
        row = u * self.plan.tile_rows + (item.left - 1) * self.plan.num_kv_heads
        at = pl.ds(_unit(row), self.plan.token_units)
        units = self._blend(which, self.work.query(item), row, buffer[at])
        buffer[at] = units
        mine = self._mine(which * self.plan.items_per_step + u)
        mine[...] = units
        target = self._in_pool(which, self._slot(item))
        pltpu.make_async_copy(mine, target, self.semaphore.at[0]).start()

    def _write(self, row: Any, slot: Any) -> None:
        mine = self._mine(0)
        for which in (KEYS, VALUES):
            pool = self._in_pool(which, slot)
            for source, target in ((pool, mine), (mine, pool)):
                copy = pltpu.make_async_copy(source, target, self.semaphore.at[0])
                copy.start()
                copy.wait()
                if source is pool:
                    first = slot * self.plan.num_kv_heads
                    mine[...] = self._blend(which, row, first, mine[...])

    def _mine(self, at: int) -> Any:
        return self.units.at[pl.ds(at * self.plan.token_units, self.plan.token_units)]

    def _in_pool(self, which: int, slot: Any) -> Any:
        first = _unit(slot * self.plan.num_kv_heads)
        return self.pools[which].at[pl.ds(first, self.plan.token_units)]

    def _blend(self, which: int, row: Any, first: Any, units: Any) -> Any:
        """Units with a row's new token in them, from the `first` row of the first one on."""
        new = self.tokens[row, which]
        if self.plan.num_kv_heads < UNIT_ROWS:
            first = first & (UNIT_ROWS - 1)
            is_new = lambda at: (at >= first) & (at < first + self.plan.num_kv_heads)
            bits = row_bits(new.shape, 2, is_new)
            old = words(units.reshape(new.shape))
            new = pltpu.bitcast((old & ~bits) | (words(new) & bits), new.dtype)
        return new.reshape(units.shape)


def _unit(row: Any) -> Any:
    """The unit that a row is part of."""
    return row >> (UNIT_ROWS.bit_length() - 1)
