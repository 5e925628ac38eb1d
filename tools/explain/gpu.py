"""How the GPU kernels take a case, on a Hopper that need not be here."""

from typing import Any

import numpy as np

from benchmarks.workload import APPEND, FUSED, Case
from paged_kv.kernels.core.mixed import split_schedule
from paged_kv.kernels.core.problem import AppendProblem, Problem
from paged_kv.kernels.core.schedule import Schedule, tile_queries
from paged_kv.kernels.gpu import (
    append,
    attention,
    decode_plan,
    plan,
    prefill_list,
    prefill_plan,
    worklist,
)

from . import explained
from .explained import Explained, Scratch, Unsupported, Visits, Worker


def explain(case: Case) -> list[Explained]:
    """The kernels that the case would run, in their order.

    Raises:
      Unsupported: there is none; says why.
    """
    new = explained.append_problem_of(case)
    if case.op == APPEND:
        return [_append(case, new)]
    problem = explained.problem_of(case)
    if (reason := plan.unsupported(problem)) is not None:
        raise Unsupported(reason)
    schedule = explained.schedule_of(case, problem)
    fused = decode_plan.plan_of(problem, appends=True)
    if case.op == FUSED and fused is not None and append.unsupported(new) is None:
        return [_decode(problem, fused, schedule)]
    kernels = [_append(case, new)] if case.op == FUSED else []
    singles = attention.singles_of(problem)
    if singles is not None and (cut := decode_plan.plan_of(singles)) is not None:
        apart, schedule = split_schedule(schedule)
        kernels.append(_decode(singles, cut, apart))
    if (cut := decode_plan.plan_of(problem)) is not None:
        return [*kernels, _decode(problem, cut, schedule)]
    if (cut := prefill_plan.plan_of(problem)) is not None:
        return [*kernels, _prefill(problem, cut, schedule)]
    return [*kernels, _ragged(case, problem)]


def _decode(problem: Problem, cut: decode_plan.DecodePlan, schedule: Schedule) -> Explained:
    work = worklist.make(cut.line, problem.variant, schedule)
    workers = []
    for number, share in enumerate(work.parts_of_ctas()):
        groups = []
        for part in share:
            full_stop = part.full_stop if cut.has_maskless_loop else 0
            groups.append(
                explained.tile_visits(part.sequence, part.tile_start, part.tile_stop, 0, full_stop)
            )
        workers.append(Worker(f"CTA {number}", groups))
    turns = ", its consumers in turn" if cut.turns > 1 else ""
    legend = f"a tile of {_tokens(cut.keys)}, all heads{turns}; the last comes first"
    name = "decode" + (" with append fused in" if cut.appends else "")
    return _explained(name, problem, cut, decode_plan.scratch(problem, cut), workers, legend)


def _prefill(problem: Problem, cut: prefill_plan.PrefillPlan, schedule: Schedule) -> Explained:
    made = prefill_list.make(cut.cut, problem.variant, schedule)
    items = np.asarray(made.items)[: int(made.num_items[0])].tolist()
    workers = [Worker(f"CTA {cta}", []) for cta in range(cut.num_ctas)]
    for place in range(len(items) * cut.parts):
        turn, cta = divmod(place, cut.num_ctas)
        item = prefill_list.Item(*items[place // cut.parts])
        counts = (False, item.edge_visits), (True, item.full_visits - item.edge_visits)
        counts = *counts, (False, item.num_visits - item.full_visits)
        visits = [Visits(item.sequence, whole, number) for whole, number in counts if number]
        workers[cut.num_ctas - 1 - cta if turn % 2 else cta].groups.append(visits)
    parts = prefill_plan.scratch(problem, cut)
    heads = ", two heads of a kv head" if cut.heads_per_item == 2 else ", one head"
    return Explained(
        kernel="prefill",
        problem=problem,
        plan=cut,
        scratch=_scratch(parts),
        num_bytes=plan.smem_bytes(parts),
        limit=plan.SMEM_BYTES,
        workers=workers,
        legend=(
            f"a tile of {_tokens(cut.keys)} for {cut.tile_tokens} query tokens{heads}; "
            "the last comes first"
        ),
    )


def _ragged(case: Case, problem: Problem) -> Explained:
    cut = plan.make_plan(problem)
    tiles = tile_queries(
        explained.schedule_of(case, problem),
        problem.variant,
        num_tokens=problem.num_tokens,
        tile_tokens=cut.tile_tokens,
    )
    items = plan.work_list(tiles, problem.variant, cut.keys)
    full_stop = items.full_stop if cut.has_maskless_loop else items.full_start
    columns = (items.sequence, items.tile_start, items.tile_stop, items.full_start, full_stop)
    visits = [explained.tile_visits(*row) for row in explained.rows(*columns)]
    workers = [
        Worker(
            f"CTA {cta}",
            [visits[i // cut.parts] for i in range(cta, cut.num_items, cut.num_ctas)],
        )
        for cta in range(cut.num_ctas)
    ]
    kernel, parts = "attention over ragged tiles of queries", plan.scratch(problem, cut)
    split = f", 1 of {cut.parts} parts of their heads" if cut.parts > 1 else ""
    legend = f"a tile of {_tokens(cut.keys)} for {cut.tile_tokens} query tokens{split}"
    return _explained(kernel, problem, cut, parts, workers, legend)


def _append(case: Case, problem: AppendProblem) -> Explained:
    if (reason := append.unsupported(problem)) is not None:
        raise Unsupported(reason)
    cut = append.make_plan(problem)
    owners = np.repeat(np.arange(case.batch), case.queries).tolist()
    chunks = [owners[i : i + cut.chunk_tokens] for i in range(0, len(owners), cut.chunk_tokens)]
    count = lambda chunk: [Visits(s, True, chunk.count(s)) for s in sorted(set(chunk))]
    workers = [Worker(f"CTA {cta}", [count(chunk)]) for cta, chunk in enumerate(chunks)]
    legend = f"a new token, through {'registers' if cut.vector else 'shared memory'} to its slot"
    return _explained("append", problem, cut, append.scratch(problem, cut), workers, legend)


def _explained(
    kernel: str,
    problem: Problem | AppendProblem,
    cut: Any,
    parts: dict,
    workers: list[Worker],
    legend: str,
) -> Explained:
    """A kernel's answer, its shared memory weighed."""
    memory = {"scratch": _scratch(parts), "num_bytes": plan.smem_bytes(parts)}
    return Explained(
        kernel, problem, cut, **memory, limit=plan.SMEM_BYTES, workers=workers, legend=legend
    )


def _tokens(keys: plan.KeyTiles) -> str:
    """What a tile of keys holds."""
    if keys.tiles_per_block > 1:
        return f"{keys.rows} (token, head) rows, {keys.tiles_per_block} to a block"
    return f"{keys.blocks_per_tile * keys.block_size} tokens"


def _scratch(parts: dict) -> list[Scratch]:
    """Buffers by name; two in one place count once, barriers are few bytes."""
    found = []
    for name, part in parts.items():
        if isinstance(part, plan.Union):
            for which, buffer in zip(("", " or"), part, strict=True):
                found.append(Scratch(name + which, buffer.shape, buffer.dtype, 0))
            found[-2] = found[-2]._replace(num_bytes=plan.smem_bytes({name: part}))
        elif isinstance(part, plan.Barriers):
            size = plan.smem_bytes({name: part})
            found.append(Scratch(name, (part.num_barriers,), "barrier", size))
        else:
            size = plan.smem_bytes({name: part})
            found.append(Scratch(name, part.shape, part.dtype, size))
    return found
