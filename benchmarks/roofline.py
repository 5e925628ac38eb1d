"""The ceilings of this device, measured, and how near to the one that binds a case comes.

Source: the roofline of Williams et al. (2009).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from .timing import measure
from .workload import APPEND, FUSED, Case

READ, COPY, MATMUL = "read", "copy", "matmul"
REPEATS = 10


@dataclass(frozen=True)
class Rate:
    """Achieved `value` GB/s or TFLOP/s, and its share of the measured `ceiling` of that kind."""

    value: float
    unit: str
    limit: str
    ceiling: float

    @property
    def share(self) -> float:
        return self.value / self.ceiling


def bound(case: Case, seconds: float) -> Rate:
    """The rate of `case` in `seconds`, against the ceiling that would make it slowest."""
    if case.op == APPEND:
        return Rate(case.append_bytes / seconds / 1e9, "GB/s", COPY, copy_ceiling())
    moved = case.kv_bytes + (case.append_bytes if case.op == FUSED else 0)
    read, matmul = read_ceiling(), matmul_ceiling(case.dtype)
    if moved / (read * 1e9) >= case.useful_flops / (matmul * 1e12):
        return Rate(moved / seconds / 1e9, "GB/s", READ, read)
    return Rate(case.useful_flops / seconds / 1e12, "TFLOP/s", MATMUL, matmul)


@cache
def read_ceiling() -> float:
    """GB/s of reading: the best of XLA's reductions of an array no cache holds."""
    rows = _large()
    sums = [lambda x: jnp.sum(x, axis=1), lambda x: jnp.max(x, axis=1), jnp.max]
    return max(_per_second(jax.jit(f), rows) for f in sums) * rows.nbytes / 1e9


@cache
def copy_ceiling() -> float:
    """GB/s of copying, bytes read plus bytes written."""
    rows = _large()
    return _per_second(jax.jit(lambda x: x + 1), rows) * 2 * rows.nbytes / 1e9


@cache
def matmul_ceiling(dtype: str) -> float:
    """TFLOP/s of a large square matrix product with float32 accumulation."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32).astype(dtype))
    return _per_second(product, square) * 2 * size**3 / 1e12


def _large() -> jax.Array:
    rows = 2**14 if jax.default_backend() == "cpu" else 2**17
    return jnp.ones((rows, 4096), jnp.float32)  # 256 MiB, 2 GiB


def _per_second(function: Callable[[jax.Array], jax.Array], operand: jax.Array) -> float:
    return 1e6 / measure(lambda _: function(operand), REPEATS).median_us
