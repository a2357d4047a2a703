"""Compiling and launching the kernels of kernels.cu."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import cupy
import numpy as np

#: Element types of kernels.cu, by the name of the dtype.
CUDA_TYPES = {
    "float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16", "uint8": "u8",
}  # fmt: skip
DEFAULT_SHARED = 48 << 10  # bytes per block that need no opt-in
VECTOR = 16  # bytes of the widest load
MAX_THREADS = 2**32 - 1  # of a launch: kernels number theirs in 32 bits


class Kernel:
    """A compiled kernel with the arguments that are the same at every launch.

    Parameters
    ----------
    name : str
        Kernel with its template arguments.
    *fixed : int, array or None
        Last arguments: integers of 32 bits, arrays, and null pointers.
    shared, threads : int
        Bytes of dynamic shared memory, and number of threads, per block.
    """

    def __init__(self, name: str, *fixed: Any, shared: int = 0, threads: int = 256) -> None:
        function = _compile(cupy.cuda.Device().id, name)
        # Plans share compiled kernels: the opt-in must cover the largest request.
        if shared > max(DEFAULT_SHARED, function.max_dynamic_shared_size_bytes):
            function.max_dynamic_shared_size_bytes = shared
        self.threads = threads
        # Converting a number takes CuPy as long as the rest of a launch.
        self._launch, self._fixed = function.kernel, tuple(map(_as_argument, fixed))
        self._block, self._shared = (threads,), shared

    def __call__(self, blocks: int, *varying: Any) -> None:
        """Launch on the current stream; the first arguments are arrays and 64-bit integers."""
        if blocks * self.threads > MAX_THREADS:
            raise ValueError(
                f"a launch must have at most {MAX_THREADS} threads, got {blocks * self.threads}: "
                "run smaller batches or images"
            )
        self._launch((blocks,), self._block, (*varying, *self._fixed), self._shared)


@functools.cache
def _compile(device: int, name: str) -> Any:
    """Compile a kernel for the current device, `device`; CuPy caches binaries on disk."""
    source = resources.files("lowrank.engine.cuda").joinpath("kernels.cu").read_text("utf-8")
    module = cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=(name,))
    return module.get_function(name)


def _as_argument(value: Any) -> Any:
    if value is None:
        return cupy.cuda.function.CNumpyArray(np.array(0, np.uint64))
    if isinstance(value, int):
        return cupy.cuda.function.CNumpyArray(np.array(value, np.int32))
    return value


def vector_width(itemsize: int, *counts: int) -> int:
    """Return the elements of a vector of at most 16 bytes that divides all counts."""
    width = VECTOR // itemsize
    while any(n % width for n in counts):
        width //= 2
    return width
