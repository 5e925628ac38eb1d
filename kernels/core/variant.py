"""Which keys a query sees and how a dot product becomes a score: windows, caps and biases.

Positions in, booleans out.  A kernel builds positions in its own layout and hands them over;
nothing here makes an iota or a broadcast, so the same code is traced by every backend, and runs on
NumPy arrays and ints too.  The shape of the idea (a score function, a mask function and the range
that bounds the mask) is FlexAttention's.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Variant:
    """The static part of an attention variant; sinks and slopes are arrays and travel beside it."""

    scale: float
    is_causal: bool = True
    window: tuple[int, int] | None = None  # keys to the left and right of the query, besides itself
    logits_soft_cap: float | None = None
    has_alibi: bool = False

    @property
    def left(self) -> int | None:
        """How far back a query sees; None: to the first token."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """How far ahead a query sees; None: to the last token."""
        if self.is_causal:
            return 0
        return None if self.window is None else self.window[1]

    @property
    def is_linear(self) -> bool:
        """Scores are dot products times a positive number: a maximum may be taken before it."""
        return self.logits_soft_cap is None and not self.has_alibi and self.scale > 0

    def score(
        self,
        dots: Any,
        query_position: Any,
        key_position: Any,
        slope: Any = None,
        unit: float = 1.0,
    ) -> Any:
        """Scores of float32 dot products, times `unit` (LOG2E for a softmax in powers of two)."""
        if self.logits_soft_cap is None:
            scores = dots * (self.scale * unit)
        else:
            cap = self.logits_soft_cap
            scores = jnp.tanh(dots * (self.scale / cap)) * (cap * unit)
        if self.has_alibi:
            distance = jnp.abs(query_position - key_position).astype(jnp.float32)
            scores = scores - (slope * unit) * distance
        return scores

    def keep(self, query_position: Any, key_position: Any, seq_length: Any) -> Any:
        """True where the query sees the key.  A query at a negative position sees none."""
        seen = (key_position < seq_length) & (query_position >= 0)
        if self.right is not None:
            seen &= key_position <= query_position + self.right
        if self.left is not None:
            seen &= key_position >= query_position - self.left
        return seen

    def kv_range(self, first: Any, last: Any, seq_length: Any) -> tuple[Any, Any]:
        """Keys [start, stop) that some query in [first, last] sees; start == stop if none does."""
        first = _max(first, 0)
        start = first * 0 if self.left is None else _max(first - self.left, 0)
        stop = seq_length if self.right is None else _min(last + self.right + 1, seq_length)
        stop = _where(last >= first, stop, 0)
        return start, _max(start, stop)

    def range_of_last(self, seq_length: Any) -> tuple[Any, Any]:
        """Keys [start, stop) that the last token of a sequence sees: `kv_range` in fewer steps."""
        start = seq_length * 0 if self.left is None else _max(seq_length - 1 - self.left, 0)
        return start, seq_length

    def full_range(self, first: Any, last: Any, seq_length: Any) -> tuple[Any, Any]:
        """Keys [start, stop) that every query in [first, last] sees: tiles inside need no mask."""
        start = last * 0 if self.left is None else _max(last - self.left, 0)
        stop = seq_length if self.right is None else _min(first + self.right + 1, seq_length)
        stop = _where(first >= 0, stop, 0)
        return start, _max(start, stop)


def _max(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _min(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return (a if condition else b) if isinstance(condition, bool) else jnp.where(condition, a, b)
