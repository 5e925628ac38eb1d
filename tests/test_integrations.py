"""Each framework's model writes the same tokens through its own dense cache and a paged one.

The models are those of tools/examples, with random weights; prompts are of different lengths, so
that rows are padded and blocks end in the middle.
"""

import importlib

import pytest

from tools.examples import batch

NUM_TOKENS = 10
EXAMPLES = ["nnx_gpt"]


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
