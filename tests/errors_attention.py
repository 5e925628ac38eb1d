"""Errors of attention, its schedule and its partial results: see errors_api."""

import jax
import jax.numpy as jnp
from errors_api import Row, append, cache, entry, init, int32, kv, long, stack

import paged_kv


def attend(query=None, cache=cache, **options):
    query = kv(2, 4, 8) if query is None else query
    return paged_kv.paged_attention(query, cache(), **options)


def schedule(**changes):
    return paged_kv.make_schedule(cache(), **{"num_query_heads": 4, **changes})


ATTEND = [
    Row("query rank", lambda: attend(kv(2, 8)), r"query \(2, 8\) must be \(num_tokens, num_query"),
    Row("query head_dim", lambda: attend(kv(2, 4, 4)), r"query \(2, 4, 4\) must be .*head_dim=8"),
    Row(
        "query heads", lambda: attend(kv(2, 3, 8)), "num_query_heads=3 must be a multiple of num_kv"
    ),
    Row("query no heads", lambda: attend(jnp.ones((2, 0, 8))), "num_query_heads=0 must be a posit"),
    Row("query dtype", lambda: attend(kv(2, 4, 8, dtype=jnp.int32)), "dtype of query=int32 must"),
    Row("query count", lambda: attend(kv(3, 4, 8)), "3 tokens for a batch of 2"),
    Row("scale", lambda: attend(scale=float("inf")), "scale=inf and .* must be finite"),
    Row(
        "scale traced",
        lambda: jax.jit(lambda scale: attend(scale=scale))(0.1),
        "must be finite Python numbers",
    ),
    Row(
        "soft cap zero", lambda: attend(logits_soft_cap=0.0), "logits_soft_cap=0.0 must be positive"
    ),
    Row("soft cap nan", lambda: attend(logits_soft_cap=float("nan")), "logits_soft_cap=nan must"),
    Row("window negative", lambda: attend(local_window_size=-1), "local_window_size=-1 must be"),
    Row(
        "window three", lambda: attend(local_window_size=(1, 2, 3)), r"=\(1, 2, 3\) must be an int"
    ),
    Row("window float", lambda: attend(local_window_size=(1.0, 0)), "local_window_size=.* must be"),
    Row("sinks", lambda: attend(sinks=jnp.ones(3)), r"sinks \(3,\) must be \(num_query_heads,\)"),
    Row("slopes", lambda: attend(alibi_slopes=jnp.ones((4, 1))), r"alibi_slopes \(4, 1\) must be"),
    Row("sinks dtype", lambda: attend(sinks=int32([0] * 4)), "the dtype of sinks=int32 must be"),
    Row("implementation", lambda: attend(implementation="cuda"), "implementation='cuda' must be"),
    Row("interpret nothing", lambda: attend(interpret=True), "interpret=True needs the name of a"),
    Row(
        "attend stack without layer", lambda: attend(cache=stack), "stacks num_layers=3; say which"
    ),
    Row("attend layer without stack", lambda: attend(layer=0), "layer=0 was given, but this cache"),
    Row("attend layer past", lambda: attend(cache=stack, layer=3), r"layer=3 must be in \[0, 3\)"),
    Row("attend layer negative", lambda: attend(cache=stack, layer=-1), "layer=-1 must be in"),
    Row("attend entry", lambda: attend(cache=entry(-1)), r"\[0, 1\]=-1 is used by sequence 0 .pos"),
    Row(
        "attend entry wild", lambda: attend(cache=entry(2**30)), "is outside the pool: num_blocks=8"
    ),
    Row("attend past row", lambda: attend(cache=long), "make the cache with a wider table"),
    Row(
        "attend more than there are",
        lambda: attend(query_start_loc=int32([0, 0, 2])),
        "sequence 1 has 2 query tokens .* call advance first",
    ),
    Row(
        "schedule of other heads",
        lambda: attend(schedule=schedule(num_query_heads=2)),
        r"made for another call.*num_query_heads.*\(2, 4\)",
    ),
    Row(
        "schedule of another window",
        lambda: attend(schedule=schedule(local_window_size=(3, 0))),
        "made for another call.*window",
    ),
    Row(
        "schedule of another mask",
        lambda: attend(schedule=schedule(is_causal=False)),
        "made for another call.*is_causal",
    ),
    Row(
        "schedule of packed queries",
        lambda: attend(schedule=schedule(query_start_loc=int32([0, 1, 2]))),
        "made for another call.*is_packed",
    ),
    Row(
        "schedule of other starts",
        lambda: attend(
            query_start_loc=int32([0, 2, 2]),
            schedule=schedule(query_start_loc=int32([0, 1, 2])),
        ),
        r"made for .*query_start_loc.*\[0, 1, 2\]",
    ),
    Row(
        "schedule from before advance",
        lambda: attend(cache=lambda: paged_kv.advance(cache(), 1), schedule=schedule()),
        r"made for .*seq_lengths.*\[5, 1\]",
    ),
    Row(
        "schedule of other tokens",
        lambda: attend(
            query_start_loc=int32([0, 1, 2]),
            schedule=schedule(query_start_loc=int32([0, 1, 2]), num_tokens=3),
        ),
        r"made for another call.*num_tokens.*\(3, 2\)",
    ),
    Row("make_schedule no tokens", lambda: schedule(num_tokens=0), "num_tokens=0 must be a positi"),
    Row("make_schedule tokens", lambda: schedule(num_tokens=3), "3 tokens for a batch of 2"),
    Row(
        "make_schedule ends past its tokens",
        lambda: schedule(query_start_loc=int32([0, 1, 2]), num_tokens=1),
        "must start at 0, never fall, and end within the 1 tokens",
    ),
    Row("make_schedule heads", lambda: schedule(num_query_heads=3), "must be a multiple of num_kv"),
    Row("make_schedule window", lambda: schedule(local_window_size=-1), "local_window_size=-1"),
    Row("make_schedule name", lambda: schedule(implementation="tpu"), "implementation='tpu' must"),
    Row(
        "make_schedule starts",
        lambda: schedule(query_start_loc=int32([0, 1])),
        r"must be \(batch \+ 1,\)",
    ),
]

