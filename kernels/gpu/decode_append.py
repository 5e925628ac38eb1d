"""New tokens of a decode step: the kernel that attends over them writes them to their slots.

The CTA that has the end of a sequence stores its new token, waits until it is there, and copies the
blocks of that end only then: what is attended over is what it is after an append, to the bit.  No
other CTA reads the slot, for other pieces of the sequence have other tiles, each of whole tokens,
and no other row reads the block that a row appends to.

A row without tiles may have a slot nevertheless: where another entry of it is outside the pool.
"""

from typing import Any

from jax import lax

from ..core.problem import AppendProblem, Problem
from . import append, worklist
from .blocks import divide, pl, plgpu, remainder
from .worklist import Pieces


def problem_of(problem: Problem) -> AppendProblem:
    """The append of a decode step."""
    return AppendProblem(problem.cache, problem.num_tokens, False)


def write(problem: Problem, inputs: Any, smem: dict[str, Any], sequence: Any) -> None:
    """The new token of a sequence, if it has a slot; it is in the pools on return.

    inputs: those of decode, with `new`.
    """
    cache, new = problem.cache, inputs.new
    targets = append.Targets(inputs.table, new.seq_lengths, None, inputs.layer)
    slot = append.slot_of(problem_of(problem), targets, sequence)

    @pl.when(slot >= 0)
    def _():
        block = divide(slot, cache.block_size)
        first = remainder(slot, cache.block_size) * cache.num_kv_heads
        rows = block, pl.ds(first, cache.num_kv_heads)
        staged, full = smem["new_smem"], smem["new_full"]
        for i, source in enumerate((new.keys, new.values)):
            plgpu.copy_gmem_to_smem(source.at[sequence], staged.at[i], full)
        plgpu.barrier_wait(full)
        for i, pool in enumerate((inputs.keys, inputs.values)):
            plgpu.copy_smem_to_gmem(staged.at[i], pool.at[rows])
        plgpu.wait_smem_to_gmem(0)


def write_rows_without_tiles(
    problem: Problem, inputs: Any, smem: dict[str, Any], num_ctas: int
) -> None:
    """This CTA's share of them."""
    cta = lax.axis_index("cta")
    column = worklist.NUM_SHARED + Pieces._fields.index("count")

    @pl.loop(0, divide(problem.cache.batch + num_ctas - 1 - cta, num_ctas))
    def _(i):
        sequence = cta + i * num_ctas
        is_apart = inputs.work[sequence, column] == 0
        pl.when(is_apart)(lambda: write(problem, inputs, smem, sequence))
