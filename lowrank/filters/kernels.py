"""Kernels by formula: blurs, derivatives, blobs and waves, each with its rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank._typing import Array
from lowrank.core.geometry import as_integers


def gauss(
    sigma: float | Sequence[float],
    *,
    ndim: int = 2,
    truncate: float = 4.0,
    angle: float = 0.0,
) -> Array:
    r"""Gaussian filter, turned or not; sums to 1.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation in samples, above 0: one for all axes, or one an axis.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Where the filter is cut, in standard deviations.
    angle : float
        Over two axes, how far the Gaussian is turned, in radians, from the second axis towards
        the first.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        With ``n = int(truncate * sigma + 0.5)``, as in ``scipy.ndimage.gaussian_filter``; of a
        turned one, `sigma` is its standard deviation along each axis.

    Raises
    ------
    ValueError
        If `sigma` or `truncate` is not above 0, or `angle` is given for other than two axes.

    Notes
    -----
    Of rank 1, unless the angle turns two different `sigma` off the axes: then

    .. math:: g(y, x) \propto e^{-(a y^2 + 2 b x y + c x^2) / 2}

    and by Mehler's formula the singular values fall as :math:`\rho^i` with
    :math:`\rho = (1 - \sqrt{1 - \beta^2}) / \beta` and :math:`\beta = |b| / \sqrt{a c}`: few
    terms are enough unless it is long, thin and diagonal.

    References
    ----------
    .. [1] J.-M. Geusebroek, A. W. M. Smeulders, J. van de Weijer, "Fast anisotropic Gauss
       filtering", IEEE Transactions on Image Processing 12, 2003.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.gauss(1.0).shape, filters.gauss([1.0, 2.0, 2.0]).shape
    ((9, 9), (9, 17, 17))
    >>> turned = filters.gauss([1.0, 2.0], angle=0.5)
    >>> filters.rank(turned, tolerance=0.1), filters.rank(turned, tolerance=0.001)
    (2, 6)
    """
    sigmas = [_positive("sigma", float(s)) for s in np.atleast_1d(sigma)]
    sigmas *= _count(ndim) if np.ndim(sigma) == 0 else 1
    _positive("truncate", truncate)
    if not math.isfinite(angle) or (angle != 0 and len(sigmas) != 2):
        raise ValueError(f"angle must be finite, over two axes, got {angle!r} over {len(sigmas)}")
    if angle == 0 or sigmas[0] == sigmas[1]:  # a round one turns into itself
        lines = [_bell(s, truncate) for s in sigmas]
        return _outer([g / g.sum() for g in lines])
    s, c = math.sin(angle), math.cos(angle)
    reach = (math.hypot(sigmas[1] * s, sigmas[0] * c), math.hypot(sigmas[1] * c, sigmas[0] * s))
    y, x = _grid([int(truncate * r + 0.5) for r in reach])
    along, across = (x * c + y * s) / sigmas[1], (y * c - x * s) / sigmas[0]
    kernel = np.exp(-0.5 * (along**2 + across**2))
    return np.asarray(kernel / kernel.sum())


def box(size: int | Sequence[int], *, ndim: int = 2) -> Array:
    """Mean of a box; rank 1, and sums to 1.

    Parameters
    ----------
    size : int or sequence of int
        Samples, at least 1: one number for all axes, or one an axis.
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
    sizes = as_integers("size", size, _count(ndim) if np.ndim(size) == 0 else len(np.atleast_1d(size)))
    if not sizes or min(sizes) < 1:
        raise ValueError(f"size must be at least 1, got {size!r}")
    return np.full(sizes, 1 / math.prod(sizes))


def sobel(axis: int = -1, *, ndim: int = 2) -> Array:
    """Sobel's derivative filter: a difference along one axis, smoothed along the others; rank 1.

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
        If there is no such axis.

    Notes
    -----
    (-1, 0, 1) along `axis`, (1, 2, 1) along the others.  ``skimage.filters.sobel`` divides
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


def prewitt(axis: int = -1, *, ndim: int = 2) -> Array:
    """Prewitt's derivative filter: a difference along one axis, a sum along the others; rank 1.

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
        If there is no such axis.

    Notes
    -----
    (-1, 0, 1) along `axis`, (1, 1, 1) along the others.  ``skimage.filters.prewitt`` divides
    these by 2 and by 3: by 6 in two dimensions.

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


