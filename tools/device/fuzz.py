"""Random lengths, tables and values of a form, against the reference.

All seeds of a form share their programs: shapes stay, lengths change.  Lengths stand at the edges
of blocks; pools hold NaN in every slot that no one owns, and unused table entries anything.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import Arrays, Inputs, draw_arrays, shapes_of
from benchmarks.runner import Program, Runner, Steps, truth_of, verdict
from benchmarks.workload import ATTEND, Case

WILD = (-1, -(2**31), 2**31 - 1, 1 << 20)


def draw(case: Case, seed: int) -> Inputs:
    """Inputs of the form's shapes; the same for the same seed."""
    rng = np.random.default_rng(seed)
    width, size = case.max_blocks_per_seq, case.block_size
    lengths, counts = _lengths(case, rng)
    num_blocks = case.batch * width
    table = rng.permutation(num_blocks).reshape(case.batch, width).astype(np.int32)
    used = np.arange(width) < -(-lengths // size)[:, None]
    before = lengths - (0 if case.op == ATTEND else counts)
    held = np.clip(before[:, None] - np.arange(width) * size, 0, size)
    tokens = np.zeros(num_blocks, np.int64)
    tokens[table[used]] = held[used]
    is_filled = np.arange(size) < tokens[:, None]
    table = np.where(used, table, rng.choice(WILD, table.shape)).astype(np.int32)

    drawn = draw_arrays(shapes_of(case), jnp.asarray(is_filled), jax.random.key(seed))
    operands = {name: drawn[name] for name in ("sinks", "alibi_slopes") if name in drawn}
    operands["query_start_loc"] = None
    if case.query_lengths is not None:
        starts = np.concatenate([[0], np.cumsum(counts)])
        operands["query_start_loc"] = jnp.asarray(starts, jnp.int32)
    arrays = Arrays(
        drawn["query"],
        drawn["keys"],
        drawn["values"],
        jnp.asarray(lengths, jnp.int32),
        operands,
    )
    return Inputs(arrays, drawn["key_pool"], drawn["value_pool"], [jnp.asarray(table)])


def _lengths(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(seq_lengths, query lengths): half of them at the edges of blocks."""
    most, size = case.max_blocks_per_seq * case.block_size, case.block_size
    edges = np.array([0, 1, size - 1, size, size + 1, most - 1, most])
    is_edge = rng.random(case.batch) < 0.5
    anything = rng.integers(0, most + 1, case.batch)
    lengths = np.where(is_edge, np.minimum(rng.choice(edges, case.batch), most), anything)
    if case.query_lengths is None:
        return lengths, np.minimum(lengths, 1)
    # in a random order each takes up to what is left: padding tokens may stay
    counts, left = np.zeros(case.batch, np.int64), case.num_tokens
    for row in rng.permutation(case.batch):
        limit = min(lengths[row], left)
        counts[row] = limit if rng.random() < 0.3 else rng.integers(0, limit + 1)
        left -= counts[row]
    return lengths, counts


def compile_form(case: Case, implementation: str, interpret: bool | None) -> tuple[Steps, Steps]:
    """The form's programs, and those of the reference."""
    shapes = jax.eval_shape(lambda: draw(case, 0))
    programs = Program(case, implementation, interpret), Program(case, truth_of(implementation))
    made, truth = (program.steps.compiled(shapes) for program in programs)
    return made, truth


def run(case: Case, steps: tuple[Steps, Steps], seeds: list[int], implementation: str) -> dict:
    """The form's record: the seeds that went wrong, and how, and the largest error."""
    record: dict[str, Any] = {"form": case.name, "seeds": len(seeds), "wrong": {}, "error": 0.0}
    programs = Program(case, implementation), Program(case, truth_of(implementation))
    for seed in seeds:
        inputs = draw(case, seed)
        runners = [Runner(p, inputs, s) for p, s in zip(programs, steps, strict=True)]
        wrong, error = verdict(case, *runners)
        record["error"] = max(record["error"], error)  # a NaN comes with a wrong result
        if wrong:
            record["wrong"][str(seed)] = wrong
    return record
