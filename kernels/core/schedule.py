"""Work lists: which tile of query tokens meets which keys.

`Schedule` holds what depends on lengths and table only; it is made once per step and shared by
all layers.  `tile_queries` cuts packed queries into tiles of whole tokens of one sequence each, the
unit both backends loop over, and `untile` puts results back.

Source: made once per step and shared, as the plan of FlashInfer (Ye et al., 2025) is; ragged
queries in tiles of one sequence each as in FlashAttention-2 (Dao, 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from . import layout
from .problem import CacheShape
from .variant import Variant


@dataclass(frozen=True)
class MadeFor:
    """The facts a schedule depends on; a call with others must not use it."""

    batch: int
    max_blocks_per_seq: int
    num_blocks: int
    block_size: int
    num_query_heads: int
    is_packed: bool
    is_causal: bool
    window: tuple[int, int] | None
    num_tokens: int | None = None  # of a packed batch, padding included; None: any number

    @classmethod
    def of(
        cls,
        cache: CacheShape,
        num_query_heads: int,
        is_packed: bool,
        variant: Variant,
        num_tokens: int | None = None,
    ) -> "MadeFor":
        return cls(
            cache.batch,
            cache.max_blocks_per_seq,
            cache.num_blocks,
            cache.block_size,
            num_query_heads,
            is_packed,
            variant.is_causal,
            variant.window,
            num_tokens if is_packed else None,
        )


class BackendWork(Protocol):
    """A pytree of a backend's own that depends on lengths and table, not on the layer."""

    def only_if(self, condition: Array) -> Any:
        """The same, with nothing to do where the condition, a bool scalar, is false."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Schedule:
    """What a step's attention calls share; made by `make_schedule`, valid for one state of a cache.

    Attributes:
      seq_lengths: int32 (batch,), tokens to attend over: 0 where a used table entry is outside
        the pool.
      starts: int32 (batch + 1,), prefix sums of query tokens of a packed batch; None: one token per
        sequence, so that nothing has to be made.
      made_for: the facts it was made for.
      work: what backends made of it besides, by implementation; one that misses its own makes it
        in every call.
      is_apart: bool (batch,), sequences of a packed batch whose query tokens another call takes, so
        that none of this call's tiles are theirs; None: there are none.

    Source: the plan of FlashInfer (Ye et al., 2025), made once per step and shared by all layers.
    """

    seq_lengths: Array
    starts: Array | None
    made_for: MadeFor = field(metadata={"static": True})
    work: Mapping[str, BackendWork] = field(default_factory=dict)
    is_apart: Array | None = None

    @property
    def query_lengths(self) -> Array:
        """int32 (batch,), query tokens that this call takes."""
        starts = self.query_start_loc
        counts = starts[1:] - starts[:-1]
        return counts if self.is_apart is None else jnp.where(self.is_apart, 0, counts)

    @property
    def query_start_loc(self) -> Array:
        """int32 (batch + 1,), prefix sums of query tokens."""
        return layout.start_locations(self.starts, self.made_for.batch)

    def only_if(self, condition: Array) -> "Schedule":
        """The schedule, or, where a condition is false, one in which no sequence has tokens.

        Args:
          condition: bool ().
        """
        work = {name: backend.only_if(condition) for name, backend in self.work.items()}
        return replace(self, seq_lengths=jnp.where(condition, self.seq_lengths, 0), work=work)


def make(
    made_for: MadeFor, block_table: Array, seq_lengths: Array, query_start_loc: Array | None
) -> Schedule:
    """The schedule of one step."""
    variant = Variant(1.0, made_for.is_causal, made_for.window)
    if query_start_loc is None:
        start, stop = variant.range_of_last(seq_lengths)
    else:
        first = seq_lengths - (query_start_loc[1:] - query_start_loc[:-1])
        start, stop = variant.kv_range(first, seq_lengths - 1, seq_lengths)
    used = (None if variant.left is None else start), stop
    sizes = {"block_size": made_for.block_size, "num_blocks": made_for.num_blocks}
    lengths = layout.lengths_if_valid(block_table, seq_lengths, *used, **sizes)
    return Schedule(lengths, query_start_loc, made_for)


class QueryTiles(NamedTuple):
    """Tiles of whole query tokens of one sequence, int32 (num_tiles,) each."""

    sequence: Array  # row of the table
    first_token: Array  # packed index of the tile's first token
    num_tokens: Array  # 0: nothing to do
    first_position: Array  # position of the first token; may be negative
    seq_length: Array
    kv_start: Array  # keys [kv_start, kv_stop) are seen by some token of the tile
    kv_stop: Array


def num_query_tiles(num_tokens: int, batch: int, tile_tokens: int, is_packed: bool) -> int:
    """Tiles that always suffice: each sequence may leave its last one partly empty."""
    if not is_packed:
        return batch
    return min(num_tokens, num_tokens // tile_tokens + batch)


def tile_queries(
    schedule: Schedule, variant: Variant, *, num_tokens: int, tile_tokens: int
) -> QueryTiles:
    """The work list of one call, tiles of a sequence in order, unused tiles last."""
    lengths = schedule.seq_lengths
    batch = lengths.shape[0]
    num_tiles = num_query_tiles(num_tokens, batch, tile_tokens, schedule.made_for.is_packed)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    if not schedule.made_for.is_packed:
        seen = variant.range_of_last(lengths)
        return QueryTiles(tile, tile, jnp.ones_like(tile), lengths - 1, lengths, *seen)
    starts, counts = schedule.query_start_loc, schedule.query_lengths
    ends = _tile_ends(counts, tile_tokens)
    sequence = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    is_used = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    before = jnp.where(sequence > 0, ends[sequence - 1], 0)
    index = (tile - before) * tile_tokens
    count = jnp.where(is_used, jnp.clip(counts[sequence] - index, 0, tile_tokens), 0)
    length = lengths[sequence]
    first_position = length - counts[sequence] + index
    start, stop = variant.kv_range(first_position, first_position + count - 1, length)
    return QueryTiles(
        sequence, starts[sequence] + index, count, first_position, length, start, stop
    )


def gather_tiles(query: Array, tiles: QueryTiles, tile_tokens: int, is_packed: bool) -> Array:
    """(num_tokens, ...) to (num_tiles, tile_tokens, ...); rows past a tile's tokens are 0."""
    if not is_packed:
        return query[:, None]
    within = jnp.arange(tile_tokens, dtype=jnp.int32)
    token = tiles.first_token[:, None] + within[None, :]
    is_real = within[None, :] < tiles.num_tokens[:, None]
    rows = query[jnp.minimum(token, query.shape[0] - 1)]
    is_real = jax.lax.broadcast_in_dim(is_real, rows.shape, (0, 1))
    return jnp.where(is_real, rows, jnp.zeros_like(rows))


