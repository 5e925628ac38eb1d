"""A kernel's way through its bundles, for the numbers it is given.

Only the scalar unit is carried out.  Copies are done at once, and only those into scalar memory
move anything; of the others it is counted what they bring from which operand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import scalar, values
from .chips import Chip
from .values import Address, Unknown, UnknownValueError

# A kernel that runs longer is left before its end: enough of its loops has been seen.
MAX_CYCLES = 40_000_000
MAX_COPIES = 400_000
CORE_INDEX = "0"  # the allocation that says which core of a chip this is: the first works alone
_HELPERS = ("signed", "equal", "both", "invert", "select", "smaller", "larger", "divide", "Address")


@dataclass(frozen=True)
class Block:
    """Bundles [start, stop) that run one after the other; `target` is where a branch goes."""

    start: int
    stop: int
    target: int | None
    run: Callable[[], Any] = field(compare=False)

    @property
    def cycles(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Copy:
    """A copy into vector memory from an operand that counts; offset and size in granules."""

    operand: int
    offset: int
    size: int


@dataclass(frozen=True)
class Visit:
    """One passage of a block, and the copies it started."""

    block: Block
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Trace:
    """The way of one kernel; `is_whole` says whether it came to its end."""

    visits: tuple[Visit, ...]
    is_whole: bool

    @property
    def cycles(self) -> int:
        return sum(visit.block.cycles for visit in self.visits)


class Machine:
    """A kernel and the arrays it is given.

    bundles: the operations of every bundle, as texts.
    operands: by index, int32 arrays as they lie in memory; None where the numbers do not matter.
    counted: operands whose copies into vector memory are counted.
    """

    def __init__(
        self,
        chip: Chip,
        bundles: tuple[tuple[str, ...], ...],
        operands: list[np.ndarray | None],
        counted: frozenset[int] = frozenset(),
    ):
        self.chip, self.bundles, self.operands, self.counted = chip, bundles, operands, counted
        self._branches = {
            at: branch
            for at, operations in enumerate(bundles)
            for operation in operations
            if (branch := scalar.branch(operation)) is not None
        }
        behind = {at + chip.branch_delay + 1 for at in self._branches}
        self._starts = {*behind, *(branch.target for branch in self._branches.values())}
        self._chosen_from = {n for ops in bundles for op in ops for n in scalar.joined(op)}
        self._blocks: dict[int, Block] = {}
        self._memory: dict[int | str, dict[int, Any]] = {CORE_INDEX: {0: 0}}  # words
        self._copies: list[Copy] = []
        self._names = {name: getattr(values, name) for name in _HELPERS} | {
            "V": _Registers(),
            "R": _Registers(),
            "unknown": lambda text: Unknown(f"`{text}`"),
            "load": self._load,
            "store": self._store,
            "copy": self._copy,
            "operand": self._operand,
        }

    def run(self, max_cycles: int = MAX_CYCLES) -> Trace:
        """From the first bundle past the last one, or for about `max_cycles`."""
        at, cycles, copies, visits = 0, 0, 0, []
        while at < len(self.bundles) and cycles < max_cycles and copies < MAX_COPIES:
            block = self._blocks.get(at) or self._translated(at)
            is_taken = block.run()
            visits.append(Visit(block, tuple(self._copies)))
            copies += len(self._copies)
            self._copies.clear()
            cycles += block.cycles
            at = block.target if block.target is not None and is_taken else block.stop
        return Trace(tuple(visits), at >= len(self.bundles))

    def _translated(self, start: int) -> Block:
        """The block that begins at a bundle, its scalar operations as one Python function."""
        lines, result, target = ["def run():"], "None", None
        stop, end = start, len(self.bundles)
        while stop < end and (stop == start or stop not in self._starts):
            if (branch := self._branches.get(stop)) is not None:
                target, end = branch.target, min(stop + self.chip.branch_delay + 1, end)
                lines.append(f"    is_taken = bool({branch.condition})")
                result = "is_taken"
            # all of a bundle read what was there before it, but `sphi` is a name, no operation
            for operation in sorted(self.bundles[stop], key=lambda op: not scalar.joined(op)):
                lines += (f"    {line}" for line in scalar.translate(operation, self._chosen_from))
            stop += 1
        if target is not None and stop != end:
            raise ValueError(f"bundle {stop:#x} is the target of a branch and behind another")
        namespace = dict(self._names)
        exec("\n".join([*lines, f"    return {result}"]), namespace)
        self._blocks[start] = Block(start, stop, target, namespace["run"])
        return self._blocks[start]

    def _load(self, place: Any) -> Any:
        if not isinstance(place, Address):
            return Unknown(f"a word at an unknown place, {place}")
        word = self._memory.get(place.base, {}).get(place.offset)
        return Unknown(f"a word that nothing wrote, {place}") if word is None else word

    def _store(self, place: Any, *words: Any) -> None:
        if not isinstance(place, Address):
            raise UnknownValueError(f"words are stored at an unknown place, {place}")
        memory = self._memory.setdefault(place.base, {})
        memory.update(enumerate(words, place.offset))

    def _operand(self, index: int, is_number: bool) -> Any:
        if not is_number:
            return Address(index)
        array = self.operands[index] if index < len(self.operands) else None
        return Unknown(f"operand {index}") if array is None else int(array[0])

    def _copy(self, space: str, source: Any, size: Any, target: Any, is_strided: bool) -> None:
        """`size` granules from `source` into a space."""
        base = source.base if isinstance(source, Address) else None
        if space == "vmem" and isinstance(base, int) and base in self.counted:
            self._copies.append(Copy(base, source.offset, _known(size)))
        elif space == "smem":
            scale = self.chip.granule // 4
            words = self._words(source, _known(size) * scale, scale)
            if is_strided:
                words = [Unknown("a copy with strides")] * len(words)
            self._store(target, *words)

    def _words(self, source: Any, count: int, scale: int) -> list[Any]:
        base = source.base if isinstance(source, Address) else None
        array = None
        if isinstance(base, int) and base < len(self.operands):
            array = self.operands[base]
        if array is None:
            return [Unknown(f"a copy from {source}")] * count
        words = array[source.offset * scale :][:count].tolist()
        return words + [Unknown(f"what is behind operand {base}")] * (count - len(words))


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise UnknownValueError(f"the size of a copy is unknown, {size}")
    return size


class _Registers(dict):
    """Values of registers; one that nothing defined is unknown."""

    def __missing__(self, key: Any) -> Unknown:
        return Unknown(f"value {key}, which nothing on the way there defines")
