"""One rank's part of an op whose blocks are shared out over the ranks of a context axis.

A block of `block_size * num_ranks` slots lies across the ranks: rank r holds slots
`[r * block_size, (r + 1) * block_size)` of every block, under the same id, so all ranks read one
table.  Tokens of a sequence that a rank holds keep their order, so to a kernel they are a shorter
sequence, as long as nothing depends on positions: the append, a decode step, and the part of a
prefill that all its queries see.  What does (the newest keys of a prefill, windows and ALiBi) is
left to the reference, which knows where each key stands.

Runs inside `shard_map`.  Source: round-robin blocks are those of Helix parallelism (Bhatia et al.,
2025); the merge over ranks is FlashAttention's split-KV merge.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import dispatch, ops, reference, validate
from .cache import PagedKVCache
from .kernels.core import layout, merge
from .kernels.core import schedule as schedules
from .kernels.core.problem import CacheShape
from .kernels.core.schedule import MadeFor
from .kernels.core.variant import Variant


class Ranks(NamedTuple):
    """Who shares out the slots of each block."""

    axis: Any  # name or names of mesh axes
    num: int
    block_size: int  # slots that each rank has of a block

    def held(self, count: Array) -> Array:
        """How many of a sequence's first `count` tokens this rank holds."""
        size = self.block_size
        blocks, rest = count // (size * self.num), count % (size * self.num)
        return blocks * size + jnp.clip(rest - lax.axis_index(self.axis) * size, 0, size)

    def holds(self, position: Array) -> Array:
        """Whether this rank holds the token at a position of 0 or more."""
        return position // self.block_size % self.num == lax.axis_index(self.axis)

    def position(self, index: Array) -> Array:
        """Where in its sequence the token stands that is `index`-th of those held."""
        size = self.block_size
        block, offset = index // size, index % size
        return (block * self.num + lax.axis_index(self.axis)) * size + offset


def append(
    ranks: Ranks,
    cache: PagedKVCache,
    keys: Array,
    values: Array,
    query_start_loc: Array | None,
    **same: Any,
) -> PagedKVCache:
    """`append_tokens` of those new tokens that this rank holds; all ranks are given all of them."""
    lengths = cache.seq_lengths
    if query_start_loc is None:
        is_here = (lengths > 0) & ranks.holds(lengths - 1)
        local = replace(cache, seq_lengths=jnp.where(is_here, ranks.held(lengths), 0))
        after = ops.append_tokens(local, keys, values, **same)
        return replace(after, seq_lengths=lengths)
    num_tokens = keys.shape[0]
    first = lengths - jnp.diff(query_start_loc)
    before, here = ranks.held(jnp.maximum(first, 0)), ranks.held(jnp.maximum(lengths, 0))
    ends = jnp.cumsum(jnp.maximum(here - before, 0), dtype=jnp.int32)
    starts = jnp.pad(ends, (1, 0))
    token = layout.locate_tokens(starts, here, num_tokens)
    index = ranks.position(jnp.maximum(token.position, 0)) - first[token.sequence]
    source = jnp.clip(query_start_loc[token.sequence] + index, 0, num_tokens - 1)
    local = replace(cache, seq_lengths=here)
    after = ops.append_tokens(local, keys[source], values[source], query_start_loc=starts, **same)
    return replace(after, seq_lengths=lengths)


def attend(
    ranks: Ranks,
    query: Array,
    cache: PagedKVCache,
    query_start_loc: Array | None,
    layer: Array | None,
    variant: Variant,
    slopes: Array | None,
    **same: Any,
) -> tuple[Array, Array]:
    """(out, lse) over all ranks, the same on each; only these two travel."""
    problem = validate.attention_problem(cache, query, query_start_loc, variant)
    shape = replace(problem.cache, block_size=ranks.block_size * ranks.num)
    made_for = MadeFor.of(shape, problem.num_query_heads, problem.is_packed, variant)
    schedule = schedules.make(made_for, cache.block_table, cache.seq_lengths, query_start_loc)
    lengths = schedule.seq_lengths  # 0 where an entry that some rank uses is outside the pool
    call = partial(
        ops.paged_attention,
        query,
        query_start_loc=query_start_loc,
        layer=layer,
        scale=variant.scale,
        logits_soft_cap=variant.logits_soft_cap,
        return_residual=True,
        **same,
    )
    by_reference = _Reference(ranks, problem.cache, variant, problem.is_packed)
    arrays = query, cache, slopes, lengths, schedule.query_start_loc, layer
    if variant.window is not None or slopes is not None:
        return merge_over(ranks.axis, *by_reference(*arrays, jnp.zeros_like(lengths)))
    if query_start_loc is None:
        return merge_over(ranks.axis, *call(replace(cache, seq_lengths=ranks.held(lengths))))
    counts = jnp.diff(query_start_loc)
    blocks = jnp.maximum(lengths - counts, 0) // shape.block_size  # before the queries' own
    # a query of the kernel's is one of its sequence's last tokens, which must be as many
    blocks = jnp.where(blocks * ranks.block_size >= counts, blocks, 0)
    seen_by_all = replace(cache, seq_lengths=blocks * ranks.block_size)
    old_out, old_lse = call(seen_by_all, is_causal=False)
    new = by_reference(*arrays, blocks * shape.block_size)
    return merge_over(ranks.axis, *merge.merge_states(old_out, old_lse, *new))


def merge_over(axis: Any, out: Array, lse: Array) -> tuple[Array, Array]:
    """The state over the keys of all ranks of the axis, from the state of each over its own."""
    top = lax.pmax(lax.stop_gradient(lse), axis)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    sums = lax.psum((out.astype(jnp.float32) * weight[..., None], weight), axis)
    total = jnp.where(sums[1] > 0, sums[1], 1.0)
    merged = (sums[0] / total[..., None]).astype(out.dtype)
    return merged, jnp.where(sums[1] > 0, top + jnp.log(total), -jnp.inf)


class _Reference(NamedTuple):
    """The reference over the keys that this rank holds, from a first one on; all static."""

    ranks: Ranks
    cache: CacheShape
    variant: Variant
    is_packed: bool

    def __call__(
        self,
        query: Array,
        cache: PagedKVCache,
        slopes: Array | None,
        lengths: Array,
        starts: Array,
        layer: Array | None,
        first_key: Array,
    ) -> tuple[Array, Array]:
        pools = (pool.reshape(self.cache.pool_shape) for pool in (cache.key_pool, cache.value_pool))
        part = reference.Part(lax.axis_index(self.ranks.axis), first_key)
        layer = jnp.int32(0) if layer is None else layer
        arrays = (query, *pools, slopes, cache.block_table, lengths, starts, layer, part)
        return _attend_part(self, *dispatch.uniform(arrays))

    @property
    def statics(self) -> tuple[reference.Scoring, bool]:
        v = self.variant
        scoring = reference.Scoring(v.scale, v.left, v.right, v.logits_soft_cap, self.ranks.num)
        return scoring, self.is_packed


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_part(statics: _Reference, *arrays: Any) -> Any:
    return reference.attend(*statics.statics, *arrays)


def _forward(statics, *arrays):
    result: Any = _attend_part(statics, *arrays)
    return result, (arrays, *result)


def _backward(statics, residuals, cotangents):
    gradients = reference.attend_transposed(*statics.statics, *residuals, *cotangents)
    return *gradients, *(None,) * 5


_attend_part.defvjp(_forward, _backward)
