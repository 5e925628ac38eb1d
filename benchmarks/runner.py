"""One case through one implementation: check it, then call it again and again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv

from . import baseline
from .inputs import Inputs
from .workload import APPEND, ATTEND, FUSED, Case

BASELINE = "baseline"

# The error's norm over the result's.  bfloat16 rounds the weights and the result, each by 2**-9 at
# most and 2**-9 / sqrt(3) on average; float16 eight times less; float32 sums 4096 terms of 2**-24.
MAX_ERROR = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 2e-5}


@dataclass
class Runner:
    """`run(i)` is one call on copy `i` of the inputs; the pools an append gives back are kept."""

    case: Case
    inputs: Inputs
    implementation: str | None
    interpret: bool | None = None
    step: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        steps = {ATTEND: self._attend, APPEND: self._append, FUSED: self._fused}
        donated = () if self.case.op == ATTEND else (0, 1)
        self.step = jax.jit(steps[self.case.op], donate_argnums=donated)
        self.pools = self.inputs.key_pool, self.inputs.value_pool
        if donated:
            self.pools = jax.tree.map(jnp.copy, self.pools)
        self.schedules = self._schedules()

    def run(self, index: int) -> Any:
        """Dispatches one call and returns its arrays."""
        copy = index % len(self.inputs.tables)
        out, pools = self.step(*self.pools, self.inputs.tables[copy], self.schedules[copy])
        if pools is not None:
            self.pools = pools
        return out if out is not None else self.pools

    @property
    def _options(self) -> dict[str, Any]:
        options = {**self.case.options, **self.inputs.operands}
        if self.implementation == BASELINE:
            return {**options, "max_query_length": int(self.case.queries.max())}
        return {**options, "implementation": self.implementation, "interpret": self.interpret}

    @property
    def _append_options(self) -> dict[str, Any]:
        names = ("query_start_loc", "implementation", "interpret")
        return {name: self._options[name] for name in names}

    def _schedules(self) -> list[Any]:
        """One per copy, made outside the time: a model makes one for all its layers."""
        copies = range(len(self.inputs.tables))
        if self.implementation == BASELINE or self.case.op == APPEND:
            return [None for _ in copies]
        names = ("query_start_loc", "local_window_size", "is_causal", "implementation")
        options = {name: self._options[name] for name in names}
        heads = self.case.num_query_heads
        make = jax.jit(partial(paged_kv.make_schedule, num_query_heads=heads, **options))
        return [make(self.inputs.cache(copy)) for copy in copies]

    def _cache(self, key_pool: jax.Array, value_pool: jax.Array, table: jax.Array):
        return paged_kv.PagedKVCache(key_pool, value_pool, table, self.inputs.seq_lengths)

    def _attend(self, key_pool: jax.Array, value_pool: jax.Array, table: jax.Array, schedule: Any):
        cache = self._cache(key_pool, value_pool, table)
        if self.implementation == BASELINE:
            return baseline.attention(self.inputs.query, cache, **self._options), None
        attend = partial(paged_kv.paged_attention, schedule=schedule, return_residual=True)
        return attend(self.inputs.query, cache, **self._options), None

    def _append(self, key_pool: jax.Array, value_pool: jax.Array, table: jax.Array, _: Any):
        cache = self._cache(key_pool, value_pool, table)
        new = self.inputs.keys, self.inputs.values
        if self.implementation == BASELINE:
            slots = paged_kv.slot_mapping(
                cache,
                query_start_loc=self._options["query_start_loc"],
                num_tokens=self.case.num_tokens,
            )
            return None, baseline.append(key_pool, value_pool, *new, slots)
        cache = paged_kv.append_tokens(cache, *new, **self._append_options)
        return None, (cache.key_pool, cache.value_pool)

    def _fused(self, key_pool: jax.Array, value_pool: jax.Array, table: jax.Array, schedule: Any):
        if self.implementation == BASELINE:
            _, pools = self._append(key_pool, value_pool, table, None)
            return self._attend(*pools, table, None)[0], pools
        (out, lse), cache = paged_kv.append_and_attend(
            self.inputs.query,
            self.inputs.keys,
            self.inputs.values,
            self._cache(key_pool, value_pool, table),
            schedule=schedule,
            return_residual=True,
            **self._options,
        )
        return (out, lse), (cache.key_pool, cache.value_pool)


def check(case: Case, inputs: Inputs, implementation: str | None, interpret: bool | None) -> str:
    """What is wrong with the implementation's result, or an empty string.

    The reference is the measure; the reference itself is measured by the baseline.
    """
    truth = BASELINE if implementation == "xla" else "xla"
    runners = [
        Runner(case, inputs, implementation, interpret),
        Runner(case, inputs, truth),
    ]
    results = [jax.block_until_ready(runner.run(0)) for runner in runners]
    if case.op != ATTEND:
        pools = zip(*(runner.pools for runner in runners), strict=True)
        if not all(_same_bits(a, b) for a, b in pools):
            return "the pools differ from the reference's"
    if case.op == APPEND:
        return ""
    (out, lse), (true_out, true_lse) = results
    if not bool(jnp.all(jnp.isneginf(lse) == jnp.isneginf(true_lse))):
        return "lse is -inf for other queries than the reference's"
    error, limit = relative_error(out, true_out), MAX_ERROR[case.dtype]
    if not error <= limit:
        return f"relative error {error:.2g}, at most {limit:.2g} is right for {case.dtype}"
    finite = jnp.isfinite(true_lse)
    error = relative_error(jnp.where(finite, lse, 0), jnp.where(finite, true_lse, 0))
    return "" if error <= limit else f"relative error of lse {error:.2g}, at most {limit:.2g}"


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


def _same_bits(a: jax.Array, b: jax.Array) -> bool:
    return bool(_equal_bits(a, b))
