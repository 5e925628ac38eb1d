"""How the TPU kernels take a case, on one TensorCore of a chip that need not be here."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks.workload import APPEND, FUSED, Case
from paged_kv.kernels.core.mixed import single_tokens
from paged_kv.kernels.core.problem import AppendProblem, Problem
from paged_kv.kernels.core.schedule import QueryTiles, tile_queries
from paged_kv.kernels.tpu import (
    append,
    append_plan,
    attention,
    decode,
    decode_plan,
    device,
    plan,
    prefill,
    prefill_plan,
    worklist,
)

from . import explained
from .explained import Explained, Scratch, Unsupported, Worker


def explain(case: Case, chip: str) -> list[Explained]:
    """The kernels that the case would run, in their order.

    Raises:
      Unsupported: there is none; says why.
    """
    kind = AbstractDevice(f"TPU{chip[3:]}" if chip.startswith("tpu") else f"TPU {chip}", 1, "tpu")
    # The mesh is what kernels ask for the chip that they are planned for.
    mesh = AbstractMesh((1,), ("core",), (AxisType.Auto,), abstract_device=kind)
    problem, new = explained.problem_of(case), explained.append_problem_of(case)
    if case.op != APPEND and (reason := attention.unsupported(problem)):
        raise Unsupported(reason)
    with jax.sharding.use_abstract_mesh(mesh):
        is_fused = case.op == FUSED and attention.can_append(problem)
        decode_plan_ = decode.plan_of(problem, appends=is_fused)
        prefill_plan_, vmem = prefill.plan_of(problem), device.vmem_bytes()
        singles = single_tokens(problem)
        single_plan = None if singles is None else decode.plan_of(singles)
    kernels = [] if case.op not in (APPEND, FUSED) or is_fused else [_append(case, new)]
    if case.op == APPEND:
        return kernels
    if decode_plan_ is not None:
        return [*kernels, _decode(case, problem, decode_plan_, vmem)]
    if singles is not None and single_plan is not None and 1 in case.queries:
        alone, case = _mixed(case)
        kernels.append(_decode(alone, singles, single_plan, vmem))
        if not any(case.queries):
            return kernels
    if prefill_plan_ is not None:
        return [*kernels, _prefill(case, problem, prefill_plan_)]
    return [*kernels, _general(case, problem)]


def _mixed(case: Case) -> tuple[Case, Case]:
    """The sequences with one query token as a decode step, and the others."""
    lengths, queries = case.seq_lengths, case.queries.tolist()
    alone = tuple(n if q == 1 else 0 for n, q in zip(lengths, queries, strict=True))
    others = tuple(0 if q == 1 else q for q in queries)
    return (
        replace(case, seq_lengths=alone, query_lengths=None),
        replace(case, query_lengths=others),
    )


def _decode(case: Case, problem: Problem, cut: decode_plan.DecodePlan, vmem: int) -> Explained:
    lengths = np.asarray(case.seq_lengths, np.int32)
    todo = worklist.of_batch(cut, *decode_plan.seen(problem, lengths))
    workers, tokens = [], cut.tile_tokens
    for program in range(cut.num_programs):
        at = program * cut.rows_per_program
        mine = slice(at, at + int(todo.num_rows[program]))
        columns = (todo.sequence[mine], todo.start[mine], todo.stop[mine])
        rows = [
            explained.tile_visits(
                sequence, 0, -(-last // tokens), -(-first // tokens), last // tokens
            )
            for sequence, first, last in explained.rows(*columns)
        ]
        each = cut.items_per_step  # of rows that have one tile
        steps = [list(chain(*rows[i : i + each])) for i in range(0, len(rows), each)]
        workers.append(Worker(f"program {program}", steps))
    buffers = decode_plan.decode_buffers(problem, cut)
    steps = f"{cut.items_per_step} at once" if cut.items_per_step > 1 else "one after the other"
    return Explained(
        kernel="decode" + (" with append fused in" if cut.appends else ""),
        problem=problem,
        plan=cut,
        scratch=_scratch(decode_plan.decode_scratch(cut)),
        num_bytes=plan.vmem_bytes(buffers),
        limit=vmem,
        workers=workers,
        legend=f"a tile of {tokens} tokens, all heads, {steps}",
    )


def _prefill(case: Case, problem: Problem, cut: prefill_plan.PrefillPlan) -> Explained:
    buffers = prefill_plan.prefill_buffers(problem, cut)
    return Explained(
        kernel="prefill",
        problem=problem,
        plan=cut,
        scratch=_scratch(prefill_plan.prefill_scratch(cut)),
        num_bytes=plan.vmem_bytes(buffers),
        limit=cut.vmem_limit,
        workers=_programs(case, problem, cut.tile_tokens, cut.tile_keys),
        legend=f"a tile of {cut.tile_keys} tokens for {cut.tile_tokens} query tokens, all heads",
    )


def _general(case: Case, problem: Problem) -> Explained:
    cut = plan.plan_attention(problem)
    assert cut is not None, "unsupported() comes first"
    keys = cut.blocks_per_tile * case.block_size
    part = f" in {cut.tiles_per_block} parts" if cut.tiles_per_block > 1 else ""
    return Explained(
        kernel="attention, the one for every shape",
        problem=problem,
        plan=cut,
        scratch=_scratch(plan.attention_scratch(problem, cut)),
        num_bytes=plan.vmem_bytes(plan.attention_buffers(problem, cut)),
        limit=plan.VMEM_BYTES,
        workers=_programs(case, problem, cut.tile_tokens, keys),
        legend=f"a tile of {keys} tokens{part} for {cut.tile_tokens} query tokens, all heads",
    )


def _programs(case: Case, problem: Problem, tile_tokens: int, keys: int) -> list[Worker]:
    """One program for each tile of queries; those that always suffice, less those unused."""
    schedule = explained.schedule_of(case, problem)
    tiles: QueryTiles = tile_queries(
        schedule, problem.variant, num_tokens=problem.num_tokens, tile_tokens=tile_tokens
    )
    last = tiles.first_position + tiles.num_tokens - 1
    full = problem.variant.full_range(tiles.first_position, last, tiles.seq_length)
    columns = (tiles.sequence, tiles.num_tokens, tiles.kv_start, tiles.kv_stop, *full)
    workers = []
    for number, (sequence, count, start, stop, full_start, full_stop) in enumerate(
        explained.rows(*columns)
    ):
        first, end = start // keys, -(-stop // keys) if stop > start else start // keys
        whole = -(-full_start // keys), full_stop // keys
        visits = explained.tile_visits(sequence, first, end, *whole)
        if count and visits:
            workers.append(Worker(f"program {number}", [visits]))
    return workers


def _append(case: Case, problem: AppendProblem) -> Explained:
    if (reason := append.unsupported(problem)) is not None:
        raise Unsupported(reason)
    cut = append_plan.plan_runs(problem)
    if cut is not None:
        return Explained(
            kernel="append, by copies",
            problem=problem,
            plan=cut,
            scratch=[],
            num_bytes=0,
            limit=plan.VMEM_BYTES,
            workers=[Worker("core", explained.new_runs(case, case.block_size))],
            legend="new tokens that go into one block, copied from memory to memory",
        )
    units = append_plan.plan_units(problem)
    assert units is not None, "unsupported() comes first"
    tokens, buffers = units.unit.block_size, append_plan.units_buffers(problem, units)
    return Explained(
        kernel="append, by units",
        problem=problem,
        plan=units,
        scratch=_scratch(buffers),
        num_bytes=plan.vmem_bytes(buffers),
        limit=plan.VMEM_BYTES,
        workers=[Worker("core", explained.new_runs(case, tokens))],
        legend=f"{tokens} aligned tokens of a block, read, blended with new ones and written",
    )


def _scratch(buffers: Sequence[plan.Buffer]) -> list[Scratch]:
    return [
        Scratch(b.space, b.shape, "" if b.dtype is None else str(np.dtype(b.dtype)), b.num_bytes)
        for b in buffers
    ]
