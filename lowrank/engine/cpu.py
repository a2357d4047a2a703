"""Chains on the CPU: the compiled engine, planned once and run many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import INTEGERS, Algorithm, StepProfile

try:
    from lowrank._kernels import _core
except ImportError as missing:
    raise ImportError(
        "lowrank's compiled engine is missing. In a checkout, build it with "
        "'python setup.py build_ext --inplace' or 'pip install -e .'; a folder named lowrank in "
        "the current directory hides an installed one"
    ) from missing

from lowrank._kernels.profiling import StepTotal, step_totals
from lowrank.engine import channels_last
from lowrank.engine.channels_last import ChannelsLastPlan
from lowrank.engine.description import (
    PlannedStage,
    add_times,
    operation_table,
    planes_rows,
    planned_stages,
)
from lowrank.engine.lowering import Segment, lower

MAX_BATCH_SIZES = 8  # that a plan keeps segments for


@dataclass(frozen=True, slots=True, eq=False)
class PlannedSegment:
    """A segment of a chain, and the engine's plan of it."""

    core: _core.KernelPlan
    segment: Segment


@dataclass(frozen=True, slots=True, eq=False)
class CpuPlan:
    """A chain planned for one input shape and precision; safe to call from many threads.

    `program` runs it on channels-last buffers, if that is predicted to be faster.  Segments run it
    on planes, and integers in any case.  If the engine has a free axis, the examples of a batch lie
    along it, so that weights in the cache serve several of them: each batch size has its own
    segments, made at its first run.
    """

    stages: tuple[PlannedStage, ...]
    program: ChannelsLastPlan | None
    planned: dict[int, tuple[PlannedSegment, ...]]  # by batch
    make: Callable[[int], tuple[PlannedSegment, ...]]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    threads: int

    @property
    def weight_shapes(self) -> tuple[Ints, ...]:
        """Shapes of the weights of all stages."""
        return tuple(stage.weight_shape for stage in self.stages)

    def fast_algorithms(self, number: int) -> list[tuple[Ints, float]]:
        """Return the fast algorithms of a stage: outputs along three axes, and predicted error."""
        return [] if self.program is None else self.program.fast_algorithms(number)

    @property
    def segments(self) -> tuple[PlannedSegment, ...]:
        """Segments for a single example."""
        return self._segments(1)

    def _segments(self, batch: int) -> tuple[PlannedSegment, ...]:
        batch = max(batch, 1)
        if 1 not in self.planned:
            self.planned[1] = self.make(1)
        if not any(p.segment.has_free_axis for p in self.planned[1]):
            # Examples run one by one: the batch matters only as a number of tasks.
            batch = 1 if batch < self.threads else self.threads
        planned = self.planned.get(batch)
        if planned is None:
            planned = self.make(batch)
            if len(self.planned) >= MAX_BATCH_SIZES:  # drop the oldest, but never that of batch 1
                self.planned.pop(next(n for n in list(self.planned) if n > 1), None)
            self.planned[batch] = planned
        return planned

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        x, out = check_arrays(x, out, self.dtype, self.in_shape, self.out_shape)
        if self.program is not None and self._is_floating(x, out):
            return self._run_program(self.program, x, out)
        segments = self._segments(len(x))
        last = len(segments) - 1
        for i, planned in enumerate(segments):
            writes_out = out is not None and out.flags.aligned and planned.segment.after is None
            x = self._run(planned, x, out if i == last and writes_out else None)
        if out is None or x is out:
            return x
        out[...] = reference.saturate(x, out.dtype) if out.dtype in INTEGERS else x
        return out

    def repack(self) -> bool:
        """Pack the weights again, whose memory has changed; return False if that needs a new plan.

        Weights are read in place if no stage is transposed.  No other call may run meanwhile.
        """
        if self.program is None or self.planned:
            return False
        self.program.program.repack()
        return True

    def breakdown(
        self, x: Array, out: Array | None = None, *, repeat: int = 5
    ) -> tuple[StepProfile, ...]:
        """Profile the steps of the median of `repeat` runs on `x`; see StepProfile."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        out = self(x, out)
        runs = [self._profiled_run(x, out) for _ in range(repeat)]
        runs.sort(key=lambda steps: sum(s.seconds for s in steps))
        return tuple(runs[len(runs) // 2])

    def describe(self, x: Array | None = None) -> str:
        """Return a table of the stages; with `x`, also of the times of a run."""
        program = self.program
        if x is not None and not self._is_floating(x, None):
            program = None
        place = "planes" if program is None else "channels-last buffers"
        rows = planes_rows(self.stages) if program is None else program.rows(self.stages)
        seconds = None
        if x is not None:
            rows, seconds = add_times(rows, self.breakdown(x))
        table = operation_table(rows, seconds, "stage")
        return f"{place}, {self.dtype}, threads {self.threads}\n{table}"

    def _profiled_run(self, x: Array, out: Array) -> list[StepProfile]:
        x, _ = check_arrays(x, out, self.dtype, self.in_shape, self.out_shape)
        if self.program is not None and self._is_floating(x, out) and out.flags.aligned:
            return self.program.profile(x, out)
        profiles = []
        segments = self._segments(len(x))
        for i, planned in enumerate(segments):
            segment = planned.segment
            target = out if i == len(segments) - 1 and segment.after is None else None
            start = time.perf_counter()
            records: list[tuple[float, int, list[StepTotal]]] = []
            x = self._run(planned, x, target, records)
            wall_time = time.perf_counter() - start
            ((core_time, threads, steps),) = records
            rest = core_time
            for stage, step, seconds, macs, moved in steps:
                seconds /= threads
                rest -= seconds
                if step != "store":
                    profiles.append(StepProfile(segment.names[stage], step, seconds, macs, moved))
                elif moved:
                    profiles.append(StepProfile("run", step, seconds, macs, moved))
            profiles.append(StepProfile("run", "rest", rest, 0, 0))
            if segment.before is not None or segment.after is not None:
                profiles.append(StepProfile("run", "prepare", wall_time - core_time, 0, 0))
        return profiles

    def _is_floating(self, x: Array, out: Array | None) -> bool:
        return x.dtype == self.dtype and (out is None or out.dtype == self.dtype)

    def _run_program(self, program: ChannelsLastPlan, x: Array, out: Array | None) -> Array:
        result = out
        if result is None or not result.flags.aligned:
            result = np.empty((len(x), *self.out_shape), self.dtype)
        program.run(x, result)
        if out is None or result is out:
            return result
        out[...] = result
        return out

    def _run(
        self,
        planned: PlannedSegment,
        x: Array,
        out: Array | None,
        records: list[tuple[float, int, list[StepTotal]]] | None = None,
    ) -> Array:
        """Run one segment; append the engine's profile to `records` if given."""
        segment, core = planned.segment, planned.core
        if segment.before is not None:
            x = segment.before(x.astype(self.dtype, copy=False))
        if out is None:
            out = np.empty((len(x), core.out_shape[0], *segment.out_size), self.dtype)
        if segment.is_batched:
            x, y = x.swapaxes(0, 1), out.swapaxes(0, 1)
            x = x.reshape(1, len(x), *segment.in_shape[1:])
            y = y.reshape(1, len(y), *segment.out_shape[1:])
        else:
            x = x.reshape(*x.shape[:2], *segment.in_shape[1:])
            y = out.reshape(*out.shape[:2], *segment.out_shape[1:])
        if records is None:
            core(x, y, self.threads)
        else:
            seconds, threads, steps = core.profile(x, y, self.threads)
            records.append((seconds, threads, step_totals(steps, len(segment.specs))))
        return out if segment.after is None else segment.after(out)


