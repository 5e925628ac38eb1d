"""The TPU's part of a `Schedule`: the rows of a decode step, which all layers share."""

from dataclasses import dataclass, field, replace

import jax
from jax import Array

from ..core.problem import CacheShape, Problem
from ..core.schedule import Schedule
from ..core.variant import Variant
from . import decode_plan, device, packed, worklist
from .decode_plan import DecodePlan
from .worklist import DecodeRows

NAME = "mosaic_tpu"


@dataclass(frozen=True)
class MadeFor:
    """What rows depend on besides the arrays of their schedule."""

    rows_per_program: int
    num_programs: int
    tile_tokens: int
    is_causal: bool
    window: tuple[int, int] | None

    @classmethod
    def of(cls, plan: DecodePlan, variant: Variant) -> "MadeFor":
        sizes = plan.rows_per_program, plan.num_programs, plan.tile_tokens
        return cls(*sizes, variant.is_causal, variant.window)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StepWork:
    rows: DecodeRows
    made_for: MadeFor = field(metadata={"static": True})

    def only_if(self, condition: Array) -> "StepWork":
        return replace(self, rows=self.rows.only_if(condition))


def of_step(cache: CacheShape, num_query_heads: int, schedule: Schedule) -> StepWork | None:
    """What decode calls over such a cache need, without slopes; other calls make their own."""
    made_for = schedule.made_for
    if made_for.is_packed:
        return None
    variant = Variant(1.0, made_for.is_causal, made_for.window)
    problem = Problem(cache, cache.batch, num_query_heads, cache.dtype, False, variant)
    problem = packed.by_rows(problem)
    plan = decode_plan.plan_decode(problem, device.vmem_bytes())
    if plan is None:
        return None
    rows = worklist.of_batch(plan, *decode_plan.seen(problem, schedule.seq_lengths))
    return StepWork(rows, MadeFor.of(plan, variant))


def decode_rows(problem: Problem, plan: DecodePlan, schedule: Schedule) -> DecodeRows:
    """The schedule's rows if they are for this plan, or rows made now."""
    given = schedule.work.get(NAME)
    wanted = MadeFor.of(plan, problem.variant)
    if isinstance(given, StepWork) and given.made_for == wanted:
        return given.rows
    return worklist.of_batch(plan, *decode_plan.seen(problem, schedule.seq_lengths))
