"""The command: its text, its options, its errors and its last line."""

import io
import os
import re
import subprocess
import sys

import jax
import pytest
from batches import SHAPE, generated
from default_model import default_model
from tiny_gguf import CONTEXT, write_tiny_gguf

from tools import generate
from tools.batch import Batch, Options

SUMMARY = re.compile(
    r"prompt: (\d+) tokens, [\d.]+ tokens/s \| decode: (\d+) tokens(?:, [\d.]+ tokens/s)? \| "
    r"blocks of (\d+) tokens: (\d+) used, peak (\d+) of (\d+)"
)


def run_main(capsys, *arguments):
    """(status, text on stdout, the numbers of the last line, stderr)."""
    status = generate.main(list(arguments))
    out, err = capsys.readouterr()
    text, _, last = out.removesuffix("\n").rpartition("\n")
    match = SUMMARY.fullmatch(last)
    if match is None:
        return status, out, [], err
    return status, text, [int(number) for number in match.groups()], err


@pytest.mark.slow
def test_the_command_answers_with_paris():
    default_model()  # skips or fails as it should where there is no model
    command = [sys.executable, "-m", "tools.generate", "--max-tokens", "16"]
    done = subprocess.run(
        [*command, "--prompt", "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.removesuffix("\n").rpartition("\n")
    assert text == "The capital of France is Paris."
    assert SUMMARY.fullmatch(last), last
    assert "Warning" not in done.stderr and "error" not in done.stderr


SHAPE_FLAGS = ["--max-tokens", "12", "--block-size", "4", "--num-blocks", "13"]
TWO_PROMPTS = ["--prompt", "hello", "--prompt", "and more"]


def test_texts_come_in_the_order_of_their_prompts(tiny_path, tiny, capsys):
    arguments = ["--model", str(tiny_path), *SHAPE_FLAGS, *TWO_PROMPTS, "--no-chat"]
    status, text, numbers, err = run_main(capsys, *arguments)
    prompts = [tiny.text.encode(text) for text in ("hello", "and more")]
    stops = tiny.text.stop_tokens
    expected = generated(tiny, prompts, SHAPE, stops)
    written = [tiny.text.decode([t for t in tokens if t not in stops]) for tokens in expected]
    assert status == 0
    assert text == f"hello{written[0]}\nand more{written[1]}"
    prompt, decode, block_size, used, peak, total = numbers
    assert (prompt, block_size, total) == (2 + 8, 4, 13)
    assert decode == sum(len(tokens) - 1 for tokens in expected)
    assert 2 <= peak <= used <= 13
    assert "compiled a prompt step of 16 tokens in" in err and "read Tiny in" in err


def test_answers_name_their_questions(tiny_path, capsys, programs):
    arguments = ["--model", str(tiny_path), "--max-tokens", "3"]
    first = run_main(capsys, *arguments, "--prompt", "hello")[1]
    second = run_main(capsys, *arguments, "--prompt", "and")[1]
    both = run_main(capsys, *arguments, "--prompt", "hello", "--prompt", "and")[1]
    assert first != second and both == f"> hello\n{first}\n> and\n{second}"


def test_chat_is_the_default_where_the_model_has_a_template(
    tiny_path, tmp_path, capsys, monkeypatch
):
    def prompts_of(path, *more):
        seen = []
        monkeypatch.setattr(Batch, "run", lambda self: seen.extend(self.sequences) or iter(()))
        status, _, _, err = run_main(capsys, "--model", str(path), "--prompt", "hello", *more)
        return status, [len(sequence.tokens) for sequence in seen], err

    plain = tmp_path / "plain.gguf"
    write_tiny_gguf(plain, without=["tokenizer.chat_template"])
    in_template, alone = [len("\x01user\n" + "^o" + "\x02\n" + "\x01assistant\n")], [2]  # hell o
    assert prompts_of(tiny_path)[:2] == (0, in_template)
    assert prompts_of(tiny_path, "--chat")[:2] == (0, in_template)
    assert prompts_of(tiny_path, "--no-chat")[:2] == (0, alone)
    assert prompts_of(plain)[:2] == (0, alone)
    status, none, err = prompts_of(plain, "--chat")
    assert (status, none) == (2, [])
    assert err.splitlines()[-1].startswith("error: the model has no chat template; pass --no-chat")


def test_a_dash_reads_the_prompt_from_stdin(tiny_path, capsys, monkeypatch, programs):
    arguments = ["--model", str(tiny_path), "--max-tokens", "4", "--no-chat", "--prompt", "-"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, text, numbers, _ = run_main(capsys, *arguments)
    assert status == 0 and text.startswith("two\nlines")
    assert numbers[0] == len("two\nlines")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_flags_reach_the_programs(tiny_path, capsys, programs, dtype):
    arguments = ["--model", str(tiny_path), "--prompt", "a", "--max-tokens", "2"]
    arguments += ["--block-size", "8", "--num-blocks", "5", "--temperature", "0.5", "--seed", "3"]
    arguments += [] if dtype == "float32" else ["--dtype", dtype]  # the default on a CPU
    arguments += ["--implementation", "mosaic_gpu", "--interpret"]
    assert run_main(capsys, *arguments)[0] == 0
    assert len(programs) == 2
    for (_, implementation, interpret, _, _), shapes in programs.items():
        weights, cache, _, _, _, draw = shapes
        assert (implementation, interpret) == ("mosaic_gpu", True)
        assert weights.layers.query.dtype == weights.head.dtype == cache.key_pool.dtype == dtype
        assert cache.value_pool.shape == (2, 5, 8, 2, 64)
        assert draw is not None


def test_running_out_of_blocks_is_one_line_and_keeps_the_texts(tiny_path, capsys, programs):
    arguments = ["--model", str(tiny_path), "--max-tokens", "20", "--block-size", "4", "--no-chat"]
    arguments += [*TWO_PROMPTS, "--num-blocks", "6"]
    status, text, numbers, err = run_main(capsys, *arguments)
    assert status == 2
    assert numbers[3:] == [6, 6, 6]
    # prompts of 2 and 8 tokens hold 1 + 2 blocks, then 3 + 3 with 10 and 14 tokens, hence
    first, second = text.split("\n")
    assert (first[:5], second[:8]) == ("hello", "and more")
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert re.fullmatch(
        r"error: sequence \d needs 1 more blocks for \d+ tokens, 0 of 6 are free; .*; "
        r"--num-blocks 13 is enough for these prompts",
        line,
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "none.gguf", "--prompt", "a"], "error: there is no model file none.gguf"),
        (["--model", __file__, "--prompt", "a"], f"error: {__file__} is not a readable GGUF file"),
        (["--prompt", "a", "--prompt", ""], "error: prompt 2 is empty"),
        (["--prompt", "a\udcff"], "error: prompt 1 is not UTF-8 text"),
        (["--prompt", "word " * 60], "error: prompt 1 is too long: 3"),
    ],
)
def test_errors_are_one_line_and_status_2(tiny_path, capsys, arguments, text):
    if "--model" not in arguments:
        arguments = ["--model", str(tiny_path), *arguments]
    status, out, _, err = run_main(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(text)
    assert "Traceback" not in err


def test_what_a_kernel_cannot_do_is_one_line_and_status_2(tiny_path, capsys):
    kernel = ["--implementation", "mosaic_gpu", "--interpret", "--dtype", "float32"]
    status, out, _, err = run_main(
        capsys, "--model", str(tiny_path), "--prompt", "a", *kernel, "--max-tokens", "2"
    )
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: implementation='mosaic_gpu' cannot run")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: --prompt"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens: 0 must be at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: -1 must be at least 0"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature: inf must be"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature: nan must be"),
        (["--prompt", "a", "--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--prompt", "a", "--block-size", "x"], "--block-size: invalid int value: 'x'"),
        (["--prompt", "a", "--num-blocks", "0"], "--num-blocks: 0 must be at least 1"),
        (["--prompt", "a", "--interpret"], "--interpret needs --implementation mosaic_tpu or"),
        (
            ["--prompt", "a", "--implementation", "xla", "--interpret"],
            "--interpret needs --implementation mosaic_tpu or",
        ),
        (["--prompt", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_said(capsys, arguments, text):
    with pytest.raises(SystemExit, match="2"):
        generate.main(arguments)
    assert text in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="here the device is there")
def test_a_kernel_without_its_device_is_said(capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--prompt", "a", "--implementation", "mosaic_tpu"])
    assert "needs a tpu, and this is a cpu; pass --interpret" in capsys.readouterr().err


def test_the_end_of_the_context_is_said(tiny_path, capsys, programs):
    arguments = ["--model", str(tiny_path), "--no-chat", "--prompt", "y" * (CONTEXT - 3)]
    status, _, _, err = run_main(capsys, *arguments, "--max-tokens", "9")
    assert status == 0
    assert "prompt 1 stopped at the end of the model's context" in err


def test_an_interrupt_keeps_the_text(tiny, capsys, monkeypatch):
    def interrupted(self):
        yield 0, self.sequences[0].tokens[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(Batch, "run", interrupted)
    assert generate.run(tiny, ["hello"], Options(), chat=False) == 130
    out, err = capsys.readouterr()
    assert out.startswith("hellohell\n") and err == "stopped\n"


def test_a_text_waits_for_those_before_it(tiny, capsys):
    tokens = [tiny.text.encode(word) for word in ("ab", "cd", "ef")]
    printer = generate.Printer(tiny.text, ["1", "2", "3"], tokens, chat=True)

    def printed(number, token):
        printer.write(number, token)
        return capsys.readouterr().out

    assert printed(1, tokens[1][0]) == "> 1\n"
    assert printed(2, tokens[2][0]) == ""
    assert printed(0, tokens[0][0]) == "a"
    assert printed(1, None) == ""
    assert printed(0, None) == "\n> 2\nc\n> 3\ne"
    assert printed(2, tokens[2][1]) == "f"
    printer.close()
    assert capsys.readouterr().out == "\n"


def test_without_the_extra_the_way_to_it_is_said(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\")")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tools.generate", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    expected = "No module named 'gguf'; install what this needs: pip install -e '.[demo]'"
    assert done.stderr.splitlines()[-1].endswith(expected)
