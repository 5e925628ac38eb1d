"""From a case and a topology to its figures: compile in a process of its own, follow, count."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases

from . import dump
from .chips import Chip, chip_of
from .figures import Call, Hot, Ways, figures, hot_of
from .machine import Machine

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 900
MAX_REASON = 2000  # characters of what a compiler says


class CompileError(RuntimeError):
    """The case was refused, by the kernel, by the compiler or for want of one."""


@dataclass(frozen=True)
class Measured:
    """A record with the names of the report, and the hot loop behind it."""

    record: dict[str, Any]
    hot: Hot


def measure(target: str, topology: str, kv_len: int | None = None) -> Measured:
    """The figures of a case (or `FILE.py:function`) on a topology; leaves no file behind.

    Raises:
      KeyError: there is no such case.
      CompileError: the case does not compile; it has the compiler's words.
      ValueError: the topology is unknown, or the schedule depends on more than lengths and tables.
    """
    chip = chip_of(topology)
    target = _absolute(target) if ":" in target else cases.find(target).name
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as name:
        folder = Path(name)
        result = _compile(target, topology, kv_len, folder)
        dumps = dump.read(folder / "dump", result["kernels"])
        with np.load(folder / "operands.npz") as arrays:
            runs = [_follow(chip, dumps, arrays, run) for run in result["runs"]]
    ways, context = runs[0], (runs[1], runs[2]) if len(runs) == 3 else None
    found = figures(
        chip,
        dumps,
        ways,
        context,
        is_whole=result["whole"],
        asks_sequence=kv_len is not None,
    )
    record = {"case": target, "topology": topology, **found}
    return Measured(record | {"compile_seconds": result["compile_seconds"]}, hot_of(ways))


def _absolute(target: str) -> str:
    path, _, name = target.partition(":")
    return f"{Path(path).resolve()}:{name}"


def _compile(target: str, topology: str, kv_len: int | None, folder: Path) -> dict[str, Any]:
    """What the worker found; its dump is in `folder / "dump"`."""
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("libtpu, the compiler, is not here: `pip install -e '.[aot]'`")
    (folder / "dump").mkdir()
    request = {"target": target, "topology": topology, "kv_len": kv_len, "folder": str(folder)}
    (folder / "request.json").write_text(json.dumps(request))
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask about
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and none to lock
        "LIBTPU_INIT_ARGS": f"{flags} {dump.compiler_flags(folder / 'dump')}",
    }
    command = [sys.executable, "-m", "tools.tpu_schedule.worker", str(folder / "request.json")]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=MAX_SECONDS
    )
    if done.returncode:
        told = folder / "error.txt"
        reason = told.read_text() if told.exists() else done.stderr
        raise CompileError(f"{target} on {topology}: {reason.strip()[-MAX_REASON:]}")
    return json.loads((folder / "result.json").read_text())


def _follow(chip: Chip, dumps: dict[str, dump.Dump], arrays: Any, run: dict[str, Any]) -> Ways:
    """The ways of the kernels that a run calls."""
    calls = []
    for call in run["calls"]:
        kernel = dumps[call["kernel"]]
        operands = [None if n is None else arrays[f"arr_{n}"] for n in call["operands"]]
        machine = Machine(chip, kernel.bundles, operands, frozenset(call["pools"]))
        calls.append(Call(kernel, machine.run(), call["filled"]))
    return Ways(tuple(calls), run["num_bytes"], run["useful_flops"])
