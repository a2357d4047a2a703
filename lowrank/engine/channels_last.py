"""Chains on channels-last buffers: a plan of one program, for NumPy arrays of the plan's type."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Array, Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.tables import format_count
from lowrank.engine import Algorithm, StepProfile
from lowrank.engine.algorithms import algorithm_shape
from lowrank.engine.costs import add_counts, default_cost
from lowrank.engine.description import OperationRow, PlannedStage, stage_name
from lowrank.engine.lowering import lower_untiled
from lowrank.engine.network import describe_operation
from lowrank.engine.planes import segment_counts
from lowrank.engine.program import Operation, Program, ProgramBuilder, Unsupported

ALGORITHM_WIDTH = 20  # of a description
L2_SHARE = 2.0  # of L2, that the buffers of a stage must exceed to count as far
LINE = 64  # bytes
FAR_LINE = 24.0  # cost of a line from beyond L2, by `python -m asv_benchmarks.paths`


@dataclass(frozen=True, slots=True, eq=False)
class ChannelsLastPlan:
    """A chain planned as a program for one input shape; safe to call from many threads."""

    program: Program
    stages: tuple[str, ...]  # names in profiles
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    threads: int

    def run(self, x: Array, out: Array) -> None:
        """Run on checked arrays (batch, channels, *spatial)."""
        self.program((with_three_axes(x),), (with_three_axes(out),), self.threads)

    def fast_algorithms(self, number: int) -> list[tuple[Ints, float]]:
        """Return the fast algorithms that compute a stage, with their predicted errors.

        An algorithm is given by its outputs per axis, of three; a transposed stage may have
        several.
        """
        return [
            (tuple(algorithm_shape(n)[0] for n in op.algorithm), op.error)
            for op in self.program.operations
            if op.kind == "winograd" and stage_number(op) == number
        ]

    def rows(self, stages: Sequence[PlannedStage]) -> list[OperationRow]:
        """Return the rows of a description.

        A transposed stage is one operation for each phase of its stride, with its own algorithm.
        """
        found = []
        for number, stage in enumerate(stages):
            done = [op for op in self.program.operations if stage_number(op) == number]
            _, algorithms, _, _ = zip(*map(describe_operation, done))
            _, _, error, _ = describe_operation(max(done, key=lambda op: op.error))
            text = " + ".join(dict.fromkeys(algorithms))
            if len(text) > ALGORITHM_WIDTH:
                text = f"{text[: ALGORITHM_WIDTH - 3]}..."
            found.append(OperationRow(stage.name, text, error, format_count(stage.macs)))
        return found

    def profile(self, x: Array, out: Array) -> list[StepProfile]:
        """Run once with clocks; return the time of each operation."""
        start = time.perf_counter()
        seconds = self.program.core.profile(
            (with_three_axes(x), with_three_axes(out)), self.threads
        )
        rest = time.perf_counter() - start - sum(seconds)
        itemsize = np.dtype(self.dtype).itemsize
        steps = []
        for op, duration in zip(self.program.operations, seconds):
            number = stage_number(op)
            stage, step = "run", op.kind if op.kind in ("pack", "unpack") else "prepare"
            if number is not None:
                stage, step = self.stages[number], "compute"
            moved = len(x) * op.samples_moved * itemsize
            steps.append(StepProfile(stage, step, duration, len(x) * op.macs, moved))
        return [*steps, StepProfile("run", "rest", max(rest, 0.0), 0, 0)]


def stage_number(operation: Operation) -> int | None:
    """Return the number of the stage that an operation computes, or None if it moves data."""
    if operation.weight is None:
        return None
    _, dot, number = operation.name.rpartition(".")
    return int(number) if dot else 0  # of a chain of one stage


def plan_if_faster(
    links: Sequence[tuple[Stage, Epilogue]],
    shape: Ints,
    dtype: Any,
    threads: int,
    algorithm: Algorithm,
) -> ChannelsLastPlan | None:
    """Plan a chain; return None if kernels on planes are predicted to be as fast."""
    builder = faster_program(links, shape, dtype, algorithm)
    if builder is None:
        return None
    out_shape = chain_shapes([stage for stage, _ in links], shape)[-1]
    program = builder.build(names=("x", "out"))
    stages = tuple(stage_name(n, stage.weight.shape) for n, (stage, _) in enumerate(links))
    return ChannelsLastPlan(program, stages, shape, out_shape, np.dtype(dtype), threads)


def faster_program(
    links: Sequence[tuple[Stage, Epilogue]], shape: Ints, dtype: Any, algorithm: Algorithm
) -> ProgramBuilder | None:
    """Return the program of a chain if it costs less than kernels on planes; weights are not read.

    Costs are those of one example on one thread, by default costs.
    """
    if shape[0] == 1 and all(s.in_channels == s.out_channels == 1 for s, _ in links):
        return None  # filters: a vector of channels would hold one
    try:
        builder = program_builder(links, shape, dtype, algorithm)
    except Unsupported:
        return None
    name = np.dtype(dtype).name
    planes = add_counts(segment_counts(s, name) for s in lower_untiled(links, shape, dtype))
    far = FAR_LINE * _far_lines(links, shape, np.dtype(dtype).itemsize)
    return builder if default_cost(builder.counts) + far < default_cost(planes) else None


def _far_lines(links: Sequence[tuple[Stage, Epilogue]], shape: Ints, itemsize: int) -> float:
    """Return the cache lines beyond L2 that a program moves and kernels on planes do not.

    Those are inputs and outputs of stages that together exceed L2 by far, without the input and the
    output of the chain, which both ways move.
    """
    _, l2, _ = _core.caches()
    stages = [stage for stage, _ in links]
    sizes = [math.prod(s) * itemsize for s in chain_shapes(stages, shape)]
    far = 0
    for k, (a, b) in enumerate(itertools.pairwise(sizes)):
        if a + b > L2_SHARE * l2:
            far += a * (k > 0) + b * (k + 1 < len(stages))
    return far / LINE


def program_builder(
    links: Sequence[tuple[Stage, Epilogue]],
    shape: Ints,
    dtype: Any,
    algorithm: Algorithm = "auto",
) -> ProgramBuilder:
    """Return the program of a chain; weights are not read before it is built."""
    builder = ProgramBuilder(dtype, algorithm)
    free = 3 - len(shape[1:])
    value = builder.input((shape[0], *(1,) * free, *shape[1:]))
    builder.output(builder.chain(value, links, name="stage"))
    return builder


def with_three_axes(x: Array) -> Array:
    """Return a view (batch, channels, d, h, w) of an array with one to three spatial axes."""
    return x[(slice(None), slice(None), *(None,) * (5 - x.ndim))]
