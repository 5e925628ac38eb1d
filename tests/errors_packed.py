"""Errors of packed caches: see errors_api."""

import jax.numpy as jnp
from errors_api import Row, init, kv

import paged_kv
from paged_kv import interop


def attend(num_kv_heads, head_dim):
    """A call of the TPU kernel over a packed cache in bfloat16."""
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": 16}
    cache = init(**sizes, dtype=jnp.bfloat16, packed=True)
    query = kv(2, num_kv_heads, head_dim)
    return paged_kv.paged_attention(query, cache, implementation="mosaic_tpu")


def torn():
    """A packed cache whose blocks are not whole tokens."""
    pool = jnp.ones((8, 3, 128))
    table, lengths = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    cache = paged_kv.PackedKVCache(pool, pool, table, lengths, (2, 80))
    return paged_kv.slot_mapping(cache, num_tokens=2)


def flat():
    pool = jnp.ones((8, 128))
    table, lengths = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    cache = paged_kv.PackedKVCache(pool, pool, table, lengths, (2, 64))
    return paged_kv.slot_mapping(cache, num_tokens=2)


ROWS = [
    Row(
        "init packed",
        lambda: init(packed=True),
        r"block_size=4 \* num_kv_heads=2 \* head_dim=8 = 64 values in whole rows of 128, not 0 rows"
        " .* multiple of 8, or an unpacked cache",
    ),
    Row("pack", lambda: interop.pack(init()), "block_size=4 .* = 64 values in whole rows of 128"),
    Row("packed pool of torn tokens", torn, "head_dim=80 = 320 values .* not 3 rows of 128"),
    Row("packed pool without rows", flat, r"key_pool \(8, 128\) must be \(num_blocks, block_size"),
    Row(
        "packed blocks that fill no register",
        lambda: attend(3, 64),
        "block_size=16 with num_kv_heads=3 does not fill bfloat16 registers of 16 rows; use a "
        "block_size that is a multiple of 32",
        NotImplementedError,
    ),
]
