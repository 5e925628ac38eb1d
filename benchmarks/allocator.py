"""Times the block allocator on the host: `python -m benchmarks.allocator`.

Sequences start and grow at random, and when blocks run out a random one ends, so that the pool is
always nearly full and its free blocks lie scattered.  Each call is timed by itself; a limit stands
beside each figure that has one.
"""

import argparse
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np

import paged_kv

BLOCK_SIZE = 16
CALL_US, BLOCK_US, MATCH_US = 5.0, 0.1, 500.0  # medians: per call, and for each of its blocks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocator", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=200_000, help="timed calls of churn")
    parser.add_argument("--held", type=float, default=1.0, help="share of the blocks, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(f"{options.sequences} sequences over {options.blocks} blocks of {BLOCK_SIZE} tokens")
    good = True
    allocator = None
    for is_caching in (False, True):
        allocator = paged_kv.BlockAllocator(
            options.blocks, BLOCK_SIZE, enable_prefix_caching=is_caching
        )
        times, sequences = churn(allocator, options)
        stats = allocator.stats()
        print(f"prefix caching {'on' if is_caching else 'off'}, {stats.usage:.0%} of blocks held:")
        for name, rows in times.items():
            good &= report(name, np.array(rows).reshape(-1, 2))
        steps = [np.diff(allocator.blocks(sequence)) == 1 for sequence in sequences]
        together = np.concatenate(steps).mean()
        print(f"  {together:.0%} of the blocks held follow their predecessor in the pool")
    for kind, figure in prefix_match(allocator, sequences).items():
        good &= figure <= MATCH_US
        print(f"4096 tokens matched, {kind}: median {figure:.0f} us, limit {MATCH_US:.0f} us")
    return 0 if good else 1


def churn(
    allocator: paged_kv.BlockAllocator, options: argparse.Namespace
) -> tuple[dict[str, array], list[int]]:
    """Seconds and blocks of each call in turn, by the call's name; and the sequences at the end."""
    rng = np.random.default_rng(options.seed)
    times = defaultdict(partial(array, "d"))  # no objects: they would have to be collected
    mean = options.blocks * BLOCK_SIZE // options.sequences
    lengths = rng.integers(mean // 5, 9 * mean // 5, options.sequences + options.calls).tolist()
    tokens = np.arange(2 * mean, dtype=np.int32)
    live = []

    def start(number):
        begin = time.perf_counter()
        blocks = allocator.allocate(number, lengths[number])
        times["allocate"].extend((time.perf_counter() - begin, len(blocks)))
        live.append(number)
        if allocator.enable_prefix_caching:
            tokens[0] = number
            allocator.commit(number, tokens[: lengths[number]])

    def grow():
        sequence = live[int(rng.integers(len(live)))]
        begin = time.perf_counter()
        blocks = allocator.extend(sequence, 1)
        times["extend"].extend((time.perf_counter() - begin, len(blocks)))

    def end():
        victim = int(rng.integers(len(live)))
        live[victim], live[-1] = live[-1], live[victim]
        blocks = len(allocator.blocks(live[-1]))
        begin = time.perf_counter()
        allocator.free(live.pop())
        times["free"].extend((time.perf_counter() - begin, blocks))

    for number, is_growing in enumerate(rng.random(options.sequences + options.calls) < 0.6):
        if number == options.sequences:
            times.clear()  # until here the pool was filled
        if allocator.num_free_blocks < (1 - options.held) * options.blocks:
            end()
        try:
            if is_growing and number >= options.sequences:
                grow()
            else:
                start(number)
        except paged_kv.OutOfBlocksError:
            end()
    return times, live


def prefix_match(allocator: paged_kv.BlockAllocator, sequences: list[int]) -> dict[str, float]:
    """Median microseconds to match a prefix of 4096 tokens, given in two ways."""
    for sequence in sequences[: len(sequences) // 2]:
        allocator.free(sequence)
    tokens = np.arange(4097, dtype=np.int32)
    tokens[0] = -1
    allocator.allocate("first", 4096)
    allocator.commit("first", tokens[:4096])
    allocator.free("first")
    figures = {}
    for kind, given in (("as an array", tokens), ("as a list", tokens.tolist())):
        seconds = []
        for _ in range(200):
            begin = time.perf_counter()
            found = allocator.match_prefix("again", given)
            seconds.append(time.perf_counter() - begin)
            assert found == 4096
            allocator.free("again")
        figures[kind] = float(np.median(seconds) * 1e6)
    return figures


def report(name: str, rows: np.ndarray) -> bool:
    """Prints the figures of one kind of call; whether its median is within the limit."""
    micros, blocks = rows[:, 0] * 1e6, rows[:, 1]
    median, limit = np.median(micros), np.median(CALL_US + BLOCK_US * blocks)
    calls = f"{name:8} {len(rows):7} calls of {blocks.mean():5.1f} blocks"
    tail = f"99th {np.percentile(micros, 99):.1f} us, longest {micros.max():.0f} us"
    print(f"  {calls}: median {median:5.2f} us, limit {limit:.1f} us; {tail}")
    return bool(median <= limit)


if __name__ == "__main__":
    sys.exit(main())
