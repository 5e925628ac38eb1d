"""The decoder on a paged cache gives the logits of its definition, for any batch and any cuts."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_llama import DenseLlama
from tolerances import tolerance

import paged_kv
from tools import llama, programs

BLOCK_SIZE = 8
MAX_BLOCKS = 6


def empty_cache(config, batch_size, num_blocks=None):
    """A cache whose table is full, in an order of its own."""
    num_blocks = num_blocks or batch_size * MAX_BLOCKS
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        batch_size=batch_size,
        max_blocks_per_seq=MAX_BLOCKS,
        dtype=jnp.float32,
        num_layers=config.num_layers,
    )
    cache = dataclasses.replace(
        cache,
        key_pool=jnp.full_like(cache.key_pool, jnp.nan),
        value_pool=jnp.full_like(cache.value_pool, jnp.nan),
    )
    ids = np.random.default_rng(0).permutation(num_blocks)[: batch_size * MAX_BLOCKS]
    table = jnp.asarray(ids.reshape(batch_size, MAX_BLOCKS), jnp.int32)
    return paged_kv.set_block_table(cache, table)


def packed(sequences, num_tokens):
    """Tokens packed and padded, their counts and query_start_loc."""
    counts = np.array([len(tokens) for tokens in sequences], np.int32)
    tokens = np.concatenate(sequences)
    tokens = np.pad(tokens, (0, num_tokens - len(tokens))).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(counts), jnp.asarray(starts)


@pytest.mark.usefixtures("quick_compiles_here")
def test_ragged_prompts_in_chunks_then_decode_match_the_definition(tiny):
    rng = np.random.default_rng(1)
    vocab = tiny.weights.embedding.shape[0]
    lengths = [BLOCK_SIZE - 1, 1, BLOCK_SIZE + 1, 3 * BLOCK_SIZE]
    texts = [rng.integers(0, vocab, length + 3) for length in lengths]
    expected = [DenseLlama(tiny.config, tiny.weights, np.float64)(text) for text in texts]
    forward = jax.jit(functools.partial(llama.forward, tiny.config))
    cache = empty_cache(tiny.config, len(texts))

    halves = [
        (0, length // 2, length) for length in lengths
    ]  # the second sequence's first is empty
    for step in range(2):
        cuts = [text[half[step] : half[step + 1]] for text, half in zip(texts, halves, strict=True)]
        tokens, counts, starts = packed(cuts, 32)
        logits, cache = forward(tiny.weights, cache, tokens, counts, starts)
        for row, half in enumerate(halves):
            if counts[row]:
                np.testing.assert_allclose(
                    logits[row], expected[row][half[step + 1] - 1], **tolerance("model float32")
                )
    for step in range(3):
        positions = [length + step for length in lengths]
        tokens = [text[p] for text, p in zip(texts, positions, strict=True)]
        counts = jnp.ones(len(texts), jnp.int32)
        logits, cache = forward(tiny.weights, cache, jnp.asarray(tokens, jnp.int32), counts)
        truth = [dense[p] for dense, p in zip(expected, positions, strict=True)]
        np.testing.assert_allclose(logits, truth, **tolerance("model float32"))
    np.testing.assert_array_equal(cache.seq_lengths, np.array(lengths) + 3)


@pytest.mark.usefixtures("quick_compiles_here")
def test_an_inactive_row_leaves_the_others_alone(tiny):
    tokens = jnp.array([5, 9, 7], jnp.int32)
    counts = jnp.array([1, 0, 1], jnp.int32)
    forward = jax.jit(functools.partial(llama.forward, tiny.config))
    logits, cache = forward(tiny.weights, empty_cache(tiny.config, 3), tokens, counts)
    dense = DenseLlama(tiny.config, tiny.weights, np.float64)
    for row in (0, 2):
        dense.reset()
        expected = dense([int(tokens[row])])[0]
        np.testing.assert_allclose(logits[row], expected, **tolerance("model float32"))
    np.testing.assert_array_equal(cache.seq_lengths, [1, 0, 1])
    written = ~np.isnan(np.asarray(cache.key_pool)).all(axis=(-1, -2))  # (layers, blocks, slots)
    assert written.sum() == 2 * tiny.config.num_layers


def test_weights_are_arguments_and_no_constants(tiny):
    cache = empty_cache(tiny.config, 2)
    step = functools.partial(llama.forward, tiny.config)
    tokens = jnp.zeros(2, jnp.int32)
    jaxpr = jax.make_jaxpr(step)(tiny.weights, cache, tokens, tokens)
    assert sum(np.size(constant) for constant in jaxpr.consts) <= 64


@pytest.mark.parametrize("is_decode", [True, False])
def test_a_step_of_the_program_updates_the_pools_in_place(tiny, is_decode):
    cache = empty_cache(tiny.config, 2, num_blocks=2048)
    tokens, counts, starts = packed([[1], [2]], 2)
    arguments = (tiny.weights, cache, tokens, counts, None if is_decode else starts, None)
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    program = programs.compile_step(tiny.config, None, None, structure, shapes)
    pool = cache.key_pool
    hlo.assert_updated_in_place(program, pool.size // pool.shape[0])


def test_rotation_depends_on_distance_alone():
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 64)), jnp.float32) for _ in range(2))
    frequencies = jnp.asarray(10000.0 ** -(np.arange(32) / 32), jnp.float32)

    def score(query_position, key_position):
        turned = [
            llama.rotate(x, position * frequencies[None])
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert score(9.0, 4.0) == pytest.approx(score(25.0, 20.0), abs=1e-4)
    assert abs(score(9.0, 4.0) - score(9.0, 5.0)) > 1e-2


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 64)), jnp.float32)
    angles = jnp.stack([jnp.zeros(32), jnp.linspace(0.1, 3.0, 32)])
    turned = llama.rotate(x, angles)
    np.testing.assert_array_equal(turned[0], x[0])
    pairs = np.linalg.norm(np.asarray(x).reshape(2, 3, 32, 2), axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(turned).reshape(2, 3, 32, 2), axis=-1), pairs, rtol=1e-5
    )


def drawn(logits, lengths, *, seed, temperature=1.0):
    draw = llama.Draw(np.uint32(seed), np.float32(temperature))
    return np.asarray(jax.jit(llama.sample)(logits, lengths, draw))


def test_without_a_draw_the_likeliest_token_is_taken():
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((5, 40)), jnp.float32)
    tokens = llama.sample(logits, jnp.zeros(5, jnp.int32), None)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    assert tokens.dtype == jnp.int32


def test_draws_follow_the_softmax_of_logits_over_temperature():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7], jnp.float32))
    rows = 4000
    rows_of_logits = jnp.broadcast_to(logits, (rows, 3))
    tokens = drawn(rows_of_logits, jnp.zeros(rows, jnp.int32), seed=0, temperature=2.0)
    expected = np.sqrt([0.1, 0.2, 0.7]) / np.sqrt([0.1, 0.2, 0.7]).sum()
    # five standard deviations of a frequency over so many draws
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / rows, expected, atol=0.04)


def test_a_draw_depends_on_seed_sequence_and_length_but_not_on_the_batch():
    logits = jnp.zeros((4, 1000), jnp.float32)
    lengths = jnp.array([3, 3, 4, 5], jnp.int32)
    tokens = drawn(logits, lengths, seed=7)
    np.testing.assert_array_equal(drawn(logits[:2], lengths[:2], seed=7), tokens[:2])
    assert len(set(tokens.tolist())) == 4
    assert not np.any(drawn(logits, lengths + 1, seed=7) == tokens)
    assert not np.any(drawn(logits, lengths, seed=8) == tokens)