def untile(schedule: Schedule, out: Array, lse: Array, *, num_tokens: int) -> tuple[Array, Array]:
    """Packed results of tiles: (num_tiles, tile_tokens, ...) to (num_tokens, ...).

    Padding tokens get 0 and -inf, those of sequences apart anything.
    """
    if not schedule.made_for.is_packed:
        return out[:, 0], lse[:, 0]
    starts, tile_tokens = schedule.query_start_loc, out.shape[1]
    ends = _tile_ends(schedule.query_lengths, tile_tokens)
    token = layout.locate_tokens(starts, schedule.seq_lengths, num_tokens)
    before = jnp.where(token.sequence > 0, ends[token.sequence - 1], 0)
    tile = jnp.clip(before + token.step_index // tile_tokens, 0, out.shape[0] - 1)
    row = token.step_index % tile_tokens
    is_real = token.is_real[:, None]
    out, lse = out[tile, row], lse[tile, row]
    return jnp.where(is_real[..., None], out, jnp.zeros_like(out)), jnp.where(
        is_real, lse, -jnp.inf
    )


def _tile_ends(counts: Array, tile_tokens: int) -> Array:
    """int32 (batch,): tiles of this sequence and all before it."""
    return jnp.cumsum((counts + (tile_tokens - 1)) // tile_tokens, dtype=jnp.int32)
