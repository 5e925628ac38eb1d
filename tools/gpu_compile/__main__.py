"""What our GPU kernels take of an SM: `python -m tools.gpu_compile CASE --json FILE`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin asks for a driver otherwise

import jax

from benchmarks import cases
from tools.tpu_schedule import program

from . import compiler, report
from .archs import ARCHS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if (reason := compiler.missing()) is not None:
        print(f"gpu_compile {reason}", file=sys.stderr)
        return 2
    records, failed = [], False
    print(report.header())
    for name in options.cases:
        try:
            case = name if ":" in name else cases.find(name).name
            kernels = compile_case(case, options.arch).kernels
        except (KeyError, NotImplementedError) as error:
            print(f"gpu_compile: {error.args[0]}", file=sys.stderr)
            failed = True
            continue
        for kernel in kernels:
            print(report.row(case, options.arch, kernel), flush=True)
            records.append(report.record(case, options.arch, kernel))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if failed else 0


def compile_case(name: str, arch: str, *, is_detailed: bool = True) -> compiler.Report:
    """The report of a case of benchmarks/cases.py, or of `FILE.py:function`, a `Program`."""
    loaded = program.load(name, implementation="mosaic_gpu")
    donated = tuple(i for i, key in enumerate(loaded.arguments) if key in loaded.donated)
    function = jax.jit(loaded.function, donate_argnums=donated)
    return compiler.compile_for(arch, function, *loaded.arguments.values(), is_detailed=is_detailed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_compile", description=__doc__)
    parser.add_argument(
        "cases",
        nargs="+",
        metavar="CASE",
        help="a name of benchmarks/cases.py, or FILE.py:function that returns a Program",
    )
    parser.add_argument("--arch", choices=ARCHS, default="H100", help="default: H100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
