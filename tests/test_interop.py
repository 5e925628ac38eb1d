"""Other forms of a cache: each holds what its definition says, and the way back is exact."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from ragged import LENGTHS, cache_of, int32, normal, slots_of

import paged_kv
from paged_kv import interop

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {"block_size": 4, "num_kv_heads": 3, "head_dim": 8, "dtype": jnp.bfloat16}
# what one value of the key pool, and of the value pool, is in each layout
PLACES = {
    "NHD": lambda pools, b, o, h: (pools[0][b, o, h], pools[1][b, o, h]),
    "HND": lambda pools, b, o, h: (pools[0][b, h, o], pools[1][b, h, o]),
    "heads_first": lambda pools, b, o, h: (pools[0][h, b, o], pools[1][h, b, o]),
    "flat": lambda pools, b, o, h: (pools[0][4 * b + o, h], pools[1][4 * b + o, h]),
    "flashinfer": lambda pools, b, o, h: (pools[b, 0, o, h], pools[b, 1, o, h]),
    "vllm": lambda pools, b, o, h: (pools[0, b, o, h], pools[1, b, o, h]),
    "rpa_v2": lambda pools, b, o, h: (pools[b, o, 2 * h], pools[b, o, 2 * h + 1]),
    "rpa_v3": lambda pools, b, o, h: (pools[b, o, h, 0, :8], pools[b, o, h, 1, :8]),
}


def tidy(cache):
    """Table entries that hold no token are -1."""
    first = np.arange(cache.max_blocks_per_seq)[None] * cache.block_size
    is_used = first < np.asarray(cache.seq_lengths)[:, None]
    table = np.where(is_used, cache.block_table, -1)
    return dataclasses.replace(cache, block_table=int32(table))


@pytest.mark.parametrize("layout", interop.LAYOUTS)
def test_a_layout_has_each_value_where_it_says_and_comes_back(layout):
    cache = cache_of(**SIZES).cache
    pools = interop.to_layout(cache, layout)
    arrays = jax.tree.map(np.asarray, pools)
    for block, offset, head in ((0, 0, 0), (3, 2, 1), (cache.num_blocks - 1, 3, 2)):
        place = PLACES[layout](arrays, block, offset, head)
        expected = (pool[block, offset, head] for pool in (cache.key_pool, cache.value_pool))
        assert_same_bits(list(place), list(map(np.asarray, expected)))
    sizes = {"rpa_v3": {"num_kv_heads": 3, "head_dim": 8}, "flat": {"block_size": 4}}
    table = cache.block_table, cache.seq_lengths
    assert_same_bits(interop.from_layout(pools, layout, *table, **sizes.get(layout, {})), cache)


@pytest.mark.parametrize("layout", ["heads_first", "flat", "vllm", "flashinfer", "rpa_v3"])
def test_a_layout_of_a_stack_is_that_of_each_layer(layout):
    stack = cache_of(num_layers=2, **{**SIZES, "dtype": jnp.float32}).cache
    pools = interop.to_layout(stack, layout)
    for layer in range(2):
        single = dataclasses.replace(
            stack, key_pool=stack.key_pool[layer], value_pool=stack.value_pool[layer]
        )
        assert_same_bits(
            jax.tree.map(lambda x, layer=layer: x[layer], pools), interop.to_layout(single, layout)
        )
    sizes = {"rpa_v3": {"num_kv_heads": 3, "head_dim": 8}, "flat": {"block_size": 4}}
    table = stack.block_table, stack.seq_lengths
    assert_same_bits(interop.from_layout(pools, layout, *table, **sizes.get(layout, {})), stack)


@pytest.mark.parametrize(("dtype", "per_register"), [(jnp.float32, 1), (jnp.bfloat16, 2)])
def test_rpa_v3_fills_registers_with_zeros(dtype, per_register):
    cache = cache_of(**{**SIZES, "dtype": dtype}).cache
    pools = interop.to_layout(cache, "rpa_v3")
    assert pools.shape == (cache.num_blocks, 4, 6 // per_register, per_register, 128)
    assert not np.asarray(pools[..., 8:]).astype(np.float32).any()


def test_rpa_arguments_count_the_decodes_that_come_first():
    cache = cache_of(lengths=[5, 9, 30, 1], **SIZES).cache
    rpa = interop.to_rpa(cache, int32([0, 1, 2, 9, 10]))
    assert rpa.distribution.tolist() == [2, 2, 4]
    assert rpa.kv_lens.tolist() == [5, 9, 30, 1] and rpa.cu_q_lens.tolist() == [0, 1, 2, 9, 10]
    assert rpa.page_indices.shape == (cache.block_table.size,)
    assert (rpa.page_indices >= 0).all()
    assert interop.to_rpa(cache).distribution.tolist() == [4, 4, 4]
    back = interop.from_rpa(*rpa[:3], num_kv_heads=3, head_dim=8)
    assert_same_bits(back, tidy(cache))


def test_csr_has_the_blocks_of_each_sequence_and_comes_back():
    cache = cache_of(**SIZES).cache
    csr = interop.to_csr(cache)
    needs = [-(-length // 4) for length in LENGTHS]
    assert csr.indptr.tolist() == [0, *np.cumsum(needs)]
    blocks = [cache.block_table[row, :need] for row, need in enumerate(needs)]
    np.testing.assert_array_equal(csr.indices, np.concatenate(blocks))
    assert csr.last_page_len.tolist() == [(n - 1) % 4 + 1 if n else 0 for n in LENGTHS]
    assert_same_bits(interop.from_csr(cache, csr), tidy(cache))
    traced = jax.jit(lambda cache: interop.to_csr(cache, capacity=40))(cache)
    assert traced.indices.shape == (40,)
    np.testing.assert_array_equal(traced.indices[: sum(needs)], csr.indices)
    assert_same_bits(interop.from_csr(cache, traced), tidy(cache))


@pytest.mark.parametrize("is_packed", [False, True])
def test_slots_are_written_and_read_as_tokens_are_appended(is_packed):
    """By the slots that `slot_mapping` gives, in a stack, padding left out."""
    sizes = {"num_kv_heads": 2, "head_dim": 32, "block_size": 4, "num_layers": 2}
    cache = paged_kv.advance(cache_of(lengths=[0, 3, 4], room=2, **sizes).cache, 2)
    cache = interop.pack(cache) if is_packed else cache
    keys, values = normal(1, 7, 2, 32), normal(2, 7, 2, 32)
    starts = int32([0, 2, 4, 6])
    slots = paged_kv.slot_mapping(cache, query_start_loc=starts, num_tokens=7)
    np.testing.assert_array_equal(slots, slots_of(cache, starts, 7))
    expected = jax.jit(paged_kv.append_tokens)(
        cache, keys, values, query_start_loc=starts, layer=int32(1)
    )
    written = jax.jit(interop.write_slots)(cache, keys, values, slots, layer=int32(1))
    assert_same_bits(written, expected)
    read = interop.read_slots(written, slots, layer=1)
    assert_same_bits([x[:6] for x in read], [keys[:6], values[:6]])
    assert not any(np.asarray(x[6]).any() for x in read)


def test_wild_slots_and_layers_under_jit_write_nothing():
    cache = cache_of(num_layers=2, **SIZES).cache
    keys = normal(1, 3, 3, 8)
    write = jax.jit(interop.write_slots)
    assert_same_bits(write(cache, keys, keys, int32([-1, -(2**31), 2**30]), layer=int32(0)), cache)
    assert_same_bits(write(cache, keys, keys, int32([0, 1, 2]), layer=int32(-1)), cache)


@pytest.mark.parametrize("num_layers", [None, 2])
def test_dense_rows_come_back(num_layers):
    layers = () if num_layers is None else (num_layers,)
    keys, values = (normal(s, *layers, 3, 10, 2, 8) for s in (1, 2))
    cache = interop.from_dense(keys, values, int32([10, 0, 7]), block_size=4)
    assert cache.num_layers == num_layers and cache.max_blocks_per_seq == 3
    dense = interop.to_dense(cache)
    is_token = np.arange(12)[None] < np.array([[10], [0], [7]])
    for actual, given in zip(dense, (keys, values), strict=True):
        padded = np.pad(given, [(0, 0)] * (len(layers) + 1) + [(0, 2), (0, 0), (0, 0)])
        assert_same_bits(np.asarray(actual), np.where(is_token[..., None, None], padded, 0))
    whole = interop.to_dense(interop.from_dense(keys, values, block_size=5))
    assert_same_bits(whole, (keys, values))


def test_a_dense_view_of_a_cache_holds_its_tokens_and_no_poison():
    poisoned = cache_of(**{**SIZES, "dtype": jnp.float32})
    keys, values = jax.jit(interop.to_dense)(poisoned.cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(keys[row, :length], poisoned.keys[row])
        np.testing.assert_array_equal(values[row, :length], poisoned.values[row])
        assert not np.asarray(keys[row, length:]).any()


def test_dlpack_views_share_memory_and_come_back():
    cache = cache_of(**{**SIZES, "dtype": jnp.float16}).cache
    views = interop.to_dlpack(cache, np.from_dlpack)
    assert views.key_pool.ctypes.data == cache.key_pool.unsafe_buffer_pointer()
    writable = map(np.array, views)  # NumPy exports nothing else
    assert_same_bits(interop.from_dlpack(*writable), cache)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_sees_the_pools():
    import torch  # pyright: ignore[reportMissingImports]

    cache = cache_of(**SIZES).cache
    views = interop.to_dlpack(cache, torch.from_dlpack)
    assert views.key_pool.dtype == torch.bfloat16
    assert_same_bits(interop.from_dlpack(*views), cache)
