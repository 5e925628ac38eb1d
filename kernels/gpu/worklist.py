"""The work list of decode: the line of all sequences' tiles, cut into equal shares.

Made by XLA, once per step, and shared by all layers: a part of a `Schedule`.  No Pallas here.

    line    | sequence 0         | 2   | 3                        |    (1 is empty)
    CTAs    | 0         | 1         | 2         | 3          |

A piece is what a CTA has of a sequence; in the order of the line, either the CTA or the sequence
goes up from one piece to the next, so that their sum is a place of the piece's own, and the places
of a sequence's pieces follow each other.  The idea of one line, cut where it may be, is stream-K
(Osama et al., 2023), for attention LeanAttention (Sanovar et al., 2024).
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..core.schedule import Schedule, tile_queries
from ..core.variant import Variant
from .decode_plan import MIN_SHARE, Line
from .plan import divide, work_list


class Stretch(NamedTuple):
    """What a sequence has of the line, from some tile on; all zeros where it has nothing."""

    before: Any  # tiles of the sequence in front of these, which other CTAs have
    seq_length: Any
    tile_start: Any  # tiles [tile_start, tile_stop)
    full_stop: Any  # those from here on may hold tokens that are not there
    tile_stop: Any
    block_start: Any  # blocks [block_start, block_stop) hold the keys that are seen
    block_stop: Any
    next: Any  # the next sequence that has something; any, if there is none

    def part(self, sequence: Any, most: Any) -> "Part":
        """The first tiles, `most` at most; of ints too."""
        smaller, larger = (min, max) if isinstance(most, int) else (jnp.minimum, jnp.maximum)
        stop = smaller(self.tile_stop, self.tile_start + most)
        full_stop = smaller(larger(self.full_stop, self.tile_start), stop)
        blocks = self.block_start, self.block_stop
        return Part(sequence, self.tile_start, full_stop, stop, *blocks)

    def is_whole(self, part: "Part") -> Any:
        """Whether the part is all that the sequence has of the line."""
        return (self.before == 0) & (part.tile_stop == self.tile_stop)


class Part(NamedTuple):
    """Tiles of a sequence, visited from the last one down: the end of the sequence comes first."""

    sequence: Any
    tile_start: Any
    full_stop: Any
    tile_stop: Any
    block_start: Any
    block_stop: Any

    @property
    def num_visits(self) -> Any:
        return self.tile_stop - self.tile_start

    @property
    def num_edges(self) -> Any:
        """Visits, the first ones, whose tiles may hold tokens that are not there."""
        return self.tile_stop - self.full_stop

    def visited(self, index: Any) -> Any:
        return self.tile_stop - 1 - index


class Share(NamedTuple):
    """What a CTA has: so many tiles of the line, from `sequence` on."""

    num_tiles: Any
    sequence: Any


class Pieces(NamedTuple):
    """What a sequence was cut into; none where it has nothing."""

    place: Any  # of the first one
    count: Any


@dataclass(frozen=True)
class MadeFor:
    """What a list depends on besides the arrays of its schedule."""

    line: Line
    is_causal: bool
    window: tuple[int, int] | None


ROW_WIDTH = 16  # a power of two: the kernel finds a row by a shift
NUM_SHARED = len(Stretch._fields)  # columns before those of a Share, or of Pieces


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WorkList:
    """Attributes:
    rows: int32 (batch + num_ctas, ROW_WIDTH), one array so that one launch can write it.
      A row per sequence: its Stretch, then its Pieces; after those a row per CTA: the Stretch that
      its first sequence has from there on, then its Share.  All zeros: nothing to do.
    """

    rows: Array
    made_for: MadeFor = field(metadata={"static": True})

    def only_if(self, condition: Array) -> "WorkList":
        return replace(self, rows=jnp.where(condition, self.rows, 0))

    @property
    def stretches(self) -> Array:
        """int32 (batch, fields of a Stretch)."""
        return self.rows[: -self.made_for.line.num_ctas, :NUM_SHARED]

    @property
    def pieces(self) -> Array:
        """int32 (batch, fields of Pieces)."""
        stop = NUM_SHARED + len(Pieces._fields)
        return self.rows[: -self.made_for.line.num_ctas, NUM_SHARED:stop]

    @property
    def shares(self) -> Array:
        """int32 (num_ctas, fields of a Stretch and of a Share)."""
        stop = NUM_SHARED + len(Share._fields)
        return self.rows[-self.made_for.line.num_ctas :, :stop]

    def parts_of_ctas(self) -> list[list[Part]]:
        """What each CTA has, as the kernel finds it; of concrete arrays, in ints."""
        stretches = [Stretch(*row) for row in np.asarray(self.stretches).tolist()]
        shares = np.asarray(self.shares).tolist()
        return [_parts(Stretch(*x[:NUM_SHARED]), Share(*x[NUM_SHARED:]), stretches) for x in shares]


def _parts(stretch: Stretch, share: Share, stretches: list[Stretch]) -> list[Part]:
    parts, sequence, left = [], share.sequence, share.num_tiles
    while left > 0:
        parts.append(stretch.part(sequence, left))
        left -= parts[-1].num_visits
        sequence = stretch.next
        stretch = stretches[sequence]
    return parts


def make(line: Line, variant: Variant, schedule: Schedule) -> WorkList:
    """The list of one step, of lengths that may be any.

    Three launches after that of the lengths: where sequences lie in the line, which one is at the
    start of a share, and the rows.  All else is fused with them.
    """
    batch, num_ctas = schedule.seq_lengths.shape[0], line.num_ctas
    tiles = tile_queries(schedule, variant, num_tokens=batch, tile_tokens=1)
    items = work_list(tiles, variant, line.keys)
    sequence = jnp.arange(batch, dtype=jnp.int32)
    # not a cumsum, which takes several launches
    is_before = sequence[None, :] <= sequence[:, None]
    end = jnp.sum(jnp.where(is_before, items.num_visits[None, :], 0), axis=1, dtype=jnp.int32)
    begin, total = end - items.num_visits, end[-1]

    active = jnp.clip(divide(total + (MIN_SHARE - 1), MIN_SHARE), 1, num_ctas)
    share, longer = lax.div(total, active), lax.rem(total, active)  # the first have one tile more
    cta = jnp.arange(num_ctas, dtype=jnp.int32)
    bound = lambda cta: jnp.minimum(cta * share + jnp.minimum(cta, longer), total)

    # the sequence at a position is the first one that ends after it
    places = jnp.concatenate([end, bound(cta)])
    found = jnp.sum(end[None, :] <= places[:, None], axis=1, dtype=jnp.int32)
    found = jnp.minimum(found, batch - 1)
    following, first = found[:batch], found[batch:]

    first_cta, last_cta = (_share_at(x, share, longer) for x in (begin, end - 1))
    pieces = (first_cta + sequence, last_cta - first_cta + 1)
    pieces = Pieces(*(jnp.where(end > begin, x, 0) for x in pieces))

    # all columns of a row are read off the row's sequence
    of_row = jnp.concatenate([sequence, first])
    fields = items._asdict() | {"next": following}
    fields = {name: fields[name][of_row] for name in Stretch._fields[1:]}
    # a CTA may begin within its first sequence
    before = jnp.concatenate([jnp.zeros((batch,), jnp.int32), bound(cta) - begin[first]])
    fields["tile_start"] += before
    both = (pieces.place, bound(cta + 1) - bound(cta)), (pieces.count, first)
    columns = [before, *fields.values(), *map(jnp.concatenate, both)]
    columns += [jnp.zeros_like(of_row)] * (ROW_WIDTH - len(columns))
    return WorkList(
        rows=jnp.stack(columns, axis=1),
        made_for=MadeFor(line, variant.is_causal, variant.window),
    )


def _share_at(position: Array, share: Array, longer: Array) -> Array:
    """Which share a position is in."""
    in_longer = lax.div(position, share + 1)
    in_others = longer + lax.div(position - longer * (share + 1), jnp.maximum(share, 1))
    return jnp.where(in_longer < longer, in_longer, in_others)
