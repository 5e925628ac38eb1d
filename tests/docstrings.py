"""What a docstring of the API has to say, and what one leaves out.

Each rule takes a `Subject` and yields what is missing, as text.
"""

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

NAMED = ("Args", "Attributes", "Raises")  # sections of entries, `name, name: text`
HEADER = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r"((?:\*{0,2}\w+, )*\*{0,2}\w+): *(.*)")
# Arrays of this package and of others, which have no annotation to say so.
ARRAYS = ("pools", "key_pool", "value_pool", "block_table", "seq_lengths", "sinks", "alibi_slopes")
SHAPE = re.compile(r"\((?:[^()]*,[^()]*)?\)")  # (), (n,), (batch, T)
REFERENCE = re.compile(r"\bas (?:in )?`([\w.]+)`")
RESULT = re.compile(r"What `([\w.]+)` returns|shaped (?:and typed )?as the query", re.IGNORECASE)
# What is counted or measured; a number without any of these says nothing.
UNITS = re.compile(
    r"\b(?i:tokens?|blocks?|slots?|bytes|seconds|heads?|layers?|sequences?|rows?|columns?|"
    r"positions?|keys|values|ids?|factor|share)\b"
)


@dataclass(frozen=True)
class Subject:
    """Something that a docstring is about: a function, a method, a property or a class.

    Attributes:
      name: where a user finds it.
      text: the docstring.
      parameters: annotations of a call's parameters, or of a class's fields, by name.
      returns: annotation of what a call gives.
    """

    name: str
    text: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    returns: Any = None

    @cached_property
    def summary(self) -> str:
        return self.text.partition("\n")[0]

    @cached_property
    def source(self) -> str:
        """The paragraph that begins so."""
        found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", self.text, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    @cached_property
    def sections(self) -> dict[str, dict[str, str]]:
        """Entries of each section; those of `Returns` and `Yields` have no name."""
        sections: dict[str, dict[str, str]] = {}
        section, names = "", [""]
        for line in self.text.splitlines():
            if header := HEADER.match(line):
                section, names = header[1], [""]
                sections[section] = {}
            elif line and not line.startswith(" "):
                section = ""
            elif section and line:
                entry = ENTRY.match(line[2:]) if section in NAMED else None
                names, line = (entry[1].split(", "), entry[2]) if entry else (names, line)
                for name in names:
                    before = sections[section].get(name, "")
                    sections[section][name] = f"{before} {line.strip()}".strip()
        return sections

    @cached_property
    def entries(self) -> dict[str, str]:
        """What is said of parameters and fields."""
        entries = self.sections.get("Attributes", {}) | self.sections.get("Args", {})
        return {name.lstrip("*"): text for name, text in entries.items()}

    @cached_property
    def result(self) -> str:
        """What is said of the result, in a section or else by the summary."""
        said = self.sections.get("Returns") or self.sections.get("Yields") or {}
        return " ".join(said.values()) or self.summary


def of_call(name: str, function: Any) -> Subject:
    """A function or a method, without its `self`."""
    signature = inspect.signature(function)
    parameters = {
        parameter.name: parameter.annotation
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    }
    return Subject(name, inspect.getdoc(function) or "", parameters, signature.return_annotation)


def module_docstring(source: str) -> str:
    """That of a file, read off its first characters: no need to parse hundreds of files."""
    found = re.match(r'"""(.*?)"""', source, re.DOTALL)
    return found[1] if found else ""


Known = Mapping[str, Subject]  # all subjects, by each name that a docstring may call them


def summary(subject: Subject) -> Iterator[str]:
    """One line, and a sentence."""
    _, _, rest = subject.text.partition("\n")
    if not subject.summary.endswith(".") or rest.partition("\n")[0].strip():
        yield f"no summary of one line that ends with a full stop: {subject.summary!r}"


def parameters(subject: Subject) -> Iterator[str]:
    """An entry for each parameter, and none for what is no parameter."""
    for name in subject.parameters.keys() - subject.entries.keys():
        yield f"no entry for {name}"
    args = {name.lstrip("*") for name in subject.sections.get("Args", {})}
    for name in args - subject.parameters.keys():
        yield f"{name} is no parameter"


def shapes(subject: Subject, known: Known) -> Iterator[str]:
    """Of each array that is taken or returned, in its annotation or in words."""
    for name, annotation in subject.parameters.items():
        text = subject.entries.get(name, "")
        is_array = is_shapeless(annotation) or (annotation is Any and name in ARRAYS)
        if is_array and not SHAPE.search(text) and not refers(text, name, known):
            yield f"no shape of {name}"
    if is_open(subject.returns) and not SHAPE.search(subject.result):
        other = RESULT.search(subject.result)
        if other is None or (other[1] and other[1] not in known):
            yield "no shape of the result"


def units(subject: Subject, known: Known) -> Iterator[str]:
    """Of each number that is taken or returned."""
    for name, annotation in subject.parameters.items():
        text = subject.entries.get(name, "")
        if is_number(annotation) and not UNITS.search(text) and not refers(text, name, known):
            yield f"no unit of {name}"
    if is_number(subject.returns) and not UNITS.search(subject.result):
        yield "no unit of the result"


def results(subject: Subject) -> Iterator[str]:
    """A section of its own where there are several, or where the annotation says little."""
    is_due = subject.returns is Any or typing.get_origin(subject.returns) is tuple
    if is_due and "Returns" not in subject.sections:
        yield "no Returns"


def raises(subject: Subject, errors: set[str]) -> Iterator[str]:
    """Each error with its condition, and none that is never raised."""
    said = subject.sections.get("Raises", {})
    for error in errors - said.keys():
        yield f"raises {error} and does not say so"
    for error in said.keys() - errors:
        yield f"says that it raises {error}, and no row of errors_*.py does"


def conditions(subject: Subject) -> Iterator[str]:
    """Why each error is raised: not its name alone."""
    for error, text in subject.sections.get("Raises", {}).items():
        if len(text.split()) < 2:
            yield f"no condition of {error or 'what is raised'}"


def source(subject: Subject, owed: tuple[str, ...]) -> Iterator[str]:
    """Who had the idea; nobody else if nothing is owed."""
    missing = [word for word in owed if word not in subject.source]
    if missing:
        yield f"Source does not name {', '.join(missing)}"
    if subject.source and not owed:
        yield "names a source that the table of sources does not"


def refers(text: str, parameter: str, known: Known) -> bool:
    """Whether the entry of another subject, which has the same parameter, says it."""
    others = (known.get(name) for name in REFERENCE.findall(text))
    return any(other is not None and parameter in other.parameters for other in others)


def is_shapeless(annotation: Any) -> bool:
    """Whether it is an array, and its annotation names no axes."""
    for part in parts(annotation):
        if part in (np.ndarray, jax.Array) or getattr(part, "dim_str", None) == "...":
            return True
    return False


def is_open(annotation: Any) -> bool:
    """Whether a result may be an array of any shape."""
    return any(part is Any for part in parts(annotation)) or is_shapeless(annotation)


def is_number(annotation: Any) -> bool:
    return any(part in (int, float) for part in parts(annotation))


def parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    inner = typing.get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from parts(part)
