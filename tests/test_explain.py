"""`tools.explain`: the problem is the op's, the work is all there, the text says what it should."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import NEEDS_JAX

import paged_kv
from benchmarks import cases
from paged_kv import validate
from paged_kv.kernels.gpu import unsupported_version
from tools.explain import __main__ as program
from tools.explain import explained
from tools.explain.explained import Unsupported, Visits, Worker

CHIPS = [("tpu", "v6e"), ("tpu", "v5e"), pytest.param("gpu", "h100", marks=NEEDS_JAX)]
KERNELS = {
    "8b_b1_4k": {"tpu": "decode", "gpu": "decode"},
    "8b_b64_512": {"tpu": "decode", "gpu": "decode"},
    "8b_ragged128": {"tpu": "decode", "gpu": "decode"},
    "gptoss_b64_4k_window": {"tpu": "attention, the one for every shape", "gpu": "decode"},
    "8b_chunk_4x1k": {"tpu": "prefill", "gpu": "prefill"},
    "70btp8_prefill_1x4k": {"tpu": "prefill", "gpu": "prefill"},
}


def keys_of_a_tile(plan):
    """Tokens of the plan's tiles of keys, whatever kernel it is for."""
    if hasattr(plan, "keys"):
        return plan.keys.rows // plan.keys.num_heads
    if hasattr(plan, "rows"):
        return plan.blocks_per_tile * plan.rows.block_size
    return getattr(plan, "tile_keys", None) or plan.tile_tokens


