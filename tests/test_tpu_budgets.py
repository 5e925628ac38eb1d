"""The schedules of our TPU kernels stay within the limits of tpu_budgets.json.

A row is a case on a topology, with `kv_len` if it is measured from end to end, and its limits by
the names of the tool's report.  They hold for the compiler that the extra `aot` pins.  Figures read
from a schedule are the same on every machine; seconds are not, so that they are looked at only when
asked for, on a machine that does nothing else.
"""

import functools
import json
from pathlib import Path

import pytest

from benchmarks import cases
from tools.tpu_schedule.chips import TOPOLOGIES
from tools.tpu_schedule.measure import measure

ROWS = json.loads((Path(__file__).parent / "tpu_budgets.json").read_text())
AT_LEAST = {"mxu_share"}  # all others at most
TIMED = {"compile_seconds"}
KEYS = {
    *("sched_per_kib", "ratio", "sequence_ratio", "cycles_per_block_copy", "hot_loop_spills"),
    *("spills", "vmem_bytes", "mxu_share", "compile_seconds"),
}


def name(row):
    length = f"-{row['kv_len']}" if "kv_len" in row else ""
    return f"{row['case']}{length}-{row['topology'].partition(':')[0]}"


PARAMETERS = [
    pytest.param(row, id=name(row), marks=[pytest.mark.slow] if row.get("slow") else [])
    for row in ROWS
]


def beyond(record, limits):
    """What the record has beyond its limits, or does not have at all, as text."""
    found = []
    for key, limit in limits.items():
        value = record[key]
        is_good = value is not None and (value >= limit if key in AT_LEAST else value <= limit)
        if not is_good:
            found.append(f"{key} {value}, at {'least' if key in AT_LEAST else 'most'} {limit}")
    return "; ".join(found)


def test_a_figure_beyond_its_limit_is_told():
    record = {"ratio": 0.5, "mxu_share": 0.4, "spills": None, "vmem_bytes": 7}
    assert not beyond(record, {"ratio": 0.5, "mxu_share": 0.4, "vmem_bytes": 8})
    assert beyond(record, {"ratio": 0.49, "vmem_bytes": 7}) == "ratio 0.5, at most 0.49"
    assert beyond(record, {"mxu_share": 0.41, "spills": 9}) == (
        "mxu_share 0.4, at least 0.41; spills None, at most 9"
    )


def test_rows_name_what_there_is_once():
    assert len({name(row) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert cases.find(row["case"]).name == row["case"]
        assert row["topology"] in TOPOLOGIES
        assert row.keys() <= {"case", "topology", "kv_len", "limits", "slow"}
        assert row["limits"] and row["limits"].keys() <= KEYS


@functools.cache
def record_of(case, topology, kv_len):
    return measure(case, topology, kv_len).record


def check(row, keys):
    limits = {key: limit for key, limit in row["limits"].items() if key in keys}
    problem = beyond(record_of(row["case"], row["topology"], row.get("kv_len")), limits)
    assert not problem, f"{name(row)}: {problem}"


@pytest.mark.aot
@pytest.mark.parametrize("row", PARAMETERS)
def test_a_schedule_is_within_its_limits(row):
    check(row, KEYS - TIMED)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row["limits"].keys() & TIMED], ids=name)
def test_a_kernel_compiles_in_time(row):
    check(row, TIMED)
