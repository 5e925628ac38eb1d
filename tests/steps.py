"""Whole steps of a small model over a stacked cache, for compiling on any target.

A model here is no more than its attention: a layer adds what it attends to, and projects nothing.
What is tested with it is what happens to the pools.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from poison import poisoned_cache

import paged_kv
from paged_kv import interop


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pools far larger than any other array of the step, so that a copy of one stands out."""

    num_layers: int = 3
    num_blocks: int = 512
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 128
    batch: int = 4
    max_blocks_per_seq: int = 4
    dtype: str = "bfloat16"
    packed: bool = False

    @property
    def layer_elements(self):
        """Elements of one layer's pool."""
        return self.num_blocks * self.block_size * self.num_kv_heads * self.head_dim


def arguments(sizes, num_tokens=None, sharding=None):
    """Shapes of (activations, query_start_loc, cache); `num_tokens` is None for decode."""
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    pool_shape = (sizes.num_blocks, sizes.block_size, sizes.num_kv_heads, sizes.head_dim)
    pool = array(sizes.num_layers, *pool_shape, dtype=sizes.dtype)
    cache = paged_kv.PagedKVCache(
        pool, pool, array(sizes.batch, sizes.max_blocks_per_seq), array(sizes.batch)
    )
    if sizes.packed:
        packed = jax.eval_shape(interop.pack, cache)
        cache = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), packed)
    heads = sizes.group * sizes.num_kv_heads
    rows = sizes.batch if num_tokens is None else num_tokens
    activations = array(rows, heads, sizes.head_dim, dtype=sizes.dtype)
    return activations, None if num_tokens is None else array(sizes.batch + 1), cache


def model_step(activations, query_start_loc, cache, implementation=None, interpret=None):
    """Advances, then scans over the layers with one schedule: (activations, cache)."""
    counts = 1 if query_start_loc is None else query_start_loc[1:] - query_start_loc[:-1]
    cache = paged_kv.advance(cache, counts)
    schedule = paged_kv.make_schedule(
        cache,
        num_query_heads=activations.shape[1],
        query_start_loc=query_start_loc,
        num_tokens=len(activations),
    )

    def layer_step(carry, layer):
        x, cache = carry
        new = x[:, : cache.num_kv_heads]
        out, cache = paged_kv.append_and_attend(
            x, new, -new, cache, query_start_loc=query_start_loc, layer=layer, schedule=schedule,
            implementation=implementation, interpret=interpret,
        )  # fmt: skip
        return (x + out, cache), None

    layers = jnp.arange(cache.num_layers, dtype=jnp.int32)
    return jax.lax.scan(layer_step, (activations, cache), layers)[0]


def ragged_arguments(dtype):
    """Arrays for `model_step`: 22 tokens of four sequences and padding, over three layers."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((24, 4, 64)), dtype)
    stack = poisoned_cache(
        rng,
        [30, 0, 16, 7],
        capacity=[31, 19, 16, 9],
        num_layers=3,
        num_kv_heads=2,
        head_dim=64,
        dtype=dtype,
    )
    return x, jnp.asarray([0, 1, 20, 20, 22], jnp.int32), stack.cache


def compile_donated(sizes, num_tokens=None, sharding=None, **options):
    """The step with its cache donated, compiled for the devices of `sharding`."""
    step = lambda *args: model_step(*args, **options)
    shapes = arguments(sizes, num_tokens, sharding)
    return jax.jit(step, donate_argnums=2).lower(*shapes).compile()
