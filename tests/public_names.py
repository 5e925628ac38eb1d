"""Every public name of the package, as subjects of docstrings."""

import dataclasses
import importlib
import importlib.util
import inspect
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import docstrings
from docstrings import Subject

import paged_kv
from paged_kv import interop

INTEGRATIONS = {"nnx": "flax", "linen": "flax", "equinox": "equinox"}
MISSING = sorted({name for name in INTEGRATIONS.values() if importlib.util.find_spec(name) is None})
FLAX_FIELDS = ("parent", "name")  # of every nn.Module
OPERATORS = ("__call__", "__contains__")  # methods that a user calls by no name


class Named(NamedTuple):
    """What a name stands for, and the code that raises its errors."""

    subject: Subject
    code: types.CodeType | None


@cache
def named() -> dict[str, Named]:
    """All that a docstring is due for, by the name that a user writes after `paged_kv.`."""
    found: dict[str, Named] = {}
    waiting = [(name, value) for name, value in objects().items() if callable(value)]
    seen = {value for _, value in waiting}
    while waiting:
        name, value = waiting.pop(0)
        new = (
            dict(of_class(name, value)) if inspect.isclass(value) else {name: of_call(name, value)}
        )
        found |= new
        for cls in (cls for each in new.values() for cls in returned_classes(each.subject)):
            if cls not in seen:
                seen.add(cls)
                waiting.append((cls.__name__, cls))
    return found


def known() -> dict[str, Subject]:
    """Subjects by every name that a docstring may call them, such as `match_prefix`."""
    subjects = {name: each.subject for name, each in named().items()}
    return {name.rpartition(".")[2]: subject for name, subject in subjects.items()} | subjects


def objects() -> dict[str, Any]:
    """Classes, functions and constants of the modules that users import."""
    found: dict[str, Any] = {}
    for prefix, module in {"": paged_kv, "interop.": interop}.items():
        found |= {prefix + name: value for name, value in vars(module).items()}
    for prefix, framework in INTEGRATIONS.items():
        if framework not in MISSING:
            module = importlib.import_module(f"paged_kv.integrations.{prefix}")
            own = lambda value, name=module.__name__: getattr(value, "__module__", "") == name
            found |= {f"{prefix}.{name}": value for name, value in inspect.getmembers(module, own)}
    is_public = lambda name, value: (
        name.rpartition(".")[2][0] != "_" and not inspect.ismodule(value)
    )
    return {name: value for name, value in found.items() if is_public(name, value)}


def of_call(name: str, function: Any) -> Named:
    return Named(docstrings.of_call(name, function), inspect.unwrap(function).__code__)


def of_class(name: str, cls: type) -> Iterator[tuple[str, Named]]:
    """A class with its methods and properties, those of its bases in this package included."""
    text = inspect.getdoc(cls) or ""
    if inspect.isfunction(vars(cls).get("__init__")) and not dataclasses.is_dataclass(cls):
        made = of_call(name, cls.__init__)
        yield name, Named(Subject(name, text, made.subject.parameters), made.code)
    else:
        yield name, Named(Subject(name, text, fields(cls)), None)
    for attribute in inspect.classify_class_attrs(cls):
        member, value = attribute.name, attribute.object
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        is_public = not member.startswith("_") or member in OPERATORS
        is_ours = (getattr(function, "__module__", "") or "").startswith("paged_kv")
        if is_public and is_ours and callable(function):
            call = of_call(f"{name}.{member}", function)
            text = inspect.getdoc(getattr(cls, member)) or ""  # or that of a base
            yield (
                call.subject.name,
                call._replace(subject=dataclasses.replace(call.subject, text=text)),
            )


def fields(cls: type) -> dict[str, Any]:
    """Annotations of a class's fields, but for those that a framework adds."""
    if hasattr(cls, "_fields"):
        return {name: cls.__annotations__[name] for name in cls._fields}
    if not dataclasses.is_dataclass(cls):
        return {}
    every = {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: kind for name, kind in every.items() if name not in FLAX_FIELDS}


def returned_classes(subject: Subject) -> Iterator[type]:
    """Classes of the package that a user meets as a result."""
    for part in docstrings.parts(subject.returns):
        if inspect.isclass(part) and part.__module__.startswith("paged_kv"):
            yield part
