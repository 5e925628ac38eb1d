"""One case through one implementation: check it, then call it again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv

from . import baseline
from .inputs import Arrays, Inputs
from .workload import APPEND, ATTEND, FUSED, Case

BASELINE = "baseline"

# The error's norm over the result's.  bfloat16 rounds the weights and the result, each by 2**-9 at
# most and 2**-9 / sqrt(3) on average; float16 eight times less; float32 sums 4096 terms of 2**-24.
MAX_ERROR = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 2e-5}


class Steps(NamedTuple):
    """The programs of a case: `schedule(cache)` once per step, `step(*pools, ...)` in every layer.

    Jitted functions, or what they were compiled to.
    """

    schedule: Callable[..., Any] | None
    step: Callable[..., Any]

    def compiled(self, shapes: Inputs) -> "Steps":
        """The same, compiled for inputs like these: arrays, or only their shapes and dtypes."""
        pools, table = (shapes.key_pool, shapes.value_pool), shapes.tables[0]
        schedule = made = None
        if self.schedule is not None:
            jitted: Any = self.schedule
            cache = paged_kv.PagedKVCache(*pools, table, shapes.arrays.seq_lengths)
            made = jax.eval_shape(jitted, cache, shapes.arrays.operands["query_start_loc"])
            schedule = jitted.lower(cache, shapes.arrays.operands["query_start_loc"]).compile()
        step: Any = self.step
        return Steps(schedule, step.lower(*pools, shapes.arrays, table, made).compile())


@dataclass(frozen=True)
class Program:
    """One implementation of a case as functions of arrays."""

    case: Case
    implementation: Any  # a name, or None for the best
    interpret: bool | None = None

    @property
    def steps(self) -> Steps:
        step = {ATTEND: self._attend, APPEND: self._append, FUSED: self._fused}[self.case.op]
        donated = () if self.case.op == ATTEND else (0, 1)
        schedule = None
        if self.implementation != BASELINE and self.case.op != APPEND:
            schedule = jax.jit(self._schedule)
        return Steps(schedule, jax.jit(step, donate_argnums=donated))

    def _options(self, arrays: Arrays) -> dict[str, Any]:
        options = {**self.case.options, **arrays.operands}
        if self.implementation == BASELINE:
            return {**options, "max_query_length": int(self.case.queries.max())}
        return {**options, "implementation": self.implementation, "interpret": self.interpret}

    def _schedule(self, cache: paged_kv.PagedKVCache, query_start_loc: Any) -> Any:
        """Made outside the time of a call: a model makes one for all its layers."""
        names = ("local_window_size", "is_causal")
        options: dict[str, Any] = {name: self.case.options[name] for name in names}
        return paged_kv.make_schedule(
            cache,
            num_query_heads=self.case.num_query_heads,
            query_start_loc=query_start_loc,
            implementation=self.implementation,
            num_tokens=self.case.num_tokens,
            **options,
        )

    def _attend(self, key_pool, value_pool, arrays: Arrays, table: jax.Array, schedule: Any):
        cache = paged_kv.PagedKVCache(key_pool, value_pool, table, arrays.seq_lengths)
        options = self._options(arrays)
        if self.implementation == BASELINE:
            return baseline.attention(arrays.query, cache, **options), None
        attend = partial(paged_kv.paged_attention, schedule=schedule, return_residual=True)
        return attend(arrays.query, cache, **options), None

    def _append(self, key_pool, value_pool, arrays: Arrays, table: jax.Array, _: Any):
        cache = paged_kv.PagedKVCache(key_pool, value_pool, table, arrays.seq_lengths)
        new, starts = (arrays.keys, arrays.values), arrays.operands["query_start_loc"]
        if self.implementation == BASELINE:
            slots = paged_kv.slot_mapping(
                cache, query_start_loc=starts, num_tokens=self.case.num_tokens
            )
            return None, baseline.append(key_pool, value_pool, *new, slots)
        cache = paged_kv.append_tokens(
            cache,
            *new,
            query_start_loc=starts,
            implementation=self.implementation,
            interpret=self.interpret,
        )
        return None, (cache.key_pool, cache.value_pool)

    def _fused(self, key_pool, value_pool, arrays: Arrays, table: jax.Array, schedule: Any):
        if self.implementation == BASELINE:
            _, pools = self._append(key_pool, value_pool, arrays, table, None)
            return self._attend(*pools, arrays, table, None)[0], pools
        (out, lse), cache = paged_kv.append_and_attend(
            arrays.query,
            arrays.keys,
            arrays.values,
            paged_kv.PagedKVCache(key_pool, value_pool, table, arrays.seq_lengths),
            schedule=schedule,
            return_residual=True,
            **self._options(arrays),
        )
        return (out, lse), (cache.key_pool, cache.value_pool)


class Runner:
    """`run(i)` is one call on copy `i` of the inputs; the pools an append gives back are kept."""

    def __init__(self, program: Program, inputs: Inputs, steps: Steps | None = None):
        self.inputs, self.steps = inputs, steps or program.steps
        self.pools = inputs.key_pool, inputs.value_pool
        if program.case.op != ATTEND:
            self.pools = jax.tree.map(jnp.copy, self.pools)
        self.schedules = [self.schedule(copy) for copy in range(len(inputs.tables))]

    def schedule(self, index: int) -> Any:
        """What calls on copy `index` share."""
        if self.steps.schedule is None:
            return None
        starts = self.inputs.arrays.operands["query_start_loc"]
        return self.steps.schedule(self.inputs.cache(index), starts)

    def run(self, index: int) -> Any:
        """Dispatches one call and returns its arrays."""
        inputs, copy = self.inputs, index % len(self.inputs.tables)
        call = inputs.arrays, inputs.tables[copy], self.schedules[copy]
        out, pools = self.steps.step(*self.pools, *call)
        if pools is not None:
            self.pools = pools
        return out if out is not None else self.pools


def check(case: Case, inputs: Inputs, implementation: str | None, interpret: bool | None) -> str:
    """What is wrong with the implementation's result, or an empty string."""
    made = Runner(Program(case, implementation, interpret), inputs)
    return verdict(case, made, Runner(Program(case, truth_of(implementation)), inputs))[0]


