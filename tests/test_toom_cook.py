"""Toom-Cook algorithms: exact matrices, their C code and their predicted error."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lowrank._kernels import toom_cook

# All that the points allow: more outputs, taps or both need an eighth finite point.
PAIRS = [(m, r) for m, r in itertools.product(range(1, 9), repeat=2) if m + r <= 9]


def as_floats(matrix):
    return np.array([[float(x) for x in row] for row in matrix])


@pytest.mark.parametrize(("outputs", "taps"), PAIRS)
def test_algorithms_are_exact_correlations(outputs, taps):
    # y_j = sum_k g_k d_(j + k) for all g and d: an identity of trilinear forms, in fractions.
    a, g, b = toom_cook.matrices(outputs, taps)
    n = outputs + taps - 1
    assert (len(a), len(g), len(b)) == (outputs, n, n)
    for j, k, i in itertools.product(range(outputs), range(taps), range(n)):
        product = sum((a[j][t] * g[t][k] * b[t][i] for t in range(n)), start=Fraction(0))
        assert product == (i == j + k)


def test_kernels_have_the_exported_algorithms():
    assert set(toom_cook.ALGORITHMS) <= set(PAIRS)
    kernels = Path(__file__).parents[1] / "lowrank" / "_kernels"
    committed = (kernels / "transforms.inc").read_text()
    assert committed == toom_cook.source()


@pytest.mark.parametrize("pair", [(0, 3), (3, 0), (-1, 3), (7, 3), (1, 9)])
def test_rejects_sizes_without_points(pair):
    with pytest.raises(ValueError, match=r"outputs \+ taps must be 2 to 9, got -?\d \+ -?\d"):
        toom_cook.matrices(*pair)


@pytest.mark.parametrize("pair", toom_cook.ALGORITHMS)
def test_error_gain_is_that_of_random_rounding_errors(rng, pair):
    # Every product gets an independent relative error of unit variance.
    a, g, b = (as_floats(m) for m in toom_cook.matrices(*pair))
    trials, (outputs, taps) = 200_000, pair
    products = rng.standard_normal((trials, taps)) @ g.T
    products *= rng.standard_normal((trials, outputs + taps - 1)) @ b.T
    error = (products * rng.standard_normal(products.shape)) @ a.T
    gain = np.sqrt((error**2).mean(axis=0) / taps).max()
    # Fourth moments of products of normal variables: about 1 % standard error.
    assert toom_cook.error_gain(*pair) == pytest.approx(gain, rel=0.03)


def test_correlation_without_transforms_amplifies_nothing():
    assert toom_cook.error_gain(1, 1) == 1