def scharr(axis: int = -1, *, ndim: int = 2) -> Array:
    """Scharr's derivative filter: the 3x3 one whose direction is the most accurate; rank 1.

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
        If there is no such axis.

    Notes
    -----
    (-1, 0, 1) along `axis`, (3, 10, 3) along the others.  ``skimage.filters.scharr`` divides
    these by 2 and by 16: by 32 in two dimensions.

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
    r"""Laplacian stencil of 3 samples an axis: every neighbour, less the centre.

    Parameters
    ----------
    ndim : int
        Number of axes.
    connectivity : int
        Neighbours are off by one sample along so many axes at the most: 1 for the stencil of
        ``2 * ndim + 1`` points, `ndim` for the full one.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0.  With `connectivity` 1 as in ``scipy.ndimage.laplace``; the full one is
        ``3 ** (ndim - 1)`` times the Laplacian.

    Raises
    ------
    ValueError, TypeError
        If `ndim` is below 1, or `connectivity` not from 1 to it.

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
    ndim = _count(ndim)
    (connectivity,) = as_integers("connectivity", connectivity, 1)
    if not 1 <= connectivity <= ndim:
        raise ValueError(f"connectivity must be from 1 to {ndim}, got {connectivity}")
    off = np.abs(np.indices((3,) * ndim) - 1).sum(0)  # axes along which a sample is off
    kernel = (off <= connectivity).astype(float)
    kernel[(1,) * ndim] -= kernel.sum()
    return np.asarray(kernel)


