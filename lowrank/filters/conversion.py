"""Conversion of images between their dtype and those of the engine, and their borders."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array
from lowrank.core import reference
from lowrank.core.arrays import as_native_order
from lowrank.engine import dask as chunked
from lowrank.engine.padding import padded_indices
from lowrank.filters.window import Window


def as_engine_input(image: Array, work: np.dtype[Any]) -> Array:
    """Return `image` in native order and a dtype that the engine reads: its own, or `work`."""
    if image.dtype == bool:
        return image.view(np.uint8)
    if image.dtype in (work, *engine.INTEGERS) and image.dtype.isnative:
        return as_native_order(image)
    return image.astype(work)


def result_dtype(dtype: np.dtype[Any], work: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that the engine writes for results of `dtype`: that, or `work`."""
    return next((d for d in engine.INTEGERS if d == dtype), work)


def as_image(result: Array, dtype: np.dtype[Any]) -> Array:
    """Return a result as `dtype`; integers are rounded to nearest even and saturate.

    Booleans are integers of 0 and 1.
    """
    if result.dtype == dtype:
        return result
    if chunked.is_dask_array(result):
        return result.map_blocks(as_image, dtype, dtype=dtype)  # type: ignore[attr-defined,no-any-return]
    if dtype.kind == "b":
        return result > 0.5
    return reference.saturate(result, dtype) if dtype.kind in "iu" else result.astype(dtype)


def as_complex(real: Array, imaginary: Array | None, dtype: np.dtype[Any]) -> Array:
    """Return an array of complex numbers of two parts; None is zero."""
    if chunked.is_dask_array(real):
        import dask.array

        return dask.array.map_blocks(as_complex, real, imaginary, dtype, dtype=dtype)  # type: ignore[no-any-return]
    result = np.empty_like(real, dtype)
    result.real[...] = real
    result.imag[...] = 0 if imaginary is None else imaginary
    return result


def pad(image: Array, window: Window, cval: float, work: np.dtype[Any]) -> Array:
    """Return an image with its border samples, as `work` if some of them are constant."""
    for axis, border, ends in zip(window.along, window.borders, window.pads):
        if not any(ends):
            continue
        if border == "constant":
            image = image.astype(work, copy=False)
        n = image.shape[axis]
        index = padded_indices(n, *ends, border, 1)
        sides = []
        for part in (index[: ends[0]], index[ends[0] + n :]):
            side = np.take(image, engine.as_array_like(np.maximum(part, 0), image), axis)
            sides.append(np.full_like(side, cval) if border == "constant" else side)
        image = np.concatenate([sides[0], image, sides[1]], axis)
    return image
