"""How a chain is run: on the CPU for a NumPy array, on a GPU for a CuPy array."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.stage import Stage

_MODULES = {"numpy": "lowrank.backends.cpu"}


class Runner(Protocol):
    """A planned chain: weights packed and tiles chosen for one input shape."""

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the plan on `x`; the result is in `out` if that is given."""


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: object,
    bias: Array | None = None,
    threads: int | None = None,
) -> Runner:
    """Plan `stages` for inputs of `shape` = (channels, *spatial), by the type of the weights."""
    return _backend(stages[0].weight).plan(  # type: ignore[no-any-return]
        stages, shape, dtype, bias, threads
    )


def check(name: str, x: object, stages: Sequence[Stage]) -> None:
    """Refuse arrays that no backend runs, and arrays that live elsewhere than the weights."""
    library = _library(x)
    if library not in _MODULES or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array, got {type(x).__qualname__}")
    if library != _library(stages[0].weight):
        raise TypeError(
            f"{name} is a {library} array but the weights are {_library(stages[0].weight)} arrays"
        )


def _library(x: object) -> str:
    return "numpy" if isinstance(x, np.ndarray) else type(x).__module__.partition(".")[0]


def _backend(x: object) -> ModuleType:
    """The module that runs arrays of the type of `x`, imported when first needed."""
    return importlib.import_module(_MODULES[_library(x)])
