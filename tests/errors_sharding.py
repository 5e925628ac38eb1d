"""Errors of caches over a mesh: see errors_api."""

import jax
import jax.numpy as jnp
from errors_api import Row, int32, kv
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_kv

SIZES = {"num_blocks": 8, "block_size": 4, "num_kv_heads": 2, "head_dim": 8}
SIZES |= {"batch_size": 2, "max_blocks_per_seq": 3, "dtype": jnp.float32}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)


def cache(**sizes):
    cache = paged_kv.init_paged_kv_cache(**{**SIZES, **sizes})
    table = jnp.broadcast_to(int32([0, 1, 2]), cache.block_table.shape)
    lengths = jnp.full_like(cache.seq_lengths, 5)
    return paged_kv.PagedKVCache(cache.key_pool, cache.value_pool, table, lengths)


def attend(query=(2, 4, 8), cache=cache, kind=AxisType.Auto, **options):
    return paged_kv.sharded_paged_attention(mesh(kind), kv(*query), cache(), **options)


def append(keys=(2, 2, 8), cache=cache, **options):
    keys = kv(*keys)
    return paged_kv.sharded_append_tokens(mesh(), cache(), keys, keys, **options)


def both(query, keys, **options):
    keys = kv(*keys)
    return paged_kv.sharded_append_and_attend(mesh(), kv(*query), keys, keys, cache(), **options)


def misplaced():
    """Cut by blocks where heads are to be cut."""
    return jax.device_put(cache(), NamedSharding(mesh(AxisType.Explicit), P("x")))


def wild():
    ok = cache()
    return paged_kv.set_block_table(ok, ok.block_table.at[1, 1].set(5))


ROWS = [
    Row(
        "mesh axis unknown",
        lambda: attend(tensor="model"),
        r"tensor='model' names 'model', but the axes of the mesh are \('x', 'y'\)",
    ),
    Row(
        "mesh axis in a tuple unknown",
        lambda: attend(data=("x", "z")),
        r"data=\('x', 'z'\) names 'z', but the axes of the mesh are",
    ),
    Row(
        "mesh axis twice",
        lambda: attend(data="x", context="x"),
        "context='x' and data='x' both name 'x'; a mesh axis can share out one thing",
    ),
    Row(
        "no mesh",
        lambda: paged_kv.sharded_paged_attention(None, kv(2, 4, 8), cache(), tensor="x"),
        "mesh=None, but no mesh is set: pass one, or call jax.set_mesh",
    ),
    Row(
        "sharded query heads",
        lambda: attend((2, 6, 8), tensor=("x", "y"), cache=lambda: cache(num_kv_heads=4)),
        "num_query_heads=6 must be a multiple of num_kv_heads=4",
    ),
    Row(
        "sharded kv heads",
        lambda: attend(tensor=("x", "y")),
        r"num_kv_heads of the cache=2 must be a multiple of the 4 ranks of tensor=\('x', 'y'\); "
        "init_sharded_cache gives each rank a head",
    ),
    Row(
        "init sharded heads",
        lambda: paged_kv.init_sharded_cache(
            mesh(), tensor=("x", "y"), **{**SIZES, "num_kv_heads": 3}
        ),
        "num_kv_heads=3 and the 4 ranks of .*: one must be a multiple of the other",
    ),
    Row(
        "init sharded blocks",
        lambda: paged_kv.init_sharded_cache(mesh(), data="x", **{**SIZES, "num_blocks": 9}),
        "num_blocks=9 must be a multiple of the 2 ranks of data='x'; pad it",
    ),
    Row(
        "sharded batch",
        lambda: attend((3, 4, 8), data="x", cache=lambda: cache(batch_size=3)),
        "batch_size=3 must be a multiple of the 2 ranks of data='x'; pad it: rows of length 0",
    ),
    Row(
        "sharded slots",
        lambda: attend(context="y", cache=lambda: cache(block_size=3)),
        "block_size=3 must be a multiple of the 2 ranks of context='y'; choose a larger block_siz",
    ),
    Row(
        "sharded tokens",
        lambda: attend((3, 4, 8), data="x", query_start_loc=int32([[0, 1], [0, 1]])),
        "num_tokens=3 must be a multiple of the 2 ranks of data='x'",
    ),
    Row(
        "sharded token each",
        lambda: attend((4, 4, 8), data="x"),
        "4 tokens for a batch of 2: without query_start_loc",
    ),
    Row(
        "sharded starts",
        lambda: attend(data="x", query_start_loc=int32([0, 1, 2])),
        r"query_start_loc \(3,\) must be \(data ranks, batch of a rank \+ 1\) = \(2, 2\)",
    ),
    Row(
        "sharded starts without data",
        lambda: attend(tensor="x", query_start_loc=int32([0, 1])),
        r"query_start_loc \(2,\) must be \(batch \+ 1,\) = \(3,\)",
    ),
    Row(
        "sharded new heads",
        lambda: append((2, 1, 8), tensor="x", cache=lambda: cache(num_kv_heads=4)),
        r"keys \(2, 1, 8\) must be .* with the 4 heads of the cache, or, where it has one for each "
        "of the 2 ranks of tensor='x'",
    ),
    Row("sharded tokens differ", lambda: both((2, 4, 8), (4, 2, 8)), "must have one row each"),
    Row(
        "sharded sinks", lambda: attend(sinks=kv(2), tensor="x"), r"sinks \(2,\) must be .* = \(4,"
    ),
    Row(
        "sharded schedule",
        lambda: attend(schedule=None),
        "got an unexpected keyword argument 'schedule'",
        TypeError,
    ),
    Row(
        "sharded unknown option",
        lambda: attend(context="x", soft_cap=30.0),
        "got an unexpected keyword argument 'soft_cap'",
        TypeError,
    ),
    Row(
        "sharded window of a kernel",
        lambda: attend(context="x", local_window_size=3, implementation="mosaic_tpu"),
        "implementation='mosaic_tpu' over context='x' takes no window and no ALiBi",
        NotImplementedError,
    ),
    Row(
        "sharded append by a kernel that does not take it",
        lambda: append(data="x", implementation="mosaic_tpu"),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
    Row(
        "sharded append and attention by a kernel that does not take them",
        lambda: both((2, 4, 8), (2, 2, 8), data="x", implementation="mosaic_tpu"),
        "implementation='mosaic_tpu' cannot run this append: ",
        NotImplementedError,
    ),
    Row(
        "pool elsewhere",
        lambda: attend(cache=misplaced, kind=AxisType.Explicit, tensor="x"),
        r"key_pool is placed as .*'x'.*, but must be placed as .*: make the cache with",
    ),
    Row(
        "sharded entry",
        lambda: attend(cache=wild, data="x"),
        r"block_table\[0, 1\]=5 is used by sequence 0 .* outside the pool: num_blocks=4",
    ),
    Row(
        "sharded slot",
        lambda: append(cache=wild, data="x"),
        r"block_table\[0, 1\]=5 is used by sequence 0 .* outside the pool: num_blocks=4",
    ),
]
