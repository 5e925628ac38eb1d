"""The cases say what they claim, the gate catches a wrong result, clock and rates add up."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances

import paged_kv
from benchmarks import __main__ as command
from benchmarks import baseline, cases, inputs, roofline, runner, timing
from benchmarks.workload import Case

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parent.parent
MI = 2**20

# The table of peers' figures: letter, batch, heads, tokens per sequence.
PEERS = {
    "A": (64, 32, 8, 4096),
    "B": (1, 32, 8, 131072),
    "C": (8, 32, 8, 16384),
    "D": (64, 8, 1, 8192),
    "F": (16, 32, 8, 1024),
    "G": (16, 32, 32, 4096),
    "H": (256, 32, 8, 512),
    "I": (1, 32, 8, 1024),
    "J": (1, 32, 8, 4096),
}


def small(**fields):
    defaults = {"name": "small", "about": "", "seq_lengths": (0, 1, 16, 17)}
    return Case(**(defaults | {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8} | fields))


def test_reading_the_table_needs_no_jax():
    code = "import sys, benchmarks.cases; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("letter", PEERS)
def test_letters_name_the_peers_cases(letter):
    case = cases.find(letter)
    batch, num_query_heads, num_kv_heads, length = PEERS[letter]
    assert case.seq_lengths == (length,) * batch
    assert (case.num_query_heads, case.num_kv_heads) == (num_query_heads, num_kv_heads)
    assert (case.head_dim, case.block_size, case.dtype) == (128, 16, "bfloat16")
    assert case.kv_bytes == batch * length * num_kv_heads * 128 * 2 * 2


def test_the_ragged_case_is_ragged():
    lengths = np.array(cases.find("E").seq_lengths)
    assert len(lengths) == 128 and abs(lengths.mean() - 2400) < 10
    assert lengths.min() >= 16 and lengths.max() <= 16384
    assert lengths.max() > 20 * lengths.min() and np.median(lengths) < 0.8 * lengths.mean()


def test_block_size_variants_differ_in_the_block_size_alone():
    for size in (64, 128):
        for name in ("8b_b64_4k", "70btp8_b64_8k"):
            case, other = cases.find(name), cases.find(f"{name}_block{size}")
            assert other.block_size == size and other.kv_bytes == case.kv_bytes
            assert other.seq_lengths == case.seq_lengths


def test_ci_cases_are_small_and_reach_the_edges():
    for case in cases.tagged("ci"):
        edges = {0, 1, case.block_size - 1, case.block_size, case.block_size + 1}
        if "prefill" not in case.name:
            assert edges <= set(case.seq_lengths), case.name
        assert sum(case.seq_lengths) <= 400, case.name
    assert len(cases.tagged("ci", "decode")) + len(cases.tagged("ci", "packed")) == len(
        cases.tagged("ci")
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_query_heads": 5}, "num_query_heads=5 % self.num_kv_heads=2 != 0"),
        ({"op": "prefetch"}, "self.op='prefetch' is one of"),
        ({"dtype": "int8"}, "self.dtype='int8' of"),
        ({"query_lengths": (1, 1)}, "2 query lengths, self.batch=4"),
        ({"query_lengths": (1, 1, 1, 1)}, "a sequence has more query tokens than tokens"),
    ],
)
def test_an_impossible_case_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError, match="no case '8b_b64_4', perhaps 8b_b64_4k"):
        cases.find("8b_b64_4")


@pytest.mark.parametrize("run", [1, 4])
@pytest.mark.parametrize("copies", [1, 3])
def test_tables_share_no_block_and_keep_runs_together(run, copies):
    case = small(seq_lengths=(0, 1, 15, 16, 17, 150), adjacent_blocks=run)
    tables = case.block_tables(copies)
    used = tables[tables >= 0]
    assert len(used) == copies * case.blocks_per_seq.sum() == len(np.unique(used))
    assert used.max() < copies * case.num_blocks
    steps = np.diff(tables[:, -1, :], axis=-1)  # ten blocks in order
    together = [step for column, step in enumerate(steps.T) if (column + 1) % run]
    assert all((step == 1).all() for step in together)
    assert (steps != 1).any()


def test_tables_over_a_shared_pool_stay_inside_it():
    case = small(seq_lengths=(4096, 1), pool_blocks=7)
    table = case.block_tables()[0]
    assert set(np.unique(table)) <= {-1, *range(7)} and (table[1, 1:] == -1).all()


@pytest.mark.parametrize("window", [None, 3, (5, 0), (2, 4), (0, 9)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("query_lengths", [None, (0, 1, 0, 6, 20)])
def test_bytes_and_flops_count_what_the_oracle_sees(window, is_causal, query_lengths):
    case = small(
        seq_lengths=(0, 1, 16, 17, 20),
        query_lengths=query_lengths,
        local_window_size=window,
        is_causal=is_causal,
    )
    pairs, keys = 0, 0
    for length, count in zip(case.seq_lengths, case.queries, strict=True):
        seen = [
            oracle.visible_keys(position, length, is_causal, window)
            for position in range(length - count, length)
        ]
        pairs += sum(map(len, seen))
        keys += len(set().union(*seen))
    assert case.useful_flops == 4 * pairs * case.num_query_heads * case.head_dim
    assert case.kv_bytes == keys * 2 * case.num_kv_heads * case.head_dim * 2
    assert case.flops >= case.useful_flops


def test_a_prefill_counts_half_of_the_square():
    case = cases.find("8b_prefill_4x4k")
    assert case.useful_flops == 4 * 4 * 32 * 128 * (4096 * 4097 // 2)
    assert case.flops == 4 * 4 * 32 * 128 * 4096**2


def test_an_append_counts_each_byte_read_and_written():
    assert cases.find("append_32k").append_bytes == 2 * 32768 * 2 * 8 * 128 * 2


def test_copies_pass_a_cache():
    case = cases.find("8b_b1_1k")
    assert case.copies_beyond(128 * MI) * case.kv_bytes >= 128 * MI
    assert cases.find("8b_b64_4k").copies_beyond(128 * MI) == 1


@pytest.mark.parametrize(("op", "held"), [("attend", (0, 1, 16, 17)), ("append", (0, 0, 13, 17))])
def test_inputs_hold_nan_wherever_no_token_is(op, held):
    case = small(op=op, query_lengths=(0, 1, 3, 0), dtype="float32")
    made = inputs.make_inputs(case, rotate_bytes=2 * case.num_blocks * 16 * case.token_bytes)
    assert len(made.tables) == 2
    finite = np.isfinite(np.asarray(made.key_pool))
    assert finite.any(axis=(2, 3)).sum() == 2 * sum(held)
    assert (finite == finite[:, :, :1, :1]).all()
    for table in made.tables:
        for row, length in zip(np.asarray(table), held, strict=True):
            tokens = finite[row].reshape(-1, *finite.shape[2:])
            assert tokens[:length].all()


@pytest.mark.parametrize("name", ["ci_gqa3", "ci_window", "ci_mixed", "ci_full"])
def test_the_baseline_is_what_the_oracle_says(name):
    case = cases.find(name)
    made = inputs.make_inputs(case, rotate_bytes=0)
    cache = made.cache()
    variant = case.options | made.arrays.operands
    most = int(case.queries.max())
    out, lse = baseline.attention(made.arrays.query, cache, max_query_length=most, **variant)
    tokens = [
        [np.asarray(pool)[row].reshape(-1, *pool.shape[2:])[:n] for row, n in rows]
        for rows in [list(zip(np.asarray(cache.block_table), case.seq_lengths, strict=True))]
        for pool in (cache.key_pool, cache.value_pool)
    ]
    true_out, true_lse = oracle.attention(made.arrays.query, *tokens, **variant)
    np.testing.assert_allclose(out, true_out, **tolerances.tolerance("reference float32"))
    np.testing.assert_allclose(lse, true_lse, **tolerances.tolerance("reference float32"))


def test_the_baseline_appends_as_the_reference_does():
    case = cases.find("ci_append_packed")
    assert runner.check(case, inputs.make_inputs(case, rotate_bytes=0), "xla", None) == ""


def test_the_gate_lets_a_right_result_through():
    case = cases.find("ci_fused")
    assert runner.check(case, inputs.make_inputs(case, rotate_bytes=0), "xla", None) == ""


def _spoil(monkeypatch, name, spoil):
    """Replaces an op by one whose result is spoiled, for every implementation but the baseline."""
    right = getattr(paged_kv, name)
    monkeypatch.setattr(paged_kv, name, lambda *a, **k: spoil(*right(*a, **k)))


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda out, lse: (out * 1.0001, lse), "relative error 0.0001"),
        (lambda out, lse: (out.at[2, 1, 3].set(jnp.nan), lse), "relative error nan"),
        (lambda out, lse: (out, lse * 1.0001), "relative error of lse 0.0001"),
        (lambda out, lse: (out, jnp.maximum(lse, -9.0)), "lse is -inf for other queries"),
    ],
)
def test_the_gate_catches_a_wrong_result(monkeypatch, spoil, verdict):
    _spoil(monkeypatch, "paged_attention", spoil)
    case = cases.find("ci_mha")
    made = inputs.make_inputs(case, rotate_bytes=0)
    assert runner.check(case, made, "xla", None).startswith(verdict)


def test_a_wrong_result_has_no_time_and_ends_the_command_in_failure(monkeypatch, capsys):
    _spoil(monkeypatch, "paged_attention", lambda out, lse: (out * 1.0001, lse))
    assert command.main(["ci_mha", "--implementation", "xla"]) == 1
    report = capsys.readouterr().out
    assert "wrong: relative error 0.0001" in report and " us " not in report


def test_the_gate_catches_a_write_too_many(monkeypatch):
    case = cases.find("ci_append")
    right = paged_kv.append_tokens

    def one_more(cache, *new, **options):
        cache = right(cache, *new, **options)
        pools = cache.key_pool.at[0, 0].set(0.0), cache.value_pool
        return paged_kv.PagedKVCache(*pools, cache.block_table, cache.seq_lengths)

    monkeypatch.setattr(paged_kv, "append_tokens", one_more)
    made = inputs.make_inputs(case, rotate_bytes=0)
    assert runner.check(case, made, "xla", None) == "the pools differ from the reference's"


def test_a_timing_is_a_median_between_quartiles():
    result = timing.Timing.of([5e-6, 1e-6, 2e-6, 3e-6, 100e-6], timing.WALL)
    assert (result.low_us, result.median_us, result.high_us) == pytest.approx((2, 3, 5))
    assert (result.repeats, result.clock) == (5, "wall")


def test_a_cpu_is_timed_on_the_wall_after_a_warm_up():
    calls = []
    result = timing.measure(lambda index: calls.append(index) or jnp.zeros(1), 3, warm_up=2)
    assert calls == [0, 1, 0, 1, 2] and result.clock == timing.WALL


def _plane(name, **lines):
    events = lambda spans: [SimpleNamespace(start_ns=s, duration_ns=d) for s, d in spans]
    return SimpleNamespace(
        name=name, lines=[SimpleNamespace(name=n, events=events(e)) for n, e in lines.items()]
    )


def test_device_events_are_the_streams_of_a_gpu_or_the_modules_of_a_tpu():
    host = _plane("/host:CPU", python=[(0, 99)])
    streams = {"Stream #1": [(20, 5), (0, 10)], "Stream #2": [(8, 4)], "XLA Ops": [(0, 99)]}
    modules = {"XLA Modules": [(3, 4)], "XLA Ops": [(3, 1), (4, 1)]}
    assert timing.device_events([host]) == []
    gpu = [_plane("/device:GPU:1", **streams), host, _plane("/device:GPU:0", **streams)]
    assert timing.device_events(gpu) == [(0, 10), (8, 12), (20, 25)]
    assert timing.device_events([_plane("/device:TPU:0", **modules)]) == [(3, 7)]


def test_a_call_lasts_as_long_as_the_device_is_busy_for_it():
    # a main kernel, another that overlaps it, a gap, a merge kernel
    events = [(0, 10), (8, 12), (20, 25), (100, 110), (110, 115), (200, 201)]
    assert timing.per_call(events, 2) == pytest.approx([17e-9, 16e-9])
    assert timing.per_call(events, 4) is None and timing.per_call([], 2) is None


def test_a_case_is_rated_against_the_ceiling_that_binds_it(monkeypatch):
    monkeypatch.setattr(roofline, "read_ceiling", lambda: 1000.0)
    monkeypatch.setattr(roofline, "copy_ceiling", lambda: 800.0)
    monkeypatch.setattr(roofline, "matmul_ceiling", lambda dtype: 100.0)
    decode = cases.find("8b_b64_4k")
    rate = roofline.bound(decode, decode.kv_bytes / 500e9)
    assert (rate.limit, rate.unit, rate.value, rate.share) == ("read", "GB/s", 500.0, 0.5)
    prefill = cases.find("8b_prefill_4x4k")
    rate = roofline.bound(prefill, prefill.useful_flops / 25e12)
    assert (rate.limit, rate.unit, rate.value, rate.share) == ("matmul", "TFLOP/s", 25.0, 0.25)
    append = cases.find("append_8k")
    rate = roofline.bound(append, append.append_bytes / 200e9)
    assert (rate.limit, rate.unit, rate.value, rate.share) == ("copy", "GB/s", 200.0, 0.25)


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "_large", lambda: jnp.ones((256, 4096)))
    for ceiling in (roofline.read_ceiling, roofline.copy_ceiling):
        assert 0.01 < ceiling.__wrapped__() < 1e5
    assert 1e-4 < roofline.matmul_ceiling.__wrapped__("float32") < 1e4


def test_a_run_reports_and_records_its_figures(monkeypatch, tmp_path, capsys):
    for name in ("read_ceiling", "copy_ceiling"):
        monkeypatch.setattr(roofline, name, lambda: 10.0)
    monkeypatch.setattr(roofline, "matmul_ceiling", lambda dtype: 0.1)
    monkeypatch.setattr(inputs, "ROTATE_BYTES", 2**16)
    path = tmp_path / "out.json"
    arguments = ["ci_mqa", "--implementation", "xla", "--repeats", "3", "--json", str(path)]
    assert command.main(arguments) == 0
    said = capsys.readouterr()
    assert "wall clock" in said.out and "x the XLA baseline" in said.out
    assert "[1/1] ci_mqa: checking the result" in said.err
    saved = json.loads(path.read_text())
    assert saved["environment"].keys() == {"device", "jax", "jaxlib", "python", "commit"}
    (record,) = saved["records"]
    assert record["case"] == "ci_mqa" and record["problem"] == "" and record["repeats"] == 3
    assert 0 < record["low_us"] <= record["median_us"] <= record["high_us"]
    assert record["share"] == pytest.approx(record["value"] / record["ceiling"])
    assert record["speedup"] == pytest.approx(record["baseline_us"] / record["median_us"])


def test_the_list_has_a_line_for_every_case(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases.CASES) and "A 8b_b64_4k" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one case"),
        (["nothing_like_it"], "no case 'nothing_like_it'; --list names them all"),
        (["8b_b256_1m"], "8b_b256_1m is for compilers only"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(capsys, arguments, message):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_refusal_is_a_problem_not_a_crash(monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("no such device; use 'xla'")

    monkeypatch.setattr(paged_kv, "paged_attention", refuse)
    assert command.main(["ci_mha", "--check-only"]) == 1
    assert "refused: no such device; use 'xla'" in capsys.readouterr().out
