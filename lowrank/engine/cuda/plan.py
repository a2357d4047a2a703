"""Chains on a GPU: CuPy arrays in, CuPy arrays out, planned once and run many times.

A chain becomes steps, each a kernel of kernels.cu or a matrix product of cuBLAS.  Nothing here
waits for the GPU: all goes to the current stream, whose buffers a plan keeps, so that runs can be
captured.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes, stage_costs
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import INTEGERS, NoGPU, Step, array_api
from lowrank.engine.cuda import steps
from lowrank.engine.cuda.steps import Sizes, three

try:
    import cupy
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

#: What memory may hold, by the name of the dtype, in the words of kernels.cu.
NUMBERS = {"float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16"}
#: What is called of CUDA, beside the driver.
LIBRARIES = ("nvrtc", "cublas", "cusolver")
#: cudaDataType_t, and cublasComputeType_t: sums in float32, or float64 for float64.
CUBLAS_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
SUMS, DOUBLE_SUMS, TF32_SUMS = 68, 70, 77
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
THREADS = 256  # of a block
BLOCKS = 1 << 20  # that go over all outputs in turns
BATCHES = 8  # that a plan keeps buffers for
UNROLLED = 1 << 28  # bytes of unrolled inputs that are held at a time
STRIPS = {1: 4, 2: 2}  # outputs of a column that a thread does, by stride
SQUARES = (3, 5, 7)  # taps with a depthwise kernel of their own


def check_device() -> None:
    """Refuse to go on without a GPU, in one sentence that says what is missing."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as why:
        raise NoGPU(_reason(str(why))) from why
    except (ImportError, OSError) as why:  # a wheel of another CUDA than what is installed
        raise NoGPU(
            f"CuPy does not find its CUDA libraries ({why}): install the wheel for this machine's "
            "CUDA, cupy-cuda13x or cupy-cuda12x"
        ) from why
    if not count:
        raise NoGPU("there is no GPU: CuPy finds a driver, but no device")
    for name in LIBRARIES:
        try:
            importlib.import_module(f"cupy_backends.cuda.libs.{name}")
        except ImportError as why:
            raise NoGPU(
                f"CUDA's library {name} is missing: pip install 'cupy-cuda13x[ctk]', or "
                "'cupy-cuda12x[ctk]' where the driver is of CUDA 12"
            ) from why


def _reason(why: str) -> str:
    if "InsufficientDriver" in why:
        return (
            f"the GPU's driver is missing, or too old for this CuPy ({why}): install NVIDIA's "
            "driver, or the CuPy wheel of an older CUDA such as cupy-cuda12x"
        )
    if "NoDevice" in why:
        return f"there is no GPU that CUDA can use ({why})"
    return f"CUDA does not start ({why}): update NVIDIA's driver, or restart the machine"


def _number(array: Any) -> int:
    return int(array.device.id)


def sent(array: Any, device: str) -> Any:
    """A copy of an array on a device such as ``"cuda"`` or ``"cuda:1"``, from wherever it is."""
    check_device()
    name, _, number = device.partition(":")
    count = cupy.cuda.runtime.getDeviceCount()
    if name != "cuda" or (number and not number.isdecimal()) or device == "cuda:":
        raise ValueError(f"device must be 'cpu', 'cuda' or such as 'cuda:1', got {device!r}")
    if number and int(number) >= count:
        raise ValueError(f"there is no {device}: this machine has {count} GPUs")
    with cupy.cuda.Device(int(number) if number else None), _memory(array.nbytes):
        if isinstance(array, np.ndarray):
            return cupy.asarray(np.ascontiguousarray(array))
        if _number(array) == cupy.cuda.Device().id:
            return array.copy()
        return cupy.asarray(array.get())  # devices need not be able to see each other


def fetched(array: Any) -> Array:
    """The array as NumPy's."""
    return np.asarray(array.get())


@contextmanager
def _memory(needed: int) -> Any:
    """Say how much there is where memory is short."""
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as why:
        free, total = cupy.cuda.Device().mem_info
        raise MemoryError(
            f"the GPU has {free / 2**20:.0f} of {total / 2**20:.0f} MiB free, and about "
            f"{needed / 2**20:.0f} MiB more are needed: run smaller batches, or free what is held"
        ) from why


@functools.cache
def _compiled(device: int, name: str) -> Any:
    """A kernel of kernels.cu for the current device; CuPy keeps what was compiled on disk."""
    source = resources.files("lowrank.engine.cuda").joinpath("kernels.cu").read_text()
    module = cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=(name,))
    return module.get_function(name)


