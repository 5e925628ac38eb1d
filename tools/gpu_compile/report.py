"""Figures of a kernel as a line for people and as a record for programs."""

from typing import Any

from .compiler import Kernel

# Instructions that say how a kernel works: tensor cores, bulk copies, what is spilled.
SHOWN = ("HGMMA", "UTMALDG", "UTMASTG", "LDG", "STG", "LDL", "STL", "BAR")
_HEADER = ("registers", "spills", "stack", "smem", "blocks/SM")


def header() -> str:
    return _line("case", "arch", "kernel", _HEADER) + "  instructions"


def row(case: str, arch: str, kernel: Kernel) -> str:
    spills = f"{kernel.spill_stores}/{kernel.spill_loads}"
    cells = (
        kernel.registers,
        spills,
        kernel.stack_bytes,
        kernel.smem_bytes,
        kernel.blocks_per_sm,
    )
    counts = [f"{op} {kernel.ops[op]}" for op in SHOWN if kernel.ops and op in kernel.ops]
    return _line(case, arch, kernel.kernel, cells) + "  " + (", ".join(counts) or "-")


def record(case: str, arch: str, kernel: Kernel) -> dict[str, Any]:
    return {
        "case": case,
        "arch": arch,
        "kernel": kernel.kernel,
        "registers": kernel.registers,
        "spill_stores": kernel.spill_stores,
        "spill_loads": kernel.spill_loads,
        "smem_bytes": kernel.smem_bytes,
        "ops": kernel.ops,
    }


def _line(case: str, arch: str, kernel: str, cells: tuple) -> str:
    return f"{case:<28} {arch:<5} {kernel:<16}" + "".join(f" {cell!s:>9}" for cell in cells)
