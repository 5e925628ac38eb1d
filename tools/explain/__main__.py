"""Explains a case: what it asks, how a backend's kernels cut it, who does what, what limits it.

    python -m tools.explain 8b_b64_4k --backend gpu

Cases are those of `python -m benchmarks --list`.  Nothing runs and no device is needed: plans and
work lists are the kernels' own, bandwidths and peaks are the published ones.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks import cases
from benchmarks.workload import APPEND, FUSED, Case
from tools.tpu_schedule.chips import CHIPS

from .explained import Explained, counted, draw


class Peak(NamedTuple):
    """Published rates of one TensorCore or GPU."""

    gbps: float
    tflops: float  # of bfloat16 products


PEAKS = {
    "tpu": {
        name: Peak(chip.hbm_gbps, chip.clock_ghz * chip.flops_per_cycle / 1e3)
        for name, chip in CHIPS.items()
    },
    "gpu": {"h100": Peak(3350, 989), "h200": Peak(4800, 989)},
}
DEFAULTS = {"tpu": "v6e", "gpu": "h100"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the explanation; returns the exit status."""
    options = _parse(arguments)
    topology = options.topology or DEFAULTS[options.backend]
    try:
        chip = topology.partition(":")[0].lower()
        if chip not in PEAKS[options.backend]:
            raise ValueError(f"no {topology!r}; there are {', '.join(PEAKS[options.backend])}")
        case = cases.find(options.case)
        kernels = explain(case, options.backend, chip)
    except (KeyError, ValueError, ImportError) as error:
        print(f"explain: {error.args[0]}", file=sys.stderr)
        return 2
    print(f"{case.name}: {case.about}")
    for kernel in kernels:
        print("\n".join(["", *kernel_lines(kernel, options.lines, options.width)]))
    print("\n".join(["", *roofline(case, chip, PEAKS[options.backend][chip])]))
    return 0


def explain(case: Case, backend: str, chip: str) -> list[Explained]:
    """The kernels of a backend that the case would run.

    Raises:
      Unsupported: there is none.
      ImportError: the GPU kernels need a newer JAX.
    """
    if backend == "gpu":
        from . import gpu

        return gpu.explain(case)
    from . import tpu

    return tpu.explain(case, chip)


def kernel_lines(kernel: Explained, num_lines: int, width: int) -> Iterator[str]:
    """A kernel's problem, plan, scratch and work."""
    yield f"kernel: {kernel.kernel}"
    for name, value in (("Problem", kernel.problem), ("Plan", kernel.plan)):
        yield name
        yield from _fields(value, 1)
    share = f"{kernel.num_bytes} of {kernel.limit} bytes ({kernel.num_bytes / kernel.limit:.0%})"
    yield f"Scratch and operands: {share}"
    for count, part in counted(kernel.scratch):
        times = f"{count} x " if count > 1 else ""
        yield f"  {times}{part.name} {part.shape} {part.dtype} {part.num_bytes} bytes".replace(
            "  0 bytes", ""
        )
    visits = sum(v.number for worker in kernel.workers for group in worker.groups for v in group)
    yield f"Work: {visits} letters in {len(kernel.workers)} lines, in order"
    yield f"  a letter is {kernel.legend}"
    yield "  a is of sequence 0, b of 1; a capital is masked in part, or partly filled"
    for line in draw(kernel.workers, num_lines, width):
        yield "  " + line


def roofline(case: Case, chip: str, peak: Peak) -> Iterator[str]:
    """The least time that memory and arithmetic need, and which of them limits."""
    moved = 0 if case.op == APPEND else case.kv_bytes
    moved += case.append_bytes if case.op in (APPEND, FUSED) else 0
    flops = 0 if case.op == APPEND else case.useful_flops
    # float32 products are made of several bfloat16 ones: the peak is one that nobody reaches
    memory, arithmetic = moved / peak.gbps / 1e3, flops / peak.tflops / 1e6
    intensity, ridge = flops / max(moved, 1), peak.tflops * 1e3 / peak.gbps
    limit = "memory" if memory >= arithmetic else "arithmetic"
    yield f"Roofline of {chip}: {peak.gbps:.0f} GB/s, {peak.tflops:.0f} TFLOP/s in bfloat16"
    yield f"  memory      {moved / 1e6:12.3f} MB of keys and values {memory:12.2f} us"
    yield f"  arithmetic  {flops / 1e9:12.3f} GFLOP that count       {arithmetic:12.2f} us"
    yield f"  {intensity:.1f} FLOP per byte, the ridge is at {ridge:.0f}: {limit} limits"


def _fields(value: object, depth: int) -> Iterator[str]:
    """A dataclass field by field, those inside it indented."""
    assert dataclasses.is_dataclass(value)
    for field in dataclasses.fields(value):
        inner, indent = getattr(value, field.name), "  " * depth
        if dataclasses.is_dataclass(inner):
            yield f"{indent}{field.name}: {type(inner).__name__}"
            yield from _fields(inner, depth + 1)
        else:
            yield f"{indent}{field.name}: {inner}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("case", metavar="CASE", help="a name, or a letter, of benchmarks/cases.py")
    add("--backend", choices=tuple(PEAKS), default="tpu", help="default: tpu")
    add("--topology", metavar="CHIP", help=f"{', '.join(CHIPS)} (default v6e); h100 or h200")
    add("--lines", type=int, default=16, help="of the picture, at most (default 16)")
    add("--width", type=int, default=72, help="letters of a line, at most (default 72)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
