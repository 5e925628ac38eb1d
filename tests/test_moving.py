"""Blocks that move keep their contents: copies, host memory and back, defragmenting."""

import dataclasses
from functools import partial

import aot_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

NUM_BLOCKS, SIZE, BATCH, WIDTH = 20, 4, 4, 8
int32 = lambda values: jnp.asarray(values, jnp.int32)


def random_cache(num_layers=None, dtype=jnp.float32, packed=False):
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=NUM_BLOCKS,
        block_size=SIZE,
        num_kv_heads=2,
        head_dim=64 if packed else 8,
        batch_size=BATCH,
        max_blocks_per_seq=WIDTH,
        dtype=dtype,
        num_layers=num_layers,
        packed=packed,
    )
    rng = np.random.default_rng(0)
    draw = lambda pool: jnp.asarray(rng.standard_normal(pool.shape), pool.dtype)
    return dataclasses.replace(
        cache, key_pool=draw(cache.key_pool), value_pool=draw(cache.value_pool)
    )


def pools(cache):
    """Keys and values, (2, layers, num_blocks, ...)."""
    return np.stack([np.asarray(cache.key_pool), np.asarray(cache.value_pool)]).reshape(
        2, cache.num_layers or 1, NUM_BLOCKS, -1
    )


# ---- host memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "dtype", "packed", "is_jitted"),
    [
        (None, jnp.float32, False, False),
        (3, jnp.bfloat16, False, True),
        (None, jnp.bfloat16, True, True),
    ],
    ids=["one layer, eager", "a stack, jitted", "a packed layer"],
)
def test_blocks_come_back_from_the_host_as_they_were(num_layers, dtype, packed, is_jitted):
    cache = random_cache(num_layers, dtype, packed)
    out, back = paged_kv.swap_out, paged_kv.swap_in
    source, target = [3, 9, 1], [5, 3, 0]
    if is_jitted:
        out, back = jax.jit(out), jax.jit(back, donate_argnames="cache")
        source, target = int32([*source, -1]), int32([*target, -1])
    host = out(cache, source)
    assert host.keys.sharding.memory_kind == host.values.sharding.memory_kind == "pinned_host"
    assert host.nbytes == 4 * pools(cache).nbytes // NUM_BLOCKS
    before = pools(cache)
    wiped = jax.jit(paged_kv.scrub_blocks)(cache, int32([3, 9, 1]))
    after = back(wiped, host, target)
    assert after.key_pool.sharding.memory_kind == "device"
    expected = before.copy()
    expected[:, :, [3, 9, 1]] = 0
    expected[:, :, [5, 3, 0]] = before[:, :, [3, 9, 1]]
    np.testing.assert_array_equal(pools(after), expected)


def test_swapping_in_leaves_other_blocks_alone_and_skips_ids_below_0():
    cache = random_cache()
    host = paged_kv.swap_out(cache, int32([2, -1]))
    np.testing.assert_array_equal(host.keys[1], 0)
    after = paged_kv.swap_in(cache, host, int32([-1, -1]))
    np.testing.assert_array_equal(pools(after), pools(cache))


def test_ids_past_the_pool_are_skipped_under_jit():
    cache = random_cache()
    host = jax.jit(paged_kv.swap_out)(cache, int32([NUM_BLOCKS, 4]))
    np.testing.assert_array_equal(host.values[0], 0)
    after = jax.jit(paged_kv.swap_in)(cache, host, int32([4, NUM_BLOCKS]))
    np.testing.assert_array_equal(pools(after)[:, :, 4], 0)
    np.testing.assert_array_equal(pools(after)[:, :, 5:], pools(cache)[:, :, 5:])


@pytest.mark.aot
def test_a_tpu_swaps_through_pinned_memory_and_copies_no_pool():
    case = aot_tpu.Case("v5e", num_layers=2)
    ids = case.array((8,), jnp.int32)
    out = jax.jit(paged_kv.swap_out).lower(case.cache, ids).compile()
    kinds = {sharding.memory_kind for sharding in jax.tree.leaves(out.output_shardings)}
    assert kinds == {"pinned_host"}
    pinned = aot_tpu.sharding("v5e").with_memory_kind("pinned_host")
    host = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=pinned),
        jax.eval_shape(paged_kv.swap_out, case.cache, ids),
    )
    back = jax.jit(paged_kv.swap_in, donate_argnums=0).lower(case.cache, host, ids).compile()
    pool_bytes = 2 * case.pool_elements * jnp.dtype(case.dtype).itemsize  # of both layers
    assert back.memory_analysis().alias_size_in_bytes >= 2 * pool_bytes
    for program in (out, back):
        assert program.memory_analysis().temp_size_in_bytes < pool_bytes / 8


