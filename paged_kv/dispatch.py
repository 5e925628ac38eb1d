"""Which implementation runs a call, and the gradient that all of them share.

With `implementation=None` the choice is made when the program is lowered, for the platform it is
lowered for: every backend that supports the problem is a branch of `lax.platform_dependent`, the
reference is the default.  A named implementation is strict.  Kernels are imported when first used.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import lazy, reference
from .kernels.core.arrays import AttentionArrays
from .kernels.core.problem import AppendProblem, CacheShape, Problem
from .kernels.core.schedule import Schedule
from .validate import is_concrete


class Backend(NamedTuple):
    """A folder of kernels/ and where it runs."""

    platform: str  # as `lax.platform_dependent` names it
    package: str
    device: str  # for error texts
    work: str  # the module whose `of_step` makes the backend's part of a schedule


BACKENDS = {
    "mosaic_tpu": Backend("tpu", "paged_kv.kernels.tpu", "a TPU", "step_work"),
    "mosaic_gpu": Backend("cuda", "paged_kv.kernels.gpu", "an NVIDIA GPU", "step_work"),
}


class Choice(NamedTuple):
    """What a caller asked for; static."""

    implementation: str | None
    interpret: Any


class Operands(NamedTuple):
    """Arrays of an attention call that have no gradient; pools are beside them."""

    block_table: Array
    schedule: Schedule
    seq_lengths: Array
    layer: Array


def with_work(
    implementation: str | None, cache: CacheShape, num_query_heads: int, schedule: Schedule
) -> Schedule:
    """The schedule with what the named backend, or every one, makes of it once per step.

    Plain array code: XLA drops what no call of the same program uses.
    """
    work = {}
    for name, backend in BACKENDS.items():
        package = importlib.import_module(backend.package)
        is_meant = implementation in (None, name)
        if is_meant and package.unsupported_version() is None:
            module = importlib.import_module(f"{backend.package}.{backend.work}")
            made = module.of_step(cache, num_query_heads, schedule)
            work |= {} if made is None else {name: made}
    return replace(schedule, work=work)


def attend(
    problem: Problem,
    choice: Choice,
    query: Array,
    key_pool: Array,
    value_pool: Array,
    slopes: Array | None,
    operands: Operands,
) -> tuple[Array, Array]:
    """(out, lse) of one attention call, differentiable in query, pools and slopes."""
    arrays = uniform((query, key_pool, value_pool, slopes, operands))
    return _attend(problem, choice, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem, choice, query, key_pool, value_pool, slopes, operands) -> Any:
    def reference_fn(*arrays):
        query, key_pool, value_pool, slopes, operands = arrays
        return reference.attend(
            *_reference_statics(problem),
            *_reference_arrays(problem, query, key_pool, value_pool, slopes, operands),
        )

    def kernel_fn(module: ModuleType, *arrays):
        given, _ = kernel_arrays(problem, *arrays)
        return module.attend(problem, given, interpret=choice.interpret)

    results = lambda query, *_: (query, query[..., 0].astype(jnp.float32))
    arrays = (query, key_pool, value_pool, slopes, operands)
    return _choose("attention", problem, choice, kernel_fn, reference_fn, arrays, results)


def _attend_forward(problem, choice, query, key_pool, value_pool, slopes, operands):
    result: Any = _attend(problem, choice, query, key_pool, value_pool, slopes, operands)
    return result, (query, key_pool, value_pool, slopes, operands, *result)


def attend_backward(problem, choice, residuals, cotangents):
    del choice  # one backward pass for all implementations
    *arrays, out, lse = residuals
    key_pool, value_pool = arrays[1:3]
    d_query, d_keys, d_values, d_slopes = reference.attend_transposed(
        *_reference_statics(problem), _reference_arrays(problem, *arrays), out, lse, *cotangents
    )
    pools = d_keys.reshape(key_pool.shape), d_values.reshape(value_pool.shape)
    return d_query, *pools, d_slopes, None


_attend.defvjp(_attend_forward, attend_backward)


class Targets(NamedTuple):
    """Arrays that say where an append writes."""

    block_table: Array
    seq_lengths: Array
    query_start_loc: Array
    layer: Array


def append(
    problem: AppendProblem,
    choice: Choice,
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    targets: Targets,
) -> tuple[Array, Array]:
    """Both pools with the new tokens written, differentiable in keys, values and pools."""
    dtype = key_pool.dtype
    arrays = (keys.astype(dtype), values.astype(dtype), key_pool, value_pool, targets)
    return _append(problem, choice, *uniform(arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _append(problem, choice, keys, values, key_pool, value_pool, targets) -> Any:
    def reference_fn(keys, values, key_pool, value_pool, targets):
        pools = as_heads(problem, key_pool, value_pool)
        return like(key_pool, reference.append(keys, values, *pools, *targets))

    def kernel_fn(module: ModuleType, keys, values, key_pool, value_pool, targets):
        pools = as_heads(problem, key_pool, value_pool)
        layer, is_layer = safe_layer(targets.layer, pools[0])
        lengths = jnp.where(is_layer, targets.seq_lengths, 0)
        arrays = (targets.block_table, lengths, targets.query_start_loc, layer)
        call = partial(module.append, problem, interpret=choice.interpret)
        return like(key_pool, call(keys, values, *pools, *arrays))

    results = lambda keys, values, key_pool, value_pool, _: (key_pool, value_pool)
    arrays = (keys, values, key_pool, value_pool, targets)
    return _choose("append", problem, choice, kernel_fn, reference_fn, arrays, results)


def _append_forward(problem, choice, keys, values, key_pool, value_pool, targets):
    return _append(problem, choice, keys, values, key_pool, value_pool, targets), targets


def append_backward(problem, choice, targets, cotangents):
    del choice  # one backward pass for all implementations
    pools = as_heads(problem, *cotangents)
    d_new = reference.append_transposed(problem.num_tokens, *pools, *targets)
    return *d_new[:2], *like(cotangents[0], d_new[2:]), None


_append.defvjp(_append_forward, append_backward)


def _choose(
    op: str,
    problem: Problem | AppendProblem,
    choice: Choice,
    kernel_fn: Callable,
    reference_fn: Callable,
    arrays: tuple,
    results: Callable,
) -> Any:
    """Runs the named implementation, or the best for the platform lowered for."""
    if choice.implementation == "xla":
        return reference_fn(*arrays)
    if choice.implementation is not None:
        module, _ = load(choice.implementation, op, problem)
        return batchable(partial(kernel_fn, module))(*arrays)
    branches = {}
    for name, backend in BACKENDS.items():
        module, reason = load(name, op, problem)
        if reason is None:
            kernel = lazy.on_platform(backend.platform, partial(kernel_fn, module), results)
            branches[backend.platform] = batchable(kernel)
    return lax.platform_dependent(*arrays, **branches, default=reference_fn)


def load(name: str, op: str, problem: Problem | AppendProblem) -> tuple[ModuleType | None, Any]:
    """The module of a backend's op, and why it cannot run the problem, if it cannot."""
    package = importlib.import_module(BACKENDS[name].package)
    reason = package.unsupported_version()
    if reason is not None:
        return None, reason
    module = importlib.import_module(f"{BACKENDS[name].package}.{op}")
    return module, module.unsupported(problem)


