"""Flax NNX: one paged cache behind the `attention_fn` of every `nnx.MultiHeadAttention`.

`attach(model, cache)` makes a model use a paged cache, without a change to its code; a layer of
one's own calls `PagedAttention` where it would call `nnx.dot_product_attention`.  Either way a step
is `with paged.step(num_new_tokens): model(...)`, under `nnx.jit` or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Array, Float, Int32

from .. import rows, state
from ..cache import PagedKVCache
from . import check_hook_call, missing, step_counts

try:
    from flax import nnx
except ImportError as error:
    raise missing("flax.nnx", "flax", error) from error


class PagedCache(nnx.Module):
    """A `PagedKVCache` as NNX state, shared by all layers that attend over it.

    Args:
      cache: of one layer or a stack.

    Attributes:
      kv: an `nnx.Cache` that holds the `PagedKVCache`: between steps, `get_value` and `set_value`
        it for `set_block_table`, `truncate` and so on.
    """

    def __init__(self, cache: PagedKVCache):
        self.kv = nnx.Cache(cache)
        self.step_width: int | None = None  # tokens of each row, outside of a step None
        self.step_counts: Array | None = nnx.data(None)  # real ones, where rows are padded

    @contextmanager
    def step(
        self, num_new_tokens: int | Int32[Array, "batch"], width: int | None = None
    ) -> Iterator[None]:
        """A step of the model: sequences are advanced once, and every layer attends once.

        Args:
          num_new_tokens: tokens of each row of the step's (batch, T) input: an int T where all have
            as many, or int32 (batch,) for rows padded at their end.
          width: T, tokens of a row with its padding; needed where `num_new_tokens` is an array.

        Raises:
          ValueError: `width` is missing, a step is under way, or as `advance`.
        """
        if self.step_width is not None:
            raise ValueError("a step of this cache is under way; leave it before the next begins")
        width, counts = step_counts(num_new_tokens, width)
        self.kv.set_value(state.advance(self.kv.get_value(), num_new_tokens))
        self.step_width, self.step_counts = width, nnx.data(counts)
        try:
            yield
        finally:
            self.step_width, self.step_counts = None, nnx.data(None)

    def positions(self) -> Int32[Array, "batch T"]:
        """Position of each token of the step in its sequence, for embeddings of positions.

        Raises:
          ValueError: no step is under way.
        """
        return rows.row_positions(self.kv.get_value(), self._width(), self.step_counts)

    def _width(self) -> int:
        if self.step_width is None:
            raise ValueError("no step is under way: call the model in `with cache.step(...)`")
        return self.step_width


class PagedAttention(nnx.Module):
    """Attention over a `PagedCache`: an `attention_fn` for `nnx.MultiHeadAttention`.

    A call appends the new keys and values to the cache, then attends over all that is there, as
    `append_and_attend_rows` does.

    Args:
      cache: shared by the layers of a model.
      layer: which layer of a stacked cache; None for a single layer's.
      sinks, alibi_slopes: arrays or variables, (num_query_heads,), as in `paged_attention`.
      **attention: the other keywords of `paged_attention`, for every call of this layer: `scale`,
        `local_window_size`, `logits_soft_cap` and so on.
    """

    def __init__(
        self,
        cache: PagedCache,
        layer: int | None = None,
        *,
        sinks: Any = None,
        alibi_slopes: Any = None,
        **attention: Any,
    ):
        self.cache = cache
        self.layer = layer
        self.sinks, self.alibi_slopes = nnx.data(sinks), nnx.data(alibi_slopes)
        self.attention = tuple(sorted(attention.items()))  # static: hashable

    def __call__(
        self,
        query: Float[Array, "batch T num_query_heads head_dim"],
        key: Float[Array, "batch T num_kv_heads head_dim"],
        value: Float[Array, "batch T num_kv_heads head_dim"],
        *,
        mask: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        **unused: Any,
    ) -> Float[Array, "batch T num_query_heads head_dim"]:
        """Attention of the step's tokens over their sequences; the cache is updated.

        What `nnx.MultiHeadAttention` passes besides has no meaning here: causality is by position,
        dtypes and precision are those of `paged_attention`.

        Args:
          query: (batch, T, num_query_heads, head_dim), the step's tokens.
          key, value: (batch, T, num_kv_heads, head_dim), of the same tokens.
          mask: None; of any shape, as in (batch, heads, T, S), it is an error.
          dropout_rate: share of the weights to drop: 0, unless `deterministic`.
          deterministic: no dropout, whatever its rate.
          **unused: the other arguments of `nnx.dot_product_attention`.

        Returns:
          Shaped and typed as the query.

        Raises:
          ValueError: a mask is given, no step is under way, the step has another T, or as
            `append_and_attend_rows`.
          NotImplementedError: dropout is asked for.
        """
        cache = self.cache
        width = cache._width()
        check_hook_call(query, width, mask, dropout_rate, deterministic)
        out, kv = rows.append_and_attend_rows(
            query,
            key,
            value,
            cache.kv.get_value(),
            query_seq_lengths=cache.step_counts,
            layer=self.layer,
            sinks=_array(self.sinks),
            alibi_slopes=_array(self.alibi_slopes),
            **dict(self.attention),
        )
        cache.kv.set_value(kv)
        return out


def attach(model: nnx.Module, cache: PagedKVCache, **attention: Any) -> PagedCache:
    """Puts every `nnx.MultiHeadAttention` of a model on one paged cache.

    Sets the `attention_fn` of each and switches `decode`, their own dense cache, off.  They take
    the layers of the cache in the order in which `nnx.iter_modules` finds them.

    Args:
      model: changed in place.
      cache: stacked, with as many layers as the model has attentions.
      **attention: keywords of `paged_attention` for all layers.

    Returns:
      The cache as a module: `with paged.step(...)` around each call of the model.

    Raises:
      ValueError: the cache has not as many layers as the model has attentions.
    """
    attentions = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.MultiHeadAttention)]
    if cache.num_layers != len(attentions):
        raise ValueError(
            f"the model has {len(attentions)} nnx.MultiHeadAttention, the cache "
            f"num_layers={cache.num_layers}; make one layer for each"
        )
    paged = PagedCache(cache)
    for layer, module in enumerate(attentions):
        module.attention_fn = nnx.data(PagedAttention(paged, layer, **attention))
        module.decode = False
    return paged


def _array(value: Any) -> Any:
    return value.get_value() if isinstance(value, nnx.Variable) else value
