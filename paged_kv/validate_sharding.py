"""Checks of calls over a mesh: axes, and sizes against the ranks that share them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from . import validate, validate_values

if TYPE_CHECKING:
    from .cache import PagedKVCache
    from .device_part import Arrays, Options

Axis = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes share out what."""

    mesh: Any
    data: Axis
    tensor: Axis
    context: Axis

    @classmethod
    def of(cls, mesh: Any, data: Axis, tensor: Axis, context: Axis) -> "Placement":
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        if not mesh.axis_names:
            raise ValueError("mesh=None, but no mesh is set: pass one, or call jax.set_mesh")
        seen = {}
        for role, axis in (("data", data), ("tensor", tensor), ("context", context)):
            for name in _names(axis):
                if name not in mesh.axis_names:
                    raise ValueError(
                        f"{role}={axis!r} names {name!r}, but the axes of the mesh are "
                        f"{mesh.axis_names}"
                    )
                if name in seen:
                    raise ValueError(
                        f"{role}={axis!r} and {seen[name]} both name {name!r}; a mesh axis can "
                        "share out one thing"
                    )
                seen[name] = f"{role}={axis!r}"
        return cls(mesh, data, tensor, context)

    def ranks(self, axis: Axis) -> int:
        """Parts that an axis cuts into; 1 for None."""
        return int(np.prod([self.mesh.shape[name] for name in _names(axis)], dtype=int))

    def explicit(self, spec: P) -> P | None:
        """What the types of arrays must say of a spec; None where no axis is explicit."""
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if AxisType.Explicit not in kinds.values():
            return None

        def keep(entry: Any) -> Any:
            names = tuple(n for n in _names(entry) if kinds[n] == AxisType.Explicit)
            return (names or None) if isinstance(entry, tuple) or not names else names[0]

        return P(*map(keep, spec))


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def heads_of_cache(place: Placement, num_kv_heads: int) -> int:
    """Heads of a cache for a model: at least one per rank of the tensor axis."""
    validate.positive_ints({"num_kv_heads": num_kv_heads})
    ranks = place.ranks(place.tensor)
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads=} and the {ranks} ranks of tensor={place.tensor!r}: one must be a "
            "multiple of the other; give part of the ranks to another axis"
        )
    return max(num_kv_heads, ranks)


def cache(place: Placement, cache: "PagedKVCache") -> None:
    """Sizes of a cache against the ranks that share them."""
    validate.cache_shape(cache)
    _multiple("num_blocks", cache.num_blocks, place, "data")
    _multiple("batch_size", cache.batch_size, place, "data")
    _multiple("block_size", cache.block_size, place, "context")
    _multiple("num_kv_heads of the cache", cache.num_kv_heads, place, "tensor")


def call(place: Placement, arrays: "Arrays", options: "Options") -> None:
    """What is known before a call is shared out; each device checks its own part again."""
    cache(place, arrays.cache)
    kv_heads, tokens = arrays.cache.num_kv_heads, None
    if arrays.query is not None:
        variant = _variant(arrays, options)
        validate.attention_problem(
            _of_tokens(arrays.cache, arrays.query), arrays.query, None, variant
        )
        _multiple("num_query_heads", arrays.query.shape[1], place, "tensor")
        tokens = arrays.query.shape[0]
        for name, per_head in (("sinks", arrays.sinks), ("alibi_slopes", arrays.slopes)):
            validate.per_head(name, per_head, arrays.query.shape[1])
        _kernel_knows_positions(place, variant, options)
    if arrays.keys is not None:
        _new_heads(place, kv_heads, arrays.keys)
        if tokens is not None:
            validate.same_tokens(arrays.query, arrays.keys)
        tokens = arrays.keys.shape[0]
    assert tokens is not None
    _multiple("num_tokens", tokens, place, "data")
    _starts(place, arrays.cache, arrays.starts, tokens)
    _values(place, arrays, options, tokens)


def _variant(arrays: "Arrays", options: "Options") -> Any:
    return validate.variant(arrays.cache.head_dim, *options.scoring, arrays.slopes is not None)


def _of_tokens(cache: "PagedKVCache", query: Any) -> "PagedKVCache":
    """A cache whose batch has a row per token: what is checked is the form of the query."""
    rows = jax.ShapeDtypeStruct((query.shape[0], cache.max_blocks_per_seq), np.int32)
    lengths = jax.ShapeDtypeStruct(query.shape[:1], np.int32)
    return replace(cache, block_table=rows, seq_lengths=lengths)


