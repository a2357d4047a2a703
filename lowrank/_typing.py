"""The few types that every module speaks of."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular", "symmetric", "constant"]


def trailing(*axes: Any) -> Any:
    """Index that means the last axes of an array, whatever stands before them."""
    return (..., *axes)
