"""Copies of a decode step: slices of the table, blocks of keys and values, and what is cleared.

Every buffer is a set of SETS allocations with names of their own: the compiler lets a copy into one
run beside loads from another, which it does not for parts of one allocation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .blocks import row_bits, words
from .decode_plan import UNIT_ROWS, DecodePlan
from .plan import round_up
from .worklist import Item, Work

UNROLL = 8  # copies of an iteration of a loop over them


def sliced_table(plan: DecodePlan, table: Array, first_block: Array) -> Array:
    """The table in slices, (slices of all rows, 1, slice_entries); `first_block` is the layer's.

    Entries count units: each is a block's first one, over all layers.
    The first entry of a tile whose blocks lie in runs is stored inverted, and so negative.  No
    entry is used as an address but those of blocks that hold tokens.
    """
    rows, columns = table.shape
    table = (table + first_block) * plan.block_units
    table = jnp.pad(table, ((0, 0), (0, plan.columns - columns)))
    if plan.run > 1:
        runs = table.reshape(rows, plan.tiles, plan.blocks_per_tile // plan.run, plan.run)
        step = lax.broadcasted_iota(jnp.int32, runs.shape, 3) * plan.block_units
        is_run = runs == runs[..., :1] + step
        is_run = jnp.repeat(jnp.all(is_run, axis=(2, 3)), plan.blocks_per_tile, axis=1)
        column = lax.broadcasted_iota(jnp.int32, table.shape, 1)
        is_first = column % plan.blocks_per_tile == 0
        table = jnp.where(is_run & is_first, ~table, table)
    return table.reshape(-1, 1, plan.slice_entries)


class Stream(NamedTuple):
    """Keys or values: the blocks of all layers in HBM, and their sets in VMEM, both as units."""

    pool: Any  # (layers * blocks * block_units, UNIT_ROWS, head_dim)
    buffers: tuple[Any, ...]
    semaphores: Any
    first_slice: int  # of a step's slices of the table


@dataclass(frozen=True)
class Copies:
    """All copies of a program.  Keys are fetched three steps ahead, values one."""

    plan: DecodePlan
    work: Work
    table: Any  # HBM, (slices, 1, slice_entries)
    slices: tuple[Any, ...]  # SMEM, one set per step
    slice_semaphores: Any
    keys: Stream
    values: Stream

    def start_slices(self, slot: int, stream: Stream, items: list[Item]) -> None:
        """Starts the copies of the table's slices that name the items' blocks."""
        size = self.plan.slice_entries
        for u, item in enumerate(items):
            row = self.work.sequence(item) * (self.plan.columns // size)
            source = self.table.at[row + lax.div(self._column(item), size), 0]
            target = self.slices[slot].at[pl.ds((stream.first_slice + u) * size, size)]
            pltpu.make_async_copy(source, target, self.slice_semaphores.at[slot]).start()

    def wait_slices(self, slot: int) -> None:
        """Waits for a step's slices, of keys and values."""
        slices = self.slices[slot]
        pltpu.make_async_copy(slices, slices, self.slice_semaphores.at[slot]).wait()

    def _column(self, item: Item) -> Any:
        return jnp.minimum(item.tile, self.plan.tiles - 1) * self.plan.blocks_per_tile

    def _base(self, stream: Stream, u: Any, item: Item) -> Any:
        """Where the entries of an item start among a step's."""
        size = self.plan.slice_entries
        first = (stream.first_slice + u) * size
        if size == self.plan.blocks_per_tile:
            return first
        return lax.rem(self._column(item), size) + first

    def _bases(self, stream: Stream, items: list[Item]) -> list[Any]:
        return [self._base(stream, u, item) for u, item in enumerate(items)]

    def are_runs(self, slot: int, stream: Stream, items: list[Item]) -> Any:
        """Whether the blocks of all items, full tiles, lie in runs."""
        flags = [self.slices[slot][base] < 0 for base in self._bases(stream, items)]
        return reduce(jnp.logical_and, flags)

    def listed(
        self, slot: int, stream: Stream, items: list[Item], target: int, run: int
    ) -> list[Callable[[], None]]:
        """A function per copy of full tiles, that starts it."""
        bases = self._bases(stream, items)
        return [
            partial(self._start, slot, stream, target, u, base, i, run)
            for u, base in enumerate(bases)
            for i in range(0, self.plan.blocks_per_tile, run)
        ]

    def start_full(self, slot: int, stream: Stream, items: list[Item], target: int) -> None:
        """As `start`, fast if the tiles of several items are full."""

        def all_of_them() -> None:
            for start in self.listed(slot, stream, items, target, 1):
                start()

        some = partial(self.start, slot, stream, items, target)
        if len(items) == 1:
            some()
        else:
            lax.cond(self.work.are_full(items), all_of_them, some)

    def start(self, slot: int, stream: Stream, items: list[Item], target: int) -> None:
        """Starts the copies of exactly the blocks that hold tokens, if there are any."""

        def each(u: Any, item: Item) -> None:
            count, base = self.work.num_blocks(item), self._base(stream, u, item)
            one = lambda i: self._start(slot, stream, target, u, base, i, 1)

            def some(i: Any, _: None) -> None:
                for j in range(UNROLL):
                    one(i * UNROLL + j)

            whole = lax.div(count, UNROLL)
            lax.fori_loop(0, whole, some, None)
            lax.fori_loop(whole * UNROLL, count, lambda i, _: one(i), None)

        is_some = self.work.total_blocks(items) > 0
        pl.when(is_some)(lambda: self.work.each(items, each))

    def _start(
        self, slot: int, stream: Stream, target: int, u: Any, base: Any, i: Any, run: int
    ) -> None:
        plan = self.plan
        first = self.slices[slot][base + i]
        if plan.run > 1 and not (isinstance(i, int) and i > 0):
            first = first ^ (first >> 31)  # the first one may be stored inverted
        count = run * plan.block_units
        buffer = stream.buffers[target].at[pl.ds(self._unit(u, i), count)]
        source = stream.pool.at[pl.ds(first, count)]
        pltpu.make_async_copy(source, buffer, stream.semaphores.at[target]).start()

    def wait_whole(self, stream: Stream, target: int) -> None:
        """Waits for the blocks of full tiles."""
        part = stream.buffers[target].at[pl.ds(0, self.plan.step_units)]
        pltpu.make_async_copy(part, part, stream.semaphores.at[target]).wait()

    def wait(self, stream: Stream, items: list[Item], target: int) -> None:
        """Waits for all blocks of the items."""
        blocks = self.work.total_blocks(items)

        @pl.when(blocks > 0)
        def _() -> None:
            part = stream.buffers[target].at[pl.ds(0, blocks * self.plan.block_units)]
            pltpu.make_async_copy(part, part, stream.semaphores.at[target]).wait()

    def clear(self, items: list[Item], target: int) -> None:
        """Zeros the values of tokens that no query sees: no weight makes NaN harmless."""
        plan, work = self.plan, self.work

        def each(u: Any, item: Item) -> None:
            is_cut = (item.left > 0) & (item.left < plan.tile_tokens)
            pl.when(is_cut)(partial(self._clear_end, target, u, item.left))
            if work.starts_late:
                late = (item.tile == 0) & (work.start(item) > 0)
                pl.when(late)(partial(self._keep, target, u, 0, work.start(item), plan.block_size))

        work.each(items, each)

    def _clear_end(self, target: int, u: Any, left: Any) -> None:
        plan = self.plan
        last = lax.div(left, plan.block_size)
        self._keep(target, u, last, 0, left - last * plan.block_size)
        zeros = jnp.zeros((plan.block_units, UNIT_ROWS, plan.head_dim), jnp.bfloat16)

        def each(block: Any, _: None) -> None:
            self.values.buffers[target][pl.ds(self._unit(u, block), plan.block_units)] = zeros

        lax.fori_loop(last + 1, plan.blocks_per_tile, each, None)

    def _keep(self, target: int, u: Any, block: Any, start: Any, stop: Any) -> None:
        """Zeros the tokens of a block outside [start, stop)."""
        plan, buffer = self.plan, self.values.buffers[target]
        at, heads = self._unit(u, block), plan.num_kv_heads
        value = rows_of(buffer, at, plan.block_units)
        keep = lambda row: (row >= start * heads) & (row < stop * heads)
        kept = words(value) & row_bits(value.shape, 2, keep)
        kept = pltpu.bitcast(kept, value.dtype)
        buffer[pl.ds(at, plan.block_units)] = kept.reshape(-1, *buffer.shape[1:])

    def _unit(self, u: Any, block: Any) -> Any:
        """The first unit of an item's block in a buffer."""
        return (u * self.plan.blocks_per_tile + block) * self.plan.block_units


