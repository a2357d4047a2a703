"""Checks and conversions of the arguments of filters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import as_integers

_Number = TypeVar("_Number", float, complex)
SINGLE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_PLANNED_AXES = 3  # of a kernel of the engine
KEPT = 256  # latest data types
_ROUND_OFF_FACTOR = 4  # allows for the rounding of kernels that were computed, not given
#: Attributes of arrays in memory; arrays that are read at their first use lack them.
_MEMORY_PROTOCOLS = ("__array_interface__", "__dlpack__")

#: scipy.ndimage's border modes, and the padding modes that they mean.
MODES: dict[str, PaddingMode] = {
    "reflect": "symmetric",
    "grid-mirror": "symmetric",
    "constant": "constant",
    "grid-constant": "constant",
    "nearest": "replicate",
    "mirror": "reflect",
    "wrap": "circular",
    "grid-wrap": "circular",
}


def as_array(name: str, value: Any) -> Array:
    """Return an array, a sequence or a number in memory as a plain array.

    What would be read or computed by the conversion, such as a file's, is refused.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked array: fill the mask first")
    if isinstance(value, list | tuple):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a regular array: {error}") from None
    if isinstance(value, np.ndarray | int | float | complex | np.generic):
        return np.asarray(value)
    if any(hasattr(value, protocol) for protocol in _MEMORY_PROTOCOLS):
        return np.asarray(value)
    try:
        return np.asarray(memoryview(value))
    except TypeError:
        pass
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}"
    allowed, hint = "an array in memory", ""
    if hasattr(value, "shape"):
        hint = f": numpy.asarray({name}) loads it"
    if name == "image":
        allowed += ", a Dask array or an xarray.DataArray"
        lazily = "dask.array.from_zarr" if kind.startswith("zarr.") else "dask.array.from_array"
        hint = hint and f"{hint}, {lazily}(image) makes it lazy"
    raise TypeError(f"{name} must be {allowed}, got {kind}{hint}")


def as_kernel(value: Any) -> Array:
    """Return a real kernel over 1 to 3 axes, in float32 or float64 and native byte order."""
    k = as_taps(value)
    if k.dtype.kind == "c":
        raise TypeError(f"kernel must be real, float32 or float64, got {k.dtype}")
    if k.ndim > MAX_PLANNED_AXES:
        raise ValueError(
            f"kernel must have 1 to {MAX_PLANNED_AXES} axes, none of them empty, got shape "
            f"{k.shape}"
        )
    return k


def as_taps(value: Any) -> Array:
    """Return a kernel in single or double precision, real or complex, and native byte order."""
    k = as_array("kernel", value)
    if k.dtype.kind in "iub":
        k = k.astype(np.float64)
    k = k.astype(k.dtype.newbyteorder("="), copy=False)
    if k.dtype == np.float16:
        k = k.astype(np.float32)
    if k.dtype not in (np.float32, np.float64, np.complex64, np.complex128):
        raise TypeError(
            f"kernel must be float32 or float64, complex64 or complex128, or integers, got "
            f"{k.dtype}"
        )
    if k.ndim == 0 or k.size == 0:
        raise ValueError(f"kernel must have axes, none of them empty, got shape {k.shape}")
    if not np.isfinite(k).all():
        raise ValueError("kernel must be finite, got NaN or infinite values")
    return k


def as_real(name: str, value: Any) -> float:
    """Return `value` as a float."""
    return _as_number(name, "a real number", float, value)


def as_number(name: str, value: Any, is_complex: bool) -> complex:
    """Return `value` as a number, which is real unless complex ones are allowed."""
    return _as_number(name, "a number", complex, value) if is_complex else as_real(name, value)


def _as_number(name: str, kind: str, convert: Callable[[Any], _Number], value: Any) -> _Number:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return convert(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {kind}, got {value!r}") from None


def as_padding_mode(name: str) -> PaddingMode:
    """Return the padding mode of one of scipy.ndimage's border modes."""
    if not isinstance(name, str) or name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}")
    return MODES[name]


