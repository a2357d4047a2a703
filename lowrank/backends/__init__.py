"""How a chain is run: on the CPU for a NumPy array, on a GPU for a CuPy array."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.stage import Epilogue, Stage

#: Beside float32 and float64, what plans read and write, rounded to nearest and saturated.
INTEGERS = tuple(np.dtype(t) for t in (np.uint8, np.int8, np.uint16, np.int16))

_MODULES = {"numpy": "lowrank.backends.cpu"}


class Step(NamedTuple):
    """What a run spent on one step of one stage; see :meth:`Runner.breakdown`.

    Attributes
    ----------
    stage : str
        Number of the stage, from 0, and its weight's shape; ``"run"`` for what belongs to no stage.
    step : str
        ``"bring"``: input into padded bands; ``"compute"``: multiply-adds, and results to their
        places; ``"deliver"``: results to the type of the output; ``"prepare"``: padding and weaving
        in NumPy; ``"rest"``: the call, and waiting for threads.
    seconds : float
        Added up over the threads that took part, then divided by their number: the steps add up
        to the run.
    macs : int
        Multiply-adds that were done, those that neighbouring tiles repeat included.
    bytes : int
        Read and written, at any level of the memory.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> f = lowrank.dense(np.ones((4, 2, 3)))
    >>> steps = f.compile((2, 10), threads=1).breakdown(np.ones((1, 2, 10)))
    >>> sum(s.macs for s in steps)
    192
    """

    stage: str
    step: str
    seconds: float
    macs: int
    bytes: int


class Runner(Protocol):
    """A planned chain: weights packed and tiles chosen for one input shape."""

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the plan on `x`; the result is in `out` if that is given."""

    def breakdown(self, x: Array, out: Array | None = None, *, repeat: int = 5) -> tuple[Step, ...]:
        """Where the time of a run on `x` goes: the steps of the median one of `repeat` runs."""


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: object,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
) -> Runner:
    """Plan `stages` for inputs of `shape` = (channels, *spatial), by the type of the weights.

    With `interleaved`, a sample along the last axis is so many numbers side by side, such as the
    colours of a pixel, each filtered alike: arrays are that many times as long there.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return _backend(stages[0].weight).plan(  # type: ignore[no-any-return]
        stages, shape, dtype, epilogues, threads, interleaved
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
