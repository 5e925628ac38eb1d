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
from jax import Array

from ..core.problem import CacheShape
from ..core.schedule import Schedule, tile_queries
from ..core.variant import Variant
from .decode_plan import MIN_SHARE, Line, is_supported
from .plan import work_list


class Stretch(NamedTuple):
    """What a sequence has of the line; all zeros where it has nothing."""

    begin: Any  # position of its first tile in the line
    seq_length: Any
    tile_start: Any  # tiles [tile_start, tile_stop) are in the line
    full_stop: Any  # those from here on may hold tokens that are not there
    tile_stop: Any
    block_start: Any  # blocks [block_start, block_stop) hold the keys that are seen
    block_stop: Any
    next: Any  # the next sequence that has something; any, if there is none

    @property
    def end(self) -> Any:
        return self.begin + self.tile_stop - self.tile_start

    def part(self, sequence: Any, start: Any, stop: Any) -> "Part":
        """Positions [start, stop) of the line."""
        shift = self.tile_start - self.begin
        first, last = start + shift, stop + shift
        full_stop = jnp.clip(self.full_stop, first, last)
        return Part(sequence, first, full_stop, last, self.block_start, self.block_stop)


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
    """What a CTA has: positions [start, stop) of the line, from `sequence` on."""

    start: Any
    stop: Any
    sequence: Any


@dataclass(frozen=True)
class MadeFor:
    """What a list depends on besides the arrays of its schedule."""

    line: Line
    is_causal: bool
    window: tuple[int, int] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WorkList:
    """Attributes:
    stretches: int32 (batch, fields of a Stretch).
    shares: int32 (num_ctas, fields of a Share and of its first Stretch).
    pieces: int32 (batch, 2), place of a sequence's first piece, and how many it has.
    enabled: int32 (1,), 0 if nothing is to be done after all.
    """

    stretches: Array
    shares: Array
    pieces: Array
    enabled: Array
    made_for: MadeFor = field(metadata={"static": True})

    def only_if(self, condition: Array) -> "WorkList":
        return replace(self, enabled=jnp.where(condition, self.enabled, 0))


def of_step(cache: CacheShape, num_query_heads: int, schedule: Schedule) -> WorkList | None:
    """What every decode call over such a cache needs; None where the kernel is another."""
    made_for = schedule.made_for
    if made_for.is_packed or not is_supported(cache, num_query_heads):
        return None
    return make(Line.of(cache), Variant(1.0, made_for.is_causal, made_for.window), schedule)


def for_line(line: Line, variant: Variant, schedule: Schedule) -> WorkList:
    """The schedule's list if it is for this line, or one made now."""
    given = schedule.work.get("mosaic_gpu")
    wanted = MadeFor(line, variant.is_causal, variant.window)
    if isinstance(given, WorkList) and given.made_for == wanted:
        return given
    return make(line, variant, schedule)


def make(line: Line, variant: Variant, schedule: Schedule) -> WorkList:
    """The list of one step, of lengths that may be any."""
    batch = schedule.seq_lengths.shape[0]
    tiles = tile_queries(schedule, variant, num_tokens=batch, tile_tokens=1)
    items = work_list(tiles, variant, line.keys)
    end = jnp.cumsum(items.num_visits, dtype=jnp.int32)
    begin, total = end - items.num_visits, end[-1]

    active = jnp.clip((total + (MIN_SHARE - 1)) // MIN_SHARE, 1, line.num_ctas)
    share, longer = total // active, total % active  # the first CTAs have one tile more
    cta = jnp.arange(line.num_ctas + 1, dtype=jnp.int32)
    bounds = jnp.minimum(cta * share + jnp.minimum(cta, longer), total)

    # the sequence at a position is the first one that ends after it
    places = jnp.concatenate([bounds[:-1], end])
    following = jnp.sum(end[None, :] <= places[:, None], axis=1, dtype=jnp.int32)
    following = jnp.minimum(following, batch - 1)
    first, following = following[: line.num_ctas], following[line.num_ctas :]

    fields = items._asdict() | {"begin": begin, "next": following}
    stretch = Stretch(*(fields[name] for name in Stretch._fields))
    has_tiles = end > begin
    cta_of = lambda position: _share_at(position, share, longer)
    first_cta, last_cta = cta_of(begin), cta_of(end - 1)
    sequence = jnp.arange(batch, dtype=jnp.int32)
    pieces = (first_cta + sequence, last_cta - first_cta + 1)
    stack = lambda columns: jnp.stack(columns, axis=1)
    return WorkList(
        stretches=stack(stretch),
        shares=stack([bounds[:-1], bounds[1:], first, *(column[first] for column in stretch)]),
        pieces=stack([jnp.where(has_tiles, x, 0) for x in pieces]),
        enabled=jnp.ones((1,), jnp.int32),
        made_for=MadeFor(line, variant.is_causal, variant.window),
    )


def _share_at(position: Array, share: Array, longer: Array) -> Array:
    """Which share a position is in."""
    in_longer = position // (share + 1)
    in_others = longer + (position - longer * (share + 1)) // jnp.maximum(share, 1)
    return jnp.where(in_longer < longer, in_longer, in_others)