def batchable(kernel: Callable) -> Callable:
    """Under vmap a kernel runs once per element: its memory is addressed by hand."""
    return jax.custom_batching.sequential_vmap(kernel)


def uniform(arrays: tuple) -> tuple:
    """All arrays varying over the same axes of a `shard_map`; a no-op outside of one."""
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(arrays)))

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def check(op: str, problem: Problem | AppendProblem, choice: Choice, array: Any) -> None:
    """A named kernel must support the problem; called eagerly, it needs its device."""
    if choice.implementation not in BACKENDS:
        return
    _, reason = load(choice.implementation, op, problem)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={choice.implementation!r} cannot run this {op}: {reason}"
        )
    if choice.interpret or not is_concrete(array):
        return
    backend = BACKENDS[choice.implementation]
    platforms = {
        "cuda" if d.platform == "gpu" else d.platform for d in jnp.asarray(array).devices()
    }
    if platforms != {backend.platform}:
        raise NotImplementedError(
            f"implementation={choice.implementation!r} needs {backend.device}, the arrays are on "
            f"{', '.join(sorted(platforms))}; pass interpret=True to run it there in the "
            "interpreter, or implementation=None for the best that platform has"
        )


def safe_layer(layer: Array, pool: Array) -> tuple[Array, Array]:
    """A layer inside the stack, and whether that is the one asked for."""
    num_layers = pool.shape[0]
    return jnp.clip(layer, 0, num_layers - 1), (layer >= 0) & (layer < num_layers)


def kernel_arrays(
    problem: Problem, query, key_pool, value_pool, slopes, operands: Operands
) -> tuple[AttentionArrays, Array]:
    """What a kernel is given, and whether the layer is one; otherwise no sequence has tokens."""
    keys, values = as_heads(problem, key_pool, value_pool)
    layer, is_layer = safe_layer(operands.layer, keys)
    schedule, table = operands.schedule.only_if(is_layer), operands.block_table
    return AttentionArrays(query, keys, values, table, schedule, slopes, layer), is_layer


def _reference_statics(problem: Problem) -> tuple[reference.Scoring, bool]:
    variant = problem.variant
    scoring = reference.Scoring(variant.scale, variant.left, variant.right, variant.logits_soft_cap)
    return scoring, problem.is_packed


def _reference_arrays(problem: Problem, query, key_pool, value_pool, slopes, operands) -> tuple:
    return (
        query,
        *as_heads(problem, key_pool, value_pool),
        slopes,
        operands.block_table,
        operands.seq_lengths,
        operands.schedule.query_start_loc,
        operands.layer,
    )


def as_heads(problem: Problem | AppendProblem, *pools: Array) -> list[Array]:
    """Pools as kernels and the reference see them, of one layer or many, packed or not."""
    return [pool.reshape(problem.cache.pool_shape) for pool in pools]


def like(pool: Array, pools: tuple[Array, ...]) -> tuple[Array, Array]:
    return pools[0].reshape(pool.shape), pools[1].reshape(pool.shape)
