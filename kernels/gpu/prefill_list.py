"""The work list of prefill: query tiles, those with the most keys first.

Made by XLA, once per step where `make_schedule` knows the number of packed tokens, and shared by
all layers: a part of a `Schedule`.  No Pallas here.

A query tile begins at a multiple of 8 packed rows, as a swizzled copy does, so up to 7 rows of the
sequence before may be in it; they are computed and not stored.  The padding after the last
sequence is one more sequence without keys: every row of the result is written, once.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core.schedule import QueryTiles, Schedule
from ..core.variant import Variant
from .plan import work_list
from .prefill_plan import ROW_GROUP, Cut


class Item(NamedTuple):
    """A query tile, and its keys in tiles and blocks; at least one tile, which may have none.

    Tiles are visited from the last one down.  A row of the list that is not used has no visits.
    """

    sequence: Any  # row of the table
    row_group: Any  # packed row of the tile's first row, over ROW_GROUP
    first_position: Any  # of that row; may be negative
    row_start: Any  # rows [row_start, row_stop) of the tile are the sequence's
    row_stop: Any
    seq_length: Any
    tile_stop: Any
    edge_visits: Any  # visits [0, edge_visits) need a mask; the first always has one
    full_visits: Any  # visits [edge_visits, full_visits) need none, those that follow do
    num_visits: Any
    block_start: Any  # blocks [block_start, block_stop) hold the keys that are seen
    block_stop: Any
    valid_rows: Any  # rows of the tile visited first that are not past the end of a cut block

    def visited(self, index: Any) -> Any:
        """The key tile of a visit."""
        return self.tile_stop - 1 - index

    def without_window(self) -> "Item":
        """The same, where all keys from the first one on are seen: fewer numbers to read."""
        return self._replace(full_visits=self.tile_stop, num_visits=self.tile_stop, block_start=0)

    def without_keys(self, rows: int) -> "Item":
        """The same rows, of a sequence that has no tokens."""
        none, one = self.seq_length * 0, jnp.minimum(self.num_visits, 1)
        return self._replace(
            seq_length=none,
            tile_stop=one,
            edge_visits=one,
            full_visits=one,
            num_visits=one,
            block_start=none,
            block_stop=none,
            valid_rows=none + rows,
        )


@dataclass(frozen=True)
class MadeFor:
    """What a list depends on besides the arrays of its schedule."""

    cut: Cut
    is_causal: bool
    window: tuple[int, int] | None
    is_mixed: bool  # single tokens are taken elsewhere

    @classmethod
    def of(cls, cut: Cut, variant: Variant, schedule: Schedule) -> "MadeFor":
        return cls(cut, variant.is_causal, variant.window, schedule.is_apart is not None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TileList:
    """Attributes:
    items: int32 (num_tiles + 1, fields of an Item).
    num_items: int32 (1,), the first ones that are used; the last one never is.
    """

    items: Array
    num_items: Array
    made_for: MadeFor = field(metadata={"static": True})

    def only_if(self, condition: Array) -> "TileList":
        """Where the condition is false, every row is one of a sequence without tokens."""
        empty = Item(*self.items.T).without_keys(self.made_for.cut.keys.rows)
        return replace(self, items=jnp.where(condition, self.items, jnp.stack(empty, axis=1)))


def make(cut: Cut, variant: Variant, schedule: Schedule) -> TileList:
    """The list of one step, of lengths that may be any."""
    starts = jnp.clip(schedule.query_start_loc, 0, cut.num_tokens)
    batch = schedule.seq_lengths.shape[0]
    # the padding is sequence `batch`
    stops = jnp.append(starts[:-1] + schedule.query_lengths, cut.num_tokens)
    stops = jnp.minimum(stops, cut.num_tokens)
    lengths = jnp.append(schedule.seq_lengths, 0)
    bases = starts // ROW_GROUP * ROW_GROUP
    counts = jnp.where(stops > starts, -(-(stops - bases) // cut.tile_tokens), 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)

    tile = jnp.arange(cut.num_tiles(batch) + 1, dtype=jnp.int32)
    is_used = tile < ends[-1]
    sequence = jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, batch)
    index = tile - (ends - counts)[sequence]
    base = bases[sequence] + index * cut.tile_tokens
    start = jnp.maximum(starts[sequence] - base, 0)
    stop = jnp.minimum(stops[sequence] - base, cut.tile_tokens)
    length = lengths[sequence]
    position = length - stops[sequence] + base  # of the tile's first row
    first, last = position + start, position + stop - 1
    seen = variant.kv_range(first, last, length)
    met = work_list(
        QueryTiles(sequence, base + start, stop - start, first, length, *seen), variant, cut.keys
    )
    visits = jnp.where(is_used, jnp.maximum(met.num_visits, 1), 0)
    tile_stop = met.tile_start + visits
    valid_rows = _valid_rows(cut, length, tile_stop - 1)
    edge_visits = jnp.maximum(tile_stop - met.full_stop, 1)
    item = Item(
        sequence=jnp.minimum(sequence, batch - 1),  # a row of the table, for padding too
        row_group=base // ROW_GROUP,
        first_position=position,
        row_start=start,
        row_stop=stop,
        seq_length=length,
        tile_stop=tile_stop,
        edge_visits=edge_visits,
        full_visits=jnp.maximum(tile_stop - met.full_start, edge_visits),
        num_visits=visits,
        block_start=met.block_start,
        block_stop=jnp.maximum(met.block_stop, met.block_start),
        valid_rows=valid_rows,
    )
    unused = item.without_keys(cut.keys.rows)
    item = jax.tree.map(partial(jnp.where, is_used), item, unused)
    order = jnp.argsort(-visits, stable=True)
    return TileList(
        items=jnp.stack(item, axis=1)[order],
        num_items=ends[-1:],
        made_for=MadeFor.of(cut, variant, schedule),
    )


def _valid_rows(cut: Cut, length: Array, tile: Array) -> Array:
    """Rows of a tile before the sequence's end; all of them where the end is that of a block, for
    then what follows is no slot of it."""
    within = length - cut.keys.origin(tile)[0] - cut.keys.origin(tile)[1]
    is_cut = length % cut.keys.block_size != 0
    return jnp.where(is_cut, jnp.clip(within, 0, cut.keys.rows), cut.keys.rows)
