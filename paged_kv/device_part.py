"""What one device does of an op over a mesh: the op itself, on its part of each array.

Runs inside the `shard_map` of sharding.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jax import Array, lax

from . import context as contexts
from . import ops, validate
from .cache import PackedKVCache, PagedKVCache
from .kernels.core import merge
from .validate_sharding import Placement


class Arrays(NamedTuple):
    """Every array of a call, or the `PartitionSpec` of each; None where there is none."""

    cache: Any
    query: Any
    keys: Any
    values: Any
    starts: Any
    layer: Any
    sinks: Any
    slopes: Any


class Options(NamedTuple):
    """Everything else of a call, static."""

    scale: float | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    return_residual: bool = False
    implementation: ops.Implementation | None = None
    interpret: Any = None

    @property
    def scoring(self) -> tuple[Any, Any, Any, Any]:
        """As `validate.variant` takes them."""
        return self.scale, self.is_causal, self.local_window_size, self.logits_soft_cap


def _append(place: Placement, options: Options, a: Arrays) -> PagedKVCache:
    cache, starts = _own_cache(place, a.cache), _own_starts(a)
    keys, values = (_own_heads(place, cache, x) for x in (a.keys, a.values))
    same = {"implementation": options.implementation, "interpret": options.interpret}
    same |= {"layer": a.layer}
    if place.context is None:
        after = ops.append_tokens(cache, keys, values, query_start_loc=starts, **same)
    else:
        after = contexts.append(_ranks(place, cache), cache, keys, values, starts, **same)
    return _with_pools(a.cache, after)


def _attend(place: Placement, options: Options, a: Arrays) -> Any:
    cache, starts = _own_cache(place, a.cache), _own_starts(a)
    if place.context is None:
        return ops.paged_attention(a.query, cache, **_attention(options, a, starts))
    variant = validate.variant(cache.head_dim, *options.scoring, a.slopes is not None)
    same = {"implementation": options.implementation, "interpret": options.interpret}
    arrays = (a.query, cache, starts, a.layer)
    out, lse = contexts.attend(_ranks(place, cache), *arrays, variant, a.slopes, **same)
    if a.sinks is not None:
        out = merge.apply_sinks(out, lse, a.sinks)
    return (out, lse) if options.return_residual else out


def _append_and_attend(place: Placement, options: Options, a: Arrays) -> Any:
    if place.context is not None:
        cache = _append(place, options, a)
        return _attend(place, options, a._replace(cache=cache)), cache
    cache, starts = _own_cache(place, a.cache), _own_starts(a)
    keys, values = (_own_heads(place, cache, x) for x in (a.keys, a.values))
    same = _attention(options, a, starts)
    result, after = ops.append_and_attend(a.query, keys, values, cache, **same)
    return result, _with_pools(a.cache, after)


OPS: dict[str, Callable] = {
    "append": _append,
    "attend": _attend,
    "append_and_attend": _append_and_attend,
}


def _attention(options: Options, a: Arrays, starts: Array | None) -> dict[str, Any]:
    """The keywords of an op that attends."""
    arrays = {"query_start_loc": starts, "layer": a.layer, "sinks": a.sinks}
    return {**options._asdict(), **arrays, "alibi_slopes": a.slopes}


def _ranks(place: Placement, cache: PagedKVCache) -> contexts.Ranks:
    return contexts.Ranks(place.context, place.ranks(place.context), cache.block_size)


def _own_cache(place: Placement, cache: PagedKVCache) -> PagedKVCache:
    """The cache of one device; the form of a packed one counts all heads."""
    if not isinstance(cache, PackedKVCache):
        return cache
    heads, head_dim = cache.token_shape
    return replace(cache, token_shape=(heads // place.ranks(place.tensor), head_dim))


def _with_pools(cache: PagedKVCache, after: PagedKVCache) -> PagedKVCache:
    return replace(cache, key_pool=after.key_pool, value_pool=after.value_pool)


def _own_starts(a: Arrays) -> Array | None:
    return None if a.starts is None else a.starts.reshape(-1)


def _own_heads(place: Placement, cache: PagedKVCache, new: Array) -> Array:
    """The heads of new tokens that this device holds; given all where chips share heads."""
    if new.shape[1] == cache.num_kv_heads:
        return new
    chips = place.ranks(place.tensor) // new.shape[1]  # that hold a head
    return lax.dynamic_slice_in_dim(new, lax.axis_index(place.tensor) // chips, 1, axis=1)
