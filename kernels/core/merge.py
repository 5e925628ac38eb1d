"""Partial attention results: how (out, lse) pairs over disjoint keys become one; sinks.

Source: the state merge of FlashInfer (Ye et al., 2025), the algebra of FlashAttention (Dao et al.,
2022); sinks as in gpt-oss.
"""

import jax
import jax.numpy as jnp
from jax import Array


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """The state over both sets of keys: out (..., head_dim) in out_a's dtype, lse (...) float32."""
    lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    seen = a + b > 0
    total = jnp.where(seen, a + b, 1.0)
    out = out_a.astype(jnp.float32) * (a / total)[..., None]
    out += out_b.astype(jnp.float32) * (b / total)[..., None]
    return out.astype(out_a.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)


def apply_sinks(out: Array, lse: Array, sinks: Array) -> Array:
    """`out * sigmoid(lse - sink)`: (num_tokens, num_query_heads, head_dim) in out's dtype."""
    seen = lse > -jnp.inf
    lse = jnp.where(seen, lse, 0.0).astype(jnp.float32)
    weight = jnp.where(seen, jax.nn.sigmoid(lse - sinks.astype(jnp.float32)[None, :]), 0.0)
    return (out.astype(jnp.float32) * weight[..., None]).astype(out.dtype)
