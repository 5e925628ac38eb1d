"""Hooks for models written in a framework: `nnx` and `linen` for Flax, `equinox`.

Each is imported by its own name and needs its framework: `pip install 'paged_kv[flax]'` or
`'paged_kv[equinox]'`.  `import paged_kv` needs neither.  `tools/examples/` has a model for each.
"""

from typing import Any

import jax.numpy as jnp

from ..cache import PagedKVCache


def missing(framework: str, extra: str, error: ImportError) -> ImportError:
    """The error of an integration whose framework cannot be imported."""
    return ImportError(f"{framework} cannot be imported ({error}); pip install 'paged_kv[{extra}]'")


def step_counts(num_new_tokens: Any, width: int | None) -> tuple[int, Any]:
    """T of a step, and the real tokens of its rows, int32 (batch,), or None where all are real.

    Raises:
      ValueError: the tokens per row are an array, and T is not given.
    """
    if isinstance(num_new_tokens, int):
        return num_new_tokens, None
    if width is None:
        raise ValueError("num_new_tokens is an array; say with width= how wide the rows are")
    return width, jnp.asarray(num_new_tokens)


def check_hook_call(
    query: Any, width: int, mask: Any, dropout_rate: float, deterministic: bool
) -> None:
    """What a framework's attention layer asks of its hook is what paged attention does.

    Raises:
      ValueError: a mask is given, or the query's T is not the step's.
      NotImplementedError: dropout is asked for.
    """
    if mask is not None:
        raise ValueError(
            "a paged cache takes no mask: what a query sees follows from positions, "
            "local_window_size= and is_causal=, and padding from step(num_new_tokens)"
        )
    if dropout_rate and not deterministic:
        raise NotImplementedError(f"{dropout_rate=}: paged attention has no dropout")
    if query.shape[1] != width:
        raise ValueError(f"query {query.shape} must have the T of the step, {width}")


def check_one_sequence(cache: PagedKVCache) -> None:
    """Under `vmap` a model sees one sequence of a cache.

    Raises:
      ValueError: table and lengths are those of a batch.
    """
    table, lengths = cache.block_table, cache.seq_lengths
    if table.ndim != 1 or lengths.ndim != 0:
        raise ValueError(
            f"block_table {table.shape} and seq_lengths {lengths.shape} must be one sequence's, "
            "(max_blocks_per_seq,) and (): call it under vmap with sequence_axes(cache), or take "
            "append_and_attend_rows for a batch"
        )


def check_shared_pools(is_mapped: bool) -> None:
    """All sequences under `vmap` have the same pools.

    Raises:
      ValueError: `vmap` maps them.
    """
    if is_mapped:
        raise ValueError(
            "vmap maps the pools, which all sequences share: give the cache in_axes and out_axes "
            "of sequence_axes(cache)"
        )
