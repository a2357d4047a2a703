"""Correlation and convolution with given weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank import filters
from lowrank._typing import Array
from lowrank.filters.choose import MethodName
from lowrank.ndimage.arguments import (
    UnsupportedError,
    as_axes,
    as_axis,
    as_before,
    as_border,
    as_integer,
    as_number,
    as_output,
    as_sequence,
    drop_in,
    is_finite,
)
from lowrank.ndimage.passes import EXACT, Pass, as_pass, bound_samples, run_passes, truncate

LEAST_WEIGHT = float(np.finfo(np.float64).eps)  # SciPy skips weights up to it
MAX_AXES = 3  # of a kernel of the engine


def weights_pass(axis: int, weights: Any, origin: Any, mode: Any) -> Pass:
    """Return a correlation along one axis."""
    taps = np.ascontiguousarray(weights, np.float64)
    return as_pass(axis, taps, as_before(origin, len(taps)), mode)


def _as_weights(weights: Any) -> Array:
    """Return real weights."""
    array = np.asarray(weights)
    if array.dtype.kind not in "biuf" or not array.size:
        raise UnsupportedError
    return array.astype(np.float64)


@drop_in
def correlate1d(
    input: Any,
    weights: Any,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Array:
    """Correlate along one axis.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    weights : array_like
        Taps.
    axis : int
        Axis to filter.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    origin : int
        Shift of the filter.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> from lowrank import ndimage
    >>> ndimage.correlate1d([2, 8, 0, 4, 1, 9, 9, 0], weights=[1, 3])
    array([ 8, 26,  8, 12,  7, 28, 36,  9])
    """
    return _filter_along(np.asarray(input), weights, axis, output, mode, cval, origin, False)


@drop_in
def convolve1d(
    input: Any,
    weights: Any,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Array:
    """Convolve along one axis.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    weights : array_like
        Taps, which are flipped.
    axis : int
        Axis to filter.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    origin : int
        Shift of the filter.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Examples
    --------
    >>> from lowrank import ndimage
    >>> ndimage.convolve1d([2, 8, 0, 4, 1, 9, 9, 0], weights=[1, 3])
    array([14, 24,  4, 13, 12, 36, 27,  0])
    """
    return _filter_along(np.asarray(input), weights, axis, output, mode, cval, origin, True)


def _filter_along(
    x: Array, weights: Any, axis: Any, output: Any, mode: Any, cval: Any, origin: Any, flip: bool
) -> Array:
    taps, shift = _as_weights(weights), as_integer(origin)
    if taps.ndim != 1:
        raise UnsupportedError
    if flip:
        taps, shift = taps[::-1], _flipped(shift, taps.size)
    p = weights_pass(as_axis(axis, x.ndim), taps, shift, mode)
    return run_passes(x, as_output(output, x, x.dtype.kind == "c"), [p], cval)


def _flipped(origin: int, taps: int) -> int:
    """Return the shift of a flipped filter."""
    return -origin - (taps % 2 == 0)


@drop_in
def correlate(
    input: Any,
    weights: Any,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: Any = 0,
    *,
    axes: Any = None,
) -> Array:
    """Correlate with weights over several axes.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    weights : array_like
        Weights, with one axis per filtered axis.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    origin : int or sequence of int
        Shift of the filter, or one per axis.
    axes : sequence of int, optional
        Axes to filter; all by default.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Notes
    -----
    :func:`lowrank.filters.correlate` runs, by the fastest method of which every output is within
    rounding.  Complex weights, weights over more than three axes, and weights that are not
    integers where the result has an integer dtype are left to SciPy.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.correlate(np.eye(3), [[1, 2], [3, 4]])
    array([[10.,  4.,  0.],
           [ 3.,  5.,  3.],
           [ 0.,  2.,  5.]])
    """
    return _filter(np.asarray(input), weights, output, mode, cval, origin, axes, False)


@drop_in
def convolve(
    input: Any,
    weights: Any,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: Any = 0,
    *,
    axes: Any = None,
) -> Array:
    """Convolve with weights over several axes.

    Parameters
    ----------
    input : array_like
        Array of any shape.
    weights : array_like
        Weights, with one axis per filtered axis, which are flipped.
    output : ndarray or dtype, optional
        Array for the result, or its dtype; that of `input` by default.
    mode : str
        Border mode.
    cval : number
        Border value of mode "constant".
    origin : int or sequence of int
        Shift of the filter, or one per axis.
    axes : sequence of int, optional
        Axes to filter; all by default.

    Returns
    -------
    ndarray
        Result, which is `output` if that is an array.

    Notes
    -----
    See :func:`correlate`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import ndimage
    >>> ndimage.convolve(np.eye(3), [[1, 2], [3, 4]])
    array([[ 5.,  2.,  0.],
           [ 3.,  5.,  3.],
           [ 0.,  4., 10.]])
    """
    return _filter(np.asarray(input), weights, output, mode, cval, origin, axes, True)


def _filter(
    x: Array, weights: Any, output: Any, mode: Any, cval: Any, origin: Any, axes: Any, flip: bool
) -> Array:
    kernel = _as_weights(weights)
    kernel = np.where(np.abs(kernel) > LEAST_WEIGHT, kernel, 0.0)
    along = as_axes(axes, x.ndim)
    as_border(mode)
    if not 0 < kernel.ndim == len(along) <= MAX_AXES or not x.size:
        raise UnsupportedError
    if not np.isfinite(kernel).all():
        raise UnsupportedError
    # Axes of weights are those of the input in increasing order; shifts are in the order of `axes`
    # unless these are all.
    shifts = [as_integer(o) for o in as_sequence(origin, len(along))]
    if len(along) < x.ndim:
        shifts = [o for _, o in sorted(zip(along, shifts))]
    along = tuple(sorted(along))
    if flip:
        kernel = np.flip(kernel)
        shifts = [_flipped(o, n) for o, n in zip(shifts, kernel.shape)]
    for o, n in zip(shifts, kernel.shape):
        as_before(o, n)
    result = as_output(output, x, x.dtype.kind == "c")
    fill = complex(as_number(np.real(cval)), as_number(np.imag(cval)))
    if x.dtype.kind == "c":
        parts = [(x.real, result.real, fill.real), (x.imag, result.imag, fill.imag)]
    elif fill.imag or result.dtype.kind == "c":
        raise UnsupportedError
    else:
        parts = [(x, result, fill.real)]
    for source, target, value in parts:
        _check(source, target, kernel, value)
    for source, target, value in parts:
        _filter_real(source, target, kernel, mode, value, shifts, along)
    return result


def _check(x: Array, output: Array, kernel: Array, cval: float) -> None:
    """Raise `UnsupportedError` for arrays that SciPy refuses, or alone truncates as it does."""
    for dtype in (x.dtype, output.dtype):
        if dtype.kind not in "iuf" or (dtype.kind == "f" and dtype.itemsize not in (4, 8)):
            raise UnsupportedError
    if not output.flags.writeable:
        raise UnsupportedError
    # SciPy's sums, which skip taps of zero, are faster here than those of filters.correlate.
    if not kernel.all() and not is_finite(x):
        raise UnsupportedError
    if output.dtype.kind != "f":
        is_whole = x.dtype.kind != "f" and cval.is_integer() and (kernel == np.rint(kernel)).all()
        largest = max(bound_samples(x), abs(cval))
        if not is_whole or float(np.abs(kernel).sum()) * largest >= EXACT:
            raise UnsupportedError


def _filter_real(
    x: Array, output: Array, kernel: Array, mode: str, cval: float, origins: Any, axes: Any
) -> None:
    is_single = x.dtype.newbyteorder("=") == output.dtype.newbyteorder("=") == np.float32
    x = x.astype(np.float32 if is_single else np.float64, order="C", copy=False)
    # Transforms and sums of terms would not give integers.
    method: MethodName = "auto" if output.dtype.kind == "f" else "direct"
    out = output if output.dtype == x.dtype else None
    y = filters.correlate(
        x, kernel, method=method, mode=mode, cval=cval, origin=origins, axes=axes, out=out
    )
    if output.dtype.kind != "f":
        output[...] = truncate(y, output.dtype.newbyteorder("="))
    elif out is None:
        output[...] = y
