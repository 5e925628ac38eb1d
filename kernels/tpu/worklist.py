"""The work of a decode step: a flat list of (row, tile) items, rows being single query tokens.

Outside of the kernel the list is a few arrays with a number per row; inside, items are found one
after the other, so that no array has a number per item.

Source: one list over all sequences as in LeanAttention (Sanovar et al., 2024), and in the stacked
ragged paged attention of tpu-inference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .decode_plan import DecodePlan


class DecodeRows(NamedTuple):
    """Rows in the order they are worked on, int32 (programs * rows_per_program,) each.

    A program has its own rows, those with keys first.
    """

    query: Array  # row of the program's queries
    sequence: Array  # row of the table
    start: Array  # keys [start, stop) are seen, counted from the table's first column
    stop: Array
    num_rows: Array  # (programs,): rows with keys
    num_items: Array  # (programs,): tiles of all of them

    def only_if(self, condition: Array) -> "DecodeRows":
        """The rows, or, where the condition is false, none with keys."""
        none = lambda x: jnp.where(condition, x, 0)
        return self._replace(num_rows=none(self.num_rows), num_items=none(self.num_items))


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
    left: Any  # tokens from the tile's start to the row's end; none past the last item


@dataclass(frozen=True)
class Work:
    """A program's list, in SMEM: `rows` holds refs."""

    plan: DecodePlan
    rows: DecodeRows
    program: Any
    starts_late: bool  # some row's first tokens are not seen

    @property
    def num_rows(self) -> Any:
        return self.rows.num_rows[self.program]

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

    def num_blocks(self, item: Item) -> Any:
        size = self.plan.block_size
        return _floor_div(jnp.clip(item.left, 0, self.plan.tile_tokens) + (size - 1), size)

    def total_blocks(self, items: list[Item]) -> Any:
        return reduce(jnp.add, [self.num_blocks(item) for item in items])

    def are_full(self, items: list[Item]) -> Any:
        """Whether every block of the tiles holds tokens up to its last one."""
        return reduce(jnp.minimum, [item.left for item in items]) >= self.plan.tile_tokens

    def are_whole(self, items: list[Item]) -> Any:
        """Whether every token of the tiles is seen, besides."""
        if not self.starts_late:
            return self.are_full(items)
        late = [(item.tile == 0) & (self.start(item) > 0) for item in items]
        return self.are_full(items) & ~reduce(jnp.logical_or, late)

    # A group of items is found from its cursor: its only item or, if rows have one tile, its first
    # row.  Cursors are what a loop carries.

    def first(self) -> Any:
        """The cursor of the first group."""
        zero = jnp.int32(0)
        return zero if self.plan.has_one_tile else Item(zero, zero, self._tokens(zero))

    def none(self) -> Any:
        """The cursor of a group without tokens."""
        if self.plan.has_one_tile:
            return self.num_rows
        return Item(jnp.maximum(self.num_rows - 1, 0), jnp.int32(1), jnp.int32(0))

    def after(self, cursor: Any) -> Any:
        """The cursor of the next group."""
        plan = self.plan
        if plan.has_one_tile:
            return cursor + plan.items_per_step
        ends = (cursor.left <= plan.tile_tokens) & (cursor.row + 1 < self.num_rows)
        row = jnp.where(ends, cursor.row + 1, cursor.row)
        left = jnp.where(ends, self._tokens(row), cursor.left - plan.tile_tokens)
        return Item(row, jnp.where(ends, 0, cursor.tile + 1), left)

    def items(self, cursor: Any) -> list[Item]:
        if not self.plan.has_one_tile:
            return [cursor]
        items, last = [], jnp.maximum(self.num_rows - 1, 0)
        for u in range(self.plan.items_per_step):
            row = jnp.minimum(cursor + u, last)
            left = jnp.where(cursor + u < self.num_rows, self._tokens(row), 0)
            items.append(Item(row, 0, left))
        return items

    def each(self, items: list[Item], do: Callable[[Any, Item], None]) -> None:
        """`do(u, item)` for every item of a group, in a loop that is compiled once."""
        if len(items) == 1:
            do(0, items[0])
            return
        first, last = items[0], jnp.maximum(self.num_rows - 1, 0)

        def one(u: Any, _: None) -> None:
            row = jnp.minimum(first.row + u, last)
            is_item = (first.left > 0) & (first.row + u < self.num_rows)
            do(u, Item(row, 0, jnp.where(is_item, self._tokens(row), 0)))

        lax.fori_loop(0, len(items), one, None)

    def _tokens(self, row: Any) -> Any:
        return self.rows.stop[self.program * self.plan.rows_per_program + row]


def _floor_div(x: Any, n: int) -> Any:
    """x // n of a number that is not negative."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))
