"""Random ragged attention problems over every variant, the same ones for every implementation.

`random_problem(seed, **constraints)` draws a problem.  What a compiled program depends on (shapes,
dtypes, static options) is a `Form`, and only `NUM_FORMS` forms occur: seeds that are equal modulo
`NUM_FORMS` share one, so that a jitted function compiles once for all of them.  Lengths, values,
the split of tokens over sequences and the order of blocks differ with every seed.

A constraint fixes an axis of `AXES`, or narrows it when it is a tuple in a list:

    random_problem(7, head_dim=128, pool_dtype="bfloat16", block_size=[16, 32])

Each value of each axis occurs in about the same number of forms, for any constraints.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import poison

import paged_kv

NUM_FORMS = 30

AXES = {
    # decode has query_start_loc=None; the others are packed, and differ in the tokens per sequence
    "kind": ["decode", "packed_decode", "speculative", "chunked_prefill", "whole_prefill", "mixed"],
    "group": [1, 2, 3, 4, 5, 7, 8],
    "num_kv_heads": [1, 2, 3],
    "head_dim": [64, 80, 96, 128, 192, 256],
    "block_size": [16, 32, 64, 128, 8, 5],
    "query_dtype": ["float32", "bfloat16", "float32", "float16"],
    "pool_dtype": ["float32", "float32", "bfloat16", "float16"],
    "is_causal": [True, True, False],
    "local_window_size": [None, (15, 0), None, 3, (4, 2), 0, (40, 7), (0, 9)],
    "logits_soft_cap": [None, 2.5, None, 30.0],
    "scale": [None, None, 0.25],
    "has_sinks": [False, True],
    "has_slopes": [False, True],
    "num_layers": [None, None, 3],
    "batch": [4, 7, 1],
    "num_tokens": [32],
    "max_length": [150],
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What a compiled program depends on; `num_tokens` counts padding, and is `batch` at decode."""

    kind: str
    group: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    query_dtype: str
    pool_dtype: str
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    logits_soft_cap: float | None
    scale: float | None
    has_sinks: bool
    has_slopes: bool
    num_layers: int | None
    batch: int
    num_tokens: int
    max_length: int

    @property
    def num_query_heads(self):
        return self.group * self.num_kv_heads

    @property
    def max_blocks_per_seq(self):
        return -(-self.max_length // self.block_size) + 1

    @property
    def static_options(self):
        """The arguments of `paged_attention` that are no arrays."""
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "local_window_size": self.local_window_size,
            "logits_soft_cap": self.logits_soft_cap,
        }


@dataclasses.dataclass(frozen=True)
class Problem:
    """A query over a poisoned cache.  `name` identifies it in test output."""

    name: str
    form: Form
    query: jax.Array
    poisoned: poison.PoisonedCache
    query_start_loc: jax.Array | None
    layer: jax.Array | None
    sinks: jax.Array | None
    alibi_slopes: jax.Array | None

    @property
    def cache(self):
        return self.poisoned.cache

    @property
    def operands(self):
        """The arguments of `paged_attention` that are arrays."""
        return {
            "query_start_loc": self.query_start_loc,
            "layer": self.layer,
            "sinks": self.sinks,
            "alibi_slopes": self.alibi_slopes,
        }

    @property
    def lengths(self):
        return np.asarray(self.cache.seq_lengths)

    def expected(self):
        """The oracle's (out, lse), float64."""
        keys, values = self.poisoned.dense(None if self.layer is None else int(self.layer))
        return oracle.attention(
            self.query,
            keys,
            values,
            self.query_start_loc,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            **self.form.static_options,
        )


def attend(problem, **options):
    """`paged_attention` of the problem under jit, compiled once per form: (out, lse)."""
    options = {**problem.form.static_options, **options}
    return _attend(problem.query, problem.cache, problem.operands, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=3)
def _attend(query, cache, operands, options):
    return paged_kv.paged_attention(query, cache, **operands, **dict(options), return_residual=True)


