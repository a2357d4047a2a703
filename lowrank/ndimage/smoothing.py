"""Gaussian and uniform filters."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.ndimage.arguments import (
    UnsupportedError,
    as_axes,
    as_axis,
    as_before,
    as_integer,
    as_number,
    as_output,
    as_sequence,
    drop_in,
)
from lowrank.ndimage.passes import Pass, as_pass, box, run_passes

LEAST_SIGMA = 1e-15  # axes with less are not filtered


@functools.lru_cache(256)
def _gaussian_weights(sigma: float, order: int, radius: int) -> Array:
    """Return the taps of a correlation with a Gaussian or its derivative, bit for bit SciPy's.

    The derivative is q(x) times the Gaussian with a polynomial q: q' + q p' is the next one, where
    p = -x^2 / 2 sigma^2.
    """
    variance = sigma * sigma
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 / variance * x**2)
    weights = weights / weights.sum()
    if order:
        exponents = np.arange(order + 1)
        q = np.zeros(order + 1)
        q[0] = 1
        derive = np.diag(exponents[1:], 1) + np.diag(np.ones(order) / -variance, -1)
        for _ in range(order):
            q = derive.dot(q)
        weights = (x[:, None] ** exponents).dot(q) * weights
    weights = np.ascontiguousarray(weights[::-1])
    weights.flags.writeable = False
    return weights


def _gaussian_pass(
    axis: int, sigma: Any, order: Any, mode: Any, truncate: Any, radius: Any
) -> Pass:
    deviation, order = as_number(sigma), as_integer(order)
    reach = as_number(truncate) * deviation
    if not (deviation > 0 and math.isfinite(reach) and order >= 0):
        raise UnsupportedError
    if radius is None:
        radius = int(reach + 0.5)
    if not isinstance(radius, numbers.Integral) or radius < 0 or not deviation * deviation:
        raise UnsupportedError
    weights = _gaussian_weights(deviation, order, int(radius))
    return as_pass(axis, weights, int(radius), mode)


@drop_in
def gaussian_filter1d(
    input: Any,
    sigma: Any,
    axis: int = -1,
    order: int = 0,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    truncate: float = 4.0,
    *,
    radius: int | None = None,
) -> Array:
    """Filter along one axis with a Gaussian, or with its derivative.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    sigma : float
        Standard deviation.
    axis : int
        Axis to filter.
    order : int
        Order of the derivative.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    truncate : float
        Radius of the kernel in standard deviations.
    radius : int, optional
        Radius of the kernel in samples, instead of `truncate`.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> from lowrank import ndimage
    >>> ndimage.gaussian_filter1d([0.0, 0.0, 1.0, 0.0, 0.0], 1, radius=1).round(3)
    array([0.   , 0.274, 0.452, 0.274, 0.   ])
    """
    x = np.asarray(input)
    p = _gaussian_pass(as_axis(axis, x.ndim), sigma, order, mode, truncate, radius)
    return run_passes(x, as_output(output, x, x.dtype.kind == "c"), [p], cval)


@drop_in
def gaussian_filter(
    input: Any,
    sigma: Any,
    order: Any = 0,
    output: Any = None,
    mode: Any = "reflect",
    cval: Any = 0.0,
    truncate: float = 4.0,
    *,
    radius: Any = None,
    axes: Any = None,
) -> Array:
    """Filter with a Gaussian, or with its derivatives.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    sigma : float or sequence of float
        Standard deviation, or one per axis; axes with 0 are not filtered.
    order : int or sequence of int
        Order of the derivative, or one per axis.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis.
    cval : number
        Border value of mode "constant".
    truncate : float
        Radius of the kernel in standard deviations.
    radius : int or sequence of int, optional
        Radius of the kernel in samples, or one per axis, instead of `truncate`.
    axes : sequence of int, optional
        Axes to filter; all by default.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> image = np.zeros((5, 5))
    >>> image[2, 2] = 1
    >>> ndimage.gaussian_filter(image, 1, radius=1)[2].round(3)
    array([0.   , 0.124, 0.204, 0.124, 0.   ])
    """
    x = np.asarray(input)
    result = as_output(output, x)
    along = as_axes(axes, x.ndim)
    n = len(along)
    each = zip(
        along, as_sequence(sigma, n), as_sequence(order, n), as_sequence(mode, n),
        as_sequence(radius, n),
    )  # fmt: skip
    passes = [_gaussian_pass(a, s, o, m, truncate, r) for a, s, o, m, r in each if s > LEAST_SIGMA]
    if passes:
        return run_passes(x, result, passes, cval)
    result[...] = x
    return result


def _box_pass(axis: int, size: Any, origin: Any, mode: Any) -> Pass:
    size = as_integer(size)
    if size < 1:
        raise UnsupportedError
    return box(axis, size, as_before(origin, size), mode)


@drop_in
def uniform_filter1d(
    input: Any,
    size: int,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Array:
    """Return the mean of a window along one axis.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    size : int
        Size of the window.
    axis : int
        Axis to filter.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    origin : int
        Shift of the window.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Notes
    -----
    Wide windows take the same time at any size.  Nothing is subtracted: samples that have left the
    window leave no rounding errors behind, as they do in SciPy's running sums.

    Examples
    --------
    >>> from lowrank import ndimage
    >>> ndimage.uniform_filter1d([0.0, 3.0, 6.0, 0.0], 3)
    array([1., 3., 3., 2.])
    """
    x = np.asarray(input)
    p = _box_pass(as_axis(axis, x.ndim), size, origin, mode)
    return run_passes(x, as_output(output, x, x.dtype.kind == "c"), [p], cval)


@drop_in
def uniform_filter(
    input: Any,
    size: Any = 3,
    output: Any = None,
    mode: Any = "reflect",
    cval: Any = 0.0,
    origin: Any = 0,
    *,
    axes: Any = None,
) -> Array:
    """Return the mean of a window.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    size : int or sequence of int
        Size of the window, or one per axis.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis.
    cval : number
        Border value of mode "constant".
    origin : int or sequence of int
        Shift of the window, or one per axis.
    axes : sequence of int, optional
        Axes to filter; all by default.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Notes
    -----
    See :func:`uniform_filter1d`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.uniform_filter(np.eye(3) * 9)
    array([[5., 3., 1.],
           [3., 3., 3.],
           [1., 3., 5.]])
    """
    x = np.asarray(input)
    result = as_output(output, x, x.dtype.kind == "c")
    along = as_axes(axes, x.ndim)
    n = len(along)
    each = zip(along, as_sequence(size, n), as_sequence(origin, n), as_sequence(mode, n))
    passes = [_box_pass(a, int(s), o, m) for a, s, o, m in each if s > 1]
    if passes:
        return run_passes(x, result, passes, cval)
    result[...] = x
    return result
