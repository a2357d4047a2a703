"""Stages of chains as convolutions over three axes, transposed ones as several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine.buffers import ONES, ZEROS


class Phase(NamedTuple):
    """Outputs of a transposed stage that one convolution computes: every step-th from `first`."""

    spec: StageSpec
    first: Three
    size: Three


def on_three_axes(values: Sequence[int], neutral: int) -> Three:
    """Return values per spatial axis for three axes, of which those of the stage are the last."""
    a, b, c = (*(neutral,) * (3 - len(values)), *values)
    return a, b, c


def stage_padding(stage: Stage) -> tuple[Three, Three]:
    """Return the padding before and after the input."""
    before, after = zip(*stage.geometry.padding)
    return on_three_axes(before, 0), on_three_axes(after, 0)


def stage_spec(stage: Stage, epilogue: Epilogue, is_padded: bool) -> StageSpec:
    """Return a stage that is not transposed as the C engine takes it."""
    g = stage.geometry
    weight = stage.weight.reshape(*stage.weight.shape[:2], *on_three_axes(stage.kernel, 1))
    permutation = stage.channel_permutation() if stage.shuffle != (1, 1) else None
    before, after = (ZEROS, ZEROS) if is_padded else stage_padding(stage)
    return StageSpec(
        weight, stage.outer, stage.groups, stage.inner, on_three_axes(g.stride, 1),
        on_three_axes(g.dilation, 1), before, after, permutation, None, epilogue.bias,
        epilogue.activation,
    )  # fmt: skip


def transposed_phases(
    stage: Stage, epilogue: Epilogue, in_size: Three, size: Three
) -> Iterator[Phase]:
    """Yield a transposed stage as one convolution per phase of its stride.

    Output sample y of the uncropped result has phase y % s and sees input sample y // s - u
    through tap phase + s * u.
    """
    g, groups = stage.geometry, stage.groups
    o, c = stage.weight.shape[:2]
    kernel = on_three_axes(stage.kernel, 1)
    weight = stage.weight.reshape(groups, o // groups, c, *kernel)
    weight = weight.swapaxes(1, 2).reshape(groups * c, o // groups, *kernel)
    stride, dilation = on_three_axes(g.stride, 1), on_three_axes(g.dilation, 1)
    crop, _ = stage_padding(stage)
    axes = list(zip(kernel, stride, dilation, crop, in_size, size))
    for phase in itertools.product(*map(range, stride)):
        found = [_phase_axis(p, *axis) for p, axis in zip(phase, axes)]
        counts = _three([axis.outputs for axis in found])
        if min(counts) <= 0:
            continue
        part = weight
        for a, axis in enumerate(found):
            part = part.take(axis.taps, axis=2 + a) if axis.taps else _zero_tap(part, 2 + a)
        spec = StageSpec(
            np.ascontiguousarray(part), stage.outer, groups, stage.inner, ONES,
            _three([axis.dilation for axis in found]), _three([axis.before for axis in found]),
            _three([axis.after for axis in found]), None, None, epilogue.bias, epilogue.activation,
        )  # fmt: skip
        yield Phase(spec, _three([axis.first for axis in found]), counts)


class _PhaseAxis(NamedTuple):
    """One axis of a phase: taps in the order of inputs, padding, and outputs."""

    taps: list[int]
    dilation: int
    before: int
    after: int
    first: int
    outputs: int


def _phase_axis(
    phase: int, kernel: int, stride: int, dilation: int, crop: int, in_size: int, size: int
) -> _PhaseAxis:
    taps = [t for t in range(kernel) if (t * dilation - phase) % stride == 0]
    start = -(-(crop - phase) // stride) if crop > phase else 0
    count = -(-(size + crop - phase) // stride) - start
    offsets = [(t * dilation - phase) // stride for t in taps]
    lowest = start - max(offsets, default=0)  # input of the first output's first tap
    highest = start + count - 1 - min(offsets, default=0)
    # Taps of a phase are s / gcd(s, d) apart, and read inputs d / gcd apart.
    distance = dilation // math.gcd(stride, dilation) if len(taps) > 1 else 1
    first = start * stride + phase - crop
    return _PhaseAxis(taps[::-1], distance, -lowest, highest + 1 - in_size, first, count)


def _zero_tap(weight: Array, axis: int) -> Array:
    """Return a weight with a single tap of zero along an axis, for phases that no tap reaches."""
    return np.zeros_like(weight.take([0], axis=axis))


def _three(values: Sequence[int]) -> Three:
    a, b, c = values
    return a, b, c
