"""A Gemma-style decoder in Flax NNX, with attention of its own, on a paged cache.

    python -m tools.examples.nnx_gemma

Soft-capped scores, layers with a sliding window and without in turn, queries scaled before
attention, fewer kv heads than query heads, norms before and after each part.  `write_dense` keeps
keys and values of the whole context in `nnx.Cache` variables and masks; `write_paged` takes prompts
of different lengths as one batch, each prompt in one step.
Source: Gemma Team, "Gemma 2" (arXiv:2408.00118).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_kv.integrations.nnx import PagedAttention, PagedCache
from tools.examples import batch

VOCAB, EMBED, FFN, LAYERS, CONTEXT = 64, 32, 64, 2, 64
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 16
WINDOWS = (4, None)  # keys a query sees, itself included, in turn over the layers
SOFT_CAP, FINAL_SOFT_CAP = 2.0, 30.0
QUERY_SCALE = EMBED**-0.5  # not 1/sqrt(head_dim)


class RMSNorm(nnx.Module):
    """Gemma's: the scale is what is added to one."""

    def __init__(self, rngs: nnx.Rngs):
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (EMBED,)))

    def __call__(self, x):
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-6) * (1 + self.bias[...][None, None])


class DenseAttention(nnx.Module):
    """One sequence, one token at a time, over keys and values of the whole context."""

    def __init__(self, window: int | None):
        self.window = window
        empty = jnp.zeros((1, CONTEXT, KV_HEADS, HEAD_DIM))
        self.keys, self.values, self.length = map(nnx.Cache, (empty, empty, jnp.int32(0)))

    def __call__(self, query, key, value):
        length = self.length[...]
        for cached, new in ((self.keys, key), (self.values, value)):
            cached[...] = jax.lax.dynamic_update_slice(cached[...], new, (0, length, 0, 0))
        self.length[...] = length + 1
        group = HEADS // KV_HEADS
        keys, values = (jnp.repeat(x[...], group, axis=2) for x in (self.keys, self.values))
        scores = SOFT_CAP * jnp.tanh(jnp.einsum("bthd,bshd->bhts", query, keys) / SOFT_CAP)
        behind = length - jnp.arange(CONTEXT)
        seen = (behind >= 0) & (behind < (self.window or CONTEXT))
        weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, values)


def paged_attention(cache: PagedCache, layer: int) -> PagedAttention:
    """What Gemma's layer `layer` asks of paged attention."""
    window = WINDOWS[layer % len(WINDOWS)]
    return PagedAttention(
        cache,
        layer,
        scale=1.0,  # queries are scaled already
        logits_soft_cap=SOFT_CAP,
        local_window_size=None if window is None else (window - 1, 0),
    )


class Block(nnx.Module):
    """Attention and a gated feed-forward layer, each between two norms."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.query = linear(EMBED, (HEADS, HEAD_DIM))
        self.key, self.value = (linear(EMBED, (KV_HEADS, HEAD_DIM)) for _ in range(2))
        self.out = linear((HEADS, HEAD_DIM), EMBED, axis=(-2, -1))
        self.gate, self.up = (linear(EMBED, FFN) for _ in range(2))
        self.down = linear(FFN, EMBED)
        self.norms = nnx.List([RMSNorm(rngs) for _ in range(4)])

    def __call__(self, x, positions, attention):
        before, after, before_ffn, after_ffn = self.norms
        normed = before(x)
        query = rotate(self.query(normed), positions) * QUERY_SCALE
        key = rotate(self.key(normed), positions)
        x = x + after(self.out(attention(query, key, self.value(normed))))
        normed = before_ffn(x)
        gated = nnx.gelu(self.gate(normed)) * self.up(normed)
        return x + after_ffn(self.down(gated))


class Gemma(nnx.Module):
    """Tokens and their positions, both (batch, T), to logits (batch, T, vocab)."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = RMSNorm(rngs)
        # not the embedding: a random model with tied weights repeats its last token
        self.head = nnx.Linear(EMBED, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions, attentions):
        """`attentions` has one function of (query, key, value) for each layer."""
        x = self.embed(tokens)  # Gemma scales small weights here; these are of order 1
        for block, attention in zip(self.blocks, attentions, strict=True):
            x = block(x, positions, attention)
        return FINAL_SOFT_CAP * jnp.tanh(self.head(self.norm(x)) / FINAL_SOFT_CAP)


def rotate(x, positions):
    """Rotary embedding of x (batch, T, heads, head_dim) at positions (batch, T)."""
    frequencies = 10000.0 ** -(jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def random_model() -> Gemma:
    """A model with random weights."""
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0)))
    nnx.update(model, batch.random_weights(nnx.state(model)))
    return model


@nnx.jit
def dense_step(attentions: nnx.List, model: Gemma, tokens, positions):
    return jnp.argmax(model(tokens, positions, attentions)[:, -1], axis=-1)


def write_dense(model: Gemma, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, through dense caches."""
    windows = [WINDOWS[layer % len(WINDOWS)] for layer in range(LAYERS)]
    attentions = nnx.List([DenseAttention(window) for window in windows])
    tokens = list(prompt)
    for position in range(len(prompt) + num_tokens - 1):
        row = np.array([[tokens[position]]], np.int32)
        following = dense_step(attentions, model, row, np.array([[position]], np.int32))
        if position >= len(prompt) - 1:
            tokens.append(int(following[0]))
    return tokens[len(prompt) :]


@functools.partial(nnx.jit, donate_argnums=0)
def paged_step(cache: PagedCache, model: Gemma, tokens, counts=None):
    """Rows of tokens (batch, T), padded where `counts` is given: the token after each."""
    width = tokens.shape[1]
    attentions = [paged_attention(cache, layer) for layer in range(LAYERS)]
    with cache.step(width if counts is None else counts, width):
        logits = model(tokens, cache.positions(), attentions)
    last = -1 if counts is None else counts - 1
    return jnp.argmax(logits[jnp.arange(len(tokens)), last], axis=-1)


def write_paged(model: Gemma, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all through one paged cache."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    cache = PagedCache(batch.cache_for(prompts, num_tokens, **sizes))
    steps = [paged_step(cache, model, *batch.padded(prompts))]
    while len(steps) < num_tokens:
        steps.append(paged_step(cache, model, steps[-1][:, None]))
    return np.stack(steps, axis=1).tolist()


def main(num_tokens: int = 12) -> None:
    model = random_model()
    batch.compare(
        "a dense cache in Flax",
        VOCAB,
        write_dense=lambda prompt: write_dense(model, prompt, num_tokens),
        write_paged=lambda prompts: write_paged(model, prompts, num_tokens),
    )


if __name__ == "__main__":
    main()
