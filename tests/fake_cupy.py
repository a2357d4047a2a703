"""Emulation of CuPy without a GPU: NumPy arrays, and kernels compiled for the CPU.

It rejects what CuPy rejects (mixing with NumPy arrays, implicit copies to the CPU, arrays on
another device than the current one), and errors that a GPU does not report: arguments of another
type than the kernel's, arrays of another stream that are not waited for, accesses outside arrays,
barriers that not all threads reach; see cuda_shim.h.  Where CuPy is installed, every call is bound
to CuPy's signature.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib
import inspect
import itertools
import mmap
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__version__ = "14.0.0"

SHIM = Path(__file__).with_name("cuda_shim.h")
# Undefined behaviour traps, and the shim reports where; warnings are errors.
FLAGS = ["-std=c++17", "-O0", "-g0", "-shared", "-fPIC", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
MEMORY = 16 << 30  # reported bytes of a device


class _Hooks(SimpleNamespace):
    """Settings of tests: number of devices, and the operations that shall fail."""

    def reset(self):
        self.devices = 2
        self.allocations = None  # number that succeed before one raises OutOfMemoryError
        self.compile_error = None  # message of the next compilation
        self.count_error = None  # CUDA status when devices are counted
        self.capture_error = None  # CUDA status when a graph is made
        self.missing = set()  # libraries that cannot be loaded, or "headers"
        self.launches = collections.deque(maxlen=10000)  # of Launch
        self.is_dry = False  # launches do nothing: the rest is the host's work


hooks = _Hooks()
hooks.reset()
Launch = collections.namedtuple("Launch", "name grid block shared device stream")


class _Thread(threading.local):
    """The current device, and the current stream of each device."""

    def __init__(self):
        self.device, self.streams = 0, {}


_thread = _Thread()


# --- signatures -----------------------------------------------------------------------------------

try:
    real = importlib.import_module("cupy")
except ImportError:
    real = None


@functools.cache
def signature_of(path):
    """Return the signature that CuPy has for a dotted name, or None if it states none.

    Compiled functions state theirs, with types of C, in the first line of their documentation.
    """
    found = real
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    with contextlib.suppress(ValueError, TypeError):
        return _without_self(inspect.signature(found).parameters.values())
    line = re.match(r"[\w.]+\((.*)\)( -> .*)?$", (found.__doc__ or "").partition("\n")[0])
    if line is None:
        return None
    parameters, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in filter(None, line[1].replace("\\", "").split(", ")):
        declared, has_default, _ = word.partition("=")
        name = declared.split()[-1]
        if name == "/":
            continue
        if name.startswith("*"):
            star = (
                inspect.Parameter.VAR_KEYWORD if "**" in name else inspect.Parameter.VAR_POSITIONAL
            )
            if name != "*":
                parameters.append(inspect.Parameter(name.strip("*"), star))
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        default = None if has_default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, kind, default=default))
    return _without_self(parameters)


def _without_self(parameters):
    return inspect.Signature([p for p in parameters if p.name != "self"])


def _bind(path, args, kwargs):
    """Raise as CuPy does if it lacks a function or its arguments; nothing without CuPy."""
    signature = signature_of(path) if real is not None else None
    if signature is not None:
        signature.bind(*args, **kwargs)


# --- cupy.cuda ------------------------------------------------------------------------------------


ERRORS = {2: "MemoryAllocation", 35: "InsufficientDriver", 100: "NoDevice", 101: "InvalidDevice"}


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(f"cudaError{ERRORS.get(status, 'Unknown')}: error {status}")


class CUDADriverError(RuntimeError):
    """Error of a launch that exceeds a limit."""


class OutOfMemoryError(MemoryError):
    def __init__(self, size, total, limit=0):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,}).")


class CompileException(Exception):
    def __init__(self, msg, source, name, options, backend="nvrtc"):
        self.source, self.name, self.options, self.backend = source, name, options, backend
        super().__init__(msg)


def _device_count():
    if hooks.count_error is not None:
        raise CUDARuntimeError(hooks.count_error)
    return hooks.devices


class Device:
    def __init__(self, device=None):
        self.id = _current() if device is None else int(device)
        self._before = []

    def use(self):
        if not 0 <= self.id < _device_count():
            raise CUDARuntimeError(101)
        _thread.device = self.id
        return self

    def __enter__(self):
        self._before.append(_current())
        return self.use()

    def __exit__(self, *_):
        _thread.device = self._before.pop()

    def __int__(self):
        return self.id

    def synchronize(self):
        _host.update(_clocks)

    compute_capability = "80"
    mem_info = (MEMORY // 2, MEMORY)
    attributes = {"MaxSharedMemoryPerBlockOptin": 101376}  # noqa: RUF012


def _current():
    return _thread.device


# Order of work: number of operations of each stream, and those that are known to be over before the
# next operation of a stream, or of the host, begins.
_clocks, _host = collections.defaultdict(int), collections.defaultdict(int)


class Stream:
    _pointers = itertools.count(4096, 16)

    def __init__(self, null=False, non_blocking=False, ptds=False):
        self.ptr = 0 if null else next(self._pointers)
        self.device_id = -1 if null else _current()
        self.is_non_blocking = non_blocking
        self.known = collections.Counter()
        self.captured = None  # operations of the graph that is captured
        self._before = []

    @classmethod
    def from_external(cls, obj):
        version, pointer = obj.__cuda_stream__()
        assert version == 0
        stream = cls(null=not pointer, non_blocking=True)
        stream.ptr = pointer
        return stream

    def use(self):
        _thread.streams[_current()] = self
        return self

    def __enter__(self):
        self._before.append(_stream())
        return self.use()

    def __exit__(self, *args):
        _thread.streams[_current()] = self._before.pop()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        assert self.captured is None
        _host[self.ptr] = _clocks[self.ptr]

    def wait_event(self, event):
        self.known |= event.known

    def _sees(self, made):
        """Return whether an operation (stream, number) is over before the next of this one."""
        stream, number = made
        waits = 0 in (stream.ptr, self.ptr) and not stream.is_non_blocking | self.is_non_blocking
        over = max(self.known[stream.ptr], _host[stream.ptr])
        return stream.ptr == self.ptr or waits or over >= number

    def begin_capture(self, mode=None):
        if not self.ptr:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.captured = []

    def end_capture(self):
        operations, self.captured = self.captured, None
        if hooks.capture_error is not None:
            raise CUDARuntimeError(hooks.capture_error)
        return Graph(operations)


class Graph:
    def __init__(self, operations):
        self._operations = operations

    def launch(self, stream=None):
        for operation in self._operations:
            operation(stream or _stream())


def _stream(device_id=-1):
    return _thread.streams.get(_thread.device if device_id < 0 else device_id, Stream.null)


def _submit(operation, stream=None):
    """Run an operation, or record it while its stream is captured."""
    stream = stream or _stream()
    if stream.captured is None:
        operation(stream)
    else:
        stream.captured.append(operation)


def _is_capturing(stream):
    assert stream == _stream().ptr
    return _stream().captured is not None


Stream.null = Stream(null=True)


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.known = collections.Counter()
        self.disable_timing = disable_timing

    def record(self, stream=None):
        stream = stream or _stream()
        self.known = stream.known | {stream.ptr: _clocks[stream.ptr]}
        self.time = time.perf_counter()

    def synchronize(self):
        pass


def _elapsed(start_event, end_event):
    """Return milliseconds."""
    return (end_event.time - start_event.time) * 1e3


def _module(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


runtime = _module(
    "cupy.cuda.runtime",
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=_device_count,
    getDevice=_current,
    setDevice=lambda device: Device(device).use(),
    getDeviceProperties=lambda device: {"name": b"none", "l2CacheSize": 1},
    streamIsCapturing=_is_capturing,
    runtimeGetVersion=lambda: 13000,
    driverGetVersion=lambda: 13000,
)


class _Cuda(types.ModuleType):
    """The module cupy.cuda, which loads libraries at the first use."""

    def __getattr__(self, name):
        if name not in LIBRARIES:
            raise AttributeError(f"module 'cupy.cuda' has no attribute {name!r}")
        if name in hooks.missing and name != "nvrtc":
            raise ImportError(f"lib{name}.so: cannot open shared object file")
        return LIBRARIES[name]


class CNumpyArray:
    """An argument that is passed by value."""

    def __init__(self, v):
        self.val = v


cuda = _Cuda("cupy.cuda")
vars(cuda).update(
    runtime=runtime,
    device=_module("cupy.cuda.device", get_cublas_handle=lambda: 1, Device=Device),
    driver=_module("cupy.cuda.driver", CUDADriverError=CUDADriverError),
    memory=_module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError),
    compiler=_module("cupy.cuda.compiler", CompileException=CompileException),
    function=_module("cupy.cuda.function", CNumpyArray=CNumpyArray),
    Device=Device,
    Stream=Stream,
    Event=Event,
    get_current_stream=_stream,
    get_elapsed_time=_elapsed,
    is_available=lambda: hooks.count_error is None and hooks.devices > 0,
)


def get_default_memory_pool():
    return SimpleNamespace(free_all_blocks=lambda stream=None: None)


# --- cuBLAS ---------------------------------------------------------------------------------------


def _matrix(pointer, columns, rows, pitch, kind):
    """Return a column-major matrix as an array (rows, columns)."""
    dtype = {0: np.float32, 1: np.float64, 2: np.float16, 14: "bfloat16"}[kind]
    size = np.dtype(dtype).itemsize * ((columns - 1) * pitch + rows)
    held, item = (ctypes.c_char * size).from_address(pointer), np.dtype(dtype).itemsize
    return np.ndarray((rows, columns), dtype, held, strides=(item, pitch * item))


def _gemm(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
    beta, C, Ctype, ldc, strideC, batchCount, computeType, algo,
):  # fmt: skip
    """Multiply column-major matrices, none transposed; return the status."""
    assert (handle, transa, transb, algo) == (1, 0, 0, -1)
    assert lda >= m
    assert ldb >= k
    assert ldc >= m
    assert Atype == Btype == Ctype
    assert computeType in {0: (68, 77), 1: (70,)}.get(Atype, (68,))
    total = ctypes.c_double if Atype == 1 else ctypes.c_float
    assert (total.from_address(alpha).value, total.from_address(beta).value) == (1, 0)
    wide = np.float64 if Atype == 1 else np.float32
    size = {0: 4, 1: 8, 2: 2, 14: 2}[Atype]

    def multiply(stream):
        for i in range(0 if hooks.is_dry else batchCount):
            x = _matrix(A + i * strideA * size, k, m, lda, Atype).astype(wide)
            y = _matrix(B + i * strideB * size, n, k, ldb, Btype).astype(wide)
            _matrix(C + i * strideC * size, n, m, ldc, Ctype)[...] = x @ y

    _submit(multiply)
    return 0


def _set_stream(handle, stream):
    assert (handle, stream) == (1, _stream().ptr)
    return 0


def _check_status(status):
    assert status == 0


#: The library itself. CuPy's functions for it, which cannot be captured, are not emulated.
CUBLAS = SimpleNamespace(cublasGemmStridedBatchedEx=_gemm, cublasSetStream_v2=_set_stream)


def _nvrtc_version():
    if "nvrtc" in hooks.missing:
        raise RuntimeError("Failure finding libnvrtc.so")
    return 13, 0


LIBRARIES = {
    "cublas": _module("cupy_backends.cuda.libs.cublas", check_status=_check_status),
    "cusolver": _module("cupy_backends.cuda.libs.cusolver"),
    "nvrtc": _module("cupy_backends.cuda.libs.nvrtc", getVersion=_nvrtc_version),
}
PATHFINDER = _module(
    "cuda.pathfinder",
    find_nvidia_header_directory=lambda libname: None if "headers" in hooks.missing else "include",
)


# --- memory ---------------------------------------------------------------------------------------

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _unwritten(shape, dtype):
    """Return an aligned array of NaN or arbitrary integers that ends before a protected page."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    stream = _stream()
    assert stream.captured is None, "memory is allocated while a graph is captured"
    if hooks.allocations is not None:
        hooks.allocations -= 1
        if hooks.allocations < 0:
            hooks.allocations = None
            raise OutOfMemoryError(size, MEMORY)
    if not size:
        return np.empty(shape, dtype)
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    start = _C.mmap(None, room + mmap.PAGESIZE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value) or _C.mprotect(start + room, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "no memory for an array")
    held = (ctypes.c_char * size).from_address(start + room - -(-size // 16) * 16)
    weakref.finalize(held, _C.munmap, start, room + mmap.PAGESIZE).atexit = False
    _clocks[stream.ptr] += 1
    held.made = stream, _clocks[stream.ptr]
    ctypes.memset(held, 0x5B if dtype.kind in "iub" else 0xFF, size)
    return np.ndarray(shape, dtype, held)


def _placed(a):
    """Copy `a` to such memory in its order, unless it is a view."""
    if a.base is not None or not a.size:
        return a
    if a.flags.f_contiguous and not a.flags.c_contiguous:
        return _placed(a.T.copy()).T
    to = _unwritten(a.shape, a.dtype)
    to[...] = a
    return to


# --- arrays ---------------------------------------------------------------------------------------


MemoryPointer = collections.namedtuple("MemoryPointer", "ptr device_id")


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    __module__ = "cupy"
    __hash__ = None
    __array_priority__ = 100

    def __init__(self, held, device):
        # Attributes, not properties: CuPy's cost little, too.
        self._held, self._device = held, device
        self.shape, self.dtype, self.flags = held.shape, held.dtype, held.flags
        self.ndim, self.size, self.nbytes = held.ndim, held.size, held.nbytes
        self.data = MemoryPointer(held.ctypes.data if held.size else 0, device)

    itemsize = property(lambda self: self._held.itemsize)
    strides = property(lambda self: self._held.strides)
    device = property(lambda self: Device(self._device))
    T = property(lambda self: ndarray(self._held.T, self._device))
    real = property(lambda self: ndarray(self._held.real, self._device))
    imag = property(lambda self: ndarray(self._held.imag, self._device))

    def _check_order(self, stream, what):
        """Raise unless this array was made before what `stream` does next."""
        held = self._held
        while isinstance(held.base, np.ndarray):
            held = held.base
        made = getattr(held.base, "made", None)
        assert made is None or stream._sees(made), f"{what} is used before another stream made it"

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method not in ("__call__", "reduce", "outer"):
            return NotImplemented
        return _call(f"cupy.{ufunc.__name__}", getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        if not all(issubclass(k, (ndarray, np.ndarray)) for k in kinds):
            return NotImplemented
        name = f"{function.__module__.replace('numpy', 'cupy', 1)}.{function.__name__}"
        return _call(name, function, args, kwargs, views=function.__name__ in VIEWS)

    def __dlpack__(self, **kwargs):
        return self._held.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._held.__dlpack_device__()

    def __getitem__(self, index):
        found = self._held[_opened(index)]
        if np.ndim(found) and not np.may_share_memory(found, self._held):
            found = np.ascontiguousarray(found)  # NumPy's gathers may have another order
        return _closed(found, self._device)

    def __setitem__(self, index, value):
        _opened(self)
        self._held[_opened(index)] = _opened(value)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __reduce__(self):
        return asarray, (self.get(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def get(self, stream=None, order="C", out=None, blocking=True):
        self._check_order(_stream(), "the array")
        _stream().synchronize()
        if out is None:
            return np.array(self._held, order=order)
        out[...] = self._held
        return out

    def set(self, arr, stream=None):
        assert isinstance(arr, np.ndarray)
        assert (arr.shape, arr.dtype) == (self.shape, self.dtype)
        self._held[...] = arr

    def copy(self, order="C"):
        """Copy from any device to the current one."""
        return _closed(self._held.copy(order))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if not copy and self.dtype == dtype:
            return self
        return _closed(_opened(self).astype(dtype, order))

    def fill(self, value):
        _opened(self).fill(_opened(value))


def _method(name):
    def method(self, *args, **kwargs):
        _bind(f"cupy.ndarray.{name}", args, kwargs)
        held = self._held if name in VIEWS else _opened(self)
        device = self._device if name in VIEWS else None
        out = kwargs.get("out")
        result = getattr(held, name)(*_opened(args), **_opened(kwargs))
        return _closed(result, device) if out is None else out

    return method


# Functions that need no access to the data: allowed on another device than the current one.
VIEWS = ["reshape", "transpose", "swapaxes", "ravel", "view", "squeeze", "diagonal", "moveaxis"]
VIEWS += ["rollaxis", "expand_dims", "broadcast_to", "permute_dims", "shape", "ndim", "size"]
METHODS = ["sum", "max", "min", "mean", "all", "any", "prod", "std", "var", "argmax", "argmin"]
METHODS += ["argsort", "clip", "conj", "cumsum", "dot", "flatten", "repeat", "round", "take"]


def _conversion(name):
    return lambda self, *args: getattr(self._held, name)(*args)


for _name in ("__bool__", "__int__", "__float__", "__complex__", "__repr__", "__len__"):
    setattr(ndarray, _name, _conversion(_name))
for _name in ("item", "tolist", "tobytes"):
    setattr(ndarray, _name, _conversion(_name))
for _name in (*METHODS, *VIEWS[:7]):
    setattr(ndarray, _name, _method(_name))


def _opened(value, views=False):
    """Return NumPy's arrays for CuPy's on the current device; reject NumPy's own."""
    if isinstance(value, ndarray):
        if value._device != _current() and not views:
            raise ValueError(
                f"Array device must be same as the current device: array device = {value._device} "
                f"while current = {_current()}"
            )
        assert views or _stream().captured is None, "arrays are computed while a graph is captured"
        return value._held
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")
    if type(value) in (list, tuple):
        return type(value)(_opened(v, views) for v in value)
    if type(value) is dict:
        return {k: _opened(v, views) for k, v in value.items()}
    if type(value) is slice:
        ends = value.start, value.stop, value.step
        return slice(*(None if v is None else int(v) for v in ends))
    return value


def _closed(value, device=None):
    """Return CuPy's arrays for NumPy's arrays and scalars."""
    device = _current() if device is None else device
    if isinstance(value, np.ndarray):
        return ndarray(_placed(value), device)
    if isinstance(value, np.generic):
        return ndarray(_placed(np.array(value)), device)
    if isinstance(value, (tuple, list)):
        kind = list if type(value) is list else tuple  # CuPy has no named tuples
        return kind(_closed(v, device) for v in value)
    return value


def _call(path, function, args, kwargs, views=False):
    _bind(path, args, kwargs)
    first = next((a._device for a in args if isinstance(a, ndarray)), None)
    result = function(*_opened(args, views), **_opened(kwargs, views))
    out = kwargs.get("out")
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    return _closed(result, first if views else None)


def _all_numpy(value):
    """Replace CuPy's arrays in nested lists by NumPy's."""
    if isinstance(value, ndarray):
        return value._held
    return [_all_numpy(v) for v in value] if isinstance(value, (list, tuple)) else value


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    here = isinstance(obj, ndarray) and obj._device == _current() and obj.ndim >= ndmin
    if here and not copy and order in "KA" and (dtype is None or obj.dtype == dtype):
        return obj
    return _closed(np.array(_all_numpy(obj), dtype, order=order, ndmin=ndmin))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return array(a, dtype, bool(copy), order or "K")


def ascontiguousarray(a, dtype=None):
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy.ndarray, got {type(a)})")
    if a.flags.c_contiguous and (dtype is None or a.dtype == dtype) and a.ndim:
        return a
    return _closed(np.array(_opened(a), dtype, order="C", ndmin=1))


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a, order=order)


def from_dlpack(array, *, device=None, copy=None):
    return _closed(np.from_dlpack(array))


def empty(shape, dtype=float, order="C"):
    if order == "F":
        return empty(shape if isinstance(shape, int) else tuple(shape)[::-1], dtype).T
    return ndarray(_unwritten(shape, dtype), _current())


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    _opened(prototype)
    return empty(prototype.shape if shape is None else shape, dtype or prototype.dtype)


def get_array_module(*args):
    return sys.modules[__name__] if any(isinstance(a, ndarray) for a in args) else np


def _wrapped(owner, name, path="cupy"):
    found = getattr(owner, name)
    if isinstance(found, types.ModuleType):
        return _Namespace(found, f"{path}.{name}")
    if isinstance(found, type) or not callable(found):
        return found  # dtypes, constants

    @functools.wraps(found, assigned=("__name__", "__doc__"), updated=())
    def function(*args, **kwargs):
        return _call(f"{path}.{name}", found, args, kwargs, views=name in VIEWS)

    return function


class _Namespace:
    """The linalg, fft or random module."""

    def __init__(self, owner, path):
        self._owner, self._path = owner, path

    def __getattr__(self, name):
        return _wrapped(self._owner, name, self._path)


def __getattr__(name):
    if name.startswith("_") or name in ("testing", "matrix", "memmap", "lib", "core", "ma"):
        raise AttributeError(f"module 'cupy' has no attribute {name!r}")
    try:
        return _wrapped(np, name)
    except AttributeError:
        raise AttributeError(f"module 'cupy' has no attribute {name!r}") from None


# --- kernels --------------------------------------------------------------------------------------


@functools.cache
def _folder():
    path = tempfile.mkdtemp(prefix="fake-cupy-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


_built = {}  # (code, name): launcher and parameter kinds of a kernel
_lock = threading.RLock()


def prepare(code, names, jobs=1):
    """Compile the kernels that are not compiled yet, in `jobs` processes."""
    with _lock:
        names = [n for n in dict.fromkeys(names) if (code, n) not in _built]
        parts = [part for i in range(jobs) if (part := names[i::jobs])]
        with ThreadPoolExecutor(jobs) as pool:
            for found in pool.map(functools.partial(_compiled, code), parts):
                _built.update(found)


def _compiled(code, names):
    lines = ['#include "kernels.cu"']
    for i, name in enumerate(names):
        lines += [
            f'extern "C" const char *run_{i}(const unsigned *grid, const unsigned *block,',
            "    size_t shared, void **args)",
            f"{{ return lr_launch(&{name}, grid, block, shared, args); }}",
            f'extern "C" void signature_{i}(char *to) {{ lr_signature(&{name}, to); }}',
        ]
    unit = "\n".join([*lines, ""])
    key = hashlib.sha256("\0".join([code, unit]).encode()).hexdigest()[:20]
    folder = _folder() / key
    folder.mkdir(exist_ok=True)
    folder.joinpath("kernels.cu").write_text(code)
    folder.joinpath("unit.cpp").write_text(unit)
    command = ["g++", *FLAGS, f'-DLR_SHIM="{SHIM}"', "unit.cpp", "-o", "unit.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CompileException(done.stderr, code, "unit.cpp", FLAGS)
    library = ctypes.CDLL(str(folder / "unit.so"))
    found = {}
    for i, name in enumerate(names):
        launcher = getattr(library, f"run_{i}")
        launcher.restype = ctypes.c_char_p
        text = ctypes.create_string_buffer(400)
        getattr(library, f"signature_{i}")(text)
        kinds = text.value.decode()
        found[code, name] = launcher, [kinds[k : k + 2] for k in range(0, len(kinds), 2)]
    return found


class RawModule:
    def __init__(self, code=None, *, path=None, options=(), backend="nvrtc", name_expressions=None):
        assert isinstance(code, str)
        assert isinstance(options, tuple)
        assert path is None
        assert backend == "nvrtc"
        self.code, self.options, self.name_expressions = code, options, name_expressions

    def compile(self, log_stream=None):
        if hooks.compile_error is not None:
            message, hooks.compile_error = hooks.compile_error, None
            raise CompileException(message, self.code, "kernels.cu", self.options)
        prepare(self.code, self.name_expressions)

    def get_function(self, name):
        if name not in self.name_expressions:
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        if not hooks.is_dry:
            self.compile()
        return RawKernel(self.code, name)


class RawKernel:
    max_threads_per_block = 1024

    def __init__(self, code, name):
        self.name = name
        self.launcher, self.kinds = _built.get((code, name), (None, ""))
        self._shared = {}  # by device
        plain = re.escape(name.partition("<")[0])
        bound = re.search(rf"__launch_bounds__\((\d+)\)\s*{plain}\(", code)
        if bound:
            self.max_threads_per_block = int(bound[1])
        self.kernel = Function(self)

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._shared.get(_current(), 48 << 10)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if size > Device.attributes["MaxSharedMemoryPerBlockOptin"]:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._shared[_current()] = size

    def __call__(self, grid, block, args, **kwargs):
        self.kernel(grid, block, args, **kwargs)


class Function:
    """A kernel on the current device."""

    def __init__(self, raw):
        self._raw = raw

    def __call__(self, grid, block, args, shared_mem=0, stream=None):
        if hooks.is_dry:
            return
        raw, used = self._raw, stream or _stream()
        assert isinstance(grid, tuple)
        assert isinstance(block, tuple)
        sizes = [(ctypes.c_uint * 3)(*(*s, 1, 1)[:3]) for s in (grid, block)]
        limits = (2**31 - 1, 65535, 65535), (1024, 1024, 64)
        if (
            any(not 1 <= n <= top for s, tops in zip(sizes, limits) for n, top in zip(s, tops))
            or np.prod(sizes[1]) > raw.max_threads_per_block
            or shared_mem > raw.max_dynamic_shared_size_bytes
        ):
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {raw.name} {grid} {block} {shared_mem}"
            )
        assert len(args) == len(raw.kinds), (
            f"{raw.name} takes {len(raw.kinds)} arguments, got {len(args)}"
        )
        values = [
            _value(a, kind, f"argument {i} of {raw.name}, of kind {kind}")
            for i, (a, kind) in enumerate(zip(args, raw.kinds))
        ]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(v.ctypes.data for v in values))
        arrays = {i: a for i, a in enumerate(args) if isinstance(a, ndarray)}
        strided = [i for i, a in arrays.items() if not a.flags.c_contiguous]
        device = _current()

        def launch(on, values=values):
            for i, a in arrays.items():
                a._check_order(on, f"argument {i} of {raw.name}")
            hooks.launches.append(Launch(raw.name, grid, block, shared_mem, device, on.ptr))
            with _lock:  # shared memory is static: one kernel at a time
                wrong = raw.launcher(*sizes, ctypes.c_size_t(shared_mem), pointers)
            hint = f"; not contiguous are the arguments {strided}" if strided else ""
            assert not wrong, f"{raw.name}: {wrong.decode()}{hint}"

        _submit(launch, used)


def _value(given, kind, what):
    """Return one argument as an array of one value; check it against the parameter's kind."""
    if isinstance(given, ndarray):
        assert kind[0] == "p", f"{what}: got an array"
        assert _kind(given.dtype) == kind[1], f"{what}: got an array of {given.dtype}"
        assert given._device == _current(), f"{what}: got an array of another device"
        return np.array([given.data.ptr], np.uint64)
    if isinstance(given, int):
        given = np.int64(given)
    value = np.asarray(given.val if isinstance(given, CNumpyArray) else given)
    assert value.size == 1, f"{what}: got {type(given)}"
    if kind[0] == "p":
        assert value.dtype in (np.intp, np.uint64), f"{what}: got {value.dtype}"
    else:
        assert _kind(value.dtype) == kind[1], f"{what}: got {value.dtype}"
    return value.reshape(1).copy()


def _kind(dtype):
    known = {"int32": "i", "int64": "l", "float32": "f", "float64": "d", "uint8": "b"}
    return known.get(dtype.name, "h" if dtype.itemsize == 2 else "?")


# --- installation ---------------------------------------------------------------------------------


@contextlib.contextmanager
def installed(devices=2):
    """Replace CuPy in sys.modules; modules that import it are reloaded, also afterwards."""
    import lowrank.engine.cuda

    package = lowrank.engine.cuda

    def imports_cupy(name):
        return name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends", "cuda") or (
            name.startswith(f"{package.__name__}.") and name != f"{package.__name__}.steps"
        )

    def remove():
        removed = {name: sys.modules.pop(name) for name in list(sys.modules) if imports_cupy(name)}
        for name in removed:
            if name.startswith(package.__name__):
                vars(package).pop(name.rpartition(".")[2], None)
        return removed

    before = remove()
    this = sys.modules[__name__]
    sys.modules["cupy"] = this
    for module in (cuda, *(m for m in vars(cuda).values() if isinstance(m, types.ModuleType))):
        sys.modules[module.__name__] = module
    sys.modules["cuda"], sys.modules["cuda.pathfinder"] = _module("cuda"), PATHFINDER
    importlib.import_module(f"{package.__name__}.device").load_cublas = lambda: CUBLAS
    hooks.reset()
    hooks.devices = devices
    _thread.__init__()
    try:
        yield this
    finally:
        remove()
        sys.modules.update(before)
        for name, module in before.items():
            if name.startswith(package.__name__):
                setattr(package, name.rpartition(".")[2], module)
        hooks.reset()
        _thread.__init__()
