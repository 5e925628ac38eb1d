"""Pallas Mosaic GPU kernels for NVIDIA Hopper.

device       what is known of the GPU that a program is traced for
plan         sizes of tiles and rings, and the shared memory they take; no Pallas import
decode_plan  the same for decode
worklist     which CTA has which tiles at decode, made once per step; no Pallas import
blocks       copies of cache blocks, matrix products, what is simulated and how
append       writes new tokens into the pools, in place
attention    picks kernels; tiles of query rows for the ragged one
step_work    lists made once per step, for all layers; no Pallas import
mixed        single query tokens of a packed batch to decode, the others to prefill
tile         one tile of keys and values: scores, softmax, product
decode       the kernel of one token per sequence, KV cut into equal shares
decode_append  new tokens, written by the kernel of decode
combine      the second kernel of decode: joins what was cut
ragged       one kernel for every packed batch that prefill does not take
prefill_*    the kernel of long packed batches
  plan       how queries and keys are cut; no Pallas import
  list       query tiles, those with the most keys first, made once per step; no Pallas import
  cta        what one CTA works with, and which items it has
  copies     the warps that copy
  step       the consumers: all tiles of keys of one item
prefill      the kernel itself, and where its results go
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
