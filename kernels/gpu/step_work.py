"""The GPU's part of a `Schedule`: lists that all layers of a step share.  No Pallas here."""

from typing import NamedTuple

from jax import Array

from ..core.mixed import split_schedule
from ..core.problem import CacheShape
from ..core.schedule import Schedule
from ..core.variant import Variant
from . import decode_plan, mixed, prefill_list, prefill_plan, worklist
from .decode_plan import Line
from .prefill_list import TileList
from .worklist import WorkList

NAME = "mosaic_gpu"


class StepWork(NamedTuple):
    """Lists of the kernels that a step may take."""

    decode: WorkList | None  # of all sequences, or of those with one query token
    prefill: TileList | None

    def only_if(self, condition: Array) -> "StepWork":
        return StepWork(
            None if self.decode is None else self.decode.only_if(condition),
            None if self.prefill is None else self.prefill.only_if(condition),
        )


def of_step(cache: CacheShape, num_query_heads: int, schedule: Schedule) -> StepWork:
    """What calls over such a cache need, without slopes; other calls make their own."""
    made_for = schedule.made_for
    variant = Variant(1.0, made_for.is_causal, made_for.window)
    has_decode = decode_plan.is_supported(cache, num_query_heads)
    line_of = lambda step: worklist.make(Line.of(cache), variant, step) if has_decode else None
    if not made_for.is_packed:
        return StepWork(line_of(schedule), None)
    if made_for.num_tokens is None:
        return StepWork(None, None)
    cut = prefill_plan.cut_of(cache, num_query_heads, made_for.num_tokens)
    if cut is None:
        return StepWork(None, None)
    singles = None
    if has_decode and mixed.is_worthwhile(cache.batch, made_for.num_tokens):
        singles, schedule = split_schedule(schedule)
        singles = line_of(singles)
    return StepWork(singles, prefill_list.make(cut, variant, schedule))


def decode_list(line: Line, variant: Variant, schedule: Schedule) -> WorkList:
    """The schedule's list if it is for this line, or one made now."""
    given = _given(schedule).decode
    wanted = worklist.MadeFor(line, variant.is_causal, variant.window)
    if given is not None and given.made_for == wanted:
        return given
    return worklist.make(line, variant, schedule)


def prefill_tiles(cut: prefill_plan.Cut, variant: Variant, schedule: Schedule) -> TileList:
    """The schedule's list if it is for this cut, or one made now."""
    given = _given(schedule).prefill
    wanted = prefill_list.MadeFor.of(cut, variant, schedule)
    if given is not None and given.made_for == wanted:
        return given
    return prefill_list.make(cut, variant, schedule)


def _given(schedule: Schedule) -> StepWork:
    given = schedule.work.get(NAME)
    return given if isinstance(given, StepWork) else StepWork(None, None)
