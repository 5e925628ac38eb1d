"""Checks of user input and their error texts.

Here: what is known at trace time (shapes, dtypes, flags), which gives the `Problem`.  Checks of the
values of concrete arrays are in `validate_values`.  An error says the values, the rule and the way
out, and nothing has been changed when it is raised.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .kernels.core.layout import LANES
from .kernels.core.problem import AppendProblem, CacheShape, Problem
from .kernels.core.schedule import MadeFor, Schedule
from .kernels.core.variant import Variant

if TYPE_CHECKING:
    from .cache import PagedKVCache

UNBOUNDED = 1 << 30  # keys beside the query: no sequence is as long, and a position may be added
IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", "xla")


def is_concrete(*arrays: Any) -> bool:
    """Whether all values can be looked at: none is a tracer."""
    return not any(isinstance(x, Tracer) for x in arrays)


# ---- sizes and eager indices ---------------------------------------------------------------------


def positive_ints(sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        if not _is_int(size) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive int")


def floating(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={dtype} must be floating point; use bfloat16, float16 or float32")


def enough_memory(memory_bytes: int, block_bytes: int) -> int:
    if memory_bytes < block_bytes:
        raise ValueError(
            f"{memory_bytes=} holds no block: one takes {block_bytes} bytes (keys and values of "
            "all layers); give more memory or use a smaller block_size"
        )
    return int(memory_bytes // block_bytes)


def in_range(name: str, index: Any, size: int) -> None:
    if not _is_int(index):
        raise ValueError(f"{name}={index!r} must be an int; inside jit use the batched ops")
    if not 0 <= index < size:
        raise ValueError(f"{name}={index} must be in [0, {size})")


def not_negative(name: str, value: Any) -> None:
    if not _is_int(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be an int of at least 0")


def single_layer(function: str, cache: "PagedKVCache") -> None:
    if cache.num_layers is not None:
        raise ValueError(
            f"{function} takes a single layer's cache, this one has num_layers={cache.num_layers}; "
            "use set_block_table, append_tokens and paged_attention with layer="
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# ---- batched ops ---------------------------------------------------------------------------------


def new_tokens(cache: "PagedKVCache", keys: Any, values: Any) -> None:
    """Shapes of new keys and values against each other and the pools."""
    if keys.shape != values.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape} must have one shape")
    heads = (cache.num_kv_heads, cache.head_dim)
    if keys.ndim != 3 or keys.shape[1:] != heads:
        raise ValueError(
            f"keys and values {keys.shape} must be (num_tokens, num_kv_heads, head_dim) = "
            f"(num_tokens, {heads[0]}, {heads[1]}), as the pools have it"
        )
    floating("the dtype of keys", keys.dtype)
    floating("the dtype of values", values.dtype)


def cache_shape(cache: "PagedKVCache") -> CacheShape:
    """The static facts of a cache whose fields agree with each other."""
    pool, table, lengths = cache.key_pool, cache.block_table, cache.seq_lengths
    if pool.ndim - len(cache.POOL_AXES) not in (0, 1):
        raise ValueError(
            f"key_pool {pool.shape} must be ({', '.join(cache.POOL_AXES)}), or with num_layers in "
            "front"
        )
    if cache.is_packed:
        packed_rows(pool.shape, cache.block_size, cache.num_kv_heads, cache.head_dim)
    if cache.value_pool.shape != pool.shape or cache.value_pool.dtype != pool.dtype:
        raise ValueError(
            f"key_pool {pool.dtype}{pool.shape} and value_pool {cache.value_pool.dtype}"
            f"{cache.value_pool.shape} must have one shape and dtype"
        )
    floating("the dtype of the pools", pool.dtype)
    if table.ndim != 2 or lengths.shape != table.shape[:1]:
        raise ValueError(
            f"block_table {table.shape} must be (batch, max_blocks_per_seq) and seq_lengths "
            f"{lengths.shape} (batch,)"
        )
    _int32("block_table", table)
    _int32("seq_lengths", lengths)
    return CacheShape(
        num_layers=cache.num_layers or 1,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        dtype=str(pool.dtype),
        batch=table.shape[0],
        max_blocks_per_seq=table.shape[1],
        has_packed_pools=cache.is_packed,
    )


def packed_rows(pool_shape: Any, block_size: int, num_kv_heads: int, head_dim: int) -> None:
    """The last axes of a packed pool hold a block's tokens, and nothing else."""
    values = block_size * num_kv_heads * head_dim
    rows, lanes = pool_shape[-2:]
    if lanes != LANES or rows * lanes != values:
        raise ValueError(
            f"a packed pool has blocks of {block_size=} * {num_kv_heads=} * {head_dim=} = {values} "
            f"values in whole rows of {LANES}, not {rows} rows of {lanes}; choose a block_size "
            f"that is a multiple of {LANES // math.gcd(LANES, num_kv_heads * head_dim)}, or an "
            "unpacked cache"
        )


