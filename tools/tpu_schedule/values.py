"""What a scalar register can hold: an integer, an address, or something nobody worked out."""

from dataclasses import dataclass
from typing import Any


class UnknownValueError(ValueError):
    """The kernel's way depends on a value that lengths and tables do not give."""


class Unknown:
    """A value nobody worked out: arithmetic keeps it, a decision that depends on it raises."""

    def __init__(self, source: str):
        self.source = source

    def _same(self, *_: Any) -> "Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __bool__(self) -> bool:
        raise UnknownValueError(f"the way through the schedule depends on {self.source}")


NUMBER_OF_ADDRESS = Unknown("the number of an address")


@dataclass(frozen=True, slots=True)
class Address:
    """A place: in an operand of the kernel, by its index, or in an allocation, by its name."""

    base: int | str
    offset: int = 0

    def __add__(self, other: Any) -> Any:
        return Address(self.base, self.offset + other) if isinstance(other, int) else other

    __radd__ = __add__

    def __lshift__(self, bits: int) -> "Address":
        return Address(self.base, self.offset << bits)

    def _no_number(self, *_: Any) -> Unknown:
        return NUMBER_OF_ADDRESS

    __sub__ = __rsub__ = __mul__ = __rmul__ = __rshift__ = _no_number
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _no_number
    __lt__ = __le__ = __gt__ = __ge__ = _no_number


def signed(value: Any) -> Any:
    """The low 32 bits as a signed integer."""
    if isinstance(value, int):
        return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000
    return value


def equal(a: Any, b: Any) -> Any:
    return a == b if isinstance(a, int) and isinstance(b, int) else _unknown(a, b)


def both(a: Any, b: Any) -> Any:
    """`a and b`, known as soon as one is false."""
    if a is False or b is False:
        return False
    return b if a is True else a


def invert(a: Any) -> Any:
    return not a if isinstance(a, bool) else a


def select(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return a if condition else b
    return condition


def smaller(a: Any, b: Any, mask: int = -1) -> Any:
    """Of two integers, unsigned ones if `mask` cuts off the sign."""
    return select((a & mask) <= (b & mask), a, b)


def larger(a: Any, b: Any, mask: int = -1) -> Any:
    return select((a & mask) >= (b & mask), a, b)


def divide(a: Any, b: Any, results: str) -> list[Any]:
    """What a division leaves to be popped: quotient, remainder, or one after the other."""
    if isinstance(a, int) and isinstance(b, int) and b:
        quotient, remainder = map(signed, divmod(a & 0xFFFFFFFF, b & 0xFFFFFFFF))
    else:
        quotient = remainder = Unknown("a division by 0") if b == 0 else _unknown(a, b)
    return {"kDiv": [quotient], "kRem": [remainder]}.get(results, [quotient, remainder])


def _unknown(a: Any, b: Any) -> Unknown:
    return next((x for x in (a, b) if isinstance(x, Unknown)), NUMBER_OF_ADDRESS)