def random_problem(seed, **constraints):
    """The problem of `seed`; a constraint is a value of an axis of `AXES`, or a list of values."""
    number = seed % NUM_FORMS
    form = random_form(number, **constraints)
    rng = np.random.default_rng([seed, 1])
    lengths, query_lengths = random_lengths(rng, form)
    first_kept = np.zeros_like(lengths)
    if rng.random() < 0.5:
        first_kept = first_keys_seen(lengths, query_lengths, form.local_window_size)
    poisoned = poison.poisoned_cache(
        rng,
        lengths,
        block_size=form.block_size,
        num_kv_heads=form.num_kv_heads,
        head_dim=form.head_dim,
        dtype=form.pool_dtype,
        num_layers=form.num_layers,
        num_blocks=form.batch * (form.max_blocks_per_seq - 1) + 3,
        max_blocks_per_seq=form.max_blocks_per_seq,
        first_kept=first_kept,
        poison=rng.choice([np.nan, np.inf, -np.inf]),
    )
    starts = np.concatenate([[0], np.cumsum(query_lengths)]).astype(np.int32)
    heads = form.num_query_heads
    query = rng.standard_normal((form.num_tokens, heads, form.head_dim))
    return Problem(
        name=f"{seed}-{form.kind}-{form.group}x{form.num_kv_heads}x{form.head_dim}",
        form=form,
        query=jnp.asarray(query, form.query_dtype),
        poisoned=poisoned,
        query_start_loc=None if form.kind == "decode" else jnp.asarray(starts),
        layer=None if form.num_layers is None else jnp.int32(rng.integers(form.num_layers)),
        sinks=jnp.asarray(rng.standard_normal(heads), jnp.float32) if form.has_sinks else None,
        alibi_slopes=jnp.asarray(rng.random(heads), jnp.float32) if form.has_slopes else None,
    )


def random_form(number, **constraints):
    """Form `number` of `NUM_FORMS`: along every axis the forms go through all values in turn, in a
    shuffled order of their own, so that any two axes mix."""
    chosen = {}
    for index, axis in enumerate(AXES):
        values = constraints.pop(axis, AXES[axis])
        values = values if isinstance(values, list) else [values]
        order = np.random.default_rng([index, 2]).permutation(NUM_FORMS)
        chosen[axis] = values[order[number] % len(values)]
    if constraints:
        raise ValueError(f"{sorted(constraints)} are no axes; there are {list(AXES)}")
    if chosen["kind"] in ("decode", "packed_decode"):
        chosen["num_tokens"] = chosen["batch"]
    return Form(**chosen)


def plain_form(dtype, **changes):
    """Causal decode in one dtype, no variant: what a test about something else starts from."""
    plain = {
        "kind": "decode", "query_dtype": dtype, "pool_dtype": dtype, "scale": None,
        "is_causal": True, "local_window_size": None, "logits_soft_cap": None, "has_sinks": False,
        "has_slopes": False,
    }  # fmt: skip
    return random_form(0, **{**plain, **changes})


def random_lengths(rng, form):
    """Tokens in the cache, and of those in the query, per sequence."""
    edges = [0, 1, form.block_size - 1, form.block_size, form.block_size + 1]
    lengths = np.where(
        rng.random(form.batch) < 0.5,
        rng.choice(edges, form.batch),
        rng.integers(1, form.max_length + 1, form.batch),
    )
    lengths = np.minimum(lengths, form.max_length).astype(np.int32)
    wanted = {
        "decode": lambda: np.ones_like(lengths),
        "packed_decode": lambda: rng.integers(0, 2, form.batch),
        "speculative": lambda: rng.integers(1, 5, form.batch),
        "chunked_prefill": lambda: rng.integers(1, form.num_tokens + 1, form.batch),
        "whole_prefill": lambda: lengths,
        "mixed": lambda: rng.choice([0, 1, 1, form.num_tokens // 2], form.batch),
    }[form.kind]()
    if form.kind == "decode":
        return lengths, wanted
    query_lengths = np.minimum(wanted, lengths)
    if form.kind == "whole_prefill" and query_lengths.sum() > form.num_tokens:
        # what a whole prompt may take is what is left of the token budget
        room = np.maximum(form.num_tokens - (np.cumsum(query_lengths) - query_lengths), 0)
        lengths = query_lengths = np.minimum(query_lengths, room).astype(np.int32)
    before = np.cumsum(query_lengths) - query_lengths
    return lengths, np.minimum(query_lengths, np.maximum(form.num_tokens - before, 0))


def first_keys_seen(lengths, query_lengths, local_window_size):
    """Per sequence, the first key that any of its queries can see."""
    if local_window_size is None:
        return np.zeros_like(lengths)
    left = local_window_size if isinstance(local_window_size, int) else local_window_size[0]
    return np.maximum(lengths - query_lengths - left, 0)
