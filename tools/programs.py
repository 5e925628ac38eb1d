"""Compiled steps of the Llama decoder: one for each set of shapes, and its compiling in no time."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from tools import llama


class Programs:
    """The steps of one model, compiled when they are first needed and said so.

    Args:
      config: of the model.
      implementation, interpret: as in `paged_attention`.
      progress: takes a line for each program that was compiled.
    """

    def __init__(
        self,
        config: llama.LlamaConfig,
        implementation: str | None,
        interpret: bool | None,
        progress: Callable[[str], None],
    ):
        self._config, self._kernels = config, (implementation, interpret)
        self._progress = progress
        self._compiled: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def of(self, kind: str, arguments: tuple) -> Callable:
        """The step for arguments of these shapes, which are those of `compile_step`."""
        num_tokens = len(arguments[2])
        name = f"a {kind} step of {num_tokens} tokens"
        if name not in self._compiled:
            leaves, structure = jax.tree.flatten(arguments)
            shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
            start = time.perf_counter()
            self._compiled[name] = compile_step(self._config, *self._kernels, structure, shapes)
            self._progress(f"compiled {name} in {time.perf_counter() - start:.1f} s")
        return self._compiled[name]


@functools.cache
def compile_step(config: llama.LlamaConfig, implementation, interpret, structure, shapes):
    """The program of a step with arguments of these shapes; the cache is donated to it."""
    kernels = {"implementation": implementation, "interpret": interpret}

    def step(weights, cache, tokens, counts, query_start_loc, draw):
        arguments = (weights, cache, tokens, counts, query_start_loc)
        logits, cache = llama.forward(config, *arguments, **kernels)
        return llama.sample(logits, cache.seq_lengths, draw), cache

    arguments = jax.tree.unflatten(structure, shapes)
    return jax.jit(step, donate_argnums=1).lower(*arguments).compile()