def log(sigma: float, *, ndim: int = 2, truncate: float = 4.0) -> Array:
    """Laplacian of a Gaussian: as many separable terms as axes, two of them over two axes.

    Parameters
    ----------
    sigma : float
        Standard deviation in samples, above 0.
    ndim : int
        Number of axes.
    truncate : float
        Where the filter is cut, in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        Sums to 0: blind to constants.

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
    g = _bell(_positive("sigma", sigma), _positive("truncate", truncate))
    t = np.arange(len(g)) - len(g) // 2
    second = (t**2 / sigma**2 - 1) / sigma**2 * g
    second -= second.mean() * g / g.mean()  # of rank 2 still, and blind to constants
    ndim = _count(ndim)
    lines = [[second if a == axis else g for a in range(ndim)] for axis in range(ndim)]
    kernel = sum(_outer(line) for line in lines) / g.sum() ** ndim
    return np.asarray(kernel)


def dog(
    sigma: float | Sequence[float],
    *,
    ratio: float = 1.6,
    ndim: int = 2,
    truncate: float = 4.0,
) -> Array:
    r"""Difference of Gaussians, a band of frequencies: two separable terms.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation of the narrow one in samples, above 0: one for all axes, or one an
        axis.
    ratio : float
        Of the wide one to it, above 1.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Where each is cut, in its standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        The size of the wide one.  Sums to 0.

    Raises
    ------
    ValueError
        If `sigma` or `truncate` is not above 0, or `ratio` not above 1.

    Notes
    -----
    :math:`G_\sigma - G_{r \sigma}`, as in ``skimage.filters.difference_of_gaussians``.  With
    :math:`r = 1.6` it is close to the Laplacian of a Gaussian, upside down.

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
    frame = [((a - b) // 2,) * 2 for a, b in zip(wide.shape, narrow.shape)]
    return np.asarray(np.pad(narrow, frame) - wide)


def unsharp(
    sigma: float | Sequence[float],
    *,
    amount: float = 1.0,
    ndim: int = 2,
    truncate: float = 4.0,
) -> Array:
    r"""Unsharp mask: an image, and so much of what a Gaussian blurs away; two separable terms.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation of the Gaussian in samples, above 0: one for all axes, or one an axis.
    amount : float
        Of what is added, above 0.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Where the Gaussian is cut, in standard deviations.

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
    :math:`\delta + a (\delta - G_\sigma)`, as in ``skimage.filters.unsharp_mask``, which cuts
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
    return kernel


def gabor(
    sigma: float,
    wavelength: float,
    *,
    angle: float = 0.0,
    phase: float = 0.0,
    truncate: float = 3.0,
) -> Array:
    """Gabor filter, a wave under a Gaussian: rank 1 along the axes, 2 at any other angle.

    Parameters
    ----------
    sigma : float
        Standard deviation of the Gaussian in samples, above 0.
    wavelength : float
        Of the wave, in samples, above 0.
    angle : float
        Direction of the wave in radians, from the second axis towards the first.
    phase : float
        Of the wave at the centre, in radians.
    truncate : float
        Where the filter is cut, in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)
        The Gaussian sums to 1, times a wave of amplitude 1.

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
    g = _bell(_positive("sigma", sigma), _positive("truncate", truncate))
    y, x = _grid([len(g) // 2] * 2)
    along = x * math.cos(angle) + y * math.sin(angle)
    wave = np.cos(2 * math.pi * along / _positive("wavelength", wavelength) + phase)
    return np.asarray(np.outer(g, g) / g.sum() ** 2 * wave)


def disk(radius: float) -> Array:
    """Uniform disk, the blur of a lens out of focus; sums to 1.  Of high rank.

    Parameters
    ----------
    radius : float
        In samples, above 0.

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
    return _round(radius, 2)


def ball(radius: float) -> Array:
    """Uniform ball, the disk of volumes; sums to 1.  Of high rank.

    Parameters
    ----------
    radius : float
        In samples, above 0.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1, 2 * n + 1)
        With ``n = floor(radius)``; where it is not 0, ``skimage.morphology.ball``.

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
    return _round(radius, 3)


def motion(length: int, *, angle: float = 0.0) -> Array:
    """Motion blur along a line; sums to 1.  Rank 1 along the axes.

    Parameters
    ----------
    length : int
        Of the line, in samples, above 0.
    angle : float
        Of the line in radians, from the second axis towards the first.

    Returns
    -------
    ndarray of float64, shape (2 * m + 1, 2 * n + 1)
        As large as the line: a single row at angle 0.  An even `length` has half a sample at
        both ends.

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
    line[line < 1e-9] = 0  # what rounding of sines and cosines leaves beside a line along an axis
    i, j = np.abs(np.argwhere(line) - n).max(0)
    line = line[n - i : n + i + 1, n - j : n + j + 1]
    return np.asarray(line / line.sum())


def _difference(smooth: Sequence[float], axis: int, ndim: int) -> Array:
    """A difference along `axis`, `smooth` along the others."""
    ndim = _count(ndim)
    (axis,) = as_integers("axis", axis, 1)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1}, got {axis}")
    lines = [np.array(smooth)] * ndim
    lines[axis] = np.array([-1.0, 0.0, 1.0])
    return _outer(lines)


def _round(radius: float, ndim: int) -> Array:
    """Uniform over all samples at most `radius` from the centre."""
    grid = _grid([math.floor(_positive("radius", radius))] * ndim)
    square = np.asarray(sum(t**2 for t in grid))
    inside = (square <= radius**2).astype(float)
    return np.asarray(inside / inside.sum())


def _grid(reach: Sequence[int]) -> list[Array]:
    """Distance from the centre along each axis, to be broadcast."""
    return list(np.ix_(*(np.arange(-n, n + 1) for n in reach)))


def _bell(sigma: float, truncate: float) -> Array:
    n = int(truncate * sigma + 0.5)
    return np.asarray(np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2))


def _outer(lines: Sequence[Array]) -> Array:
    kernel = np.ones(())
    for line in lines:
        kernel = np.multiply.outer(kernel, line)
    return kernel


def _positive(name: str, value: float) -> float:
    if np.ndim(value) > 0:
        raise TypeError(f"{name} must be a single number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return value


def _count(ndim: int) -> int:
    (ndim,) = as_integers("ndim", ndim, 1)
    if ndim < 1:
        raise ValueError(f"ndim must be at least 1, got {ndim}")
    return ndim
