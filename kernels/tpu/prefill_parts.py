"""A tile of keys that some query sees a part of: part by part, by the stripes that see the part.

Groups of items at parts are one stream; masks are stored for a group, before the stream comes to
it, only where they cut, and where they do not there is a group without them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import prefill_step as steps
from .prefill_plan import NO_LIMITS
from .prefill_program import Kernel, step_of
from .prefill_step import Place, Step
from .prefill_visits import Visit


class _Part(NamedTuple):
    """A group of items at a part of a tile; parts and groups are counted together."""

    number: Any
    place: Place
    kind: Any  # of the three below


FULL = 0  # every query of the group sees every key of the part
CUT = 1
HALF = 2  # as CUT, and no query sees the latter half of the keys


class _Stream(NamedTuple):
    """Where a visit part by part has come to."""

    here: _Part
    before: Place
    limits: Any  # slot of the next one's limits


class _Parts(NamedTuple):
    """A visit part by part."""

    kernel: Kernel
    visit: Visit

    @property
    def stop(self) -> Any:
        return jnp.int32(self.kernel.plan.num_parts * self.kernel.plan.part_groups)

    @property
    def have_halves(self) -> bool:
        return self.kernel.plan.part_keys % (2 * steps.SUB) == 0

    def _queries(self, number: Any) -> tuple[Any, Any, Any]:
        """Positions [first, last] of a group's queries; whether there are any."""
        plan, programs, i = self.kernel.plan, self.kernel.programs, self.visit.program
        group = lax.rem(number, jnp.int32(plan.part_groups))
        block = lax.div(group * plan.part_group_items, jnp.int32(plan.num_kv_heads))
        token, first = block * plan.item_tokens, programs.first_position[i]
        stop = jnp.minimum(token + plan.part_group_tokens, programs.num_tokens[i])
        return first + token, first + stop - 1, token < stop

    def _position(self, number: Any) -> Any:
        plan = self.kernel.plan
        part = lax.div(number, jnp.int32(plan.part_groups))
        return self.visit.tile * plan.tile_keys + part * plan.part_keys

    def is_seen(self, number: Any) -> Any:
        """Whether some query of the group sees some key of the part."""
        first, last, is_some = self._queries(number)
        length = self.kernel.programs.seq_length[self.visit.program]
        start, stop = self.kernel.problem.variant.kv_range(first, last, length)
        position = self._position(number)
        return is_some & (start < position + self.kernel.plan.part_keys) & (position < stop)

    def next_from(self, number: Any) -> Any:
        """The first part and group from this one on with something to see; `stop` if none is."""
        is_idle = lambda n: (n < self.stop) & ~self.is_seen(jnp.minimum(n, self.stop - 1))
        return lax.while_loop(is_idle, lambda n: n + 1, number)

    def at(self, number: Any, limits: Any) -> _Part:
        """A part and group; if it needs masks, they are stored in this slot of limits."""
        kernel, plan, visit = self.kernel, self.kernel.plan, self.visit
        first, last, _ = self._queries(number)
        length, position = kernel.programs.seq_length[visit.program], self._position(number)
        start, stop = kernel.problem.variant.full_range(first, last, length)
        is_full = (start <= position) & (position + plan.part_keys <= stop)
        place = Place(
            lax.rem(number, jnp.int32(plan.part_groups)) * plan.part_group_items,
            visit.key_slot,
            visit.slot,
            lax.div(number, jnp.int32(plan.part_groups)),
            position,
            jnp.where(is_full, NO_LIMITS, limits),
        )
        step = self.step(place, place, place)
        pl.when(~is_full)(lambda: steps.store_limits(step, length))
        _, seen_stop = kernel.problem.variant.kv_range(first, last, length)
        is_half = self.have_halves & (seen_stop <= position + plan.part_keys // 2)
        return _Part(number, place, jnp.where(is_full, FULL, jnp.where(is_half, HALF, CUT)))

    def step(self, here: Place, before: Place, after: Place, kind: int = CUT) -> Step:
        places = here, before, after
        return step_of(
            self.kernel,
            self.visit.program,
            places,
            is_masked=kind != FULL,
            is_half=kind == HALF,
        )


def visit_parts(kernel: Kernel, visit: Visit) -> None:
    """A tile that some query sees a part of."""
    parts = _Parts(kernel, visit)
    kinds = (FULL, CUT, HALF) if parts.have_halves else (FULL, CUT)

    def each(stream: _Stream) -> _Stream:
        here, limits = stream.here, stream.limits
        number = parts.next_from(here.number + 1)
        after = parts.at(jnp.minimum(number, parts.stop - 1), limits)
        for kind in kinds:
            step = parts.step(here.place, stream.before, after.place, kind)
            pl.when(here.kind == kind)(partial(steps.advance, step, []))
        return _Stream(after._replace(number=number), here.place, 1 - limits)

    first = parts.next_from(jnp.int32(0))
    is_some = first < parts.stop
    begin = parts.at(jnp.minimum(first, parts.stop - 1), jnp.int32(0))
    for kind in (FULL, CUT):
        step = parts.step(begin.place, begin.place, begin.place, kind)
        is_kind = (begin.kind == FULL) == (kind == FULL)
        pl.when(is_some & is_kind)(partial(steps.fill, step))
    stream = _Stream(begin._replace(number=first), begin.place, jnp.int32(1))
    stream = lax.while_loop(lambda stream: stream.here.number < parts.stop, each, stream)
    end = parts.step(stream.before, stream.before, stream.before)
    pl.when(is_some)(partial(steps.drain, end))
