"""What the commands that run a language model share: arguments within bounds, notes on stderr."""

import argparse
import sys
from collections.abc import Callable

import jax

DTYPES = ("float32", "bfloat16", "float16")


def number_type(kind: type, least: float, most: float = float("inf")) -> Callable[[str], float]:
    """An argument's type: a number of a kind, within bounds."""

    def parse(text):
        number = kind(text)
        if not least <= number <= most or number == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be at least {least} and at most {most}")
        return number

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def dtype_or_default(dtype: str | None) -> str:
    """Of weights and cache: what was asked for, or what suits the platform."""
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def note(line: str) -> None:
    """Says something that is no part of the result."""
    print(line, file=sys.stderr, flush=True)
