"""What is known of the GPU that a program is traced for."""

from typing import Any

import jax

H100_SMS = 132
HOPPER = (9, 0)
NEEDS = {
    "attention": "9.0",  # wgmma, which no other has
    "append": "8.0 or later",
    "copies": "9.0 or later",  # an append by the tensor memory accelerator
}


def num_sms() -> int:
    """Its streaming multiprocessors; those of an H100 or H200 where no GPU is here."""
    return getattr(_device(), "core_count", None) or H100_SMS


def capability() -> tuple[int, int]:
    """Its compute capability; Hopper's where no GPU is here."""
    told = getattr(_device(), "compute_capability", None)
    if told is None:
        return HOPPER
    major, _, minor = str(told).partition(".")
    return int(major), int(minor or 0)


def lacks(what: str) -> str | None:
    """Why it has no kernel for "attention", "append", or one with "copies", and the way out."""
    here = capability()
    floor = (8, 0) if what == "append" else HOPPER
    if here == HOPPER or (what != "attention" and here >= floor):
        return None
    name = {"copies": "append of such rows"}.get(what, what)
    return (
        f"mosaic_gpu: the kernel of {name} needs compute capability {NEEDS[what]}, and this GPU "
        f'has {here[0]}.{here[1]}; use implementation="xla", or None, which does'
    )


def _device() -> Any:
    """The one that a program is compiled for, which need not be here."""
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device) and jax.default_backend() == "gpu":
        return jax.devices()[0]
    return device if isinstance(device, jax.Device) else None
