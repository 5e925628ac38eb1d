"""What the examples share: random weights, prompts as padded rows, and blocks for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv


def random_weights(shapes: Any, seed: int = 0) -> Any:
    """Float32 weights for a pytree of shapes, large enough that the likeliest tokens vary."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        normal = rng.standard_normal(leaf.shape)
        if normal.ndim == 1:  # a bias, or the scale of a norm
            normal = normal / 8 + ("bias" not in jax.tree_util.keystr(path))
        elif "embed" not in jax.tree_util.keystr(path):
            normal = 2 * normal / np.sqrt(leaf.shape[0])
        return jnp.asarray(normal, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_prompts(vocab: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 (batch, T), zeros after the end of each prompt, and their counts (batch,)."""
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), counts.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, counts


def compare(
    dense_cache: str,
    vocab: int,
    *,
    write_dense: Callable[[list[int]], list[int]],
    write_paged: Callable[[list[list[int]]], list[list[int]]],
) -> None:
    """Prints what is written after random prompts, and whether a dense cache gives the same."""
    prompts = random_prompts(vocab, [3, 9, 1, 17])
    dense = [write_dense(prompt) for prompt in prompts]
    paged = write_paged(prompts)
    for prompt, tokens in zip(prompts, paged, strict=True):
        print(f"{prompt} -> {tokens}")
    print(f"{dense_cache} writes the same: {paged == dense}")


def cache_for(
    prompts: list[list[int]],
    num_tokens: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 8,
) -> paged_kv.PagedKVCache:
    """An empty cache with blocks for every prompt and `num_tokens` more."""
    lengths = [len(prompt) + num_tokens for prompt in prompts]
    needs = [-(-length // block_size) for length in lengths]
    allocator = paged_kv.BlockAllocator(sum(needs), block_size)
    for number, length in enumerate(lengths):
        allocator.allocate(number, length)
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=sum(needs),
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        batch_size=len(prompts),
        max_blocks_per_seq=max(needs),
        dtype=jnp.float32,
        num_layers=num_layers,
    )
    table = allocator.block_table(range(len(prompts)), max(needs))
    return paged_kv.set_block_table(cache, jnp.asarray(table))
