"""What the answer is: dense float64 attention and one-token-at-a-time appends, in NumPy.

Every function reads like its definition and none is fast.  Nothing here comes from the package, so
a formula that is wrong there cannot be wrong here in the same way.

A ragged batch is packed: the query tokens of sequence `b` are rows `query_start_loc[b]` up to
`query_start_loc[b + 1]`, and its keys and values are entry `b` of two lists of
`(length, num_kv_heads, head_dim)` arrays.  `query_start_loc=None` means one token per sequence.
"""

import math

import numpy as np


def attention(
    query,
    keys,
    values,
    query_start_loc=None,
    *,
    scale=None,
    is_causal=True,
    local_window_size=None,
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
):
    """Returns `out`, of the shape of `query`, and `lse` (num_tokens, num_query_heads).

    Tokens past `query_start_loc[-1]` and tokens that see no key have `out` 0 and `lse` -inf.
    """
    query = np.asarray(query, np.float64)
    keys = [np.asarray(k, np.float64) for k in keys]
    values = [np.asarray(v, np.float64) for v in values]
    starts = range(len(keys) + 1) if query_start_loc is None else np.asarray(query_start_loc)
    num_query_heads, head_dim = query.shape[1:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = np.zeros(query.shape)
    lse = np.full(query.shape[:2], -np.inf)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        group = num_query_heads // k.shape[1]
        for token in range(starts[b], starts[b + 1]):
            position = len(k) - (starts[b + 1] - token)
            seen = visible_keys(position, len(k), is_causal, local_window_size)
            if not seen:
                continue
            for head in range(num_query_heads):
                scores = scale * (k[seen, head // group] @ query[token, head])
                if logits_soft_cap is not None:
                    scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
                if alibi_slopes is not None:
                    distance = np.abs(position - np.array(seen))
                    scores = scores - float(alibi_slopes[head]) * distance
                sink = -np.inf if sinks is None else float(sinks[head])
                out[token, head], lse[token, head] = softmax_average(
                    scores, v[seen, head // group], sink
                )
    return out, lse


def visible_keys(position, length, is_causal, local_window_size):
    """The key positions that a query at `position` of a sequence of `length` tokens sees."""
    if position < 0:
        return []
    left = right = math.inf
    if isinstance(local_window_size, int):
        left = right = local_window_size
    elif local_window_size is not None:
        left, right = local_window_size
    if is_causal:
        right = 0
    return [j for j in range(length) if position - left <= j <= position + right]


def softmax_average(scores, values, sink=-np.inf):
    """The average of `values` weighted by `exp(scores)`, and the log of the sum of those weights.

    The sink is one more term of the denominator with no value of its own, left out of the log.
    """
    largest = max(scores.max(), sink)
    weights = np.exp(scores - largest)
    out = weights @ values / (weights.sum() + np.exp(sink - largest))
    return out, scores.max() + np.log(np.exp(scores - scores.max()).sum())


def slots(block_table, seq_lengths, block_size, num_blocks, query_start_loc, num_tokens):
    """The slot of every packed token, `block * block_size + offset`, or -1 where there is none."""
    starts = range(len(seq_lengths) + 1) if query_start_loc is None else np.asarray(query_start_loc)
    result = np.full(num_tokens, -1, np.int32)
    for b, length in enumerate(np.asarray(seq_lengths)):
        for token in range(starts[b], min(starts[b + 1], num_tokens)):
            position = length - (starts[b + 1] - token)
            column = position // block_size
            if position < 0 or column >= block_table.shape[1]:
                continue
            block = block_table[b, column]
            if 0 <= block < num_blocks:
                result[token] = block * block_size + position % block_size
    return result


def append(pool, rows, slot_of_row):
    """A copy of one layer's `pool` with `rows[i]` written to slot `slot_of_row[i]`, -1 skipped."""
    pool = np.array(pool)
    block_size = pool.shape[1]
    for row, slot in zip(np.asarray(rows), slot_of_row, strict=True):
        if slot >= 0:
            pool[slot // block_size, slot % block_size] = row.astype(pool.dtype)
    return pool
