"""Compiling and launching the kernels of kernels.cu."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import cupy
import numpy as np

#: Element types of kernels.cu, by the name of the dtype.
CUDA_TYPES = {"float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16"}
THREADS_PER_BLOCK = 256
MAX_BLOCKS = 1 << 20  # of kernels that loop over their outputs with a grid-sized stride
DEFAULT_SHARED = 48 << 10  # bytes per block that need no opt-in


class Int64(int):
    """A kernel argument of 64 bits; other integers are passed as 32 bits."""


class Kernel:
    """A compiled kernel and the bytes of dynamic shared memory per block."""

    def __init__(self, name: str, shared: int = 0) -> None:
        self._call, self._shared = _compile(cupy.cuda.Device().id, name), shared
        # Plans share compiled kernels: the opt-in must cover the largest request.
        if shared > max(DEFAULT_SHARED, self._call.max_dynamic_shared_size_bytes):
            self._call.max_dynamic_shared_size_bytes = shared

    def __call__(self, blocks: int, *arguments: Any) -> None:
        """Launch the kernel on the current stream."""
        arguments = tuple(map(_as_argument, arguments))
        self._call((max(1, blocks),), (THREADS_PER_BLOCK,), arguments, shared_mem=self._shared)


@functools.cache
def _compile(device: int, name: str) -> Any:
    """Compile a kernel for the current device, `device`; CuPy caches binaries on disk."""
    source = resources.files("lowrank.engine.cuda").joinpath("kernels.cu").read_text()
    module = cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=(name,))
    return module.get_function(name)


def _as_argument(value: Any) -> Any:
    if value is None:
        return np.intp(0)
    if isinstance(value, Int64):
        return np.int64(value)
    return np.int32(value) if isinstance(value, int) else value


def grid_size(total: int) -> int:
    """Return the number of blocks for `total` threads, at most MAX_BLOCKS."""
    return min(-(-total // THREADS_PER_BLOCK), MAX_BLOCKS)
