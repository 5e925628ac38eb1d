"""A record as a table for people, in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

PEERS = ("cudnn_paged", "cudnn_dense", "flashinfer", "vllm_triton", "xla")


def table(record: Mapping[str, Any]) -> str:
    """Where and when, what must hold, what was measured, what was drawn at random."""
    parts = [_head(record), _gates(record), _cases(record), _random(record)]
    return "\n".join(part for part in parts if part)


def _head(record: Mapping[str, Any]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    ceilings = ", ".join(
        f"{name} {value:.0f} {'TFLOP/s' if 'matmul' in name else 'GB/s'}"
        for name, value in record.get("ceilings", {}).items()
    )
    lines = [f"# Device check\n\n{where}; {record['seconds']:.0f} s.  Ceilings: {ceilings or '-'}."]
    if record["dry_run"]:
        lines.append("A dry run with no GPU: its times mean nothing.")
    if record.get("skipped"):
        lines.append(f"Out of time before: {', '.join(record['skipped'])}.")
    return "\n\n".join(lines) + "\n"


def _gates(record: Mapping[str, Any]) -> str:
    rows = ((g["gate"], _number(g["value"]), g["rule"], g["verdict"]) for g in record["gates"])
    head = ("must hold", "measured", "rule", "verdict")
    return _markdown(head, rows) if record["gates"] else ""


def _cases(record: Mapping[str, Any]) -> str:
    head = ("case", "", "us", "quartiles", "rate", "share", "error", "schedule us", "stream us")
    rows = []
    for case in record["cases"]:
        name = (case["case"], case["letter"])
        if case["problem"]:
            rows.append((*name, case["problem"]))
            continue
        rows.append(
            (
                *name,
                f"{case['median_us']:.1f}",
                f"{case['low_us']:.1f}..{case['high_us']:.1f}",
                f"{case['value']:.0f} {case['unit']}" if "value" in case else "-",
                f"{case['share']:.3f} of {case['limit']}" if "share" in case else "-",
                f"{case['error']:.1e}",
                _time(case.get("schedule")),
                _time(case.get("stream")),
                *(_time(case.get("peers", {}).get(peer)) for peer in PEERS),
            )
        )
    return _markdown((*head, *(f"{peer} us" for peer in PEERS)), rows)


def _random(record: Mapping[str, Any]) -> str:
    rows = [
        (
            form["form"],
            form["seeds"],
            f"{form['error']:.1e}",
            "; ".join(f"seed {seed}: {wrong}" for seed, wrong in form["wrong"].items()) or "right",
        )
        for form in record.get("fuzz", [])
    ]
    text = (
        _markdown(("random lengths of", "draws", "largest error", "result"), rows) if rows else ""
    )
    told = record.get("sanitizer", {})
    lines = [f"compute-sanitizer {tool}: {said}" for tool, said in told.items()]
    return "\n".join([text, *lines, ""])


def _time(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{figures['median_us']:.1f}" if "median_us" in figures else "failed"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    full = [[str(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in full)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
