"""The TPU append kernel, in the interpreter, against the oracle, bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from kernel_checks import AppendForm, appended, random_append
from tpu_interpreter import INTERPRETERS, MODES, copied_bytes, no_races

import paged_kv

PROBLEMS_PER_FORM = 6
FORMS = [
    AppendForm(None, 16, 1, 64, "bfloat16"),
    AppendForm(None, 32, 2, 128, "float32", num_layers=2),
    AppendForm(None, 64, 8, 64, "bfloat16", num_layers=3),
    AppendForm(None, 16, 3, 128, "bfloat16"),
    AppendForm(7, 16, 3, 80, "float32"),
    AppendForm(40, 32, 1, 192, "bfloat16", num_layers=2),
    AppendForm(64, 16, 2, 96, "bfloat16"),
    AppendForm(150, 32, 5, 128, "bfloat16", num_layers=2),
    AppendForm(300, 128, 1, 256, "float32", batch=3, max_blocks_per_seq=2),
    AppendForm(90, 64, 4, 128, "bfloat16", batch=1),
    AppendForm(150, 32, 8, 128, "bfloat16", num_layers=2),
    AppendForm(200, 48, 1, 256, "float32"),
]


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
    step = random_append(form, seed)
    layer = None if form.num_layers is None else seed % form.num_layers
    after = append(interpret, *step, None if layer is None else jnp.int32(layer))
    pools = jax.block_until_ready((after.key_pool, after.value_pool))
    assert_same_bits(pools, appended(*step, layer))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_new_tokens_are_written_and_nothing_else(form):
    """Missing slots, negative positions and padding are dropped; both modes of the interpreter."""
    for seed in range(PROBLEMS_PER_FORM):
        with no_races():
            check(form, INTERPRETERS[MODES[FORMS.index(form) % 2]], seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_many_steps_in_both_modes(form, mode):
    for seed in range(10, 30):
        with no_races():
            check(form, INTERPRETERS[mode], seed)


@pytest.mark.parametrize("form", FORMS[1:9:7], ids=str)
def test_the_fast_interpreter_agrees(form):
    """In float32: around bfloat16 NaN, XLA's CPU backend of jax 0.10 does not keep every bit."""
    check(form, True, 50)


@pytest.mark.parametrize("before", [0, 5])
def test_each_byte_of_a_long_append_moves_once(before):
    """8192 tokens of four sequences, and no byte beside them; whole blocks in one copy each."""
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=72, block_size=128, num_kv_heads=2, head_dim=128, batch_size=4,
        max_blocks_per_seq=17, dtype=jnp.bfloat16,
    )  # fmt: skip
    cache = paged_kv.set_block_table(cache, np.arange(68, dtype=np.int32).reshape(4, 17))
    cache = paged_kv.advance(cache, 2048 + before)
    keys, values = jax.random.normal(jax.random.key(0), (2, 8192, 2, 128), jnp.bfloat16)
    starts = jnp.arange(5) * 2048
    with copied_bytes() as copies, no_races():
        after = append(INTERPRETERS["on_wait"], cache, keys, values, starts, None)
        jax.block_until_ready(after)
    assert sum(copies) == keys.nbytes + values.nbytes
    assert len(copies) == 2 * 4 * (16 if before == 0 else 17)  # one per block
    expected = paged_kv.append_tokens(
        cache, keys, values, query_start_loc=starts, implementation="xla"
    )
    assert_same_bits((after.key_pool, after.value_pool), (expected.key_pool, expected.value_pool))


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_rows_that_append_to_one_block_touch_no_other_slot(num_kv_heads):
    """Against the rule that a row appends to blocks of its own: some of the tokens may be lost."""
    shape = {"num_kv_heads": num_kv_heads, "head_dim": 128, "dtype": jnp.bfloat16}
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=4, block_size=16, batch_size=2, max_blocks_per_seq=2, **shape
    )
    old = jax.random.normal(jax.random.key(1), (2, *cache.key_pool.shape), jnp.bfloat16)
    table, lengths = jnp.array([[0, 2], [1, 2]]), jnp.array([19, 26])  # slots 2 and 9 of block 2
    cache = paged_kv.PagedKVCache(*old, table, lengths)
    new = jax.random.normal(jax.random.key(2), (2, 2, num_kv_heads, 128), jnp.bfloat16)
    after = append(INTERPRETERS["eager"], cache, *new, None, None)
    for before, tokens, pool in zip(old, new, (after.key_pool, after.value_pool), strict=True):
        for token, slot in enumerate((2, 9)):
            written = before.at[2, slot].set(tokens[token])
            is_new = np.array_equal(pool[2, slot], written[2, slot])
            assert is_new or (num_kv_heads == 1 and np.array_equal(pool[2, slot], before[2, slot]))
            before = written if is_new else before
        assert_same_bits((pool,), (before,))
