"""The files that a compile leaves for each kernel, and what is read from them.

A bundle is one instruction word: the operations that start in one cycle.  The file
`packed-bundles-post-ra` is the scheduler's timeline, empty bundles included where a result is
waited for; `pre-delay_hlo-static-per-bundle-utilization` has a row of used slots for each of its
bundles; `post-delay-converter` lists what is allocated where.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUNDLES = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
MEMORY = "post-delay-converter"

_FILE = re.compile(rf"\d+-(.+?)-\d+-({BUNDLES}|{SLOTS}|{MEMORY})\.txt")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z][A-Z ]*)?:[\s>]*\{(.*)\}\s*$")
_RESULTS = re.compile(r"/\* (kDiv|kRem) \*/")  # the one comment that says what an operation does
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_ALLOCATION = re.compile(
    r"#allocation\w+ \[shape = '[^']*', space=vmem, size = (0x[0-9a-f]+|\d+)"
    r"(?:, offset = (0x[0-9a-f]+|\d+))?([^\]]*)\]"
)
_VECTOR_SPILL = re.compile(r"\bvst\b.*_spill\b")


@dataclass(frozen=True)
class Slots:
    """How many slots of each unit every bundle fills."""

    units: tuple[str, ...]
    capacity: tuple[int, ...]
    used: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Dump:
    """One compiled kernel; the operations of a bundle are texts without comments."""

    name: str
    bundles: tuple[tuple[str, ...], ...]
    slots: Slots
    vmem_bytes: int

    def spills(self, addresses: Iterable[int]) -> int:
        """Vector registers stored to spill slots in these bundles."""
        return sum(bool(_VECTOR_SPILL.search(op)) for at in addresses for op in self.bundles[at])

    def uses_matrix_unit(self, addresses: Iterable[int]) -> bool:
        return any("= vmatmul" in op for at in addresses for op in self.bundles[at])


def compiler_flags(folder: Path) -> str:
    """What libtpu is to be told so that it dumps these files and no others."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=^({BUNDLES}|{SLOTS}|{MEMORY})$"
    )


def read(folder: Path, names: Iterable[str]) -> dict[str, Dump]:
    """The kernels of these names; a ValueError says which one left no dump."""
    files: dict[tuple[str, str], str] = {}
    for path in sorted(folder.rglob("*.txt")):
        if match := _FILE.fullmatch(path.name):
            files[match[1], match[2]] = path.read_text(errors="replace")
    dumps = {}
    for name in names:
        missing = [kind for kind in (BUNDLES, SLOTS, MEMORY) if (name, kind) not in files]
        if missing:
            raise ValueError(f"the compiler left no {' and no '.join(missing)} of kernel {name!r}")
        bundles = parse_bundles(files[name, BUNDLES])
        slots = parse_slots(files[name, SLOTS])
        if len(slots.used) != len(bundles):
            raise ValueError(f"{name}: {len(slots.used)} rows of slots, {len(bundles)} bundles")
        dumps[name] = Dump(name, bundles, slots, vmem_bytes(files[name, MEMORY]))
    return dumps


def parse_bundles(text: str) -> tuple[tuple[str, ...], ...]:
    """The operations of every bundle, indexed by its address."""
    bundles = []
    for line in _COMMENT.sub(" ", _RESULTS.sub(r" \1", text)).splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        if int(match[1], 0) != len(bundles):
            raise ValueError(f"bundle {match[1]} stands where {len(bundles):#x} should")
        bundles.append(tuple(op.strip() for op in match[2].split(";;") if op.strip()))
    return tuple(bundles)


def parse_slots(text: str) -> Slots:
    lines = text.splitlines()
    units = tuple(name.strip() for name in lines[1].split(","))
    rows = tuple(tuple(map(int, line.split())) for line in lines[4:] if line.strip())
    return Slots(units, tuple(map(int, lines[2].split())), rows)


def vmem_bytes(text: str) -> int:
    """From the first buffer to the end of the last, spill slots included.

    What lies before the first is XLA's, and fixed addresses are the compiler's own.
    """
    starts, ends = [], []
    for size, offset, rest in _ALLOCATION.findall(text):
        if offset and "fixed_abs" not in rest:
            starts.append(int(offset, 0))
            ends.append(int(offset, 0) + int(size, 0))
    return max(ends) - min(starts) if ends else 0
