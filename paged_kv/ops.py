"""The hot path: append, attend, both at once, and the schedule they share.

Order in a step: allocate blocks, `advance` once, `make_schedule` once, then for each layer
`append_tokens` and `paged_attention`, or `append_and_attend`.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from . import dispatch, fused, validate, validate_values
from .cache import PagedKVCache
from .kernels.core import layout, merge
from .kernels.core import schedule as schedules
from .kernels.core.problem import AppendProblem, Problem
from .kernels.core.schedule import MadeFor, Schedule

Implementation = Literal["mosaic_tpu", "mosaic_gpu", "xla"]


def append_tokens(
    cache: PagedKVCache,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    *,
    query_start_loc: Int32[Array, "batch_plus_1"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = None,
) -> PagedKVCache:
    """Writes this step's keys and values into their slots, in place when the cache is donated.

    The new tokens of a sequence are its last ones: call `advance` before, once per step.  Under jit
    a token without a valid slot is dropped and nothing else changes; so are padding tokens, and
    with `query_start_loc=None` the token of a row whose length is 0.

    A row appends to blocks of its own (`BlockAllocator` sees to it; blocks that rows only read may
    be shared).  If two rows append to one block in a step, no other slot changes, but a new token
    may be lost: a kernel may rewrite the few slots around it as they were.

    Args:
      cache: of one layer, or a stack with `layer`.
      keys, values: (num_tokens, num_kv_heads, head_dim), packed new tokens, which are cast to the
        pools' dtype.
      query_start_loc: int32 (batch + 1,), prefix sums of new tokens per sequence; None means one
        token per sequence.
      layer: which layer of a stacked cache, an int or a traced int32.
      implementation: "mosaic_tpu", "mosaic_gpu" or "xla", strictly; None picks the best for the
        platform the program is lowered for.
      interpret: True, or the backend's interpreter parameters, to run a named kernel on CPU.

    Raises:
      ValueError: shapes, dtypes, `layer` or `query_start_loc` do not fit the cache; for concrete
        arrays also when a new token has no allocated slot.
      NotImplementedError: the named implementation cannot run this call; it says the way out.

    Differentiable (reverse mode) in keys, values and pools.

    Source: the reshape_and_cache of vLLM (Kwon et al., 2023).
    """
    same = (query_start_loc, layer, implementation, interpret)
    with jax.named_scope("paged_kv.append"):
        problem, choice, targets = _append_call(cache, keys, values, *same)
        arrays = (keys, values, cache.key_pool, cache.value_pool)
        key_pool, value_pool = _append(problem, choice, *arrays, targets)
    return replace(cache, key_pool=key_pool, value_pool=value_pool)


def paged_attention(
    query: Float[Array, "num_tokens num_query_heads head_dim"],
    cache: PagedKVCache,
    *,
    query_start_loc: Int32[Array, "batch_plus_1"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "num_query_heads"] | None = None,
    alibi_slopes: Float[Array, "num_query_heads"] | None = None,
    schedule: Schedule | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = None,
) -> Any:
    """Attention of packed queries over the keys and values that their sequences have cached.

    Query tokens of sequence b are its last ones, at positions `seq_lengths[b] - q_len[b]` and on;
    causality is by position.  Statistics and accumulators are float32, whatever the dtypes.  A
    query that sees no key gives 0 and lse -inf, and so do padding tokens.

    Args:
      query: (num_tokens, num_query_heads, head_dim), packed query tokens; `num_query_heads` is a
        multiple of the cache's kv heads.
      cache: of one layer, or a stack with `layer`; the queries' own keys are appended already.
      query_start_loc: int32 (batch + 1,), prefix sums of query tokens per sequence; None means one
        token per sequence (decode), where a row of length 0 is inactive.
      layer: which layer of a stacked cache, an int or a traced int32; no layer is copied.
      scale: factor of the dot products, 1/sqrt(head_dim) by default.
      is_causal: a query sees no key after itself.
      local_window_size: keys a query sees on its (left, right) besides itself; an int is both.
        Hugging Face's `sliding_window=W` is `(W - 1, 0)`.
      logits_soft_cap: c in `c * tanh(scores / c)`, in units of the scaled scores (a factor of both
        sides), before bias and mask.
      sinks: (num_query_heads,), one extra logit per query head in the softmax's denominator.
      alibi_slopes: (num_query_heads,), subtracts `slope * |query position - key position|`.
      schedule: from `make_schedule` for this step; saves making it in every layer.
      return_residual: also return lse, without sinks.
      implementation: "mosaic_tpu", "mosaic_gpu" or "xla", strictly; None picks the best for the
        platform the program is lowered for and never fails.
      interpret: True, or the backend's interpreter parameters, to run a named kernel on CPU.

    Returns:
      out (num_tokens, num_query_heads, head_dim) in the query's dtype; with `return_residual` also
      lse (num_tokens, num_query_heads), float32, the natural log of the sum of exponentials of the
      scaled, masked scores.

    Raises:
      ValueError: shapes, dtypes, flags or the schedule do not fit; for concrete arrays also when a
        used table entry is outside the pool, or a sequence has more query tokens than tokens.
      NotImplementedError: the named implementation cannot run this call; it says the way out.

    Differentiable (reverse mode) in query, pools, sinks and slopes.

    Source: PagedAttention of vLLM (Kwon et al., 2023) over the online softmax of FlashAttention
    (Dao et al., 2022); ALiBi (Press et al., 2022); soft cap as in Gemma 2; sinks as in gpt-oss,
    after StreamingLLM (Xiao et al., 2024); argument names of `jax.nn.dot_product_attention` and
    tokamax.
    """
    options = _Options(
        scale,
        is_causal,
        local_window_size,
        logits_soft_cap,
        sinks,
        alibi_slopes,
        schedule,
        return_residual,
    )
    with jax.named_scope("paged_kv.attention"):
        same = (query_start_loc, layer, implementation, interpret)
        problem, choice, operands = _attention_call(query, cache, options, *same)
        arrays = (query, cache.key_pool, cache.value_pool, alibi_slopes, operands)
        return options.result(*_attend(problem, choice, *arrays))


def append_and_attend(
    query: Float[Array, "num_tokens num_query_heads head_dim"],
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    cache: PagedKVCache,
    *,
    query_start_loc: Int32[Array, "batch_plus_1"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = None,
    **attention: Any,
) -> tuple[Any, PagedKVCache]:
    """`append_tokens`, then `paged_attention` over the result; lengths do not advance.

    For a decode step the kernel that attends appends too, on TPU in bfloat16 with head_dim 128, on
    NVIDIA GPU where its shared memory suffices: what is written is the same to the bit.

    Args:
      query: (num_tokens, num_query_heads, head_dim), packed tokens of this step.
      keys, values: (num_tokens, num_kv_heads, head_dim), of the same tokens.
      cache: advanced already; donate it.
      query_start_loc, layer, implementation, interpret: as in `paged_attention`.
      **attention: every other keyword of `paged_attention`.

    Returns:
      What `paged_attention` returns, and the cache with the new tokens.

    Raises:
      ValueError: as both ops, and when query and keys differ in tokens.
      NotImplementedError: as both ops.

    Differentiable (reverse mode) in query, keys, values, pools, sinks and slopes.

    Source: the fused cache update of ragged paged attention (RPA v3) in tpu-inference.
    """
    validate.same_tokens(query, keys)
    options = _Options(**attention)
    same = (query_start_loc, layer, implementation, interpret)
    with jax.named_scope("paged_kv.append_and_attend"):
        append, _, targets = _append_call(cache, keys, values, *same)
        attend, choice, operands = _attention_call(query, cache, options, *same)
        arrays = (query, keys, values, cache.key_pool, cache.value_pool)
        out, lse, key_pool, value_pool = _append_and_attend(
            (append, attend), choice, *arrays, options.alibi_slopes, operands, targets
        )
        result = options.result(out, lse)
    return result, replace(cache, key_pool=key_pool, value_pool=value_pool)


def make_schedule(
    cache: PagedKVCache,
    *,
    num_query_heads: int,
    query_start_loc: Int32[Array, "batch_plus_1"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    is_causal: bool = True,
    implementation: Implementation | None = None,
    num_tokens: int | None = None,
) -> Schedule:
    """What the attention calls of one step share: make it once, after `advance`.

    It depends on lengths and table, not on the layer; layers with different windows need one each.
    It carries what it was made for, and a call that differs is a ValueError.  It is valid for every
    implementation.

    Args:
      cache: advanced already.
      num_query_heads: heads of the queries.
      query_start_loc, local_window_size, is_causal: as in `paged_attention`.
      implementation: the only one to prepare for, where one is named; others then do without what
        they would have shared.
      num_tokens: packed query tokens of the calls, padding included: the first axis of their
        queries, which must then be that long.  With it the work lists of a ragged batch are made
        here; without it, in each of the calls.

    Raises:
      ValueError: an argument does not fit the cache, or the batch.

    Source: the plan of FlashInfer (Ye et al., 2025), made once per step and shared by all layers.
    """
    validate.implementation_name(implementation)
    shape = validate.cache_shape(cache)
    validate.query_heads(num_query_heads, shape.num_kv_heads)
    validate.schedule_tokens(cache, query_start_loc, num_tokens)
    if num_tokens is not None:
        validate_values.start_locations(cache, query_start_loc, num_tokens)
    variant = validate.variant(cache.head_dim, None, is_causal, local_window_size, None, False)
    is_packed = query_start_loc is not None
    made_for = MadeFor.of(shape, num_query_heads, is_packed, variant, num_tokens)
    with jax.named_scope("paged_kv.schedule"):
        schedule = schedules.make(made_for, cache.block_table, cache.seq_lengths, query_start_loc)
        return dispatch.with_work(implementation, shape, num_query_heads, schedule)


def merge_attention_states(
    out_a: Float[Array, "*rows head_dim"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows head_dim"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Both outputs must be without sinks: apply those once, last.  A side that saw no key (lse -inf)
    counts for nothing; when neither saw one, the result is 0 and -inf.  The order of merges does
    not matter.  Computed in float32.

    Args:
      out_a, out_b: (*rows, head_dim), an attention's output over each set.
      lse_a, lse_b: (*rows,), float32, the natural log of the sum of exponentials over each.

    Returns:
      out (*rows, head_dim) in the dtype of `out_a`, and lse (*rows,), float32.

    Raises:
      ValueError: the outputs differ in shape, or an lse is not the rows of its output.

    Source: the state merge of FlashInfer (Ye et al., 2025); the algebra is FlashAttention's (Dao et
    al., 2022).
    """
    validate.partial_states(out_a, lse_a, out_b, lse_b)
    return merge.merge_states(out_a, lse_a, out_b, lse_b)


