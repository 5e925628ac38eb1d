"""Which cases a device check runs, the ones that gates ask for first, and the time it has."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks import cases
from benchmarks.workload import APPEND, FUSED, Case

LETTERS = "ABCDEFGHIJ"
GATED = (
    *LETTERS,
    "8b_prefill_4x4k",
    "8b_prefill_1x16k",
    "append_32k",
    "append_64",
    "8b_mixed_60x4k_4x1k",
    "8b_b60_4k",
    "8b_chunk_4x1k",
    "8b_chunk_4x2k_at_8k",
    "8b_prefill_4x4k_block128",
    "8b_prefill_1x16k_block128",
    "8b_b64_4k_block64",
    "8b_b64_4k_block128",
    "hd64_prefill_4x4k",
    "hd256_prefill_4x4k",
)
QUICK = ("A", "D", "E", "F", "I", "8b_prefill_4x4k", "append_32k", "append_64")
TINY = ("ci_hd128", "ci_append", "ci_prefill")  # to walk through a check with no GPU

_LARGE = Case(
    name="large_decode",
    about="decode, up to 48 x 4096 tokens",
    seq_lengths=(4096,) * 48,
    num_query_heads=32,
    num_kv_heads=8,
)
_CHUNKS = {"seq_lengths": (2048,) * 8, "query_lengths": (1, 0, 700, 64, 300, 1, 1, 500)}
LARGE = [
    _LARGE,
    replace(_LARGE, name="large_mqa", num_query_heads=8, num_kv_heads=1),
    replace(_LARGE, name="large_fused", op=FUSED),
    replace(_LARGE, name="large_packed", **_CHUNKS),
    replace(_LARGE, name="large_append", op=APPEND, **_CHUNKS),
]


def gated(quick: bool) -> list[Case]:
    """The cases that a gate asks for."""
    return named(QUICK if quick else GATED)


def named(names: Iterable[str]) -> list[Case]:
    return [cases.find(name) for name in names]


def others() -> list[Case]:
    """Every other case that is worth timing."""
    asked = {case.name for case in gated(quick=False)}
    is_timed = lambda case: not {"ci", "compile_only"} & set(case.tags)
    return [case for case in cases.CASES.values() if is_timed(case) and case.name not in asked]


def fuzzed(quick: bool) -> list[Case]:
    """Forms whose lengths are drawn anew for every seed: the tests' edges, and larger ones."""
    small = [
        replace(case, dtype="bfloat16") if case.dtype == "float32" else case
        for case in cases.tagged("ci")
    ]
    return small if quick else small + LARGE


@dataclass
class Budget:
    """Seconds that a run has; `clock` counts them."""

    seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def used(self) -> float:
        return self.clock() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.used
