"""Padding modes as tables of indices."""

from __future__ import annotations

import numpy as np

from lowrank._typing import Array
from lowrank.core import reference


def padded_indices(n: int, before: int, after: int, mode: str, width: int) -> Array:
    """Return the index of the value at each padded position, of `width` values per sample.

    -1 stands for the constant.
    """
    index = np.arange(n, dtype=np.int32).reshape(1, 1, n)
    constant = np.full(1, -1, np.int32)
    padded: Array = reference.pad(index, ((before, after),), mode, constant).reshape(-1, 1)
    values = np.where(padded < 0, -1, padded * width + np.arange(width, dtype=np.int32))
    return np.ascontiguousarray(values.reshape(-1), np.int32)
