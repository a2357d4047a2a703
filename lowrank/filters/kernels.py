"""Kernels of standard filters: blurs, derivatives, blob detectors and Gabor filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank._typing import Array
from lowrank.core.geometry import as_integers
from lowrank.filters.factors import outer_product
from lowrank.filters.outer import OuterProduct

Kernel = Array | OuterProduct


def gauss(
    sigma: float | Sequence[float],
    *,
    ndim: int = 2,
    truncate: float = 4.0,
    angle: float = 0.0,
) -> Kernel:
    r"""Return a Gaussian filter, optionally rotated; sums to 1.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation in samples, above 0: one for all axes, or one per axis.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Truncation radius in standard deviations.
    angle : float
        Rotation over two axes in radians, from the second axis towards the first.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        With ``n = int(truncate * sigma + 0.5)``, as in ``scipy.ndimage.gaussian_filter``; for a
        rotated Gaussian `sigma` is here its standard deviation along each axis of the image.

    Raises
    ------
    ValueError
        If `sigma` or `truncate` is not above 0, or `angle` is given for other than two axes.

    Notes
    -----
    The rank is 1, unless two different `sigma` are rotated off the axes: then

    .. math:: g(y, x) \propto e^{-(a y^2 + 2 b x y + c x^2) / 2}

    and by Mehler's formula the singular values decay as :math:`\rho^i` with
    :math:`\rho = (1 - \sqrt{1 - \beta^2}) / \beta` and :math:`\beta = |b| / \sqrt{a c}`: few
    terms suffice unless the Gaussian is long, thin and diagonal.

    References
    ----------
    .. [1] J.-M. Geusebroek, A. W. M. Smeulders, J. van de Weijer, "Fast anisotropic Gauss
       filtering", IEEE Transactions on Image Processing 12, 2003.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.gauss(1.0).shape, filters.gauss([1.0, 2.0, 2.0]).shape
    ((9, 9), (9, 17, 17))
    >>> rotated = filters.gauss([1.0, 2.0], angle=0.5)
    >>> filters.rank(rotated, tolerance=0.1), filters.rank(rotated, tolerance=0.001)
    (2, 6)
    """
    sigmas = [_positive("sigma", float(s)) for s in np.atleast_1d(sigma)]
    sigmas *= _checked_ndim(ndim) if np.ndim(sigma) == 0 else 1
    _positive("truncate", truncate)
    if not math.isfinite(angle) or (angle != 0 and len(sigmas) != 2):
        raise ValueError(f"angle must be finite, over two axes, got {angle!r} over {len(sigmas)}")
    if angle == 0 or sigmas[0] == sigmas[1]:  # rotation leaves an isotropic Gaussian as it is
        lines = [_gaussian(s, truncate) for s in sigmas]
        return OuterProduct([g / g.sum() for g in lines])
    s, c = math.sin(angle), math.cos(angle)
    extents = (math.hypot(sigmas[1] * s, sigmas[0] * c), math.hypot(sigmas[1] * c, sigmas[0] * s))
    y, x = _grid([int(truncate * r + 0.5) for r in extents])
    along, across = (x * c + y * s) / sigmas[1], (y * c - x * s) / sigmas[0]
    kernel = np.exp(-0.5 * (along**2 + across**2))
    return np.asarray(kernel / kernel.sum())


def box(size: int | Sequence[int], *, ndim: int = 2) -> Kernel:
    """Return a box filter (mean); rank 1, sums to 1.

    Parameters
    ----------
    size : int or sequence of int
        Number of samples, at least 1: one for all axes, or one per axis.
    ndim : int
        Number of axes, for a single `size`.

    Returns
    -------
    ndarray of float64, shape (size, ...)
        As in ``scipy.ndimage.uniform_filter``.

    Raises
    ------
    ValueError, TypeError
        If a `size` is not an integer, or below 1.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.box([1, 4])
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    sizes = as_integers(
        "size", size, _checked_ndim(ndim) if np.ndim(size) == 0 else len(np.atleast_1d(size))
    )
    if not sizes or min(sizes) < 1:
        raise ValueError(f"size must be at least 1, got {size!r}")
    lines = [np.ones(n) for n in sizes]
    lines[-1] /= math.prod(sizes)
    return OuterProduct(lines)


