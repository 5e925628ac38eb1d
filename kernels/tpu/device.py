"""The chip that a program is traced for, where that is known."""

from jax.experimental.pallas import tpu as pltpu

# The least of all generations, for a program that is traced before its chip is known.
LEAST_VMEM_BYTES = 16 << 20


def vmem_bytes() -> int:
    """VMEM of a core: of the abstract mesh's chip, or the default device's, or of any."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU in sight
        return LEAST_VMEM_BYTES
