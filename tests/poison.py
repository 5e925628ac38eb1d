"""Caches in which everything that must not be read is poisoned.

Blocks are handed out in random order; every slot that no token owns, the tails of owned blocks
included, holds NaN (or inf); table entries past the used ones hold ids that point far outside the
pool.  Whatever reads too much then shows in the result.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

import paged_kv

WILD_IDS = (2**30, -7, 2**31 - 1, -(2**31), -1)


@dataclasses.dataclass(frozen=True)
class PoisonedCache:
    """A cache beside the same keys and values held densely, one array per sequence.

    keys, values: entry `b` is (length, num_kv_heads, head_dim), with a leading layer axis on a
      stack; positions whose blocks were given back hold NaN.
    owned: bool (num_blocks, block_size), the slots that hold a token.
    """

    cache: paged_kv.PagedKVCache
    keys: list[np.ndarray]
    values: list[np.ndarray]
    owned: np.ndarray

    def dense(self, layer=None):
        """Keys and values of one layer, in the form that the oracle takes."""
        if layer is None:
            return self.keys, self.values
        return [k[layer] for k in self.keys], [v[layer] for v in self.values]


def poisoned_cache(
    rng,
    lengths,
    *,
    block_size=16,
    num_kv_heads=2,
    head_dim=64,
    dtype=jnp.float32,
    num_layers=None,
    num_blocks=None,
    max_blocks_per_seq=None,
    capacity=None,
    first_kept=None,
    poison=np.nan,
):
    """A PoisonedCache whose sequence `b` holds `lengths[b]` standard-normal tokens.

    capacity: tokens per sequence that blocks are handed out for, `lengths` by default; the slots
      from `lengths[b]` up to there are poisoned, their table entries valid.
    first_kept: per sequence, the first position still needed (a window has passed the others);
      blocks wholly before it are not allocated, and their table entries are wild.
    num_blocks, max_blocks_per_seq: by default three, and one, more than needed.
    """
    dtype = np.dtype(dtype)
    lengths = np.asarray(lengths, np.int32)
    capacity = lengths if capacity is None else np.maximum(lengths, capacity)
    first_kept = np.zeros_like(lengths) if first_kept is None else np.asarray(first_kept)
    begin = np.minimum(first_kept // block_size, -(-lengths // block_size))
    end = -(-capacity // block_size)
    if max_blocks_per_seq is None:
        max_blocks_per_seq = int(end.max(initial=0)) + 1
    if num_blocks is None:
        num_blocks = int((end - begin).sum()) + 3

    block_table = rng.choice(WILD_IDS, size=(len(lengths), max_blocks_per_seq)).astype(np.int32)
    free = rng.permutation(num_blocks)
    layers = () if num_layers is None else (num_layers,)
    pool_shape = (*layers, num_blocks, block_size, num_kv_heads, head_dim)
    pools = [np.full(pool_shape, poison, dtype) for _ in range(2)]
    owned = np.zeros((num_blocks, block_size), bool)
    dense = [], []
    for b, length in enumerate(lengths):
        blocks, free = np.split(free, [end[b] - begin[b]])
        if len(blocks) < end[b] - begin[b]:
            raise ValueError(f"{num_blocks=} is too few for {lengths=} and {capacity=}")
        block_table[b, begin[b] : end[b]] = blocks
        positions = np.arange(begin[b] * block_size, length)
        at = block_table[b, positions // block_size], positions % block_size
        owned[at] = True
        for pool, sequences in zip(pools, dense, strict=True):
            tokens = np.full((*layers, length, num_kv_heads, head_dim), np.nan, dtype)
            kept = rng.standard_normal((*layers, len(positions), num_kv_heads, head_dim))
            tokens[..., positions, :, :] = kept.astype(dtype)
            pool[..., *at, :, :] = tokens[..., positions, :, :]
            sequences.append(tokens)

    cache = paged_kv.PagedKVCache(
        *(jnp.asarray(pool) for pool in pools), jnp.asarray(block_table), jnp.asarray(lengths)
    )
    return PoisonedCache(cache, *dense, owned)
