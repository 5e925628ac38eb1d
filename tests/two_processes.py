"""One of two processes that share a mesh: see test_two_processes.

Two devices each.  The context axis runs between the processes, the tensor axis within each, so that
both hold tokens of every sequence, and what they attend to meets over the network.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tolerances import tolerance

import paged_kv

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BATCH = 4, 2, 8, 4, 2
TABLE = np.int32([[6, 1, 3], [2, 7, 4]])
NUM_STEPS = 9  # the last in the third block of each row
AXES = {"tensor": "tensor", "context": "context"}


def dense(query, keys, values):
    """Of one query per sequence; keys and values (tokens, batch, kv_heads, head_dim)."""
    keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (keys, values))
    scores = np.einsum("bhd,tbhd->tbh", query, keys) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(0))
    return np.einsum("tbh,tbhd->bhd", weights / weights.sum(0), values)


def main(rank, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh(
        (2, 2), ("context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    cache = paged_kv.init_sharded_cache(
        mesh, **AXES, num_blocks=8, block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, batch_size=BATCH, max_blocks_per_seq=3, dtype=jnp.float32,
    )  # fmt: skip
    shapes = {shard.data.shape for shard in cache.key_pool.addressable_shards}
    assert shapes == {(8, BLOCK_SIZE // 2, KV_HEADS // 2, HEAD_DIM)}
    cache = paged_kv.set_block_table(cache, TABLE)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(query, keys, values, cache):
        cache = paged_kv.advance(cache, 1)
        return paged_kv.sharded_append_and_attend(mesh, query, keys, values, cache, **AXES)

    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.standard_normal((NUM_STEPS, BATCH, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    for now in range(NUM_STEPS):
        out, cache = step(query[now], keys[now], values[now], cache)
        expected = dense(query[now], keys[: now + 1], values[: now + 1])
        assert len(out.addressable_shards) == 2
        for shard in out.addressable_shards:
            np.testing.assert_allclose(
                shard.data, expected[shard.index], **tolerance("reference float32")
            )
    print(f"process {rank}: {NUM_STEPS} steps as dense attention")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
