"""Errors of arrays in other forms: rows, CSR, dense, other pools; see errors_api."""

from errors_api import Row, cache, int32, kv

import paged_kv


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

ROWS = [*ROWS_OF_TOKENS]
