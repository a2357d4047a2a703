"""Structure tensors, and the eigenvalues of symmetric matrices at every sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core.threads import as_threads
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, bank, inputs
from lowrank.filters.derivatives import first_orders, gaussian_taps
from lowrank.filters.shared import Border

BLOCK = 1 << 13  # matrices whose elements stay in the L2 cache
EPS = float(np.finfo(np.float64).eps)
SWEEPS = 16  # Jacobi's method converges quadratically: matrices of 3 rows take 4 or 5


def structure_tensor(
    image: Any,
    sigma: float | Sequence[float],
    rho: float | Sequence[float],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Compute the structure tensor: products of the gradient's components, smoothed.

    .. math:: J = G_\rho * (\nabla f_\sigma \, \nabla f_\sigma^T)

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes.
    sigma : float or sequence of float
        Standard deviation of the Gaussian ahead of the gradient, in the unit of `spacing`: the
        scale of noise, one for all axes or one per axis.
    rho : float or sequence of float
        Standard deviation of the Gaussian that smooths the products, in the same unit: the scale
        of the structures, one for all axes or one per axis.
    spacing : float or sequence of float
        Distance between samples; this and the following as for :func:`gaussian_derivatives`.
    mode : str or sequence of str
        Border mode of the image and of the products, one for all axes or one per axis.
    cval : float
        Border value of the image in mode ``"constant"``; that of the products is 0.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.
    truncate : float
        Truncation radius of both Gaussians in standard deviations.
    dtype : dtype, optional
        float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape (n * (n + 1) / 2, \*image.shape)
        Upper triangle of the symmetric matrix, row by row, as for :func:`hessian`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; see :func:`gaussian_derivatives`.

    Notes
    -----
    ``skimage.feature.structure_tensor`` has Sobel differences, not divided by 8 or 32, in the place
    of derivatives at scale `sigma`; its `sigma` is `rho` here.

    Memory: the image, one product, and the result.

    References
    ----------
    .. [1] J. Weickert, "Anisotropic diffusion in image processing", Teubner, 1998, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> y, x = np.mgrid[:60, :60]
    >>> waves = np.sin(0.5 * (y + x))
    >>> j = filters.structure_tensor(waves, 1.0, 5.0)
    >>> largest, smallest = filters.symmetric_eigenvalues(j)[:, 30, 30]
    >>> bool(smallest < 0.001 * largest)  # waves of one direction
    True
    """
    x, dtype = inputs.as_samples(image, dtype)
    along = inputs.as_filtered_axes(axes, x.ndim)
    n = len(along)
    border = inputs.as_border(mode, cval, n)
    threads = as_threads(threads)
    kernels = [gaussian_taps("sigma", sigma, spacing, truncate, o) for o in first_orders(n)]
    smooth = [gaussian_taps("rho", rho, spacing, truncate, (0,) * n)]
    pairs = list(itertools.combinations_with_replacement(range(n), 2))
    zero = Border(border.modes, 0.0)  # of the products
    if chunked.is_dask_array(x):
        slopes = bank.filter_shared(x, kernels, along, border, dtype, threads)
        return np.concatenate(
            [
                bank.filter_shared(slopes[i] * slopes[j], smooth, along, zero, dtype, threads)
                for i, j in pairs
            ]
        )
    # The gradient lies in the last places of the result.  Row i of the matrix is the last to read
    # component i, and ends at or before its place.
    out = np.empty((len(pairs), *x.shape), dtype)
    slopes = bank.filter_shared(x, kernels, along, border, dtype, threads, out[-n:])
    product = np.empty(x.shape, dtype)
    for k, (i, j) in enumerate(pairs):
        np.multiply(slopes[i], slopes[j], out=product)
        bank.filter_shared(product, smooth, along, zero, dtype, threads, out[k : k + 1])
    return out


