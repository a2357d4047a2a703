"""Sample types of pictures: which an output has, and how values become samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.cli.pictures import TIFF_ENDINGS
from lowrank.core import reference

#: Sample types of --output-dtype.
SAMPLE_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64",
)  # fmt: skip
DEEP_ENDINGS = (".png", ".pgm")  # of pictures with 16 bits per sample, beside TIFF


def work_dtype(values: Array) -> np.dtype[Any]:
    """Return the floating-point type that holds all samples of a picture."""
    if values.dtype.kind not in "iub":
        return values.dtype
    return np.dtype(np.float32 if values.dtype.itemsize <= 2 else np.float64)


def kept_dtype(
    path: Path, values: Array, asked: str | None, sums_to_zero: bool
) -> np.dtype[Any] | None:
    """Return the sample type of an output that holds the values themselves; None to scale them.

    Parameters
    ----------
    path : Path
        Output file.
    values : ndarray
        Samples of the input.
    asked : str or None
        ``--output-dtype``.
    sums_to_zero : bool
        Whether the sum of the kernel is zero, so that half of the results are below zero.

    Returns
    -------
    dtype or None
    """
    ending = ".npy" if path.suffix == ".npy" else path.suffix.lower()
    is_tiff = ending in TIFF_ENDINGS
    allowed: tuple[str, ...] = SAMPLE_TYPES
    if ending != ".npy" and not is_tiff:
        allowed = ("uint8", "uint16") if ending in DEEP_ENDINGS else ("uint8",)
    if asked is not None:
        if asked not in allowed:
            raise ValueError(
                f"--output-dtype must be one of {', '.join(allowed)} for {ending} files, "
                f"got {asked!r}"
            )
        return np.dtype(asked)
    if ending == ".npy":
        return work_dtype(values)
    if is_tiff:
        is_float = values.dtype.kind == "b" or (values.dtype.kind == "u" and sums_to_zero)
        return work_dtype(values) if is_float else values.dtype
    return None if sums_to_zero or values.dtype.name not in allowed else values.dtype


@dataclass(frozen=True, slots=True)
class Scale:
    """Map of values to the whole range of an unsigned sample type.

    Attributes
    ----------
    low, high : float
        Values that become 0 and the largest sample.
    dtype : dtype
        Sample type.
    """

    low: float
    high: float
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, path: Path, values: Array, result: Array, sums_to_zero: bool) -> Scale:
        """Return the scale of a result: its own if centred at zero, else that of the input."""
        is_deep = path.suffix.lower() in DEEP_ENDINGS and values.dtype == np.uint16
        dtype = np.dtype(np.uint16 if is_deep else np.uint8)
        if sums_to_zero:
            peak = float(np.abs(result).max(initial=0)) or 1.0
            return cls(-peak, peak, dtype)
        if values.dtype.kind in "ub":
            return cls(0.0, _full_range(values.dtype), dtype)
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        return cls(low, high if high > low else 1.0, dtype)

    def __str__(self) -> str:
        return f"{self.low:.6g} to {self.high:.6g} written as 0 to {np.iinfo(self.dtype).max}"

    def apply(self, values: Array) -> Array:
        """Return scaled values: rounded to nearest even, and saturated."""
        top = np.iinfo(self.dtype).max
        scaled = (values.astype(np.float64) - self.low) * (top / (self.high - self.low))
        return reference.saturate(scaled, self.dtype)


def scaled_alpha(alpha: Array, dtype: np.dtype[Any]) -> Array:
    """Return alpha in the whole range of another sample type."""
    if alpha.dtype == dtype:
        return alpha
    return Scale(0.0, _full_range(alpha.dtype), dtype).apply(alpha)


def _full_range(dtype: np.dtype[Any]) -> float:
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0


def as_samples(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values as samples; integers are rounded to nearest even and saturate."""
    if values.dtype == dtype:
        return values
    if dtype.kind in "iu" and values.dtype.kind == "f":
        return reference.saturate(values, dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(values, limits.min, limits.max)
    return values.astype(dtype)
