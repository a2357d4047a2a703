"""Derivatives of images at a scale: gradients, Hessians and Laplacians of Gaussians."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.geometry import as_integers
from lowrank.core.threads import as_threads
from lowrank.filters import bank, inputs
from lowrank.filters.shared import KEPT, Factors

MAX_RADIUS = 1 << 20  # samples: taps of all axes fit into a few megabytes


def gaussian_derivatives(
    image: Any,
    sigma: float | Sequence[float],
    orders: Sequence[Sequence[int]],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Compute several derivatives of an image that a Gaussian smooths.

    Passes that derivatives have in common run once.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes; bool counts as 0 and 1.  A Dask array gives a lazy one, a
        DataArray an array without its names.
    sigma : float or sequence of float
        Standard deviation of the Gaussian in the unit of `spacing`, above 0: one for all axes, or
        one per axis.
    orders : sequence of sequence of int
        Derivatives, each by its orders along `axes`: ``[(0, 1), (2, 0)]`` for
        :math:`\partial_x` and :math:`\partial_y^2` of an image indexed (y, x).
    spacing : float or sequence of float
        Distance between samples, above 0: one for all axes, or one per axis.  Derivatives are per
        unit of it.
    mode : str or sequence of str
        Border mode by scipy.ndimage's names, one for all axes or one per axis; see
        :func:`correlate`.
    cval : float
        Border value of mode ``"constant"``: the image has it everywhere outside.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.  Along others, such as colours or time, images are
        independent.
    truncate : float
        Truncation radius of the Gaussian in standard deviations, above 0.
    dtype : dtype, optional
        float32 or float64, of the computation and the result.  By default float32 for float32,
        float16, bool and integers of up to 16 bits, else float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape (len(orders), \*image.shape)
        Derivatives in the order of `orders`.

    Raises
    ------
    TypeError
        If `image` is complex, masked, on a GPU or in a file, or an argument is of another type.
    ValueError
        If an argument is out of range, has another length than `axes`, or the truncated Gaussian
        has a single tap.

    Notes
    -----
    With `spacing` 1, ``scipy.ndimage.gaussian_filter(image, sigma, order=order)`` is the same for
    each derivative, except beyond borders of mode ``"constant"`` with another `cval` than 0, with
    which SciPy fills the border of every pass anew.

    Taps are samples of the derivatives of the Gaussian, normalised to sum 1 before derivation.  At
    ``truncate=4`` slopes come out up to 0.1 % too small and second derivatives 0.9 %, and an image
    of the constant c has second derivatives of up to -0.001 c / sigma**2; ``truncate=6`` divides
    these errors by 10**4.  Gaussians below 0.7 samples are sampled too coarsely: slopes are 14 %
    too small at 0.5.

    Memory: the image in `dtype`, the result, and a few planes.  Some images are filtered pass by
    pass, on one thread, with an intermediate result per axis: those of up to 65,536 samples, with a
    last axis shorter than 16, with other filtered axes than the last three, or shorter than the
    Gaussian.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> y, x = np.mgrid[:40, :60]
    >>> d = filters.gaussian_derivatives(3.0 * y + x**2, 1.0, [(1, 0), (0, 2)], truncate=6)
    >>> d[:, 20, 30].round(3)
    array([3., 2.])
    """
    x, dtype = inputs.as_samples(image, dtype)
    along = inputs.as_filtered_axes(axes, x.ndim)
    n = len(along)
    border = inputs.as_border(mode, cval, n)
    threads = as_threads(threads)
    wanted = [as_integers("orders", o, n) for o in inputs.as_sequence_of("orders", orders)]
    if n > 1 and any(np.ndim(o) == 0 for o in orders):
        raise ValueError(f"orders must be sequences of one order per axis, {n}, got {orders!r}")
    if min(map(min, wanted)) < 0:
        raise ValueError(f"orders must not be negative, got {orders!r}")
    kernels = [gaussian_taps("sigma", sigma, spacing, truncate, o) for o in wanted]
    return bank.filter_shared(x, kernels, along, border, dtype, threads)


