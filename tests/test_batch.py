"""Ragged batches on one paged cache: their tokens, their programs and their blocks."""

import numpy as np
import pytest
from batches import SHAPE, generated, needs_jax, options, random_prompts, run_batch
from default_model import default_model
from dense_llama import DenseLlama
from tiny_gguf import CONTEXT

import paged_kv
from tools import batch, gguf_model
from tools.batch import Batch, Options, PromptError

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea, and one about the mountains in winter.",
]


def test_real_prompts_give_together_what_the_dense_model_gives_for_each():
    model = default_model()
    stops = model.text.stop_tokens
    prompts = [model.text.encode_chat(question) for question in QUESTIONS]
    together = generated(model, prompts, Options(max_tokens=9, num_blocks=24), stops)
    dense = DenseLlama(model.config, model.weights)
    for prompt, tokens in zip(prompts, together, strict=True):
        expected, margin = dense.greedy_along(prompt, tokens)
        assert margin > 0.01  # of logits: no tie that rounding could turn
        assert tokens == expected
        assert stops.isdisjoint(tokens[:-1])
        assert len(tokens) == 9 or tokens[-1] in stops


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("mosaic_tpu", "float32"), ("mosaic_gpu", "bfloat16")]
)
def test_the_kernels_give_the_real_models_first_tokens(implementation, dtype):
    needs_jax(implementation)
    default_model()
    model = gguf_model.read_model(gguf_model.default_model_path(), dtype)
    prompts = [model.text.encode_chat(QUESTIONS[0])]
    expected = generated(model, prompts, Options(max_tokens=8, implementation="xla"))
    kernel = Options(max_tokens=8, implementation=implementation, interpret=True)
    assert generated(model, prompts, kernel) == expected


@pytest.mark.usefixtures("quick_compiles_here")
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("mosaic_tpu", "float32"), ("mosaic_gpu", "bfloat16")]
)
def test_the_kernels_give_the_first_tokens_of_the_reference(tiny_path, implementation, dtype):
    needs_jax(implementation)
    model = gguf_model.read_model(tiny_path, dtype)
    prompts = random_prompts([4, 9])
    shape = {"max_tokens": 8, "block_size": 8, "num_blocks": 8}
    expected = generated(model, prompts, options(**shape, implementation="xla"))
    kernel = options(**shape, implementation=implementation, interpret=True)
    assert generated(model, prompts, kernel) == expected


@pytest.mark.usefixtures("quick_compiles_here")
@pytest.mark.parametrize("lengths", [[4, 9], [9, 20]])
def test_a_ragged_batch_gives_what_the_definition_gives(tiny, monkeypatch, lengths):
    monkeypatch.setattr(batch, "PROMPT_BUCKETS", (16,))  # 9 and 20 tokens take two steps
    prompts = random_prompts(lengths)
    dense = DenseLlama(tiny.config, tiny.weights, np.float64)
    expected = [dense.greedy(prompt, SHAPE.max_tokens)[0] for prompt in prompts]
    assert generated(tiny, prompts, SHAPE) == expected
    if lengths == [4, 9]:
        assert generated(tiny, prompts[1:], SHAPE) == expected[1:]  # alone


@pytest.mark.usefixtures("quick_compiles_here")
def test_a_temperature_draws_by_its_seed(tiny):
    def tokens(**draw):
        return generated(tiny, random_prompts([4, 9]), options(**draw))

    greedy = tokens()
    drawn = tokens(temperature=1.5, seed=3)
    assert drawn == tokens(temperature=1.5, seed=3)
    for other in (greedy, tokens(temperature=1.5, seed=4)):
        assert drawn[0] != other[0] and drawn[1] != other[1]
    assert tokens(temperature=0.0, seed=4) == greedy


def test_any_number_of_prompt_lengths_needs_a_bounded_number_of_programs(tiny, programs):
    for length in range(1, CONTEXT - 3):
        shape = Options(max_tokens=3, num_blocks=1, block_size=CONTEXT)
        run_batch(tiny, random_prompts([length]), shape)
    # 16, 32, 64 and 128 prompt tokens, and decode
    assert len(programs) == 5