def as_origins(origin: int | Sequence[int], taps: Ints) -> Ints:
    """Return one shift per axis, with the limits of scipy.ndimage."""
    shifts = as_integers("origin", origin, len(taps))
    for o, n in zip(shifts, taps):
        if not -(n // 2) <= o <= (n - 1) // 2:
            raise ValueError(
                f"origin must be between {-(n // 2)} and {(n - 1) // 2} for {n} taps, got {o}"
            )
    return shifts


def as_result_dtype(dtype: Any, out: Any, image: Any, is_complex: bool) -> np.dtype[Any]:
    """Return the data type of the result: that of the image unless `dtype` or `out` says another.

    `is_complex` tells that the kernel is; then the result is, too.
    """
    kind: type = np.ndarray if isinstance(image, np.ndarray) else type(image)
    if out is not None:
        if not isinstance(out, kind) or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"out must be a {kind.__qualname__}, got {type(out).__qualname__}")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError("out must be writeable, got a read-only array")
    result: np.dtype[Any] = image.dtype
    if result.kind == "c" or is_complex:
        result = np.promote_types(result.newbyteorder("="), np.complex64)
    if dtype is None and out is None:
        return result
    name = "out" if dtype is None else "dtype"
    found = as_dtype(name, out.dtype if dtype is None else dtype)
    if result.kind == "c" != found.kind:
        raise TypeError(f"{name} must be complex for a complex image or kernel, got {found}")
    if out is not None and out.dtype != found:
        raise TypeError(f"dtype must be that of out, {out.dtype}, got {found}")
    return found


def as_dtype(name: str, value: Any) -> np.dtype[Any]:
    """Return a data type of numbers that filters read and write."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"{name} must be a data type, got {value!r}") from None
    _precision(name, dtype)
    return dtype


def work_dtype(image: np.dtype[Any], fits_single: bool = True, result: Any = None) -> np.dtype[Any]:
    """Return the dtype of the computation: float32 if it holds all values, else float64.

    `fits_single` tells that it holds those of the kernel.  Float32 rounds sums of large 16-bit
    integers by more than what decides between two results.
    """
    if _precision("image", image) == np.float64 or not fits_single:
        return np.dtype(np.float64)
    return _precision("dtype", image if result is None else result)


def fits_single(kernel: Any) -> bool:
    """Return whether the largest tap of a kernel is a normal number in float32, or zero."""
    largest = getattr(kernel, "largest", None)
    largest = float(np.abs(kernel).max()) if largest is None else largest
    return not largest or SINGLE[0] < largest < SINGLE[1]


@functools.lru_cache(KEPT)
def _precision(name: str, dtype: Any) -> np.dtype[Any]:
    if dtype.kind in "biu":
        most = 1 if name == "dtype" else 2  # bytes of results and of samples
        return np.dtype(np.float32 if dtype.itemsize <= most else np.float64)
    if dtype.kind in "fc" and dtype.itemsize <= (8 if dtype.kind == "f" else 16):
        is_double = dtype.itemsize == (8 if dtype.kind == "f" else 16)
        return np.dtype(np.float64 if is_double else np.float32)
    hint = ": convert it first" if name == "image" else ""
    raise TypeError(
        f"{name} must be bool, integers, float16 to float64, complex64 or complex128, got "
        f"{dtype}{hint}"
    )


def as_axes(axes: Sequence[int] | None, image_ndim: int, kernel_ndim: int) -> Ints:
    """Return the nonnegative axes of an image that a kernel runs along."""
    if kernel_ndim > image_ndim:
        raise ValueError(
            f"kernel must have at most the image's {image_ndim} axes, got {kernel_ndim}"
        )
    if axes is not None and kernel_ndim > 1 and np.ndim(axes) == 0:
        raise ValueError(f"axes must be {kernel_ndim} axes, as the kernel has, got {axes!r}")
    if axes is None and kernel_ndim == 1 < image_ndim:
        raise ValueError(
            f"axes must be given for a kernel with one axis and an image with {image_ndim}: "
            "axes=-1 for the last one"
        )
    along = range(kernel_ndim) if axes is None else as_integers("axes", axes, kernel_ndim)
    wrapped = tuple(a % image_ndim for a in along)
    if any(not -image_ndim <= a < image_ndim for a in along) or len({*wrapped}) < kernel_ndim:
        raise ValueError(
            f"axes must be different and between {-image_ndim} and {image_ndim - 1}, got {axes!r}"
        )
    return wrapped


def as_tolerance(tolerance: Any, rank: int | None) -> float | None:
    """Return the tolerance as a float; raise if a rank is given as well."""
    if tolerance is None:
        return None
    limit = as_real("tolerance", tolerance)
    if rank is not None:
        raise TypeError("give rank or tolerance, not both")
    if not 0 <= limit < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance!r}")
    return limit


def round_off(kernel: Array, work: Any = None) -> float:
    """Return the round-off error of a kernel relative to its norm; less than this is not rank.

    That of the kernel as it was given, or in the dtype of the computation if it is larger.
    """
    eps = float(np.finfo(kernel.dtype).eps)
    if work is not None:
        eps = max(eps, float(np.finfo(work).eps))
    return _ROUND_OFF_FACTOR * eps * math.sqrt(kernel.size)
