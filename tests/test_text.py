"""Text round-trips through every kind of vocabulary, and prompts become what models were taught."""

import pytest
from default_model import default_model
from tiny_gguf import CHAT_TEMPLATE, pieces, write_tiny_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tools.gguf_model import read_model
from tools.text import ModelError, Text

TEXTS = [
    "Hello world, don't they're  two  spaces",
    "x = 12345; f(x)\n\n\tindented\r\n",
    " leading and trailing ",
    "naïve café 日本語 🙂🏽 \u00a0 ½",
]


def tiny_text(**fields):
    """The text side of a byte-level vocabulary."""
    types = [3 if piece.startswith("<|") else 1 for piece in pieces()]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": pieces(),
        "token_type": types,
        "merges": ["h e", "l l", "he ll"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values = {f"tokenizer.ggml.{key}": value for key, value in (values | fields).items()}
    return Text.from_fields({**values, "tokenizer.chat_template": CHAT_TEMPLATE})


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(pre, text):
    codec = tiny_text(pre=pre)
    tokens = codec.encode(text)
    assert codec.decode(tokens) == text
    stream = codec.stream()
    assert "".join(map(stream.push, tokens)) + stream.flush() == text


def test_merges_apply_in_order():
    codec = tiny_text()
    assert [codec.tokenizer.id_to_token(t) for t in codec.encode("hello")] == ["hell", "o"]


def test_digits_are_cut_as_the_vocabulary_says():
    def cut(pre):
        codec = tiny_text(pre=pre)
        return [s for s, _ in codec.tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345")]

    assert cut("smollm") == ["ab", "Ġ", "1", "2", "3", "4", "5"]
    assert cut("gpt-2") == ["ab", "Ġ12345"]
    assert cut("llama-bpe") == ["ab", "Ġ", "123", "45"]
    assert cut("qwen2") == ["ab", "Ġ", "1", "2", "3", "4", "5"]


def test_a_streamed_character_comes_with_its_last_byte():
    codec = tiny_text()
    stream = codec.stream()
    pushed = [stream.push(token) for token in codec.encode("é🙂")]
    assert pushed == ["", "é", "", "", "", "🙂"]
    stream = codec.stream()
    assert [stream.push(token) for token in codec.encode("a🙂")[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_control_tokens_are_read_in_templates_and_never_shown():
    codec = tiny_text()
    tokens = codec.encode_chat("hi")
    assert codec.decode(tokens) == "user\nhi\nassistant\n"
    assert [tokens.count(token) for token in (1, 2)] == [2, 1]


def test_generation_stops_at_every_end_of_turn():
    names = [*pieces(), "<|eot_id|>"]
    assert tiny_text().stop_tokens == {2}
    assert tiny_text(tokens=names, eot_token_id=7).stop_tokens == {2, 7, len(names) - 1}


def test_a_beginning_is_added_once_where_the_file_wants_one():
    codec = tiny_text(add_bos_token=True)
    assert codec.encode("a")[0] == 1 and len(codec.encode("a")) == 2
    assert codec.encode("<|im_start|>a") == codec.encode("a")


def test_a_file_without_a_template_or_with_a_broken_one_is_said(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", without=["tokenizer.chat_template"])
    with pytest.raises(ModelError, match="no chat template; pass --no-chat"):
        read_model(tmp_path / "m.gguf").text.encode_chat("hi")
    for template, reason in [
        ("{% for %}", "chat template fails: Expected"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
    ]:
        write_tiny_gguf(tmp_path / "m.gguf", fields={"tokenizer.chat_template": template})
        with pytest.raises(ModelError, match=reason):
            read_model(tmp_path / "m.gguf").text.encode_chat("hi")


def sentence_pieces():
    """A small SentencePiece vocabulary: (piece, score, type), bytes and letters among them."""
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = ["▁t", "he", "▁the", "in", "th", "▁th", "ing", "▁thing"]
    rows += [(piece, -float(rank), 1) for rank, piece in enumerate(merged)]
    return rows + [(letter, -100.0 - i, 1) for i, letter in enumerate("▁abcdefghinostw")]


def sentence_piece_text(**fields):
    tokens, scores, types = zip(*sentence_pieces(), strict=True)
    values = {
        "model": "llama",
        "tokens": list(tokens),
        "scores": list(scores),
        "token_type": list(types),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Text.from_fields(
        {f"tokenizer.ggml.{key}": value for key, value in (values | fields).items()}
    )


@pytest.mark.parametrize("text", [*TEXTS, "the thing", "  the", "a"])
def test_sentence_pieces_round_trip(text):
    codec = sentence_piece_text()
    tokens = codec.encode(text)
    assert tokens[0] == 1
    assert codec.decode(tokens) == text
    stream = codec.stream()
    assert "".join(map(stream.push, tokens)) + stream.flush() == text


def test_sentence_pieces_merge_by_score():
    codec = sentence_piece_text()

    def cut(text):
        return [codec.tokenizer.id_to_token(token) for token in codec.encode(text)[1:]]

    assert cut("the thing") == ["▁the", "▁thing"]  # ▁t and he win over th
    assert cut("o thé") == ["▁", "o", "▁th", "<0xC3>", "<0xA9>"]


def test_a_continuation_keeps_the_space_before_its_first_piece():
    codec = sentence_piece_text()
    before, thing = codec.encode("the"), codec.encode("thing")[1:]
    assert [codec.stream(before).push(token) for token in thing] == [" thing"]
    assert [codec.stream().push(token) for token in thing] == ["thing"]


def test_sentence_pieces_without_a_prefix_keep_their_spaces():
    codec = sentence_piece_text(add_space_prefix=False, add_bos_token=False)
    assert codec.decode(codec.encode(" the")) == " the"
    assert codec.encode("a") == [codec.tokenizer.token_to_id("a")]


def test_the_default_model_reads_and_writes_text():
    codec = default_model().text
    for text in TEXTS:
        assert codec.decode(codec.encode(text)) == text
    assert codec.decode(codec.encode_chat("Hi")).endswith("\nuser\nHi\nassistant\n")
    assert codec.tokenizer.token_to_id("<|im_start|>") == codec.encode_chat("Hi")[0] == 1


def test_the_default_models_tokens_are_those_of_the_librarys_own_cuts():
    codec = default_model().text
    model = codec.tokenizer.model
    assert isinstance(model, models.BPE)
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    plain.decoder = decoders.ByteLevel()
    for text in TEXTS:
        assert codec.encode(text) == plain.encode(text).ids
