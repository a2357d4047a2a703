"""Sobel, Prewitt and Laplace filters, and derivatives of Gaussians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.ndimage.arguments import (
    as_axes,
    as_axis,
    as_output,
    as_sequence,
    drop_in,
)
from lowrank.ndimage.correlation import weights_pass
from lowrank.ndimage.passes import run_passes
from lowrank.ndimage.smoothing import gaussian_filter

DIFFERENCE = np.array([-1.0, 0.0, 1.0])
SECOND_DIFFERENCE = np.array([1.0, -2.0, 1.0])


@drop_in
def sobel(
    input: Any, axis: int = -1, output: Any = None, mode: Any = "reflect", cval: Any = 0.0
) -> Array:
    """Filter with Sobel's derivative along one axis.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    axis : int
        Axis of the derivative.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis.
    cval : number
        Border value of mode "constant".

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.sobel(np.tile([0.0, 0.0, 1.0, 1.0], (3, 1)))[1]
    array([0., 4., 4., 0.])
    """
    return _derivative(np.asarray(input), np.array([1.0, 2.0, 1.0]), axis, output, mode, cval)


@drop_in
def prewitt(
    input: Any, axis: int = -1, output: Any = None, mode: Any = "reflect", cval: Any = 0.0
) -> Array:
    """Filter with Prewitt's derivative along one axis.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    axis : int
        Axis of the derivative.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis.
    cval : number
        Border value of mode "constant".

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.prewitt(np.tile([0.0, 0.0, 1.0, 1.0], (3, 1)))[1]
    array([0., 3., 3., 0.])
    """
    return _derivative(np.asarray(input), np.ones(3), axis, output, mode, cval)


def _derivative(x: Array, smooth: Array, axis: Any, output: Any, mode: Any, cval: Any) -> Array:
    """Take differences along one axis, and smooth along the others."""
    axis = as_axis(axis, x.ndim)
    modes = as_sequence(mode, x.ndim)
    passes = [weights_pass(axis, DIFFERENCE, 0, modes[axis])]
    passes += [weights_pass(a, smooth, 0, modes[a]) for a in range(x.ndim) if a != axis]
    return run_passes(x, as_output(output, x), passes, cval)


@drop_in
def laplace(
    input: Any, output: Any = None, mode: Any = "reflect", cval: Any = 0.0, *, axes: Any = None
) -> Array:
    """Return the sum of second differences.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis.
    cval : number
        Border value of mode "constant".
    axes : sequence of int, optional
        Axes of the differences; all by default.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.laplace(np.diag([0.0, 1.0, 0.0]))
    array([[ 0.,  1.,  0.],
           [ 1., -4.,  1.],
           [ 0.,  1.,  0.]])
    """
    x = np.asarray(input)
    result = as_output(output, x)
    along = as_axes(axes, x.ndim)
    passes = [
        weights_pass(a, SECOND_DIFFERENCE, 0, m)
        for a, m in zip(along, as_sequence(mode, len(along)))
    ]
    if not passes:
        result[...] = x
        return result
    run_passes(x, result, passes[:1], cval)
    term = np.empty(x.shape, result.dtype)
    for p in passes[1:]:
        result += run_passes(x, term, [p], cval)
    return result


@drop_in
def gaussian_laplace(
    input: Any,
    sigma: Any,
    output: Any = None,
    mode: Any = "reflect",
    cval: Any = 0.0,
    *,
    axes: Any = None,
    **kwargs: Any,
) -> Array:
    """Return the sum of second derivatives of Gaussians.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    sigma : float or sequence of float
        Standard deviation, or one per axis.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis: that of a derivative's axis holds for the whole derivative.
    cval : number
        Border value of mode "constant".
    axes : sequence of int, optional
        Axes of the derivatives; all by default.
    **kwargs : dict
        Arguments of :func:`gaussian_filter`.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> image = np.zeros((9, 9))
    >>> image[4, 4] = 1
    >>> float(ndimage.gaussian_laplace(image, 1)[4, 4].round(3))
    -0.318
    """
    x = np.asarray(input)
    along = as_axes(axes, x.ndim)
    sigmas = [0.0] * x.ndim
    for a, s in zip(along, as_sequence(sigma, len(along))):
        sigmas[a] = s
    return _sum_derivatives(x, sigmas, 2, output, mode, cval, along, kwargs)


@drop_in
def gaussian_gradient_magnitude(
    input: Any,
    sigma: Any,
    output: Any = None,
    mode: Any = "reflect",
    cval: Any = 0.0,
    *,
    axes: Any = None,
    **kwargs: Any,
) -> Array:
    """Return the length of the gradient of a Gaussian.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    sigma : float or sequence of float
        Standard deviation, or one per axis of `input`.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str or sequence of str
        Border mode, or one per axis: that of a derivative's axis holds for the whole derivative.
    cval : number
        Border value of mode "constant".
    axes : sequence of int, optional
        Axes of the derivatives; all by default.
    **kwargs : dict
        Arguments of :func:`gaussian_filter`.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> slope = np.add.outer(3 * np.arange(30.0), 4 * np.arange(30.0))
    >>> float(ndimage.gaussian_gradient_magnitude(slope, 1)[15, 15].round(2))
    5.0
    """
    x = np.asarray(input)
    along = as_axes(axes, x.ndim)
    return _sum_derivatives(x, sigma, 1, output, mode, cval, along, kwargs)


def _sum_derivatives(
    x: Array,
    sigma: Any,
    order: int,
    output: Any,
    mode: Any,
    cval: Any,
    axes: Sequence[int],
    options: dict[str, Any],
) -> Array:
    """Return the length of the first derivatives, or the sum of the second ones."""
    result = as_output(output, x)
    if not axes:
        result[...] = x
    spare = np.empty(x.shape, result.dtype)
    for k, (axis, border) in enumerate(zip(axes, as_sequence(mode, len(axes)))):
        orders = [0] * x.ndim
        orders[axis] = order
        term = gaussian_filter(x, sigma, orders, spare if k else result, border, cval, **options)
        if order == 1:
            np.multiply(term, term, out=term)
        if k:
            result += term
    if order == 1 and axes:
        np.sqrt(result, out=result, casting="unsafe")
    return result
