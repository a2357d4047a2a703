"""How a chain is run: on the CPU for a NumPy array, on a GPU for a CuPy array."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage

#: Beside float32 and float64, what plans read and write, rounded to nearest and saturated.
INTEGERS = tuple(np.dtype(t) for t in (np.uint8, np.int8, np.uint16, np.int16))

_MODULES = {"numpy": "lowrank.engine.cpu", "cupy": "lowrank.engine.cuda.plan"}
#: Precisions that plans run in, by the library of the weights.
PRECISIONS = {
    "numpy": ("float32", "float64"),
    "cupy": ("float32", "float64", "float16", "bfloat16"),
}


class NoGPU(RuntimeError):
    """No GPU can be used; the message says why, and what to install."""


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
    library, own = _library(x), _library(stages[0].weight)
    if library not in _MODULES or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(x).__qualname__}")
    if library != own:
        there = "f.to('cuda')" if library == "cupy" else "f.to('cpu')"
        raise TypeError(
            f"{name} is a {library} array but the weights are {own} arrays: {there} moves a chain"
        )
    here, there = device_of(x), device_of(stages[0].weight)
    if here != there:
        raise ValueError(f"{name} is on {here} but the weights are on {there}")


def precision(dtype: Any, weight: object) -> np.dtype[Any]:
    """A dtype that plans run in where this weight is; else says which there are."""
    if dtype == "bfloat16":  # NumPy knows the name once this is imported
        importlib.import_module("ml_dtypes")
    found: np.dtype[Any] = np.dtype(dtype)
    known = PRECISIONS[_library(weight)]
    if found.name not in known:
        raise TypeError(f"dtype must be one of {', '.join(known)}, got {found}")
    return found


def device_of(x: Any) -> str:
    """Where an array is: ``"cpu"``, or such as ``"cuda:0"``."""
    return "cpu" if _library(x) != "cupy" else f"cuda:{x.device.id}"


def is_there(x: Any, device: str) -> bool:
    """Whether an array is on a device; ``"cuda"`` is any GPU."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cuda', got {device!r}")
    here = device_of(x)
    return device == here or (device == "cuda" and here != "cpu")


def moved(x: Any, device: str) -> Any:
    """A copy of an array on a device where it is not yet."""
    return _cuda().fetched(x) if device == "cpu" else _cuda().sent(x, device)


def like(values: Array, x: Any) -> Any:
    """NumPy's `values` in the library, and on the device, of `x`."""
    return values if device_of(x) == "cpu" else moved(values, device_of(x))


def check_gpu() -> None:
    """Refuse to go on where no GPU can be used: ImportError or NoGPU with the reason."""
    _cuda().check_device()


def on_gpu(x: object) -> bool:
    """Whether this is an array of a GPU's."""
    return is_array(x) and not isinstance(x, np.ndarray)


def at(x: Any) -> AbstractContextManager[Any]:
    """A context in which new arrays are made where `x` is."""
    return x.device if on_gpu(x) else nullcontext()


def is_array(x: object) -> bool:
    """Whether some backend has arrays of this type."""
    return _library(x) in _MODULES


def _library(x: object) -> str:
    return "numpy" if isinstance(x, np.ndarray) else type(x).__module__.partition(".")[0]


def _cuda() -> ModuleType:
    return importlib.import_module(_MODULES["cupy"])


def _backend(x: object) -> ModuleType:
    """The module that runs arrays of the type of `x`, imported when first needed."""
    return importlib.import_module(_MODULES[_library(x)])
