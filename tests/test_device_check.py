"""tools/device_check.py without a device: what it draws, judges, writes and refuses."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import paged_kv
from benchmarks import cases, peers, stream
from benchmarks.workload import APPEND
from tools.device import agenda, ahead, check, fuzz, gates, measuring, picture, report, sanitizer

ROOT = Path(__file__).parent.parent
TINY = ["--dry-run", "--implementation", "xla", "--seeds", "2", "--jobs", "2"]


def test_a_plain_checkout_needs_no_install(tmp_path):
    """The import hooks of an editable install are taken away."""
    code = f"""
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
runpy.run_path({str(ROOT / "tools" / "device_check.py")!r})["import_paged_kv"]()
import paged_kv.kernels.core, tools.device.gates
print(paged_kv.kernels.__path__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert str(ROOT) in run.stdout


def test_without_a_gpu_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(check, "unsupported_version", lambda: None)
    assert check.main([]) == 2
    assert "needs an NVIDIA GPU, and JAX sees cpu here; --dry-run" in capsys.readouterr().err
    monkeypatch.setattr(check, "unsupported_version", lambda: "jax is too old")
    assert check.main([]) == 2
    assert "jax is too old" in capsys.readouterr().err


def test_a_dry_run_walks_through_all_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(agenda, "TINY", ("ci_hd128",))
    assert check.main([*TINY, "--out", str(tmp_path), "--seed", "5"]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "device_check.json").read_text())
    assert record["dry_run"] and record["gates"] == [] and record["seed"] == 5
    assert [case["case"] for case in record["cases"]] == ["ci_hd128"]
    for case in record["cases"]:
        assert case["problem"] == "" and case["same_bits"] and case["clock"] == "wall"
        assert "value" not in case
    assert {form["form"] for form in record["fuzz"]} == {"ci_hd128"}
    assert all(form["seeds"] == 2 and not form["wrong"] for form in record["fuzz"])
    assert "A dry run with no GPU: its times mean nothing." in said
    assert (tmp_path / "device_check.md").read_text() in said
    assert not (tmp_path / "roofline.svg").exists()


def test_random_draws_catch_a_wrong_result(monkeypatch):
    right = paged_kv.append_tokens

    def late(cache, *new, **options):  # one slot after the right one
        lengths = cache.seq_lengths + 1
        moved = paged_kv.PagedKVCache(cache.key_pool, cache.value_pool, cache.block_table, lengths)
        return right(moved, *new, **options)

    form = cases.find("ci_append")
    steps = fuzz.compile_form(form, "xla", None)
    assert fuzz.run(form, steps, [3], "xla")["wrong"] == {}
    monkeypatch.setattr(paged_kv, "append_tokens", late)
    steps = fuzz.compile_form(form, "xla", None)
    told = fuzz.run(form, steps, [3, 4], "xla")
    assert told["wrong"] == dict.fromkeys("34", "the pools differ from the reference's")


