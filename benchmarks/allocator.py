"""Times the block allocator on the host: `python -m benchmarks.allocator`.

Sequences start, grow and end at random until the pool has long been full and its free blocks lie
scattered; each call is timed by itself.  A limit stands beside each figure.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

import paged_kv

BLOCK_SIZE = 16
CALL_US, BLOCK_US, MATCH_US = 5.0, 0.1, 500.0  # medians: per call, and for each of its blocks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocator", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=200_000, help="timed calls of churn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(f"{options.sequences} sequences over {options.blocks} blocks of {BLOCK_SIZE} tokens")
    good = True
    for is_caching in (False, True):
        times, together = churn(options, is_caching)
        print(f"prefix caching {'on' if is_caching else 'off'}:")
        for name, rows in times.items():
            good &= report(name, np.array(rows), is_judged=not is_caching)
        print(f"  {together:.0%} of the blocks held follow their predecessor in the pool")
    for kind, figure in prefix_match().items():
        good &= figure <= MATCH_US
        print(f"4096 tokens matched, {kind}: {figure:.0f} us, limit {MATCH_US:.0f} us")
    return 0 if good else 1


def churn(options: argparse.Namespace, is_caching: bool) -> tuple[dict[str, list], float]:
    """(seconds, blocks) of each call by its name, and how many blocks are neighbours at the end."""
    rng = np.random.default_rng(options.seed)
    allocator = paged_kv.BlockAllocator(
        options.blocks, BLOCK_SIZE, enable_prefix_caching=is_caching
    )
    times = defaultdict(list)
    mean = options.blocks * BLOCK_SIZE // options.sequences
    lengths = rng.integers(mean // 5, mean, options.sequences + options.calls).tolist()
    tokens = np.arange(2 * mean, dtype=np.int32)
    live, number = [], 0

    def timed(name, call, *arguments):
        begin = time.perf_counter()
        result = call(*arguments)
        times[name].append((time.perf_counter() - begin, len(result or ())))

    def start():
        nonlocal number
        try:
            timed("allocate", allocator.allocate, number, lengths[number])
        except paged_kv.OutOfBlocksError:
            return end()
        if is_caching:
            tokens[0] = number
            allocator.commit(number, tokens[: lengths[number]])
        live.append(number)
        number += 1

    def end():
        victim = int(rng.integers(len(live)))
        live[victim], live[-1] = live[-1], live[victim]
        blocks = len(allocator.blocks(live[-1]))
        begin = time.perf_counter()
        allocator.free(live.pop())
        times["free"].append((time.perf_counter() - begin, blocks))

    def grow():
        sequence = live[int(rng.integers(len(live)))]
        try:
            timed("extend", allocator.extend, sequence, 1)
        except paged_kv.OutOfBlocksError:
            end()

    while number < options.sequences:
        before = number
        start()
        if number == before:
            break
    times.clear()
    for choice in rng.random(options.calls).tolist():
        if choice < 0.6:
            grow()
        elif choice < 0.8 and len(live) > options.sequences // 2:
            end()
        elif len(live) < options.sequences:
            start()
    steps = [np.diff(allocator.blocks(sequence)) == 1 for sequence in live]
    return times, float(np.concatenate(steps).mean())


def prefix_match() -> dict[str, float]:
    """Median microseconds to match a prefix of 4096 tokens, given in two ways."""
    allocator = paged_kv.BlockAllocator(1024, BLOCK_SIZE, enable_prefix_caching=True)
    tokens = np.arange(4097, dtype=np.int32)
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


def report(name: str, rows: np.ndarray, is_judged: bool) -> bool:
    """Prints the figures of one kind of call; whether its median is within the limit."""
    micros, blocks = rows[:, 0] * 1e6, rows[:, 1]
    median, limit = np.median(micros), np.median(CALL_US + BLOCK_US * blocks)
    verdict = f", limit {limit:.1f} us" if is_judged else ""
    print(
        f"  {name:8} {len(rows):7} calls of {blocks.mean():5.1f} blocks: median {median:5.2f} us"
        f"{verdict}; 99th {np.percentile(micros, 99):.1f} us, longest {micros.max():.0f} us"
    )
    return bool(median <= limit) or not is_judged


if __name__ == "__main__":
    sys.exit(main())
