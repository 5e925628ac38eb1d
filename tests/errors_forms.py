"""Errors of arrays in other forms: rows, CSR, dense, other pools; see errors_api."""

import jax
import jax.numpy as jnp
from errors_api import Row, cache, int32, kv, stack

import paged_kv
from paged_kv import interop


def attend(query=None, **options):
    query = kv(2, 3, 4, 8) if query is None else query
    return paged_kv.paged_dot_product_attention(query, cache(), **options)


def append(keys=None, values=None):
    keys, values = (kv(2, 1, 2, 8) if x is None else x for x in (keys, values))
    return paged_kv.append_rows(cache(), keys, values)


ROWS_OF_TOKENS = [
    Row(
        "rows batch",
        lambda: attend(kv(3, 1, 4, 8)),
        r"query \(3, 1, 4, 8\) must be \(batch, T, heads, head_dim\), and the cache has batch=2; "
        "packed tokens go to paged_attention",
    ),
    Row("rows without batch", lambda: attend(kv(3, 4, 8)), r"query \(1, 3, 4, 8\) must be"),
    Row("rows of packed tokens", lambda: attend(kv(2, 4)), r"query \(2, 4\) must be"),
    Row(
        "rows count above width",
        lambda: attend(query_seq_lengths=int32([4, 0])),
        r"query_seq_lengths=\[4, 0\] must be in \[0, 3\]: a row has T=3",
    ),
    Row("rows count negative", lambda: attend(query_seq_lengths=-1), r"\[-1, -1\] must be in"),
    Row(
        "rows count shape",
        lambda: attend(query_seq_lengths=int32([1])),
        r"query_seq_lengths=.* must be an int or int32 \(batch,\) = \(2,\)",
    ),
    Row("rows more than there are", attend, r"sequence 1 has 3 query tokens but seq_lengths"),
    Row(
        "row positions",
        lambda: paged_kv.row_positions(cache(), 1, int32([1])),
        r"query_seq_lengths=.* must be an int or int32 \(batch,\) = \(2,\)",
    ),
    Row("append_rows keys", lambda: append(kv(2, 2, 8)), r"keys \(2, 2, 8\) must be \(batch, T"),
    Row(
        "append_rows values",
        lambda: append(values=kv(2, 2, 2, 8)),
        r"values \(2, 2, 2, 8\) must have the \(batch, T\) of the others, \(2, 1\)",
    ),
    Row(
        "append_and_attend_rows keys",
        lambda: paged_kv.append_and_attend_rows(
            kv(2, 1, 4, 8), kv(2, 2, 8), kv(2, 1, 2, 8), cache()
        ),
        r"keys \(2, 2, 8\) must have the \(batch, T\)",
    ),
]


def layout(pools, name, **sizes):
    return interop.from_layout(pools, name, cache().block_table, cache().seq_lengths, **sizes)


POOLS = [
    Row(
        "layout name", lambda: interop.to_layout(cache(), "NDH"), "layout='NDH' must be one of NHD"
    ),
    Row("layout pair", lambda: layout(kv(8, 4, 2, 8), "HND"), r"has a pair \(keys, values\)"),
    Row("layout one", lambda: layout((kv(1), kv(1)), "vllm"), "layout='vllm' has one array"),
    Row(
        "layout rank",
        lambda: layout((kv(8, 4), kv(8, 4)), "NHD"),
        r"has pools of 4 axes, or one more for layers, not \(8, 4\), \(8, 4\)",
    ),
    Row("layout axis", lambda: layout(kv(8, 4, 4, 2, 8), "flashinfer"), "values on axis -4 of"),
    Row("layout heads", lambda: layout(kv(8, 4, 3, 8), "rpa_v2"), "each key head, not 3 heads"),
    Row("layout slots", lambda: layout((kv(9, 2, 8),) * 2, "flat"), "has 9 slots: pass block_size"),
    Row(
        "layout padding",
        lambda: layout(kv(8, 4, 2, 2, 128), "rpa_v3", num_kv_heads=3),
        r"num_kv_heads=3 \(keys and values\) and head_dim=128 must fit the 4 heads of 128",
    ),
    Row("rpa stack", lambda: interop.to_rpa(stack()), "to_rpa takes a single layer's cache"),
    Row(
        "rpa table",
        lambda: interop.from_rpa(kv(8, 4, 2, 2, 128), int32([1, 1]), int32([0, 1, 2])),
        r"page_indices \(3,\) must be \(batch \* max_blocks_per_seq,\), kv_lens has batch=2",
    ),
]


