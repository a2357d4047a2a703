"""Checks of the images and arguments of filters with several outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, labelled
from lowrank.filters.shared import Border


def as_samples(image: Any, dtype: Any = None) -> tuple[Array, np.dtype[Any]]:
    """Return a real image as an array, and the dtype of the result.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of at least one axis; bool counts as 0 and 1.
    dtype : dtype or None
        float32 or float64; by default float32 for float32, float16, bool and integers of up to 16
        bits, else float64.

    Returns
    -------
    image : ndarray or dask.array.Array
        Image in its own dtype; the values of a DataArray.
    dtype : dtype
        dtype of the result.

    Raises
    ------
    TypeError, ValueError
        If the image is complex, no numbers, masked, on a GPU or without axes.
    """
    if isinstance(image, np.ma.MaskedArray):
        raise TypeError(
            "image must be a plain array, got a masked array: fill it, or call normalised_correlate"
        )
    if labelled.is_data_array(image):
        image = labelled.values_of(image)
    if type(image).__module__.partition(".")[0] == "cupy":
        raise TypeError("image must be a NumPy or Dask array, got one of CuPy: call correlate")
    if chunked.is_dask_array(image):
        chunked.check_array("image", image)
    else:
        image = arguments.as_array("image", image)
    if image.ndim == 0:
        raise ValueError("image must have at least one axis, got a single number")
    if image.dtype.kind not in "biuf" or image.dtype.itemsize > 8:
        raise TypeError(
            f"image must be floating-point, integers or bool, got {image.dtype}: convert it first"
        )
    if dtype is None:
        is_small = image.dtype.itemsize <= (4 if image.dtype.kind == "f" else 2)
        return image, np.dtype(np.float32 if is_small else np.float64)
    try:
        result = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}") from None
    if result not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {result}")
    return image, result.newbyteorder("=")


def as_filtered_axes(axes: Any, ndim: int) -> Ints:
    """Return the nonnegative axes of an image that a filter runs along; all by default."""
    if axes is None:
        return tuple(range(ndim))
    along = (axes,) if np.ndim(axes) == 0 else tuple(axes)
    if not along:
        raise ValueError("axes must name at least one axis, got none")
    if len(along) > ndim:
        raise ValueError(f"axes must be at most {ndim}, as the image has, got {axes!r}")
    return arguments.as_axes(along, ndim, len(along))


def as_border(mode: Any, cval: Any, n: int) -> Border:
    """Return the border of `n` axes from one mode, or one per axis."""
    names = [mode] * n if isinstance(mode, str) or np.ndim(mode) == 0 else list(mode)
    if len(names) != n:
        raise ValueError(f"mode must be one name, or one per axis, {n}, got {len(names)}")
    borders, value = tuple(map(arguments.as_padding_mode, names)), arguments.as_real("cval", cval)
    if "constant" not in borders:
        value = 0.0  # not used, and need not be finite
    if not math.isfinite(value):
        raise ValueError(f"cval must be finite, got {cval!r}")
    return Border(borders, value)


def as_positive(name: str, value: Any, n: int) -> tuple[float, ...]:
    """Return `n` finite numbers above 0 from a single one, or one per axis."""
    given = [value] * n if np.ndim(value) == 0 else list(value)
    if len(given) != n:
        raise ValueError(f"{name} must be one number, or one per axis, {n}, got {len(given)}")
    numbers = tuple(arguments.as_real(name, v) for v in given)
    if not all(0 < v < math.inf for v in numbers):
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return numbers


def as_sequence_of(name: str, value: Any) -> Sequence[Any]:
    """Return a sequence that is not empty."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, got {value!r}")
    values = list(value)
    if not values:
        raise ValueError(f"{name} must not be empty")
    return values
