"""What filters are called with, checked: a mistake is named, with what is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import as_integers

#: scipy.ndimage's names of the border modes, and ours.
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


def kernel(given: Any) -> Array:
    """A kernel over 1 to 3 axes, in float32 or float64 and native byte order."""
    k = np.asarray(given)
    if k.dtype.kind in "iub":
        k = k.astype(np.float64)
    k = k.astype(k.dtype.newbyteorder("="), copy=False)
    if k.dtype == np.float16:
        k = k.astype(np.float32)
    if k.dtype not in (np.float32, np.float64):
        raise TypeError(f"kernel must be real, float32 or float64, got {k.dtype}")
    if k.ndim not in (1, 2, 3) or k.size == 0:
        raise ValueError(f"kernel must have 1 to 3 axes and no empty one, got shape {k.shape}")
    if not np.isfinite(k).all():
        raise ValueError("kernel holds NaN or infinite values")
    return k


def real(name: str, value: Any) -> float:
    """`value` as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None


def mode(name: str) -> PaddingMode:
    """Our name of one of scipy.ndimage's border modes."""
    if not isinstance(name, str) or name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}")
    return MODES[name]


def origins(origin: int | Sequence[int], taps: Ints) -> Ints:
    """A shift an axis that leaves the sample under the filter, as scipy.ndimage wants it."""
    shifts = as_integers("origin", origin, len(taps))
    for o, n in zip(shifts, taps):
        if not -(n // 2) <= o <= (n - 1) // 2:
            raise ValueError(
                f"origin must be from {-(n // 2)} to {(n - 1) // 2} for {n} taps, got {o}"
            )
    return shifts


def work_dtype(image: Array) -> np.dtype[Any]:
    """What an image is computed in: float32 where that holds its values, else float64."""
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


def axes(given: Sequence[int] | None, image: int, kernel: int) -> Ints:
    """Axes of an image that a kernel over so many runs along, counted from 0."""
    if kernel > image:
        raise ValueError(f"a kernel over {kernel} axes does not fit an image with {image}")
    along = tuple(range(kernel)) if given is None else as_integers("axes", given, kernel)
    if any(not -image <= a < image for a in along) or len({a % image for a in along}) < kernel:
        raise ValueError(f"axes must be different and from {-image} to {image - 1}, got {given!r}")
    return tuple(a % image for a in along)
