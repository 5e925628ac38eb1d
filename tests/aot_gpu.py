"""Compiles GPU kernels to machine code where there is no GPU, and reads what the assembler says.

    report = compile_for("H100", jax.jit(f), *avals)
    report.kernels[0].spill_stores

Needs the extra `aot`; `missing()` says what is not there.  The process must have started with
JAX_PLATFORMS=cpu, or the plugin asks for a driver.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Arch:
    """Public facts of a device, as XLA wants them told."""

    capability: tuple[int, int]
    name: str
    num_sms: int
    smem_per_block: int
    smem_per_sm: int
    memory_bytes: int
    memory_bandwidth: int  # bytes per second
    l2_bytes: int
    clock_ghz: float


ARCHS = {
    "H100": Arch(
        (9, 0), "NVIDIA H100 80GB HBM3", 132, 232448, 233472, 84942979072, 3352320000000,
        52428800, 1.98,
    ),
    "B200": Arch(
        (10, 0), "NVIDIA B200", 148, 232448, 233472, 191514411008, 7672320000000, 132644864, 1.965
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel; `smem_bytes` and `ops` in detailed reports only."""

    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    smem_bytes: int | None = None
    ops: dict[str, int] | None = None


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


@functools.cache
def device(arch: str):
    """A device to compile for; nothing can run on it."""
    a = ARCHS[arch]
    major, minor = a.capability
    config = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {a.smem_per_block}
        shared_memory_per_core: {a.smem_per_sm} core_count: {a.num_sms} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {a.memory_bandwidth} l2_cache_size: {a.l2_bytes}
        clock_rate_ghz: {a.clock_ghz} device_memory_size: {a.memory_bytes} device_address_bits: 64
        cuda_compute_capability {{
          major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
        name: "{a.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
      device_description_str: "{a.name}" """
    return topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=config
    ).devices[0]


def compile_for(arch: str, function, *avals, is_detailed: bool = False) -> Report:
    """Compiles a jitted function of `jax.ShapeDtypeStruct`s; a detailed report takes twice as long.

    What is dumped is chosen by environment variables that Mosaic reads at each compile.
    """
    target = device(arch)
    sharding = jax.sharding.SingleDeviceSharding(target)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
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
            kernels = [_detailed(path) for path in sorted(folder.glob("*.ptxas"))]
        else:
            text = (folder / "output").read_text(errors="replace")
            starts = [m.start() for m in re.finditer("ptxas info .*Compiling entry", text)]
            ends = [*starts[1:], len(text)]
            kernels = [_assembled(text[i:j]) for i, j in zip(starts, ends, strict=True)]
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
def _environment(**settings: str):
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
def _output_to(path: pathlib.Path):
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
    name = re.search(r"entry function '([^']+)' for '([^']+)'", text)
    number = lambda pattern: int(re.search(pattern, text)[1])
    return Kernel(
        name[1],
        name[2],
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
    )


def _detailed(ptxas: pathlib.Path) -> Kernel:
    passes = ptxas.with_suffix(".mlir-passes.log").read_text(errors="replace")
    smem = re.search(r"mosaic_gpu\.smem_bytes = (\d+)", passes)
    sass = [p for p in (ptxas.with_suffix(s) for s in (".sass_ctrl", ".sass")) if p.exists()]
    ops = None
    if sass:
        found = re.findall(
            r"^.*?/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", sass[0].read_text(), re.M
        )
        ops = dict(collections.Counter(found))
    return dataclasses.replace(
        _assembled(ptxas.read_text()), smem_bytes=int(smem[1]) if smem else None, ops=ops
    )
