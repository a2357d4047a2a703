"""Factors of kernels that are outer products, exact where the kernel is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from lowrank._typing import Array
from lowrank.core.chain_algebra import level_exponent

SMALL_INTEGER = 1 << 24  # integers up to it are float32 numbers, and so are short sums of products


def outer_factors(kernel: Array, tolerance: float) -> tuple[Array, ...] | None:
    """Return one vector per axis whose outer product is a kernel, or None.

    Parameters
    ----------
    kernel : ndarray
        Kernel over any number of axes, finite.
    tolerance : float
        Largest relative Frobenius error of the outer product.

    Returns
    -------
    tuple of ndarray or None
        float64 vectors; that of an axis with one tap is 1.  Those of a kernel of integers, times
        any number, are integers but for the last, which has the factor: their sums are exact as
        those of the kernel are.

    Notes
    -----
    An outer product is the product of its fibres through any entry, divided by powers of the
    entry.  The largest entry keeps rounding errors small.  O(taps) but for one comparison.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.filters.factors import outer_factors
    >>> sobel = np.outer([1, 2, 1], [-1, 0, 1]) / 8
    >>> [f.tolist() for f in outer_factors(sobel, 0.0)]
    [[1.0, 2.0, 1.0], [-0.125, 0.0, 0.125]]
    >>> outer_factors(np.eye(3), 1e-6) is None
    True
    """
    k = np.asarray(kernel, np.float64)
    at = [int(i) for i in np.unravel_index(int(np.abs(k).argmax()), k.shape)]
    pivot = float(k[tuple(at)])
    if not pivot:
        return tuple(np.zeros(n) for n in k.shape)
    fibres: list[Array] = []
    for axis in range(k.ndim):
        index: list[int | slice] = [*at]
        index[axis] = slice(None)
        fibres.append(k[tuple(index)])
    exact = _integer_factors(fibres, at)
    if exact is not None and np.array_equal(outer_product(exact), k):
        return exact
    scaled = _last_long(k.shape)
    factors = tuple(f if axis == scaled else f / pivot for axis, f in enumerate(fibres))
    # In units of the pivot: squares of small or large kernels neither underflow nor overflow.
    error = np.linalg.norm((outer_product(factors) - k) / pivot)
    return factors if error <= tolerance * np.linalg.norm(k / pivot) else None


def outer_product(factors: Sequence[Array]) -> Array:
    """Return the outer product of vectors."""
    return reduce(np.multiply.outer, factors)


def levelled(factors: Sequence[Array]) -> list[Array]:
    """Return factors of the same product, of which none but the last raises the largest sample."""
    exponents = [level_exponent(float(np.abs(f).sum())) for f in factors[:-1]]
    with np.errstate(over="ignore", under="ignore"):
        last = np.ldexp(factors[-1], sum(exponents))
        if not np.array_equal(np.ldexp(last, -sum(exponents)), factors[-1]):
            return list(factors)  # out of the range of float64
    return [*(np.ldexp(f, -e) for f, e in zip(factors[:-1], exponents)), last]


def _integer_factors(fibres: Sequence[Array], at: Sequence[int]) -> tuple[Array, ...] | None:
    """Return small integers proportional to the fibres, the last with the factor; or None."""
    vectors = []
    coefficient = float(fibres[0][at[0]])
    for fibre, i in zip(fibres, at):
        mantissas, exponents = np.frexp(fibre)
        least = int(exponents[mantissas != 0].min())
        if int(exponents.max()) - least > math.log2(SMALL_INTEGER):
            return None
        whole = [int(m * 2.0**53) << int(e - least) if m else 0
                 for m, e in zip(mantissas, exponents)]  # fmt: skip
        divisor = math.gcd(*whole) * (1 if whole[i] > 0 else -1)
        vector = np.array([n // divisor for n in whole], np.float64)
        if np.abs(vector).max() > SMALL_INTEGER:
            return None
        vectors.append(vector)
        coefficient /= vector[i]
    scaled = _last_long([len(f) for f in fibres])
    vectors[scaled] = vectors[scaled] * coefficient + 0.0  # no negative zeros
    return tuple(vectors)


def _last_long(taps: Sequence[int]) -> int:
    """Return the last axis with more than one tap, or the last one."""
    return max((axis for axis, n in enumerate(taps) if n > 1), default=len(taps) - 1)