CACHE = [
    Row(
        "pool rank",
        lambda: attend(cache=lambda: cache(key_pool=kv(8, 4, 2))),
        r"key_pool \(8, 4, 2\) must be \(num_blocks, block_size",
    ),
    Row(
        "pools differ",
        lambda: attend(cache=lambda: cache(value_pool=kv(8, 4, 2, 8, dtype=jnp.float16))),
        r"key_pool float32\(8, 4, 2, 8\) and value_pool float16.* must have one shape and dtype",
    ),
    Row(
        "pools of ints",
        lambda: attend(
            cache=lambda: cache(**dict.fromkeys(("key_pool", "value_pool"), int32([[[[1] * 8]]])))
        ),
        "the dtype of the pools=int32 must be floating",
    ),
    Row(
        "lengths and table differ",
        lambda: attend(cache=lambda: cache(seq_lengths=int32([1]))),
        r"block_table \(2, 3\) must be .* and seq_lengths \(1,\) \(batch,\)",
    ),
    Row(
        "lengths dtype",
        lambda: attend(cache=lambda: cache(seq_lengths=jnp.ones(2))),
        "seq_lengths has dtype float32, it must be int32",
    ),
]


def merge(out_a=(3, 2, 4), lse_a=(3, 2), out_b=(3, 2, 4), lse_b=(3, 2)):
    return paged_kv.merge_attention_states(*(kv(*shape) for shape in (out_a, lse_a, out_b, lse_b)))


PARTIAL = [
    Row("merge outs", lambda: merge(out_b=(1, 2, 4)), r"out_b \(1, 2, 4\) must be"),
    Row("merge lse", lambda: merge(lse_a=(3, 1)), r"lse_a \(3, 1\) must be"),
    Row("merge other lse", lambda: merge(lse_b=(3,)), r"lse_b \(3,\) must be"),
    Row(
        "sinks of other heads",
        lambda: paged_kv.apply_sinks(kv(3, 2, 4), kv(3, 2), kv(3)),
        r"sinks \(3,\) must be \(num_query_heads,\) = \(2,\)",
    ),
    Row(
        "sinks and lse",
        lambda: paged_kv.apply_sinks(kv(3, 2, 4), kv(2, 2), kv(2)),
        r"lse \(2, 2\) must be",
    ),
]


def attend_strictly(implementation, head_dim, pool_dtype=jnp.bfloat16):
    """An eager call, on the CPU, of a kernel that supports it at head_dim 128."""
    sizes = {"block_size": 16, "head_dim": head_dim, "dtype": pool_dtype}
    query = kv(2, 4, head_dim, dtype=jnp.bfloat16)
    return attend(query, cache=lambda: init(**sizes), implementation=implementation)


def rows_strictly(function, *heads):
    """A call with (batch, T) tokens of a head_dim that the kernel does not take."""
    arrays = [kv(2, 1, count, 8) for count in heads]
    return function(*arrays, cache=cache(), implementation="mosaic_tpu")


STRICT = [
    Row(
        "mosaic_tpu without a TPU",
        lambda: attend_strictly("mosaic_tpu", 128),
        "implementation='mosaic_tpu' needs a TPU, the arrays are on cpu; pass interpret=True",
        NotImplementedError,
    ),
    Row(
        "mosaic_gpu without a GPU",
        lambda: attend_strictly("mosaic_gpu", 128),
        "implementation='mosaic_gpu' needs an NVIDIA GPU, the arrays are on cpu|needs? jax >= 0.11",
        NotImplementedError,
    ),
    Row(
        "head_dim that a kernel does not take",
        lambda: attend_strictly("mosaic_tpu", 40),
        'cannot run this attention: .*head_dim=40.*use implementation="xla"',
        NotImplementedError,
    ),
    Row(
        "append by a kernel that does not take it",
        lambda: append(implementation="mosaic_tpu"),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
    Row(
        "both by a kernel that does not take them",
        lambda: paged_kv.append_and_attend(
            kv(2, 4, 8), kv(), kv(), cache(), implementation="mosaic_tpu"
        ),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
    Row(
        "rows by a kernel that does not take them",
        lambda: rows_strictly(paged_kv.paged_dot_product_attention, 4),
        "implementation='mosaic_tpu' cannot run this attention: ",
        NotImplementedError,
    ),
    Row(
        "append of rows by a kernel that does not take them",
        lambda: paged_kv.append_rows(
            cache(), kv(2, 1, 2, 8), kv(2, 1, 2, 8), implementation="mosaic_tpu"
        ),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
    Row(
        "append and attention of rows by a kernel that does not take them",
        lambda: rows_strictly(paged_kv.append_and_attend_rows, 4, 2, 2),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
]

ROWS = [*ATTEND, *CACHE, *PARTIAL, *STRICT]
