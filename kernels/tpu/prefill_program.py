"""What the visits of a program of the prefill kernel share, and the steps they are made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.problem import Problem
from .prefill_plan import PrefillPlan
from .prefill_prepare import Preparation
from .prefill_step import Buffers, Place, Step
from .prefill_visits import Programs, VisitCopies


class Kernel(NamedTuple):
    """What the visits of a program share."""

    problem: Problem
    plan: PrefillPlan
    programs: Programs
    query: Any
    slopes: Any
    buffers: Buffers
    copies: VisitCopies
    preparation: Preparation


def kernel_of(problem: Problem, plan: PrefillPlan, is_interpreted: bool, refs: Sequence) -> Any:
    """(Kernel, out, lse) of the refs that the kernel is given."""
    n = len(Programs._fields)
    programs, (query, *rest) = Programs(*refs[:n]), refs[n:]
    slopes = rest.pop(0) if problem.variant.has_alibi else None
    table, key_pool, value_pool, out, lse, *scratch = rest
    *work, raw_keys, raw_values, windows, key_copied, value_copied, window_copied = scratch
    slots = plan.ahead + 1
    scores, tops, weights = work[:slots], work[slots : 2 * slots], work[2 * slots : 2 * slots + 2]
    buffers = Buffers(tuple(scores), tuple(tops), tuple(weights), *work[2 * slots + 2 :])
    copies = VisitCopies(
        problem,
        plan,
        programs,
        table,
        (key_pool, value_pool),
        (raw_keys, raw_values),
        windows,
        (key_copied, value_copied, window_copied),
    )
    tiles = buffers.keys, buffers.values
    preparation = Preparation(plan, programs, copies, tiles, is_interpreted)
    kernel = Kernel(problem, plan, programs, query, slopes, buffers, copies, preparation)
    return kernel, out, lse


def step_of(
    kernel: Kernel,
    program: Any,
    places: tuple[Place, Place, Place],
    *,
    is_whole: bool = False,
    is_masked: bool = False,
    is_half: bool = False,
) -> Step:
    return Step(
        kernel.plan,
        kernel.problem.variant,
        kernel.buffers,
        kernel.query,
        kernel.slopes,
        kernel.programs.first_position[program],
        *places,
        is_whole,
        is_masked,
        is_half,
    )