def test_every_token_is_yielded_once_and_the_end_last(tiny, programs):
    ragged, events = run_batch(tiny, random_prompts([4, 9]), Options(max_tokens=3))
    assert [s.generated for s in ragged.sequences] == [[14, 15, 16], [19, 20, 21]]
    for row, sequence in enumerate(ragged.sequences):
        assert [token for number, token in events if number == row] == [*sequence.generated, None]


def test_a_stop_token_ends_its_sequence_unseen_and_frees_its_blocks(tiny, programs):
    shape = Options(max_tokens=5, block_size=2)
    ragged, events = run_batch(tiny, random_prompts([4, 9]), shape, stop_tokens={16})
    assert [s.generated for s in ragged.sequences] == [[14, 15, 16], [19, 20, 21, 22, 23]]
    assert (0, 16) not in events and events.count((0, None)) == 1
    assert ragged.allocator.num_free_blocks == ragged.allocator.num_blocks


def test_blocks_are_handed_out_as_sequences_grow_and_come_back(tiny, programs):
    shape = Options(max_tokens=8, block_size=4, num_blocks=10)
    ragged = Batch(tiny.config, tiny.weights, random_prompts([4, 9]), frozenset(), shape)
    held = [10 - ragged.allocator.num_free_blocks for _ in ragged.run()]
    assert held[:4] == [1 + 3, 1 + 3, 2 + 3, 2 + 3]  # 4 and 9 tokens, then 5 and 10
    assert held[-1] == 0
    # the last token of a sequence is never cached: 4 + 7 and 9 + 7 tokens
    assert (ragged.stats.blocks_used, ragged.stats.peak_blocks) == (3 + 4, 7)
    assert ragged.blocks_needed == 7
    assert (ragged.stats.prompt_tokens, ragged.stats.decode_tokens) == (13, 14)


@pytest.mark.usefixtures("quick_compiles_here")
def test_blocks_of_a_finished_sequence_serve_another(tiny):
    prompts = random_prompts([7, 8])
    dense = DenseLlama(tiny.config, tiny.weights, np.float64)
    first, second = (dense.greedy(prompt, 24)[0] for prompt in prompts)
    stop = next(t for i, t in enumerate(first) if i > 14 and t not in first[:i] + second)
    place = first.index(stop)
    ragged, _ = run_batch(tiny, prompts, options(max_tokens=24), stop_tokens={stop})
    assert [s.generated for s in ragged.sequences] == [first[: place + 1], second]
    used = -(-(7 + place) // 4) + 8  # the last token is not cached
    assert ragged.stats.blocks_used == used > ragged.allocator.num_blocks
    assert ragged.stats.peak_blocks <= ragged.allocator.num_blocks


def test_running_out_of_blocks_keeps_what_was_yielded(tiny, programs):
    shape = Options(max_tokens=20, block_size=4, num_blocks=3)
    ragged = Batch(tiny.config, tiny.weights, random_prompts([4]), frozenset(), shape)
    tokens = []
    with pytest.raises(paged_kv.OutOfBlocksError, match="sequence 1 needs 1 more blocks"):
        for _, token in ragged.run():
            tokens.append(token)
    assert tokens == list(range(14, 23))  # 12 slots: 4 + 8, and one that is not cached


def test_generation_ends_at_the_end_of_the_context(tiny, programs):
    prompts = random_prompts([CONTEXT - 2])
    assert len(generated(tiny, prompts, Options(max_tokens=9))[0]) == 2


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "prompt 2 is empty"),
        ([5] * CONTEXT, f"prompt 2 is too long: {CONTEXT} tokens leave no room in .* of {CONTEXT}"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_an_error(tiny, prompt, text):
    with pytest.raises(PromptError, match=text):
        Batch(tiny.config, tiny.weights, [[5], prompt], frozenset(), Options())
