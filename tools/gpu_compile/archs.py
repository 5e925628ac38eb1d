"""Devices to compile for, none of which needs to be here."""

import functools
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32


@dataclass(frozen=True)
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
    "A100": Arch(
        (8, 0), "NVIDIA A100-SXM4-80GB", 108, 166912, 167936, 84987740160, 2039000000000, 41943040,
        1.41,
    ),
    "L40S": Arch(
        (8, 9), "NVIDIA L40S", 142, 101376, 102400, 47810936832, 864000000000, 100663296, 2.52
    ),
}  # fmt: skip


def device(arch: str) -> Any:
    """A device to compile for; nothing can run on it."""
    return devices(arch, 1)[0]


@functools.cache
def devices(arch: str, count: int) -> Any:
    """The devices of one host, to compile for."""
    a = ARCHS[arch]
    major, minor = a.capability
    # instructions of one architecture alone; there are none before Hopper
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    config = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {THREADS_PER_SM}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {a.smem_per_block}
        shared_memory_per_core: {a.smem_per_sm} core_count: {a.num_sms} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: {REGISTERS_PER_SM} registers_per_block_limit: {REGISTERS_PER_SM}
        memory_bandwidth: {a.memory_bandwidth} l2_cache_size: {a.l2_bytes}
        clock_rate_ghz: {a.clock_ghz} device_memory_size: {a.memory_bytes} device_address_bits: 64
        cuda_compute_capability {{
          major: {major} minor: {minor} {features} }}
        name: "{a.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
      device_description_str: "{a.name}" """
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=config
    ).devices


def blocks_per_sm(arch: str, *, registers: int, threads: int, smem_bytes: int) -> int:
    """How many blocks an SM holds at once; shared memory of 1 KiB each is the system's."""
    per_warp = -(-registers * 32 // 256) * 256
    limits = (
        BLOCKS_PER_SM,
        THREADS_PER_SM // threads,
        REGISTERS_PER_SM // (per_warp * (threads // 32)),
        ARCHS[arch].smem_per_sm // (smem_bytes + 1024),
    )
    return min(limits)
