"""One compile in a process of its own: `python -m tools.tpu_schedule.worker REQUEST`.

libtpu reads what to dump when it is loaded, so the parent process sets it and starts this one.
"""

import json
import re
import sys
import time
import traceback
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from . import operands
from .program import Program, Run, load

LANES = 128  # the last axis of an array is padded to it
_KERNEL = re.compile(
    r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\","
    r" operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_OPERAND = re.compile(r"\w+\[([\d,]*)\](\{[^}]*\})?")


def main(request_path: str) -> int:
    """Writes result.json and operands.npz, or error.txt, into the folder of the request."""
    request = json.loads(Path(request_path).read_text())
    folder = Path(request["folder"])
    try:
        result, arrays = work(request["target"], request["topology"], request["kv_len"])
    except Exception as error:  # whatever it is, the parent process tells it
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    np.savez(folder / "operands.npz", *arrays)
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def work(target: str, topology: str, kv_len: int | None) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Compiles a program; (what its runs call, the numbers that their kernels are given)."""
    program = load(target, kv_len)
    traced, text, seconds = compile_program(program, topology)
    kernels = {name: _OPERAND.findall(layouts) for name, layouts in _KERNEL.findall(text)}
    arrays: list[np.ndarray] = []
    runs = [program.run, *(program.context or ())]
    result = {
        "compile_seconds": round(seconds, 2),
        "kernels": list(kernels),
        "whole": program.whole,
        "runs": [_describe(program, run, traced, kernels, arrays) for run in runs],
    }
    return result, arrays


def compile_program(program: Program, topology_name: str) -> tuple[Any, str, float]:
    """(traced program, optimised HLO, seconds of the compiler) for one core of a topology.

    The seconds are of the clock or of the processor, whichever is less: a machine that others use
    too makes a compile no slower.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    device = topology.devices[0]
    kind = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    sharding = SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in program.arguments.values()
    ]
    donated = [at for at, name in enumerate(program.arguments) if name in program.donated]
    # The mesh is what kernels ask for the chip that they are traced for.
    mesh = AbstractMesh((1,), ("core",), (AxisType.Auto,), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(program.function, donate_argnums=donated).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
        clock, processor = time.perf_counter(), time.process_time()
        compiled = lowered.compile()
        seconds = min(time.perf_counter() - clock, time.process_time() - processor)
    return traced.jaxpr, compiled.as_text() or "", seconds


def _describe(
    program: Program,
    run: Run,
    traced: Any,
    kernels: dict[str, list[tuple[str, str]]],
    arrays: list[np.ndarray],
) -> dict[str, Any]:
    """The kernels that a run calls; the numbers they are given are added to `arrays`."""
    names = frozenset(program.pools)
    sizes = {prod(program.arguments[name].shape) for name in names}
    given = [
        run.numbers[name]
        if name in run.numbers
        else operands.Tensor(tensor.shape, tensor.dtype, frozenset({name}))
        for name, tensor in program.arguments.items()
    ]
    calls = []
    for call in operands.kernel_calls(traced, given):
        name = _name_of(call, kernels)
        layouts = [layout for _, layout in kernels[name]]
        words = [
            operands.in_memory(value, layout)
            for value, layout in zip(call.operands, layouts, strict=True)
        ]
        indices: list[int | None] = [None] * len(words)
        for at, array in enumerate(words):
            if array is not None:
                indices[at] = len(arrays)
                arrays.append(array)
        pools = {at for size in sizes for at in call.pools(names, size)}
        widths = [call.operands[at].shape[-1] for at in pools if at < len(words)]
        calls.append(
            {
                "kernel": name,
                "operands": indices,
                "pools": sorted(pools),
                "filled": min(
                    (width / (-(-width // LANES) * LANES) for width in widths), default=1
                ),
            }
        )
    return {"calls": calls, "num_bytes": run.num_bytes, "useful_flops": run.useful_flops}


def _name_of(call: operands.KernelCall, kernels: dict[str, list[tuple[str, str]]]) -> str:
    """The compiled kernel that a call became: by its name and the sizes of its operands."""
    sizes = [
        prod(np.shape(x) if not isinstance(x, operands.Tensor) else x.shape) for x in call.operands
    ]
    found = [
        name
        for name, shapes in kernels.items()
        if re.fullmatch(rf"{re.escape(call.name)}(\.\d+)*", name)
        and [prod(int(n) for n in shape.split(",") if n) for shape, _ in shapes] == sizes
    ]
    if len(found) != 1:
        raise ValueError(
            f"kernel {call.name!r} is {found or 'none'} of the compiled {sorted(kernels)}; "
            "kernels of one program need names of their own"
        )
    return found[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
