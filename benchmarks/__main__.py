"""Times named cases, each checked first: `python -m benchmarks 8b_b64_4k C --json results.json`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cases
from .environment import environment
from .workload import Case

IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", "xla")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.list:
        return _list()
    try:
        chosen = [case for name in options.cases for case in _named(name)]
    except KeyError as error:
        return _fail(f"{error.args[0]}; --list names them all")
    if not chosen:
        return _fail("name at least one case, a letter or a tag; --list names them all")
    for case in chosen:
        if "compile_only" in case.tags:
            return _fail(f"{case.name} is for compilers only: no memory holds what it reads")

    where = environment()
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    records = []
    for number, case in enumerate(chosen, 1):
        progress = f"[{number}/{len(chosen)}] {case.name}"
        record = run(case, options, lambda doing, at=progress: _say(f"{at}: {doing}"))
        print(_report(record), flush=True)
        records.append(record)
    if options.json:
        options.json.write_text(json.dumps({"environment": where, "records": records}, indent=1))
    return 1 if any(record["problem"] for record in records) else 0


def run(case: Case, options: argparse.Namespace, say) -> dict[str, Any]:
    """One record: the gate's verdict, and figures only if it is good."""
    from .inputs import ROTATE_BYTES, make_inputs
    from .roofline import bound
    from .runner import BASELINE, Program, Runner, check
    from .timing import measure

    name = options.implementation
    record: dict[str, Any] = {"case": case.name, "op": case.op, "implementation": name or "default"}
    say(f"making {case.num_blocks * case.block_size * case.token_bytes / 2**20:.0f} MiB of cache")
    is_timed = not (options.interpret or options.check_only)
    rotate = ROTATE_BYTES if is_timed else 0
    inputs = make_inputs(case, seed=options.seed, rotate_bytes=rotate)
    say("checking the result")
    try:
        wrong = check(case, inputs, name, options.interpret)
        record["problem"] = wrong and f"wrong: {wrong}"
    except (NotImplementedError, ValueError) as error:
        record["problem"] = f"refused: {error}"
    if record["problem"] or options.check_only:
        return record
    say("timing it")
    timing = measure(Runner(Program(case, name, options.interpret), inputs).run, options.repeats)
    say("timing the baseline")
    base = measure(Runner(Program(case, BASELINE), inputs).run, options.repeats)
    say("measuring the ceilings")
    rate = bound(case, timing.median_us * 1e-6)
    return {
        **record,
        **asdict(timing),
        **asdict(rate),
        "share": rate.share,
        "baseline_us": base.median_us,
        "speedup": base.median_us / timing.median_us,
        "kv_bytes": case.kv_bytes,
        "useful_flops": case.useful_flops,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a name, a letter or a tag")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="default: the best for this device"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        default=None,
        help="run a kernel in its interpreter: good for checks, its times mean nothing",
    )
    parser.add_argument("--check-only", action="store_true", help="check results, time nothing")
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here too")
    return parser.parse_args(arguments)


def _list() -> int:
    try:
        for case in cases.CASES.values():
            print(_describe(case), flush=True)
    except BrokenPipeError:  # piped into head
        sys.stdout = None
    return 0


def _named(name: str) -> list[Case]:
    return cases.tagged(name) or [cases.find(name)]


def _describe(case: Case) -> str:
    heads = f"{case.num_query_heads}/{case.num_kv_heads}"
    shape = f"{heads:>5} x {case.head_dim:<3} block {case.block_size:<3} {case.dtype:8}"
    tags = ",".join(case.tags)
    return f"{case.letter:1} {case.name:27} {shape} {case.op:17} {tags:15} {case.about}"


def _report(record: dict[str, Any]) -> str:
    head = f"{record['case']:27} {record['implementation']:10}"
    if record["problem"]:
        return f"{head} {record['problem']}"
    if "median_us" not in record:
        return f"{head} right"
    spread = f"({record['low_us']:.1f} .. {record['high_us']:.1f})"
    return (
        f"{head} {record['median_us']:10.1f} us {spread} {record['clock']} clock"
        f" | {record['value']:.4g} {record['unit']}, {record['share']:.0%} of the"
        f" {record['limit']} ceiling of {record['ceiling']:.4g}"
        f" | {record['speedup']:.2f}x the XLA baseline"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    _say(f"benchmarks: {text}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