def sobel(axis: int = -1, *, ndim: int = 2) -> Kernel:
    """Return the Sobel derivative filter: a difference along one axis, smoothed along others.

    Parameters
    ----------
    axis : int
        Axis of the derivative.
    ndim : int
        Number of axes.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0; a slope of 1 gives 8 in two dimensions, as in ``scipy.ndimage.sobel``.

    Raises
    ------
    ValueError
        If `axis` is out of range.

    Notes
    -----
    Rank 1: (-1, 0, 1) along `axis`, (1, 2, 1) along the others.  ``skimage.filters.sobel`` divides
    these by 2 and by 4: by 8 in two dimensions.

    References
    ----------
    .. [1] I. Sobel, G. Feldman, "A 3x3 isotropic gradient operator for image processing", 1968.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.sobel()
    array([[-1.,  0.,  1.],
           [-2.,  0.,  2.],
           [-1.,  0.,  1.]])
    """
    return _difference((1.0, 2.0, 1.0), axis, ndim)


def prewitt(axis: int = -1, *, ndim: int = 2) -> Kernel:
    """Return the Prewitt derivative filter: a difference along one axis, a sum along others.

    Parameters
    ----------
    axis : int
        Axis of the derivative.
    ndim : int
        Number of axes.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0; a slope of 1 gives 6 in two dimensions, as in ``scipy.ndimage.prewitt``.

    Raises
    ------
    ValueError
        If `axis` is out of range.

    Notes
    -----
    Rank 1: (-1, 0, 1) along `axis`, (1, 1, 1) along the others.  ``skimage.filters.prewitt``
    divides these by 2 and by 3: by 6 in two dimensions.

    References
    ----------
    .. [1] J. M. S. Prewitt, "Object enhancement and extraction", Picture Processing and
       Psychopictorics, 1970.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.prewitt(0)
    array([[-1., -1., -1.],
           [ 0.,  0.,  0.],
           [ 1.,  1.,  1.]])
    """
    return _difference((1.0, 1.0, 1.0), axis, ndim)


def scharr(axis: int = -1, *, ndim: int = 2) -> Kernel:
    """Return the Scharr derivative filter, whose gradient direction is the most accurate at 3x3.

    Parameters
    ----------
    axis : int
        Axis of the derivative.
    ndim : int
        Number of axes.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0; a slope of 1 gives 32 in two dimensions, as in ``cv2.Scharr``.

    Raises
    ------
    ValueError
        If `axis` is out of range.

    Notes
    -----
    Rank 1: (-1, 0, 1) along `axis`, (3, 10, 3) along the others.  ``skimage.filters.scharr``
    divides these by 2 and by 16: by 32 in two dimensions.

    References
    ----------
    .. [1] H. Scharr, "Optimal operators in digital image processing", dissertation, University
       of Heidelberg, 2000.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.scharr()
    array([[ -3.,   0.,   3.],
           [-10.,   0.,  10.],
           [ -3.,   0.,   3.]])
    """
    return _difference((3.0, 10.0, 3.0), axis, ndim)


def laplacian(*, ndim: int = 2, connectivity: int = 1) -> Array:
    r"""Return the Laplacian stencil of 3 samples per axis.

    Parameters
    ----------
    ndim : int
        Number of axes.
    connectivity : int
        Largest number of axes along which a neighbour differs from the centre: 1 for the stencil
        of ``2 * ndim + 1`` points, `ndim` for the full one.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0.  With `connectivity` 1 as in ``scipy.ndimage.laplace``; the full one is
        ``3 ** (ndim - 1)`` times the Laplacian.

    Raises
    ------
    ValueError, TypeError
        If `ndim` is below 1, or `connectivity` not between 1 and `ndim`.

    Notes
    -----
    The plain stencil is a sum of `ndim` separable terms, :math:`\sum_a \delta \otimes \cdots
    \otimes (1, -2, 1)_a \otimes \cdots \otimes \delta`; the full one of two, a box and a point.
    Over two axes both have rank 2.

    References
    ----------
    .. [1] M. Abramowitz, I. A. Stegun, "Handbook of mathematical functions", 1964, 25.3.30 ff.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.laplacian()
    array([[ 0.,  1.,  0.],
           [ 1., -4.,  1.],
           [ 0.,  1.,  0.]])
    """
    ndim = _checked_ndim(ndim)
    (connectivity,) = as_integers("connectivity", connectivity, 1)
    if not 1 <= connectivity <= ndim:
        raise ValueError(f"connectivity must be from 1 to {ndim}, got {connectivity}")
    distance = np.abs(np.indices((3,) * ndim) - 1).sum(0)
    kernel = (distance <= connectivity).astype(float)
    kernel[(1,) * ndim] -= kernel.sum()
    return np.asarray(kernel)


