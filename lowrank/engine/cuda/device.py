"""CuPy and its devices: availability, transfers and messages about memory."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.engine import NoGPU

try:
    import cupy as cupy
except ImportError as missing:
    if not isinstance(missing, ModuleNotFoundError) or missing.name != "cupy":
        raise ImportError(
            f"CuPy is installed but cannot be imported ({str(missing).strip().splitlines()[0]}): "
            "keep one CuPy wheel only, that of the driver's CUDA"
        ) from missing
    raise ImportError(
        "lowrank runs on a GPU through CuPy, which is not installed: pip install 'lowrank[gpu]', "
        "or cupy-cuda12x[ctk] where the driver is of CUDA 12"
    ) from missing

#: Oldest major version of CuPy: before, wheels of pip did not find the libraries of pip.
OLDEST_CUPY = 14
#: CUDA libraries that plans and decompositions call.
LIBRARIES = ("nvrtc", "cublas", "cusolver")
#: Status that means out of memory, by the class of CuPy's error.
_OUT_OF_MEMORY = {"CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3, "CUSOLVERError": 2}


def check_device() -> None:
    """Raise NoGPU unless a GPU can be used; the message says what is missing."""
    if int(cupy.__version__.partition(".")[0]) < OLDEST_CUPY:
        raise NoGPU(f"CuPy must be {OLDEST_CUPY} or newer, got {cupy.__version__}")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NoGPU(_cause(str(error))) from error
    except (ImportError, OSError) as error:  # a wheel of another CUDA than what is installed
        raise NoGPU(
            f"CuPy does not find its CUDA libraries ({error}): install the wheel for this "
            "machine's CUDA, cupy-cuda13x or cupy-cuda12x"
        ) from error
    if not count:
        raise NoGPU("there is no GPU: CuPy finds a driver, but no device")
    missing = missing_libraries()
    if missing:
        cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000  # that CuPy was built for
        raise NoGPU(
            f"CUDA's {' and '.join(missing)} cannot be loaded: pip install 'cupy-cuda{cuda}x[ctk]'"
        )


@functools.cache
def missing_libraries() -> tuple[str, ...]:
    """Return the CUDA libraries that cannot be loaded, and ``"headers"`` if there are none."""
    missing = []
    for name in LIBRARIES:
        try:
            # The attribute, not the module of this name: it loads the libraries of pip's wheels.
            library = getattr(cupy.cuda, name)
            if name == "nvrtc":  # loaded by its first call
                library.getVersion()
        except (ImportError, OSError, RuntimeError):
            missing.append(name)
    # CuPy passes these to every compilation, and finds them by this package.
    if importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart") is None:
        missing.append("headers")
    return tuple(missing)


@functools.cache
def load_cublas() -> Any:
    """Return the cuBLAS that CuPy has loaded; CuPy's own functions refuse to be captured."""
    cupy.cuda.cublas.check_status(0)  # loads it
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    name = f"cublas64_{major}.dll" if os.name == "nt" else f"libcublas.so.{major}"
    library = ctypes.CDLL(name)
    number, address = ctypes.c_int, ctypes.c_void_p
    matrix = address, number, number, ctypes.c_longlong  # data, type, pitch, stride
    library.cublasSetStream_v2.argtypes = address, address
    library.cublasGemmStridedBatchedEx.argtypes = (
        address, *[number] * 5, address, *matrix, *matrix, address, *matrix, *[number] * 3,
    )  # fmt: skip
    return library


def _cause(message: str) -> str:
    if "InsufficientDriver" in message:
        return (
            f"the GPU's driver is missing, or too old for this CuPy ({message}): install NVIDIA's "
            "driver, or the CuPy wheel of an older CUDA such as cupy-cuda12x"
        )
    if "NoDevice" in message:
        return f"there is no GPU that CUDA can use ({message})"
    return f"CUDA does not start ({message}): update NVIDIA's driver, or restart the machine"


def device_id(array: Any) -> int:
    """Return the number of the device that holds a CuPy array."""
    return int(array.data.device_id)


def to_device(array: Any, device: str) -> Any:
    """Copy a NumPy or CuPy array to a device such as ``"cuda"`` or ``"cuda:1"``.

    The copy is complete on return: any stream may read it.
    """
    check_device()
    name, _, number = device.partition(":")
    count = cupy.cuda.runtime.getDeviceCount()
    if name != "cuda" or (number and not number.isdecimal()) or device == "cuda:":
        raise ValueError(f"device must be 'cpu', 'cuda' or such as 'cuda:1', got {device!r}")
    if number and int(number) >= count:
        raise ValueError(f"there is no {device}: this machine has {count} GPUs")
    with cupy.cuda.Device(int(number) if number else None), explain_out_of_memory(array.nbytes):
        if isinstance(array, np.ndarray):
            found = cupy.asarray(np.ascontiguousarray(array))
        elif device_id(array) == cupy.cuda.runtime.getDevice():
            found = array.copy()
        else:
            found = cupy.asarray(array.get())  # through the host: peer access may be unavailable
        cupy.cuda.get_current_stream().synchronize()
        return found


def to_host(array: Any) -> Array:
    """Copy a CuPy array to a NumPy array."""
    return np.asarray(array.get())


@contextmanager
def explain_out_of_memory(needed: int) -> Iterator[None]:
    """Turn errors of CuPy and CUDA about memory into one that says how much is free."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        raise_memory_error(error, needed)
        raise


def raise_memory_error(error: Exception, needed: int) -> None:
    """Raise MemoryError if `error` is that a GPU has too little memory; return otherwise."""
    status = _OUT_OF_MEMORY.get(type(error).__name__)
    is_status = status is not None and getattr(error, "status", None) == status
    if is_status or isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        cupy.get_default_memory_pool().free_all_blocks()  # libraries do not allocate from it
        free, total = cupy.cuda.Device().mem_info
        raise MemoryError(
            f"the GPU has {free / 2**20:.0f} of {total / 2**20:.0f} MiB free, and about "
            f"{needed / 2**20:.0f} MiB more are needed: run smaller batches, or free other arrays"
        ) from error
