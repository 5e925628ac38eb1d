"""Compiles for TPUs that are not here: libtpu needs no device to compile for one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import paged_kv

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def sharding(target):
    """Where arrays of a program for `target` live: on one of its devices."""
    topology = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu")
    return SingleDeviceSharding(topology.devices[0])


@dataclasses.dataclass(frozen=True)
class Case:
    """A step's shapes; `tokens` counts the packed tokens of a step, None is one per sequence."""

    target: str
    head_dim: int = 128
    block_size: int = 16
    num_kv_heads: int = 8
    group: int = 4
    dtype: str = "bfloat16"
    tokens: int | None = None
    batch: int = 8
    options: tuple = ()  # of paged_attention, name and value
    num_layers: int | None = None
    num_blocks: int = 1024
    max_blocks_per_seq: int = 512

    def array(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(self.target))

    @property
    def pool_elements(self):
        """Of one layer."""
        return self.num_blocks * self.block_size * self.num_kv_heads * self.head_dim

    @property
    def cache(self):
        layers = () if self.num_layers is None else (self.num_layers,)
        pool = self.array(
            (*layers, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim),
            self.dtype,
        )
        table = self.array((self.batch, self.max_blocks_per_seq), jnp.int32)
        return paged_kv.PagedKVCache(pool, pool, table, self.array((self.batch,), jnp.int32))

    @property
    def starts(self):
        return None if self.tokens is None else self.array((self.batch + 1,), jnp.int32)

    def packed(self, heads, dtype=None):
        tokens = self.batch if self.tokens is None else self.tokens
        return self.array((tokens, heads, self.head_dim), dtype or self.dtype)


def attention(case):
    """The compiled `paged_attention` of a case, by the kernel."""
    heads = case.num_kv_heads * case.group
    options = dict(case.options)
    slopes = case.array((heads,), jnp.float32) if options.pop("alibi", False) else None

    def run(query, cache, starts, slopes):
        return paged_kv.paged_attention(
            query,
            cache,
            query_start_loc=starts,
            layer=None if case.num_layers is None else 0,
            alibi_slopes=slopes,
            return_residual=True,
            implementation="mosaic_tpu",
            **options,
        )

    return jax.jit(run).lower(case.packed(heads), case.cache, case.starts, slopes).compile()


def append(case):
    """The compiled `append_tokens` of a case, by the kernel, the cache donated."""
    new = case.packed(case.num_kv_heads)

    def run(cache, keys, values, starts):
        return paged_kv.append_tokens(
            cache,
            keys,
            values,
            query_start_loc=starts,
            layer=None if case.num_layers is None else 0,
            implementation="mosaic_tpu",
        )

    return jax.jit(run, donate_argnums=0).lower(case.cache, new, new, case.starts).compile()


def decode_step(case):
    """A donated step over all layers of a stacked cache, in a scan, compiled."""
    heads = case.num_kv_heads * case.group
    new = case.packed(case.num_kv_heads)

    def step(cache, query, keys, values):
        cache = paged_kv.advance(cache, 1)

        def layer(carry, index):
            query, cache = carry
            out, cache = paged_kv.append_and_attend(query, keys, values, cache, layer=index)
            return (out, cache), None

        layers = jnp.arange(case.num_layers, dtype=jnp.int32)
        (out, cache), _ = jax.lax.scan(layer, (query, cache), layers)
        return out, cache

    return jax.jit(step, donate_argnums=0).lower(case.cache, case.packed(heads), new, new).compile()