def check_arrays(
    x: Array, out: Array | None, dtype: Any, in_shape: Ints, out_shape: Ints, name: str = "x"
) -> tuple[Array, Array | None]:
    """Return `x`, aligned, and `out`; raise unless both fit a plan of these shapes."""
    if not isinstance(x, np.ndarray) or (x.dtype != dtype and x.dtype not in INTEGERS):
        raise TypeError(
            f"{name} must be an array of {dtype} or of 8- or 16-bit integers, got "
            f"{getattr(x, 'dtype', None) or type(x).__qualname__}"
        )
    if x.shape[1:] != in_shape:
        raise ValueError(f"{name} must have shape (batch, {in_shape}), got {x.shape}")
    if not x.flags.aligned:
        x = x.copy()
    if out is None:
        return x, out
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__qualname__}")
    shape = (len(x), *out_shape)
    if out.shape != shape or (out.dtype != dtype and out.dtype not in INTEGERS):
        raise ValueError(
            f"out must be {dtype}, or 8- or 16-bit integers, of shape {shape}, got "
            f"{out.dtype} of {out.shape}"
        )
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return x, out


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: Any,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
    algorithm: Algorithm = "direct",
) -> CpuPlan:
    """Plan `stages` for inputs of `shape`; see :func:`lowrank.engine.plan`."""
    threads = threads or _core.max_threads()
    links = list(zip(stages, epilogues))

    def make(batch: int) -> tuple[PlannedSegment, ...]:
        segments = lower(links, shape, dtype, threads, interleaved, batch)
        return tuple(_plan_segment(segment, dtype) for segment in segments)

    (*leading, width) = shape
    (*out_leading, out_width) = chain_shapes(stages, shape)[-1]
    in_shape, out_shape = (*leading, width * interleaved), (*out_leading, out_width * interleaved)
    program = None
    if interleaved == 1:
        program = channels_last.plan_if_faster(links, shape, dtype, threads, algorithm)
    planned = {1: make(1)} if program is None else {}
    described = planned_stages(stages, shape, interleaved)
    return CpuPlan(described, program, planned, make, in_shape, out_shape, np.dtype(dtype), threads)


def _plan_segment(segment: Segment, dtype: Any) -> PlannedSegment:
    specs = [s._replace(weight=np.ascontiguousarray(s.weight, dtype=dtype)) for s in segment.specs]
    core = _core.KernelPlan(
        specs,
        segment.in_shape,
        dtype=np.dtype(dtype).name,
        border=segment.border,
        fill=segment.fill,
        tile=segment.tile,
        splits=segment.splits,
        seconds=segment.seconds,
        fork_join=segment.fork_join,
    )
    return PlannedSegment(core, segment)
