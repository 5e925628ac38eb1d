"""Pallas Mosaic TPU kernels.

plan       sizes of tiles, and the VMEM they take
blocks     copies of cache blocks and of the table's slices
append     writes new tokens into the pools, in place
attention  picks a kernel; one that is ragged: any shape
mixed      a batch in two: sequences with one query token, and the others
decode     single query tokens: pipeline (the skewed step), decode_copies, decode_plan, worklist
prefill    many query tokens: prefill_step (the skewed items), prefill_prepare (relayout of a tile),
           prefill_visits (the order of tiles), prefill_plan
step_work  what is made once per step, for all layers
device     the chip that a program is traced for
"""


def unsupported_version() -> str | None:
    """Why this JAX cannot run the kernels of this folder; every JAX the package takes can."""
    return None
