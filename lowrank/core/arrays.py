"""Conversions of arrays: byte order, precision, write protection."""

from __future__ import annotations

import numpy as np

from lowrank._typing import Array


def as_floating(name: str, array: Array) -> Array:
    """Return `array` as float32 or float64; half precisions become float32."""
    if array.dtype.name in ("float16", "bfloat16"):
        return array.astype(np.float32)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise TypeError(
            f"{name} must be float32 or float64 (or a half precision), got {array.dtype}: "
            "convert it first, for example with .astype('float32')"
        )
    return as_native_order(array)


def as_native_order(array: Array) -> Array:
    """Return a NumPy array in native byte order, any other array as it is.

    A dtype that spells the native order out, such as those of Zarr arrays, has another buffer
    format, which the engine does not read: a view replaces it.
    """
    native = array.dtype.newbyteorder("=")
    if not isinstance(array, np.ndarray):
        return array
    return array.view(native) if array.dtype == native else array.astype(native)


def as_read_only(array: Array) -> Array:
    """Return a read-only view of a NumPy array, or a copy if the array itself is writeable.

    Arrays of other libraries are returned as they are: CuPy has no such flag.
    """
    if not isinstance(array, np.ndarray):
        return array
    result = array.copy() if array.flags.writeable else array.view()
    result.flags.writeable = False
    return result
