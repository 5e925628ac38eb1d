"""The command that serves: its figures, its picture, its errors."""

import sys

import pytest
from batches import stand_in_programs
from tiny_gguf import write_tiny_gguf

from tools import serve_bench

SIZES = ["--requests", "5", "--system-tokens", "60", "--max-tokens", "6", "--block-size", "8"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path, fields={"llama.context_length": 256})
    return path


@pytest.fixture
def run_main(tiny_path, monkeypatch, capsys):
    """(status, stdout, stderr) of a run with steps that stand in for compiled ones."""
    stand_in_programs(monkeypatch)

    def run(*arguments):
        status = serve_bench.main(["--model", str(tiny_path), *SIZES, *arguments])
        return status, *capsys.readouterr()

    return run


def test_figures_checks_and_a_picture(run_main, tmp_path):
    path = tmp_path / "serve.png"
    status, out, _ = run_main("--check", "--plot", str(path), "--clock", "steps", "--rate", "0.5")
    assert status == 0
    head, columns, *rows, saved, drawn, same = out.splitlines()
    assert head.startswith("Tiny: 5 requests, 0.5 per step on average, prompts of 1")
    assert columns.split() == ["prefix", "caching", "off", "prefix", "caching", "on"]
    figures = {row[:32].strip(): row[32:].split() for row in rows}
    assert figures["tokens generated"] == ["30", "30"]
    off, on = map(int, figures["prompt tokens computed"])
    assert off - on == int(figures["prompt tokens found in the cache"][2])
    saving = f"{off - on} tokens, of {off - on} in whole blocks that prompts before had"
    assert saved == f"prefill saved: {saving}"
    assert off - on >= 4 * 64  # the system prompt, and the template's words before it
    assert drawn == f"drawn in {path}" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert same == "tokens are the same alone, with and without prefix caching: 5 of 5"


def test_a_run_by_steps_is_the_same_again(run_main):
    once, again = (run_main("--clock", "steps", "--preemption", "swap")[1] for _ in range(2))
    kept = lambda text: [line for line in text.splitlines() if "second" not in line]
    assert kept(once) == kept(again) and len(kept(once)) == 14


def test_time_on_the_wall_is_that_of_steps(run_main):
    status, out, _ = run_main("--rate", "1000")
    assert status == 0 and "1000 per s on average" in out
    assert "time to first token, s  " in out
    assert out.splitlines()[-1] == "tokens are the same with and without prefix caching: 5 of 5"


def test_other_tokens_than_alone_are_status_1(run_main, monkeypatch):
    alone = lambda model, arrivals, arguments: {a.number: [a.number] * 6 for a in arrivals}
    monkeypatch.setattr(serve_bench, "generate_alone", alone)
    status, out, _ = run_main("--check")
    assert status == 1
    assert "tokens are the same alone, with and without prefix caching: 0 of 5" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--system-tokens", "250"], "ask for fewer with --system-tokens and --max-tokens"),
        (["--num-blocks", "2"], "blocks for 1"),
        (["--model", "none.gguf"], "there is no model file none.gguf"),
    ],
)
def test_errors_are_one_line_and_status_2(run_main, arguments, text):
    status, _, err = run_main(*arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ") and text in err.splitlines()[-1]


def test_without_matplotlib_the_way_to_it_is_said(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run_main("--plot", "serve.png")
    assert (status, out) == (2, "")
    assert err.endswith("install what --plot needs: pip install -e '.[bench]'\n")


def test_wrong_arguments_are_said(capsys):
    with pytest.raises(SystemExit, match="2"):
        serve_bench.main(["--preemption", "never"])
    assert "--preemption: invalid choice: 'never'" in capsys.readouterr().err