def symmetric_eigenvalues(elements: Any) -> Array:
    r"""Compute the eigenvalues of a symmetric matrix at every sample.

    Parameters
    ----------
    elements : array_like, shape (n * (n + 1) / 2, \*shape)
        Upper triangles, row by row, as :func:`hessian` and :func:`structure_tensor` return them.

    Returns
    -------
    ndarray, shape (n, \*shape)
        Eigenvalues in decreasing order; float32 for float32 elements, else float64.

    Raises
    ------
    TypeError, ValueError
        If `elements` are not real, or their number is not 1, 3, 6, 10 and so on.

    Notes
    -----
    Computed in float64 by Jacobi's method: errors are a few roundings of the matrix's norm, also
    where eigenvalues nearly coincide.  float32 matrices of three rows are computed by the roots of
    their characteristic polynomials, which are exact to float32's rounding.  The order is that of
    ``skimage.feature.hessian_matrix_eigvals``, the opposite of ``numpy.linalg.eigvalsh``.

    For a Dask array call ``elements.map_blocks``.

    References
    ----------
    .. [1] G. H. Golub, C. F. Van Loan, "Matrix computations", 4th ed., 2013, section 8.5.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> filters.symmetric_eigenvalues([2.0, 1.0, 2.0])
    array([3., 1.])
    """
    if chunked.is_dask_array(elements):
        raise TypeError("elements must be a NumPy array, got a Dask array: use its map_blocks")
    values = arguments.as_array("elements", elements)
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise TypeError(f"elements must be real, got {values.dtype}")
    count = len(values) if values.ndim else 0
    n = (math.isqrt(8 * count + 1) - 1) // 2
    if n * (n + 1) // 2 != count or not n:
        raise ValueError(f"elements must number 1, 3, 6, 10 or n * (n + 1) / 2, got {count}")
    dtype = np.float32 if values.dtype == np.float32 else np.float64
    out = np.empty((n, *values.shape[1:]), dtype)
    flat, result = values.reshape(count, -1), out.reshape(n, -1)
    compute = _roots_of_cubics if n == 3 and dtype == np.float32 else _diagonalise
    for start in range(0, flat.shape[1], BLOCK):
        at = slice(start, start + BLOCK)
        with np.errstate(invalid="ignore"):  # NaN and infinities give NaN
            result[:, at] = compute(flat[:, at].astype(np.float64), n)
    return out


def _roots_of_cubics(elements: Array, n: int) -> Array:
    """Return the eigenvalues of 3x3 matrices as roots of their characteristic polynomials.

    Where two nearly coincide, the arc cosine loses half of the digits: 1e-8 of the norm are left,
    less than float32's rounding.
    """
    a00, a01, a02, a11, a12, a22 = elements
    mean = (a00 + a11 + a22) / 3
    b0, b1, b2 = a00 - mean, a11 - mean, a22 - mean
    s01, s02, s12 = a01 * a01, a02 * a02, a12 * a12
    squares = (b0 * b0 + b1 * b1 + b2 * b2 + 2 * (s01 + s02 + s12)) / 6
    radius = np.sqrt(squares)
    half = (b0 * (b1 * b2 - s12) - b1 * s02 - b2 * s01) / 2 + a01 * a02 * a12  # of a determinant
    cube = squares * radius
    angle = np.arccos(np.clip(half / (cube + (cube == 0)), -1, 1)) / 3
    largest = mean + 2 * radius * np.cos(angle)
    smallest = mean + 2 * radius * np.cos(angle + 2 * math.pi / 3)
    return np.array([largest, 3 * mean - largest - smallest, smallest])


def _diagonalise(elements: Array, n: int) -> Array:
    """Return the eigenvalues of upper triangles by Jacobi's method, in decreasing order."""
    # In units of a power of two, so that squares neither overflow nor underflow.
    _, exponents = np.frexp(np.abs(elements).max(axis=0))
    elements = np.ldexp(elements, -exponents)
    pairs = list(itertools.combinations_with_replacement(range(n), 2))
    a = dict(zip(pairs, elements))
    a |= {(j, i): row for (i, j), row in a.items()}
    off = [(i, j) for i, j in pairs if i != j]
    for _ in range(SWEEPS):
        for p, q in off:
            _rotate(a, p, q, [r for r in range(n) if r not in (p, q)])
        if not any((np.abs(a[pair]) > EPS).any() for pair in off):
            break
    diagonal = np.sort(np.array([a[i, i] for i in range(n)]), axis=0)[::-1]
    result: Array = np.ldexp(diagonal, exponents)
    return result


def _rotate(a: dict[tuple[int, int], Array], p: int, q: int, others: Sequence[int]) -> None:
    """Rotate rows and columns p and q so that their common element vanishes."""
    difference, twice = a[q, q] - a[p, p], 2 * a[p, q]
    root = np.sqrt(difference * difference + twice * twice)
    denominator = np.where(difference < 0, difference - root, difference + root)
    denominator += denominator == 0  # both are zero: no rotation
    tangent = twice / denominator
    shift = tangent * a[p, q]
    a[p, p][...] -= shift
    a[q, q][...] += shift
    a[p, q][...] = 0
    if not others:
        return
    cosine = 1 / np.sqrt(tangent * tangent + 1)
    sine = tangent * cosine
    for r in others:
        first = cosine * a[r, p] - sine * a[r, q]
        a[r, q][...] = sine * a[r, p] + cosine * a[r, q]
        a[r, p][...] = first