def layer_index(cache: "PagedKVCache", layer: Any) -> jax.Array:
    """The layer as an int32 scalar; 0 for a single layer's cache."""
    num_layers = cache.num_layers
    if num_layers is None:
        if layer is not None:
            raise ValueError(
                f"{layer=} was given, but this cache is a single layer's; leave it out"
            )
        return jnp.int32(0)
    if layer is None:
        raise ValueError(f"this cache stacks num_layers={num_layers}; say which with layer=")
    is_integer = jnp.issubdtype(getattr(layer, "dtype", jnp.float32), jnp.integer)
    if not _is_int(layer) and (jnp.ndim(layer) != 0 or not is_integer):
        raise ValueError(f"{layer=} must be an int or an int32 scalar")
    if is_concrete(layer):
        in_range("layer", int(layer), num_layers)
    return jnp.asarray(layer, jnp.int32)


def start_locations(cache: "PagedKVCache", query_start_loc: Any, num_tokens: int | None) -> None:
    """query_start_loc against the batch; None means one token each."""
    batch = cache.block_table.shape[0]
    if query_start_loc is None:
        if num_tokens is not None and num_tokens != batch:
            raise ValueError(
                f"{num_tokens} tokens for a batch of {batch}: without query_start_loc each "
                "sequence has exactly one; pass query_start_loc for a ragged batch"
            )
        return
    if query_start_loc.shape != (batch + 1,):
        raise ValueError(
            f"query_start_loc {query_start_loc.shape} must be (batch + 1,) = ({batch + 1},)"
        )
    _int32("query_start_loc", query_start_loc)


def same_tokens(query: Any, keys: Any) -> None:
    if query.shape[:1] != keys.shape[:1]:
        raise ValueError(
            f"query {query.shape} and keys {keys.shape} must have one row each per new token"
        )


def append_problem(
    cache: "PagedKVCache", keys: Any, values: Any, query_start_loc: Any
) -> AppendProblem:
    """What an append call asks."""
    shape = cache_shape(cache)
    new_tokens(cache, keys, values)
    start_locations(cache, query_start_loc, keys.shape[0])
    return AppendProblem(shape, keys.shape[0], query_start_loc is not None)


def variant(
    head_dim: int,
    scale: Any,
    is_causal: bool,
    local_window_size: Any,
    logits_soft_cap: Any,
    has_alibi: bool,
) -> Variant:
    """The static part of an attention variant."""
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    if not is_concrete(scale, logits_soft_cap) or not math.isfinite(scale):
        raise ValueError(f"{scale=} and {logits_soft_cap=} must be finite Python numbers (static)")
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(f"{logits_soft_cap=} must be positive and finite; None means no cap")
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    return Variant(float(scale), bool(is_causal), window(local_window_size), cap, has_alibi)


def window(local_window_size: Any) -> tuple[int, int] | None:
    """(left, right) keys beside the query's own."""
    if local_window_size is None:
        return None
    pair = local_window_size
    if _is_int(pair):
        pair = (pair, pair)
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(_is_int(side) and side >= 0 for side in pair)
    ):
        raise ValueError(
            f"{local_window_size=} must be an int or (left, right) of at least 0, keys beside the "
            "query's own; sliding_window=W elsewhere is (W - 1, 0) here"
        )
    return min(int(pair[0]), UNBOUNDED), min(int(pair[1]), UNBOUNDED)


def attention_problem(
    cache: "PagedKVCache", query: Any, query_start_loc: Any, variant: Variant
) -> Problem:
    """What an attention call asks."""
    shape = cache_shape(cache)
    if query.ndim != 3 or query.shape[2] != shape.head_dim:
        raise ValueError(
            f"query {query.shape} must be (num_tokens, num_query_heads, head_dim={shape.head_dim})"
        )
    floating("the dtype of query", query.dtype)
    query_heads(query.shape[1], shape.num_kv_heads)
    start_locations(cache, query_start_loc, query.shape[0])
    return Problem(
        cache=shape,
        num_tokens=query.shape[0],
        num_query_heads=query.shape[1],
        query_dtype=str(query.dtype),
        is_packed=query_start_loc is not None,
        variant=variant,
    )