def gaussian_taps(name: str, sigma: Any, spacing: Any, truncate: Any, orders: Ints) -> Factors:
    """Return the taps of a derivative of a Gaussian along each axis.

    Parameters
    ----------
    name : str
        Name of the argument `sigma`, for messages.
    sigma, spacing : float or sequence of float
        Standard deviation and distance between samples, one for all axes or one per axis.
    truncate : float
        Truncation radius in standard deviations.
    orders : tuple of int
        Order of the derivative along each axis.

    Returns
    -------
    tuple of bytes
        float64 taps, in the order of a correlation.

    Raises
    ------
    ValueError
        If an argument is out of range, or a truncated Gaussian has a single tap.
    """
    n = len(orders)
    (reach,) = inputs.as_positive("truncate", truncate, 1)
    sigmas = inputs.as_positive(name, sigma, n)
    distances = inputs.as_positive("spacing", spacing, n)
    for s, h in zip(sigmas, distances):
        given = f"with truncate {reach:g} and spacing {h:g}, got {s!r}"
        if reach * s < 0.5 * h:
            raise ValueError(
                f"{name} must be at least {0.5 * h / reach:.3g} {given}: the Gaussian would have "
                "a single tap"
            )
        if reach * s > MAX_RADIUS * h:
            raise ValueError(
                f"{name} must be at most {MAX_RADIUS * h / reach:.3g} {given}: the Gaussian would "
                "have millions of taps"
            )
    return tuple(_line(s / h, order, h, reach) for s, h, order in zip(sigmas, distances, orders))


@functools.lru_cache(KEPT)
def _line(sigma: float, order: int, spacing: float, truncate: float) -> bytes:
    """Return the taps of a derivative of a Gaussian, `sigma` in samples, per unit of `spacing`."""
    n = int(truncate * sigma + 0.5)
    t = np.arange(-n, n + 1) / sigma
    g = np.exp(-0.5 * t**2)
    # The n-th derivative of a Gaussian is (-1)^n He_n(t) times it; a correlation flips it.
    hermite = np.polynomial.hermite_e.hermeval(t, [0.0] * order + [1.0])
    return np.asarray(hermite * g / (g.sum() * (sigma * spacing) ** order)).tobytes()


