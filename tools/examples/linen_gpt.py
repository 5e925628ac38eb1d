"""A GPT of stock `linen.MultiHeadDotProductAttention` layers, on a paged cache.

    python -m tools.examples.linen_gpt

`write_dense` uses the cache that Linen has: one sequence at a time, one token at a time.
`write_paged` takes prompts of different lengths as one batch, each prompt in one step.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from paged_kv.integrations.linen import PagedCache
from tools.examples import batch

VOCAB, EMBED, HEADS, LAYERS, CONTEXT = 64, 32, 4, 2, 64


class GPT(nn.Module):
    """Tokens (batch, T) to logits (batch, T, vocab)."""

    is_paged: bool

    @nn.compact
    def __call__(self, tokens, positions=None, counts=None):
        """With a paged cache, `counts` says which tokens of the rows are real; None: all."""
        width = tokens.shape[1]
        step = None
        if self.is_paged:
            step = PagedCache(name="paged").step(width if counts is None else counts, width)
            positions = step.positions()
        embed_position = nn.Embed(CONTEXT, EMBED, name="embed_positions")
        x = nn.Embed(VOCAB, EMBED, name="embed_tokens")(tokens) + embed_position(positions)
        for layer in range(LAYERS):
            attention = nn.MultiHeadDotProductAttention(
                HEADS,
                decode=step is None,
                attention_fn=nn.dot_product_attention if step is None else step.attention_fn(layer),
                name=f"attention_{layer}",
            )
            x = x + attention(nn.LayerNorm(name=f"norm_{layer}")(x))
            up = nn.Dense(4 * EMBED, name=f"up_{layer}")(nn.LayerNorm(name=f"norm_up_{layer}")(x))
            x = x + nn.Dense(EMBED, name=f"down_{layer}")(nn.gelu(up))
        return nn.Dense(VOCAB, name="head")(nn.LayerNorm(name="norm")(x))


DENSE, PAGED = GPT(is_paged=False), GPT(is_paged=True)


def random_params():
    """The same for both models: attention has its weights under the same names."""
    shapes = jax.eval_shape(PAGED.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return batch.random_weights(shapes["params"])


@functools.partial(jax.jit, donate_argnums=1)
def dense_step(params, cache, tokens, positions):
    variables = {"params": params, "cache": cache}
    logits, after = DENSE.apply(variables, tokens, positions, mutable=["cache"])
    return jnp.argmax(logits[:, -1], axis=-1), after["cache"]


def write_dense(params, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, through the cache of Linen."""
    whole = jnp.zeros((1, CONTEXT), jnp.int32)
    shapes = jax.eval_shape(DENSE.init, jax.random.key(0), whole, whole)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    tokens = list(prompt)
    for position in range(len(prompt) + num_tokens - 1):
        row = np.array([[tokens[position]]], np.int32)
        following, cache = dense_step(params, cache, row, np.array([[position]], np.int32))
        if position >= len(prompt) - 1:
            tokens.append(int(following[0]))
    return tokens[len(prompt) :]


@functools.partial(jax.jit, donate_argnums=1)
def paged_step(params, cache, tokens, counts=None):
    """Rows of tokens (batch, T), padded where `counts` is given: the token after each."""
    variables = {"params": params, "cache": cache}
    logits, after = PAGED.apply(variables, tokens, counts=counts, mutable=["cache"])
    last = -1 if counts is None else counts - 1
    return jnp.argmax(logits[jnp.arange(len(tokens)), last], axis=-1), after["cache"]


def write_paged(params, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all through one paged cache."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": EMBED // HEADS}
    cache = {"paged": {"kv": batch.cache_for(prompts, num_tokens, **sizes)}}
    tokens, cache = paged_step(params, cache, *batch.padded(prompts))
    steps = [tokens]
    while len(steps) < num_tokens:
        tokens, cache = paged_step(params, cache, tokens[:, None])
        steps.append(tokens)
    return np.stack(steps, axis=1).tolist()


def main(num_tokens: int = 12) -> None:
    params = random_params()
    batch.compare(
        "the dense cache of Linen",
        VOCAB,
        write_dense=lambda prompt: write_dense(params, prompt, num_tokens),
        write_paged=lambda prompts: write_paged(params, prompts, num_tokens),
    )


if __name__ == "__main__":
    main()
