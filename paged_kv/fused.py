"""Append and attention at once: one kernel where a backend has it, otherwise one after the other.

The gradient is that of one after the other, whatever runs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import dispatch, lazy
from .dispatch import BACKENDS, Choice, Operands, Targets
from .kernels.core.arrays import NewTokens
from .kernels.core.problem import AppendProblem, Problem

FUSING = ("mosaic_tpu", "mosaic_gpu")  # backends that have such a kernel


def append_and_attend(
    problems: tuple[AppendProblem, Problem],
    choice: Choice,
    query: Array,
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    slopes: Array | None,
    operands: Operands,
    targets: Targets,
) -> tuple[Array, Array, Array, Array]:
    """(out, lse, key_pool, value_pool), differentiable as `dispatch.append` and `attend` are."""
    new = keys.astype(key_pool.dtype), values.astype(value_pool.dtype)
    arrays = (query, *new, key_pool, value_pool, slopes, operands, targets)
    if not _fusing(problems[1], choice):
        return _in_turn(problems, choice, *arrays)
    return _at_once(problems, choice, *dispatch.uniform(arrays))


def _fusing(problem: Problem, choice: Choice) -> dict[str, Any]:
    """The modules that have one kernel for the problem, by backend."""
    modules = {}
    for name in FUSING:
        if not problem.is_packed and choice.implementation in (None, name):
            module, reason = dispatch.load(name, "attention", problem)
            if module is not None and reason is None and module.can_append(problem):
                modules[name] = module
    return modules


def _in_turn(
    problems, choice, query, keys, values, key_pool, value_pool, slopes, operands, targets
):
    append, attend = problems
    pools = dispatch.append(append, choice, keys, values, key_pool, value_pool, targets)
    return *dispatch.attend(attend, choice, query, *pools, slopes, operands), *pools


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_once(problems, choice, *arrays) -> Any:
    def kernel_fn(module, query, keys, values, key_pool, value_pool, slopes, operands, targets):
        given = (query, key_pool, value_pool, slopes, operands)
        given, is_layer = dispatch.kernel_arrays(problems[1], *given)
        new = NewTokens(keys, values, jnp.where(is_layer, targets.seq_lengths, 0))
        call = partial(module.append_and_attend, problems[1], interpret=choice.interpret)
        out, lse, *pools = call(given, new)
        return out, lse, *dispatch.like(key_pool, tuple(pools))

    modules = _fusing(problems[1], choice)
    if choice.implementation is not None:
        (module,) = modules.values()
        return dispatch.batchable(partial(kernel_fn, module))(*arrays)

    def results(query, keys, values, key_pool, value_pool, *_):
        return query, query[..., 0].astype(jnp.float32), key_pool, value_pool

    branches = {}
    for name, module in modules.items():
        platform = BACKENDS[name].platform
        kernel = lazy.on_platform(platform, partial(kernel_fn, module), results)
        branches[platform] = dispatch.batchable(kernel)
    in_turn = partial(_in_turn, problems, choice)
    return lax.platform_dependent(*arrays, **branches, default=in_turn)


def _forward(problems, choice, *arrays):
    query, *_, slopes, operands, targets = arrays
    results: Any = _at_once(problems, choice, *arrays)
    out, lse, *pools = results
    return results, ((query, *pools, slopes, operands, out, lse), targets)


def _backward(problems, choice, residuals, cotangents):
    append, attend = problems
    d_out, d_lse, *d_pools = cotangents
    d_query, *d_seen, d_slopes, _ = dispatch.attend_backward(
        attend, choice, residuals[0], (d_out, d_lse)
    )
    d_pools = [a + b for a, b in zip(d_pools, d_seen, strict=True)]
    *d_new, _ = dispatch.append_backward(append, choice, residuals[1], d_pools)
    return d_query, *d_new, d_slopes, None, None


_at_once.defvjp(_forward, _backward)
