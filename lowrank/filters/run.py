"""Real images filtered by real kernels, with any borders, output size and number of axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.engine import dask as chunked
from lowrank.filters import conversion, cpu, dask, gpu, multirate
from lowrank.filters.arguments import MAX_PLANNED_AXES
from lowrank.filters.outer import OuterProduct
from lowrank.filters.request import Call

#: Filters an image by a kernel: image, kernel, call, dtype of the result, out.
Backend = Callable[[Any, Array | OuterProduct, Call, np.dtype[Any], Any], Any]


def correlate(
    image: Array,
    kernel: Array | OuterProduct,
    call: Call,
    dtype: np.dtype[Any],
    out: Array | None = None,
) -> Array:
    """Filter a real image by a real kernel.

    Backends filter along up to three axes, into results of the image's size, with one border for
    all axes.  Everything else is such a filter of the image with its border samples, or several.

    Parameters
    ----------
    image : ndarray, dask.array.Array or cupy.ndarray
        Real.
    kernel : ndarray or OuterProduct
        Real.
    call : Call
        Other arguments of :func:`lowrank.filters.correlate`, checked.
    dtype : dtype
        Data type of the result.
    out : ndarray, optional
        Array of this type for the result.

    Returns
    -------
    ndarray, dask.array.Array or cupy.ndarray
        `out`, or a new array.
    """
    window = call.window
    shape = window.output_shape(image.shape)
    outer = call.as_outer_product(kernel)
    if call.method == "multirate":
        multirate.is_chosen(image, outer, call)  # or raises
        if _backend(image) is not cpu.correlate:
            raise ValueError("method must not be multirate for images that are no NumPy arrays")
    kernel = np.asarray(kernel) if outer is None else outer
    if 0 in shape:
        return np.empty_like(image, dtype, shape=shape) if out is None else out
    if len(window.taps) > MAX_PLANNED_AXES:
        if isinstance(kernel, OuterProduct):
            result = _correlate_factors(image, kernel, call, dtype)
        else:
            result = _correlate_slices(image, kernel, call, dtype)
    elif not call.is_native:
        x = conversion.pad(image, window, call.cval, call.work)
        result = _backend(x)(x, kernel, call.inner, dtype, None)
        result = result[tuple(map(slice, shape))]
    else:
        result = _backend(image)(image, kernel, call, dtype, out)
        return result  # type: ignore[no-any-return]
    if out is None:
        return np.ascontiguousarray(result) if isinstance(result, np.ndarray) else result
    out[...] = result
    return out


def _backend(image: Array) -> Backend:
    if isinstance(image, np.ndarray):
        return cpu.correlate
    if chunked.is_dask_array(image):
        return dask.correlate
    return gpu.correlate


def _correlate_factors(
    image: Array, kernel: OuterProduct, call: Call, dtype: np.dtype[Any]
) -> Array:
    """Filter by an outer product over many axes, some axes after the others."""
    axes = [a for a, f in enumerate(kernel.factors) if len(f) > 1 or f[0] != 1] or [0]
    cval = call.cval
    for start in range(0, len(axes), MAX_PLANNED_AXES):
        some = axes[start : start + MAX_PLANNED_AXES]
        part = OuterProduct([kernel.factors[a] for a in some])
        is_last = start + MAX_PLANNED_AXES >= len(axes)
        one = call._replace(window=call.window.only(some), cval=cval)
        image = correlate(image, part, one, dtype if is_last else call.work)
        cval *= math.prod(float(f.sum()) for f in part.factors)
    return image


def _correlate_slices(image: Array, kernel: Array, call: Call, dtype: np.dtype[Any]) -> Array:
    """Filter by a kernel over many axes: sum over its slices along the last three."""
    window = call.window
    axes = [a for a, n in enumerate(window.taps) if n > 1] or [0]
    if len(axes) < len(window.taps):
        taps = kernel.reshape([window.taps[a] for a in axes])
        return correlate(image, taps, call._replace(window=window.only(axes)), dtype)
    if call.rank is not None:
        raise ValueError(
            f"rank must be None for a kernel with more than {MAX_PLANNED_AXES} axes, got "
            f"{call.rank}"
        )
    leading, last = axes[:-MAX_PLANNED_AXES], axes[-MAX_PLANNED_AXES:]
    x = conversion.pad(image, window, call.cval, call.work)
    inner = call._replace(window=window.only(last).inside("valid"), cval=0.0)
    shape = window.output_shape(image.shape)
    total: Any = None
    for index in np.ndindex(kernel.shape[: len(leading)]):
        if not kernel[index].any():
            continue
        part = [slice(None)] * x.ndim
        for a, i in zip(leading, index):
            part[window.along[a]] = slice(i, i + shape[window.along[a]])
        result = correlate(x[tuple(part)], kernel[index], inner, call.work)
        total = result if total is None else total + result
    if total is None:
        total = np.zeros_like(image, call.work, shape=shape)
    return conversion.as_image(total, dtype)
