"""What is known of the GPU that a program is traced for."""

import jax

H100_SMS = 132


def num_sms() -> int:
    """Its streaming multiprocessors; those of an H100 or H200 where no GPU is here."""
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device) and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    return getattr(device, "core_count", None) or H100_SMS
