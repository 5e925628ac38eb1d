"""Partial attention results: how (out, lse) pairs over disjoint keys become one; sinks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention_states(
    out_a: Float[Array, "*rows head_dim"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows head_dim"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Both outputs must be without sinks: apply those once, last.  A side that saw no key (lse -inf)
    counts for nothing; when neither saw one, the result is 0 and -inf.  The order of merges does
    not matter.  Computed in float32; `out` takes the dtype of `out_a`.

    Source: the state merge of FlashInfer (Ye et al., 2025); the algebra is FlashAttention's (Dao et
    al., 2022).
    """
    lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    seen = a + b > 0
    total = jnp.where(seen, a + b, 1.0)
    out = out_a.astype(jnp.float32) * (a / total)[..., None]
    out += out_b.astype(jnp.float32) * (b / total)[..., None]
    return out.astype(out_a.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)


def apply_sinks(
    out: Float[Array, "num_tokens num_query_heads head_dim"],
    lse: Float[Array, "num_tokens num_query_heads"],
    sinks: Float[Array, "num_query_heads"],
) -> Float[Array, "num_tokens num_query_heads head_dim"]:
    """Adds one term per query head to the denominator: `out * sigmoid(lse - sink)`.

    `sinks` are learned logits in natural units, as gpt-oss has them.  `lse` stays without them, so
    that partial results can be merged first; apply sinks once, last.  Computed in float32; the
    result takes the dtype of `out`.
    """
    seen = lse > -jnp.inf
    lse = jnp.where(seen, lse, 0.0).astype(jnp.float32)
    weight = jnp.where(seen, jax.nn.sigmoid(lse - sinks.astype(jnp.float32)[None, :]), 0.0)
    return (out.astype(jnp.float32) * weight[..., None]).astype(out.dtype)