def gradient(
    image: Any,
    sigma: float | Sequence[float],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Compute the gradient of an image that a Gaussian smooths.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes.
    sigma : float or sequence of float
        Standard deviation of the Gaussian in the unit of `spacing`, one for all axes or one per
        axis; this and the following as for :func:`gaussian_derivatives`.
    spacing : float or sequence of float
        Distance between samples.
    mode : str or sequence of str
        Border mode, one for all axes or one per axis.
    cval : float
        Border value of mode ``"constant"``.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.
    truncate : float
        Truncation radius in standard deviations.
    dtype : dtype, optional
        float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape (n, \*image.shape)
        First derivatives along the n `axes`, in their order, per unit of `spacing`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; see :func:`gaussian_derivatives`.

    Notes
    -----
    ``numpy.gradient`` and ``skimage.filters.sobel`` take differences of neighbours instead, which
    amplify noise.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> heights = np.add.outer(3.0 * np.arange(50), 4.0 * np.arange(60))
    >>> dy, dx = filters.gradient(heights, 1.0, spacing=[0.5, 0.25], truncate=6)
    >>> dy[25, 30].round(3), dx[25, 30].round(3)
    (np.float64(6.0), np.float64(16.0))
    """
    return _derive(
        image, sigma, first_orders, spacing=spacing, mode=mode, cval=cval, axes=axes,
        truncate=truncate, dtype=dtype, threads=threads,
    )  # fmt: skip


def gradient_magnitude(
    image: Any,
    sigma: float | Sequence[float],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    """Compute the length of the gradient of an image that a Gaussian smooths.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes.
    sigma : float or sequence of float
        Standard deviation of the Gaussian in the unit of `spacing`, one for all axes or one per
        axis; this and the following as for :func:`gaussian_derivatives`.
    spacing : float or sequence of float
        Distance between samples.
    mode : str or sequence of str
        Border mode, one for all axes or one per axis.
    cval : float
        Border value of mode ``"constant"``.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.
    truncate : float
        Truncation radius in standard deviations.
    dtype : dtype, optional
        float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape of `image`
        Length of the gradient, per unit of `spacing`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; see :func:`gaussian_derivatives`.

    Notes
    -----
    Memory: that of :func:`gradient` and the result.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> heights = np.add.outer(3.0 * np.arange(50), 4.0 * np.arange(60))
    >>> float(filters.gradient_magnitude(heights, 1.0, truncate=6)[25, 30].round(3))
    5.0
    """
    slopes = gradient(
        image, sigma, spacing=spacing, mode=mode, cval=cval, axes=axes, truncate=truncate,
        dtype=dtype, threads=threads,
    )  # fmt: skip
    return functools.reduce(np.hypot, slopes[1:], np.abs(slopes[0]))


def hessian(
    image: Any,
    sigma: float | Sequence[float],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Compute all second derivatives of an image that a Gaussian smooths.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes.
    sigma : float or sequence of float
        Standard deviation of the Gaussian in the unit of `spacing`, one for all axes or one per
        axis; this and the following as for :func:`gaussian_derivatives`.
    spacing : float or sequence of float
        Distance between samples.
    mode : str or sequence of str
        Border mode, one for all axes or one per axis.
    cval : float
        Border value of mode ``"constant"``.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.
    truncate : float
        Truncation radius in standard deviations.
    dtype : dtype, optional
        float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape (n * (n + 1) / 2, \*image.shape)
        Upper triangle of the symmetric matrix, row by row, per squared unit of `spacing`: for a
        volume indexed (z, y, x) zz, zy, zx, yy, yx and xx.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; see :func:`gaussian_derivatives`.

    Notes
    -----
    The order is that of ``skimage.feature.hessian_matrix(order="rc")`` and of ITK's tensors.  The
    functions of scikit-image that take its list, such as ``hessian_matrix_eigvals``, take the
    result, and so does :func:`symmetric_eigenvalues`.  ``h[[[0, 1, 2], [1, 3, 4], [2, 4, 5]]]`` is
    the full matrix of a volume, its two axes first.

    Values are those of ``scipy.ndimage.gaussian_filter`` with `order`.  ``hessian_matrix`` of
    scikit-image differs: by default it takes differences of a smoothed image, twice with
    ``numpy.gradient``, whose response falls off at scales below about 2 samples and whose edges are
    one-sided; with ``use_gaussian_derivatives=True`` it filters twice by first derivatives of
    Gaussians of ``sigma / sqrt(2)``, truncated at 8 of these, which is the same but for the
    sampling of Gaussians below about 1 sample, and for the truncation.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> y, x = np.mgrid[:50, :60]
    >>> h = filters.hessian(2.0 * y * x + x**2, 1.5, truncate=6)
    >>> h[:, 25, 30].round(3) + 0.0
    array([0., 2., 2.])
    """
    return _derive(
        image, sigma, _second_orders, spacing=spacing, mode=mode, cval=cval, axes=axes,
        truncate=truncate, dtype=dtype, threads=threads,
    )  # fmt: skip


def gaussian_laplace(
    image: Any,
    sigma: float | Sequence[float],
    *,
    spacing: float | Sequence[float] = 1.0,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: int | Sequence[int] | None = None,
    truncate: float = 4.0,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    """Compute the Laplacian of an image that a Gaussian smooths: the sum of second derivatives.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes.
    sigma : float or sequence of float
        Standard deviation of the Gaussian in the unit of `spacing`, one for all axes or one per
        axis; this and the following as for :func:`gaussian_derivatives`.
    spacing : float or sequence of float
        Distance between samples.
    mode : str or sequence of str
        Border mode, one for all axes or one per axis.
    cval : float
        Border value of mode ``"constant"``.
    axes : int or sequence of int, optional
        Axes of the derivatives, all by default.
    truncate : float
        Truncation radius in standard deviations.
    dtype : dtype, optional
        float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape of `image`
        Laplacian along `axes`, per squared unit of `spacing`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; see :func:`gaussian_derivatives`.

    Notes
    -----
    Values are those of ``scipy.ndimage.gaussian_laplace``.  The kernel :func:`log` sums to 0, so
    that constant images give 0 at any `truncate`.

    Memory: the image, one result per axis, and their sum.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> y, x = np.mgrid[:50, :60]
    >>> float(filters.gaussian_laplace(y**2 + 3 * x**2, 1.5, truncate=6)[25, 30].round(3))
    8.0
    """
    terms = _derive(
        image, sigma, _pure_second_orders, spacing=spacing, mode=mode, cval=cval, axes=axes,
        truncate=truncate, dtype=dtype, threads=threads,
    )  # fmt: skip
    result: Array = terms.sum(axis=0)
    return result


def _derive(
    image: Any,
    sigma: Any,
    orders: Callable[[int], list[Ints]],
    *,
    axes: Any,
    dtype: Any,
    **options: Any,
) -> Array:
    """Compute the derivatives whose orders depend on the number of axes."""
    x, dtype = inputs.as_samples(image, dtype)
    n = len(inputs.as_filtered_axes(axes, x.ndim))
    return gaussian_derivatives(x, sigma, orders(n), axes=axes, dtype=dtype, **options)


def first_orders(n: int) -> list[Ints]:
    """Return the orders of a gradient."""
    return [tuple(int(a == b) for b in range(n)) for a in range(n)]


def _pure_second_orders(n: int) -> list[Ints]:
    """Return the orders on the diagonal of a Hessian."""
    return [tuple(2 * k for k in order) for order in first_orders(n)]


def _second_orders(n: int) -> list[Ints]:
    """Return the orders in the upper triangle of a Hessian, row by row."""
    pairs = itertools.combinations_with_replacement(first_orders(n), 2)
    return [tuple(map(sum, zip(a, b))) for a, b in pairs]
