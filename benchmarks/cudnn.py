"""cuDNN's attention through JAX: paged for decode, dense for prefill.

The paged one has no public name in JAX; this file alone reaches for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .inputs import Inputs
from .workload import ATTEND, Case

Run = Callable[[int], Any]


def _not_plain(case: Case) -> str | None:
    """What neither of the two takes."""
    if case.op != ATTEND or case.dtype not in ("bfloat16", "float16"):
        return "attends only, in 16 bits"
    if case.has_sinks or case.has_alibi or case.logits_soft_cap or case.local_window_size:
        return "plain attention only"
    return None


def paged_unsupported(case: Case) -> str | None:
    return _not_plain(case) or ("decode only" if case.query_lengths is not None else None)


def make_paged(case: Case, inputs: Inputs) -> Run:
    """Decode over pools of its own: exactly batch x width blocks, as it asks for.

    They hold the same tokens, in another random order, and are as many as the tables.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    batch, width = case.batch, case.max_blocks_per_seq
    copies = [_own_pools(case, inputs, copy) for copy in range(len(inputs.tables))]

    @jax.jit
    def attend(query, key_pool, value_pool, table, lengths):
        table = table.reshape(batch, 1, width, 1)
        arguments = query[:, None], key_pool, value_pool, jnp.ones_like(lengths), lengths
        result: Any = paged_attention(
            *arguments, table, table, scale=case.head_dim**-0.5, mask_type=MaskType.PADDING
        )
        out = result[0] if isinstance(result, (tuple, list)) else result
        return out[:, 0]

    arrays = inputs.arrays
    call = lambda pools: attend(arrays.query, *pools, arrays.seq_lengths)
    return lambda index: call(copies[index % len(copies)])


def _own_pools(case: Case, inputs: Inputs, copy: int) -> tuple[jax.Array, ...]:
    table = np.asarray(inputs.tables[copy])
    order = np.random.default_rng(copy).permutation(table.size).astype(np.int32)
    source = np.zeros(table.size, np.int32)
    source[order] = np.maximum(table.ravel(), 0)
    # it multiplies masked values by 0, so what is past a length must be finite
    take = jax.jit(lambda pool: jnp.nan_to_num(pool[source]))
    pools = take(inputs.key_pool), take(inputs.value_pool)
    return *pools, jnp.asarray(order.reshape(table.shape))


def dense_unsupported(case: Case) -> str | None:
    if (reason := _not_plain(case)) is not None:
        return reason
    is_square = case.query_lengths == case.seq_lengths and len(set(case.seq_lengths)) == 1
    return None if is_square else "prefill of equal lengths without context only"


def make_dense(case: Case, inputs: Inputs) -> Run:
    """Prefill of contiguous keys and values, which a paged kernel cannot have."""
    length = case.seq_lengths[0]
    attend = jax.jit(
        lambda *qkv: jax.nn.dot_product_attention(
            *qkv, is_causal=case.is_causal, implementation="cudnn"
        )
    )
    query = inputs.arrays.query.reshape(case.batch, length, -1, case.head_dim)
    shape = case.batch, -1, case.num_kv_heads, case.head_dim
    dense = jax.jit(lambda pool, table: pool[table].reshape(shape)[:, :length])
    pools = inputs.key_pool, inputs.value_pool
    copies = [[dense(pool, table) for pool in pools] for table in inputs.tables]
    return lambda index: attend(query, *copies[index % len(copies)]).reshape(
        inputs.arrays.query.shape
    )
