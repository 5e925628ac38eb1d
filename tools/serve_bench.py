"""Serves a stream of requests with a language model on a paged KV cache, and says how it went.

    python -m tools.serve_bench --plot serve.png

Requests arrive at random moments (a Poisson process, by --seed) with a question behind a system
prompt that they share.  They are computed together: parts of prompts and decode in one step, blocks
of equal beginnings shared, and when blocks run out the last to come in makes room.  The same
requests are served with and without prefix caching; --check generates each alone too and compares.

Time is that of the clock.  --clock wall: seconds of the engine's steps as measured here, without
compiling, and idle time is skipped.  --clock steps: every step takes one unit, so that a run is the
same everywhere.  Without --model it is SmolLM2-135M-Instruct, fetched on first use.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from tools import gguf_model
    from tools.batch import Batch
    from tools.batch import Options as AloneOptions
    from tools.command import DTYPES, dtype_or_default, note, number_type
    from tools.serving import metrics, plot, workload
    from tools.serving.engine import Engine, Options
    from tools.serving.request import Arrival, RequestError
    from tools.text import ModelError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; install what this needs: pip install -e '.[demo]'"
    ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with these arguments; returns its exit status."""
    arguments = _parse(argv)
    try:
        if arguments.plot:
            plot.load()  # say now that it is missing
        path = arguments.model or gguf_model.default_model_path()
        model = gguf_model.read_model(path, dtype_or_default(arguments.dtype))
        prompts = workload.chat_prompts(
            model.text,
            arguments.seed,
            arguments.requests,
            arguments.systems,
            arguments.system_tokens,
        )
        arrivals = workload.poisson_arrivals(
            arguments.seed, arguments.rate, prompts, arguments.max_tokens
        )
        return run(model, arrivals, arguments)
    except (ModelError, ModuleNotFoundError, RequestError) as error:
        note(f"error: {error}")
        return 2


def run(model: gguf_model.Model, arrivals: list[Arrival], arguments: argparse.Namespace) -> int:
    """Serves the requests without and with prefix caching; prints, plots and checks.

    Returns 1 if a request got other tokens than alone, or in the one run than in the other.
    """
    unit = "s" if arguments.clock == "wall" else "steps"
    prompts = [arrival.prompt for arrival in arrivals]
    print(
        f"{model.name}: {len(arrivals)} requests, {arguments.rate:g} per {unit.rstrip('s') or 's'} "
        f"on average, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens",
        flush=True,
    )
    runs = {}
    for is_caching in (False, True):
        name = f"prefix caching {'on' if is_caching else 'off'}"
        note(name)
        options = engine_options(model, arrivals, arguments, is_caching)
        engine = Engine(model.config, model.weights, model.text.stop_tokens, options, note)
        runs[name] = engine.run(arrivals)
    off, on = runs.values()
    print(metrics.table(runs, unit))
    shared = workload.shared_tokens(prompts, arguments.block_size)
    saved = off.total("prefill") - on.total("prefill")
    print(f"prefill saved: {saved} tokens, of {shared} in whole blocks that prompts before had")
    if arguments.plot:
        plot.save(runs, arguments.plot, unit)
        print(f"drawn in {arguments.plot}")
    differing = [n for n, tokens in on.outputs.items() if tokens != off.outputs[n]]
    what = "with and without prefix caching"
    if arguments.check:
        alone = generate_alone(model, arrivals, arguments)
        what = "alone, " + what
        differing = [n for n, t in alone.items() if not t == on.outputs[n] == off.outputs[n]]
    print(f"tokens are the same {what}: {len(arrivals) - len(differing)} of {len(arrivals)}")
    return 1 if differing else 0


def engine_options(
    model: gguf_model.Model,
    arrivals: list[Arrival],
    arguments: argparse.Namespace,
    is_caching: bool,
) -> Options:
    """The engine's options; without --num-blocks three prompts fit, and their answers do not."""
    blocks_for = lambda tokens: -(-tokens // arguments.block_size)
    prompt = max(len(arrival.prompt) for arrival in arrivals)
    longest = max(len(arrival.prompt) + arrival.max_tokens - 1 for arrival in arrivals)
    if longest >= model.config.context_length:
        raise ModelError(
            f"a request comes to {longest} tokens, and the model's context has "
            f"{model.config.context_length}; ask for fewer with --system-tokens and --max-tokens"
        )
    return Options(
        num_blocks=arguments.num_blocks or max(3 * blocks_for(prompt), blocks_for(longest)),
        max_length=longest,
        block_size=arguments.block_size,
        row_buckets=(-(-arguments.rows // 4), arguments.rows),
        prefix_caching=is_caching,
        preemption=arguments.preemption,
        is_clock_wall=arguments.clock == "wall",
    )


def generate_alone(
    model: gguf_model.Model, arrivals: list[Arrival], arguments: argparse.Namespace
) -> dict[int, list[int]]:
    """What `tools.generate` gives after each prompt, one at a time in a cache of its own."""
    outputs = {}
    longest = max(len(arrival.prompt) + arrival.max_tokens for arrival in arrivals)
    for arrival in arrivals:
        options = AloneOptions(
            max_tokens=arrival.max_tokens,
            block_size=arguments.block_size,
            num_blocks=-(-longest // arguments.block_size),  # one shape, one program
        )
        prompts, stops = [list(arrival.prompt)], model.text.stop_tokens
        batch = Batch(model.config, model.weights, prompts, stops, options)
        list(batch.run())
        outputs[arrival.number] = batch.sequences[0].generated
        note(f"alone: request {arrival.number} of {len(arrivals)}")
    return outputs


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.serve_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    positive = number_type(int, 1)
    add("--requests", type=positive, default=12, help="how many (default 12)")
    add("--rate", type=number_type(float, 1e-9), help="per unit of the clock (default 1, or 0.2)")
    add("--systems", type=positive, default=1, help="different system prompts (default 1)")
    add("--system-tokens", type=positive, default=256, help="of each (default 256)")
    add("--max-tokens", type=positive, default=32, help="generated per request (default 32)")
    add("--block-size", type=positive, default=16, help="tokens of a block (default 16)")
    add("--num-blocks", type=positive, help="default: three of the longest prompts fit")
    add("--rows", type=positive, default=8, help="requests computed at once (default 8)")
    add("--preemption", choices=("recompute", "swap"), default="recompute")
    add("--clock", choices=("wall", "steps"), default="wall", help="what time is (default wall)")
    add("--seed", type=number_type(int, 0, 2**32 - 1), default=0, help="of arrivals and questions")
    add("--check", action="store_true", help="compare with generating one at a time")
    add("--plot", type=Path, help="a PNG to draw; needs the extra `bench`")
    add("--model", type=Path, help="a GGUF file of a Llama model (default: SmolLM2-135M-Instruct)")
    add("--dtype", choices=DTYPES, help="of weights and cache (default float32 on CPU)")
    arguments = parser.parse_args(argv)
    if arguments.rate is None:
        arguments.rate = 1.0 if arguments.clock == "wall" else 0.2
    return arguments


if __name__ == "__main__":
    sys.exit(main())
