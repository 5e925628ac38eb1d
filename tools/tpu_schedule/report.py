"""Figures as a table for people."""

from typing import Any

from .measure import Measured

_COLUMNS = {
    "case": "case",
    "topology": "topology",
    "sched_per_kib": "sched/KiB",
    "hbm_per_kib": "HBM/KiB",
    "ratio": "ratio",
    "sequence_ratio": "sequence",
    "cycles_per_block_copy": "cyc/copy",
    "hot_loop_spills": "hot spills",
    "spills": "spills",
    "vmem_bytes": "VMEM MiB",
    "mxu_share": "MXU %",
    "compile_seconds": "compile s",
}


def header() -> str:
    return _line(_COLUMNS)


def row(measured: Measured) -> str:
    """One line of figures, and one about the hot loop behind them."""
    record, hot = measured.record, measured.hot
    path = hot.path
    busy = " ".join(f"{unit} {share:.0%}" for unit, share in hot.busy.items() if share >= 0.005)
    return "\n".join(
        [
            _line({name: _text(name, record[name]) for name in _COLUMNS}),
            f"    {hot.dump.name}: {path.cycles:.0f} cycles x {path.iterations}, "
            f"{path.copies:.4g} copies each | idle {hot.idle:.0%} | {busy}",
        ]
    )


def _line(cells: dict[str, str]) -> str:
    widths = {"case": -28, "topology": -13}
    parts = []
    for name, cell in cells.items():
        width = widths.get(name, max(8, len(_COLUMNS[name])))
        parts.append(f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}")
    return " ".join(parts)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "vmem_bytes":
        return f"{value / 2**20:.2f}"
    if name == "mxu_share":
        return f"{100 * value:.1f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
