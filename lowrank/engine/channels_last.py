"""Chains on channels-last buffers: a plan of one program, for NumPy arrays of the plan's type."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.tables import format_count
from lowrank.engine import Algorithm, StepProfile
from lowrank.engine.algorithms import algorithm_shape
from lowrank.engine.description import OperationRow, PlannedStage, stage_name
from lowrank.engine.network import describe_operation
from lowrank.engine.program import Operation, Program, ProgramBuilder, Unsupported

ALGORITHM_WIDTH = 20  # of a description
# Costs of kernels on planes in FMAs of a vector, from measurements on AVX-512:
PLANES_DENSE = 1.06
PLANES_REMAINDER = 0.5  # idle lanes at the end of a plane, in vectors
PLANES_DEPTHWISE, PLANES_OUTPUT = 1.4, 2.5  # per tap, and per vector of the output
PLANES_STRIDED = 2.2  # factor on depthwise stages
PLANES_SCATTER = 40.0  # per vector that a dense stage scatters into padded rows
PLANES_PACK = 3.0


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
        self.program((_on_three_axes(x),), (_on_three_axes(out),), self.threads)

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
        seconds = self.program.core.profile((_on_three_axes(x), _on_three_axes(out)), self.threads)
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
    try:
        builder = _builder(links, shape, dtype, algorithm)
    except Unsupported:
        return None
    if builder.cost >= planes_cost(links, shape, builder.limits.lanes):
        return None
    out_shape = chain_shapes([stage for stage, _ in links], shape)[-1]
    program = builder.build(names=("x", "out"))
    stages = tuple(stage_name(n, stage.weight.shape) for n, (stage, _) in enumerate(links))
    return ChannelsLastPlan(program, stages, shape, out_shape, np.dtype(dtype), threads)


def planes_cost(links: Sequence[tuple[Stage, Epilogue]], shape: Ints, lanes: int) -> float:
    """Estimate the time of a chain on planes for one example, in FMAs of a vector."""
    total = 0.0
    stages = [stage for stage, _ in links]
    sizes = chain_shapes(stages, shape)
    for number, (stage, inputs, outputs) in enumerate(zip(stages, sizes, sizes[1:])):
        samples = math.prod(outputs[1:])
        vectors = samples / lanes
        terms = math.prod(stage.weight.shape[1:])
        taps = math.prod(stage.kernel)
        if stage.transposed:
            terms = terms * stage.weight.shape[0] // stage.groups // max(1, stage.weight.shape[1])
        if stage.weight.shape[1] == 1:
            cost = PLANES_DEPTHWISE * taps + PLANES_OUTPUT
            cost *= PLANES_STRIDED if max(stage.geometry.stride) > 1 else 1.0
            # A dense stage before it scatters its runs into padded rows.
            scattered = (
                number > 0 and stage.kernel[-1] > 1 and stages[number - 1].weight.shape[1] > 1
            )
            total += outputs[0] * vectors * (cost + scattered * PLANES_SCATTER)
        else:
            # Runs continue over the ends of rows, whose padding is computed, too.
            width = outputs[-1]
            wasted = (width + stage.kernel[-1] - 1) / width if taps > 1 else 1.0
            remainder = 1 + PLANES_REMAINDER * lanes / max(samples, lanes)
            total += PLANES_DENSE * outputs[0] * vectors * terms * wasted * remainder
        packs = number == 0 and (taps > 1 or max(stage.geometry.stride) > 1)
        total += packs * PLANES_PACK * math.prod(inputs) / lanes
    return total


def _builder(
    links: Sequence[tuple[Stage, Epilogue]], shape: Ints, dtype: Any, algorithm: Algorithm
) -> ProgramBuilder:
    builder = ProgramBuilder(dtype, algorithm)
    free = 3 - len(shape[1:])
    value = builder.input((shape[0], *(1,) * free, *shape[1:]))
    builder.output(builder.chain(value, links, name="stage"))
    return builder


def _on_three_axes(x: Array) -> Array:
    """Return a view (batch, channels, d, h, w) of an array with one to three spatial axes."""
    return x[(slice(None), slice(None), *(None,) * (5 - x.ndim))]
