"""A packed cache is the unpacked one in other shapes: every op gives the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from bitwise import assert_same_bits
from hlo import assert_updated_in_place
from poison import poisoned_cache

import paged_kv
from paged_kv import interop

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOKENS = 12
STARTS = jnp.asarray([0, 1, 9, 9, 11], jnp.int32)


def cache_of(num_layers=None, num_kv_heads=2, dtype="float32"):
    """Four ragged sequences with room for `STARTS` new tokens, poisoned elsewhere."""
    return poisoned_cache(
        np.random.default_rng(1),
        [30, 0, 16, 7],
        capacity=[31, 8, 16, 9],
        num_kv_heads=num_kv_heads,
        num_layers=num_layers,
        dtype=dtype,
    ).cache


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def new_tokens(cache, seed=2, tokens=TOKENS):
    return normal(seed, tokens, cache.num_kv_heads, cache.head_dim)


def advanced(cache):
    return paged_kv.advance(cache, STARTS[1:] - STARTS[:-1])


@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("num_kv_heads, head_dim", [(2, 64), (3, 64), (8, 80), (1, 192)])
def test_pack_and_unpack_keep_every_bit(num_kv_heads, head_dim, num_layers):
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "num_layers": num_layers}
    cache = poisoned_cache(np.random.default_rng(0), [3, 17], dtype="bfloat16", **sizes).cache
    packed = interop.pack(cache)
    assert packed.key_pool.shape[-2:] == (16 * num_kv_heads * head_dim // 128, 128)
    assert packed.key_pool.nbytes == cache.key_pool.nbytes
    for name in ("num_blocks", "block_size", "num_kv_heads", "head_dim", "num_layers"):
        assert getattr(packed, name) == getattr(cache, name)
    assert_same_bits(interop.unpack(packed), cache)
    assert interop.pack(packed) is packed
    assert interop.unpack(cache) is cache


@pytest.mark.parametrize("num_layers", [None, 2])
def test_init_makes_an_empty_packed_cache(num_layers):
    sizes = {
        "num_blocks": 5, "block_size": 4, "num_kv_heads": 3, "head_dim": 64, "batch_size": 2,
        "max_blocks_per_seq": 3, "dtype": jnp.bfloat16, "num_layers": num_layers,
    }  # fmt: skip
    packed = paged_kv.init_paged_kv_cache(**sizes, packed=True)
    assert isinstance(packed, paged_kv.PackedKVCache)
    assert_same_bits(packed, interop.pack(paged_kv.init_paged_kv_cache(**sizes)))


def append(cache):
    new = new_tokens(cache)
    return paged_kv.append_tokens(advanced(cache), new, -new, query_start_loc=STARTS)


IDS = jnp.asarray([0, -1, 2], jnp.int32)
EITHER = {
    "advance": advanced,
    "truncate": lambda cache: paged_kv.truncate(cache, cache.seq_lengths // 2),
    "reset_sequences": lambda cache: paged_kv.reset_sequences(cache, cache.seq_lengths > 9),
    "set_block_table": lambda cache: paged_kv.set_block_table(cache, cache.block_table + 1),
    "copy_blocks": lambda cache: paged_kv.copy_blocks(cache, IDS, IDS + 1),
    "scrub_blocks": lambda cache: paged_kv.scrub_blocks(cache, IDS),
    "slot_mapping": lambda cache: paged_kv.slot_mapping(
        advanced(cache), query_start_loc=STARTS, num_tokens=TOKENS
    ),
    "make_schedule": lambda cache: paged_kv.make_schedule(
        advanced(cache), num_query_heads=4, query_start_loc=STARTS
    ),
}
SINGLE = {
    "allocate_blocks": lambda cache: paged_kv.allocate_blocks(
        paged_kv.reset_sequences(cache, cache.seq_lengths >= 0),
        sequence_idx=1, num_new_tokens=20, free_block_ids=[1, 3, 4],
    ),
    "append_kv": lambda cache: paged_kv.append_kv(cache, 1, *[new_tokens(cache, 6, 8)] * 2),
    "gather_kv": lambda cache: paged_kv.gather_kv(cache, 0),
    "copy_blocks": EITHER["copy_blocks"],
    "append_tokens": append,
}  # fmt: skip
model_step = jax.jit(steps.model_step)
STACKED = {"model_step": lambda cache: model_step(normal(7, TOKENS, 4, 64), STARTS, cache)}
CASES = [
    *((name, op, None) for name, op in SINGLE.items()),
    *((name, op, 2) for name, op in {**EITHER, **STACKED}.items()),
]


def unpacked(tree):
    """Every packed cache in a result, unpacked."""
    is_cache = lambda x: isinstance(x, paged_kv.PagedKVCache)
    convert = lambda x: interop.unpack(x) if is_cache(x) else x
    return jax.tree.map(convert, tree, is_leaf=is_cache)


@pytest.mark.parametrize("name, op, layers", CASES, ids=lambda x: "" if callable(x) else str(x))
def test_every_op_gives_the_bits_it_gives_unpacked(name, op, layers):
    cache = cache_of(layers)
    assert_same_bits(unpacked(op(interop.pack(cache))), op(cache))


def test_an_op_returns_the_cache_it_was_given():
    """Packed in, packed out: nothing converts on the way."""
    packed = interop.pack(cache_of())
    for op in (*list(EITHER.values())[:6], append):
        assert isinstance(op(packed), paged_kv.PackedKVCache)


@pytest.mark.parametrize("attends", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_unpacked_cache(attends):
    def loss(pools, query, new, packed):
        cache = dataclasses.replace(unpacked_cache, key_pool=pools[0], value_pool=pools[1])
        cache = paged_kv.append_tokens(interop.pack(cache) if packed else cache, new, -new)
        out = paged_kv.paged_attention(query, cache) if attends else query
        return jnp.sum(out**2) + jnp.sum(interop.unpack(cache).key_pool[1] ** 3)

    unpacked_cache = paged_kv.truncate(cache_of(), jnp.asarray([9, 0, 9, 7], jnp.int32))
    pools = [jnp.nan_to_num(pool) for pool in jax.tree.leaves(unpacked_cache)[:2]]
    arrays = pools, normal(8, 4, 4, 64), new_tokens(unpacked_cache, tokens=4)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    assert_same_bits(gradient(*arrays, True), gradient(*arrays, False))


def test_export_keeps_a_packed_cache_packed():
    cache = interop.pack(cache_of(num_layers=2))
    arguments = normal(7, TOKENS, 4, 64), STARTS, cache
    exported = jax.export.export(model_step)(*arguments)
    actual = jax.export.deserialize(exported.serialize()).call(*arguments)
    assert isinstance(actual[1], paged_kv.PackedKVCache)
    assert_same_bits(actual, model_step(*arguments))


def test_donated_packed_step_copies_no_pool():
    sizes = steps.Sizes(dtype="float32", head_dim=64, packed=True)
    compiled = steps.compile_donated(sizes)
    assert_updated_in_place(compiled, sizes.layer_elements)
    assert compiled.memory_analysis().temp_size_in_bytes < sizes.layer_elements
