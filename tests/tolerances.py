"""How far a result may be from the truth, and why: the one table every test reads.

The bounds are for standard-normal inputs, whose outputs are below 5 in magnitude and whose lse is
below 20.  Bitwise comparisons have no row: pools after an append, a copy or a scrub, and results
that must not change when poison, schedule or block order does.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    atol: float
    rtol: float
    reason: str


TOLERANCES = {
    "reference float32": Tolerance(
        2e-5,
        0.0,
        "float32 scores, weights and sums: about 30 roundings of 6e-8 of values up to 20",
    ),
    "reference bfloat16": Tolerance(
        2e-5, 2.0**-8, "float32 inside, one rounding to 8 bits at the end"
    ),
    "reference float16": Tolerance(
        2e-5, 2.0**-11, "float32 inside, one rounding to 11 bits at the end"
    ),
    "kernel float32": Tolerance(2e-5, 0.0, "as the reference: float32 throughout"),
    "kernel bfloat16": Tolerance(
        2e-2,
        2.0**-8,
        "query and weights are rounded to 8 bits before their products: 5 sigma of 2**-9 per "
        "score, and 2**-9 of the weighted values",
    ),
    "kernel float16": Tolerance(2.5e-3, 2.0**-11, "as bfloat16 with 11 bits: eight times tighter"),
    "kernel lse": Tolerance(
        2e-2, 0.0, "the log of a sum follows the worst score: 5 sigma of 2**-9 of a rounded query"
    ),
    "merge": Tolerance(1e-5, 0.0, "a few float32 roundings of states of order 1"),
    "gradient": Tolerance(
        2e-4,
        2e-4,
        "float32 derivative against a float64 one: each entry sums up to 10**3 products of order 1",
    ),
    "model float32": Tolerance(
        1e-4,
        0.0,
        "logits up to 20, after two layers of float32 sums of up to 384 products each",
    ),
    "model bfloat16": Tolerance(
        2e-2,
        3 * 2.0**-7,
        "three layers of 'kernel bfloat16', each added to what is rounded to 8 bits: a last bit",
    ),
    "hand": Tolerance(1e-6, 1e-6, "one float32 softmax of at most four terms"),
}


def tolerance(name):
    """The `atol` and `rtol` of a row, as keyword arguments of numpy's assert_allclose."""
    row = TOLERANCES[name]
    return {"atol": row.atol, "rtol": row.rtol}


def of_output(implementation, dtype, num_roundings=1):
    """The row for `out` in `dtype`: `implementation` is 'reference' or 'kernel'.

    Sinks are applied to a rounded result and round it again: `num_roundings=2`.
    """
    row = tolerance(f"{implementation} {np.dtype(dtype).name}")
    return {**row, "rtol": num_roundings * row["rtol"]}