def apply_sinks(
    out: Float[Array, "num_tokens num_query_heads head_dim"],
    lse: Float[Array, "num_tokens num_query_heads"],
    sinks: Float[Array, "num_query_heads"],
) -> Float[Array, "num_tokens num_query_heads head_dim"]:
    """Adds one term per query head to the denominator: `out * sigmoid(lse - sink)`.

    `sinks` are learned logits in natural units, as gpt-oss has them.  `lse` stays without them, so
    that partial results can be merged first; apply sinks once, last.  Computed in float32.

    Args:
      out: (num_tokens, num_query_heads, head_dim), an attention's output without sinks.
      lse: (num_tokens, num_query_heads), its natural log of the sum of exponentials.
      sinks: (num_query_heads,), one logit per query head.

    Returns:
      (num_tokens, num_query_heads, head_dim) in the dtype of `out`.

    Raises:
      ValueError: `lse` is not the rows of `out`, or `sinks` is not (num_query_heads,).

    Source: sinks as in gpt-oss, after StreamingLLM (Xiao et al., 2024) and the softmax with one
    more term in its denominator (Miller, 2023).
    """
    validate.rows_of("lse", lse, out)
    validate.per_head("sinks", sinks, out.shape[1])
    return merge.apply_sinks(out, lse, sinks)


