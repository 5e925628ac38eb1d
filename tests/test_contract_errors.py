"""Every error says what is wrong, and a row of a table reaches every `raise` of the package.

The rows are in `errors_*.py`: a call, and a piece of the text it must raise.  Which `raise` a row
reaches is read off the traceback, and so is which public functions it comes out of: their
docstrings name it.
"""

import ast
import importlib
import pathlib
import re
import types
from functools import cache
from typing import NamedTuple

import docstrings
import public_names
import pytest

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [p for folder in ("paged_kv", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
TABLES = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("errors_*.py"))
if public_names.MISSING:
    TABLES.remove("errors_integrations")
    SOURCES = [p for p in SOURCES if p.parent.name != "integrations"]
ROWS = [row for table in TABLES for row in importlib.import_module(table).ROWS]


class Raised(NamedTuple):
    """What a row has raised, and the frames that it came through."""

    error: type[BaseException] | None
    text: str
    frames: list[tuple[types.CodeType, int]]  # code and line

    def is_meant(self, row):
        return self.error is row.error and re.search(row.match, self.text) is not None


@cache
def raised(row):
    try:
        row.call()
    except Exception as error:
        frames, frame = [], error.__traceback__
        while frame is not None:
            frames.append((frame.tb_frame.f_code, frame.tb_lineno))
            frame = frame.tb_next
        return Raised(type(error), str(error), frames)
    return Raised(None, "", [])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_error_has_its_type_and_text(row):
    assert raised(row).error is row.error
    assert re.search(row.match, raised(row).text), raised(row).text


def lines_of_raises(source):
    """Line ranges of the `raise` statements of a file, re-raises left out."""
    return [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None
    ]


@pytest.fixture(scope="module")
def reached():
    """(file, line) of each frame that the exceptions of the rows passed through."""
    return {
        (pathlib.Path(code.co_filename).resolve(), line)
        for row in ROWS
        if raised(row).is_meant(row)
        for code, line in raised(row).frames
    }


@pytest.fixture(scope="module")
def errors_of():
    """Names of the errors that come out of each function, by its code."""
    errors = {}
    for row in ROWS:
        for code, _ in raised(row).frames:
            errors.setdefault(code, set()).add(row.error.__name__)
    return errors


def codes_of(code):
    """Code of a function, and of the functions it returns."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


@pytest.mark.parametrize("name", public_names.named())
def test_a_docstring_names_what_is_raised_and_no_more(name, errors_of):
    subject, code = public_names.named()[name]
    errors = [errors_of.get(each, set()) for each in codes_of(code)] if code else []
    assert not list(docstrings.raises(subject, set().union(*errors)))


@pytest.mark.parametrize(
    "source",
    [s for s in SOURCES if lines_of_raises(s)],
    ids=lambda source: str(source.relative_to(ROOT)),
)
def test_every_raise_is_reached_by_a_row(source, reached):
    missing = [
        f"{source.name}:{lines[0]}"
        for lines in lines_of_raises(source)
        if not any((source.resolve(), line) in reached for line in lines)
    ]
    assert not missing, "no row of errors_*.py reaches " + ", ".join(missing)


@pytest.mark.skipif(bool(public_names.MISSING), reason=f"needs {', '.join(public_names.MISSING)}")
def test_errors_of_the_integrations_are_among_them():
    assert "errors_integrations" in TABLES


def test_rows_have_names_of_their_own():
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)
