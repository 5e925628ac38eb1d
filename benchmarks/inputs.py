"""The arrays of a case, made on the device: standard normal, and NaN wherever no token is."""

import itertools
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paged_kv

from .workload import Case

# Beyond the last cache of any chip here (an H100's holds 50 MB), so that a call reads from memory.
ROTATE_BYTES = 128 * 2**20


class Arrays(NamedTuple):
    """What a step is given beside the pools, the same in every copy."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array
    seq_lengths: jax.Array
    operands: dict[str, Any]  # query_start_loc, sinks, alibi_slopes: those that the case has


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Operands of a case; `tables[i]` names blocks that no other table names."""

    arrays: Arrays
    key_pool: jax.Array
    value_pool: jax.Array
    tables: list[jax.Array]

    def cache(self, copy: int = 0) -> paged_kv.PagedKVCache:
        return paged_kv.PagedKVCache(
            self.key_pool,
            self.value_pool,
            self.tables[copy % len(self.tables)],
            self.arrays.seq_lengths,
        )


def make_inputs(case: Case, *, seed: int = 0, rotate_bytes: int = ROTATE_BYTES) -> Inputs:
    """Operands of `case`, the same for the same seed; enough copies to pass `rotate_bytes`."""
    copies = case.copies_beyond(rotate_bytes) if rotate_bytes else 1
    tables = case.block_tables(copies, seed)
    filled = jnp.asarray(filled_slots(case, tables, copies))
    drawn = draw_arrays(shapes_of(case), filled, jax.random.key(seed))
    operands = {name: drawn[name] for name in ("sinks", "alibi_slopes") if name in drawn}
    starts = case.query_start_loc
    operands["query_start_loc"] = None if starts is None else jnp.asarray(starts)
    return Inputs(
        Arrays(
            drawn["query"],
            drawn["keys"],
            drawn["values"],
            jnp.asarray(case.seq_lengths, jnp.int32),
            operands,
        ),
        drawn["key_pool"],
        drawn["value_pool"],
        [jnp.asarray(table) for table in tables],
    )


class Shapes(NamedTuple):
    """What the drawn arrays of a case depend on, so that cases alike share a program."""

    num_tokens: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    has_sinks: bool
    has_alibi: bool


def shapes_of(case: Case) -> Shapes:
    return Shapes(*(getattr(case, name) for name in Shapes._fields))


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


@jax.jit(static_argnums=0)
def draw_arrays(shapes: Shapes, filled: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """The drawn arrays by name.  All come from one draw: each would take as long to compile."""
    heads = (shapes.num_query_heads,)
    new = shapes.num_tokens, shapes.num_kv_heads, shapes.head_dim
    dims = {
        "query": (shapes.num_tokens, *heads, shapes.head_dim),
        "keys": new,
        "values": new,
        "key_pool": (*filled.shape, *new[1:]),
        "value_pool": (*filled.shape, *new[1:]),
    }
    dims |= {"sinks": heads} if shapes.has_sinks else {}
    ends = list(itertools.accumulate(map(prod, dims.values())))
    flat = lax.optimization_barrier(jax.random.normal(key, (ends[-1],), shapes.dtype))
    parts = jnp.split(flat, ends[:-1])
    drawn = {n: x.reshape(d) for (n, d), x in zip(dims.items(), parts, strict=True)}
    for name in ("key_pool", "value_pool"):
        nan = jnp.asarray(jnp.nan, shapes.dtype)
        drawn[name] = jnp.where(filled[..., None, None], drawn[name], nan)
    if shapes.has_sinks:
        drawn["sinks"] = drawn["sinks"].astype(jnp.float32)
    if shapes.has_alibi:
        # as in the paper
        number = jnp.arange(1, heads[0] + 1, dtype=jnp.float32)
        drawn["alibi_slopes"] = 2.0 ** (-8.0 / heads[0] * number)
    return drawn
