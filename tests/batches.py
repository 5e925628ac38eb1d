"""Runs batches for tests, with the compiled programs or with ones that stand in for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_kv
from tools import programs
from tools.batch import Batch, Options

# One shape for the tests that compile: 2 prompts, rows of 8 blocks, steps of 16 tokens and of one.
SHAPE = Options(max_tokens=12, block_size=4, num_blocks=13)


def options(**changes):
    """`SHAPE` with changes."""
    return dataclasses.replace(SHAPE, **changes)


def run_batch(model, prompts, options, stop_tokens=frozenset()):
    """The batch after its run, and what it yielded."""
    ragged = Batch(model.config, model.weights, prompts, frozenset(stop_tokens), options)
    return ragged, list(ragged.run())


def generated(model, prompts, options, stop_tokens=frozenset()):
    """The tokens of every prompt."""
    return [s.generated for s in run_batch(model, prompts, options, stop_tokens)[0].sequences]


def random_prompts(lengths):
    """Tokens of tiny_gguf's vocabulary, no control token among them."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 259, length).tolist() for length in lengths]


def stand_in_programs(monkeypatch):
    """Replaces the compiled steps by one that gives token 10 + length, a printable character.

    Returns a dictionary of what would have been compiled: key -> shapes of the arguments.
    """
    compiled = {}

    def compile_step(config, implementation, interpret, structure, shapes):
        def step(weights, cache, tokens, counts, query_start_loc, draw):
            cache = paged_kv.advance(cache, jnp.asarray(counts))
            return np.asarray(10 + cache.seq_lengths), cache

        key = (config, implementation, interpret, structure, shapes)
        compiled[key] = jax.tree.unflatten(structure, shapes)
        return step

    monkeypatch.setattr(programs, "compile_step", compile_step)
    return compiled


def needs_jax(implementation):
    """Skips where this JAX cannot run the kernels."""
    if implementation == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip(f"the GPU kernels need jax >= 0.11.2, and this is {jax.__version__}")