# ---- pending work, defragmenting -----------------------------------------------------------------


def test_copies_come_before_scrubs():
    cache = random_cache()
    pending = (
        paged_kv.BlockAllocator(4, 4)
        .take_pending()
        ._replace(copy_sources=int32([2, 3]), copy_targets=int32([5, -1]), scrub_ids=int32([2, -1]))
    )
    before, after = pools(cache), pools(jax.jit(paged_kv.apply_pending)(cache, pending))
    np.testing.assert_array_equal(after[:, :, 5], before[:, :, 2])
    np.testing.assert_array_equal(after[:, :, 2], 0)
    np.testing.assert_array_equal(after[:, :, 6:], before[:, :, 6:])


@pytest.mark.parametrize(("num_layers", "packed", "max_moves"), [(2, True, None), (None, False, 2)])
def test_defragment_moves_contents_and_rows_together(num_layers, packed, max_moves):
    allocator = paged_kv.BlockAllocator(NUM_BLOCKS, SIZE)
    names = "abcd"
    for count, name in [(5, "a"), (9, "x"), (3, "b"), (8, "c"), (6, "a"), (1, "d"), (7, "b")]:
        (allocator.extend if name in allocator else allocator.allocate)(name, count)
    allocator.free("x")
    allocator.fork("c", "e")
    allocator.free("c")
    names = "abed"
    table = jnp.asarray(allocator.block_table(names, WIDTH))
    table = table.at[3, WIDTH - 1].set(NUM_BLOCKS + 7)  # unused entries may hold anything
    lengths = int32([allocator.num_tokens(name) for name in names])
    cache = dataclasses.replace(
        random_cache(num_layers, packed=packed), block_table=table, seq_lengths=lengths
    )
    old_rows, old = {name: allocator.blocks(name) for name in names}, pools(cache)
    rounds = 0
    while True:
        moved = paged_kv.defragment(cache, allocator, max_moves=max_moves)
        rounds += 1
        allocator.check_invariants()
        rows = allocator.block_table(names, WIDTH)
        rows[3, WIDTH - 1] = NUM_BLOCKS + 7
        np.testing.assert_array_equal(moved.block_table, rows)
        for name in names:
            new = pools(moved)[:, :, allocator.blocks(name)]
            np.testing.assert_array_equal(new, old[:, :, old_rows[name]])
        if moved is cache:
            break
        cache = moved
    assert rounds == 2 if max_moves is None else rounds > 3
    held = [block for name in names for block in allocator.blocks(name)]
    assert held == [*allocator.blocks("a"), *allocator.blocks("b"), *held[-3:]]
    assert sorted(held) == list(range(len(held)))


# ---- a real cache under an allocator -------------------------------------------------------------