def truth_of(implementation: str | None) -> str:
    """The measure is the reference; the reference itself is measured by the baseline."""
    return BASELINE if implementation == "xla" else "xla"


def verdict(case: Case, made: Runner, truth: Runner) -> tuple[str, float]:
    """(what is wrong or an empty string, relative error) of a first call; 0.0 where bits count."""
    results = [jax.block_until_ready(runner.run(0)) for runner in (made, truth)]
    if case.op != ATTEND:
        pools = zip(made.pools, truth.pools, strict=True)
        if not all(same_bits(a, b) for a, b in pools):
            return "the pools differ from the reference's", float("nan")
    if case.op == APPEND:
        return "", 0.0
    (out, lse), (true_out, true_lse) = results
    if not bool(jnp.all(jnp.isneginf(lse) == jnp.isneginf(true_lse))):
        return "lse is -inf for other queries than the reference's", float("nan")
    error, limit = relative_error(out, true_out), MAX_ERROR[case.dtype]
    if not error <= limit:
        wrong = f"relative error {error:.2g}, at most {limit:.2g} is right for {case.dtype}"
        return wrong, error
    finite = jnp.isfinite(true_lse)
    of_lse = relative_error(jnp.where(finite, lse, 0), jnp.where(finite, true_lse, 0))
    wrong = f"relative error of lse {of_lse:.2g}, at most {limit:.2g}"
    return "" if of_lse <= limit else wrong, error


@jax.jit
def _norms(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()), jnp.linalg.norm(b.ravel())


def relative_error(result: jax.Array, truth: jax.Array) -> float:
    """Norm of the difference over the norm of the truth; NaN if either holds one."""
    difference, whole = (float(norm) for norm in _norms(result, truth))
    return difference / whole if whole else difference


@jax.jit
def _equal_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    integer = np.dtype(f"uint{8 * a.dtype.itemsize}")
    views = (jax.lax.bitcast_convert_type(x, integer) for x in (a, b))
    return jnp.all(jnp.equal(*views))


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    return bool(_equal_bits(a, b))
