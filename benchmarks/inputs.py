"""The arrays of a case, made on the device: standard normal, and NaN wherever no token is."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv

from .workload import Case

# Beyond the last cache of any chip here (an H100's holds 50 MB), so that a call reads from memory.
ROTATE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Inputs:
    """Operands of a case; `tables[i]` names blocks that no other table names."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array
    key_pool: jax.Array
    value_pool: jax.Array
    tables: list[jax.Array]
    seq_lengths: jax.Array
    operands: dict[str, Any]

    def cache(self, copy: int = 0) -> paged_kv.PagedKVCache:
        return paged_kv.PagedKVCache(
            self.key_pool, self.value_pool, self.tables[copy % len(self.tables)], self.seq_lengths
        )


def make_inputs(case: Case, *, seed: int = 0, rotate_bytes: int = ROTATE_BYTES) -> Inputs:
    """Operands of `case`, the same for the same seed; enough copies to pass `rotate_bytes`."""
    copies = case.copies_beyond(rotate_bytes) if rotate_bytes else 1
    tables = case.block_tables(copies, seed)
    key = jax.random.key(seed)
    names = ("query", "keys", "values", "key_pool", "value_pool", "sinks", "slopes")
    draw = dict(zip(names, jax.random.split(key, len(names)), strict=True))

    new_shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    filled = jnp.asarray(filled_slots(case, tables, copies))
    pool = partial(_pool, filled, case.num_kv_heads, case.head_dim, case.dtype)
    operands: dict[str, Any] = {"query_start_loc": None}
    if case.query_start_loc is not None:
        operands["query_start_loc"] = jnp.asarray(case.query_start_loc)
    heads = (case.num_query_heads,)
    if case.has_sinks:
        operands["sinks"] = jax.random.normal(draw["sinks"], heads, jnp.float32)
    if case.has_alibi:
        operands["alibi_slopes"] = jax.random.uniform(draw["slopes"], heads, jnp.float32, 0.0, 0.1)
    return Inputs(
        query=jax.random.normal(
            draw["query"], (case.num_tokens, *heads, case.head_dim), case.dtype
        ),
        keys=jax.random.normal(draw["keys"], new_shape, case.dtype),
        values=jax.random.normal(draw["values"], new_shape, case.dtype),
        key_pool=pool(draw["key_pool"]),
        value_pool=pool(draw["value_pool"]),
        tables=[jnp.asarray(table) for table in tables],
        seq_lengths=jnp.asarray(case.seq_lengths, jnp.int32),
        operands=operands,
    )


def filled_slots(case: Case, tables: np.ndarray, copies: int) -> np.ndarray:
    """bool (num_blocks, block_size): slots that hold a token before the step, in any copy.

    The step's own tokens are in the cache already when it only attends.
    """
    before = np.asarray(case.seq_lengths) - (0 if case.op == "attend" else case.queries)
    column = np.arange(case.max_blocks_per_seq)
    held = np.clip(before[:, None] - column * case.block_size, 0, case.block_size)
    tokens = np.zeros(copies * case.num_blocks, np.int64)
    row, used = np.nonzero(column < case.blocks_per_seq[:, None])
    for table in tables:
        np.maximum.at(tokens, table[row, used], held[row, used])
    return np.arange(case.block_size) < tokens[:, None]


@partial(jax.jit, static_argnums=(1, 2, 3))
def _pool(filled: jax.Array, num_kv_heads: int, head_dim: int, dtype: str, key: jax.Array):
    values = jax.random.normal(key, (*filled.shape, num_kv_heads, head_dim), dtype)
    return jnp.where(filled[..., None, None], values, jnp.asarray(jnp.nan, dtype))
