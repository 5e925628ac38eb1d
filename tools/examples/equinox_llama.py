"""A Llama-style decoder for one sequence in Equinox, and `vmap` over a paged cache.

    python -m tools.examples.equinox_llama

Rotary positions, RMS norms, a gated feed-forward layer, attention by stock
`eqx.nn.MultiheadAttention`.  `write_dense` keeps keys and values in an `eqx.nn.State`, Equinox's
own way, one sequence and one token at a time.  `write_paged` maps the model over a batch of prompts
of different lengths, each prompt in one step.

Source: Touvron et al., "LLaMA" (arXiv:2302.13971).
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import paged_kv
from paged_kv.integrations.equinox import multihead_attention, sequence_axes
from tools.examples import batch

VOCAB, EMBED, HEADS, FFN, LAYERS, CONTEXT = 64, 32, 4, 96, 2, 64
HEAD_DIM = EMBED // HEADS


class Block(eqx.Module):
    """One layer; `dense` is where its dense cache is in the state."""

    attention: eqx.nn.MultiheadAttention
    attention_norm: eqx.nn.RMSNorm
    ffn_norm: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dense: eqx.nn.StateIndex

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        linear = functools.partial(eqx.nn.Linear, use_bias=False)
        self.attention = eqx.nn.MultiheadAttention(HEADS, EMBED, key=keys[0])
        self.attention_norm, self.ffn_norm = eqx.nn.RMSNorm(EMBED), eqx.nn.RMSNorm(EMBED)
        self.gate, self.up = (linear(EMBED, FFN, key=k) for k in keys[1:3])
        self.down = linear(FFN, EMBED, key=keys[3])
        empty = jnp.zeros((CONTEXT, HEADS, HEAD_DIM))
        self.dense = eqx.nn.StateIndex((empty, empty))

    def feed_forward(self, x):
        normed = self.ffn_norm(x)
        return x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))


class Llama(eqx.Module):
    """Tokens (T,) of one sequence and their positions to logits (T, vocab)."""

    embedding: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        first, last, *keys = jax.random.split(key, 2 + LAYERS)
        self.embedding = eqx.nn.Embedding(VOCAB, EMBED, key=first)
        self.blocks = [Block(k) for k in keys]
        self.norm = eqx.nn.RMSNorm(EMBED)
        self.head = eqx.nn.Linear(EMBED, VOCAB, use_bias=False, key=last)

    def __call__(self, tokens, positions, cache, attend):
        """`attend(block, layer, x, cache, turn)` is attention over whatever the cache is."""
        turn = lambda q, k, v: (rotate(q, positions), rotate(k, positions), v)
        x = jax.vmap(self.embedding)(tokens)
        for layer, block in enumerate(self.blocks):
            attended, cache = attend(block, layer, jax.vmap(block.attention_norm)(x), cache, turn)
            x = jax.vmap(block.feed_forward)(x + attended)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x)), cache


def rotate(x, positions):
    """Rotary embedding of x (tokens, heads, head_dim) at positions (tokens,) or (1,)."""
    frequencies = 10000.0 ** -(jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angles = (positions[:, None].astype(jnp.float32) * frequencies[None])[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def random_model():
    """A model with random weights, and its state: empty dense caches."""
    shapes, state = eqx.filter_eval_shape(eqx.nn.make_with_state(Llama), jax.random.key(0))
    arrays, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    return eqx.combine(batch.random_weights(arrays), rest), state


@eqx.filter_jit
def dense_step(model, state, token, position):
    def attend(block, layer, x, state, turn):
        """Stock attention, whose keys and values come from the state, the new ones apart."""
        position_of_key = jnp.arange(CONTEXT)
        caches = []

        def from_state(query, *new):
            query, *new = turn(query, *new)
            is_new = (position_of_key == position)[:, None, None]
            caches.extend(map(functools.partial(jnp.where, is_new), new, state.get(block.dense)))
            return query, *caches

        everywhere = jnp.broadcast_to(x, (CONTEXT, EMBED))
        mask = (position_of_key <= position)[None]
        out = block.attention(x, everywhere, everywhere, mask=mask, process_heads=from_state)
        return out, state.set(block.dense, tuple(caches))

    logits, state = model(token[None], position[None], state, attend)
    return jnp.argmax(logits[-1]), state


def write_dense(model, state, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, through dense caches in an `eqx.nn.State`."""
    tokens = list(prompt)
    for position in range(len(prompt) + num_tokens - 1):
        arguments = (jnp.int32(tokens[position]), jnp.int32(position))
        following, state = dense_step(model, state, *arguments)
        if position >= len(prompt) - 1:
            tokens.append(int(following))
    return tokens[len(prompt) :]


@eqx.filter_jit(donate="all-except-first")
def paged_step(model, cache, tokens, counts=None):
    """Rows of tokens (batch, T), padded where `counts` is given: the token after each."""

    def of_one(tokens, count, cache):
        positions = cache.seq_lengths + jnp.arange(len(tokens), dtype=jnp.int32)
        cache = paged_kv.advance(cache, len(tokens) if count is None else count)

        def attend(block, layer, x, cache, turn):
            same = {"layer": layer, "num_new_tokens": count, "process_heads": turn}
            return multihead_attention(block.attention, x, cache, **same)

        logits, cache = model(tokens, positions, cache, attend)
        return jnp.argmax(logits[-1 if count is None else count - 1]), cache

    axes = sequence_axes(cache)
    return jax.vmap(of_one, in_axes=(0, 0, axes), out_axes=(0, axes))(tokens, counts, cache)


def write_paged(model, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all through one paged cache."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
    cache = batch.cache_for(prompts, num_tokens, **sizes)
    tokens, cache = paged_step(model, cache, *map(jnp.asarray, batch.padded(prompts)))
    steps = [np.asarray(tokens)]
    while len(steps) < num_tokens:
        tokens, cache = paged_step(model, cache, tokens[:, None])
        steps.append(np.asarray(tokens))
    return np.stack(steps, axis=1).tolist()


def main(num_tokens: int = 12) -> None:
    model, state = random_model()
    batch.compare(
        "a dense cache in Equinox",
        VOCAB,
        write_dense=lambda prompt: write_dense(model, state, prompt, num_tokens),
        write_paged=lambda prompts: write_paged(model, prompts, num_tokens),
    )


if __name__ == "__main__":
    main()
