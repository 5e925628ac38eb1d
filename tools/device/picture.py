"""A record as a roofline, in SVG: `python -m tools.device.picture RECORD.json ROOFLINE.svg`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 900, 560, 70
COLORS = {"decode": "#1f6fb4", "prefill": "#c2410c", "mixed": "#7c3aed", "fused": "#0f766e"}


class Point(NamedTuple):
    name: str
    intensity: float  # FLOP per byte of keys and values
    rate: float  # TFLOP/s
    kind: str


class Scale(NamedTuple):
    """Logarithmic, from [low, high] to [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, x: float) -> float:
        share = math.log(x / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**exponent for exponent in range(first, last + 1)]


def points(record: Mapping[str, Any]) -> list[Point]:
    """The measured cases that do arithmetic."""
    found = []
    for case in record["cases"]:
        moved = case["kv_bytes"] + case["append_bytes"]
        if "median_us" in case and case["useful_flops"] and moved:
            rate = case["useful_flops"] / case["median_us"] * 1e-6
            kind = next((tag for tag in case["tags"] if tag in COLORS), "decode")
            name = case["letter"] or case["case"]
            found.append(Point(name, case["useful_flops"] / moved, rate, kind))
    return found


def draw(record: Mapping[str, Any]) -> str:
    """The picture of a record that a device made."""
    shown = points(record)
    if record["dry_run"] or not shown:
        raise ValueError("the record holds no times of a device: run tools/device_check.py on one")
    read, matmul = record["ceilings"]["read"] / 1e3, record["ceilings"]["matmul bfloat16"]
    x = Scale(
        min(1.0, *(p.intensity for p in shown)),
        4 * max(matmul / read, *(p.intensity for p in shown)),
        MARGIN,
        WIDTH - MARGIN,
    )
    rates = [p.rate for p in shown]
    y = Scale(min(rates) / 4, 2 * max(matmul, *rates), HEIGHT - MARGIN, MARGIN)
    roof = [(x.low, max(y.low, read * x.low)), (matmul / read, matmul), (x.high, matmul)]
    parts = [
        *_axes(x, y),
        _line([(x(i), y(rate)) for i, rate in roof], "#111", 2),
        _text(x(x.low) + 8, y(roof[0][1]) - 14, f"read {read * 1e3:.0f} GB/s"),
        _text(x(x.high) - 8, y(matmul) - 8, f"matmul {matmul:.0f} TFLOP/s", "end"),
    ]
    for point in shown:
        parts += _mark(x(point.intensity), y(point.rate), point)
    where = record["environment"]
    title = f"{where['device']}, jax {where['jax']}, commit {where['commit']}"
    parts.append(_text(WIDTH / 2, 28, title, "middle"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def _axes(x: Scale, y: Scale) -> list[str]:
    parts = []
    for tick in x.ticks:
        parts.append(_line([(x(tick), y.start), (x(tick), y.stop)], "#ddd", 1))
        parts.append(_text(x(tick), y.start + 18, f"{tick:g}", "middle"))
    for tick in y.ticks:
        parts.append(_line([(x.start, y(tick)), (x.stop, y(tick))], "#ddd", 1))
        parts.append(_text(x.start - 8, y(tick) + 4, f"{tick:g}", "end"))
    parts.append(_text(WIDTH / 2, HEIGHT - 22, "FLOP per byte of keys and values", "middle"))
    parts.append(_text(16, MARGIN - 16, "TFLOP/s"))
    return parts


def _mark(x: float, y: float, point: Point) -> list[str]:
    hint = f"{point.name}: {point.intensity:.3g} FLOP/byte, {point.rate:.4g} TFLOP/s"
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLORS[point.kind]}">'
    label = [_text(x + 7, y + 4, point.name)] if len(point.name) == 1 else []
    return [f"{dot}<title>{escape(hint)}</title></circle>", *label]


def _line(corners: Sequence[tuple[float, float]], color: str, width: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("python -m tools.device.picture RECORD.json ROOFLINE.svg", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    target.write_text(draw(json.loads(source.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
