"""Every error says what is wrong, and a row of a table reaches every `raise` of the package.

The rows are in `errors_*.py`: a call, and a piece of the text it must raise.  Which `raise` a row
reaches is read off the traceback.
"""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [p for folder in ("paged_kv", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
TABLES = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("errors_*.py"))
ROWS = [row for table in TABLES for row in importlib.import_module(table).ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_error_has_its_type_and_text(row):
    with pytest.raises(row.error, match=row.match) as raised:
        row.call()
    assert type(raised.value) is row.error


def lines_of_raises(source):
    """Line ranges of the `raise` statements of a file, re-raises left out."""
    return [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None
    ]


def lines_reached(row):
    """(file, line) of each frame that the row's exception passed through."""
    try:
        row.call()
    except Exception as error:
        if not isinstance(error, row.error) or not re.search(row.match, str(error)):
            return
        frame = error.__traceback__
        while frame is not None:
            yield pathlib.Path(frame.tb_frame.f_code.co_filename).resolve(), frame.tb_lineno
            frame = frame.tb_next


@pytest.fixture(scope="module")
def reached():
    return {place for row in ROWS for place in lines_reached(row)}


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


def test_rows_have_names_of_their_own():
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)