def _kernel_knows_positions(place: Placement, variant: Any, options: "Options") -> None:
    name = validate.implementation_name(options.implementation, options.interpret)
    if place.context is None or name in (None, "xla"):
        return
    if variant.window is not None or variant.has_alibi:
        raise NotImplementedError(
            f"implementation={name!r} over context={place.context!r} takes no window and no ALiBi: "
            "no kernel knows where the keys of one rank stand; use implementation=None, which "
            "attends to them in XLA"
        )


def _new_heads(place: Placement, kv_heads: int, keys: Any) -> None:
    """New keys have the heads of the cache, or those of a model whose heads chips share."""
    ranks = place.ranks(place.tensor)
    heads = keys.shape[1] if keys.ndim == 3 else None
    if heads == kv_heads or (heads and kv_heads == ranks and ranks % heads == 0):
        return
    raise ValueError(
        f"keys {keys.shape} must be (num_tokens, num_kv_heads, head_dim) with the {kv_heads} heads "
        f"of the cache, or, where it has one for each of the {ranks} ranks of "
        f"tensor={place.tensor!r}, with a number of heads that divides them"
    )


def _starts(place: Placement, cache: "PagedKVCache", starts: Any, num_tokens: int) -> None:
    if starts is None:
        return validate.start_locations(cache, None, num_tokens)
    ranks = place.ranks(place.data)
    rows = cache.batch_size // ranks + 1
    shape = (rows,) if place.data is None else (ranks, rows)
    if starts.shape != shape:
        form = "(batch + 1,)" if place.data is None else "(data ranks, batch of a rank + 1)"
        raise ValueError(f"query_start_loc {starts.shape} must be {form} = {shape}")


def _multiple(name: str, size: int, place: Placement, role: str) -> None:
    axis = getattr(place, role)
    ranks = place.ranks(axis)
    if size % ranks:
        raise ValueError(
            f"{name}={size} must be a multiple of the {ranks} ranks of {role}={axis!r}; "
            f"{_WAYS_OUT[role]}"
        )


_WAYS_OUT = {
    "data": "pad it: rows of length 0 and tokens past query_start_loc cost nothing",
    "tensor": "init_sharded_cache gives each rank a head where a model has fewer",
    "context": "choose a larger block_size, of which each rank holds its part",
}


def pools_in_place(place: Placement, cache: "PagedKVCache", spec: Any) -> None:
    """Where axes are explicit, pools lie as the spec says: to move one is never meant."""
    expected = place.explicit(spec)
    for name in ("key_pool", "value_pool"):
        actual = jax.typeof(getattr(cache, name)).sharding.spec
        if expected is not None and _filled(actual, expected) != tuple(expected):
            raise ValueError(
                f"{name} is placed as {actual}, but must be placed as {expected}: make the cache "
                "with init_sharded_cache, or place it by cache_partition_specs"
            )


def _filled(spec: P, like: P) -> tuple:
    return (*spec, *(None,) * (len(like) - len(spec)))


def _values(place: Placement, arrays: "Arrays", options: "Options", num_tokens: int) -> None:
    """The checks of values that the ops make eagerly, for each data rank."""
    for rank, cache, starts in _by_rank(place, arrays.cache, arrays.starts):
        shape = validate.cache_shape(cache)
        shape = replace(shape, num_blocks=shape.num_blocks // place.ranks(place.data))
        try:
            tokens = num_tokens // place.ranks(place.data)
            validate_values.start_locations(cache, starts, tokens)
            if arrays.keys is not None:
                validate_values.new_slots(cache, shape, starts)
            if arrays.query is not None:
                variant = _variant(arrays, options)
                validate_values.used_entries(cache, shape, starts, variant)
        except ValueError as error:
            error.add_note(f"this is rank {rank} of data={place.data!r}")
            raise


def _by_rank(place: Placement, cache: "PagedKVCache", starts: Any) -> Iterator[tuple]:
    """(rank, cache, query_start_loc) with the rows of each data rank, if all can be looked at."""
    arrays = [x for x in (cache.block_table, cache.seq_lengths, starts) if x is not None]
    if not validate.is_concrete(*arrays):
        return
    if not all(getattr(x, "is_fully_addressable", True) for x in arrays):
        return
    table, lengths, *rest = map(np.asarray, arrays)
    ranks = place.ranks(place.data)
    for rank in range(ranks):
        own = slice(rank * len(table) // ranks, (rank + 1) * len(table) // ranks)
        part = replace(cache, block_table=table[own], seq_lengths=lengths[own])
        yield rank, part, rest[0].reshape(ranks, -1)[rank] if rest else None
