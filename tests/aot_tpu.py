"""Compiles for TPUs that are not here: libtpu needs no device to compile for one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import paged_kv

TARGETS = ("v5e", "v6e", "tpu7x")
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


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


def step(case):
    """`append_tokens` and `paged_attention` of a case by the kernels, the cache donated; compiled.

    XLA appends to float16 pools: there the step only attends.
    """
    heads = case.num_kv_heads * case.group
    options = dict(case.options)
    slopes = case.array((heads,), jnp.float32) if options.pop("alibi", False) else None
    layer = None if case.num_layers is None else 0

    def run(cache, query, new, starts, slopes):
        same = {"query_start_loc": starts, "layer": layer, "implementation": "mosaic_tpu"}
        if case.dtype != "float16":
            cache = paged_kv.append_tokens(cache, new, new, **same)
        out = paged_kv.paged_attention(query, cache, alibi_slopes=slopes, **same, **options)
        return out, cache

    arrays = case.packed(heads), case.packed(case.num_kv_heads), case.starts, slopes
    return jax.jit(run, donate_argnums=0).lower(case.cache, *arrays).compile()


def append_and_attend(case):
    """A decode step of a stacked case by the best there is, the cache donated; compiled."""
    new = case.packed(case.num_kv_heads)

    def run(cache, query, keys, values):
        return paged_kv.append_and_attend(query, keys, values, cache, layer=1)

    query = case.packed(case.num_kv_heads * case.group)
    return jax.jit(run, donate_argnums=0).lower(case.cache, query, new, new).compile()


def append(case):
    """`append_tokens` of a case by whatever fits it, the cache donated; compiled."""
    new = case.packed(case.num_kv_heads)

    def run(cache, keys, values, starts):
        layer = None if case.num_layers is None else 0
        return paged_kv.append_tokens(cache, keys, values, query_start_loc=starts, layer=layer)

    return jax.jit(run, donate_argnums=0).lower(case.cache, new, new, case.starts).compile()


def kernels_of(compiled):
    """Names of the Mosaic kernels in a program."""
    call = r'%(\w+?)[.\d]* = .*custom_call_target="tpu_custom_call"'
    return set(re.findall(call, compiled.as_text()))
