"""Everything that needs a GPU, in one call: results first, then times beside ceilings and peers.

The record is written after every step, so that what was measured outlives whatever comes next.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import roofline
from benchmarks.environment import gpu_environment
from benchmarks.inputs import ROTATE_BYTES
from benchmarks.workload import Case
from paged_kv.kernels.gpu import unsupported_version

from . import agenda, fuzz, gates, measuring, picture, report, sanitizer
from .agenda import Budget
from .ahead import ahead, compile_case

IMPLEMENTATION = "mosaic_gpu"
SECONDS = 450.0  # of the 8 minutes a device may be had at once
FOR_RANDOM, FOR_SANITIZER = 110.0, 50.0  # kept back from the timings
FOR_ONE_CASE = 15.0
STUCK_SECONDS = 150.0  # one step that takes longer never ends: a barrier that is not completed
STUCK = 3  # the exit status of that
SEEDS, TRIAL_SEEDS = 20, 2  # random draws of each form, on a device and in the interpreter


@dataclass
class Check:
    """One run: what it was asked, the time it has, and the record it makes."""

    options: argparse.Namespace
    budget: Budget
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = self.options.seed
        self.record |= {
            "environment": gpu_environment(),
            "dry_run": self.options.dry_run,
            "seed": int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed,
            "seconds": 0.0,
            "ceilings": {},
            "cases": [],
            "skipped": [],
            "fuzz": [],
            "sanitizer": {},
            "gates": [],
        }

    @property
    def interpret(self) -> bool | None:
        return True if self.options.dry_run and self.options.implementation != "xla" else None

    def all(self) -> None:
        quick, rotate = self.options.quick, 0 if self.options.dry_run else ROTATE_BYTES
        if not self.options.dry_run:
            self._ceilings()
        first = self._chosen(agenda.gated(quick))
        self._time(first, rotate, keep=FOR_RANDOM + FOR_SANITIZER)
        self.random()
        if not self.options.dry_run:
            self._sanitize()
        if not quick:
            self._time(self._chosen(agenda.others()), rotate, keep=FOR_ONE_CASE)

    def random(self) -> None:
        """Random draws of every form."""
        forms = agenda.fuzzed(self.options.quick or self.options.dry_run)
        wanted = self.options.forms or (agenda.TINY if self.options.dry_run else None)
        forms = [form for form in forms if wanted is None or form.name in wanted]
        seeds = [self.record["seed"] + i for i in range(self.options.seeds)]
        name = self.options.implementation
        make = partial(fuzz.compile_form, implementation=name, interpret=self.interpret)
        stop = self.budget.used + FOR_RANDOM
        for form, compiled in ahead(forms, make, self.options.jobs):
            if self.budget.used > stop or self.budget.left < 0:
                self.record["skipped"].append(form.name)
                continue
            with self._step(f"{len(seeds)} random draws of {form.name}"):
                try:
                    told = fuzz.run(form, compiled(), seeds, name)
                except NotImplementedError as refusal:
                    told = {"form": form.name, "seeds": 0, "error": 0.0, "wrong": {}}
                    told["refused"] = str(refusal)
                except Exception as error:
                    told = {"form": form.name, "seeds": len(seeds), "error": 0.0}
                    told["wrong"] = {"all": f"{type(error).__name__}: {str(error)[:500]}"}
                self.record["fuzz"].append(told)

    def _chosen(self, cases: list[Case]) -> list[Case]:
        if self.options.dry_run:
            return agenda.named(agenda.TINY)
        return cases

    def _ceilings(self) -> None:
        with self._step("measuring the ceilings"):
            self.record["ceilings"] = {
                "read": roofline.read_ceiling(),
                "copy": roofline.copy_ceiling(),
                "matmul bfloat16": roofline.matmul_ceiling("bfloat16"),
            }

    def _time(self, cases: list[Case], rotate_bytes: int, keep: float) -> None:
        """Cases one after the other, until only `keep` seconds are left."""
        name = self.options.implementation
        make = lambda case: compile_case(case, name, self.interpret, rotate_bytes)
        done = {case["case"] for case in self.record["cases"]}
        cases = [case for case in cases if case.name not in done]
        gated = {case.name for case in agenda.gated(quick=False)}
        for case, compiled in ahead(cases, make, self.options.jobs):
            if self.budget.left < keep:
                self.record["skipped"].append(case.name)
                continue
            with self._step(case.name) as say:
                self.record["cases"].append(
                    self._measured(case, compiled, gated, rotate_bytes, say)
                )

    def _measured(self, case, compiled, gated, rotate_bytes, say) -> dict[str, Any]:
        try:
            return measuring.measure_case(
                case,
                compiled(),
                implementation=self.options.implementation,
                interpret=self.interpret,
                rotate_bytes=rotate_bytes,
                with_peers=case.name in gated and not self.options.dry_run,
                effort=measuring.TRIAL if self.options.dry_run else measuring.FULL,
                say=say,
            )
        except Exception as error:  # one case that fails must not cost the others
            problem = f"{type(error).__name__}: {str(error)[:500]}"
            unknown = {"problem": problem, "error": float("nan"), "same_bits": True}
            return measuring.facts(case) | unknown

    def _sanitize(self) -> None:
        seconds = min(FOR_SANITIZER, self.budget.left)
        with self._step(f"compute-sanitizer, {seconds:.0f} s at most"):
            script = str(Path(__file__).parent.parent / "device_check.py")
            self.record["sanitizer"] = sanitizer.run(script, sanitizer.TOOLS, seconds)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[Any]:
        """Says what is done, writes the record afterwards, and ends a run that is stuck."""
        say = lambda doing: _say(f"[{self.budget.used:4.0f} s] {name}: {doing}")
        _say(f"[{self.budget.used:4.0f} s] {name}")
        # the interpreter is slow, and as slow as what runs beside it
        patience = STUCK_SECONDS * (4 if self.options.dry_run else 1)
        timer = threading.Timer(patience, self._stuck, [name])
        timer.daemon = True
        timer.start()
        try:
            yield say
        finally:
            timer.cancel()
            self.write()

    def _stuck(self, name: str) -> None:
        self.record["stuck"] = name
        self.write()
        _say(f"{name} does not end: the record up to it is written")
        os._exit(STUCK)

    def write(self) -> None:
        """The record, the table and, of a device, the picture."""
        record = self.record
        record["seconds"] = self.budget.used
        record["gates"] = [] if record["dry_run"] else [g.row() for g in gates.judge(record)]
        if (folder := self.options.out) is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "device_check.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "device_check.md").write_text(report.table(record))
        if record["ceilings"] and picture.points(record) and not record["dry_run"]:
            (folder / "roofline.svg").write_text(picture.draw(record))

    @property
    def status(self) -> int:
        """0 if nothing was wrong and no gate missed."""
        record = self.record
        wrong = any(case["problem"] for case in record["cases"])
        wrong |= any(form["wrong"] for form in record["fuzz"])
        return int(wrong or any(gate["verdict"] == gates.MISS for gate in record["gates"]))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if (reason := unsupported_version()) is not None and options.implementation != "xla":
        return _refuse(reason)
    platform = jax.default_backend()
    if platform != "gpu" and not options.dry_run:
        return _refuse(
            f"needs an NVIDIA GPU, and JAX sees {platform} here; --dry-run walks through tiny "
            "cases in the interpreter instead, and times nothing that counts"
        )
    check = Check(options, Budget(options.seconds))
    if options.part == "fuzz":
        check.random()
    else:
        check.all()
    check.write()
    print(report.table(check.record))
    return check.status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="device_check.py", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases: about two minutes")
    add(
        "--out", type=Path, metavar="DIR", help="write device_check.json, .md and roofline.svg here"
    )
    add("--seconds", type=float, default=SECONDS, help="what is not done by then is skipped")
    add("--seed", type=int, help="of the random draws; default: a fresh one, which is recorded")
    add("--seeds", type=int, metavar="N", help="random draws of each form, 20 by default")
    add("--jobs", type=int, default=4, help="programs compiled ahead at once; 0: none")
    add("--part", choices=("all", "fuzz"), default="all", help="fuzz: random draws alone")
    add("--forms", nargs="+", metavar="NAME", help="draw these forms alone")
    add("--dry-run", action="store_true", help="tiny cases on a CPU, in the interpreter")
    add(
        "--implementation",
        choices=(IMPLEMENTATION, "xla"),
        default=IMPLEMENTATION,
        help="what is checked; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = TRIAL_SEEDS if options.dry_run else SEEDS
    return options


def _refuse(reason: str) -> int:
    _say(f"device_check {reason}")
    return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
