"""Pallas Mosaic TPU kernels.

plan       sizes of tiles, and the VMEM they take
blocks     copies of cache blocks and of the table's slices
append     writes new tokens into the pools, in place
attention  one ragged kernel: decode, chunked prefill and mixed batches
"""


def unsupported_version() -> str | None:
    """Why this JAX cannot run the kernels of this folder; every JAX the package takes can."""
    return None
