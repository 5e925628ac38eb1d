"""Text to tokens and back, with the vocabulary and chat template of a GGUF file.

Two kinds of vocabulary occur with Llama models: byte-level BPE (`gpt2` in the file), whose merges
are stored, and SentencePiece BPE (`llama`), whose merges follow from the pieces' scores.

Source: Sennrich et al. (2016) for BPE, Kudo and Richardson (2018) for SentencePiece.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

# GGUF's types of tokens
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before byte-level BPE, by the file's tokenizer.ggml.pre; patterns apply in turn
WORD_PATTERNS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_LLAMA3_WORDS.replace("{1,3}", ""),),
}
# Models whose turns do not end with the file's one end-of-text token
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")


class ModelError(ValueError):
    """A model file that cannot be had, read or run."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Encodes prompts, and decodes what a model writes."""

    tokenizer: Tokenizer
    chat_template: str | None
    special: dict[str, str]  # bos_token and eos_token, as templates know them
    stop_tokens: frozenset[int]
    first_token: int | None  # before every text, where the model wants one

    @classmethod
    def from_fields(cls, fields: dict) -> "Text":
        """The text side of a GGUF file's fields.

        Raises:
          ModelError: the file has no vocabulary, or one of a kind that is not known here.
        """

        def get(key, default=None):
            return fields.get(f"tokenizer.ggml.{key}", default)

        pieces, kind = get("tokens"), get("model")
        if not pieces:
            raise ModelError("the file has no vocabulary (tokenizer.ggml.tokens)")
        if kind not in _TOKENIZERS:
            raise ModelError(f"the vocabulary is of kind {kind!r}; {sorted(_TOKENIZERS)} are known")
        tokenizer = _TOKENIZERS[kind](pieces, get)
        types = get("token_type", [])
        for piece, kind_of_token in zip(pieces, types, strict=False):
            if kind_of_token in (CONTROL, USER_DEFINED):
                is_special = kind_of_token == CONTROL
                tokenizer.add_tokens([AddedToken(piece, special=is_special, normalized=False)])
        ids = {name: get(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
        stops = [ids["eos"], ids["eot"], ids["eom"], *map(tokenizer.token_to_id, END_OF_TURN)]
        return cls(
            tokenizer=tokenizer,
            chat_template=fields.get("tokenizer.chat_template"),
            special={f"{k}_token": pieces[v] for k, v in ids.items() if v is not None},
            stop_tokens=frozenset(token for token in stops if token is not None),
            first_token=ids["bos"] if get("add_bos_token", kind == "llama") else None,
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, after the token of a beginning where the model wants one."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.first_token is None or tokens[:1] == [self.first_token]:
            return tokens
        return [self.first_token, *tokens]

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        """Tokens of a conversation in which the user has said `message` and the model is to answer.

        `system` are instructions before it; None leaves them to the template.

        Raises:
          ModelError: the file has no chat template, or one that fails.
        """
        if self.chat_template is None:
            raise ModelError("the model has no chat template; pass --no-chat to continue the text")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        messages = [{"role": "user", "content": message}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            rendered = environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=True,
                **self.special,
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template fails: {error}; pass --no-chat") from error
        return self.encode(rendered)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self, before: Sequence[int] = ()) -> "TextStream":
        """Decodes tokens that follow the tokens `before`, one by one."""
        return TextStream(self, before)


class TextStream:
    """Text of tokens as they come; a character that spans tokens comes with its last one."""

    def __init__(self, text: Text, before: Sequence[int]):
        self._text = text
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0
        for token in before:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        self._tokens.append(token)
        piece = self._stream.step(self._text.tokenizer, token) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What is left of a character that no token completed."""
        rest = self._text.decode(self._tokens)[self._length :]
        self._length += len(rest)
        return rest


def _byte_level_bpe(pieces, get) -> Tokenizer:
    """A tokenizer over bytes, each written as one printable character (as in GPT-2)."""
    pre = get("pre", "gpt-2")
    if pre not in WORD_PATTERNS:
        raise ModelError(f"text is cut as in {pre!r}; {sorted(WORD_PATTERNS)} are known")
    merges = [tuple(merge.split(" ")) for merge in get("merges", [])]
    # Llama 3 takes a whole word that is a token, even where its merges lead elsewhere
    model = models.BPE(_ids(pieces), merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in WORD_PATTERNS[pre]]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece_bpe(pieces, get) -> Tokenizer:
    """A tokenizer over characters, with bytes (`<0x0A>`) for those the vocabulary lacks."""
    ids, types = _ids(pieces), get("token_type", [])
    scores = get("scores", [])
    unknown = pieces[types.index(UNKNOWN)] if UNKNOWN in types else None
    merges = sorted(_splits(ids), key=lambda split: -scores[ids["".join(split)]])
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if get("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    unspace = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *unspace]
    )
    return tokenizer


def _splits(ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two others."""
    for piece in ids:
        for cut in range(1, len(piece)):
            if piece[:cut] in ids and piece[cut:] in ids:
                yield piece[:cut], piece[cut:]


def _ids(pieces) -> dict[str, int]:
    return {piece: token for token, piece in enumerate(pieces)}


def _raise_template_error(message):
    raise jinja2.TemplateError(message)


_TOKENIZERS = {"gpt2": _byte_level_bpe, "llama": _sentence_piece_bpe}
