"""A cache spread over a mesh, beside the same sequences in caches of one device each.

A data rank has its own sequences and its own cache; `World` holds those caches, and as arrays of
all ranks what a sharded op takes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from poison import poisoned_cache
from ragged import LENGTHS, STARTS, int32, normal

import paged_kv

HEAD_DIM = 8
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of a mesh's axes, and what is on it; 0 leaves an axis out."""

    data: int = 0
    tensor: int = 0
    context: int = 0
    kv_heads: int = 2
    heads: int = 4
    is_packed: bool = True  # chunks of several tokens, with padding
    kind: AxisType = AUTO

    @property
    def axes(self):
        names = ("data", "tensor", "context")
        return {name: name for name in names if getattr(self, name)}

    @functools.cached_property
    def mesh(self):
        shape = tuple(getattr(self, name) for name in self.axes)
        return jax.make_mesh(shape, tuple(self.axes), axis_types=(self.kind,) * len(shape))

    @functools.cached_property
    def caches(self):
        """One per data rank, advanced by this step's tokens, which are not yet written."""
        make = lambda seed: (
            poisoned_cache(
                np.random.default_rng(seed),
                np.roll(LENGTHS, seed),
                capacity=np.roll(LENGTHS, seed) + 8,
                num_kv_heads=self.cache_heads,
                head_dim=HEAD_DIM,
                num_blocks=24,
                max_blocks_per_seq=4,
            ).cache
        )
        counts = int32(np.diff(STARTS)) if self.is_packed else 1
        caches = [paged_kv.advance(make(seed), counts) for seed in range(max(self.data, 1))]
        return [jax.tree.map(self.shared_heads, c) for c in caches]

    @property
    def cache_heads(self):
        return max(self.kv_heads, self.tensor)

    def shared_heads(self, x):
        """Pools in which chips that share a head hold the same."""
        if x.ndim < 4 or self.cache_heads == self.kv_heads:
            return x
        return jnp.repeat(x[..., : self.kv_heads, :], self.cache_heads // self.kv_heads, axis=-2)

    @functools.cached_property
    def tokens(self):
        """query, keys, values of all ranks."""
        num_tokens = max(self.data, 1) * (14 if self.is_packed else len(LENGTHS))
        query = normal(1, num_tokens, self.heads, HEAD_DIM)
        return query, *normal(2, 2, num_tokens, self.kv_heads, HEAD_DIM)

    @property
    def starts(self):
        if not self.is_packed:
            return None
        return jnp.tile(int32(STARTS), (self.data, 1)) if self.data else int32(STARTS)

    def placed(self):
        """The cache of all ranks, on the mesh."""
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *self.caches)
        specs = paged_kv.cache_partition_specs(whole, **self.axes)
        return jax.device_put(whole, jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs))

    def expected(self, **options):
        """((out, lse), cache), rank after rank."""
        call = jax.jit(functools.partial(paged_kv.append_and_attend, **static(options)))
        starts = int32(STARTS) if self.is_packed else None
        ranks = len(self.caches)
        parts = zip(*(np.split(x, ranks) for x in self.tokens), self.caches, strict=True)
        results = []
        for query, keys, values, cache in parts:
            new = [jnp.repeat(x, self.cache_heads // self.kv_heads, 1) for x in (keys, values)]
            results.append(call(query, *new, cache, query_start_loc=starts, **arrays(options)))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)

    def actual(self, **options):
        """The same in one call over the mesh."""
        call = functools.partial(paged_kv.sharded_append_and_attend, self.mesh, **self.axes)
        call = jax.jit(functools.partial(call, **static(options)))
        return call(*self.tokens, self.placed(), query_start_loc=self.starts, **arrays(options))


def arrays(options):
    return {name: x for name, x in options.items() if isinstance(x, jax.Array)}


def static(options):
    return {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
