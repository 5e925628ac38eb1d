"""`BlockAllocator` beside a naive model, through 50,000 operations, contents of blocks included.

A step of the state machine is a burst of operations, drawn from a seed and a mix, for hypothesis
takes longer to draw a step than the allocator to do it.
"""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from naive_allocator import NaiveAllocator

import paged_kv
from paged_kv import free_blocks

SIZE, NAMES, SALTS = 2, range(6), (None, "tenant")
BURST, COMPARE_EVERY, ENOUGH = 26, 100, 50_000
# what an operation needs: a name in use (True), one that is not (False)
OPERATIONS = {
    "allocate": (False,),
    "extend": (True,),
    "free": (True,),
    "fork": (True, False),
    "match": (False,),
    "commit": (True,),
    "truncate": (True,),
    "trim": (True,),
    "find": (),
    "reset": (),
    "defragment": (),
}
MIXES = {
    "even": (4, 8, 3, 2, 4, 4, 2, 2, 1, 0.05, 0.1),
    "prefixes": (1, 8, 5, 1, 8, 8, 1, 1, 1, 0.05, 0.1),
    "forks": (2, 8, 3, 6, 1, 2, 3, 1, 1, 0.05, 0.1),
    "pressure": (6, 12, 1, 1, 3, 3, 1, 3, 1, 0, 0.1),
}


def value_after(value, token):
    """Stands for a token's keys and values, which depend on all tokens before it."""
    return hash((value, token))


class NumpyPool:
    """Contents of blocks, one int per slot."""

    def __init__(self, num_blocks):
        self.slots = np.zeros((num_blocks, SIZE), np.int64)

    def apply(self, pending):
        is_pair = pending.copy_sources >= 0
        self.move(pending.copy_sources[is_pair], pending.copy_targets[is_pair])
        self.slots[pending.scrub_ids[pending.scrub_ids >= 0]] = 0

    def move(self, sources, targets):
        self.slots[targets] = self.slots[sources]

    def write(self, block, offset, value):
        self.slots[block, offset] = value


