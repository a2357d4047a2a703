"""Running chains: on the CPU for NumPy arrays, on a GPU for CuPy arrays."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.threads import as_threads

#: Integer types that plans also read and write; results are rounded to nearest and saturated.
INTEGERS = tuple(np.dtype(t) for t in (np.uint8, np.int8, np.uint16, np.int16))

Algorithm = Literal["auto", "direct"]
#: Algorithms of a plan: fast ones where they pay and their error is small, or direct sums alone.
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_MODULES = {"numpy": "lowrank.engine.cpu", "cupy": "lowrank.engine.cuda.plan"}
#: Precisions that plans compute in, by the library of the weights.
PRECISIONS = {
    "numpy": ("float32", "float64"),
    "cupy": ("float32", "float64", "float16", "bfloat16"),
}


class NoGPU(RuntimeError):
    """No GPU can be used; the message says why, and what to install."""


class StepProfile(NamedTuple):
    """Time, MACs and memory traffic of one step of a run; see :meth:`Runner.breakdown`.

    Attributes
    ----------
    stage : str
        Number of the stage, from 0, and its weight's shape; ``"run"`` for steps of no stage.
    step : str
        ``"pack"``: copies of the input into padded tile buffers; ``"compute"``: MACs and stores of
        their results; ``"store"``: conversion of results to the type of the output;
        ``"unpack"``: copies of the results from channels-last buffers; ``"prepare"``: padding,
        depth-to-space and reordered channels; ``"rest"``: call overhead and waiting for threads.
        On a GPU, the kind of the kernel.
    seconds : float
        Sum over the threads, divided by their number: the steps add up to the run.
    macs : int
        Number of MACs, including those that neighbouring tiles repeat.
    bytes : int
        Bytes read and written, at any level of the memory.

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
        """Run the plan on `x` and return the result, in `out` if given."""

    def breakdown(
        self, x: Array, out: Array | None = None, *, repeat: int = 5
    ) -> tuple[StepProfile, ...]:
        """Profile the steps of the median of `repeat` runs on `x`."""

    def describe(self, x: Array | None = None) -> str:
        """Return a table of what the plan runs; with `x`, also of the times of a run."""


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: object,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
    algorithm: Algorithm = "direct",
) -> Runner:
    """Plan `stages` for inputs of `shape` = (channels, *spatial); the weights choose the device.

    `interleaved` is the number of values per sample along the last axis, such as the colours of a
    pixel, each filtered alike: arrays are that many times as long along this axis.  `algorithm` is
    ``"auto"`` or ``"direct"``; see :meth:`lowrank.Factorization.compile`.
    """
    check_options(algorithm, threads)
    return _backend(stages[0].weight).plan(  # type: ignore[no-any-return]
        stages, shape, dtype, epilogues, threads, interleaved, algorithm
    )


def check_options(algorithm: object, threads: int | None) -> None:
    """Raise unless these are an algorithm and a number of threads."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    as_threads(threads)


def check_array(name: str, x: object, stages: Sequence[Stage]) -> None:
    """Raise unless `x` is an array of the weights' library, on their device."""
    library, weight_library = _library(x), _library(stages[0].weight)
    if library not in _MODULES or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(x).__qualname__}")
    if library != weight_library:
        move = "f.to('cuda')" if library == "cupy" else "f.to('cpu')"
        raise TypeError(
            f"{name} is a {library} array but the weights are {weight_library} arrays: "
            f"{move} moves a chain"
        )
    device, weight_device = device_of(x), device_of(stages[0].weight)
    if device != weight_device:
        raise ValueError(f"{name} is on {device} but the weights are on {weight_device}")


def as_precision(dtype: Any, weight: object) -> np.dtype[Any]:
    """Return `dtype` as a NumPy dtype; raise unless plans compute in it on the weight's device."""
    if dtype == "bfloat16":  # NumPy knows the name once this is imported
        importlib.import_module("ml_dtypes")
    precision: np.dtype[Any] = np.dtype(dtype)
    allowed = PRECISIONS[_library(weight)]
    if precision.name not in allowed:
        raise TypeError(f"dtype must be one of {', '.join(allowed)}, got {precision}")
    return precision


def device_of(x: Any) -> str:
    """Return the device of an array: ``"cpu"``, or such as ``"cuda:0"``."""
    return "cpu" if _library(x) != "cupy" else f"cuda:{x.device.id}"


def is_on_device(x: Any, device: str) -> bool:
    """Return whether an array is on a device; ``"cuda"`` is any GPU."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cuda', got {device!r}")
    actual = device_of(x)
    return device == actual or (device == "cuda" and actual != "cpu")


def to_device(x: Any, device: str) -> Any:
    """Copy an array to another device."""
    return _cuda().to_host(x) if device == "cpu" else _cuda().to_device(x, device)


def as_array_like(values: Array, x: Any) -> Any:
    """Return NumPy's `values` in the library and on the device of `x`."""
    return values if device_of(x) == "cpu" else to_device(values, device_of(x))


def check_gpu() -> None:
    """Raise ImportError or NoGPU, with the reason, unless a GPU can be used."""
    _cuda().check_device()


def max_threads() -> int:
    """Return the number of threads that OpenMP offers; 1 in a forked child."""
    return int(importlib.import_module("lowrank._kernels._core").max_threads())


def is_on_gpu(x: object) -> bool:
    """Return whether `x` is an array on a GPU."""
    return not isinstance(x, np.ndarray) and is_array(x)


def device_context(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which new arrays are made on the device of `x`."""
    return x.device if is_on_gpu(x) else nullcontext()


def is_array(x: object) -> bool:
    """Return whether some backend runs arrays of this type."""
    return _library(x) in _MODULES


def _library(x: object) -> str:
    return "numpy" if isinstance(x, np.ndarray) else type(x).__module__.partition(".")[0]


def _cuda() -> ModuleType:
    return importlib.import_module("lowrank.engine.cuda.device")


def _backend(x: object) -> ModuleType:
    """Return the module that runs arrays of the type of `x`, imported when first needed."""
    return importlib.import_module(_MODULES[_library(x)])
