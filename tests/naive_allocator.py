"""What `BlockAllocator` promises, written the slow way: lists, and whole prefixes as keys.

Block ids are the allocator's choice: the model is told them, and says whether they were allowed.
"""

from collections import Counter


class NaiveSequence:
    def __init__(self, salt):
        self.salt, self.tokens, self.blocks, self.committed = salt, [], [], 0

    def prefix(self, num_blocks, size):
        return self.salt, tuple(self.tokens[: num_blocks * size])


class NaiveAllocator:
    def __init__(self, num_blocks, size):
        self.size = size
        self.free = set(range(num_blocks))
        self.idle = []  # cached and held by none, oldest first
        self.cached = {}  # (salt, all tokens up to the block's end) -> block
        self.sequences = {}
        self.evictions = 0

    @property
    def holders(self):
        rows = [sequence.blocks for sequence in self.sequences.values()]
        return Counter(block for row in rows for block in row if block >= 0)

    @property
    def available(self):
        return len(self.free) + len(self.idle)

    def needed(self, name, count):
        """Blocks that `count` more tokens take, one for a copy of a shared tail included."""
        sequence = self.sequences[name]
        total = len(sequence.tokens) + count
        return -(-total // self.size) - len(sequence.blocks) + self.is_copied(name, count)

    def is_copied(self, name, count):
        sequence = self.sequences[name]
        is_partial = len(sequence.tokens) % self.size > 0
        return count > 0 and is_partial and self.holders[sequence.blocks[-1]] > 1

    def take(self, blocks):
        """The allocator handed these out: from those free, and if they were too few, the oldest."""
        missing = len(blocks) - len(self.free)
        if missing > 0:
            self.evictions += missing
            for block in self.idle[:missing]:
                self.forget(block)
            self.free.update(self.idle[:missing])
            del self.idle[:missing]
        assert len(set(blocks)) == len(blocks) and set(blocks) <= self.free
        self.free.difference_update(blocks)

    def forget(self, block):
        self.cached = {prefix: b for prefix, b in self.cached.items() if b != block}

    def start(self, name, salt, tokens, blocks):
        sequence = self.sequences[name] = NaiveSequence(salt)
        self.take(blocks)
        sequence.tokens, sequence.blocks = list(tokens), list(blocks)

    def extend(self, name, tokens, blocks):
        """`blocks` is the whole row now."""
        sequence, before = self.sequences[name], self.sequences[name].blocks
        if self.is_copied(name, len(tokens)):
            assert blocks[len(before) - 1] != before[-1]
            self.take(blocks[len(before) - 1 :])
        else:
            if tokens and len(sequence.tokens) % self.size:
                self.forget(before[-1])
            assert blocks[: len(before)] == before
            self.take(blocks[len(before) :])
        sequence.tokens += tokens
        sequence.blocks = list(blocks)

    def release(self, blocks):
        """The sequence that held them does not any more."""
        holders = self.holders
        for block in reversed(blocks):
            if block < 0 or holders[block]:
                continue
            if block in self.cached.values():
                self.idle.append(block)
            else:
                self.free.add(block)

    def end(self, name):
        self.release(self.sequences.pop(name).blocks)

    def fork(self, name, new_name):
        parent = self.sequences[name]
        child = self.sequences[new_name] = NaiveSequence(parent.salt)
        child.tokens, child.blocks = list(parent.tokens), list(parent.blocks)
        child.committed = parent.committed

    def truncate(self, name, length):
        sequence = self.sequences[name]
        keep = -(-length // self.size)
        gone, sequence.blocks = sequence.blocks[keep:], sequence.blocks[:keep]
        sequence.tokens = sequence.tokens[:length]
        sequence.committed = min(sequence.committed, length // self.size)
        self.release(gone)

    def trim(self, name, left):
        sequence = self.sequences[name]
        count = max(len(sequence.tokens) - left, 0) // self.size
        gone = sequence.blocks[:count]
        sequence.blocks = [-1] * count + sequence.blocks[count:]
        self.release(gone)

    def find(self, salt, tokens):
        """Blocks of the longest cached prefix, one token left over."""
        found = []
        for end in range(self.size, len(tokens), self.size):
            block = self.cached.get((salt, tuple(tokens[:end])))
            if block is None:
                break
            found.append(block)
        return found

    def match(self, name, salt, tokens):
        sequence = self.sequences[name] = NaiveSequence(salt)
        sequence.blocks = self.find(salt, tokens)
        sequence.committed = len(sequence.blocks)
        sequence.tokens = tokens[: len(sequence.blocks) * self.size]
        self.idle = [block for block in self.idle if block not in sequence.blocks]

    def commit(self, name, length):
        sequence = self.sequences[name]
        stop = max(sequence.committed, length // self.size)
        for number in range(sequence.committed, stop):
            block = sequence.blocks[number]
            if block >= 0:
                self.cached.setdefault(sequence.prefix(number + 1, self.size), block)
        sequence.committed = stop

    def reset(self):
        self.free.update(self.idle)
        self.idle, self.cached = [], {}

    def rename(self, new_id):
        name = lambda block: new_id.get(block, block)
        places = self.free | self.holders.keys() | set(self.idle)
        for sequence in self.sequences.values():
            sequence.blocks = list(map(name, sequence.blocks))
        self.idle = list(map(name, self.idle))
        self.cached = {prefix: name(block) for prefix, block in self.cached.items()}
        self.free = places - self.holders.keys() - set(self.idle)