class _Options(NamedTuple):
    """The keywords of `paged_attention` that an append does not share."""

    scale: float | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    sinks: Array | None = None
    alibi_slopes: Array | None = None
    schedule: Schedule | None = None
    return_residual: bool = False

    def result(self, out: Array, lse: Array) -> Any:
        if self.sinks is not None:
            out = merge.apply_sinks(out, lse, self.sinks)
        return (out, lse) if self.return_residual else out


def _append_call(
    cache: PagedKVCache,
    keys: Array,
    values: Array,
    query_start_loc: Array | None,
    layer: Any,
    implementation: str | None,
    interpret: Any,
) -> tuple[AppendProblem, dispatch.Choice, dispatch.Targets]:
    """What an append asks for, checked."""
    problem = validate.append_problem(cache, keys, values, query_start_loc)
    layer = validate.layer_index(cache, layer)
    validate_values.start_locations(cache, query_start_loc, problem.num_tokens)
    validate_values.new_slots(cache, problem.cache, query_start_loc)
    starts = layout.start_locations(query_start_loc, problem.cache.batch)
    targets = dispatch.Targets(cache.block_table, cache.seq_lengths, starts, layer)
    return problem, _choice("append", problem, implementation, interpret, keys), targets


def _attention_call(
    query: Array,
    cache: PagedKVCache,
    options: _Options,
    query_start_loc: Array | None,
    layer: Any,
    implementation: str | None,
    interpret: Any,
) -> tuple[Problem, dispatch.Choice, dispatch.Operands]:
    """What an attention asks for, checked."""
    has_alibi = options.alibi_slopes is not None
    flags = (options.scale, options.is_causal, options.local_window_size, options.logits_soft_cap)
    variant = validate.variant(cache.head_dim, *flags, has_alibi)
    problem = validate.attention_problem(cache, query, query_start_loc, variant)
    layer = validate.layer_index(cache, layer)
    validate.per_head("sinks", options.sinks, problem.num_query_heads)
    validate.per_head("alibi_slopes", options.alibi_slopes, problem.num_query_heads)
    validate_values.start_locations(cache, query_start_loc, problem.num_tokens)
    validate_values.used_entries(cache, problem.cache, query_start_loc, variant)
    choice = _choice("attention", problem, implementation, interpret, query)
    schedule = _schedule_of(problem, cache, query_start_loc, options.schedule)
    operands = dispatch.Operands(cache.block_table, schedule, cache.seq_lengths, layer)
    return problem, choice, operands


def _choice(
    op: str,
    problem: Problem | AppendProblem,
    implementation: str | None,
    interpret: Any,
    array: Array,
) -> dispatch.Choice:
    """What the caller asked for, checked."""
    name = validate.implementation_name(implementation, interpret)
    choice = dispatch.Choice(name, interpret)
    dispatch.check(op, problem, choice, array)
    return choice


def _schedule_of(
    problem: Problem,
    cache: PagedKVCache,
    query_start_loc: Array | None,
    schedule: Schedule | None,
) -> Schedule:
    """The caller's schedule, checked against this call, or one made for it."""
    shape, heads = problem.cache, problem.num_query_heads
    made_for = MadeFor.of(shape, heads, problem.is_packed, problem.variant, problem.num_tokens)
    if schedule is None:
        return schedules.make(made_for, cache.block_table, cache.seq_lengths, query_start_loc)
    validate.schedule_matches(schedule, made_for)
    validate_values.schedule_is_current(schedule, cache, query_start_loc, shape.batch)
    return schedule


_append = jax.jit(dispatch.append, static_argnums=(0, 1))
_attend = jax.jit(dispatch.attend, static_argnums=(0, 1))
_append_and_attend = jax.jit(fused.append_and_attend, static_argnums=(0, 1))
