"""Few rows of a table of choices in which most pairs of values meet."""

import itertools

import numpy as np


def pairs(row):
    return set(itertools.combinations(enumerate(row), 2))


def pairwise_rows(axes, num_rows):
    """Rows with a value of each axis, every one the best of many draws for pairs not yet seen."""
    rng = np.random.default_rng(0)
    draw = lambda: tuple(values[rng.integers(len(values))] for values in axes.values())
    rows, seen = [], set()
    for _ in range(num_rows):
        rows.append(max((draw() for _ in range(300)), key=lambda row: len(pairs(row) - seen)))
        seen |= pairs(rows[-1])
    return rows