def csr(**changes):
    return interop.from_csr(cache(), interop.to_csr(cache())._replace(**changes))


def slots(values=(0, 1)):
    return interop.write_slots(cache(), kv(), kv(), jnp.asarray(values))


TABLES = [
    Row("csr jit", lambda: jax.jit(interop.to_csr)(cache()), "under jit .* pass capacity="),
    Row("csr capacity", lambda: interop.to_csr(cache(), 2), "hold 3 blocks, more than capacity=2"),
    Row(
        "csr table",
        lambda: interop.to_csr(cache(seq_lengths=int32([9, 1]))),
        r"sequence 0 of 9 tokens has no block in the pool for some of them: row \[6, 3, -1\]",
    ),
    Row("csr indptr", lambda: csr(indptr=int32([0, 2, 1])), r"indptr=\[0, 2, 1\] must rise from 0"),
    Row("csr indices", lambda: csr(indptr=int32([0, 2, 4])), "to at most 3, the indices there are"),
    Row(
        "csr wide",
        lambda: csr(indptr=int32([0, 4, 4]), indices=int32([0, 1, 2, 3])),
        "a sequence has 4 blocks, rows of this cache max_blocks_per_seq=3",
    ),
    Row("csr block", lambda: csr(indices=int32([6, 3, 8])), r"indices=\[6, 3, 8\] must be in the"),
    Row(
        "csr last", lambda: csr(last_page_len=int32([5, 1])), r"\[5, 1\] must be 1 to block_size=4"
    ),
    Row("csr empty", lambda: csr(last_page_len=int32([1, 0])), "and 0 for a sequence without"),
    Row(
        "slots dtype", lambda: slots((0.0, 1.0)), r"slot_mapping float32\(2,\) must be int32 \(2,\)"
    ),
    Row("slots count", lambda: slots((0,)), r"slot_mapping int32\(1,\) must be int32 \(2,\)"),
    Row("slots past pool", lambda: slots((0, 32)), "slot_mapping has 32, the pool 32 slots"),
    Row("slots read", lambda: interop.read_slots(cache(), int32([32])), "has 32, the pool 32 slot"),
]


def dense(keys=None, lengths=None, **sizes):
    keys = kv(2, 5, 2, 8) if keys is None else keys
    return interop.from_dense(keys, kv(2, 5, 2, 8), lengths, **{"block_size": 4, **sizes})


DENSE = [
    Row("dense block", lambda: dense(block_size=0), "block_size=0 must be a positive int"),
    Row("dense pair", lambda: dense(kv(2, 6, 2, 8)), r"keys float32\(2, 6, 2, 8\) and values"),
    Row("dense shape", lambda: dense(lengths=int32([1])), r"seq_lengths int32\(1,\) must be int32"),
    Row(
        "dense of no cache",
        lambda: interop.to_dense(cache(seq_lengths=int32([1]))),
        r"block_table \(2, 3\) must be .* and seq_lengths \(1,\) \(batch,\)",
    ),
    Row("dense lengths", lambda: dense(lengths=int32([6, 0])), r"\[6, 0\] must be in \[0, 5\]"),
    Row(
        "dlpack",
        lambda: interop.from_dlpack(kv(8, 4, 2, 8), kv(8, 4, 2, 8), kv(1, 1), int32([0])),
        "block_table has dtype float32, it must be int32",
    ),
]

ROWS = [*ROWS_OF_TOKENS, *POOLS, *TABLES, *DENSE]
