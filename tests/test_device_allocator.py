"""Blocks handed out inside jit: no block twice, none lost, a row served wholly or not at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

NUM_BLOCKS, SIZE, BATCH, WIDTH = 12, 4, 4, 5
int32 = lambda values: jnp.asarray(values, jnp.int32)
device_allocate, device_free = jax.jit(paged_kv.device_allocate), jax.jit(paged_kv.device_free)


def empty():
    return paged_kv.init_paged_kv_cache(
        num_blocks=NUM_BLOCKS,
        block_size=SIZE,
        num_kv_heads=1,
        head_dim=8,
        batch_size=BATCH,
        max_blocks_per_seq=WIDTH,
        dtype=jnp.float32,
    )


def free_ids(allocator):
    """The free blocks, the next one first."""
    return np.asarray(allocator.free_ids)[: int(allocator.num_free)][::-1].tolist()


def held(cache):
    table = np.asarray(cache.block_table)
    return table[table >= 0].tolist()


def test_rows_get_the_blocks_that_their_tokens_need():
    allocator = paged_kv.init_device_allocator(NUM_BLOCKS, [7, 3, 11, 0])
    cache, allocator, is_allocated = device_allocate(empty(), allocator, int32([5, 0, 4, 0]))
    assert cache.block_table[:, :3].tolist() == [[7, 3, -1], [-1] * 3, [11, -1, -1], [-1] * 3]
    assert is_allocated.tolist() == [True] * 4 and free_ids(allocator) == [0]
    cache = paged_kv.advance(cache, int32([5, 0, 4, 0]))
    cache, allocator, _ = device_allocate(cache, allocator, int32([3, 0, 1, 0]))
    assert cache.block_table[:, :3].tolist() == [[7, 3, -1], [-1] * 3, [11, 0, -1], [-1] * 3]
    assert free_ids(allocator) == []


def test_rows_are_refused_whole_and_in_order():
    allocator = paged_kv.init_device_allocator(NUM_BLOCKS, [5, 6, 7])
    cache, allocator, is_allocated = device_allocate(empty(), allocator, int32([4, 12, 4, 0]))
    assert is_allocated.tolist() == [True, False, False, True]
    assert held(cache) == [5] and free_ids(allocator) == [6, 7]


@pytest.mark.parametrize("count", [-1, WIDTH * SIZE + 1, 2**31 - 1])
def test_a_count_that_cannot_be_is_refused(count):
    cache, allocator, is_allocated = device_allocate(
        empty(), paged_kv.init_device_allocator(NUM_BLOCKS), int32([0, count, 1, 0])
    )
    assert is_allocated.tolist() == [True, False, True, True]
    assert len(held(cache)) == 1 and int(allocator.num_free) == NUM_BLOCKS - 1


def test_a_window_that_has_left_stays_left():
    cache = dataclasses.replace(
        empty(),
        block_table=int32([[-1, 4, -1, -1, -1]] + [[-1] * WIDTH] * 3),
        seq_lengths=int32([8, 0, 0, 0]),
    )
    allocator = paged_kv.init_device_allocator(NUM_BLOCKS, [2, 9])
    cache, allocator, _ = device_allocate(cache, allocator, int32([5, 0, 0, 0]))
    assert cache.block_table[0].tolist() == [-1, 4, 2, 9, -1]


def test_a_shared_block_comes_back_once_with_its_last_row():
    table = int32([[1, 2, -1, -1, -1], [1, 3, -1, -1, -1], [1, 2, 4, -1, -1], [-1] * 5])
    cache = dataclasses.replace(empty(), block_table=table, seq_lengths=int32([8, 8, 12, 0]))
    allocator = paged_kv.init_device_allocator(NUM_BLOCKS, [])
    cache, allocator = device_free(cache, allocator, jnp.array([True, False, True, False]))
    assert sorted(free_ids(allocator)) == [2, 4]
    assert cache.block_table.tolist()[0] == [-1] * 5 and cache.seq_lengths.tolist() == [0, 8, 0, 0]
    cache, allocator = device_free(cache, allocator, jnp.array([False, True, False, False]))
    assert sorted(free_ids(allocator)) == [1, 2, 3, 4] and held(cache) == []


def test_entries_outside_the_pool_are_not_blocks():
    cache = dataclasses.replace(empty(), block_table=jnp.full((BATCH, WIDTH), NUM_BLOCKS + 5))
    _, allocator = device_free(
        cache, paged_kv.init_device_allocator(NUM_BLOCKS, []), jnp.ones(BATCH, jnp.bool_)
    )
    assert int(allocator.num_free) == 0


@jax.jit
def random_steps(cache, allocator, counts, ends):
    """Every step lengthens rows and ends some; returns what each step held."""

    def step(carry, inputs):
        cache, allocator = carry
        count, end = inputs
        cache, allocator, is_allocated = paged_kv.device_allocate(cache, allocator, count)
        cache = paged_kv.advance(cache, jnp.where(is_allocated, count, 0))
        state = (cache.block_table, cache.seq_lengths, allocator, is_allocated)
        return paged_kv.device_free(cache, allocator, end), state

    return jax.lax.scan(step, (cache, allocator), (counts, ends))


def test_a_scan_never_hands_a_block_out_twice():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 7, (400, BATCH)).astype(np.int32)
    ends = rng.random((400, BATCH)) < 0.15
    _, (tables, lengths, allocators, is_allocated) = random_steps(
        empty(), paged_kv.init_device_allocator(NUM_BLOCKS), counts, ends
    )
    before = np.zeros(BATCH, np.int64)
    for step in range(400):
        table, length = np.asarray(tables[step]), np.asarray(lengths[step])
        num_free = int(allocators.num_free[step])
        free = np.asarray(allocators.free_ids[step])[:num_free].tolist()
        assert sorted([*table[table >= 0].tolist(), *free]) == list(range(NUM_BLOCKS))
        np.testing.assert_array_equal((table >= 0).sum(1), -(-length // SIZE))
        served = np.asarray(is_allocated[step])
        np.testing.assert_array_equal(length, before + np.where(served, counts[step], 0))
        wanted = -(-(before + counts[step]) // SIZE) - -(-before // SIZE)
        fits = before + counts[step] <= WIDTH * SIZE
        room = num_free + wanted[served].sum()
        needed = np.cumsum(np.where(fits, wanted, 0))
        np.testing.assert_array_equal(served, fits & ((needed <= room) | (wanted == 0)))
        before = np.where(ends[step], 0, length)
    assert not np.asarray(is_allocated).all() and np.asarray(is_allocated).mean() > 0.5


def test_a_while_loop_decodes_until_the_pool_is_full():
    def body(carry):
        cache, allocator, _, steps = carry
        cache, allocator, is_allocated = paged_kv.device_allocate(cache, allocator, 1)
        cache = paged_kv.advance(cache, is_allocated.astype(jnp.int32))
        return cache, allocator, is_allocated.all(), steps + 1

    start = (empty(), paged_kv.init_device_allocator(NUM_BLOCKS), jnp.array(True), 0)
    cache, allocator, _, steps = jax.jit(
        lambda carry: jax.lax.while_loop(lambda c: c[2], body, carry)
    )(start)
    assert int(steps) == SIZE * 3 + 1 and int(allocator.num_free) == 0
    assert sorted(held(cache)) == list(range(NUM_BLOCKS))
    assert cache.seq_lengths.tolist() == [SIZE * 3] * BATCH
