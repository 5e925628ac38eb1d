"""The device, the versions and the commit that figures belong to."""

import platform
import shutil
import subprocess
from pathlib import Path


def environment() -> dict[str, str]:
    import jax
    import jaxlib.version

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "python": platform.python_version(),
        "commit": _line_of(git) or "unknown",
    }


def gpu_environment() -> dict[str, str]:
    """The same of a GPU, with its driver and clocks where `nvidia-smi` tells."""
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    told = None
    if shutil.which("nvidia-smi"):
        told = _line_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    names = ("driver", "max_sm_clock", "max_memory_clock", "power_limit")
    values = told.split(", ") if told else ["unknown"] * len(names)
    return environment() | dict(zip(names, values, strict=True))


def _line_of(command: list[str]) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (run.stdout.splitlines() or [None])[0]
