"""The contract of the cache and of its four eager functions, one test per line of it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from poison import poisoned_cache

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {
    "num_blocks": 8,
    "block_size": 4,
    "num_kv_heads": 2,
    "head_dim": 3,
    "batch_size": 2,
    "max_blocks_per_seq": 3,
}


def empty_cache(**changes):
    return paged_kv.init_paged_kv_cache(**{**SIZES, "dtype": jnp.float32, **changes})


def tokens(rng, count, dtype=np.float32):
    return rng.standard_normal((count, 2, 3)).astype(dtype)


# --- PagedKVCache


def test_cache_is_built_positionally_in_the_order_of_the_contract():
    pools = jnp.ones((8, 4, 2, 3)), jnp.zeros((8, 4, 2, 3))
    table, lengths = jnp.full((2, 3), -1, jnp.int32), jnp.zeros(2, jnp.int32)
    cache = paged_kv.PagedKVCache(*pools, table, lengths)
    assert cache.key_pool is pools[0]
    assert cache.value_pool is pools[1]
    assert cache.block_table is table
    assert cache.seq_lengths is lengths


def test_cache_is_a_frozen_dataclass():
    cache = empty_cache()
    assert dataclasses.is_dataclass(cache)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.seq_lengths = jnp.ones(2, jnp.int32)  # pyright: ignore[reportAttributeAccessIssue]


def test_fields_past_the_four_have_defaults():
    fields = dataclasses.fields(paged_kv.PagedKVCache)
    names = [field.name for field in fields]
    assert names[:4] == ["key_pool", "value_pool", "block_table", "seq_lengths"]
    assert all(field.default is not dataclasses.MISSING for field in fields[4:])


def test_cache_is_a_pytree_of_its_arrays():
    cache = empty_cache()
    leaves, tree = jax.tree.flatten(cache)
    assert [leaf.shape for leaf in leaves] == [(8, 4, 2, 3), (8, 4, 2, 3), (2, 3), (2,)]
    assert isinstance(jax.tree.unflatten(tree, leaves), paged_kv.PagedKVCache)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert paths == [".key_pool", ".value_pool", ".block_table", ".seq_lengths"]


@pytest.mark.parametrize("num_layers", [None, 5])
def test_properties_index_shapes_from_the_right(num_layers):
    cache = empty_cache(num_layers=num_layers)
    sizes = cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim
    assert sizes == (8, 4, 2, 3)


# --- init_paged_kv_cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_init_gives_an_empty_cache_of_the_asked_shapes(dtype):
    cache = empty_cache(dtype=dtype)
    for pool in (cache.key_pool, cache.value_pool):
        assert (pool.shape, pool.dtype) == ((8, 4, 2, 3), dtype)
    np.testing.assert_array_equal(cache.block_table, np.full((2, 3), -1, np.int32))
    np.testing.assert_array_equal(cache.seq_lengths, np.zeros(2, np.int32))
    assert cache.block_table.dtype == cache.seq_lengths.dtype == jnp.int32


def test_init_of_a_stack_gives_pools_a_leading_layer_axis_and_one_table():
    cache = empty_cache(num_layers=5)
    assert cache.key_pool.shape == cache.value_pool.shape == (5, 8, 4, 2, 3)
    assert cache.block_table.shape == (2, 3)
    assert cache.seq_lengths.shape == (2,)


def test_init_takes_keywords_only():
    parameters = inspect.signature(paged_kv.init_paged_kv_cache).parameters.values()
    assert [p.name for p in parameters] == [*SIZES, "dtype", "num_layers", "packed"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)


def test_num_blocks_for_fills_the_memory_and_no_more():
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_dim": 64, "num_layers": 3}
    block_bytes = 2 * 16 * 2 * 64 * 2 * 3  # keys and values, two bytes each
    for memory, expected in [(10 * block_bytes, 10), (11 * block_bytes - 1, 10)]:
        assert paged_kv.num_blocks_for(memory, dtype=jnp.bfloat16, **sizes) == expected


# --- allocate_blocks


@pytest.mark.parametrize(
    ("num_new_tokens", "consumed"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (12, 3)]
)
def test_allocate_consumes_as_many_blocks_as_the_tokens_fill(num_new_tokens, consumed):
    cache, count = paged_kv.allocate_blocks(
        empty_cache(), sequence_idx=1, num_new_tokens=num_new_tokens, free_block_ids=[6, 2, 7, 1]
    )
    assert count == consumed
    expected = [6, 2, 7][:consumed] + [-1] * (3 - consumed)
    np.testing.assert_array_equal(cache.block_table, [[-1, -1, -1], expected])


def test_allocate_changes_the_row_alone():
    before = empty_cache()
    after, _ = paged_kv.allocate_blocks(
        before, sequence_idx=0, num_new_tokens=5, free_block_ids=[3, 4]
    )
    assert_same_bits(dataclasses.replace(after, block_table=before.block_table), before)
    np.testing.assert_array_equal(before.block_table, np.full((2, 3), -1))


def test_allocate_fills_the_last_block_before_it_takes_another():
    cache = with_row([5, -1, -1], length=3)
    for num_new_tokens, consumed in [(1, 0), (2, 1)]:
        _, count = paged_kv.allocate_blocks(
            cache, sequence_idx=0, num_new_tokens=num_new_tokens, free_block_ids=[2]
        )
        assert count == consumed


def test_allocate_keeps_and_counts_entries_already_held_past_the_length():
    cache, count = paged_kv.allocate_blocks(
        with_row([5, 6, -1], length=1), sequence_idx=0, num_new_tokens=10, free_block_ids=[2, 3]
    )
    assert count == 1
    np.testing.assert_array_equal(cache.block_table[0], [5, 6, 2])


def test_allocate_checks_only_the_ids_it_consumes():
    cache, count = paged_kv.allocate_blocks(
        empty_cache(), sequence_idx=0, num_new_tokens=4, free_block_ids=[3, 3, -1, 99]
    )
    assert count == 1
    np.testing.assert_array_equal(cache.block_table[0], [3, -1, -1])


@pytest.mark.parametrize("as_ids", [tuple, np.array, jnp.array, list])
def test_allocate_takes_any_sequence_of_ids(as_ids):
    _, count = paged_kv.allocate_blocks(
        empty_cache(), sequence_idx=0, num_new_tokens=5, free_block_ids=as_ids([7, 0])
    )
    assert count == 2


def with_row(row, length):
    """A cache whose sequence 0 has this row of the table, and this length."""
    cache = empty_cache()
    return dataclasses.replace(
        cache,
        block_table=cache.block_table.at[0].set(jnp.asarray(row, jnp.int32)),
        seq_lengths=cache.seq_lengths.at[0].set(length),
    )


# --- append_kv and gather_kv


def test_append_writes_after_the_length_and_advances_it():
    rng = np.random.default_rng(0)
    before = with_row([5, 2, -1], length=3)
    keys, values = tokens(rng, 3), tokens(rng, 3)
    after = paged_kv.append_kv(before, 0, keys, values)
    np.testing.assert_array_equal(after.seq_lengths, [6, 0])
    for new, old, rows in [
        (after.key_pool, before.key_pool, keys),
        (after.value_pool, before.value_pool, values),
    ]:
        expected = np.array(old)
        expected[5, 3], expected[2, 0], expected[2, 1] = rows
        np.testing.assert_array_equal(new, expected)


def test_append_of_no_tokens_changes_nothing():
    before = with_row([5, 2, -1], length=3)
    none = jnp.zeros((0, 2, 3))
    assert_same_bits(paged_kv.append_kv(before, 0, none, none), before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16", "float16"])
def test_append_casts_to_the_pools_dtype_without_a_warning(dtype, pool_dtype):
    rng = np.random.default_rng(1)
    keys, values = tokens(rng, 3, dtype), tokens(rng, 3, dtype)
    cache = dataclasses.replace(
        empty_cache(dtype=pool_dtype), block_table=jnp.asarray([[0, 1, 2], [3, 4, 5]], jnp.int32)
    )
    gathered = paged_kv.gather_kv(paged_kv.append_kv(cache, 0, keys, values), 0)
    for actual, given in zip(gathered[:2], (keys, values), strict=True):
        assert actual.dtype == pool_dtype
        np.testing.assert_array_equal(actual, given.astype(np.float32).astype(pool_dtype))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40])
def test_gather_returns_the_valid_tokens_of_scattered_blocks(length):
    poisoned = poisoned_cache(np.random.default_rng(2), [7, length])
    keys, values, seq_len = paged_kv.gather_kv(poisoned.cache, 1)
    assert type(seq_len) is int
    assert seq_len == length
    np.testing.assert_array_equal(keys, poisoned.keys[1])
    np.testing.assert_array_equal(values, poisoned.values[1])


@pytest.mark.parametrize("seed", range(3))
def test_gather_returns_what_was_allocated_and_appended(seed):
    """Three sequences grow in random steps, their blocks interleaved."""
    rng = np.random.default_rng(seed)
    cache = empty_cache(batch_size=3, num_blocks=9)
    free = list(rng.permutation(9))
    grown = [(np.zeros((0, 2, 3), np.float32),) * 2 for _ in range(3)]
    for _ in range(8):
        idx, count = int(rng.integers(3)), int(rng.choice([0, 1, 4, 5]))
        if len(grown[idx][0]) + count > 12:
            continue
        new = tokens(rng, count), tokens(rng, count)
        cache, consumed = paged_kv.allocate_blocks(
            cache, sequence_idx=idx, num_new_tokens=count, free_block_ids=free
        )
        free = free[consumed:]
        cache = paged_kv.append_kv(cache, idx, *new)
        grown[idx] = tuple(np.concatenate(pair) for pair in zip(grown[idx], new, strict=True))
    for idx, (keys, values) in enumerate(grown):
        gathered = paged_kv.gather_kv(cache, idx)
        np.testing.assert_array_equal(gathered[0], keys)
        np.testing.assert_array_equal(gathered[1], values)
        assert gathered[2] == len(keys)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("allocate_blocks", ["cache", "sequence_idx", "num_new_tokens", "free_block_ids"]),
        ("append_kv", ["cache", "sequence_idx", "keys_new", "values_new"]),
        ("gather_kv", ["cache", "sequence_idx"]),
    ],
)
def test_names_and_order_of_arguments_are_the_contracts(function, names):
    parameters = inspect.signature(getattr(paged_kv, function)).parameters
    assert list(parameters) == names
