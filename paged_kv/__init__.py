"""A paged KV cache and fused paged attention for JAX."""
