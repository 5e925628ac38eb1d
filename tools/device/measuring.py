"""One case on the device: checked against the reference, then timed beside its peers."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import peers, roofline, stream
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.runner import (
    MAX_ERROR,
    Program,
    Runner,
    Steps,
    relative_error,
    same_bits,
    truth_of,
    verdict,
)
from benchmarks.timing import Timing, measure
from benchmarks.workload import APPEND, ATTEND, Case

LONG_FLOPS = 1e12
SLOW_SECONDS = 2.0  # a repeat that takes longer is the only one
PEER_ERROR = 1e-2  # a peer that is further off computes something else

Say = Callable[[str], None]


class Effort(NamedTuple):
    """How often things run: `repeats` timings, of which the median counts, of so many calls."""

    repeats: int
    calls: int
    long_calls: int
    same_bits_runs: int


FULL = Effort(repeats=3, calls=20, long_calls=6, same_bits_runs=5)
TRIAL = Effort(repeats=1, calls=2, long_calls=2, same_bits_runs=1)  # times mean nothing


def measure_case(
    case: Case,
    steps: tuple[Steps, Steps] | None,
    *,
    implementation: str,
    interpret: bool | None,
    rotate_bytes: int,
    with_peers: bool,
    effort: Effort,
    say: Say,
) -> dict[str, Any]:
    """The case's record; a wrong result is not timed."""
    record = facts(case)
    say("making its arrays")
    inputs = make_inputs(case, rotate_bytes=rotate_bytes)
    programs = Program(case, implementation, interpret), Program(case, truth_of(implementation))
    of = steps or (None, None)
    made, truth = (Runner(p, inputs, s) for p, s in zip(programs, of, strict=True))
    say("checking it")
    record["problem"], record["error"] = verdict(case, made, truth)
    record["same_bits"] = _is_repeatable(made, effort.same_bits_runs)
    if record["problem"]:
        return record
    say("timing it")
    time_of = partial(timed, case, copies=len(inputs.tables), effort=effort)
    timing = time_of(made.run)
    record |= {"copies": len(inputs.tables), **asdict(timing)}
    if effort is not TRIAL:
        rate = roofline.bound(case, timing.median_us * 1e-6)
        record |= {**asdict(rate), "share": rate.share}
    if made.steps.schedule is not None:
        record["schedule"] = asdict(time_of(made.schedule))
    if with_peers:
        out = None if case.op != ATTEND else truth.run(0)[0]
        record["peers"] = {
            peer.name: _of_peer(case, inputs, peer, out, time_of, say)
            for peer in peers.of_case(case)
        }
        if stream.unsupported(case) is None:
            num_ctas = jax.devices()[0].core_count
            record["stream"] = asdict(time_of(stream.make(case, inputs, num_ctas)))
    return record


def facts(case: Case) -> dict[str, Any]:
    """What a case asks for."""
    return {
        "case": case.name,
        "letter": case.letter,
        "op": case.op,
        "tags": list(case.tags),
        "dtype": case.dtype,
        "kv_bytes": case.kv_bytes if case.op != APPEND else 0,
        "append_bytes": case.append_bytes if case.op != ATTEND else 0,
        "useful_flops": case.useful_flops if case.op != APPEND else 0,
    }


def timed(case: Case, run: Callable[[int], Any], *, copies: int, effort: Effort) -> Timing:
    """The median of several timings, each of which meets every copy."""
    is_long = case.useful_flops > LONG_FLOPS
    calls = max(effort.long_calls if is_long else effort.calls, copies)
    timings = []
    for _ in range(effort.repeats):
        begin = time.monotonic()
        timings.append(measure(run, calls))
        if time.monotonic() - begin > SLOW_SECONDS:
            break
    return sorted(timings, key=lambda timing: timing.median_us)[len(timings) // 2]


def _is_repeatable(made: Runner, runs: int) -> bool:
    """Same inputs, same bits; an append writes the same tokens again."""
    keep = lambda result: jax.tree.map(jnp.copy, result)
    first = keep(made.run(0))
    return all(
        all(map(same_bits, jax.tree.leaves(first), jax.tree.leaves(made.run(0))))
        for _ in range(runs)
    )


def _of_peer(
    case: Case,
    inputs: Inputs,
    peer: peers.Peer,
    out: jax.Array | None,
    time_of: Callable[..., Timing],
    say: Say,
) -> dict[str, Any]:
    """A peer's timing and error; a peer that fails says how, and stops nothing."""
    say(f"timing {peer.name}")
    try:
        run = peer.make(case, inputs)
        first = jax.block_until_ready(run(0))
        record = {}
        if out is not None and first is not None:
            record["error"] = relative_error(_as_output(first), out)
            if not record["error"] <= max(PEER_ERROR, MAX_ERROR[case.dtype]):
                return record | {"problem": "computes something else"}
        return record | asdict(time_of(run))
    except Exception as error:  # whatever another project raises
        return {"problem": f"{type(error).__name__}: {str(error)[:300]}"}


def _as_output(result: Any) -> jax.Array:
    """`out` of a peer: an array, a tensor, or the first of several results."""
    result = result[0] if isinstance(result, (tuple, list)) else result
    return result if isinstance(result, jax.Array) else jnp.from_dlpack(result)
