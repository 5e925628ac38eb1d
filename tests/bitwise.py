"""Equality of bits, NaN and its payload included."""

import jax
import numpy as np


def assert_same_bits(actual, expected):
    """Every array of two pytrees has the same dtype, shape and bits."""
    actual_leaves, tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert tree == expected_tree
    for i, (a, b) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"array {i}"
        if a.tobytes() == b.tobytes():
            continue
        rows = [np.ascontiguousarray(x).reshape(-1).view(f"u{x.itemsize}") for x in (a, b)]
        wrong = np.flatnonzero(rows[0] != rows[1])
        at = tuple(map(int, np.unravel_index(wrong[0], a.shape)))
        raise AssertionError(
            f"array {i} of {a.dtype}{a.shape}: {len(wrong)} elements differ, the first at {at}: "
            f"{a[at]} and not {b[at]}"
        )