def test_random_draws_reach_the_edges_and_poison_the_rest():
    form = cases.find("ci_fused")
    size, most = form.block_size, form.max_blocks_per_seq * form.block_size
    seen = set()
    for seed in range(20):
        lengths, counts = fuzz._lengths(form, np.random.default_rng(seed))
        seen |= set(lengths.tolist())
        assert (counts <= lengths).all() and counts.sum() <= form.num_tokens
    assert {0, 1, size - 1, size, size + 1, most - 1, most} <= seen
    made = fuzz.draw(form, 1)
    table, lengths = np.asarray(made.tables[0]), np.asarray(made.arrays.seq_lengths)
    counts = np.diff(np.asarray(made.arrays.operands["query_start_loc"]))
    finite = np.isfinite(np.asarray(made.key_pool)).all((2, 3))
    assert finite.sum() == (lengths - counts).sum()
    used = np.arange(table.shape[1]) < -(-lengths // size)[:, None]
    assert len(np.unique(table[used])) == used.sum()
    assert set(table[~used].tolist()) <= set(fuzz.WILD)
    assert fuzz.draw(form, 1).arrays.query[0, 0, 0] == made.arrays.query[0, 0, 0]
    assert fuzz.draw(form, 2).arrays.query[0, 0, 0] != made.arrays.query[0, 0, 0]


# ---- a record, as a device would make it ---------------------------------------------------------


def of_case(name, us, **fields):
    case = cases.find(name)
    figures = {"median_us": us, "low_us": us, "high_us": us, "clock": "cupti"}
    rate = {"value": 1.0, "unit": "GB/s", "limit": "read", "ceiling": 2.0, "share": 0.5}
    right = {"problem": "", "error": 1e-3, "same_bits": True}
    return measuring.facts(case) | right | figures | rate | fields


def passing():
    """A record in which every gate is passed."""
    peer = lambda us: {"median_us": us}
    records = [
        of_case(name, 100.0, peers={"cudnn_paged": peer(100.0), "xla": peer(1.0)})
        for name in gates.NO_SLOWER
    ]
    records[0]["schedule"] = peer(5.0)
    rivals = {"flashinfer": peer(125.0), "vllm_triton": {"problem": "no"}, "xla": peer(90.0)}
    records.append(of_case("E", 100.0, peers=rivals, stream=peer(96.0), schedule=peer(6.0)))
    for name in ("8b_prefill_4x4k", "8b_prefill_1x16k"):
        records.append(of_case(name, 100.0, peers={"cudnn_dense": peer(104.0)}))
        records.append(of_case(f"{name}_block128", 99.0))
    flops = [cases.find(n).useful_flops for n in ("8b_chunk_4x2k_at_8k", "8b_prefill_4x4k")]
    records += [
        of_case("8b_chunk_4x2k_at_8k", 100.0 * flops[0] / flops[1] / 0.96),
        of_case("hd64_prefill_4x4k", 100.0, peers={"cudnn_dense": peer(100.0)}),
        of_case("hd256_prefill_4x4k", 100.0, peers={"cudnn_dense": peer(101.0)}),
        of_case("append_32k", 100.0, share=0.93),
        of_case("append_64", 2.5),
        of_case("8b_mixed_60x4k_4x1k", 104.0),
        of_case("8b_b60_4k", 60.0),
        of_case("8b_chunk_4x1k", 40.0),
    ]
    record = {
        "environment": {"device": "a device", "jax": "0", "commit": "abc"},
        "dry_run": False,
        "seed": 0,
        "seconds": 400.0,
        "ceilings": {"read": 3000.0, "copy": 3000.0, "matmul bfloat16": 700.0},
        "cases": records,
        "skipped": ["8b_b1_512"],
        "fuzz": [{"form": "ci_mha", "seeds": 20, "wrong": {}, "error": 2e-3}],
        "sanitizer": {"memcheck": {"errors": 0}, "synccheck": {"problem": "too slow"}},
    }
    return record | {"gates": [gate.row() for gate in gates.judge(record)]}


def misses(record):
    return [gate.name for gate in gates.judge(record) if gate.verdict != gates.PASS]


def test_every_gate_can_be_passed():
    assert misses(passing()) == []


SPOILS = {
    "decode D: cuDNN paged / ours": ("70btp8_b64_8k", {"median_us": 100.1}),
    "decode 8b_b64_4k_block64: cuDNN paged / ours": ("8b_b64_4k_block64", {"median_us": 101}),
    "decode E: no-arithmetic stream / ours": ("8b_ragged128", {"stream": {"median_us": 94.0}}),
    "decode E: best peer / ours": (
        "8b_ragged128",
        {"peers": {"cudnn_paged": {"median_us": 119.0}}},
    ),
    "8b_prefill_1x16k_block128: cuDNN dense / ours": (
        "8b_prefill_1x16k_block128",
        {"median_us": 101.0},
    ),
    "chunked / full prefill, FLOP/s": ("8b_chunk_4x2k_at_8k", {"median_us": 1e4}),
    "prefill, head_dim 64: cuDNN dense / ours": ("hd64_prefill_4x4k", {"median_us": 101.0}),
    "append of 32768 tokens, share of the copy ceiling": ("append_32k", {"share": 0.9}),
    "append of 64 tokens, us": ("append_64", {"median_us": 3.1}),
    "mixed batch / its parts, time": ("8b_mixed_60x4k_4x1k", {"median_us": 106.0}),
    "schedule, us (A and E)": ("8b_ragged128", {"schedule": {"median_us": 6.1}}),
    "largest relative error, bfloat16": ("append_64", {"error": math.nan}),
    "cases with a wrong result": ("append_64", {"problem": "wrong"}),
    "cases whose bits differ from run to run": ("append_64", {"same_bits": False}),
}


@pytest.mark.parametrize("gate", SPOILS)
def test_each_gate_can_be_missed(gate):
    record, (name, fields) = passing(), SPOILS[gate]
    case = next(case for case in record["cases"] if case["case"] == name)
    case |= fields
    assert misses(record) == [gate]


def test_gates_of_random_draws_and_of_the_sanitizer():
    record = passing()
    record["fuzz"][0]["wrong"] = {"7": "relative error 1"}
    record["sanitizer"]["memcheck"] = {"errors": 2, "problem": "Invalid read"}
    assert misses(record) == [
        "random draws with a wrong result",
        "errors of compute-sanitizer",
    ]
    assert "seed 7: relative error 1" in report.table(record)


def test_what_was_not_measured_is_neither_passed_nor_missed():
    verdicts = {gate.verdict for gate in gates.judge({"cases": [], "fuzz": []})}
    assert verdicts == {gates.UNMEASURED}


def test_the_table_says_everything():
    text = report.table(passing() | {"sanitizer": {"problem": "not installed"}})
    assert "device a device, jax 0, commit abc; 400 s." in text
    assert "read 3000 GB/s" in text and "matmul bfloat16 700 TFLOP/s" in text
    assert "| append of 64 tokens, us | 2.5 | <= 3 | pass |" in text
    assert "Out of time before: 8b_b1_512." in text and "not installed" in text
    lines = [line for line in text.splitlines() if line.startswith("| 8b_ragged128")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert cells[:3] == ["8b_ragged128", "E", "100.0"] and "failed" in cells
    wrong = passing()
    wrong["cases"][0]["problem"] = "relative error 2"
    assert "| A | relative error 2 |" in report.table(wrong)


def test_the_picture_has_a_point_for_each_case_that_computes(tmp_path):
    source, target = tmp_path / "record.json", tmp_path / "roofline.svg"
    source.write_text(json.dumps(passing()))
    assert picture.main([str(source), str(target)]) == 0
    root = ElementTree.parse(target).getroot()
    dots = root.findall(".//{*}circle")
    assert len(dots) == sum(case["op"] != APPEND for case in passing()["cases"])
    assert all(0 < float(dot.attrib[c]) < picture.WIDTH for dot in dots for c in ("cx", "cy"))
    assert "a device, jax 0, commit abc" in target.read_text()
    assert picture.main([]) == 2


def test_a_picture_of_nothing_is_refused():
    for record in (passing() | {"dry_run": True}, passing() | {"cases": []}):
        with pytest.raises(ValueError, match="the record holds no times of a device"):
            picture.draw(record)


# ---- time ----------------------------------------------------------------------------------------


def test_what_time_is_left_for_is_done_and_the_rest_is_named(monkeypatch, tmp_path):
    """The cases of gates first; a case that fails costs no other."""
    now = [0.0]

    def measure(case, compiled, *, say, **_):
        now[0] += 20.0
        if case.letter == "B":
            raise RuntimeError("out of memory")
        return of_case(case.name, 100.0)

    monkeypatch.setattr(measuring, "measure_case", measure)
    monkeypatch.setattr(check, "compile_case", lambda *_: None)
    monkeypatch.setattr(check.Check, "_ceilings", lambda self: None)
    monkeypatch.setattr(sanitizer, "run", lambda *_: {"memcheck": {"errors": 0}})
    options = check._parse(["--seed", "1", "--jobs", "0", "--out", str(tmp_path)])
    run = check.Check(options, agenda.Budget(450.0, lambda: now[0]))
    monkeypatch.setattr(run, "random", lambda: now.__setitem__(0, now[0] + 100.0))
    run.all()
    done = [case["case"] for case in run.record["cases"]]
    names = [case.name for case in agenda.gated(quick=False)]
    assert done[: len(names[:15])] == names[:15]
    assert run.record["cases"][1]["problem"] == "RuntimeError: out of memory"
    assert set(names[15:]) <= set(run.record["skipped"])
    assert now[0] <= 450.0 and run.status == 1
    record = json.loads((tmp_path / "device_check.json").read_text())
    assert len(record["cases"]) == len(done)


def test_every_timed_case_is_on_the_agenda_once():
    names = [case.name for case in agenda.gated(quick=False) + agenda.others()]
    assert len(names) == len(set(names))
    tags = {tag for name in names for tag in cases.find(name).tags}
    assert tags >= {"decode", "prefill", "append", "mixed", "fused"} and "ci" not in tags
    assert {case.name for case in agenda.gated(quick=True)} <= set(names)
    missing = {c.name for c in cases.CASES.values() if not {"ci", "compile_only"} & set(c.tags)}
    assert missing == set(names)


@pytest.mark.parametrize("jobs", [0, 1, 3])
def test_work_ahead_comes_in_order_and_raises_where_it_is_asked_for(jobs):
    def make(x):
        if x == 2:
            raise RuntimeError("two")
        return x * x

    results = []
    for item, made in ahead.ahead(range(9), make, jobs):
        if item == 2:
            with pytest.raises(RuntimeError, match="two"):
                made()
        else:
            results.append((item, made()))
    assert results == [(x, x * x) for x in range(9) if x != 2]


# ---- others that it asks -------------------------------------------------------------------------


def test_what_the_sanitizer_says_is_read(monkeypatch):
    good = "ok\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.read(0, good) == {"errors": 0}
    bad = sanitizer.read(86, "Invalid write\n========= ERROR SUMMARY: 3 errors\n")
    assert bad["errors"] == 3 and "Invalid write" in bad["problem"]
    assert sanitizer.read(1, "Device not supported") == {
        "problem": "ended with 1: Device not supported"
    }
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert sanitizer.run("x", ("memcheck",), 1.0) == {
        "problem": "compute-sanitizer is not installed"
    }


def test_a_sanitizer_that_hangs_or_fails_is_cut_off(monkeypatch, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nif [ $2 = memcheck ]; then sleep 9; fi; echo $@; exit 4\n")
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(program))
    told = sanitizer.run("script.py", sanitizer.TOOLS, 1.0)
    assert told["memcheck"] == {"problem": "not done within 0 s"}
    assert "ended with 4: --tool synccheck" in told["synccheck"]["problem"]
    assert "script.py --part fuzz" in told["synccheck"]["problem"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A", {"xla", "cudnn_paged"}),
        ("8b_prefill_4x4k", {"xla", "cudnn_dense"}),
        ("8b_chunk_4x2k_at_8k", {"xla"}),
        ("append_64", {"xla"}),
        ("bloom_b16_2k", {"xla"}),
    ],
)
def test_peers_take_the_cases_they_can(monkeypatch, name, expected):
    monkeypatch.setattr("benchmarks.torch_peers.find_spec", lambda name: None)
    assert {peer.name for peer in peers.of_case(cases.find(name))} == expected


def test_a_peer_that_fails_stops_nothing(monkeypatch):
    def fail(case, inputs):
        raise OSError("no library")

    peer = peers.Peer("another", lambda case: None, fail)
    told = measuring._of_peer(cases.find("ci_mha"), None, peer, None, None, lambda text: None)
    assert told == {"problem": "OSError: no library"}
    zeros = peers.Peer("zeros", lambda case: None, lambda case, inputs: lambda i: jnp.zeros(3))
    told = measuring._of_peer(
        cases.find("ci_mha"), None, zeros, jnp.ones(3), None, lambda text: None
    )
    assert told == {"error": 1.0, "problem": "computes something else"}


@pytest.mark.parametrize("name", "ABCDEFGHIJ")
def test_a_stream_reads_every_block_of_a_decode_case_once(name):
    case = cases.find(name)
    assert stream.unsupported(case) is None
    plan = stream.make_plan(case, 132)
    rows = case.block_size * case.num_kv_heads
    assert plan.rows * plan.copies_per_block == rows
    assert plan.copies_per_step * plan.rows == stream.ROWS
    table = case.block_tables()[0]
    listed = np.asarray(stream._block_list(table, plan, case.num_blocks))
    assert len(listed) % plan.copies_per_step == 0
    assert sorted(listed[listed < case.num_blocks]) == sorted(table[table >= 0])