def log(sigma: float, *, ndim: int = 2, truncate: float = 4.0) -> Array:
    """Return the Laplacian of a Gaussian: one separable term per axis.

    Parameters
    ----------
    sigma : float
        Standard deviation in samples, above 0.
    ndim : int
        Number of axes.
    truncate : float
        Truncation radius in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        Sums to 0.

    Raises
    ------
    ValueError
        If `sigma` or `truncate` is not above 0.

    References
    ----------
    .. [1] D. Marr, E. Hildreth, "Theory of edge detection", Proc. R. Soc. London B 207, 1980.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.rank(filters.log(2.0))
    2
    """
    g = _gaussian(_positive("sigma", sigma), _positive("truncate", truncate))
    t = np.arange(len(g)) - len(g) // 2
    second = (t**2 / sigma**2 - 1) / sigma**2 * g
    second -= second.mean() * g / g.mean()  # sums to 0, without a third term
    ndim = _checked_ndim(ndim)
    lines = [[second if a == axis else g for a in range(ndim)] for axis in range(ndim)]
    kernel = sum(outer_product(line) for line in lines) / g.sum() ** ndim
    return np.asarray(kernel)


def dog(
    sigma: float | Sequence[float],
    *,
    ratio: float = 1.6,
    ndim: int = 2,
    truncate: float = 4.0,
) -> Array:
    r"""Return a difference of Gaussians (band-pass): two separable terms.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation of the narrow Gaussian in samples, above 0: one for all axes, or one
        per axis.
    ratio : float
        Ratio of the wide to the narrow standard deviation, above 1.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Truncation radius of each Gaussian in its standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        As large as the wide Gaussian.  Sums to 0.

    Raises
    ------
    ValueError
        If `sigma` or `truncate` is not above 0, or `ratio` not above 1.

    Notes
    -----
    :math:`G_\sigma - G_{r \sigma}`, as in ``skimage.filters.difference_of_gaussians``.  With
    :math:`r = 1.6` it approximates the negative Laplacian of a Gaussian.

    References
    ----------
    .. [1] D. Marr, E. Hildreth, "Theory of edge detection", Proc. R. Soc. London B 207, 1980.

    Examples
    --------
    >>> from lowrank import filters
    >>> kernel = filters.dog(2.0)
    >>> kernel.shape, filters.rank(kernel)
    ((27, 27), 2)
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1, got {ratio!r}")
    narrow = gauss(sigma, ndim=ndim, truncate=truncate)
    wide = gauss(np.multiply(sigma, ratio), ndim=ndim, truncate=truncate)  # type: ignore[arg-type]
    margins = [((a - b) // 2,) * 2 for a, b in zip(wide.shape, narrow.shape)]
    return np.asarray(np.pad(narrow, margins) - wide)


def unsharp(
    sigma: float | Sequence[float],
    *,
    amount: float = 1.0,
    ndim: int = 2,
    truncate: float = 4.0,
) -> Array:
    r"""Return an unsharp mask, the image plus its amplified detail: two separable terms.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation of the Gaussian in samples, above 0: one for all axes, or one per axis.
    amount : float
        Gain of the detail, above 0.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Truncation radius of the Gaussian in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        Sums to 1.

    Raises
    ------
    ValueError
        If `sigma`, `amount` or `truncate` is not above 0.

    Notes
    -----
    :math:`\delta + a (\delta - G_\sigma)`, as in ``skimage.filters.unsharp_mask``, which clips
    the result to the image's range.

    References
    ----------
    .. [1] M. Petrou, C. Petrou, "Image processing: the fundamentals", 2nd ed., 2010, chapter 4.

    Examples
    --------
    >>> from lowrank import filters
    >>> kernel = filters.unsharp(2.0, amount=0.5)
    >>> round(float(kernel.sum()), 9), filters.rank(kernel)
    (1.0, 2)
    """
    kernel = -_positive("amount", amount) * gauss(sigma, ndim=ndim, truncate=truncate)
    kernel[tuple(n // 2 for n in kernel.shape)] += 1 + amount
    return np.asarray(kernel)


def gabor(
    sigma: float,
    wavelength: float,
    *,
    angle: float = 0.0,
    phase: float = 0.0,
    truncate: float = 3.0,
) -> Array:
    """Return a Gabor filter, a wave times a Gaussian: rank 1 along the axes, else 2.

    Parameters
    ----------
    sigma : float
        Standard deviation of the Gaussian in samples, above 0.
    wavelength : float
        Wavelength in samples, above 0.
    angle : float
        Direction of the wave in radians, from the second axis towards the first.
    phase : float
        Phase of the wave at the centre, in radians.
    truncate : float
        Truncation radius in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)
        Gaussian of sum 1 times a wave of amplitude 1.

    Raises
    ------
    ValueError
        If `sigma`, `wavelength` or `truncate` is not above 0.

    References
    ----------
    .. [1] J. G. Daugman, "Uncertainty relation for resolution in space, spatial frequency, and
       orientation optimized by two-dimensional visual cortical filters", J. Opt. Soc. Am. A 2,
       1985.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.rank(filters.gabor(3.0, 6.0, angle=0.5))
    2
    """
    g = _gaussian(_positive("sigma", sigma), _positive("truncate", truncate))
    y, x = _grid([len(g) // 2] * 2)
    along = x * math.cos(angle) + y * math.sin(angle)
    wave = np.cos(2 * math.pi * along / _positive("wavelength", wavelength) + phase)
    return np.asarray(np.outer(g, g) / g.sum() ** 2 * wave)


def disk(radius: float) -> Array:
    """Return a uniform disk (defocus blur); sums to 1, of high rank.

    Parameters
    ----------
    radius : float
        Radius in samples, above 0.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)
        With ``n = floor(radius)``.

    Raises
    ------
    ValueError
        If `radius` is not above 0.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.disk(1.0).round(1)
    array([[0. , 0.2, 0. ],
           [0.2, 0.2, 0.2],
           [0. , 0.2, 0. ]])
    """
    return _uniform_ball(radius, 2)


def ball(radius: float) -> Array:
    """Return a uniform ball, the disk of volumes; sums to 1, of high rank.

    Parameters
    ----------
    radius : float
        Radius in samples, above 0.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1, 2 * n + 1)
        With ``n = floor(radius)``; its support is ``skimage.morphology.ball``.

    Raises
    ------
    ValueError
        If `radius` is not above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> kernel = filters.ball(1.0)
    >>> kernel.shape, int(np.count_nonzero(kernel))
    ((3, 3, 3), 7)
    """
    return _uniform_ball(radius, 3)


def motion(length: int, *, angle: float = 0.0) -> Array:
    """Return a motion blur along a line; sums to 1, of rank 1 along the axes.

    Parameters
    ----------
    length : int
        Length of the line in samples, above 0.
    angle : float
        Angle of the line in radians, from the second axis towards the first.

    Returns
    -------
    ndarray of float64, shape (2 * m + 1, 2 * n + 1)
        As large as the line: a single row at angle 0.  For an even `length` both ends are half
        samples.

    Raises
    ------
    ValueError
        If `length` is not above 0, or `angle` not finite.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.motion(4)
    array([[0.125, 0.25 , 0.25 , 0.25 , 0.125]])
    """
    if not math.isfinite(angle):
        raise ValueError(f"angle must be finite, got {angle!r}")
    (length,) = as_integers("length", length, 1)
    n = math.ceil(_positive("length", length) / 2)
    n = max(n - (length % 2), 1)
    y, x = _grid([n, n])
    across = np.abs(-x * math.sin(angle) + y * math.cos(angle))
    along = np.abs(x * math.cos(angle) + y * math.sin(angle))
    line = np.clip(1 - across, 0, 1) * np.clip((length + 1) / 2 - along, 0, 1)
    line[line < 1e-9] = 0  # round-off of sines and cosines beside a line along an axis
    i, j = np.abs(np.argwhere(line) - n).max(0)
    line = line[n - i : n + i + 1, n - j : n + j + 1]
    return np.asarray(line / line.sum())


def _difference(smooth: Sequence[float], axis: int, ndim: int) -> Kernel:
    """Return the product of (-1, 0, 1) along `axis` and `smooth` along the others."""
    ndim = _checked_ndim(ndim)
    (axis,) = as_integers("axis", axis, 1)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1}, got {axis}")
    lines = [np.array(smooth)] * ndim
    lines[axis] = np.array([-1.0, 0.0, 1.0])
    return OuterProduct(lines)


def _uniform_ball(radius: float, ndim: int) -> Array:
    """Return a uniform kernel over all samples at most `radius` from the centre."""
    grid = _grid([math.floor(_positive("radius", radius))] * ndim)
    squared = np.asarray(sum(t**2 for t in grid))
    inside = (squared <= radius**2).astype(float)
    return np.asarray(inside / inside.sum())


def _grid(radii: Sequence[int]) -> list[Array]:
    """Return the offsets from the centre along each axis, for broadcasting."""
    return list(np.ix_(*(np.arange(-n, n + 1) for n in radii)))


def _gaussian(sigma: float, truncate: float) -> Array:
    n = int(truncate * sigma + 0.5)
    return np.asarray(np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2))


def _positive(name: str, value: float) -> float:
    if np.ndim(value) > 0:
        raise TypeError(f"{name} must be a single number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return value


def _checked_ndim(ndim: int) -> int:
    (ndim,) = as_integers("ndim", ndim, 1)
    if ndim < 1:
        raise ValueError(f"ndim must be at least 1, got {ndim}")
    return ndim