class Server:
    """Four rows of a real cache driven by an allocator, a step at a time; all that can happen."""

    MAX_TOKENS = 32
    apply = staticmethod(jax.jit(paged_kv.apply_pending, donate_argnums=0))
    swap_out = staticmethod(jax.jit(paged_kv.swap_out))
    swap_in = staticmethod(jax.jit(paged_kv.swap_in, donate_argnums=0))

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.allocator = paged_kv.BlockAllocator(NUM_BLOCKS, SIZE, enable_prefix_caching=True)
        self.cache = jax.tree.map(jnp.zeros_like, random_cache())
        self.rows, self.tokens = [None] * BATCH, {}  # name by row; tokens by name
        self.waiting, self.number, self.swaps, self.full = {}, 0, 0, 0

    @staticmethod
    @partial(jax.jit, donate_argnums=0)
    def step(cache, table, lengths, counts, keys):
        """What a model's step does with the cache, `lengths` as they were before it."""
        cache = dataclasses.replace(cache, block_table=table, seq_lengths=lengths)
        cache = paged_kv.advance(cache, counts)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
        return paged_kv.append_tokens(cache, keys, -keys, query_start_loc=starts)

    def contents(self, tokens):
        """(n, 2, 8): stands for keys, which depend on all tokens before."""
        chain = np.cumsum(np.asarray(tokens, np.float32) * 0.5) % 1024
        return np.broadcast_to(chain[:, None, None], (len(chain), 2, 8))

    def grow(self, name, count):
        try:
            self.allocator.extend(name, count)
            return count
        except paged_kv.OutOfBlocksError:
            self.full += 1
            return 0

    def run(self):
        """One step: rows start, resume, fork, pause or end; all others grow by a few tokens."""
        counts, new = np.zeros(BATCH, np.int32), []
        for row in range(BATCH):
            name = self.rows[row]
            event = self.rng.choice(["go", "end", "fork", "pause"], p=[0.7, 0.1, 0.1, 0.1])
            if name is None:
                self.start(row)
                name = self.rows[row]
            elif event == "end" or len(self.tokens[name]) > SIZE * (WIDTH - 2):
                self.allocator.commit(name, self.tokens[name])
                self.allocator.free(name)
                self.rows[row] = None
                continue
            elif event == "pause" and not self.waiting:
                self.pause(row)
                continue
            elif event == "fork" and None in self.rows:
                other = self.rows.index(None)
                self.number += 1
                self.allocator.fork(name, self.number)
                self.rows[other], self.tokens[self.number] = self.number, list(self.tokens[name])
            if name is not None:
                wanted = int(self.rng.integers(1, 8))
                counts[row] = self.grow(name, wanted)
        for row, name in enumerate(self.rows):
            if name is not None and counts[row]:
                self.tokens[name] += self.rng.integers(0, 2, counts[row]).tolist()
                new.append(self.contents(self.tokens[name])[-counts[row] :])
        keys = np.zeros((self.MAX_TOKENS, 2, 8), np.float32)
        if new:
            keys[: counts.sum()] = np.concatenate(new)
        lengths = np.array([len(self.tokens[n]) if n is not None else 0 for n in self.rows])
        table = self.allocator.block_table(self.rows, WIDTH, allow_missing=True)
        lengths = (lengths - counts).astype(np.int32)
        self.apply_pending()
        self.cache = self.step(self.cache, *map(jnp.asarray, (table, lengths, counts, keys)))

    def apply_pending(self):
        pending = self.allocator.take_pending()
        self.cache = self.apply(self.cache, jax.tree.map(jnp.asarray, pending))

    def start(self, row):
        """Resumes what was swapped out if it fits; else a new prompt, of its cached prefix."""
        if self.waiting:
            ((name, host),) = self.waiting.items()
            try:
                blocks = self.allocator.allocate(name, len(self.tokens[name]))
            except paged_kv.OutOfBlocksError:
                return
            self.apply_pending()
            self.cache = self.swap_in(self.cache, host, self.row_of(blocks))
            self.waiting.clear()
            self.swaps += 1
        else:
            self.number += 1
            name, prompt = self.number, [1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1]
            self.tokens[name] = prompt[: self.allocator.match_prefix(name, prompt)]
        self.rows[row] = name

    def pause(self, row):
        name, self.rows[row] = self.rows[row], None
        self.apply_pending()
        row = self.row_of(self.allocator.blocks(name))
        self.waiting[name] = self.swap_out(self.cache, row)
        self.allocator.free(name)

    @staticmethod
    def row_of(blocks):
        """As a row of the table: one shape, one program."""
        return int32([*blocks, *[-1] * (WIDTH - len(blocks))])

    def compare(self):
        table = self.allocator.block_table(self.rows, WIDTH, allow_missing=True)
        keys, values = np.asarray(self.cache.key_pool), np.asarray(self.cache.value_pool)
        for row, name in zip(table, self.rows, strict=True):
            if name is not None:
                expected = self.contents(self.tokens[name])
                for pool, sign in ((keys, 1), (values, -1)):
                    written = pool[row].reshape(-1, 2, 8)[: len(expected)]
                    np.testing.assert_array_equal(written, sign * expected)


def test_a_real_cache_holds_what_the_allocator_says():
    server = Server(seed=0)
    for number in range(120):
        server.run()
        if number % 10 == 9:
            server.compare()
            server.allocator.check_invariants()
        if number % 60 == 59:
            server.cache = paged_kv.defragment(server.cache, server.allocator)
            server.compare()
    stats = server.allocator.stats()
    assert stats.prefix_hits > 50 and stats.evictions > 50
    assert server.swaps >= 5 and server.full >= 5