def rows_of(buffer: Any, first: Any, count: int) -> Any:
    """Units of a buffer as a matrix of rows."""
    return buffer[pl.ds(first, count)].reshape(-1, buffer.shape[-1])


def clear_pads(plan: DecodePlan, streams: tuple[Stream, ...]) -> None:
    """Zeros the unit behind every buffer that `tied` reads."""
    for stream in streams:
        for buffer in stream.buffers:
            buffer[plan.step_units] = jnp.zeros((UNIT_ROWS, plan.head_dim), jnp.bfloat16)


def tied(plan: DecodePlan, x: jax.Array, buffer: Any) -> jax.Array:
    """x, but not before the copies into `buffer` that come earlier in the program.

    Nothing else needs a copy that has just been started, so the compiler would put it last.
    """
    zeros = words(buffer[plan.step_units])
    bits = words(x)
    repeats = round_up(bits.shape[0], zeros.shape[0]) // zeros.shape[0]
    zeros = jnp.concatenate([zeros] * repeats, axis=0)[: bits.shape[0]]
    return pltpu.bitcast(bits | zeros, x.dtype)


class Paced:
    """A list of copies, started bit by bit over the first part of a step.

    when: they are started only if this holds, without a branch: the compiler predicates them.
    """

    def __init__(
        self, copies: list[Callable[[], None]], num_chunks: int, spread: float, when: Any = None
    ):
        self._copies, self._started, self._when = copies, 0, when
        self._chunks = max(1, int(num_chunks * spread))

    def after(self, chunk: int) -> None:
        """Starts what is due after a chunk of the step."""
        due = min(len(self._copies), ceil(len(self._copies) * (chunk + 1) / self._chunks))
        some = self._copies[self._started : due]

        def start_some() -> None:
            for start in some:
                start()

        if self._when is None:
            start_some()
        elif some:
            pl.when(self._when)(start_some)
        self._started = max(self._started, due)
