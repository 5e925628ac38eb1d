"""Calls of the API that are errors: one row each, with the type and a piece of the text.

Any `errors_*.py` beside this one is found by test_contract_errors, which checks every row, and that
together they reach every `raise` of the package.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import paged_kv


class Row(NamedTuple):
    name: str
    call: Callable
    match: str  # a regular expression, as pytest.raises takes it
    error: type[Exception] = ValueError


SIZES = {
    "num_blocks": 8,
    "block_size": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "batch_size": 2,
    "max_blocks_per_seq": 3,
    "dtype": jnp.float32,
}
init = lambda **changes: paged_kv.init_paged_kv_cache(**{**SIZES, **changes})
num_blocks_for = lambda memory, **changes: paged_kv.num_blocks_for(
    memory,
    **{"block_size": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": jnp.float32, **changes},
)
int32 = lambda values: jnp.asarray(values, jnp.int32)


def cache(**changes):
    """Sequence 0 has 5 tokens in blocks 6 and 3, sequence 1 has one in block 1."""
    fields = {"block_table": int32([[6, 3, -1], [1, -1, -1]]), "seq_lengths": int32([5, 1])}
    return dataclasses.replace(init(), **{**fields, **changes})


def stack():
    return dataclasses.replace(
        init(num_layers=3), block_table=cache().block_table, seq_lengths=cache().seq_lengths
    )


def allocate(idx=0, count=4, ids=(0, 2), cache=cache):
    return paged_kv.allocate_blocks(
        cache(), sequence_idx=idx, num_new_tokens=count, free_block_ids=ids
    )


def kv(*shape, dtype=jnp.float32):
    return jnp.ones(shape or (2, 2, 8), dtype)


def append(keys=None, values=None, cache=cache, **options):
    keys = kv() if keys is None else keys
    return paged_kv.append_tokens(cache(), keys, keys if values is None else values, **options)


def entry(value):
    """A cache whose sequence 0 uses a table entry of `value`."""
    return lambda: cache(block_table=cache().block_table.at[0, 1].set(value))


def long():
    """A cache whose sequence 0 is longer than its row."""
    return cache(seq_lengths=int32([13, 1]))


EAGER = [
    Row("init size zero", lambda: init(head_dim=0), "head_dim=0 must be a positive int"),
    Row("init size float", lambda: init(block_size=4.0), r"block_size=4\.0 must be a positive"),
    Row("init layers zero", lambda: init(num_layers=0), "num_layers=0 must be a positive int"),
    Row("init dtype", lambda: init(dtype=jnp.int8), "dtype=int8 must be floating point"),
    Row("memory too small", lambda: num_blocks_for(511), "memory_bytes=511 holds no block.* 512"),
    Row("memory of no heads", lambda: num_blocks_for(9, num_kv_heads=0), "num_kv_heads=0 must"),
    Row("allocate index", lambda: allocate(idx=2), r"sequence_idx=2 must be in \[0, 2\)"),
    Row("allocate index negative", lambda: allocate(idx=-1), "sequence_idx=-1 must be in"),
    Row("allocate index no int", lambda: allocate(idx=0.0), "sequence_idx=0.0 must be an int"),
    Row("allocate count negative", lambda: allocate(count=-1), "num_new_tokens=-1 must be an int"),
    Row("allocate ids too short", lambda: allocate(ids=()), "1 more blocks are needed .* has 0"),
    Row("allocate past row", lambda: allocate(count=8), "need 4 blocks .* max_blocks_per_seq=3"),
    Row("allocate id past pool", lambda: allocate(ids=(8,)), "block id 8 is outside the pool"),
    Row("allocate id negative", lambda: allocate(ids=(-1,)), "block id -1 is outside the pool"),
    Row(
        "allocate id twice",
        lambda: allocate(count=8, ids=(2, 2), cache=init),
        r"free_block_ids repeats an id .* \[2, 2\]",
    ),
    Row("allocate id held", lambda: allocate(ids=(1,)), r"ids \[1\] already stand in the block"),
    Row("allocate stack", lambda: allocate(cache=stack), "allocate_blocks takes a single layer"),
    Row("append_kv stack", lambda: paged_kv.append_kv(stack(), 0, kv(), kv()), "append_kv takes"),
    Row("append_kv index", lambda: paged_kv.append_kv(cache(), 9, kv(), kv()), "sequence_idx=9"),
    Row(
        "append_kv keys and values",
        lambda: paged_kv.append_kv(cache(), 0, kv(), kv(1, 2, 8)),
        r"keys \(2, 2, 8\) and values \(1, 2, 8\) must have one shape",
    ),
    Row(
        "append_kv heads",
        lambda: paged_kv.append_kv(cache(), 0, kv(2, 3, 8), kv(2, 3, 8)),
        r"\(2, 3, 8\) must be \(num_tokens, num_kv_heads, head_dim\) = \(num_tokens, 2, 8\)",
    ),
    Row(
        "append_kv rank",
        lambda: paged_kv.append_kv(cache(), 0, kv(2, 8), kv(2, 8)),
        r"keys and values \(2, 8\) must be",
    ),
    Row(
        "append_kv dtype",
        lambda: paged_kv.append_kv(cache(), 0, kv(dtype=jnp.int32), kv()),
        "the dtype of keys=int32 must be floating",
    ),
    Row(
        "append_kv unallocated",
        lambda: paged_kv.append_kv(cache(), 0, kv(4, 2, 8), kv(4, 2, 8)),
        "position 8 of sequence 0 has no block: table entry 2 is -1",
    ),
    Row(
        "append_kv past row",
        lambda: paged_kv.append_kv(cache(), 0, kv(8, 2, 8), kv(8, 2, 8)),
        "position 12 of sequence 0 needs block 3 of its row, but max_blocks_per_seq=3",
    ),
    Row("gather stack", lambda: paged_kv.gather_kv(stack(), 0), "gather_kv takes a single layer"),
    Row("gather index", lambda: paged_kv.gather_kv(cache(), -1), "sequence_idx=-1 must be in"),
    Row("gather unallocated", lambda: paged_kv.gather_kv(entry(-1)(), 0), "has no block"),
]

STATE = [
    Row("advance negative", lambda: paged_kv.advance(cache(), -1), "must be at least 0"),
    Row("advance past row", lambda: paged_kv.advance(cache(), 8), r"\[5, 1\] within 12 tokens"),
    Row("advance far", lambda: paged_kv.advance(cache(), 2**31 - 1), "within 12 tokens"),
    Row("advance past int32", lambda: paged_kv.advance(cache(), 2**40), "within 12 tokens"),
    Row("advance float", lambda: paged_kv.advance(cache(), 1.0), "must be an int or int32"),
    Row("advance shape", lambda: paged_kv.advance(cache(), int32([1])), r"\(batch,\) = \(2,\)"),
    Row("truncate longer", lambda: paged_kv.truncate(cache(), int32([6, 0])), "truncate to .*6, 0"),
    Row("truncate negative", lambda: paged_kv.truncate(cache(), int32([0, -1])), "truncate to"),
    Row("truncate shape", lambda: paged_kv.truncate(cache(), int32([0])), "seq_lengths=.* must be"),
    Row("reset dtype", lambda: paged_kv.reset_sequences(cache(), int32([0, 1])), "must be bool"),
    Row(
        "reset shape",
        lambda: paged_kv.reset_sequences(cache(), np.array([True])),
        r"mask bool\(1,\) must be bool \(batch,\) = \(2,\)",
    ),
    Row(
        "table shape",
        lambda: paged_kv.set_block_table(cache(), int32([[0], [1]])),
        r"block_table \(2, 1\) must be \(batch, max_blocks_per_seq\) = \(2, 3\)",
    ),
    Row(
        "table dtype",
        lambda: paged_kv.set_block_table(cache(), jnp.zeros((2, 3), jnp.int16)),
        "block_table has dtype int16, it must be int32",
    ),
    Row(
        "table mask",
        lambda: paged_kv.set_block_table(cache(), cache().block_table, int32([0, 1])),
        "mask .* must be bool",
    ),
    Row(
        "copy pairs",
        lambda: paged_kv.copy_blocks(cache(), int32([0]), int32([1, 2])),
        r"source_ids \(1,\) and target_ids \(2,\) must pair up",
    ),
    Row(
        "copy source past pool",
        lambda: paged_kv.copy_blocks(cache(), int32([8]), int32([1])),
        r"source_ids=\[8\] must be below num_blocks=8",
    ),
    Row(
        "copy target past pool",
        lambda: paged_kv.copy_blocks(cache(), int32([0]), int32([9])),
        r"target_ids=\[9\] must be below num_blocks=8",
    ),
    Row(
        "copy target twice",
        lambda: paged_kv.copy_blocks(cache(), int32([0, 1]), int32([2, 2])),
        r"target_ids=\[2, 2\] name a block twice",
    ),
    Row(
        "scrub past pool", lambda: paged_kv.scrub_blocks(cache(), int32([8])), "block_ids=.* below"
    ),
    Row("scrub dtype", lambda: paged_kv.scrub_blocks(cache(), jnp.ones(1)), "must be int32"),
    Row("scrub rank", lambda: paged_kv.scrub_blocks(cache(), int32(3)), "block_ids .* must be int"),
    Row("slots", lambda: paged_kv.slot_mapping(cache(), num_tokens=3), "3 tokens for a batch of 2"),
]

APPEND = [
    Row("append stack without layer", lambda: append(cache=stack), "num_layers=3; say which"),
    Row("append layer without stack", lambda: append(layer=0), "layer=0 was given, but"),
    Row("append layer negative", lambda: append(cache=stack, layer=-1), r"must be in \[0, 3\)"),
    Row("append layer past", lambda: append(cache=stack, layer=3), r"layer=3 must be in \[0, 3\)"),
    Row("append layer float", lambda: append(cache=stack, layer=1.0), "must be an int or an int32"),
    Row(
        "append layer array",
        lambda: append(cache=stack, layer=int32([1])),
        "layer=.* must be an int or an int32 scalar",
    ),
    Row("append keys", lambda: append(kv(2, 2, 4)), r"keys and values \(2, 2, 4\) must be"),
    Row("append values", lambda: append(kv(), kv(3, 2, 8)), "must have one shape"),
    Row("append count", lambda: append(kv(3, 2, 8)), "3 tokens for a batch of 2: without query_st"),
    Row("append entry", lambda: append(cache=entry(-1)), r"block_table\[0, 1\]=-1 is used by seq"),
    Row("append entry past", lambda: append(cache=entry(8)), r"block_table\[0, 1\]=8 .* outside"),
    Row("append past row", lambda: append(cache=long), "sequence 0 has 13 tokens, but its row"),
    Row(
        "append starts",
        lambda: append(query_start_loc=int32([0, 1])),
        r"query_start_loc \(2,\) must be \(batch \+ 1,\) = \(3,\)",
    ),
    Row(
        "append starts dtype",
        lambda: append(query_start_loc=jnp.zeros(3)),
        "query_start_loc has dtype float32, it must be int32",
    ),
    Row("append starts at 1", lambda: append(query_start_loc=int32([1, 1, 2])), "must start at 0"),
    Row("append starts fall", lambda: append(query_start_loc=int32([0, 2, 1])), "never fall"),
    Row("append starts end", lambda: append(query_start_loc=int32([0, 1, 3])), "within the 2 tok"),
    Row(
        "append more than there are",
        lambda: append(query_start_loc=int32([0, 0, 2])),
        r"sequence 1 has 2 query tokens but seq_lengths\[1\]=1",
    ),
    Row(
        "append_and_attend tokens",
        lambda: paged_kv.append_and_attend(kv(1, 4, 8), kv(), kv(), cache()),
        r"query \(1, 4, 8\) and keys \(2, 2, 8\) must have one row each",
    ),
]

PACKAGE = [
    Row(
        "import of the folder kernels",
        lambda: importlib.import_module("kernels"),
        "this folder is the package `paged_kv.kernels`, but it was imported as 'kernels'",
        ImportError,
    ),
]

ROWS = [*EAGER, *STATE, *APPEND, *PACKAGE]
