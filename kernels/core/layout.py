"""Where things are: the position of a packed token, the block and offset of a position.

Everything is integer arithmetic on small arrays, traced by XLA around the kernels.

Source: tables and slots are those of vLLM (Kwon et al., 2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LANES = 128  # values of a row of a packed pool: the width of a TPU's registers


class Tokens(NamedTuple):
    """Packed tokens, int32 (num_tokens,) each; a padding token has a negative position."""

    sequence: Array  # row of the table, in range for padding tokens too
    step_index: Array  # within the sequence's tokens of this step
    position: Array  # within the sequence

    @property
    def is_real(self) -> Array:
        return self.position >= 0


class Slots(NamedTuple):
    """Cache slots, int32 each; where `is_valid` is false, block is `num_blocks`."""

    block: Array
    offset: Array
    is_valid: Array


def start_locations(query_start_loc: Array | None, batch: int) -> Array:
    """query_start_loc as an array, also where None stands for one token per sequence."""
    return jnp.arange(batch + 1, dtype=jnp.int32) if query_start_loc is None else query_start_loc


def locate_tokens(query_start_loc: Array, seq_lengths: Array, num_tokens: int) -> Tokens:
    """Sequence and position of each packed token; query tokens are a sequence's last ones."""
    batch = seq_lengths.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(
        query_start_loc[1:], token, side="right", method="compare_all"
    ).astype(jnp.int32)
    is_real = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    index = token - query_start_loc[sequence]
    position = seq_lengths[sequence] - query_start_loc[sequence + 1] + token
    return Tokens(sequence, index, jnp.where(is_real, position, -1))


def locate_slots(
    block_table: Array, sequence: Array, position: Array, *, block_size: int, num_blocks: int
) -> Slots:
    """Slot of each (sequence, position); never the last block for an entry of -1."""
    max_blocks = block_table.shape[1]
    index = position // block_size
    is_inside = (position >= 0) & (index < max_blocks)
    block = block_table[sequence, jnp.where(is_inside, index, 0)]
    is_valid = is_inside & (block >= 0) & (block < num_blocks)
    return Slots(jnp.where(is_valid, block, num_blocks), position % block_size, is_valid)


def lengths_if_valid(
    block_table: Array,
    seq_lengths: Array,
    start: Array | None,
    stop: Array,
    *,
    block_size: int,
    num_blocks: int,
) -> Array:
    """`seq_lengths` (batch,), 0 where a table entry that covers keys [start, stop) names no block
    of the pool; start None: 0.

    One reduction, no quotients and little work per entry, so that a GPU does it in one launch.
    """
    lengths = jnp.where(stop > block_table.shape[1] * block_size, 0, seq_lengths)
    if block_table.shape[1] == 0:
        return lengths
    if start is not None:
        stop = jnp.where(stop > start, stop, 0)
    first = jnp.arange(block_table.shape[1], dtype=jnp.int32)[None, :] * block_size
    # as an unsigned number a negative entry is past every pool too
    is_outside = jax.lax.bitcast_convert_type(block_table, jnp.uint32) >= num_blocks
    is_bad = (first < stop[:, None]) & is_outside
    if start is not None:
        is_bad &= first > start[:, None] - block_size
    return jnp.min(jnp.where(is_bad, 0, lengths[:, None]), axis=1)


def as_layers(pool: Array, is_stacked: bool) -> Array:
    """A pool with a leading layer axis, added if it has none; a bitcast."""
    return pool if is_stacked else jax.lax.expand_dims(pool, [0])


def result(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: Array
) -> jax.ShapeDtypeStruct:
    """What a kernel returns: varies over the axes of a `shard_map` that `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
