"""The chip that a program is traced for, where that is known."""

from typing import Any

from jax.experimental.pallas import tpu as pltpu

# The least of all generations, for a program that is traced before its chip is known.
LEAST_VMEM_BYTES = 16 << 20
LEAST_MATRIX_UNIT = 128


def vmem_bytes() -> int:
    """VMEM of a core: of the abstract mesh's chip, or the default device's, or of any."""
    info = _info()
    return LEAST_VMEM_BYTES if info is None else info.vmem_capacity_bytes


def matrix_unit() -> int:
    """Columns of a matrix unit, of the same chip."""
    info = _info()
    return LEAST_MATRIX_UNIT if info is None else info.mxu_column_size


def _info() -> Any:
    try:
        return pltpu.get_tpu_info()
    except ValueError:  # no TPU in sight
        return None
