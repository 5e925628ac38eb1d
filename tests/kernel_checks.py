"""What the tests of every backend's kernels share: forms to run, appends to check, and verdicts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import problems
from tolerances import of_output, tolerance

import paged_kv


def covering_forms(**constraints):
    """Numbers of a few forms of `problems` in which every value of every axis occurs."""
    forms = {
        number: set(vars(problems.random_form(number, **constraints)).items())
        for number in range(problems.NUM_FORMS)
    }
    missing, chosen = set().union(*forms.values()), []
    while missing:
        best = max(forms, key=lambda number: len(forms[number] & missing))
        chosen.append(best)
        missing -= forms[best]
    return chosen


def assert_matches_oracle(problem, actual):
    """A kernel's (out, lse) is right, to the precision of the dtypes its products are made in."""
    (out, lse), (expected_out, expected_lse) = actual, problem.expected()
    form = problem.form
    assert (out.dtype, lse.dtype) == (problem.query.dtype, jnp.float32)
    rounded = {form.query_dtype, form.pool_dtype} - {"float32"} or {"float32"}
    coarsest = "bfloat16" if "bfloat16" in rounded else rounded.pop()
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        expected_out,
        **of_output("kernel", coarsest, 1 + form.has_sinks),
        err_msg=problem.name,
    )
    is_exact = form.pool_dtype == "float32" or form.pool_dtype == form.query_dtype
    row = "kernel float32" if is_exact else "kernel lse"
    np.testing.assert_allclose(lse, expected_lse, **tolerance(row), err_msg=problem.name)


@dataclasses.dataclass(frozen=True)
class AppendForm:
    """What a compiled append depends on; `tokens` counts padding, None is one per sequence."""

    tokens: int | None
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_layers: int | None = None
    batch: int = 5
    max_blocks_per_seq: int = 4
    num_blocks: int = 22

    def __str__(self):
        return f"{self.tokens}x{self.num_kv_heads}x{self.head_dim}-{self.block_size}-{self.dtype}"


def random_append(form, seed):
    """(cache, keys, values, query_start_loc) of random bits; some slots are missing, and some
    sequences have more new tokens than tokens, or than their row of the table holds."""
    rng = np.random.default_rng([seed, 3])
    layers = () if form.num_layers is None else (form.num_layers,)
    pool = (*layers, form.num_blocks, form.block_size, form.num_kv_heads, form.head_dim)
    table = rng.permutation(form.num_blocks)[: form.batch * form.max_blocks_per_seq]
    table = table.reshape(form.batch, form.max_blocks_per_seq).astype(np.int32)
    is_missing = rng.random(table.shape) < 0.15
    table[is_missing] = rng.choice([-1, -7, form.num_blocks, 2**31 - 1], is_missing.sum())
    capacity = form.max_blocks_per_seq * form.block_size
    if form.tokens is None:
        starts = None
        lengths = rng.choice([0, 1, form.block_size, capacity, capacity + 1], form.batch)
        lengths = np.where(rng.random(form.batch) < 0.5, rng.integers(1, capacity), lengths)
    else:
        cuts = np.sort(rng.integers(0, form.tokens + 1, form.batch))
        starts = np.concatenate([[0], cuts]).astype(np.int32)
        before = rng.choice([0, 0, 1, form.block_size - 1, 2 * form.block_size - 3], form.batch)
        lengths = np.diff(starts) + before - (rng.random(form.batch) < 0.2)
    cache = paged_kv.PagedKVCache(
        *(_random_bits(rng, pool, form.dtype) for _ in range(2)),
        jnp.asarray(table),
        jnp.asarray(lengths, jnp.int32),
    )
    tokens = form.batch if form.tokens is None else form.tokens
    new = (tokens, form.num_kv_heads, form.head_dim)
    keys, values = (_random_bits(rng, new, form.dtype) for _ in range(2))
    return cache, keys, values, None if starts is None else jnp.asarray(starts)


def _random_bits(rng, shape, dtype):
    """Every bit pattern, NaN of every payload among them."""
    bits = rng.integers(0, 1 << 8, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return jnp.asarray(bits.view(dtype)[..., 0])


def appended(cache, keys, values, query_start_loc, layer):
    """Both pools after the step, by the oracle."""
    slot_of_row = oracle.slots(
        np.asarray(cache.block_table),
        cache.seq_lengths,
        cache.block_size,
        cache.num_blocks,
        query_start_loc,
        len(keys),
    )
    pools = []
    for pool, rows in ((cache.key_pool, keys), (cache.value_pool, values)):
        pool = np.array(pool)
        at = ... if layer is None else layer
        pool[at] = oracle.append(pool[at], rows, slot_of_row)
        pools.append(pool)
    return tuple(pools)
