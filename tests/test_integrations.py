"""Each framework's model writes the same tokens through its own dense cache and a paged one.

The models are those of tools/examples, with random weights; prompts are of different lengths, so
that rows are padded and blocks end in the middle.
"""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from bitwise import assert_same_bits
from ragged import cache_of, int32, normal
from tolerances import tolerance

import paged_kv
from tools.examples import batch

paged_equinox = pytest.importorskip("paged_kv.integrations.equinox", exc_type=ImportError)
paged_nnx = pytest.importorskip("paged_kv.integrations.nnx", exc_type=ImportError)
NUM_TOKENS = 10
EXAMPLES = ["nnx_gpt", "nnx_gemma", "linen_gpt", "equinox_llama"]


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_writes_what_its_dense_cache_writes(name, capsys):
    example = importlib.import_module(f"tools.examples.{name}")
    example.main(NUM_TOKENS)
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict.endswith("writes the same: True")
    written = [line.split(" -> ")[1] for line in lines]
    assert len(set(written)) == len(written) == 4
    assert all(len(tokens.split()) == NUM_TOKENS for tokens in written)


def test_prompts_of_the_examples_are_ragged_and_padded():
    prompts = batch.random_prompts(9, [3, 1])
    tokens, counts = batch.padded(prompts)
    assert counts.tolist() == [3, 1]
    assert tokens.tolist() == [prompts[0], [*prompts[1], 0, 0]]


def test_vmap_over_sequences_is_one_call_for_the_batch():
    """To the bit what the batched op writes; a row alone gives the same; pools stay one."""
    cache = paged_kv.advance(cache_of(room=3).cache, int32([0, 1, 3, 0, 2, 3]))
    counts = int32([0, 1, 3, 0, 2, 3])
    query, keys, values = (normal(s, 6, 3, h, 8) for s, h in ((1, 6), (2, 2), (3, 2)))
    expected = jax.jit(paged_kv.append_and_attend_rows)(
        query, keys, values, cache, query_seq_lengths=counts
    )

    def of_one(query, keys, values, count, cache):
        return paged_equinox.attend(query, keys, values, cache, num_new_tokens=count)

    axes = paged_equinox.sequence_axes(cache)
    mapped = jax.jit(jax.vmap(of_one, in_axes=(0, 0, 0, 0, axes), out_axes=(0, axes)))
    assert_same_bits(mapped(query, keys, values, counts, cache), expected)
    table, lengths = cache.block_table[2], cache.seq_lengths[2]
    alone = dataclasses.replace(cache, block_table=table, seq_lengths=lengths)
    out, after = jax.jit(of_one)(query[2], keys[2], values[2], counts[2], alone)
    np.testing.assert_allclose(out, expected[0][2], **tolerance("reference float32"))
    written = ~np.isnan(after.key_pool)
    assert_same_bits(after.key_pool[written], expected[1].key_pool[written])


def test_an_nnx_step_that_fails_can_be_begun_again():
    paged = paged_nnx.PagedCache(cache_of(lengths=[3], room=1).cache)
    with pytest.raises(RuntimeError, match="a layer"), paged.step(1):
        raise RuntimeError("a layer")
    assert paged.kv.get_value().seq_lengths.tolist() == [4]
    with paged.step(0):
        assert paged.positions().shape == (1, 0)
    with pytest.raises(ValueError, match="no step is under way"):
        paged.positions()
