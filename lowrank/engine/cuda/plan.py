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
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes, stage_costs
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.tables import format_count
from lowrank.engine import INTEGERS, StepProfile, array_api
from lowrank.engine.cuda import device as _device  # first: it explains a missing CuPy
from lowrank.engine.cuda import direct, gemm, steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.description import OperationRow, operation_table

cupy = _device.cupy
MAX_BATCH_SIZES = 8  # (stream, batch) pairs that a plan keeps buffers for


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """Consecutive stages that run as one step, with their shapes (channels, \\*spatial)."""

    name: str
    stages: tuple[Stage, ...]
    run: Run
    in_shape: Ints
    out_shape: Ints
    scratch_size: Callable[[int], int] = lambda batch: 0  # elements for a batch


@dataclass(frozen=True, slots=True, eq=False)
class CudaPlan:
    """A chain planned for one input shape, precision and device.

    Runs go to the current stream and do not wait for it.  A plan keeps its buffers per stream and
    batch size; two threads that use one stream at once need a plan each.
    """

    steps: tuple[PlannedStep, ...]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    device: int
    buffers: dict[tuple[int, int], list[Any]] = field(default_factory=dict)  # by stream and batch
    captured: set[tuple[int, int]] = field(default_factory=set)  # graphs hold their addresses

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        self._check(x, out)
        needed = len(x) * math.prod(self.out_shape) * int(self.dtype.itemsize)
        with cupy.cuda.Device(self.device), _device.explain_out_of_memory(needed):
            source = cupy.ascontiguousarray(x).astype(self.dtype, copy=False)
            y = out
            if out is None or out.dtype != self.dtype or not out.flags.c_contiguous:
                y = cupy.empty((len(x), *self.out_shape), self.dtype)
            if _device.is_capturing() and (source.data.ptr != x.data.ptr or y is not out):
                raise ValueError(
                    "while a graph is captured x and out must be given, C-contiguous and "
                    f"{self.dtype}: temporary arrays are freed before the graph runs"
                )
            if len(x):
                self._run(source, y)
            if out is None or y is out:
                return y
            out[...] = _saturate(y, out.dtype) if out.dtype in INTEGERS else y
            return out

    def _run(self, x: Any, y: Any, after_step: Callable[[], object] | None = None) -> None:
        *between, scratch = self._get_buffers(len(x))
        for step, (source, target) in zip(self.steps, pairwise([x, *between, y])):
            step.run(source, target, scratch)
            if after_step is not None:
                after_step()

    def breakdown(self, x: Any, out: Any = None, *, repeat: int = 5) -> tuple[StepProfile, ...]:
        """Profile the median of `repeat` runs on `x` by the GPU's clock; waits for the GPU."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self(x, out)
        with cupy.cuda.Device(self.device):
            source = cupy.ascontiguousarray(x).astype(self.dtype, copy=False)
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

        record()
        start = time.perf_counter()
        if len(x):
            self._run(x, y, record)
        events[-1].synchronize()
        wall_time = time.perf_counter() - start
        return [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in pairwise(events)], wall_time

    def _get_buffers(self, batch: int) -> list[Any]:
        """Return the intermediate arrays and scratch memory of this batch on this stream."""
        key = cupy.cuda.get_current_stream().ptr, batch
        buffers = self.buffers.get(key)
        capturing = _device.is_capturing()
        if buffers is None:
            if capturing:
                raise RuntimeError(
                    f"run the plan once on this stream with {batch} examples before a graph is "
                    "captured: that allocates its buffers"
                )
            buffers = [cupy.empty((batch, *s.out_shape), self.dtype) for s in self.steps[:-1]]
            buffers.append(cupy.empty(max(s.scratch_size(batch) for s in self.steps), self.dtype))
            evictable = [k for k in self.buffers if k not in self.captured]
            if len(evictable) >= MAX_BATCH_SIZES:
                self.buffers.pop(evictable[0], None)
            self.buffers[key] = buffers
        if capturing:
            self.captured.add(key)
        return buffers

    def _check(self, x: Any, out: Any) -> None:
        for name, a, shape in (("x", x, self.in_shape), ("out", out, self.out_shape)):
            if a is None and name == "out":
                continue
            if not isinstance(a, cupy.ndarray):
                raise TypeError(
                    f"{name} must be a CuPy array, as the weights are on cuda:{self.device}, got "
                    f"{type(a).__qualname__}: cupy.asarray, or f.to('cpu')"
                )
            on = _device.device_id(a)
            if on != self.device:
                raise ValueError(
                    f"{name} is on cuda:{on} but the weights are on cuda:{self.device}"
                )
            if a.dtype != self.dtype and a.dtype not in INTEGERS:
                raise TypeError(
                    f"{name} must be {self.dtype} or 8- or 16-bit integers, got {a.dtype}"
                )
            if self.dtype.itemsize == 2 and a.dtype.itemsize == 2 and a.dtype in INTEGERS:
                raise TypeError(
                    f"{self.dtype} cannot represent all values of {a.dtype}: use float32"
                )
            if a.shape[1:] != shape or (name == "out" and len(a) != len(x)):
                raise ValueError(
                    f"{name} must have shape (batch, {', '.join(map(str, shape))}), got {a.shape}"
                )


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
    if interleaved != 1:
        raise ValueError(f"interleaved must be 1 on a GPU, got {interleaved}")
    dtype = np.dtype(dtype)
    devices = [_device.device_id(stage.weight) for stage in stages]
    device = devices[0]
    if set(devices) != {device}:
        raise ValueError(
            f"weights are on {' and '.join(f'cuda:{d}' for d in sorted(set(devices)))}: move the "
            f"whole chain with f.to('cuda:{device}')"
        )
    shapes = chain_shapes(stages, shape)
    borders: list[Array | None] = [None] * len(stages)
    weight_bytes = sum(s.weight.nbytes for s in stages)
    with cupy.cuda.Device(device), _device.explain_out_of_memory(weight_bytes):
        if stages[0].geometry.value:
            on_host = [replace(s, weight=_device.to_host(s.weight)) for s in stages]
            borders = array_api.border_values(on_host)
        chain = [
            BoundStage(*bound) for bound in zip(stages, epilogues, shapes, shapes[1:], borders)
        ]
        try:
            planned = _plan_steps(chain, dtype)
        except cupy.cuda.compiler.CompileException as error:
            warnings.warn(
                f"the kernels could not be compiled ({str(error).splitlines()[0]}): chains run in "
                "plain CuPy code, which is slow",
                RuntimeWarning,
                stacklevel=2,
            )
            planned = (_array_api_step(chain, dtype),)
    return CudaPlan(planned, tuple(shape), tuple(shapes[-1]), dtype, device)


def _plan_steps(chain: Sequence[BoundStage], dtype: Any) -> tuple[PlannedStep, ...]:
    """Partition a chain into steps and build each."""
    sum_dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    no_epilogue = [b.epilogue.bias is None and b.epilogue.activation == "none" for b in chain]
    shared = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    stages = [bound.stage for bound in chain]
    planned = []
    for step in steps.partition(stages, chain[0].in_shape, sum_dtype.itemsize, no_epilogue, shared):
        part = chain[step.first : step.first + step.stage_count]
        run, scratch_size = _build(step, part, dtype, sum_dtype)
        part_stages = tuple(bound.stage for bound in part)
        shapes = step.in_shape, step.out_shape
        planned.append(PlannedStep(step.kind, part_stages, run, *shapes, scratch_size))
    return tuple(planned)


def _build(
    step: steps.KernelStep, part: Sequence[BoundStage], dtype: Any, sum_dtype: Any
) -> tuple[Run, Callable[[int], int]]:
    if step.kind == "matrix product":
        return gemm.matrix_product(part[0], dtype, sum_dtype)
    if step.kind == "filter":
        run = direct.filter_passes(part, step, dtype, sum_dtype)
    elif step.kind == "depthwise + pointwise":
        run = direct.separable(part[0], part[1], dtype, sum_dtype)
    elif step.kind == "depthwise":
        run = direct.depthwise(part[0], dtype, sum_dtype)
    else:
        run = direct.dense(part[0], dtype, sum_dtype)
    return run, lambda batch: 0


def _array_api_step(chain: Sequence[BoundStage], dtype: Any) -> PlannedStep:
    """Build all stages in plain array code, for machines without a compiler."""
    stages = tuple(bound.stage for bound in chain)
    weights = [cupy.ascontiguousarray(bound.weight).astype(dtype) for bound in chain]
    on_host = tuple(replace(s, weight=_device.to_host(s.weight)) for s in stages)
    epilogues = []
    for bound in chain:
        bias, activation = bound.epilogue
        epilogues.append(Epilogue(None if bias is None else _device.to_host(bias), activation))

    def run(x: Any, y: Any, _: Any) -> None:
        y[...] = array_api.run(on_host, x, weights, epilogues, cupy)

    return PlannedStep("plain", stages, run, chain[0].in_shape, chain[-1].out_shape)
