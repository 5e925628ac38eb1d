"""Prompts of different lengths as one ragged batch over one paged cache.

The host keeps what each sequence is and owns; the device runs one program for decode steps and one
per bucket of prompt tokens, so that a run compiles a bounded number of programs for any prompts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

import paged_kv
from paged_kv.ops import Implementation
from tools import llama
from tools.programs import Programs

# Prompt tokens of one step, padded up to the next of these
PROMPT_BUCKETS = (16, 32, 64, 128, 256)


class PromptError(ValueError):
    """A prompt that the model cannot take."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to generate."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0 takes the likeliest token
    seed: int = 0
    block_size: int = 16
    num_blocks: int | None = None  # as many as the prompts can need
    implementation: Implementation | None = None
    interpret: bool | None = None


@dataclasses.dataclass
class Sequence:
    """One prompt and what follows it."""

    number: int  # from 1
    tokens: list[int]  # the prompt, then what was generated
    prompt_length: int
    max_length: int
    cached: int = 0  # tokens in the cache
    finished: bool = False

    @property
    def pending_prompt(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(self.prompt_length - self.cached, 0)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclasses.dataclass
class Stats:
    """What a run did; compiling is in no time."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    blocks_used: int = 0  # handed out, over the whole run
    peak_blocks: int = 0  # held at once


class Batch:
    """Generates after every prompt at once; `run` yields tokens as they come.

    Raises:
      PromptError: a prompt has no tokens, or leaves no room in the model's context.
    """

    def __init__(
        self,
        config: llama.LlamaConfig,
        weights: llama.LlamaWeights,
        prompts: list[list[int]],
        stop_tokens: frozenset[int],
        options: Options,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self.sequences = [
            _new_sequence(number, prompt, config, options)
            for number, prompt in enumerate(prompts, 1)
        ]
        self.stats = Stats()
        is_greedy = options.temperature == 0
        draw = llama.Draw(np.uint32(options.seed), np.float32(options.temperature))
        self._draw = None if is_greedy else draw
        self._weights, self._stop_tokens = weights, stop_tokens
        self._programs = Programs(config, options.implementation, options.interpret, progress)
        # the last token generated is never cached
        needs = [-(-(s.max_length - 1) // options.block_size) for s in self.sequences]
        self.blocks_needed = sum(needs)
        width = 1 << (max(needs) - 1).bit_length()  # a power of two: few shapes, few programs
        num_blocks = options.num_blocks or self.blocks_needed
        self.allocator = paged_kv.BlockAllocator(num_blocks, options.block_size)
        self._table = np.full((len(prompts), width), -1, np.int32)
        self._cache = paged_kv.init_paged_kv_cache(
            num_blocks=num_blocks,
            block_size=options.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            batch_size=len(prompts),
            max_blocks_per_seq=width,
            dtype=weights.embedding.dtype,
            num_layers=config.num_layers,
        )

    def run(self) -> Iterator[tuple[int, int | None]]:
        """Yields (sequence, token); a token of None says that the sequence is finished.

        Raises:
          paged_kv.OutOfBlocksError: the pool is full; what was yielded stays valid.
        """
        if any(s.max_length - s.prompt_length > 1 for s in self.sequences):
            none = np.zeros(len(self.sequences), np.int32)
            self._program(none, none, None)  # compiled now, no text waits for it later
        while any(s.pending_prompt for s in self.sequences):
            yield from self._prompt_step()
        while not all(s.finished for s in self.sequences):
            yield from self._decode_step()

    def _prompt_step(self):
        """The next prompt tokens of every sequence, as many as the largest bucket holds."""
        new_tokens, room = [], PROMPT_BUCKETS[-1]
        for sequence in self.sequences:
            count = min(sequence.pending_prompt, room)
            room -= count
            new_tokens.append(sequence.tokens[sequence.cached : sequence.cached + count])
        packed = [token for tokens in new_tokens for token in tokens]
        bucket = next(size for size in PROMPT_BUCKETS if size >= len(packed))
        counts = np.array([len(tokens) for tokens in new_tokens], np.int32)
        query_start_loc = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        padded = np.array(packed + [0] * (bucket - len(packed)), np.int32)
        sampled, seconds = self._step(padded, counts, query_start_loc)
        self.stats.prompt_tokens += len(packed)
        self.stats.prompt_seconds += seconds
        for row, sequence in enumerate(self.sequences):
            if counts[row] and not sequence.pending_prompt:
                yield from self._accept(row, int(sampled[row]))

    def _decode_step(self):
        """One token more for every sequence that is not finished."""
        active = np.array([not s.finished for s in self.sequences])
        tokens = np.array([s.tokens[-1] for s in self.sequences], np.int32)
        sampled, seconds = self._step(tokens, active.astype(np.int32), None)
        self.stats.decode_tokens += int(active.sum())
        self.stats.decode_seconds += seconds
        for row in np.flatnonzero(active):
            yield from self._accept(int(row), int(sampled[row]))

    def _step(self, tokens, counts, query_start_loc):
        """Caches `counts` tokens of every sequence: a sampled token of each, and the seconds."""
        self._grow(counts)
        program = self._program(tokens, counts, query_start_loc)
        start = time.perf_counter()
        sampled, self._cache = program(*self._arguments(tokens, counts, query_start_loc))
        sampled = np.asarray(sampled)
        return sampled, time.perf_counter() - start

    def _arguments(self, tokens, counts, query_start_loc):
        return (self._weights, self._cache, tokens, counts, query_start_loc, self._draw)

    def _program(self, *inputs):
        """The compiled step for inputs of these shapes."""
        kind = "decode" if inputs[-1] is None else "prompt"
        return self._programs.of(kind, self._arguments(*inputs))

    def _grow(self, counts):
        """Hands out the blocks that `counts` more tokens of every sequence need."""
        for row in np.flatnonzero(counts):
            sequence, count = self.sequences[row], int(counts[row])
            take = self.allocator.extend if sequence.cached else self.allocator.allocate
            blocks = take(sequence.number, count)
            held = len(self.allocator.blocks(sequence.number))
            self._table[row, held - len(blocks) : held] = blocks
            sequence.cached += count
            self.stats.blocks_used += len(blocks)
            in_use = self.allocator.num_blocks - self.allocator.num_free_blocks
            self.stats.peak_blocks = max(self.stats.peak_blocks, in_use)
        self._cache = paged_kv.set_block_table(self._cache, jnp.asarray(self._table))

    def _accept(self, row, token):
        """Takes a sampled token; a sequence that ends gives its blocks back."""
        sequence = self.sequences[row]
        sequence.tokens.append(token)
        is_stop = token in self._stop_tokens
        if not is_stop:
            yield row, token
        if is_stop or len(sequence.tokens) == sequence.max_length:
            sequence.finished = True
            self.allocator.free(sequence.number)
            self._table[row] = -1
            ended = np.arange(len(self.sequences)) == row
            self._cache = paged_kv.reset_sequences(self._cache, jnp.asarray(ended))
            yield row, None


def _new_sequence(number, prompt, config, options):
    if not prompt:
        raise PromptError(f"prompt {number} is empty")
    room = config.context_length - len(prompt)
    if room < 1:
        raise PromptError(
            f"prompt {number} is too long: {len(prompt)} tokens leave no room in the model's "
            f"context of {config.context_length}"
        )
    return Sequence(
        number=number,
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_length=len(prompt) + min(options.max_tokens, room),
    )
