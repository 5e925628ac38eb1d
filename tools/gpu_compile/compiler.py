"""Compiles kernels to machine code where there is no GPU, and reads what the assembler says.

    report = compile_for("H100", jax.jit(f), *avals)
    report.kernels[0].spill_stores

Needs the extra `aot`; `missing()` says what is not there.  The process must have started with
JAX_PLATFORMS=cpu, or the plugin asks for a driver.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from .archs import blocks_per_sm, device


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel; what is None by default, in detailed reports only."""

    kernel: str
    target: str  # as the assembler names it
    registers: int
    spill_stores: int  # bytes
    spill_loads: int
    stack_bytes: int
    smem_bytes: int | None = None
    blocks_per_sm: int | None = None
    ops: dict[str, int] | None = None  # instructions by name, if a disassembler is here


@dataclasses.dataclass(frozen=True)
class Report:
    kernels: list[Kernel]  # of Mosaic GPU
    compiled: jax.stages.Compiled


def missing() -> str | None:
    """What a compile needs and this machine lacks, or None."""
    packages = [p for p in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13") if not _is_installed(p)]
    tools = [t for t in ("ptxas", "nvlink") if _find_tool(t) is None]
    lacks = packages + tools
    return f"needs `pip install -e '.[aot]'`: no {' and no '.join(lacks)}" if lacks else None


def _is_installed(package: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(package) is not None
    return False


def _wheel_tools() -> pathlib.Path | None:
    """Where the wheels of the CUDA compiler put their programs."""
    for folder in map(pathlib.Path, sys.path):
        if (tools := folder / "nvidia" / "cu13" / "bin").is_dir():
            return tools
    return None


def _find_tool(name: str) -> str | None:
    return shutil.which(name) or (shutil.which(name, path=t) if (t := _wheel_tools()) else None)


def compile_for(arch: str, function: Any, *avals: Any, is_detailed: bool = False) -> Report:
    """Compiles a jitted function of `jax.ShapeDtypeStruct`s; a detailed report takes twice as long.

    Shapes without a sharding are placed on one device, those with one on the `devices` it names.
    What is dumped is chosen by environment variables that Mosaic reads at each compile.
    """
    target = device(arch)
    sharding = jax.sharding.SingleDeviceSharding(target)
    place = lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    args = jax.tree.map(place, avals)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        names = {"MOSAIC_GPU_DUMP_TO": str(folder)} if is_detailed else {}
        settings = names or {"MOSAIC_GPU_DUMP_PTXAS": "1"}
        with _environment(**settings, **_tool_paths(folder)), _output_to(folder / "output"):
            with jax.default_device(target), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of XLA's other emitters
                lowered = function.lower(*args)
            compiled = lowered.compile()
        if is_detailed:
            kernels = [_detailed(arch, path) for path in sorted(folder.glob("*.ptxas"))]
        else:
            text = (folder / "output").read_text(errors="replace")
            starts = [m.start() for m in re.finditer("ptxas info .*Compiling entry", text)]
            bounds = itertools.pairwise([*starts, len(text)])
            kernels = [_assembled(text[i:j]) for i, j in bounds]
    return Report(kernels, compiled)


def _tool_paths(folder: pathlib.Path) -> dict[str, str]:
    """Settings under which the tools of the wheels are found."""
    settings = {}
    if tools := _wheel_tools():
        settings["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{tools}"
        if (tools / "nvdisasm").exists():
            (folder / "bin").mkdir()
            (folder / "bin" / "nvdisasm").symlink_to(tools / "nvdisasm")
            settings["CUDA_ROOT"] = str(folder)
    return settings


@contextlib.contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
    """Sends what the compiler prints, from C++, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "wb") as file:
        saved = [(stream, os.dup(stream)) for stream in (1, 2)]
        try:
            for stream, _ in saved:
                os.dup2(file.fileno(), stream)
            yield
        finally:
            for stream, copy in saved:
                os.dup2(copy, stream)
                os.close(copy)


def _assembled(text: str) -> Kernel:
    """The kernel that `ptxas -v` speaks of."""
    number = lambda pattern: int(_find(pattern, text)[1])
    name = _find(r"entry function '([^']+)' for '([^']+)'", text)
    return Kernel(
        name[1].removesuffix("_mosaic_gpu_kernel"),
        name[2],
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
    )


def _detailed(arch: str, ptxas: pathlib.Path) -> Kernel:
    kernel = _assembled(ptxas.read_text())
    passes = ptxas.with_suffix(".mlir-passes.log").read_text(errors="replace")
    smem_bytes = int(_find(r"mosaic_gpu\.smem_bytes = (\d+)", passes)[1])
    threads = int(_find(r"\.maxntid (\d+)", ptxas.with_suffix(".ptx").read_text())[1])
    sass = [p for p in (ptxas.with_suffix(s) for s in (".sass_ctrl", ".sass")) if p.exists()]
    return dataclasses.replace(
        kernel,
        smem_bytes=smem_bytes,
        blocks_per_sm=blocks_per_sm(
            arch, registers=kernel.registers, threads=threads, smem_bytes=smem_bytes
        ),
        ops=count_ops(sass[0].read_text()) if sass else None,
    )


def count_ops(sass: str) -> dict[str, int]:
    """How often each instruction stands in disassembled code."""
    names = re.findall(r"^.*?/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", sass, re.M)
    return dict(collections.Counter(names))


def _find(pattern: str, text: str) -> re.Match:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output holds no {pattern!r}; is it another version's?")
    return found
