"""Combinations of parameters: each value of each list runs in `make test`, all combinations in `make soak`."""

import itertools

import pytest


def each_value(*lists):
    """Return the product of lists as parameters.

    Those in which more than one value is not the first of its list run in `make soak` alone: a value that acts by
    itself is tested with the first values of the other lists.
    """
    firsts = [next(iter(values)) for values in lists]
    rows = []
    for row in itertools.product(*lists):
        others = sum(value is not first for value, first in zip(row, firsts, strict=True))
        rows.append(pytest.param(*row, marks=pytest.mark.soak(only=True) if others > 1 else ()))
    return rows
