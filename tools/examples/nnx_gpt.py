"""A GPT of stock `nnx.MultiHeadAttention` layers, unchanged, on a paged cache.

    python -m tools.examples.nnx_gpt

`write_dense` uses the cache that Flax has: one sequence at a time, one token at a time.
`write_paged` takes prompts of different lengths as one batch, each prompt in one step.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_kv.integrations.nnx import PagedCache, attach
from tools.examples import batch

VOCAB, EMBED, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 32, 4, 2, 2, 64


class Block(nnx.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(EMBED, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            HEADS, EMBED, num_kv_heads=KV_HEADS, decode=True, rngs=rngs
        )
        self.up = nnx.Linear(EMBED, 4 * EMBED, rngs=rngs)
        self.down = nnx.Linear(4 * EMBED, EMBED, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GPT(nnx.Module):
    """Tokens and their positions, both (batch, T), to logits (batch, T, vocab)."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, EMBED, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(EMBED, rngs=rngs)
        self.head = nnx.Linear(EMBED, VOCAB, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def random_model() -> GPT:
    """A model with random weights."""
    model = nnx.eval_shape(lambda: GPT(nnx.Rngs(0)))
    nnx.update(model, batch.random_weights(nnx.state(model)))
    return model


@nnx.jit
def dense_step(model: GPT, tokens, positions):
    return jnp.argmax(model(tokens, positions)[:, -1], axis=-1)


def write_dense(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, through the cache of `nnx.MultiHeadAttention`."""
    for block in model.blocks:
        block.attention.init_cache((1, CONTEXT, EMBED))
    tokens = list(prompt)
    for position in range(len(prompt) + num_tokens - 1):
        row = np.array([[tokens[position]]], np.int32)
        following = dense_step(model, row, np.array([[position]], np.int32))
        if position >= len(prompt) - 1:
            tokens.append(int(following[0]))
    return tokens[len(prompt) :]


# The cache comes first, so that it is what is donated, though the model holds it too.
@functools.partial(nnx.jit, donate_argnums=0)
def prompt_step(cache: PagedCache, model: GPT, tokens, counts):
    with cache.step(counts, width=tokens.shape[1]):
        logits = model(tokens, cache.positions())
    return jnp.argmax(logits[jnp.arange(len(counts)), counts - 1], axis=-1)


@functools.partial(nnx.jit, donate_argnums=0)
def decode_step(cache: PagedCache, model: GPT, tokens):
    with cache.step(1):
        logits = model(tokens[:, None], cache.positions())
    return jnp.argmax(logits[:, 0], axis=-1)


def write_paged(model: GPT, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all through one paged cache."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": EMBED // HEADS}
    cache = attach(model, batch.cache_for(prompts, num_tokens, **sizes))
    steps = [prompt_step(cache, model, *batch.padded(prompts))]
    while len(steps) < num_tokens:
        steps.append(decode_step(cache, model, steps[-1]))
    return np.stack(steps, axis=1).tolist()


def main(num_tokens: int = 12) -> None:
    batch.compare(
        "the dense cache of Flax",
        VOCAB,
        write_dense=lambda prompt: write_dense(random_model(), prompt, num_tokens),
        write_paged=lambda prompts: write_paged(random_model(), prompts, num_tokens),
    )


if __name__ == "__main__":
    main()
