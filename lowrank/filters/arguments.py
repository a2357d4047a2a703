"""Checks and conversions of the arguments of filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import as_integers
from lowrank.factorization import Factorization, dense

SINGLE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ROUND_OFF_FACTOR = 4  # allows for the rounding of kernels that were computed, not given

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


def as_kernel(value: Any) -> Array:
    """Return a kernel over 1 to 3 axes, in float32 or float64 and native byte order."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("kernel must be a plain array, got a masked array: fill the mask first")
    k = np.asarray(value)
    if k.dtype.kind in "iub":
        k = k.astype(np.float64)
    k = k.astype(k.dtype.newbyteorder("="), copy=False)
    if k.dtype == np.float16:
        k = k.astype(np.float32)
    if k.dtype not in (np.float32, np.float64):
        raise TypeError(f"kernel must be real, float32 or float64, got {k.dtype}")
    if k.ndim not in (1, 2, 3) or k.size == 0:
        raise ValueError(f"kernel must have 1 to 3 axes, none of them empty, got shape {k.shape}")
    if not np.isfinite(k).all():
        raise ValueError("kernel must be finite, got NaN or infinite values")
    return k


def as_real(name: str, value: Any) -> float:
    """Return `value` as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None


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


def work_dtype(image: Array, kernel: Any = None) -> np.dtype[Any]:
    """Return the dtype of the computation: float32 if it holds all values, else float64."""
    dtype = _image_dtype(image)
    if kernel is None or dtype == np.float64:
        return dtype
    largest = getattr(kernel, "largest", None)
    largest = float(np.abs(kernel).max()) if largest is None else largest
    is_within = not largest or SINGLE[0] < largest < SINGLE[1]
    return dtype if is_within else np.dtype(np.float64)


def _image_dtype(image: Array) -> np.dtype[Any]:
    native = image.dtype.newbyteorder("=")
    if native in (np.float32, np.float64):
        return native
    if native == np.float16:
        return np.dtype(np.float32)
    if image.dtype.kind in "iu":
        return np.dtype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    raise TypeError(
        f"image must be floating-point or integers, got {image.dtype}: convert it first"
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


def as_out(image: Array, out: Array | None) -> Array:
    """Return an array for the result, of the shape and dtype of an image."""
    if out is None:
        return np.empty(image.shape, image.dtype)
    if type(out) is not type(image):
        raise TypeError(f"out must be an array like the image, got {type(out).__qualname__}")
    native = image.dtype.newbyteorder("=")
    if out.shape != image.shape or out.dtype.newbyteorder("=") != native:
        raise ValueError(
            f"out must have shape {image.shape} and dtype {image.dtype}, "
            f"got {out.shape} and {out.dtype}"
        )
    return out


def flipped_origins(origins: Ints, taps: Ints) -> Ints:
    """Return the shifts of a flipped kernel."""
    return tuple(-o - (n % 2 == 0) for o, n in zip(origins, taps))


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


def as_convolution(kernel: Array, mode: str, cval: float, origins: Ints) -> Factorization:
    """Return the filter as a dense one-channel convolution that keeps the size."""
    before = [n // 2 + o for n, o in zip(kernel.shape, origins)]
    return dense(
        kernel[None, None],
        padding=[(b, n - 1 - b) for b, n in zip(before, kernel.shape)],
        padding_mode=as_padding_mode(mode),
        value=cval,
    )


def round_off(kernel: Array) -> float:
    """Return the round-off error of a kernel relative to its norm; less than this is not rank."""
    return _ROUND_OFF_FACTOR * float(np.finfo(kernel.dtype).eps) * math.sqrt(kernel.size)
