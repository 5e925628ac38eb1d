"""What each kernel of a program is given, evaluated without running a kernel.

A program's numbers (lengths, tables, starts) are worked out operation by operation on the CPU; its
tensors have shapes only, and so has whatever is computed from them.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend import core

_LOOPS = ("scan", "while")


@dataclass(frozen=True)
class Tensor:
    """An array whose numbers nobody looks at; `sources` are the arguments it comes from."""

    shape: tuple[int, ...]
    dtype: Any
    sources: frozenset[str]


@dataclass(frozen=True)
class KernelCall:
    """One kernel of the program and its operands, in order.

    aliases: (operand, output) pairs that are one place in memory.
    """

    name: str
    operands: tuple[Any, ...]
    aliases: tuple[tuple[int, int], ...] = ()

    def pools(self, names: frozenset[str], size: int) -> frozenset[int]:
        """The operands that are one of these arguments, whole and in whatever shape.

        Outputs count on from the operands; one that a pool is updated into is a pool too.
        """
        found = {
            index
            for index, operand in enumerate(self.operands)
            if isinstance(operand, Tensor)
            and prod(operand.shape) == size
            and operand.sources & names
        }
        return frozenset(
            found | {len(self.operands) + out for at, out in self.aliases if at in found}
        )


def kernel_calls(program: Any, arguments: list[Any]) -> list[KernelCall]:
    """The kernels that the program calls, in order.

    program: as `jax.make_jaxpr` returns it; arguments: arrays or `Tensor`s.
    """
    calls: list[KernelCall] = []
    _evaluate(program, arguments, calls)
    return calls


def _evaluate(program: Any, arguments: Any, calls: list[KernelCall]) -> list[Any]:
    """program: a Jaxpr, or one closed over its constants (from jax 0.12 on they are one type)."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", [])
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = _apply(equation, [read(atom) for atom in equation.invars], calls)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, inputs: list[Any], calls: list[KernelCall]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "pallas_call":
        calls.append(KernelCall(params["name"], tuple(inputs), params["input_output_aliases"]))
        aliases = {out: inputs[at] for at, out in params["input_output_aliases"]}
        outputs = _tensors(equation, [])
        return [
            Tensor(tensor.shape, tensor.dtype, _sources([aliases.get(at)]))
            for at, tensor in enumerate(outputs)
        ]
    if name == "cond" and not isinstance(inputs[0], Tensor):
        branches = params["branches"]
        branch = branches[int(np.clip(inputs[0], 0, len(branches) - 1))]
        return _evaluate(branch, inputs[1:], calls)
    inner = _called(equation)
    if inner is not None and name not in _LOOPS:
        return _evaluate(inner, inputs, calls)
    if any(isinstance(x, Tensor) for x in inputs):
        if "pallas_call" in str(params):
            raise ValueError(f"which kernels run inside `{name}` is not known without the data")
        return _tensors(equation, inputs)
    results = equation.primitive.bind(*inputs, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _called(equation: core.JaxprEqn) -> Any | None:
    """The program that an operation such as `jit` or `custom_vjp_call` stands for."""
    found = [
        value
        for value in equation.params.values()
        if isinstance(value, core.Jaxpr) or hasattr(value, "jaxpr")
    ]
    return found[0] if len(found) == 1 else None


def _tensors(equation: core.JaxprEqn, inputs: list[Any]) -> list[Tensor]:
    sources = _sources(inputs)
    avals: list[Any] = [variable.aval for variable in equation.outvars]
    return [Tensor(aval.shape, aval.dtype, sources) for aval in avals]


def _sources(values: list[Any]) -> frozenset[str]:
    return frozenset().union(*(x.sources for x in values if isinstance(x, Tensor)))


def in_memory(value: Any, layout: str) -> np.ndarray | None:
    """int32 words of an operand as they lie in memory; None for a tensor.

    layout: as the compiler writes it, `{1,0:T(8,128)}`: the axes from minor to major, and tiles.
    """
    if isinstance(value, Tensor):
        return None
    array = np.asarray(jax.device_get(value))
    if array.dtype.itemsize != 4:
        return None
    array = array.view(np.int32)
    axes = re.match(r"\{([\d,]*)", layout)
    minor_to_major = [int(n) for n in axes[1].split(",") if n] if axes else []
    if minor_to_major:
        array = array.transpose(minor_to_major[::-1])
    tile = re.search(r"T\((\d+),(\d+)\)", layout)
    if tile is None or array.ndim < 2:
        return array.reshape(-1)
    rows, columns = int(tile[1]), int(tile[2])
    *outer, height, width = array.shape
    padding = [(0, 0)] * len(outer) + [(0, -height % rows), (0, -width % columns)]
    array = np.pad(array, padding)
    height, width = array.shape[-2:]
    array = array.reshape(*outer, height // rows, rows, width // columns, columns)
    return array.swapaxes(-3, -2).reshape(-1)
