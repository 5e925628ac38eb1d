"""A call whose function is traced when a program is lowered for its platform, and not before.

A branch of `lax.platform_dependent` is traced for every platform, also for those the program will
never run on.  Wrapped in `on_platform`, kernels of other platforms cost nothing and cannot fail.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import mlir


def on_platform(platform: str, function: Callable, results: Callable) -> Callable:
    """`function`, traced late; `results(*args)` are arrays like the ones it returns."""

    def late(*args: Any) -> tuple[Array, ...]:
        leaves, structure = jax.tree.flatten(args)
        avals = tuple(jax.typeof(x) for x in results(*args))
        call = _primitive(platform)
        return tuple(call.bind(*leaves, function=function, structure=structure, results=avals))

    return late


@cache
def _primitive(platform: str) -> Any:
    """The primitive of calls that run on one platform."""
    from jax.extend.core import Primitive  # brings Pallas along, so not before it is needed

    primitive = Primitive(f"paged_kv_on_{platform}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *leaves, results, **_: results)
    mlir.register_lowering(primitive, mlir.lower_fun(_call), platform=platform)
    # a program for several platforms holds the branch for each, and runs it on this one only
    mlir.register_lowering(primitive, mlir.lower_fun(_never))
    return primitive


def _call(*leaves: Array, function: Callable, structure: Any, results: Any) -> tuple[Array, ...]:
    return tuple(function(*jax.tree.unflatten(structure, leaves)))


def _never(*leaves: Array, results: Any, **_: Any) -> tuple[Array, ...]:
    return tuple(jnp.zeros(aval.shape, aval.dtype) for aval in results)
