"""Bucketed sizes: little padding, and few programs for whatever a day brings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

NUM_BLOCKS, SIZE, WIDTH = 256, 8, 16
TOKEN_BUCKETS, ROW_BUCKETS = (16, 128), (4, 16)


def test_the_smallest_bucket_that_holds_the_count_is_taken():
    sizes = [paged_kv.pad_to_bucket(count) for count in range(17)]
    assert sizes == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16]
    assert [paged_kv.pad_to_bucket(count, [4, 9]) for count in (0, 4, 5, 9)] == [4, 4, 9, 9]


def test_buckets_are_few_and_pad_little():
    sizes = [paged_kv.pad_to_bucket(count) for count in range(1, 100_000)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 34
    assert all(2 * size < 3 * count or size == count for count, size in enumerate(sizes, 1))


class Server:
    """Continuous batching over a small cache: prompts in chunks, mixed with decode."""

    def __init__(self):
        self.allocator = paged_kv.BlockAllocator(NUM_BLOCKS, SIZE, enable_prefix_caching=True)
        self.pools = paged_kv.init_paged_kv_cache(
            num_blocks=NUM_BLOCKS,
            block_size=SIZE,
            num_kv_heads=1,
            head_dim=8,
            batch_size=1,
            max_blocks_per_seq=WIDTH,
            dtype=jnp.float32,
        )
        self.prompt, self.length, self.waiting, self.number = {}, {}, [], 0
        self.raw_sizes, self.programs = set(), []
        self.step = jax.jit(self._step, donate_argnums=0)

    def _step(self, cache, keys, counts, starts):
        self.programs.append((keys.shape, cache.block_table.shape))  # runs when it is traced
        cache = paged_kv.advance(cache, counts)
        query = jnp.repeat(keys, 2, axis=1)
        return paged_kv.append_and_attend(query, keys, keys, cache, query_start_loc=starts)

    def run(self, rng, arrivals):
        """One step of the server: prompts that fit come in, all go on, those at their end leave."""
        for _ in range(arrivals):
            self.number += 1
            self.waiting.append((self.number, int(rng.integers(1, 90))))
        while self.waiting and len(self.length) < ROW_BUCKETS[-1]:
            name, prompt = self.waiting.pop(0)
            tokens = np.arange(prompt)
            self.length[name] = self.allocator.match_prefix(name, tokens)
            self.prompt[name] = prompt
        counts, room = [], TOKEN_BUCKETS[-1] - len(self.length)
        for name, length in self.length.items():
            chunk = max(1, min(self.prompt[name] - length, room))
            room -= chunk - 1
            self.allocator.extend(name, chunk)
            counts.append(chunk)
        if counts:
            self.compute(rng, counts)
        for name, count in zip(list(self.length), counts, strict=True):
            self.length[name] += count
            written = min(self.length[name], self.prompt[name])
            self.allocator.commit(name, np.arange(written))
            is_done = self.length[name] > self.prompt[name] and rng.random() < 0.1
            if is_done or self.length[name] > SIZE * (WIDTH - 1):
                self.allocator.free(name)
                del self.length[name]

    def compute(self, rng, counts):
        num_tokens = paged_kv.pad_to_bucket(sum(counts), TOKEN_BUCKETS)
        num_rows = paged_kv.pad_to_bucket(len(counts), ROW_BUCKETS)
        self.raw_sizes.add((sum(counts), len(counts)))
        padded = np.zeros((2, num_rows), np.int32)
        padded[:, : len(counts)] = counts, list(self.length.values())
        starts = np.concatenate([[0], np.cumsum(padded[0])]).astype(np.int32)
        keys = rng.standard_normal((num_tokens, 1, 8)).astype(np.float32)
        table = self.allocator.block_table(self.length, WIDTH, num_rows=num_rows)
        cache = dataclasses.replace(
            self.pools, block_table=jnp.asarray(table), seq_lengths=jnp.asarray(padded[1])
        )
        out, self.pools = self.step(cache, keys, padded[0], starts)
        assert np.isfinite(out).all() and not np.asarray(out)[sum(counts) :].any()


def test_a_day_of_serving_compiles_a_bounded_number_of_programs():
    server, rng = Server(), np.random.default_rng(0)
    Server().run(rng, 1)  # imports a backend, for which jax 0.12 compiles a second time
    for hour in range(24):
        busy = np.sin(np.pi * hour / 24) ** 2
        for _ in range(20):
            server.run(rng, rng.poisson(1.5 * busy))
    assert server.number > 150 and len(server.raw_sizes) > 100
    assert len(server.programs) == len(set(server.programs)) <= 4
    assert len(server.programs) >= 3
    server.allocator.check_invariants()
    assert server.allocator.stats().prefix_hits > 1000
