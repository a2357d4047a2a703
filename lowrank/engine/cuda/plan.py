"""Chains on a GPU: CuPy arrays in, CuPy arrays out, planned once and run many times.

A chain becomes steps, each a kernel of kernels.cu or a matrix product of cuBLAS.  Nothing waits
for the GPU: all work goes to the current stream, and a plan keeps its buffers per stream, so that
runs can be captured into CUDA graphs.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank._typing import Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes, stage_costs
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.tables import format_count
from lowrank.engine import INTEGERS, StepProfile
from lowrank.engine.cuda import device as _device  # first: it explains a missing CuPy
from lowrank.engine.cuda import direct, gemm, steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.description import OperationRow, operation_table

cupy = _device.cupy
_runtime, _current_stream = cupy.cuda.runtime, cupy.cuda.get_current_stream  # looked up once
MAX_BATCH_SIZES = 8  # (stream, batch) pairs that a plan keeps buffers for
MAX_GRAPHS = 4  # pairs of input and output addresses that a plan keeps graphs for, per stream
ALIGNMENT = 16  # bytes of the widest loads and stores
ARRAY_CODE = "array code"  # kind of a step that allocates: it cannot be captured


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """Consecutive stages that run as one step, with their shapes (channels, \\*spatial)."""

    name: str
    stages: tuple[Stage, ...]
    run: Run
    in_shape: Ints
    out_shape: Ints
    scratch_size: Callable[[int], int] = lambda batch: 0  # elements for a batch


@dataclass(slots=True, eq=False)
class Buffers:
    """Intermediate arrays, scratch memory and graphs for one stream and batch size.

    Graphs have the addresses and sizes of input and output as keys; None stands for a graph that is
    captured when its arrays come a second time.
    """

    between: list[Any]
    scratch: Any
    graphs: dict[tuple[int, ...], Any] | None = None  # None: steps are launched one by one
    is_captured: bool = False  # a graph of the caller holds the addresses


@dataclass(frozen=True, slots=True, eq=False)
class CudaPlan:
    """A chain planned for one input shape, precision and device.

    Runs go to the current stream and do not wait for it.  A plan keeps its buffers per stream and
    batch size; two threads that use one stream at once need a plan each.  A plan of several
    launches is captured into a CUDA graph when it runs a second time on the same arrays, and
    replayed from then on.  Where the first or last step changes the layout, it is left out for
    arrays whose memory is channels-last.
    """

    steps: tuple[PlannedStep, ...]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    device: int
    reads: tuple[Any, ...]  # types that the first step reads, and the last one writes, in place
    writes: tuple[Any, ...]
    accepts: tuple[Any, ...]
    uploaded: Any  # event: weights and tables are on the device
    buffers: dict[tuple[int, int], Buffers] = field(default_factory=dict)  # by stream and batch

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        # Checks are written out: a call of a function takes as long as three of them.
        if not (
            isinstance(x, cupy.ndarray)
            and x.dtype in self.accepts
            and x.shape[1:] == self.in_shape
            and x.data.device_id == self.device
        ):
            self._refuse("x", x, self.in_shape)
        batch, is_written = x.shape[0], False
        source, y, first, last = x, out, 0, len(self.steps)
        if out is not None:
            if not (
                isinstance(out, cupy.ndarray)
                and out.dtype in self.accepts
                and out.shape[1:] == self.out_shape
                and out.shape[0] == batch
                and out.data.device_id == self.device
            ):
                self._refuse("out", out, self.out_shape)
            is_written = _is_in_place(out, self.writes)
            if not is_written and (view := self._channels_last(out, -1)) is not None:
                y, last, is_written = view, last - 1, True
        if _runtime.getDevice() != self.device:
            with cupy.cuda.Device(self.device):
                return self(x, out)
        try:
            is_read = _is_in_place(x, self.reads)
            if not is_read and (view := self._channels_last(x, 0)) is not None:
                source, first, is_read = view, 1, True
            stream = _current_stream().ptr
            if not (is_read and is_written) and _runtime.streamIsCapturing(stream):
                raise ValueError(
                    "while a graph is captured x and out must be given, C-contiguous, aligned to "
                    f"{ALIGNMENT} bytes and {self.dtype}: copies are freed before the graph runs"
                )
            if not is_read:
                source = x.astype(self.dtype, "C")
            if not is_written:
                y = cupy.empty((batch, *self.out_shape), self.dtype)
            if batch:
                buffers = self.buffers.get((stream, batch)) or self._allocate(stream, batch)
                if buffers.graphs is not None:
                    self._replay(buffers, source, y, range(first, last), stream)
                elif buffers.between:
                    self._launch(buffers, source, y, range(first, last))
                else:
                    self.steps[0].run(source, y, buffers.scratch)
        except (MemoryError, RuntimeError) as error:
            item = self.dtype.itemsize
            _device.raise_memory_error(error, batch * math.prod(self.out_shape) * item)
            raise
        if out is None:
            return y
        if is_written:
            return out
        out[...] = _saturate(y, out.dtype) if out.dtype in INTEGERS else y
        return out

    def _channels_last(self, a: Any, step: int) -> Any:
        """Return `a` as (batch, *spatial, channels) if that makes `step` superfluous, or None."""
        if self.steps[step].stages:
            return None  # no change of layout
        view = a.transpose(0, *range(2, a.ndim), 1)
        return view if _is_in_place(view, (self.dtype,)) else None

    def _launch(
        self, buffers: Buffers, x: Any, y: Any, numbers: range,
        after_step: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        for number in numbers:
            target = y if number == numbers[-1] else buffers.between[number]
            self.steps[number].run(x, target, buffers.scratch)
            x = target
            if after_step is not None:
                after_step()

    def _replay(self, buffers: Buffers, x: Any, y: Any, numbers: range, stream: int) -> None:
        """Launch the graph of these arrays; the first time run the steps, the second capture."""
        graphs = buffers.graphs
        if _runtime.streamIsCapturing(stream):
            buffers.is_captured = True
            graphs = None
        if graphs is None:
            self._launch(buffers, x, y, numbers)
            return
        key = x.data.ptr, y.data.ptr, x.nbytes, y.nbytes, numbers.start, numbers.stop
        graph = graphs.get(key)
        if graph is None and key in graphs:
            graph = graphs[key] = self._capture(buffers, x, y, numbers)
        if graph is not None:
            graph.launch()
            return
        if buffers.graphs is not None:
            graphs[key] = None
            if len(graphs) > MAX_GRAPHS:
                del graphs[next(iter(graphs))]
        self._launch(buffers, x, y, numbers)

    def _capture(self, buffers: Buffers, x: Any, y: Any, numbers: range) -> Any:
        """Return a graph of the steps, or None with a warning; nothing runs.

        It is captured on a stream of its own, as the default stream cannot be.
        """
        stream = cupy.cuda.Stream(non_blocking=True)
        try:
            with stream:
                stream.begin_capture()
                try:
                    self._launch(buffers, x, y, numbers)
                finally:
                    graph = stream.end_capture()
        except RuntimeError as error:
            buffers.graphs = None
            warnings.warn(
                f"the plan cannot be captured into a CUDA graph ({_first_line(error)}): its steps "
                "are launched one by one",
                RuntimeWarning,
                stacklevel=4,  # the caller of the plan
            )
            return None
        return graph

    def breakdown(self, x: Any, out: Any = None, *, repeat: int = 5) -> tuple[StepProfile, ...]:
        """Profile the median of `repeat` runs on `x` by the GPU's clock; waits for the GPU."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self(x, out)
        with cupy.cuda.Device(self.device):
            source = x if _is_in_place(x, self.reads) else x.astype(self.dtype, "C")
            y = cupy.empty((len(x), *self.out_shape), self.dtype)
            runs = [self._timed_run(source, y) for _ in range(repeat)]
        runs.sort(key=lambda run: sum(run[0]))
        times, wall_time = runs[len(runs) // 2]
        profiles = []
        for (name, macs), step, seconds in zip(self._named_steps(), self.steps, times):
            samples = math.prod(step.in_shape) + math.prod(step.out_shape)
            moved = len(x) * samples * self.dtype.itemsize
            profiles.append(StepProfile(name, step.name, seconds, len(x) * macs, moved))
        rest = max(0.0, wall_time - sum(times))
        return (*profiles, StepProfile("run", "rest", rest, 0, 0))

    def describe(self, x: Any = None) -> str:
        """Return a table of the steps; with `x`, also of their times by the GPU's clock."""
        rows = [
            OperationRow(name, step.name, "", format_count(macs))
            for (name, macs), step in zip(self._named_steps(), self.steps)
        ]
        seconds = None
        if x is not None:
            rows.append(OperationRow("rest"))
            seconds = [step.seconds for step in self.breakdown(x)]
        table = operation_table(rows, seconds, "stages")
        return f"cuda:{self.device}, {self.dtype}\n{table}"

    def _named_steps(self) -> list[tuple[str, int]]:
        """Return the first stage and weight shapes of each step, and its MACs per example."""
        found, number = [], 0
        for step in self.steps:
            shapes = " ".join("x".join(map(str, s.weight.shape)) for s in step.stages)
            macs = sum(c.macs for c in stage_costs(step.stages, step.in_shape))
            found.append((f"{number} {shapes}", macs))
            number += len(step.stages)
        return found

    def _timed_run(self, x: Any, y: Any) -> tuple[list[float], float]:
        """Run once; return the seconds of each step and of the whole run."""
        events: list[Any] = []

        def record() -> None:
            events.append(cupy.cuda.Event())
            events[-1].record()

        key = _current_stream().ptr, len(x)
        buffers = self.buffers.get(key) or self._allocate(*key)
        record()
        start = time.perf_counter()
        if len(x):
            self._launch(buffers, x, y, range(len(self.steps)), record)
        events[-1].synchronize()
        wall_time = time.perf_counter() - start
        return [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in pairwise(events)], wall_time

    def _allocate(self, stream: int, batch: int) -> Buffers:
        """Make the buffers of this batch on the current stream, which then has the weights."""
        if _runtime.streamIsCapturing(stream):
            raise RuntimeError(
                f"run the plan once on this stream with {batch} examples before a graph is "
                "captured: that allocates its buffers"
            )
        _current_stream().wait_event(self.uploaded)
        between = [cupy.empty((batch, *s.out_shape), self.dtype) for s in self.steps[:-1]]
        scratch = cupy.empty(max(s.scratch_size(batch) for s in self.steps), self.dtype)
        buffers = Buffers(between, scratch)
        names = [s.name for s in self.steps]
        if ARRAY_CODE not in names and (len(names) > 1 or scratch.size):
            buffers.graphs = {}
        evictable = [k for k, b in self.buffers.items() if not b.is_captured]
        if len(evictable) >= MAX_BATCH_SIZES:
            self.buffers.pop(evictable[0], None)
        self.buffers[stream, batch] = buffers
        return buffers

    def _refuse(self, name: str, a: Any, shape: Ints) -> None:
        """Raise what is wrong with `a`, which is x or out: type, device, precision or shape."""
        if not isinstance(a, cupy.ndarray):
            raise TypeError(
                f"{name} must be a CuPy array, as the weights are on cuda:{self.device}, got "
                f"{type(a).__qualname__}: cupy.asarray, or f.to('cpu')"
            )
        if a.data.device_id != self.device:
            raise ValueError(
                f"{name} is on cuda:{a.data.device_id} but the weights are on cuda:{self.device}"
            )
        if a.dtype not in self.accepts:
            if a.dtype in INTEGERS:
                raise TypeError(
                    f"{self.dtype} cannot represent all values of {a.dtype}: use float32"
                )
            raise TypeError(f"{name} must be {self.dtype} or 8- or 16-bit integers, got {a.dtype}")
        raise ValueError(
            f"{name} must have shape (batch, {', '.join(map(str, shape))}), got {a.shape}"
        )


def _is_in_place(a: Any, dtypes: tuple[Any, ...]) -> bool:
    """Return whether kernels can access an array as it is."""
    return a.dtype in dtypes and a.flags.c_contiguous and a.data.ptr % ALIGNMENT == 0


def _saturate(values: Any, dtype: Any) -> Any:
    """Round to integers; halves are compared with the limits in float32."""
    wide = values if values.dtype.itemsize > 2 else values.astype(np.float32)
    return reference.saturate(wide, np.dtype(dtype))


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: Any,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
    algorithm: str = "direct",
) -> CudaPlan:
    """Plan `stages`, whose weights are on a GPU, for inputs of `shape` = (channels, *spatial)."""
    del threads, algorithm  # the GPU decides, and kernels there add up products directly
    dtype = np.dtype(dtype)
    devices = [_device.device_id(stage.weight) for stage in stages]
    device = devices[0]
    if set(devices) != {device}:
        raise ValueError(
            f"weights are on {' and '.join(f'cuda:{d}' for d in sorted(set(devices)))}: move the "
            f"whole chain with f.to('cuda:{device}')"
        )
    shapes = chain_shapes(stages, shape)
    weight_bytes = sum(s.weight.nbytes for s in stages)
    with cupy.cuda.Device(device), _device.explain_out_of_memory(weight_bytes):
        chain = [BoundStage(*bound) for bound in zip(stages, epilogues, shapes, shapes[1:])]
        try:
            planned = _plan_steps(chain, dtype, interleaved)
        except cupy.cuda.compiler.CompileException as error:
            if interleaved > 1:
                raise
            warnings.warn(
                f"the kernels could not be compiled ({_first_line(error)}): chains run in "
                "plain CuPy code, which is slow",
                RuntimeWarning,
                stacklevel=2,
            )
            run = direct.array_code(chain, dtype)
            planned = (PlannedStep(ARRAY_CODE, tuple(stages), run, shapes[0], shapes[-1]),)
        uploaded = cupy.cuda.Event(disable_timing=True)
        uploaded.record()
    has_bytes = dtype == np.float32
    reads, writes = (
        (dtype, np.dtype(np.uint8)) if has_bytes and step.name in steps.READS_BYTES else (dtype,)
        for step in (planned[0], planned[-1])
    )
    no_shorts = dtype.itemsize == 2
    accepted = (dtype, *(t for t in INTEGERS if not (no_shorts and t.itemsize == 2)))
    in_shape, out_shape = ((*s[:-1], s[-1] * interleaved) for s in (shapes[0], shapes[-1]))
    return CudaPlan(planned, in_shape, out_shape, dtype, device, reads, writes, accepted, uploaded)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _plan_steps(
    chain: Sequence[BoundStage], dtype: Any, interleaved: int
) -> tuple[PlannedStep, ...]:
    """Partition a chain into steps and build each."""
    sum_dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    no_epilogue = [b.epilogue.bias is None and b.epilogue.activation == "none" for b in chain]
    shared = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    planned = []
    for step in steps.partition(
        [bound.stage for bound in chain], chain[0].in_shape, sum_dtype.itemsize, no_epilogue,
        shared, tensor_cores=gemm.uses_tensor_cores(dtype), interleaved=interleaved,
    ):  # fmt: skip
        part = chain[step.first : step.first + step.stage_count]
        run, scratch_size = direct.build(step, part, dtype, sum_dtype, interleaved)
        stages = tuple(bound.stage for bound in part)
        planned.append(
            PlannedStep(step.kind, stages, run, step.in_shape, step.out_shape, scratch_size)
        )
    return tuple(planned)