def visits_by_definition(case, query_tokens, tile, row_group):
    """How many tiles each sequence's queries meet, by (sequence, whether every pair is seen).

    Tiles of queries begin at multiples of `row_group` packed rows.
    """
    visits = Counter()
    offsets = (np.cumsum(case.queries) - case.queries) % row_group
    left, _ = case.local_window_size or (10**9, 0)
    for sequence, (length, count) in enumerate(
        zip(case.seq_lengths, case.queries.tolist(), strict=True)
    ):
        position = np.arange(length - count, length)[:, None]
        key = np.arange(-(-length // tile) * tile)[None]
        seen = (key <= position) & (key >= position - left)
        for start in range(-offsets[sequence], count, query_tokens):
            tiles = seen[max(start, 0) : start + query_tokens].reshape(-1, key.size // tile, tile)
            whole, met = tiles.all((0, 2)), tiles.any((0, 2))
            visits[sequence, True] += int(whole.sum())
            visits[sequence, False] += int((met & ~whole).sum())
    return +visits


@pytest.mark.parametrize(("backend", "chip"), CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_tile_that_a_query_sees_is_visited_and_no_other(name, backend, chip):
    case = cases.find(name)
    *apart, kernel = program.explain(case, backend, chip)
    assert kernel.kernel == KERNELS[name][backend]
    if apart:  # sequences with one query token have a kernel of their own
        tiles = [run for w in apart[0].workers for group in w.groups for run in group]
        assert {run.sequence for run in tiles} == set(np.flatnonzero(case.queries == 1).tolist())
        assert [x.kernel for x in apart] == ["decode"]
    assert 0 < kernel.num_bytes <= kernel.limit
    plan, visits = kernel.plan, Counter()
    for worker in kernel.workers:
        for sequence, is_whole, number in (run for group in worker.groups for run in group):
            visits[sequence, is_whole] += number
    query_tokens = plan.tile_tokens if kernel.problem.is_packed else 1
    row_group = 8 if hasattr(plan, "cut") else 1
    expected = visits_by_definition(case, query_tokens, keys_of_a_tile(plan), row_group)
    if apart:
        expected = {key: number for key, number in expected.items() if case.queries[key[0]] != 1}
    if (backend, name) == ("gpu", "gptoss_b64_4k_window"):  # masks every tile of a window
        assert visits.keys() == {(sequence, False) for sequence in range(64)}
    elif hasattr(plan, "cut"):  # masks the first tile of every item
        totals = Counter()
        for found, factor in ((visits, 1), (expected, -plan.parts)):
            for (sequence, _), number in found.items():
                totals[sequence] += factor * number
        assert not any(totals.values())
        assert all(
            visits[key] >= plan.parts * number for key, number in expected.items() if not key[1]
        )
    else:
        parts = getattr(plan, "parts", 1)
        assert visits == {key: parts * number for key, number in expected.items()}


def test_a_mixed_batch_is_two_kernels_on_a_tpu():
    """60 rows of one token, and 4 chunks of 1024; no sequence is in both."""
    kernels = program.explain(cases.find("8b_mixed_60x4k_4x1k"), "tpu", "v6e")
    assert [kernel.kernel for kernel in kernels] == ["decode", "prefill"]
    sequences = [
        {run[0] for worker in kernel.workers for group in worker.groups for run in group}
        for kernel in kernels
    ]
    assert sequences == [set(range(60)), set(range(60, 64))]


@pytest.mark.parametrize(
    "name",
    ["8b_b64_4k", "gptoss_b64_4k_window", "8b_prefill_1x16k_window", "ci_mixed", "ci_full"],
)
def test_the_problem_is_the_one_that_the_op_asks(name):
    case = cases.find(name)
    pool = jax.ShapeDtypeStruct(explained.cache_of(case).pool_shape[1:], case.dtype)
    table = jax.ShapeDtypeStruct((case.batch, case.max_blocks_per_seq), jnp.int32)
    lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    cache = paged_kv.PagedKVCache(pool, pool, table, lengths)
    shape = (case.num_tokens, case.num_query_heads, case.head_dim)
    starts, options = case.query_start_loc, case.options
    variant = validate.variant(case.head_dim, None, *options.values(), case.has_alibi)
    starts = starts if starts is None else jax.ShapeDtypeStruct(starts.shape, jnp.int32)
    query = jax.ShapeDtypeStruct(shape, case.dtype)
    asked = validate.attention_problem(cache, query, starts, variant)
    assert explained.problem_of(case) == asked


@pytest.mark.parametrize(
    ("backend", "chip"), [("tpu", "v6e"), pytest.param("gpu", "h100", marks=NEEDS_JAX)]
)
def test_an_append_writes_every_new_token(backend, chip):
    append, attention = program.explain(cases.find("8b_prefill_1x4k_fused"), backend, chip)
    assert append.kernel.startswith("append") and not attention.kernel.startswith("append")
    runs = [run for worker in append.workers for group in worker.groups for run in group]
    each = 16 if backend == "tpu" else 1  # blocks, or tokens
    assert all(run.is_whole for run in runs)
    assert sum(run.number for run in runs) * each == 4096
    (fused,) = program.explain(cases.find("8b_b64_4k_fused"), backend, chip)
    assert fused.kernel == "decode with append fused in" and fused.plan.appends


def test_a_run_of_new_tokens_ends_where_its_block_does():
    case = cases.find("ci_append_packed")  # 0, 1, 15, 7, 17, 40 of 0, 1, 15, 16, 17, 150
    assert explained.new_runs(case, 16) == [
        [Visits(1, False, 1)],
        [Visits(2, False, 1)],
        [Visits(3, False, 1)],
        [Visits(4, True, 1), Visits(4, False, 1)],
        [Visits(5, False, 1), Visits(5, True, 2), Visits(5, False, 1)],
    ]


def test_the_picture_has_a_letter_for_each_visit():
    first = Worker("CTA 0", [[Visits(0, True, 3), Visits(0, False, 1)], [Visits(27, True, 9)]])
    idle = Worker("CTA 10", [])
    assert explained.draw([first, idle], 4, 40) == ["CTA 0   aaaA b*9", "CTA 10  idle"]
    assert explained.draw([first], 4, 5) == ["CTA 0  aaaA ..."]
    many = [Worker(str(i), [[Visits(i, True, 1)]]) for i in range(9)]
    assert explained.draw(many, 4, 40) == ["0  a", "1  b", "... 6 more", "8  i"]


def test_the_command_prints_problem_plan_scratch_work_and_roofline(capsys):
    status = program.main(["8b_b64_4k", "--topology", "v5e:2x2"])
    out, _ = capsys.readouterr()
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "8b_b64_4k: decode, 64 x 4096 tokens"
    for line in ("kernel: decode", "Problem", "    block_size: 16", "Plan", "  num_programs: 1"):
        assert line in lines
    (scratch,) = (line for line in lines if line.startswith("Scratch and operands: "))
    assert scratch.endswith("of 134217728 bytes (15%)")
    (picture,) = (line for line in lines if line.startswith("  program 0"))
    assert picture.startswith("  program 0  aaaa bbbb cccc dddd")
    # 64 sequences of 4096 tokens of 4096 bytes, at 819 GB/s
    assert lines[-4] == "Roofline of v5e: 819 GB/s, 197 TFLOP/s in bfloat16"
    assert " ".join(lines[-3].split()) == "memory 1073.742 MB of keys and values 1311.04 us"
    assert lines[-1] == "  4.0 FLOP per byte, the ridge is at 240: memory limits"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["8b_b64_4"], "explain: no case '8b_b64_4', perhaps 8b_b64_4k"),
        (["A", "--topology", "h100"], "explain: no 'h100'; there are v4, v5e, v5p, v6e, tpu7x"),
        pytest.param(
            ["ci_mha", "--backend", "gpu"],
            "explain: mosaic_gpu: pools of float32 are none of bfloat16",
            marks=NEEDS_JAX,
        ),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, arguments, text):
    assert program.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(text) and err.count("\n") == 1


@pytest.mark.skipif(unsupported_version() is None, reason="this jax has what the kernels need")
def test_an_old_jax_is_said(capsys):
    assert program.main(["A", "--backend", "gpu"]) == 2
    assert "need jax >=" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "chip"), [("tpu", "v6e"), pytest.param("gpu", "h100", marks=NEEDS_JAX)]
)
def test_every_case_can_be_explained(backend, chip):
    for case in cases.CASES.values():
        try:
            kernels = program.explain(case, backend, chip)
        except Unsupported:
            assert backend == "gpu" and case.dtype == "float32"
            continue
        for kernel in kernels:
            assert len(list(program.kernel_lines(kernel, 16, 72))) > 12