def query_heads(num_query_heads: int, num_kv_heads: int) -> None:
    positive_ints({"num_query_heads": num_query_heads})
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{num_query_heads=} must be a multiple of {num_kv_heads=}")


def per_head(name: str, array: Any, num_query_heads: int) -> None:
    """Sinks or slopes, which may be absent."""
    if array is None:
        return
    if array.shape != (num_query_heads,):
        raise ValueError(f"{name} {array.shape} must be (num_query_heads,) = ({num_query_heads},)")
    floating(f"the dtype of {name}", array.dtype)


def partial_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> None:
    """Two (out, lse) pairs over the same rows."""
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b {out_b.shape} must be shaped as out_a, {out_a.shape}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        rows_of(name, lse, out_a)


def rows_of(name: str, lse: Any, out: Any) -> None:
    if lse.shape != out.shape[:-1]:
        raise ValueError(f"{name} {lse.shape} must be the rows of out, {out.shape[:-1]}")


def implementation_name(implementation: Any, interpret: Any = None) -> str | None:
    """The name, or None for the best; only a named kernel can be interpreted."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{implementation=} must be None (the best for the platform) or one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation is None and interpret:
        raise ValueError(
            f"{interpret=} needs the name of a kernel: implementation='mosaic_tpu' or 'mosaic_gpu'"
        )
    return implementation


def schedule_tokens(cache: "PagedKVCache", query_start_loc: Any, num_tokens: Any) -> None:
    """num_tokens, which may be absent, and query_start_loc against the batch."""
    if num_tokens is not None:
        positive_ints({"num_tokens": num_tokens})
    start_locations(cache, query_start_loc, num_tokens)


def schedule_matches(schedule: Schedule, made_for: MadeFor) -> None:
    if schedule.made_for.num_tokens is None:
        made_for = replace(made_for, num_tokens=None)
    if schedule.made_for != made_for:
        theirs, ours = vars(schedule.made_for), vars(made_for)
        wrong = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
        raise ValueError(
            "this schedule was made for another call, (made for, called with): "
            f"{wrong}; make one with make_schedule"
        )


def _int32(name: str, array: Any) -> None:
    if array.dtype != jnp.int32:
        raise ValueError(f"{name} has dtype {array.dtype}, it must be int32")


# ---- lengths, tables and block ids ---------------------------------------------------------------


def token_counts(name: str, counts: Any, cache: "PagedKVCache") -> Any:
    """One int for all sequences, or int32 (batch,)."""
    if _is_int(counts):
        bounds = jnp.iinfo(jnp.int32)  # what lies outside is out of any range, too
        counts = min(max(int(counts), bounds.min), bounds.max)
        return jnp.full(cache.seq_lengths.shape, counts, jnp.int32)
    shape = cache.seq_lengths.shape
    is_int32 = getattr(counts, "dtype", None) == jnp.int32
    if not is_int32 or jnp.shape(counts) not in ((), shape):
        raise ValueError(f"{name}={counts!r} must be an int or int32 (batch,) = {shape}")
    return jnp.broadcast_to(jnp.asarray(counts), shape)


def row_mask(name: str, mask: Any, cache: "PagedKVCache") -> None:
    shape = cache.seq_lengths.shape
    if mask.shape != shape or mask.dtype != jnp.bool_:
        raise ValueError(f"{name} {mask.dtype}{mask.shape} must be bool (batch,) = {shape}")


def same_table(block_table: Any, cache: "PagedKVCache") -> None:
    if block_table.shape != cache.block_table.shape:
        raise ValueError(
            f"block_table {block_table.shape} must be (batch, max_blocks_per_seq) = "
            f"{cache.block_table.shape}"
        )
    _int32("block_table", block_table)


def ids(name: str, block_ids: Any) -> jax.Array:
    """Block ids as int32 (n,)."""
    array = jnp.asarray(block_ids)
    if array.ndim != 1 or (array.size and array.dtype != jnp.int32):
        raise ValueError(f"{name} {array.dtype}{array.shape} must be int32 (n,)")
    return array.astype(jnp.int32)


def id_pairs(source_ids: Any, target_ids: Any) -> tuple[jax.Array, jax.Array]:
    """Source and target ids as int32 (n,) each."""
    source, target = ids("source_ids", source_ids), ids("target_ids", target_ids)
    if source.shape != target.shape:
        raise ValueError(f"source_ids {source.shape} and target_ids {target.shape} must pair up")
    return source, target
