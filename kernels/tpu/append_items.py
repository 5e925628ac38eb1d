"""The new tokens of a step in items of at most so many, each within one block, as int32 arrays."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..core import layout
from ..core.problem import AppendProblem


class Items(NamedTuple):
    """(num_items,) each.  An item is an aligned group of slots; those not in use come last."""

    block: Array  # physical, always in the pool
    offset: Array  # of the item's first slot in its block
    start: Array  # slots [start, stop) of the item get new tokens; none do if a slot is missing
    stop: Array
    first_token: Array  # packed index of what slot 0 would get, which may be no new token


def find_items(
    problem: AppendProblem,
    tokens_per_item: int,
    num_items: int,
    table: Array,
    lengths: Array,
    starts: Array,
) -> Items:
    """num_items: that suffice for any step, `append_plan.num_items`."""
    cache, size = problem.cache, tokens_per_item
    first = jnp.maximum(lengths - (starts[1:] - starts[:-1]), 0)
    shift = starts[1:] - lengths  # from a position to a packed index
    first_item = first // size
    if problem.is_packed:
        counts = jnp.maximum((lengths + (size - 1)) // size - first_item, 0)
        ends = jnp.cumsum(jnp.where(lengths > first, counts, 0), dtype=jnp.int32)
        begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        item = jnp.arange(num_items, dtype=jnp.int32)[None, :]
        is_of = (item >= begins[:, None]) & (item < ends[:, None])  # (batch, num_items)
        pick = lambda x: jnp.sum(jnp.where(is_of, x[:, None], 0), axis=0, dtype=jnp.int32)
        sequence, item_0 = pick(jnp.arange(cache.batch, dtype=jnp.int32)), pick(first_item - begins)
        first, lengths, shift = pick(first), pick(lengths), pick(shift)
        position = (item_0 + item[0]) * size
    else:
        sequence, position = jnp.arange(cache.batch, dtype=jnp.int32), first_item * size
    slots = layout.locate_slots(
        table, sequence, position, block_size=cache.block_size, num_blocks=cache.num_blocks
    )
    start = jnp.clip(first - position, 0, size)
    stop = jnp.where(slots.is_valid, jnp.clip(lengths - position, 0, size), 0)
    block = jnp.minimum(slots.block, cache.num_blocks - 1)
    return Items(block, slots.offset, start, jnp.maximum(stop, start), shift + position)
