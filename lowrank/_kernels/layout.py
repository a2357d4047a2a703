"""Sizes: what every stage of a chain needs of its input for one tile of the output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lowrank._kernels.spec import StageSpec, Three

SLACK = 256  # elements past a buffer that a run may read, as in lr.h
NEAR = 16384 // 4  # elements of channels that a first depthwise stage takes at a time, as in isa.c


class Sizes(NamedTuple):
    """Sizes of one stage: of the whole image, and of the buffer that holds a tile's input."""

    size_in: Three
    size_out: Three
    extent: Three  # samples that a whole tile needs, borders included
    plane: Three  # of one stride phase
    phase: Three  # distance between phases
    channel: int
    buffer: int

    def offsets(self, spec: StageSpec) -> list[int]:
        """Where tap (c, d, h, w) of an output sample lies in the buffer, from its place."""
        steps = (self.plane[1] * self.plane[2], self.plane[2], 1)
        along = [
            [t * d % s * phase + t * d // s * step for t in range(k)]
            for k, d, s, phase, step in zip(
                spec.weight.shape[2:], spec.dilation, spec.stride, self.phase, steps
            )
        ]
        channels = [c * spec.right * self.channel for c in range(spec.weight.shape[1])]
        return [sum(o) for o in itertools.product(channels, *along)]


class Layout:
    """The sizes of a whole chain; ValueError where its parts do not fit.

    `bordered` says that what stands beside the input's rows is not zeros.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        shape: Sequence[int],
        tile: Any,
        bordered: bool = False,
    ) -> None:
        channels, *size = shape
        sizes = [_three(size)]
        for k, s in enumerate(stages):
            _check(k, s, channels)
            sizes.append(output_size(s, sizes[-1]))
            channels = s.left * s.weight.shape[0] * s.right
        self.out_shape = (channels, *sizes[-1])
        wanted = sizes[-1] if tile is None else tile
        self.tile = _three(max(1, min(t, n)) for t, n in zip(wanted, sizes[-1]))
        self.stages = [
            _sizes(s, a, b, e, k == 0, bordered and k == 0)
            for k, (s, a, b, e) in enumerate(
                zip(stages, sizes, sizes[1:], extents(stages, sizes, self.tile))
            )
        ]
        self.workspace = max(s.buffer for s in self.stages)


def output_size(stage: StageSpec, size: Three) -> Three:
    """Spatial size of what a stage gives."""
    rooms = [
        n + b + a - d * (k - 1) - 1
        for n, b, a, d, k in zip(
            size, stage.before, stage.after, stage.dilation, stage.weight.shape[2:]
        )
    ]
    if min(rooms) < 0:
        raise ValueError(
            f"kernel {stage.weight.shape[2:]} with dilation {stage.dilation} does not fit an input "
            f"of {size} padded by {stage.before} and {stage.after}"
        )
    return _three(r // s + 1 for r, s in zip(rooms, stage.stride))


def extents(stages: Sequence[StageSpec], sizes: Sequence[Three], tile: Three) -> list[Three]:
    """Samples of each stage's input, borders included, that a tile of the output needs."""
    found, out = [], tile
    for stage, size in zip(reversed(stages), reversed(sizes[:-1])):
        need = _three(
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(out, stage.stride, stage.dilation, stage.weight.shape[2:])
        )
        found.append(need)
        out = _three(min(n, whole) for n, whole in zip(need, size))
    return found[::-1]


def _sizes(
    stage: StageSpec, size_in: Three, size_out: Three, extent: Three, first: bool, bordered: bool
) -> Sizes:
    d, h, w = (-(-e // s) for e, s in zip(extent, stage.stride))
    # Runs go over the ends of rows: there the zeros behind one are those ahead of the next.
    before, after, shared = stage.before[2], stage.after[2], 0
    if (
        stage.weight.shape[1] > 1
        and stage.stride[2] == 1
        and extent[2] == size_in[2] + before + after
        and min(before, after) > 0
        and stage.fold is None
        and not bordered
    ):
        shared = min(before, after, extent[2] - size_out[2])  # a row must hold its outputs
    plane = d, h, w - shared
    one = math.prod(plane)
    phase = (stage.stride[1] * stage.stride[2] * one, stage.stride[2] * one, one)
    channel = math.prod(stage.stride) * one
    channels = stage.left * stage.groups * stage.weight.shape[1] * stage.right
    if first and stage.weight.shape[1] == 1:
        channels = min(channels, max(16, NEAR // channel))
    # The buffer also serves as the table of offsets where x is read in place (8 bytes each).
    buffer = max(channels * channel + shared, 2 * math.prod(stage.weight.shape[1:])) + SLACK
    return Sizes(size_in, size_out, extent, plane, phase, channel, buffer)


def _check(k: int, s: StageSpec, channels: int) -> None:
    if min(s.left, s.groups, s.right, *s.stride, *s.dilation, *s.weight.shape) < 1:
        raise ValueError(f"stage {k} has an empty weight, or a stride, dilation or tie below 1")
    if s.weight.shape[0] % s.groups:
        raise ValueError(f"stage {k}: {s.weight.shape[0]} outputs in {s.groups} groups")
    takes = s.left * s.groups * s.weight.shape[1] * s.right
    if takes != channels:
        raise ValueError(f"stage {k} takes {takes} channels, got {channels}")
    if s.source is not None and sorted(s.source) != list(range(channels)):
        raise ValueError(f"source of stage {k} must be a permutation of {channels} channels")


def _three(values: Any) -> Three:
    a, b, c = values
    return int(a), int(b), int(c)
