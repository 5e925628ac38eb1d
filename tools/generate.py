"""Writes text with a language model on a paged KV cache.

    python -m tools.generate --prompt "What is the capital of France?"

Without --model it is SmolLM2-135M-Instruct, fetched on first use.  Text goes to stdout as it is
written; several prompts run as one ragged batch and are printed in their order.  The last line says
how fast it was and how many cache blocks it took.  What cannot be done is one line on stderr and
exit status 2; what was written until then is kept.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path

import jax

import paged_kv

try:
    from tools import gguf_model
    from tools.batch import Batch, Options, PromptError
    from tools.command import DTYPES, dtype_or_default, note, number_type
    from tools.text import ModelError, Text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; install what this needs: pip install -e '.[demo]'"
    ) from error

PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu", "xla": None}  # where each runs


def main(argv: list[str] | None = None) -> int:
    """Runs the program with these arguments; returns its exit status."""
    arguments = _parse(argv)
    try:
        prompts = _read_prompts(arguments.prompt)
        start = time.perf_counter()
        path = arguments.model or gguf_model.default_model_path()
        model = gguf_model.read_model(path, dtype_or_default(arguments.dtype))
        note(f"read {model.name} in {time.perf_counter() - start:.1f} s")
        options = Options(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            block_size=arguments.block_size,
            num_blocks=arguments.num_blocks,
            implementation=arguments.implementation,
            interpret=arguments.interpret or None,
        )
        return run(model, prompts, options, arguments.chat)
    except (ModelError, PromptError, NotImplementedError) as error:
        note(f"error: {error}")
        return 2


def run(
    model: gguf_model.Model, prompts: list[str], options: Options, chat: bool | None = None
) -> int:
    """Generates after every prompt and prints the texts; returns the exit status.

    `chat` puts each prompt into the model's chat template; None does so if the model has one.
    """
    chat = model.text.chat_template is not None if chat is None else chat
    encode = model.text.encode_chat if chat else model.text.encode
    tokens = [encode(prompt) for prompt in prompts]
    batch = Batch(model.config, model.weights, tokens, model.text.stop_tokens, options, note)
    printer = Printer(model.text, prompts, tokens, chat)
    status, reasons = 0, []
    try:
        for number, token in batch.run():
            printer.write(number, token)
    except paged_kv.OutOfBlocksError as error:
        enough = f"--num-blocks {batch.blocks_needed} is enough for these prompts"
        status, reasons = 2, [f"error: {error}; {enough}"]
    except KeyboardInterrupt:
        status, reasons = 130, ["stopped"]
    printer.close()
    for number, sequence in enumerate(batch.sequences, 1):
        if len(sequence.tokens) == model.config.context_length:
            reasons.append(f"prompt {number} stopped at the end of the model's context")
    for reason in reasons:
        note(reason)
    print(_summary(batch), flush=True)
    return status


class Printer:
    """Prints texts in the order of their prompts: the first as it comes, each other in its turn."""

    def __init__(self, text: Text, prompts: list[str], tokens: list[list[int]], chat: bool):
        # a continuation is decoded after its prompt, so that a space between them is kept
        self._streams = [text.stream(() if chat else before) for before in tokens]
        self._unprinted = [_heading(prompt, chat, len(prompts)) for prompt in prompts]
        self._is_finished = [False] * len(prompts)
        self._current = 0

    def write(self, number: int, token: int | None) -> None:
        """Takes a token of text `number`; None ends the text."""
        if token is None:
            self._unprinted[number] += self._streams[number].flush() + "\n"
            self._is_finished[number] = True
        else:
            self._unprinted[number] += self._streams[number].push(token)
        self._print()

    def close(self) -> None:
        """Ends and prints what is not finished."""
        for number, is_finished in enumerate(self._is_finished):
            if not is_finished:
                self.write(number, None)

    def _print(self) -> None:
        while self._current < len(self._streams):
            print(self._unprinted[self._current], end="", flush=True)
            self._unprinted[self._current] = ""
            if not self._is_finished[self._current]:
                return
            self._current += 1


def _heading(prompt: str, chat: bool, num_prompts: int) -> str:
    """What stands before a text: a prompt to continue, or which of several questions it answers."""
    if not chat:
        return prompt
    return f"> {textwrap.shorten(prompt, 90)}\n" if num_prompts > 1 else ""


def _summary(batch: Batch) -> str:
    """Speeds, compiling aside, and blocks."""

    def rate(tokens, seconds):
        return f"{tokens} tokens" + (f", {tokens / seconds:.1f} tokens/s" if seconds else "")

    stats, allocator = batch.stats, batch.allocator
    return (
        f"prompt: {rate(stats.prompt_tokens, stats.prompt_seconds)} | "
        f"decode: {rate(stats.decode_tokens, stats.decode_seconds)} | "
        f"blocks of {allocator.block_size} tokens: {stats.blocks_used} used, "
        f"peak {stats.peak_blocks} of {allocator.num_blocks}"
    )


def _read_prompts(arguments: list[str]) -> list[str]:
    """The prompts, `-` replaced by what stdin holds."""
    prompts = []
    for number, prompt in enumerate(arguments, 1):
        try:
            prompt = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
            prompt.encode()
        except UnicodeError as error:
            raise PromptError(f"prompt {number} is not UTF-8 text: {error}") from error
        if not prompt:
            raise PromptError(f"prompt {number} is empty")
        prompts.append(prompt)
    return prompts


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate", description="Writes text with a model on a paged KV cache."
    )
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="repeatable; - reads stdin")
    add("--max-tokens", type=number_type(int, 1), default=128, help="per prompt (default 128)")
    add("--temperature", type=number_type(float, 0), default=0.0, help="0, the default, is greedy")
    add("--seed", type=number_type(int, 0, 2**32 - 1), default=0, help="of a temperature's draws")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="answer, or continue the text (default: answer if the model has a chat template)",
    )
    add("--model", type=Path, help="a GGUF file of a Llama model (default: SmolLM2-135M-Instruct)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and cache (default float32 on CPU, else bfloat16)",
    )
    add("--block-size", type=number_type(int, 1), default=16, help="tokens of a block (default 16)")
    add(
        "--num-blocks",
        type=number_type(int, 1),
        help="in the cache (default: what the prompts can need)",
    )
    add("--implementation", choices=tuple(PLATFORMS), help="default: the best here")
    add("--interpret", action="store_true", help="run the named kernels on the CPU, slowly")
    arguments = parser.parse_args(argv)
    needed = PLATFORMS.get(arguments.implementation)
    if arguments.interpret and not needed:
        parser.error("--interpret needs --implementation mosaic_tpu or mosaic_gpu")
    if needed and not arguments.interpret and needed != (found := jax.default_backend()):
        parser.error(
            f"--implementation {arguments.implementation} needs a {needed}, and this is a {found}; "
            "pass --interpret to run it here, slowly"
        )
    return arguments


if __name__ == "__main__":
    sys.exit(main())
