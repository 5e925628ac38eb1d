"""What a record of an H100 has to show, judged from the record alone."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import cases

PASS, MISS, UNMEASURED = "pass", "MISS", "unmeasured"
NO_SLOWER = ("A", "8b_b64_4k_block64", "8b_b64_4k_block128", "B", "C", "D", "F", "G", "H", "I", "J")
MAX_ERROR = 3e-3  # of bfloat16


@dataclass(frozen=True)
class Gate:
    """One line: `value` must be at least, or at most, `limit`; None if it was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.value is None:
            return UNMEASURED
        is_good = self.value >= self.limit if self.at_least else self.value <= self.limit
        return PASS if is_good else MISS  # a NaN is a miss

    def row(self) -> dict[str, Any]:
        rule = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return {"gate": self.name, "value": self.value, "rule": rule, "verdict": self.verdict}


class _Record:
    """Figures of a record by name; None where something is missing."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.cases = {case["case"]: case for case in record.get("cases", [])}

    def us(self, name: str, *path: str) -> float | None:
        """Median of a case, or of something measured with it: ("peers", "xla")."""
        figures: Any = self.cases.get(cases.find(name).name, {})
        for key in path:
            figures = figures.get(key, {})
        return figures.get("median_us")

    def best_peer(self, name: str) -> float | None:
        peers = self.cases.get(cases.find(name).name, {}).get("peers", {})
        times = [peer["median_us"] for key, peer in peers.items() if _is_rival(key, peer)]
        return min(times, default=None)

    def field(self, name: str, key: str) -> float | None:
        return self.cases.get(cases.find(name).name, {}).get(key)


def _is_rival(name: str, peer: Mapping[str, Any]) -> bool:
    return name != "xla" and "median_us" in peer


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def judge(record: Mapping[str, Any]) -> list[Gate]:
    """All gates, in order."""
    r = _Record(record)
    return [gate for part in (_decode, _prefill, _others, _right) for gate in part(r)]


def _decode(r: _Record) -> Iterator[Gate]:
    for name in NO_SLOWER:
        ratio = _ratio(r.us(name, "peers", "cudnn_paged"), r.us(name))
        yield Gate(f"decode {name}: cuDNN paged / ours", ratio, 1.0)
    yield Gate(
        "decode E: no-arithmetic stream / ours", _ratio(r.us("E", "stream"), r.us("E")), 0.95
    )
    yield Gate("decode E: best peer / ours", _ratio(r.best_peer("E"), r.us("E")), 1.2)


def _prefill(r: _Record) -> Iterator[Gate]:
    for name in ("8b_prefill_4x4k", "8b_prefill_1x16k"):
        for suffix, limit in (("", 1.03), ("_block128", 1.04)):
            dense = r.us(name + suffix, "peers", "cudnn_dense")
            if dense is None:  # which knows no blocks
                dense = r.us(name, "peers", "cudnn_dense")
            ratio = _ratio(dense, r.us(name + suffix))
            yield Gate(f"{name}{suffix}: cuDNN dense / ours", ratio, limit)
    whole, chunk = (_per_us(r, name) for name in ("8b_prefill_4x4k", "8b_chunk_4x2k_at_8k"))
    yield Gate("chunked / full prefill, FLOP/s", _ratio(chunk, whole), 0.95)
    for head_dim in (64, 256):
        name = f"hd{head_dim}_prefill_4x4k"
        ratio = _ratio(r.us(name, "peers", "cudnn_dense"), r.us(name))
        yield Gate(f"prefill, head_dim {head_dim}: cuDNN dense / ours", ratio, 1.0)


def _per_us(r: _Record, name: str) -> float | None:
    return _ratio(r.field(name, "useful_flops"), r.us(name))


def _others(r: _Record) -> Iterator[Gate]:
    yield Gate(
        "append of 32768 tokens, share of the copy ceiling", r.field("append_32k", "share"), 0.92
    )
    yield Gate("append of 64 tokens, us", r.us("append_64"), 3.0, at_least=False)
    parts = [r.us(name) for name in ("8b_b60_4k", "8b_chunk_4x1k")]
    known = [part for part in parts if part is not None]
    together = sum(known) if len(known) == len(parts) else None
    ratio = _ratio(r.us("8b_mixed_60x4k_4x1k"), together)
    yield Gate("mixed batch / its parts, time", ratio, 1.05, at_least=False)
    schedules = [r.us(name, "schedule") for name in ("A", "E")]
    known = [us for us in schedules if us is not None]
    slowest = max(known) if len(known) == len(schedules) else None
    yield Gate("schedule, us (A and E)", slowest, 6.0, at_least=False)


def _right(r: _Record) -> Iterator[Gate]:
    measured = list(r.cases.values())
    errors = [c["error"] for c in measured if c["dtype"] == "bfloat16"]
    worst = _worst(errors) if errors else None
    yield Gate("largest relative error, bfloat16", worst, MAX_ERROR, at_least=False)
    count = lambda is_bad: float(sum(map(is_bad, measured))) if measured else None
    zero: Callable[[str, float | None], Gate] = lambda name, n: Gate(name, n, 0, at_least=False)
    yield zero("cases with a wrong result", count(lambda c: bool(c["problem"])))
    yield zero("cases whose bits differ from run to run", count(lambda c: not c["same_bits"]))
    fuzz = r.record.get("fuzz", [])
    wrong = float(sum(len(form["wrong"]) for form in fuzz)) if fuzz else None
    yield zero("random draws with a wrong result", wrong)
    tools = r.record.get("sanitizer", {})
    found = [t["errors"] for t in tools.values() if isinstance(t, dict) and "errors" in t]
    yield zero("errors of compute-sanitizer", float(sum(found)) if found else None)


def _worst(errors: list[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)