class _Kernel:
    """A kernel, compiled when a plan is made, and the bytes of shared memory that it takes."""

    def __init__(self, name: str, shared: int = 0) -> None:
        self._call, self._shared = _compiled(cupy.cuda.Device().id, name), shared
        # What needs leave; plans share kernels, so that the largest of them counts.
        if shared > max(48 << 10, self._call.max_dynamic_shared_size_bytes):
            self._call.max_dynamic_shared_size_bytes = shared

    def __call__(self, blocks: int, *arguments: Any) -> None:
        arguments = tuple(map(_argument, arguments))
        self._call((max(1, blocks),), (THREADS,), arguments, shared_mem=self._shared)


class _Long(int):
    """An argument of 64 bits."""


def _argument(value: Any) -> Any:
    if value is None:
        return np.intp(0)
    if isinstance(value, _Long):
        return np.int64(value)
    return np.int32(value) if isinstance(value, int) else value


def _turns(total: int) -> int:
    return min(-(-total // THREADS), BLOCKS)


class _Link(NamedTuple):
    """A stage with all that a kernel asks of it, axes filled up to three."""

    stage: Stage
    epilogue: Epilogue
    shape: Ints  # of the input, (channels, *spatial)
    out: Ints
    outside: Array | None

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """Samples in and out."""
        return three(self.shape[1:]), three(self.out[1:])

    @property
    def weight(self) -> Any:
        """(groups, out, in, taps), on the GPU."""
        return array_api.matrices(self.stage)

    def tables(self, make: Callable[..., Array], out: bool) -> list[Any]:
        """One of the tables of array_api.py for each of three axes."""
        first = 3 - self.stage.geometry.ndim
        found = [np.zeros((1, 1) if out else 1, np.int32)] * first
        for axis, (n, m) in enumerate(zip(self.shape[1:], self.out[1:])):
            found.append(make(self.stage, axis, n, m) if out else make(self.stage, axis, n))
        return [cupy.asarray(np.ascontiguousarray(t)) for t in found]

    def ending(self, total: Any) -> tuple[Any, int]:
        """Bias, as the kernels add it, and activation."""
        bias = self.epilogue.bias
        return (
            None if bias is None else cupy.asarray(bias).astype(total),
            ACTIVATIONS[self.epilogue.activation],
        )

    def sources(self, total: Any) -> tuple[Any, Any]:
        """Channel of the input at each channel of the stage, and what stands outside; or None."""
        plain = self.stage.transposed or self.stage.shuffle == (1, 1)
        source = None if plain else cupy.asarray(self.stage.channel_permutation().astype(np.int32))
        outside = None if self.outside is None else cupy.asarray(self.outside.astype(total))
        return source, outside


Run = Callable[[Any, Any, Any], None]  # input, output, and room for what is between


def _depthwise(link: _Link, dtype: Any, total: Any) -> Run:
    """One input channel a group: depthwise in kernels.cu."""
    s, g = link.stage, link.stage.geometry
    weight = cupy.ascontiguousarray(link.weight).astype(dtype)
    kernel, stride, dilation = three(s.kernel), three(g.stride), three(g.dilation)
    per = weight.shape[1]
    known = (
        kernel[1] == kernel[2] in SQUARES and stride[1] in STRIPS and dilation[1] == 1
    )  # taps that a kernel is compiled for
    rows = STRIPS[stride[1]] if known else 1
    taps = f"{kernel[1]}, {kernel[2]}, {stride[1]}" if known else "0, 0, 0"
    as_kernel = _Kernel(f"depthwise<{NUMBERS[dtype.name]}, {taps}, {rows}>")
    pos = link.tables(array_api.places, out=False)
    (bias, activation), (source, outside) = link.ending(total), link.sources(total)
    (d, h, w), out = link.sizes
    fixed = (
        s.outer, s.groups, s.inner, per, d, h, w, *out, *kernel, *stride, *dilation, activation
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        threads = y.shape[0] * link.out[0] * out[0] * -(-out[1] // rows) * out[2]
        as_kernel(_turns(threads), x, weight, bias, y, source, outside, *pos, _Long(len(x)), *fixed)

    return run


def _terms(link: _Link, ins: int) -> tuple[Any, list[Any]]:
    """The sums of a dense stage, (ins * taps, 4): channel, and rows of the tables of each axis."""
    _, out = link.sizes
    kernel = three(link.stage.kernel)
    grid = np.indices((ins, *kernel)).reshape(4, -1).T
    terms = grid * np.array([1, *out])
    terms = np.ascontiguousarray(terms, np.int32)
    return cupy.asarray(terms), link.tables(array_api.seen, out=True)


def _dense(link: _Link, dtype: Any, total: Any) -> Run:
    """Sums over taps and channels where the input lies: dense in kernels.cu."""
    s = link.stage
    weight = cupy.ascontiguousarray(link.weight).astype(dtype)
    groups, outs, ins, _ = weight.shape
    depth = math.prod(weight.shape[2:])
    terms, at = _terms(link, ins)
    target = None
    if s.transposed and s.shuffle != (1, 1):
        target = cupy.asarray(s.channel_permutation().astype(np.int32))
    (bias, activation), (source, outside) = link.ending(total), link.sources(total)
    (d, h, w), out = link.sizes
    rows, places = (16, 128) if outs <= 16 else (steps.ROWS, 64)
    kernel = _Kernel(f"dense<{NUMBERS[dtype.name]}, {rows}, {places}>")
    blocks = -(-outs // rows) * s.outer * groups * s.inner
    fixed = (
        s.outer, groups, s.inner, ins, outs, _Long(depth), d, h, w, *out, activation
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = -(-y.shape[0] * math.prod(out) // places)
        kernel(
            blocks * tiles, x, weight, bias, y, source, target, outside, terms, *at,
            _Long(len(x)), *fixed,
        )  # fmt: skip

    return run


def _product(link: _Link, dtype: Any, total: Any) -> tuple[Run, Callable[[int], int]]:
    """A product of cuBLAS: of the input as it lies for a pointwise stage, else unrolled.

    With it the numbers that are held between, for so many examples.
    """
    s = link.stage
    weight = cupy.ascontiguousarray(link.weight).astype(dtype)
    groups, _, ins, taps = weight.shape
    size, out = link.sizes
    plain = taps == 1 and size == out and not link.stage.transposed and s.shuffle == (1, 1)
    plain = plain and not any(map(any, s.geometry.padding)) and set(s.geometry.stride) == {1}
    terms, at = (None, []) if plain else _terms(link, ins)
    (bias, activation), (source, outside) = link.ending(total), link.sources(total)
    samples = math.prod(out) * s.inner
    one = s.outer * groups * ins * taps * samples  # numbers of an example
    each = max(1, UNROLLED // max(1, one * dtype.itemsize))
    number = NUMBERS[dtype.name]
    unroll = None if plain else _Kernel(f"unrolled<{number}>")
    finish = _Kernel(f"finished<{number}>") if bias is not None or activation else None
    fixed = (ins, s.inner, _Long(ins * taps), *size, *out)

    def run(x: Any, y: Any, work: Any) -> None:
        for first in range(0, len(x), len(x) if unroll is None else each):
            part, to = x[first:], y[first:]
            if unroll is not None:
                part, to = part[:each], to[:each]
                columns = work[: len(part) * one]
                unroll(
                    _turns(columns.size), part, columns, source, outside, terms, *at,
                    _Long(len(part)), _Long(s.outer * groups), *fixed,
                )  # fmt: skip
                part = columns
            _multiply(weight, part, to, len(to) * s.outer, ins * taps, samples)
        if finish is not None:
            given = len(y), link.out[0], math.prod(out)
            finish(_turns(y.size), y, bias, *map(_Long, given), activation)

    return run, lambda batch: 0 if plain else min(batch, each) * one


def _multiply(weight: Any, x: Any, y: Any, batch: int, depth: int, samples: int) -> None:
    """``y[b, g] = weight[g] @ x[b, g]``, (outs, depth) times (depth, samples), by cuBLAS.

    Not by CuPy's matrix product, which makes lists of pointers where the weight is shared, and
    goes through float32 for halves.  cuBLAS counts columns first: it gets transposes, swapped.
    """
    cublas = importlib.import_module("cupy_backends.cuda.libs.cublas")
    groups, outs = weight.shape[:2]
    kind, item = CUBLAS_TYPES[y.dtype.name], y.dtype.itemsize
    total = np.float64 if y.dtype == np.float64 else np.float32
    one, zero = np.ones(1, total), np.zeros(1, total)
    sums = DOUBLE_SUMS if total is np.float64 else SUMS
    if y.dtype == np.float32 and os.environ.get("CUPY_TF32", "0") not in ("", "0"):
        sums = TF32_SUMS
    taken, given, shared = depth * samples, outs * samples, outs * depth
    # The fewer calls: a group at a time for all examples, or an example for all groups.
    by_group = groups <= batch
    for i in range(groups if by_group else batch):
        skip = i if by_group else i * groups
        many, step, stride = (batch, groups, 0) if by_group else (groups, 1, shared)
        cublas.gemmStridedBatchedEx(
            cupy.cuda.device.get_cublas_handle(), 0, 0, samples, outs, depth, one.ctypes.data,
            x.data.ptr + skip * taken * item, kind, samples, step * taken,
            weight.data.ptr + (i * shared * item if by_group else 0), kind, depth, stride,
            zero.ctypes.data,
            y.data.ptr + skip * given * item, kind, samples, step * given, many, sums, -1,
        )  # fmt: skip


def _separable(first: _Link, second: _Link, dtype: Any, total: Any) -> Run:
    """Depthwise, then pointwise, with nothing held between them: separable in kernels.cu."""
    s, g = first.stage, first.stage.geometry
    taps = cupy.ascontiguousarray(first.weight).astype(dtype)
    weight = cupy.ascontiguousarray(second.weight).astype(dtype)
    per, outs = taps.shape[1], weight.shape[1]
    kernel, stride, dilation = three(s.kernel), three(g.stride), three(g.dilation)
    pos = first.tables(array_api.places, out=False)
    (taps_bias, taps_activation), (bias, activation) = first.ending(total), second.ending(total)
    source, outside = first.sources(total)
    (d, h, w), out = first.sizes
    rows, places = steps.ROWS, 64
    as_kernel = _Kernel(f"separable<{NUMBERS[dtype.name]}, {rows}, {places}>")
    fixed = (
        s.groups, per, outs, d, h, w, *out, *kernel, *stride, *dilation, activation
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = -(-y.shape[0] * math.prod(out) // places)
        as_kernel(
            tiles * -(-outs // rows), x, taps, taps_bias, taps_activation, weight, bias, y, source,
            outside, *pos, _Long(len(x)), *fixed,
        )  # fmt: skip

    return run


def _filter(links: Sequence[_Link], step: steps.Step, dtype: Any, total: Any) -> Run:
    """All passes of all terms of a filter, in shared memory: filter in kernels.cu."""
    first, last = links[0], links[-1]
    groups, terms = first.stage.groups, len(first.stage.weight) // first.stage.groups
    owners = {}
    for link in links:
        (axis,) = steps.axes_of(link.stage)
        owners[axis + 3 - link.stage.geometry.ndim] = link
    padded = steps.fours(step.taps)
    weight = cupy.zeros((groups, terms, sum(padded)), dtype)
    at, pos = 0, []
    out = three(step.out[1:])
    for axis, n in enumerate(padded):
        owner = owners.get(axis)
        if owner is not None:
            taps = owner.stage.weight.reshape(groups, terms, -1).astype(dtype)
            weight[:, :, at : at + taps.shape[2]] = taps
        elif n:
            weight[:, :, at] = 1
        at += n
        table = (owner or first).tables(array_api.places, out=False)[axis]
        rest = max(0, out[axis] + max(n, 1) - 1 - len(table))  # places of taps that are zeros
        pos.append(cupy.concatenate([table, cupy.full(rest, -1, np.int32)]))
    bias, activation = last.ending(total)
    source, _ = first.sources(total)
    s, size = first.stage, three(step.shape[1:])
    passes = _Kernel(
        f"filter<{NUMBERS[dtype.name]}>", steps.filter_bytes(step.taps, step.tile, total.itemsize)
    )
    fixed = (s.outer, groups, s.inner, terms, *size, *out, *step.taps, *step.tile, activation)

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = len(y) * step.out[0] * math.prod(-(-n // t) for n, t in zip(out, step.tile))
        passes(min(tiles, BLOCKS), x, weight, bias, y, source, *pos, _Long(len(x)), *fixed)

    return run


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Some stages in one go: what runs them, and the shape that they give."""

    name: str
    stages: tuple[Stage, ...]
    run: Run
    shape: Ints
    out: Ints
    between: Callable[[int], int] = lambda batch: 0  # numbers that it holds meanwhile


def _steps(links: Sequence[_Link], dtype: Any) -> tuple[_Step, ...]:
    """How a chain is run, a step after another."""
    total = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    bare = [e.bias is None and e.activation == "none" for e in (k.epilogue for k in links)]
    shared = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    stages = [link.stage for link in links]
    found = []
    for step in steps.cut(stages, links[0].shape, total.itemsize, bare, shared):
        part = links[step.first : step.first + step.many]
        if step.kind == "filter":
            run = _filter(part, step, dtype, total)
        elif step.kind == "depthwise + pointwise":
            run = _separable(part[0], part[1], dtype, total)
        elif step.kind == "matrix product":
            run, between = _product(part[0], dtype, total)
            made = (part[0].stage,)
            found.append(_Step(step.kind, made, run, step.shape, step.out, between))
            continue
        else:
            run = (_depthwise if step.kind == "depthwise" else _dense)(part[0], dtype, total)
        held = tuple(link.stage for link in part)
        found.append(_Step(step.kind, held, run, step.shape, step.out))
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A chain planned for one input shape, precision and device.

    Runs go to the current stream and do not wait for it.  A plan keeps its buffers, by stream and
    batch; two threads that use one stream at once need a plan each.
    """

    steps: tuple[_Step, ...]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    device: int
    held: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    captured: set[tuple[int, int]] = field(default_factory=set)  # graphs have their addresses

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        self._check(x, out)
        with cupy.cuda.Device(self.device), _memory(self._bytes(len(x), self.out_shape)):
            given = cupy.ascontiguousarray(x).astype(self.dtype, copy=False)
            y = out
            if out is None or out.dtype != self.dtype or not out.flags.c_contiguous:
                y = cupy.empty((len(x), *self.out_shape), self.dtype)
            if _capturing() and (given.data.ptr != x.data.ptr or y is not out):
                raise ValueError(
                    "while a graph is captured x and out must be given, C-contiguous and "
                    f"{self.dtype}: what is made meanwhile is gone when the graph runs"
                )
            if len(x):
                self._go(given, y)
            if out is None or y is out:
                return y
            out[...] = _saturated(y, out.dtype) if out.dtype in INTEGERS else y
            return out

    def _go(self, x: Any, y: Any, after: Callable[[], object] | None = None) -> None:
        *between, room = self._buffers(len(x))
        for step, (a, b) in zip(self.steps, pairwise([x, *between, y])):
            step.run(a, b, room)
            if after is not None:
                after()

    def breakdown(self, x: Any, out: Any = None, *, repeat: int = 5) -> tuple[Step, ...]:
        """Where the time of a run on `x` goes, by the GPU's clock; waits for it."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self(x, out)
        runs = []
        with cupy.cuda.Device(self.device):
            given = cupy.ascontiguousarray(x).astype(self.dtype, copy=False)
            y = cupy.empty((len(x), *self.out_shape), self.dtype)
            for _ in range(repeat):
                events: list[Any] = []

                def mark(events: list[Any] = events) -> None:
                    events.append(cupy.cuda.Event())
                    events[-1].record()

                mark()
                start = time.perf_counter()
                if len(x):
                    self._go(given, y, mark)
                events[-1].synchronize()
                whole = time.perf_counter() - start
                took = [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in pairwise(events)]
                runs.append((sum(took), took, whole))
        runs.sort(key=lambda r: r[0])
        total, took, whole = runs[len(runs) // 2]
        found = []
        number = 0
        for step, seconds in zip(self.steps, took):
            costs = stage_costs(step.stages, step.shape)
            shapes = " ".join("x".join(map(str, s.weight.shape)) for s in step.stages)
            moved = len(x) * (math.prod(step.shape) + math.prod(step.out)) * self.dtype.itemsize
            macs = len(x) * sum(c.macs for c in costs)
            found.append(Step(f"{number} {shapes}", step.name, seconds, macs, moved))
            number += len(step.stages)
        return (*found, Step("run", "rest", max(0.0, whole - total), 0, 0))

    def _buffers(self, batch: int) -> list[Any]:
        """What steps give, and room for what one holds meanwhile, of this batch on this stream."""
        key = cupy.cuda.get_current_stream().ptr, batch
        found = self.held.get(key)
        capturing = _capturing()
        if found is None:
            if capturing:
                raise RuntimeError(
                    f"run the plan once on this stream with {batch} examples before a graph is "
                    "captured: its buffers have to be there"
                )
            found = [cupy.empty((batch, *s.out), self.dtype) for s in self.steps[:-1]]
            found.append(cupy.empty(max(s.between(batch) for s in self.steps), self.dtype))
            free = [k for k in self.held if k not in self.captured]
            if len(free) >= BATCHES:
                self.held.pop(free[0], None)
            self.held[key] = found
        if capturing:
            self.captured.add(key)
        return found

    def _bytes(self, batch: int, shape: Ints) -> int:
        return batch * math.prod(shape) * int(self.dtype.itemsize)

    def _check(self, x: Any, out: Any) -> None:
        for name, a, shape in (("x", x, self.in_shape), ("out", out, self.out_shape)):
            if a is None and name == "out":
                continue
            if not isinstance(a, cupy.ndarray):
                raise TypeError(
                    f"{name} must be a CuPy array, as the weights are on cuda:{self.device}, got "
                    f"{type(a).__qualname__}: cupy.asarray, or f.to('cpu')"
                )
            if _number(a) != self.device:
                raise ValueError(
                    f"{name} is on cuda:{_number(a)} but the weights are on cuda:{self.device}"
                )
            if a.dtype != self.dtype and a.dtype not in INTEGERS:
                raise TypeError(
                    f"this plan takes {self.dtype} arrays, or 8- or 16-bit integers, got {a.dtype}"
                )
            if self.dtype.itemsize == 2 and a.dtype.itemsize == 2 and a.dtype in INTEGERS:
                raise TypeError(f"{self.dtype} does not hold the values of {a.dtype}: use float32")
            if a.shape[1:] != shape or (name == "out" and len(a) != len(x)):
                raise ValueError(
                    f"{name} must be (batch, {', '.join(map(str, shape))}), got {a.shape}"
                )


def _capturing() -> bool:
    return bool(cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr))


def _saturated(values: Any, dtype: Any) -> Any:
    """Integers nearest to `values`; those of two bytes are compared in more digits."""
    wide = values if values.dtype.itemsize > 2 else values.astype(np.float32)
    return reference.saturate(wide, np.dtype(dtype))


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: Any,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
) -> Plan:
    """Plan `stages`, whose weights are on a GPU, for inputs of `shape` = (channels, *spatial)."""
    del threads  # a GPU has as many as it has
    if interleaved != 1:
        raise ValueError("numbers that lie side by side are taken apart before a GPU filters them")
    dtype = np.dtype(dtype)
    devices = [_number(stage.weight) for stage in stages]
    device = devices[0]
    if set(devices) != {device}:
        raise ValueError(
            f"weights are on {' and '.join(f'cuda:{d}' for d in sorted(set(devices)))}: move the "
            f"whole chain with f.to('cuda:{device}')"
        )
    ends = chain_shapes(stages, shape)
    outside: list[Array | None] = [None] * len(stages)
    with cupy.cuda.Device(device), _memory(sum(s.weight.nbytes for s in stages)):
        if stages[0].geometry.value:  # a constant, that the stages make others of
            plain = [replace(s, weight=fetched(s.weight)) for s in stages]
            outside = array_api.outsides(plain)
        links = [
            _Link(s, e, a, b, o)
            for s, e, a, b, o in zip(stages, epilogues, ends, ends[1:], outside)
        ]
        try:
            made = _steps(links, dtype)
        except cupy.cuda.compiler.CompileException as why:
            warnings.warn(
                f"the kernels could not be compiled ({str(why).splitlines()[0]}): chains run in "
                "plain CuPy code, which is slow",
                RuntimeWarning,
                stacklevel=2,
            )
            made = (_plainly(links, dtype),)
    return Plan(made, tuple(shape), tuple(ends[-1]), dtype, device)


def _plainly(links: Sequence[_Link], dtype: Any) -> _Step:
    """All stages in plain array code, for where there is no compiler."""
    stages = tuple(link.stage for link in links)
    weights = [cupy.ascontiguousarray(link.weight).astype(dtype) for link in links]
    cpu = tuple(replace(s, weight=fetched(s.weight)) for s in stages)
    endings = []
    for link in links:
        bias, activation = link.epilogue
        endings.append(Epilogue(None if bias is None else fetched(bias), activation))

    def run(x: Any, y: Any, _: Any) -> None:
        y[...] = array_api.run(cpu, x, weights, endings, cupy)

    return _Step("plain", stages, run, links[0].shape, links[-1].out)
