"""Types that all packages share."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular", "symmetric", "constant"]


def trailing(*axes: Any) -> Any:
    """Return the index of the last axes of an array, for any number of axes before them."""
    return (..., *axes)
