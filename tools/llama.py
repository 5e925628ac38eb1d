"""The Llama decoder in plain JAX on a paged cache: one scan over the layers, one stacked cache.

Weights are arguments of every function and never constants of a program.  Matrices are stored
(out, in), as GGUF files hold them.  Source: Touvron et al., "LLaMA" (arXiv:2302.13971).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

import paged_kv
from paged_kv.ops import Implementation


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a compiled program depends on, besides the shapes of the weights."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_epsilon: float


class LayerWeights(NamedTuple):
    """Every layer's weights, stacked along a leading layer axis; norms are float32 always."""

    attention_norm: Float[Array, "layers embed"]
    query: Float[Array, "layers query embed"]
    key: Float[Array, "layers kv embed"]
    value: Float[Array, "layers kv embed"]
    output: Float[Array, "layers embed query"]
    ffn_norm: Float[Array, "layers embed"]
    gate: Float[Array, "layers ffn embed"]
    up: Float[Array, "layers ffn embed"]
    down: Float[Array, "layers embed ffn"]


class LlamaWeights(NamedTuple):
    """The weights of a model; `head` may be the array `embedding` is."""

    embedding: Float[Array, "vocab embed"]
    layers: LayerWeights
    final_norm: Float[Array, " embed"]
    head: Float[Array, "vocab embed"]
    inverse_frequencies: Float[Array, " half_head_dim"]  # float32, radians per position


class Draw(NamedTuple):
    """How tokens are drawn: from the softmax of logits / temperature."""

    seed: ArrayLike  # uint32
    temperature: ArrayLike  # float32


def forward(
    config: LlamaConfig,
    weights: LlamaWeights,
    cache: paged_kv.PagedKVCache,
    tokens: Int32[Array, " num_tokens"],
    num_new_tokens: Int32[Array, " batch"],
    query_start_loc: Int32[Array, " batch_plus_1"] | None = None,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "batch vocab"], paged_kv.PagedKVCache]:
    """Logits after each sequence's last new token, float32, and the cache with the new tokens.

    `tokens` holds the new tokens of all sequences, packed as `query_start_loc` says, and the blocks
    for them must be in the cache's table.  With `query_start_loc=None` every sequence has one.  The
    logits of a sequence without new tokens mean nothing.
    """
    cache = paged_kv.advance(cache, num_new_tokens)
    where = {
        "query_start_loc": query_start_loc,
        "implementation": implementation,
        "interpret": interpret,
    }
    schedule = paged_kv.make_schedule(
        cache,
        num_query_heads=config.num_query_heads,
        query_start_loc=query_start_loc,
        implementation=implementation,
        num_tokens=len(tokens),
    )
    positions, last = _positions(cache.seq_lengths, query_start_loc, tokens.shape[0])
    angles = positions[:, None].astype(jnp.float32) * weights.inverse_frequencies[None]

    def layer_step(carry, scanned):
        hidden, cache = carry
        layer, weight = scanned
        normed = rms_norm(hidden, weight.attention_norm, config.rms_epsilon)
        query = rotate(_heads(project(normed, weight.query), config.head_dim), angles)
        key = rotate(_heads(project(normed, weight.key), config.head_dim), angles)
        value = _heads(project(normed, weight.value), config.head_dim)
        cache = paged_kv.append_tokens(cache, key, value, layer=layer, **where)
        attended = paged_kv.paged_attention(query, cache, layer=layer, schedule=schedule, **where)
        hidden += project(attended.reshape(tokens.shape[0], -1), weight.output)
        normed = rms_norm(hidden, weight.ffn_norm, config.rms_epsilon)
        gated = jax.nn.silu(project(normed, weight.gate)) * project(normed, weight.up)
        hidden += project(gated, weight.down)
        return (hidden, cache), None

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    carry = (weights.embedding[tokens], cache)
    (hidden, cache), _ = lax.scan(layer_step, carry, (layers, weights.layers))
    normed = rms_norm(hidden[last], weights.final_norm, config.rms_epsilon)
    return project(normed, weights.head, jnp.float32), cache


def sample(
    logits: Float[Array, "batch vocab"], seq_lengths: Int32[Array, " batch"], draw: Draw | None
) -> Int32[Array, " batch"]:
    """One token for each sequence: drawn, or with `draw=None` the likeliest.

    A drawn token depends on the seed, the sequence and its length, not on the rest of the batch.
    """
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw_one(row, length, row_logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draw.seed), row), length)
        return jax.random.categorical(key, row_logits / draw.temperature).astype(jnp.int32)

    return jax.vmap(draw_one)(jnp.arange(logits.shape[0]), seq_lengths, logits)


def project(x, matrix, dtype=None):
    """`x @ matrix.T` for a matrix stored (out, in), in x's dtype unless another is given."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, matrix, contract_last, preferred_element_type=dtype or x.dtype)


def rms_norm(x, weight, epsilon):
    """Root-mean-square normalisation over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + epsilon) * weight[None]).astype(x.dtype)


def rotate(x, angles):
    """Rotary embedding of x (tokens, heads, head_dim) by angles (tokens, head_dim / 2).

    GGUF files interleave: dimensions 2i and 2i + 1 are a pair, turned by angle i.
    """
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (tokens, 1, head_dim / 2)
    even, odd = (x[..., i::2].astype(jnp.float32) for i in (0, 1))
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _heads(x, head_dim):
    return x.reshape(x.shape[0], -1, head_dim)


def _positions(seq_lengths, query_start_loc, num_tokens):
    """Position of every packed token (padding: any), and the index of each sequence's last one."""
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    if query_start_loc is None:
        return seq_lengths - 1, index
    ends = query_start_loc[1:]
    sequence = jnp.searchsorted(ends, index, side="right", method="compare_all")
    sequence = jnp.minimum(sequence, seq_lengths.shape[0] - 1)
    # the last token of a sequence, at index end - 1, sits at position length - 1
    return index - ends[sequence] + seq_lengths[sequence], ends - 1
