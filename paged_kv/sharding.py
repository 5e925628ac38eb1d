"""Ops on a cache that is spread over the devices of a mesh.

Three axes, each optional, each a mesh axis or a tuple of them:

- `tensor`: kv heads, and with them their query heads.  No collective.
- `data`: sequences.  Each data rank has its own rows of the table, its own blocks, with ids that
  count from 0 on each rank, and its own packed tokens.  No collective.
- `context`: the slots of every block, so that one long sequence is read by several chips.  Tables,
  ids and lengths are those of the whole cache; only the partial results of a step, (out, lse), meet
  in an all-reduce.

No op moves a pool.  The cache stays one `PagedKVCache` of global arrays: `advance`, `truncate`,
`set_block_table` and `reset_sequences` take it as it is.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from . import device_part, validate, validate_sharding
from .cache import PagedKVCache, init_paged_kv_cache
from .device_part import Arrays, Options
from .ops import Implementation
from .validate_sharding import Axis, Placement


def cache_partition_specs(
    cache: PagedKVCache, *, data: Axis = None, tensor: Axis = None, context: Axis = None
) -> PagedKVCache:
    """Where each array of a cache lies: a cache of `PartitionSpec`s.

    For `shard_map`, and for `jax.device_put` or `out_shardings` with a `NamedSharding` of each.
    Pools (num_blocks, block_size, num_kv_heads, head_dim) are cut by `data`, `context` and `tensor`
    in this order, the table and lengths by `data` along the batch.  In a packed cache rows of a
    block are cut by `context` and `tensor` together: cut by `tensor` they lie rank after rank, and
    only the sharded ops read them.

    Args:
      cache: arrays or `ShapeDtypeStruct`s, of one layer or a stack; only its form is looked at.
      data, tensor, context: names of mesh axes, or tuples of them; None where there is none.

    Returns:
      A cache whose fields are `PartitionSpec`s, of as many axes as the arrays have.

    Source: heads over a tensor axis as in Megatron (Shoeybi et al., 2019); rank-local block ids as
    in vLLM's data parallelism.
    """
    layers = () if cache.num_layers is None else (None,)
    if cache.is_packed:
        pool = P(*layers, data, _together(context, tensor), None)
    else:
        pool = P(*layers, data, context, tensor, None)
    return replace(
        cache, key_pool=pool, value_pool=pool, block_table=P(data, None), seq_lengths=P(data)
    )


def init_sharded_cache(
    mesh: Mesh,
    *,
    num_kv_heads: int,
    data: Axis = None,
    tensor: Axis = None,
    context: Axis = None,
    **sizes: Any,
) -> PagedKVCache:
    """An empty cache on the devices of a mesh, never on one of them as a whole.

    Args:
      mesh: with axes of any type; its devices may belong to several processes.
      num_kv_heads: heads of the model.  Where it divides the ranks of `tensor`, fewer heads than
        chips, the cache has a head for each chip, and a head is held by several of them.
      data, tensor, context: as in `cache_partition_specs`.
      **sizes: as in `init_paged_kv_cache`, of all ranks together: `num_blocks` and `batch_size`
        are multiples of the data ranks, `block_size` of the context ranks.

    Raises:
      ValueError: an axis is not of the mesh or named twice, a size is not a multiple of its ranks,
        or `init_paged_kv_cache` refuses a size.

    Source: heads over a tensor axis as in Megatron (Shoeybi et al., 2019), a head held by several
    chips as in vLLM.
    """
    place = Placement.of(mesh, data, tensor, context)
    heads = validate_sharding.heads_of_cache(place, num_kv_heads)
    make = partial(init_paged_kv_cache, num_kv_heads=heads, **sizes)
    cache = jax.eval_shape(make)
    validate_sharding.cache(place, cache)
    specs = cache_partition_specs(cache, data=data, tensor=tensor, context=context)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(make, out_shardings=shardings)()


def sharded_append_tokens(
    mesh: Mesh | AbstractMesh | None,
    cache: PagedKVCache,
    keys: Float[Array, "num_tokens num_new_heads head_dim"],
    values: Float[Array, "num_tokens num_new_heads head_dim"],
    *,
    data: Axis = None,
    tensor: Axis = None,
    context: Axis = None,
    query_start_loc: Int32[Array, "*ranks starts"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = None,
) -> PagedKVCache:
    """`append_tokens` on every device, each to the blocks it holds; donate the cache.

    Args:
      mesh: None means that of `jax.set_mesh`.
      cache: placed as `cache_partition_specs` says, and advanced.
      keys, values: (num_tokens, num_kv_heads, head_dim), packed; rank after rank, equally many
        with padding, where `data` is given.  Of the model's heads where a head is held by several
        chips.
      data, tensor, context: as in `cache_partition_specs`.
      query_start_loc: int32 (batch + 1,), or with `data` (data ranks, batch of a rank + 1), each
        rank's own from 0; None means one token per sequence.
      layer: which layer of a stacked cache, an int or a traced int32.
      implementation, interpret: as in `append_tokens`.

    Raises:
      ValueError: an axis is not of the mesh or named twice, a size is not a multiple of its ranks,
        a pool with explicit axes is placed otherwise; and as `append_tokens`.
      NotImplementedError: as `append_tokens`.
    """
    place = Placement.of(mesh, data, tensor, context)
    arrays = Arrays(cache, None, keys, values, query_start_loc, layer, None, None)
    options = Options(implementation=implementation, interpret=interpret)
    return _call("append", place, arrays, options)


def sharded_paged_attention(
    mesh: Mesh | AbstractMesh | None,
    query: Float[Array, "num_tokens num_query_heads head_dim"],
    cache: PagedKVCache,
    *,
    data: Axis = None,
    tensor: Axis = None,
    context: Axis = None,
    query_start_loc: Int32[Array, "*ranks starts"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "num_query_heads"] | None = None,
    alibi_slopes: Float[Array, "num_query_heads"] | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = None,
) -> Any:
    """`paged_attention` on every device, over the blocks it holds.

    Args:
      mesh: None means that of `jax.set_mesh`.
      query: (num_tokens, num_query_heads, head_dim), packed; rank after rank, equally many with
        padding, where `data` is given.
      cache: placed as `cache_partition_specs` says; the queries' own keys are appended already.
      data, tensor, context: as in `cache_partition_specs`.
      query_start_loc: int32 (batch + 1,), or with `data` (data ranks, batch of a rank + 1), each
        rank's own from 0; None means one token per sequence.
      layer: which layer of a stacked cache, an int or a traced int32.
      scale, is_causal, local_window_size, logits_soft_cap: as in `paged_attention`.
      sinks, alibi_slopes: (num_query_heads,), of all heads; sinks are applied once, after the
        merge.
      return_residual, implementation, interpret: as in `paged_attention`.

    Returns:
      What `paged_attention` returns, with tokens over `data` and heads over `tensor`.

    With `context`, decode and the keys before a prefill's own run on the kernels; a prefill's
    newest keys, windows and ALiBi run in XLA, on each chip over the keys it holds.

    Raises:
      ValueError: an axis is not of the mesh or named twice, a size is not a multiple of its ranks,
        a pool with explicit axes is placed otherwise; and as `paged_attention`.
      NotImplementedError: as `paged_attention`, and for a named kernel with `context` and a window
        or ALiBi.

    Differentiable (reverse mode) in query, pools, sinks and slopes.

    Source: context parallelism merged by lse as in Ring Attention (Liu et al., 2023) and Helix
    parallelism (Bhatia et al., 2025).
    """
    place = Placement.of(mesh, data, tensor, context)
    arrays = Arrays(cache, query, None, None, query_start_loc, layer, sinks, alibi_slopes)
    scoring = (scale, is_causal, local_window_size, logits_soft_cap)
    options = Options(*scoring, return_residual, implementation, interpret)
    return _call("attend", place, arrays, options)


def sharded_append_and_attend(
    mesh: Mesh | AbstractMesh | None,
    query: Float[Array, "num_tokens num_query_heads head_dim"],
    keys: Float[Array, "num_tokens num_new_heads head_dim"],
    values: Float[Array, "num_tokens num_new_heads head_dim"],
    cache: PagedKVCache,
    *,
    data: Axis = None,
    tensor: Axis = None,
    context: Axis = None,
    query_start_loc: Int32[Array, "*ranks starts"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "num_query_heads"] | None = None,
    alibi_slopes: Float[Array, "num_query_heads"] | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = None,
) -> tuple[Any, PagedKVCache]:
    """`sharded_append_tokens`, then `sharded_paged_attention` over the result; donate the cache.

    Args:
      mesh, cache, keys, values: as in `sharded_append_tokens`.
      data, tensor, context, query_start_loc, layer: as in `sharded_append_tokens`.
      query, scale, is_causal, local_window_size, logits_soft_cap, sinks, alibi_slopes: as in
        `sharded_paged_attention`.
      return_residual, implementation, interpret: as in `sharded_paged_attention`.

    Returns:
      What `sharded_paged_attention` returns, and the cache with the new tokens.

    Raises:
      ValueError: as both, and when query and keys differ in tokens.
      NotImplementedError: as both.
    """
    place = Placement.of(mesh, data, tensor, context)
    arrays = Arrays(cache, query, keys, values, query_start_loc, layer, sinks, alibi_slopes)
    scoring = (scale, is_causal, local_window_size, logits_soft_cap)
    options = Options(*scoring, return_residual, implementation, interpret)
    return _call("append_and_attend", place, arrays, options)


def _call(op: str, place: Placement, arrays: Arrays, options: Options) -> Any:
    """Checks a call, and runs it in one `shard_map`."""
    validate_sharding.call(place, arrays, options)
    cache = arrays.cache
    layer = validate.layer_index(cache, arrays.layer)
    arrays = arrays._replace(layer=None if cache.num_layers is None else layer)
    specs = _specs(place, arrays)
    validate_sharding.pools_in_place(place, cache, specs.cache.key_pool)
    if isinstance(window := options.local_window_size, list):
        options = options._replace(local_window_size=tuple(window))
    with jax.named_scope("paged_kv.sharded"):
        return _run(op, place, options, arrays)


def _specs(place: Placement, arrays: Arrays) -> Arrays:
    """How each array is cut."""
    data, tensor, context = place.data, place.tensor, place.context
    cache = cache_partition_specs(arrays.cache, data=data, tensor=tensor, context=context)
    is_whole = arrays.keys is None or arrays.keys.shape[1] == arrays.cache.num_kv_heads
    new = P(data, tensor if is_whole else None, None)
    starts = P() if data is None else P(data, None)
    return Arrays(cache, P(data, tensor, None), new, new, starts, P(), P(tensor), P(tensor))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(op: str, place: Placement, options: Options, arrays: Arrays) -> Any:
    specs = _specs(place, arrays)
    present = lambda array, spec: None if array is None else spec
    specs = Arrays(*map(present, arrays, specs))
    arrays = jax.tree.map(partial(_placed, place), arrays, specs)
    rows = specs.query
    result = (rows, P(*rows[:2])) if options.return_residual else rows
    out_specs: dict[str, Any] = {"append": specs.cache, "attend": result}
    out_specs["append_and_attend"] = (result, specs.cache)
    return jax.shard_map(
        partial(device_part.OPS[op], place, options),
        mesh=place.mesh,
        in_specs=(specs,),
        out_specs=out_specs[op],
    )(arrays)


def _placed(place: Placement, array: Array, spec: P) -> Array:
    """The array as `shard_map` wants it where axes are explicit; pools are there already."""
    explicit = place.explicit(spec)
    if explicit is None or jax.typeof(array).sharding.spec == explicit:
        return array
    return jax.sharding.reshard(array, NamedSharding(place.mesh, explicit))


def _together(*axes: Axis) -> tuple[str, ...] | None:
    """Axes that cut one dimension, the outer one first."""
    names = [(axis,) if isinstance(axis, str) else axis for axis in axes if axis is not None]
    return sum(names, ()) or None
