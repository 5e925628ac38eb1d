"""The work of a decode step: a flat list of (row, tile) items, rows being single query tokens.

Outside of the kernel the list is a few arrays with a number per row; inside, items are found one
after the other, so that no array has a number per item.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .decode_plan import DecodePlan

PAST = 1 << 18  # a tile behind every row's end


class DecodeRows(NamedTuple):
    """Rows in the order they are worked on, int32 (programs * rows_per_program,) each.

    A program has its own rows, those with keys first.
    """

    query: Array  # row of the program's queries
    sequence: Array  # row of the table
    start: Array  # keys [start, stop) are seen, counted from the table's first column
    stop: Array
    count: Array  # (programs,): rows with keys
    num_items: Array  # (programs,): tiles of all of them


def of_batch(plan: DecodePlan, start: Array, stop: Array) -> DecodeRows:
    """One row per sequence, in the order of the batch."""
    rows, programs = plan.rows_per_program, plan.num_programs
    pad = (0, rows * programs - stop.shape[0])
    start, stop = (jnp.pad(x, pad).reshape(programs, rows) for x in (start, stop))
    rank = jnp.cumsum(stop > start, axis=1, dtype=jnp.int32)
    # row i of the list is the first one with i + 1 rows that have keys, itself included
    wanted = jnp.arange(1, rows + 1, dtype=jnp.int32)
    query = jnp.sum(rank[:, None, :] < wanted[None, :, None], axis=2, dtype=jnp.int32)
    query = jnp.minimum(query, rows - 1)
    sequence = query + rows * jnp.arange(programs, dtype=jnp.int32)[:, None]
    sequence = jnp.minimum(sequence, plan.num_programs * rows - 1)
    take = lambda x: jnp.take_along_axis(x, query, axis=1).reshape(-1)
    tiles = (stop + (plan.tile_tokens - 1)) // plan.tile_tokens
    items = jnp.sum(jnp.where(stop > start, tiles, 0), axis=1, dtype=jnp.int32)
    order = query.reshape(-1), sequence.reshape(-1)
    return DecodeRows(*order, take(start), take(stop), rank[:, -1], items)


class Item(NamedTuple):
    """A tile of a row's keys."""

    row: Any  # of the program's list
    tile: Any


@dataclass(frozen=True)
class Work:
    """A program's list, in SMEM: `rows` holds refs."""

    plan: DecodePlan
    rows: DecodeRows
    program: Any

    @property
    def num_rows(self) -> Any:
        return self.rows.count[self.program]

    @property
    def num_steps(self) -> Any:
        """One more than groups: the last one only takes in values."""
        items, each = self.rows.num_items[self.program], self.plan.items_per_step
        return jnp.where(items > 0, lax.div(items + (each - 1), each) + 1, 0)

    def _at(self, item: Item) -> Any:
        return self.program * self.plan.rows_per_program + item.row

    def query(self, item: Item) -> Any:
        return self.rows.query[self._at(item)]

    def sequence(self, item: Item) -> Any:
        return self.rows.sequence[self._at(item)]

    def start(self, item: Item) -> Any:
        """Tokens of a row's first tile that are not seen."""
        return self.rows.start[self._at(item)]

    def left(self, item: Item) -> Any:
        """Tokens from the tile's start to the row's end; none are left past the last item."""
        return self.rows.stop[self._at(item)] - item.tile * self.plan.tile_tokens

    def is_whole(self, item: Item) -> Any:
        """Whether every token of the tile is seen."""
        is_late = (item.tile == 0) & (self.start(item) > 0)
        return (self.left(item) >= self.plan.tile_tokens) & ~is_late

    def num_blocks(self, item: Item) -> Any:
        blocks = lax.div(self.left(item) + (self.plan.block_size - 1), self.plan.block_size)
        return jnp.clip(blocks, 0, self.plan.blocks_per_tile)

    def total_blocks(self, items: list[Item]) -> Any:
        return reduce(jnp.add, [self.num_blocks(item) for item in items])

    def first_group(self) -> list[Item]:
        zero = jnp.int32(0)
        return self.group_after([Item(zero, zero - 1)])

    def no_group(self) -> list[Item]:
        last = jnp.maximum(self.num_rows - 1, 0)
        return [Item(last, jnp.int32(PAST))] * self.plan.items_per_step

    def group_after(self, group: list[Item]) -> list[Item]:
        """The items of the next step."""
        items = [group[-1]]
        for _ in range(self.plan.items_per_step):
            items.append(self._after(items[-1]))
        return items[1:]

    def _after(self, item: Item) -> Item:
        is_last = self.left(item) <= self.plan.tile_tokens
        ends = is_last & (item.row + 1 < self.num_rows)
        return Item(jnp.where(ends, item.row + 1, item.row), jnp.where(ends, 0, item.tile + 1))
