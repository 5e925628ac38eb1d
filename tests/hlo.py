"""What a compiled program does with its large buffers, read from the text of its HLO.

Works on any target, ahead-of-time compiles too: `compiled` is what `lowered.compile()` returns.
"Large" means at least `num_elements` elements; choose the elements of one layer's pool, and a cache
large enough that nothing else comes near.
"""

import dataclasses
import functools
import math
import re

# Produce no array of their own: they name, group or pass on arrays that exist already.
NO_BUFFER = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "optimization-barrier", "after-all",
}  # fmt: skip
# Write a part of their first operand; buffer assignment gives the result that operand's memory.
IN_PLACE = {"dynamic-update-slice", "scatter"}

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    rest: str  # operands and attributes
    is_root: bool

    @property
    def sizes(self):
        """Elements of each array of the result."""
        return [
            math.prod(int(n) for n in dims.split(",") if n) for dims in _ARRAY.findall(self.shape)
        ]

    @property
    def operands(self):
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ", 1)[0])

    def attribute(self, name):
        """The computation that the attribute names, or None."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Program:
    header: str
    entry: str
    computations: dict[str, dict[str, Instruction]]

    @functools.cached_property
    def fused(self):
        """Computations inside fusions (and reductions): their arrays live in no buffer."""
        instructions = [i for body in self.computations.values() for i in body.values()]
        called = {i.attribute("calls") for i in instructions if i.opcode == "fusion"}
        return called | {i.attribute("to_apply") for i in instructions if i.opcode != "call"}


def parse(compiled):
    text = compiled.as_text()
    computations, entry, body = {}, "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            shape, rest = _split_shape(match[3])
            if opcode := re.match(r"([\w\-]+)\(", rest):
                body[match[2]] = Instruction(match[2], opcode[1], shape, rest, bool(match[1]))
    return Program(text.splitlines()[0], entry, computations)


def _split_shape(text):
    """A result's shape, a tuple of nested ones perhaps, and what follows."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def large_copies(compiled, num_elements):
    """The instructions that fill a large buffer other than by an update in place, as text."""
    program = parse(compiled)
    return [
        f"{i.name} = {i.shape} {i.rest[:120]}"
        for name, body in program.computations.items()
        if name not in program.fused
        for i in body.values()
        if any(size >= num_elements for size in i.sizes)
        and i.opcode not in NO_BUFFER
        and not _is_in_place(program, i, num_elements)
    ]


def _is_in_place(program, instruction, num_elements):
    if instruction.opcode == "custom-call":
        aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest)
        large = sum(size >= num_elements for size in instruction.sizes)
        return aliased is not None and aliased[1].count("(") >= large
    if instruction.opcode != "fusion":
        return instruction.opcode in IN_PLACE
    body = program.computations[instruction.attribute("calls")]
    (root,) = (i for i in body.values() if i.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return all(_written_in_place(body, i) for i in results if max(i.sizes) >= num_elements)


def _written_in_place(body, instruction):
    while instruction.opcode == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction.opcode in IN_PLACE


def large_parameters(compiled, num_elements):
    """Numbers of the program's large parameters, and of those that share memory with an output."""
    program = parse(compiled)
    large = {
        int(re.match(r"parameter\((\d+)\)", i.rest)[1])  # pyright: ignore[reportOptionalSubscript]
        for i in program.computations[program.entry].values()
        if i.opcode == "parameter" and max(i.sizes) >= num_elements
    }
    alias = re.search(r"input_output_alias=\{(.*?\)) \}", program.header)
    aliased = {int(n) for n in re.findall(r"\((\d+), ", alias[1])} if alias else set()
    return large, large & aliased


def assert_updated_in_place(compiled, num_elements, num_pools=2):
    """The program's large parameters are `num_pools` pools, each aliased to an output, and no
    buffer as large as one layer of them is filled."""
    large, aliased = large_parameters(compiled, num_elements)
    assert len(large) == num_pools, f"expected {num_pools} pools, got parameters {sorted(large)}"
    assert aliased == large, f"pools {sorted(large - aliased)} are not aliased to an output"
    copies = large_copies(compiled, num_elements)
    assert not copies, "copies of a pool:\n" + "\n".join(copies)


# What a GPU runs a kernel, or a copy, for; all else of an entry computation costs no launch.
NO_LAUNCH = NO_BUFFER | {"constant"}


def launches(compiled):
    """Names of what a program without loops launches on a GPU, in order."""
    program = parse(compiled)
    entry = program.computations[program.entry].values()
    return [i.name for i in entry if i.opcode not in NO_LAUNCH]


def launches_per_layer(compiled):
    """What a pass of a program's longest loop launches."""
    program = parse(compiled)
    instructions = [i for body in program.computations.values() for i in body.values()]
    loops = [program.computations[i.attribute("body")] for i in instructions if i.opcode == "while"]
    launches = ([i for i in body.values() if i.opcode not in NO_LAUNCH] for body in loops)
    return max(launches, key=len)


COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


def collectives(compiled):
    """(name, elements of its results on one device) of each place where devices meet, sorted.

    One that starts and is done later counts as what is done: the start has its operands as well.
    """
    bodies = parse(compiled).computations.values()
    each = [(i.opcode.removesuffix("-done"), sum(i.sizes)) for b in bodies for i in b.values()]
    return sorted(pair for pair in each if pair[0] in COLLECTIVES)
