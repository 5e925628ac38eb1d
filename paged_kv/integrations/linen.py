"""Flax Linen: a paged cache in the `cache` collection, and an `attention_fn` for each layer.

In a module's `__call__`, `step = PagedCache(name="paged").step(counts, width)` begins a step, and
`nn.MultiHeadDotProductAttention(..., attention_fn=step.attention_fn(layer))` attends in it.  The
cache itself comes with `apply`: `model.apply({"params": params, "cache": {"paged": {"kv": cache}}},
..., mutable=["cache"])`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import rows, state
from . import check_hook_call, missing, step_counts

try:
    from flax import linen as nn
except ImportError as error:
    raise missing("flax.linen", "flax", error) from error


class PagedCache(nn.Module):
    """A `PagedKVCache` in the variable `kv` of the collection `cache`, shared by all layers."""

    @nn.compact
    def step(self, num_new_tokens: int | Int32[Array, "batch"], width: int | None = None) -> "Step":
        """Begins a step of the model: sequences are advanced once, then every layer attends.

        Args:
          num_new_tokens: tokens of each row of the step's (batch, T) input: an int T where all have
            as many, or int32 (batch,) for rows padded at their end.
          width: T, tokens of a row with its padding; needed where `num_new_tokens` is an array.

        Returns:
          What gives layers their `attention_fn`.  In `init` there is no cache, and attention is
          zero.

        Raises:
          ValueError: `apply` was called without the cache, `width` is missing, or as `advance`.
        """
        width, counts = step_counts(num_new_tokens, width)
        if self.is_initializing():
            return Step(None, width, counts)
        if not self.has_variable("cache", "kv"):
            raise ValueError(
                f"no cache for {'/'.join(self.path)}: call model.apply with variables "
                f"{{..., 'cache': {{'{self.name}': {{'kv': cache}}}}}} and mutable=['cache']"
            )
        kv = self.variable("cache", "kv")
        kv.value = state.advance(kv.value, num_new_tokens)
        return Step(kv, width, counts)


@dataclass(frozen=True)
class Step:
    """A step that is under way, from `PagedCache.step`.

    Attributes:
      kv: the variable that holds the cache; None in `init`.
      width: T, tokens of each row, padding included.
      counts: int32 (batch,), real tokens of each row; None: all of them.
    """

    kv: Any
    width: int
    counts: Array | None

    def positions(self) -> Int32[Array, "batch T"]:
        """Position of each token of the step in its sequence; in `init` (1, T), from 0."""
        if self.kv is None:
            return jnp.arange(self.width, dtype=jnp.int32)[None, :]
        return rows.row_positions(self.kv.value, self.width, self.counts)

    def attention_fn(self, layer: int | None = None, **attention: Any) -> Callable:
        """An `attention_fn` for `nn.MultiHeadDotProductAttention`, or for a layer of one's own.

        A call of it appends the new keys and values to the cache, then attends over all that is
        there, as `append_and_attend_rows` does.  It takes query (batch, T, num_query_heads,
        head_dim), key and value (batch, T, num_kv_heads, head_dim), and returns what is shaped as
        the query.

        Args:
          layer: which layer of a stacked cache; None for a single layer's.
          **attention: keywords of `paged_attention`: `scale`, `local_window_size`, `sinks` and so
            on.

        Raises:
          ValueError: it is called with a mask, with another T, or as `append_and_attend_rows`.
          NotImplementedError: it is called with dropout.
        """

        def attend(
            query: Float[Array, "batch T num_query_heads head_dim"],
            key: Float[Array, "batch T num_kv_heads head_dim"],
            value: Float[Array, "batch T num_kv_heads head_dim"],
            *,
            mask: Array | None = None,
            dropout_rate: float = 0.0,
            deterministic: bool = True,
        ) -> Float[Array, "batch T num_query_heads head_dim"]:
            check_hook_call(query, self.width, mask, dropout_rate, deterministic)
            if self.kv is None:
                return jnp.zeros_like(query)
            out, self.kv.value = rows.append_and_attend_rows(
                query,
                key,
                value,
                self.kv.value,
                query_seq_lengths=self.counts,
                layer=layer,
                **attention,
            )
            return out

        return attend
