"""Static schedule figures of our TPU kernels: `python -m tools.tpu_schedule CASE --json FILE`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import report
from .chips import TOPOLOGIES
from .measure import CompileError, measure


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    records, failed = [], False
    print(report.header())
    for case in options.cases:
        for topology in options.topology or TOPOLOGIES:
            try:
                measured = measure(case, topology, options.kv_len)
            except (CompileError, KeyError, ValueError) as error:
                print(f"tpu_schedule: {error.args[0]}", file=sys.stderr)
                failed = True
                continue
            print(report.row(measured), flush=True)
            records.append(measured.record)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.tpu_schedule", description=__doc__)
    parser.add_argument(
        "cases",
        nargs="+",
        metavar="CASE",
        help="a name of benchmarks/cases.py, or FILE.py:function that returns a Program",
    )
    parser.add_argument(
        "--topology",
        action="append",
        metavar="NAME",
        help=f"may be given several times; all of {', '.join(TOPOLOGIES)} if not given",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here too")
    parser.add_argument(
        "--kv-len",
        type=int,
        metavar="N",
        help="every sequence N tokens long, and cycles and share of peak from end to end",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
