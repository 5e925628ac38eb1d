"""The ragged batch of the contract tests: every edge of a block, padding, an empty row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from poison import poisoned_cache

import paged_kv

LENGTHS = [0, 1, 15, 16, 17, 40]
STARTS = [0, 0, 1, 4, 4, 9, 11]  # tokens of the step per sequence: 0, 1, 3, 0, 5, 2
NUM_TOKENS = 14  # three of padding
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
ARRAYS = jax.Array, paged_kv.Schedule


def int32(values):
    return jnp.asarray(values, jnp.int32)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_query(num_tokens=NUM_TOKENS, dtype=jnp.float32):
    return normal(1, num_tokens, HEADS, HEAD_DIM, dtype=dtype)


def cache_of(seed=0, lengths=LENGTHS, room=0, **options):
    """A poisoned cache of these lengths, with blocks for `room` more tokens per sequence."""
    sizes = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "capacity": np.array(lengths) + room}
    return poisoned_cache(np.random.default_rng(seed), lengths, **{**sizes, **options})


def slots_of(cache, starts, num_tokens):
    """The oracle's slot of every packed token."""
    return oracle.slots(
        np.asarray(cache.block_table),
        np.asarray(cache.seq_lengths),
        cache.block_size,
        cache.num_blocks,
        starts,
        num_tokens,
    )


def attend(query, cache, starts=None, **options):
    """(out, lse) under jit, compiled once per set of options: arrays traced, the rest static."""
    arrays = {name: x for name, x in options.items() if isinstance(x, ARRAYS)}
    static = {name: x for name, x in options.items() if name not in arrays}
    starts = None if starts is None else int32(starts)
    return _attend(query, cache, starts, arrays, tuple(static.items()))


@functools.partial(jax.jit, static_argnums=4)
def _attend(query, cache, starts, arrays, static):
    return paged_kv.paged_attention(
        query, cache, query_start_loc=starts, return_residual=True, **arrays, **dict(static)
    )
