"""Online softmax in powers of two, float32.

The recurrence is that of Milakov and Gimelshein (2018), as in FlashAttention.  The one thing
backends differ in is how a value per row is stored: `Rows` says how to make one from a tile and how
to spread it over a tile again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

# A masked score lies so far below the floor of the running maximum that its weight is exactly zero,
# also in a row that has seen no key yet; both are finite, so no difference of the two is NaN.
MASK = -1e30
FLOOR = -0.5e30
LN2 = 0.6931471805599453


class Rows(NamedTuple):
    """How a backend keeps one value per row."""

    reduce: Callable[[Callable, Any], Any]  # (jnp.max or jnp.sum, tile) -> per row
    expand: Callable[[Any, tuple[int, ...]], Any]  # (per row, shape of a tile) -> tile


class State(NamedTuple):
    """What a row has seen so far; starts as FLOOR, 0, 0."""

    m: Any  # maximum score, in units of log 2
    l: Any  # sum of weights
    acc: Any  # weighted values, (rows, head_dim)


def weights_of(
    rows: Rows, state: State, scores: Any, unit: float | None = None
) -> tuple[Any, Any, Any, Any]:
    """(m, l, decay, weights) after a tile of masked scores: what was seen before counts `decay`.

    unit: a positive number that scores are still to be multiplied by, which is one instruction
      with the difference; those masked are -inf then, for a finite mask would not outlast it.
    """
    scaled = (lambda x: x) if unit is None else (lambda x: x * jnp.float32(unit))
    m = jnp.maximum(state.m, scaled(rows.reduce(jnp.max, scores)))
    decay = jnp.exp2(state.m - m)
    weights = jnp.exp2(scaled(scores) - rows.expand(m, scores.shape))
    return m, state.l * decay + rows.reduce(jnp.sum, weights), decay, weights


def step(rows: Rows, state: State, scores: Any, weigh: Callable[[Any], Any]) -> State:
    """Takes in a tile of masked scores; `weigh(weights)` is their product with its values."""
    m, l, decay, weights = weights_of(rows, state, scores)
    acc = state.acc * rows.expand(decay, state.acc.shape) + weigh(weights)
    return State(m, l, acc)


def join(rows: Rows, a: State, b: State) -> State:
    """The state after what either of them has seen."""
    m = jnp.maximum(a.m, b.m)
    decay_a, decay_b = jnp.exp2(a.m - m), jnp.exp2(b.m - m)
    acc = a.acc * rows.expand(decay_a, a.acc.shape) + b.acc * rows.expand(decay_b, b.acc.shape)
    return State(m, a.l * decay_a + b.l * decay_b, acc)


def finish(rows: Rows, state: State) -> tuple[Any, Any]:
    """(out, lse), lse in natural units; a row that saw no key gives 0 and -inf."""
    seen = state.l > 0
    total = jnp.where(seen, state.l, 1.0)
    out = state.acc * rows.expand(1.0 / total, state.acc.shape)
    return out, jnp.where(seen, state.m * LN2 + jnp.log(total), -jnp.inf)
