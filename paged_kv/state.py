"""Batched ops on lengths, tables and whole blocks: pure functions, no host sync under jit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int32

from . import validate, validate_values
from .cache import PagedKVCache
from .kernels.core import layout


def advance(cache: PagedKVCache, num_new_tokens: int | Int32[Array, "batch"]) -> PagedKVCache:
    """Lengthens sequences by this step's tokens: once per step, before the layers.

    Args:
      cache: of one layer or a stack.
      num_new_tokens: tokens per sequence, one int for all or int32 (batch,).

    Raises:
      ValueError: a count is negative, or a length would pass its row (concrete values only).
    """
    counts = validate.token_counts("num_new_tokens", num_new_tokens, cache)
    validate_values.advanced(cache, counts)
    return replace(cache, seq_lengths=cache.seq_lengths + counts)


def truncate(cache: PagedKVCache, seq_lengths: int | Int32[Array, "batch"]) -> PagedKVCache:
    """Rolls sequences back to shorter lengths, as after rejected speculative tokens.

    Blocks stay in the table, for the next tokens.  Under jit a longer length changes nothing.

    Args:
      cache: of one layer or a stack.
      seq_lengths: tokens that stay of each sequence, one int for all or int32 (batch,).

    Raises:
      ValueError: a length is negative or longer than the present one (concrete values only).
    """
    lengths = validate.token_counts("seq_lengths", seq_lengths, cache)
    validate_values.truncated(cache, lengths)
    return replace(cache, seq_lengths=jnp.clip(lengths, 0, cache.seq_lengths))


def reset_sequences(cache: PagedKVCache, mask: Bool[Array, "batch"]) -> PagedKVCache:
    """Empties the sequences where `mask` is true: length 0 and a row of -1.

    Their blocks can be handed out again; `scrub_blocks` wipes what is in them.

    Args:
      cache: of one layer or a stack.
      mask: bool (batch,), the rows to empty.

    Raises:
      ValueError: `mask` is not bool (batch,).
    """
    validate.row_mask("mask", mask, cache)
    mask = jnp.asarray(mask)
    return replace(
        cache,
        block_table=jnp.where(mask[:, None], -1, cache.block_table),
        seq_lengths=jnp.where(mask, 0, cache.seq_lengths),
    )


def set_block_table(
    cache: PagedKVCache,
    block_table: Int32[Array, "batch max_blocks_per_seq"],
    mask: Bool[Array, "batch"] | None = None,
) -> PagedKVCache:
    """Replaces the table, or the rows of it where `mask` is true.  Lengths stay.

    Two sequences may share a block: the way to share a prefix on purpose.  The new table lies where
    the old one does, on a mesh too.

    Args:
      cache: of one layer or a stack.
      block_table: int32 (batch, max_blocks_per_seq), ids of blocks, -1 where there is none.
      mask: bool (batch,), the rows to replace; None: all.

    Raises:
      ValueError: shapes or dtypes differ from the cache's, or `mask` is not bool (batch,).
    """
    validate.same_table(block_table, cache)
    block_table = jnp.asarray(block_table)
    if mask is not None:
        validate.row_mask("mask", mask, cache)
        block_table = jnp.where(jnp.asarray(mask)[:, None], block_table, cache.block_table)
    return replace(cache, block_table=_placed_like(cache.block_table, block_table))


def _placed_like(old: Array, new: Array) -> Array:
    """`new` over the devices of `old`, if that lies over a mesh."""
    if validate.is_concrete(old, new):
        is_on_mesh = isinstance(getattr(old, "sharding", None), NamedSharding)
        return jax.device_put(new, old.sharding) if is_on_mesh else new
    sharding = jax.typeof(old).sharding  # of explicit axes
    return new if jax.typeof(new).sharding == sharding else jax.sharding.reshard(new, sharding)


def copy_blocks(
    cache: PagedKVCache, source_ids: Int32[Array, "n"], target_ids: Int32[Array, "n"]
) -> PagedKVCache:
    """Copies whole blocks, keys and values of all layers: the copy in copy-on-write.

    All sources are read before any target is written.

    Args:
      cache: of one layer or a stack.
      source_ids, target_ids: int32 (n,), ids of blocks.  A pair with one below 0 is skipped.

    Raises:
      ValueError: the two differ in shape, or are not int32 (n,); an id is past the pool or a target
        is named twice (concrete values only; under jit a pair past the pool is skipped).

    Source: the copy-on-write of vLLM (Kwon et al., 2023).
    """
    source, target = validate.id_pairs(source_ids, target_ids)
    validate_values.block_ids("source_ids", source, cache.num_blocks)
    validate_values.block_ids("target_ids", target, cache.num_blocks)
    validate_values.different_targets(target)
    is_valid = in_pool(source, cache) & in_pool(target, cache)
    target = jnp.where(is_valid, target, cache.num_blocks)
    source = jnp.where(is_valid, source, 0)

    def copy(pool: Array) -> Array:
        layers = layout.as_layers(pool, cache.num_layers is not None)
        blocks = layers[:, source]
        return layers.at[:, target].set(blocks, mode="drop").reshape(pool.shape)

    with jax.named_scope("paged_kv.copy_blocks"):
        return replace(cache, key_pool=copy(cache.key_pool), value_pool=copy(cache.value_pool))


def scrub_blocks(cache: PagedKVCache, block_ids: Int32[Array, "n"]) -> PagedKVCache:
    """Zeroes whole blocks, keys and values of all layers, so that no tenant finds another's.

    Args:
      cache: of one layer or a stack.
      block_ids: int32 (n,), ids of blocks.  Those below 0 are skipped.

    Raises:
      ValueError: `block_ids` is not int32 (n,), or an id is past the pool (concrete values only;
        under jit it is skipped).
    """
    ids = validate.ids("block_ids", block_ids)
    validate_values.block_ids("block_ids", ids, cache.num_blocks)
    ids = jnp.where(in_pool(ids, cache), ids, cache.num_blocks)

    def scrub(pool: Array) -> Array:
        layers = layout.as_layers(pool, cache.num_layers is not None)
        return layers.at[:, ids].set(jnp.zeros((), pool.dtype), mode="drop").reshape(pool.shape)

    with jax.named_scope("paged_kv.scrub_blocks"):
        return replace(cache, key_pool=scrub(cache.key_pool), value_pool=scrub(cache.value_pool))


def slot_mapping(
    cache: PagedKVCache,
    *,
    query_start_loc: Int32[Array, "batch_plus_1"] | None = None,
    num_tokens: int,
) -> Int32[Array, "num_tokens"]:
    """Slot of each of this step's tokens, `block * block_size + offset`; -1 where there is none.

    Args:
      cache: advanced already: the step's tokens are the last of each sequence.
      query_start_loc: int32 (batch + 1,), prefix sums of tokens per sequence; None: one each.
      num_tokens: packed tokens, padding included.

    Raises:
      ValueError: `query_start_loc` does not fit the batch or `num_tokens`, or the fields of the
        cache do not agree.

    Source: the slot mapping of vLLM.
    """
    shape = validate.cache_shape(cache)
    validate.start_locations(cache, query_start_loc, num_tokens)
    validate_values.start_locations(cache, query_start_loc, num_tokens)
    starts = layout.start_locations(query_start_loc, shape.batch)
    token = layout.locate_tokens(starts, cache.seq_lengths, num_tokens)
    slots = layout.locate_slots(
        cache.block_table,
        token.sequence,
        token.position,
        block_size=shape.block_size,
        num_blocks=shape.num_blocks,
    )
    return jnp.where(slots.is_valid, slots.block * shape.block_size + slots.offset, -1)


def in_pool(ids: Array, cache: PagedKVCache) -> Array:
    """Where ids name a block of the pool, bool of the same shape."""
    return (ids >= 0) & (ids < cache.num_blocks)