class Driver:
    """An allocator, the model and the contents of a pool, and random operations on all three."""

    def __init__(self, num_blocks, is_scrubbing):
        self.allocator = paged_kv.BlockAllocator(
            num_blocks, SIZE, enable_prefix_caching=True, scrub_on_reuse=is_scrubbing
        )
        self.model, self.pool = NaiveAllocator(num_blocks, SIZE), NumpyPool(num_blocks)
        self.due = {}  # name -> first position whose token is not yet written
        self.count, self.refused, self.done = 0, 0, dict.fromkeys(OPERATIONS, 0)

    def burst(self, mix, seed):
        self.random, stop = random.Random(seed), self.count + BURST
        while self.count < stop:
            (operation,) = self.random.choices(list(OPERATIONS), MIXES[mix])
            names = [self.pick(exists) for exists in OPERATIONS[operation]]
            if None not in names:
                self.run(operation, names)

    def run(self, operation, names):
        before = self.allocator.num_free_blocks
        try:
            getattr(self, operation)(*names)
        except paged_kv.OutOfBlocksError:
            self.refused += 1
            assert self.allocator.num_free_blocks == before
        self.done[operation] += 1
        self.check()

    def check(self):
        self.allocator.check_invariants()
        stats = self.allocator.stats()
        assert stats.free == len(self.model.free)
        assert stats.cached == len(self.model.idle)
        assert stats.evictions == self.model.evictions
        self.count += 1
        if self.count % COMPARE_EVERY == 0:
            self.compare()

    def compare(self):
        """All rows, and what the pool holds in them."""
        self.flush()
        names = list(self.model.sequences)
        table = self.allocator.block_table(names, 100)
        for name, row in zip(names, table, strict=True):
            sequence = self.model.sequences[name]
            assert row[: len(sequence.blocks)].tolist() == sequence.blocks
            assert (row[len(sequence.blocks) :] == -1).all()
            for position, value in enumerate(self.values(sequence)):
                block = sequence.blocks[position // SIZE]
                assert block < 0 or self.pool.slots[block, position % SIZE] == value

    # ---- operations ------------------------------------------------------------------------------

    def pick(self, exists):
        """A name in use, or one that is not; None if there is none."""
        names = [name for name in NAMES if (name in self.model.sequences) == exists]
        return self.random.choice(names) if names else None

    def tokens(self, low=0, high=12):
        return self.random.choices((0, 1), (6, 1), k=self.random.randint(low, high))

    def request(self, needed, call, *arguments, **options):
        """`call`, which runs out of blocks exactly when the model says so."""
        if needed > self.model.available:
            with pytest.raises(paged_kv.OutOfBlocksError, match="are free"):
                call(*arguments, **options)
            raise paged_kv.OutOfBlocksError
        return call(*arguments, **options)

    def write(self, name, start):
        """A sequence's tokens from `start` on are to be written, now or with those of others."""
        self.due[name] = min(start, self.due.get(name, start))
        if self.random.random() < 0.5:
            self.flush()

    def need_written(self, name):
        if self.due.get(name, 1 << 30) < len(self.model.sequences[name].tokens):
            self.flush()

    def flush(self):
        """A step on the device: copies what is pending, then writes all tokens that are due."""
        self.pool.apply(self.allocator.take_pending())
        for name, start in self.due.items():
            sequence = self.model.sequences[name]
            for position, value in enumerate(self.values(sequence)):
                if position >= start:
                    self.pool.write(sequence.blocks[position // SIZE], position % SIZE, value)
        self.due.clear()

    def values(self, sequence):
        value = sequence.salt
        for token in sequence.tokens:
            value = value_after(value, token)
            yield value

    def allocate(self, name):
        tokens, salt = self.tokens(), self.random.choice(SALTS)
        needed = -(-len(tokens) // SIZE)
        blocks = self.request(needed, self.allocator.allocate, name, len(tokens), salt=salt)
        self.model.start(name, salt, tokens, blocks)
        self.write(name, 0)

    def extend(self, name):
        tokens = self.tokens(0, self.random.choice((1, 1, 4)))
        start = len(self.model.sequences[name].tokens)
        needed = self.model.needed(name, len(tokens))
        self.request(needed, self.allocator.extend, name, len(tokens))
        self.model.extend(name, tokens, self.allocator.blocks(name))
        self.write(name, start)

    def free(self, name):
        self.allocator.free(name)
        self.due.pop(name, None)
        self.model.end(name)

    def fork(self, name, new_name):
        self.need_written(name)
        self.allocator.fork(name, new_name)
        self.model.fork(name, new_name)

    def match(self, name):
        tokens, salt = self.tokens(), self.random.choice(SALTS)
        found = self.allocator.match_prefix(name, tokens, salt=salt)
        self.model.match(name, salt, tokens)
        assert self.allocator.blocks(name) == self.model.sequences[name].blocks
        assert found == len(self.model.sequences[name].tokens)

    def commit(self, name):
        self.need_written(name)
        tokens = self.model.sequences[name].tokens
        tokens = tokens[: self.random.randint(0, len(tokens))]
        committed = self.allocator.commit(name, tokens)
        self.model.commit(name, len(tokens))
        assert committed == self.model.sequences[name].committed * SIZE

    def truncate(self, name):
        sequence = self.model.sequences[name]
        low = SIZE * sequence.blocks.count(-1)
        length = self.random.randint(low, len(sequence.tokens))
        self.allocator.truncate(name, length)
        self.model.truncate(name, length)

    def trim(self, name):
        self.need_written(name)
        left = self.random.randint(0, 8)
        before = self.model.sequences[name].blocks.count(-1)
        given = self.allocator.trim_window(name, (left, 0))
        self.model.trim(name, left)
        assert given == self.model.sequences[name].blocks.count(-1) - before

    def find(self):
        tokens, salt = self.tokens(), self.random.choice(SALTS)
        found = self.allocator.find_prefix(tokens, salt=salt)
        assert found == SIZE * len(self.model.find(salt, tokens))

    def reset(self):
        self.allocator.reset_prefix_cache()
        self.model.reset()

    def defragment(self):
        self.flush()
        moves = self.random.choice((None, 1, 4))
        sources, targets = (ids[ids >= 0].tolist() for ids in self.allocator.defragment(moves))
        assert moves is None or len(sources) <= moves + 1
        self.pool.move(sources, targets)
        self.model.rename(dict(zip(sources, targets, strict=True)))
        if moves is None:
            rows = [self.allocator.blocks(name) for name in self.model.sequences]
            held = dict.fromkeys(block for row in rows for block in row if block >= 0)
            assert list(held) == list(range(len(held)))


def run_machine(num_blocks, is_scrubbing, examples, seen):
    """The drivers of a run of the state machine go to `seen`."""

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.driver = Driver(num_blocks, is_scrubbing)
            seen.append(self.driver)

        @rule(mix=st.sampled_from(sorted(MIXES)), seed=st.integers(0, 2**32 - 1))
        def burst(self, mix, seed):
            self.driver.burst(mix, seed)

        def teardown(self):
            self.driver.compare()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_fifty_thousand_operations_agree_with_the_model(monkeypatch):
    seen = []
    run_machine(num_blocks=24, is_scrubbing=False, examples=24, seen=seen)
    monkeypatch.setattr(free_blocks, "SPARSE", 2)  # few are free, as a large pool would see it
    run_machine(num_blocks=9, is_scrubbing=True, examples=24, seen=seen)
    counts = [driver.count for driver in seen]
    assert sum(counts) >= ENOUGH, counts
    done = {name: sum(driver.done[name] for driver in seen) for name in OPERATIONS}
    assert min(done.values()) >= 30, done
    assert sum(driver.refused for driver in seen) >= 1000
    assert sum(driver.model.evictions for driver in seen) >= 1000
