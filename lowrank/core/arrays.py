"""Conversions of arrays: byte order, precision, write protection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank._typing import Array

# Largest magnitudes, and inverse of the smallest, that are not scaled: a sum of 2^60 products of
# two, times weights of up to 2^40, is in the range of float32.
PLAIN = 2.0**13


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


def from_tensor(name: str, value: Any) -> Any:
    """Return a PyTorch tensor as a NumPy array on the CPU, anything else as it is.

    PyTorch is not imported: its tensors are known by their attributes.
    """
    if not (hasattr(value, "detach") and hasattr(value, "is_meta") and hasattr(value, "layout")):
        return value
    kind = type(value).__qualname__
    if kind.startswith("Uninitialized"):
        raise ValueError(f"{name} must have values, got that of a lazy layer: run it once first")
    if value.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")
    if not str(value.layout).endswith("strided"):
        raise TypeError(f"{name} must be a dense tensor, got one of {value.layout}")
    value = value.detach().cpu()
    return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()


def power_of_two(peak: float) -> float:
    """Return 1 for ordinary magnitudes, for others the largest power of two below.

    Divided by it, products of a few values are in the range of float32, and no bit is lost.
    """
    return 1.0 if peak == 0 or 1 / PLAIN <= peak <= PLAIN else 2.0 ** math.floor(math.log2(peak))


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
