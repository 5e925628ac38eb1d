"""The TPU append kernel, in the interpreter, against a loop over tokens, bit by bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv

PROBLEMS_PER_FORM = 6


@dataclasses.dataclass(frozen=True)
class Form:
    """What a compiled program depends on; `tokens` counts padding, None is one per sequence."""

    tokens: int | None
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_layers: int | None = None
    batch: int = 5
    max_blocks_per_seq: int = 4
    num_blocks: int = 22


FORMS = [
    Form(None, 16, 1, 64, "bfloat16"),
    Form(None, 32, 2, 128, "float32", num_layers=2),
    Form(None, 64, 8, 64, "bfloat16", num_layers=3),
    Form(None, 16, 3, 128, "bfloat16"),
    Form(7, 16, 3, 80, "float32"),
    Form(40, 32, 1, 192, "bfloat16", num_layers=2),
    Form(64, 16, 2, 96, "bfloat16"),
    Form(150, 32, 5, 128, "bfloat16", num_layers=2),
    Form(300, 128, 1, 256, "float32", batch=3, max_blocks_per_seq=2),
    Form(90, 64, 4, 128, "bfloat16", batch=1),
]
IDS = lambda form: f"{form.tokens}x{form.num_kv_heads}x{form.head_dim}-{form.block_size}"


def random_bits(rng, shape, dtype):
    """Every bit pattern, NaN of every payload among them."""
    bits = rng.integers(0, 1 << 8, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype)[..., 0]


def random_step(form, seed):
    """(cache, keys, values, query_start_loc): some slots are missing, some rows are not used."""
    rng = np.random.default_rng([seed, 3])
    layers = () if form.num_layers is None else (form.num_layers,)
    pool = (*layers, form.num_blocks, form.block_size, form.num_kv_heads, form.head_dim)
    table = rng.permutation(form.num_blocks)[: form.batch * form.max_blocks_per_seq]
    table = table.reshape(form.batch, form.max_blocks_per_seq).astype(np.int32)
    missing = rng.random(table.shape) < 0.15
    table[missing] = rng.choice([-1, -7, form.num_blocks, 2**31 - 1], missing.sum())
    capacity = form.max_blocks_per_seq * form.block_size
    starts = None
    if form.tokens is None:
        lengths = rng.choice([0, 1, form.block_size, capacity, capacity + 1], form.batch)
        lengths = np.where(rng.random(form.batch) < 0.5, rng.integers(1, capacity), lengths)
    else:
        cuts = np.sort(rng.integers(0, form.tokens + 1, form.batch))
        starts = np.concatenate([[0], cuts]).astype(np.int32)
        before = rng.choice([0, 0, 1, form.block_size - 1, 2 * form.block_size - 3], form.batch)
        # one row may have more new tokens than tokens, and one more than the table holds
        lengths = np.diff(starts) + before - (rng.random(form.batch) < 0.2)
    cache = paged_kv.PagedKVCache(
        *(jnp.asarray(random_bits(rng, pool, form.dtype)) for _ in range(2)),
        jnp.asarray(table),
        jnp.asarray(lengths, jnp.int32),
    )
    tokens = form.batch if form.tokens is None else form.tokens
    new = (tokens, form.num_kv_heads, form.head_dim)
    keys, values = (jnp.asarray(random_bits(rng, new, form.dtype)) for _ in range(2))
    return cache, keys, values, None if starts is None else jnp.asarray(starts)


def appended(cache, keys, values, starts, layer):
    """The pools after the step, token by token."""
    pools = [np.array(cache.key_pool), np.array(cache.value_pool)]
    table, lengths = np.asarray(cache.block_table), np.asarray(cache.seq_lengths)
    starts = np.arange(len(lengths) + 1) if starts is None else np.asarray(starts)
    for b, length in enumerate(lengths):
        for token in range(starts[b], starts[b + 1]):
            index, offset = divmod(length - starts[b + 1] + token, cache.block_size)
            if not 0 <= index < table.shape[1] or not 0 <= table[b, index] < cache.num_blocks:
                continue
            for pool, new in zip(pools, (keys, values), strict=True):
                slots = pool if layer is None else pool[layer]
                slots[table[b, index], offset] = new[token]
    return pools


@functools.partial(jax.jit, static_argnums=0)
def append(interpret, cache, keys, values, starts, layer):
    return paged_kv.append_tokens(
        cache,
        keys,
        values,
        query_start_loc=starts,
        layer=layer,
        implementation="mosaic_tpu",
        interpret=interpret,
    )


def check(form, interpret, seed):
    step = random_step(form, seed)
    layer = None if form.num_layers is None else seed % form.num_layers
    after = append(interpret, *step, None if layer is None else jnp.int32(layer))
    pools = jax.block_until_ready((after.key_pool, after.value_pool))
    assert_same_bits(pools, tuple(appended(*step, layer)))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_new_tokens_are_written_and_nothing_else(form):
    """Missing slots, negative positions and padding are dropped; both modes of the interpreter."""
    for seed in range(PROBLEMS_PER_FORM):
        with no_races():
            check(form, INTERPRETERS[MODES[FORMS.index(form) % 2]], seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_many_steps_in_both_modes(form, mode):
    for seed in range(10, 30):
        with no_races():
            check(form, INTERPRETERS[mode], seed)


@pytest.mark.parametrize("form", FORMS[2::5], ids=IDS)
def test_the_fast_interpreter_agrees(form):
    check(form, True, 50)
