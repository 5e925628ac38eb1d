"""Pallas Mosaic GPU kernels for NVIDIA Hopper.

plan       sizes of tiles and rings, and the shared memory they take; no Pallas import
blocks     copies of cache blocks, matrix products, what is simulated and how
append     writes new tokens into the pools, in place
attention  tiles of query rows, the kernel, results per token
ragged     one kernel for decode, chunked prefill and mixed batches
"""

import jax

NEEDS_JAX = (0, 11, 2)


def unsupported_version() -> str | None:
    """Why this JAX cannot run the kernels of this folder, and the way out; None if it can."""
    if jax.__version_info__ >= NEEDS_JAX:
        return None
    needed = ".".join(map(str, NEEDS_JAX))
    return (
        f"the GPU kernels need jax >= {needed} (Python >= 3.12), and this is jax "
        f'{jax.__version__}; upgrade it, or use implementation="xla"'
    )
