"""Instructions of the scalar unit, as Python source.

The compiler writes registers as `%s12_s3`: value 12, in register 3.  A value is defined once, so
`V[12]` holds it; where paths join, `sphi` takes what the register holds, `R["s3"]`.  What the
vector units make is unknown.
"""

import re
from typing import NamedTuple

from .values import signed

_U = "({{{}}} & 0xFFFFFFFF)".format
_EXPRESSIONS = {
    "sadd.s32": "signed({0} + {1})",
    "ssub.s32": "signed({0} - {1})",
    "smul.u32": "signed({0} * {1})",
    "smul.s32": "signed({0} * {1})",
    "smulhi.u32": f"signed(({_U(0)} * {_U(1)}) >> 32)",
    "sshll.u32": "signed({0} << {1})",
    "sshra.s32": "({0} >> {1})",
    "sshrl.u32": f"signed({_U(0)} >> {{1}})",
    "sand.u32": "({0} & {1})",
    "sor.u32": "({0} | {1})",
    "sxor.u32": "({0} ^ {1})",
    "smin.s32": "smaller({0}, {1})",
    "smin.u32": "smaller({0}, {1}, 0xFFFFFFFF)",
    "smax.s32": "larger({0}, {1})",
    "smax.u32": "larger({0}, {1}, 0xFFFFFFFF)",
    "spop.drf": "{0}.pop(0)",
    "smov": "{0}",
    "pmov": "{0}",
    "pneg": "invert({0})",
    "pand": "both({0}, {1})",
    "pnand": "invert(both({0}, {1}))",
    "por": "invert(both(invert({0}), invert({1})))",
    "scalar_select": "select({0}, {1}, {2})",
}
_RELATIONS = {
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "eq": "equal({0}, {1})",
    "ne": "invert(equal({0}, {1}))",
}

_OP = re.compile(r"(?:%([a-z]*)(\d+)(?:_(\w+))? = )?([a-z][\w.]*(?:<[^>]*>)?)\s*(.*)")
_ATTRIBUTE = re.compile(r"\[(?:thread|resolvable):[^\]]*\]")
_GUARD = re.compile(r"\((!?)%p(\d+)_p\d+(?:, (%\w+))?\),?")
_VALUE = re.compile(r"%[sp]?(\d+)(?:_\w+)?")
_NUMBER = re.compile(r"\$?(0x[0-9a-f]+|-?\d+)")
_OPERAND = re.compile(r"\[shape: .*?index: (\d+), kind: \w+")
_TARGET = re.compile(r"target bundleno = (\d+)")


class Branch(NamedTuple):
    """The bundle a branch goes to, and the condition for it as Python source."""

    target: int
    condition: str


def branch(op: str) -> Branch | None:
    """The branch that an operation is, if it is one."""
    if "= sbr" not in op:
        return None
    guard, target = _GUARD.search(op), _TARGET.search(op)
    if not target:
        raise ValueError(f"a branch to nowhere: {op}")
    return Branch(int(target[1]), _condition(guard) if guard else "True")


def joined(op: str) -> list[int]:
    """The values that an operation chooses from where paths join."""
    if " = sphi " not in op and " = pphi " not in op:
        return []
    result, *inputs = re.findall(r"%[sp](\d+)_(\w+)", op)
    if {register for _, register in inputs} != {result[1]}:
        raise ValueError(f"paths join in different registers: {op}")
    return [int(number) for number, _ in inputs]


def translate(op: str, chosen_from: set[int]) -> list[str]:
    """Statements that do what the operation does to scalars; none for a vector operation.

    chosen_from: values that some `sphi` may take.
    """
    match = _OP.fullmatch(op)
    if not match:
        raise ValueError(f"not an operation: {op}")
    kind, number, register, name, rest = match.groups()
    rest = _ATTRIBUTE.sub("", rest).strip()
    guard = _GUARD.search(rest)
    if guard:
        rest = (rest[: guard.start()] + rest[guard.end() :]).strip()
    if name.startswith("dma.") and "_to_" in name:
        space = name.split("_to_")[1]
        source, size, target, _, *strides = _arguments(rest)
        lines = [f"copy({space!r}, {source}, {size}, {target}, is_strided={bool(strides)})"]
    elif name == "sst":
        place, value = rest.removeprefix("[smem:").rsplit("] ", 1)
        lines = [f"store({_argument(place)}, {_argument(value)})"]
    elif kind in ("s", "p") or name == "sdivrem.u32":
        value = _value(name, rest, register)
        if guard and guard[3]:  # else the register keeps the value it has
            value = f"select({_condition(guard)}, {value}, {_argument(guard[3])})"
            guard = None
        lines = [f"V[{number}] = {value}"]
        if int(number) in chosen_from:
            lines.append(f"R[{register!r}] = V[{number}]")
    else:
        return []
    if guard:
        return [f"if {_condition(guard)}:", *(f"    {line}" for line in lines)]
    return lines


def _value(name: str, rest: str, register: str) -> str:
    """The result of an operation as Python source."""
    if name in ("sphi", "pphi"):
        return f"R[{register!r}]"
    if name == "sld":
        return f"load({_argument(rest.removeprefix('[smem:').removesuffix(']'))})"
    if name.startswith("inlined_call_operand."):
        operand = _OPERAND.match(rest)
        if operand:
            return f"operand({operand[1]}, is_number={'<' in name})"
    arguments = _arguments(rest)
    if name.startswith("scalar_lea."):
        return f"({' + '.join(arguments)})"
    if name.startswith("int_to_ptr."):
        return arguments[0]
    if name == "sdivrem.u32":
        results = rest.rpartition(" ")[2]
        return f"divide({arguments[0]}, {arguments[1]}, {results!r})"
    if name.startswith("scmp.") and name.split(".")[2] in ("s32", "u32"):
        _, relation, dtype, *_ = name.split(".")
        if dtype == "u32":
            arguments = [f"({argument} & 0xFFFFFFFF)" for argument in arguments]
        return _RELATIONS[relation].format(*arguments)
    if name in _EXPRESSIONS:
        return _EXPRESSIONS[name].format(*arguments)
    return f"unknown({f'{name} {rest}'!r})"


def _condition(guard: re.Match[str]) -> str:
    return f"invert(V[{guard[2]}])" if guard[1] else f"V[{guard[2]}]"


def _arguments(text: str) -> list[str]:
    return [_argument(part) for part in text.split(",")]


def _argument(text: str) -> str:
    """A value, a literal or an address, `[#allocation2 + $0x3 + %s4_s5]`, as Python source."""
    text = text.strip()
    if not text.startswith("["):
        return _term(text)
    return f"({' + '.join(_term(part) for part in text.strip('[]').split(' + '))})"


def _term(text: str) -> str:
    if value := _VALUE.match(text):
        return f"V[{value[1]}]"
    if text.startswith("#allocation"):
        return f"Address({text.removeprefix('#allocation')!r})"
    if number := _NUMBER.match(text):
        return str(signed(int(number[1], 0)))
    return f"unknown({text!r})"
