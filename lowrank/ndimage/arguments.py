"""Arguments with the conventions of scipy.ndimage, and the calls that SciPy itself answers."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from scipy import ndimage

from lowrank._typing import Array, Ints
from lowrank.filters.arguments import MODES

NAMES = (
    "convolve", "convolve1d", "correlate", "correlate1d", "gaussian_filter", "gaussian_filter1d",
    "gaussian_gradient_magnitude", "gaussian_laplace", "laplace", "prewitt", "sobel",
    "uniform_filter", "uniform_filter1d",
)  # fmt: skip
#: SciPy's functions, which calls reach while scipy.ndimage is patched, too.
SCIPY: dict[str, Callable[..., Any]] = {name: getattr(ndimage, name) for name in NAMES}

P = ParamSpec("P")


class UnsupportedError(Exception):
    """Arguments that SciPy refuses, or that it alone can compute."""


def drop_in(function: Callable[P, Array]) -> Callable[P, Array]:
    """Return a function that calls SciPy's function of its name where its own is unsupported.

    SciPy's own errors are raised for invalid arguments, so that code that handles them still does.
    Functions raise `UnsupportedError` before they write any output.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Array:
        try:
            return function(*args, **kwargs)
        except UnsupportedError:
            pass
        result: Array = SCIPY[function.__name__](*args, **kwargs)
        return result

    return call


def as_sequence(value: Any, n: int) -> list[Any]:
    """Return one value per axis; a number or a string is repeated."""
    if isinstance(value, str) or not np.iterable(value):
        return [value] * n
    values = list(value)
    if len(values) != n:
        raise UnsupportedError
    return values


def as_axis(axis: Any, ndim: int) -> int:
    """Return the nonnegative index of an axis."""
    index = as_integer(axis)
    if not -ndim <= index < ndim:
        raise UnsupportedError
    return index % ndim


def as_axes(axes: Any, ndim: int) -> Ints:
    """Return the nonnegative, different indices of axes; all by default."""
    if axes is None:
        return tuple(range(ndim))
    if not np.iterable(axes):
        axes = [axes]
    found = tuple(as_axis(a, ndim) for a in axes)
    if len(set(found)) != len(found):
        raise UnsupportedError
    return found


def as_integer(value: Any) -> int:
    """Return a value that is an integer as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise UnsupportedError from None


def as_number(value: Any) -> float:
    """Return a real number as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UnsupportedError from None


def as_border(mode: Any) -> str:
    """Return the padding mode of one of SciPy's border modes."""
    if not isinstance(mode, str) or mode not in MODES:
        raise UnsupportedError
    return MODES[mode]


def as_before(origin: Any, taps: int) -> int:
    """Return the number of taps ahead of the output of a correlation."""
    shift = as_integer(origin)
    if not -(taps // 2) <= shift <= (taps - 1) // 2:
        raise UnsupportedError
    return taps // 2 + shift


def as_output(output: Any, x: Array, promotes: bool = False) -> Array:
    """Return an array for the result.

    Parameters
    ----------
    output : ndarray, dtype, str or None
        Argument of the caller.
    x : ndarray
        Input.
    promotes : bool
        Whether the result is complex, and at least complex64.

    Returns
    -------
    ndarray
        `output` itself if it is an array.
    """
    if output is None:
        native = x.dtype.newbyteorder("=")
        return np.empty(x.shape, np.promote_types(native, np.complex64) if promotes else native)
    if isinstance(output, type | np.dtype | str):
        try:
            dtype = np.dtype(output)
        except TypeError:
            raise UnsupportedError from None
        is_number = not isinstance(output, str) or issubclass(dtype.type, np.number)
        if not is_number or (promotes and dtype.kind != "c"):
            raise UnsupportedError
        return np.empty(x.shape, dtype)
    array = np.asarray(output)
    if array.shape != x.shape or (promotes and array.dtype.kind != "c"):
        raise UnsupportedError
    return array


def is_finite(x: Array) -> bool:
    """Return whether no sample is NaN or infinite."""
    return x.dtype.kind != "f" or (math.isfinite(float(x.min())) and math.isfinite(float(x.max())))
