"""Conversion of images between their dtype and those of the engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array
from lowrank.core import reference
from lowrank.core.arrays import as_native_order


def as_engine_input(image: Array, work: np.dtype[Any]) -> Array:
    """Return `image` in native order and a dtype that the engine reads: its own, or `work`."""
    if image.dtype in (work, *engine.INTEGERS) and image.dtype.isnative:
        return as_native_order(image)
    return image.astype(work)


def as_image(result: Array, dtype: np.dtype[Any]) -> Array:
    """Return a result as `dtype`; integers are rounded and saturate."""
    if result.dtype == dtype:
        return result
    return reference.saturate(result, dtype) if dtype.kind in "iu" else result.astype(dtype)
