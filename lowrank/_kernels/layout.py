"""Buffer sizes of a chain: the input that every stage needs for one tile of the output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lowrank._kernels.spec import PlaneLimits, StageSpec, Three


class StageSizes(NamedTuple):
    """Sizes of one stage: of whole images, and of the buffer of a tile's input.

    Attributes
    ----------
    size_in, size_out : (int, int, int)
        Spatial size of input and output.
    extent : (int, int, int)
        Samples that a tile needs, padding included.
    plane : (int, int, int)
        Buffer samples of one stride phase.
    phase : (int, int, int)
        Distance between stride phases in the buffer.
    channel : int
        Distance between channels in the buffer.
    buffer : int
        Elements of the buffer.
    """

    size_in: Three
    size_out: Three
    extent: Three
    plane: Three
    phase: Three
    channel: int
    buffer: int

    def offsets(self, spec: StageSpec) -> list[int]:
        """Return the distance in the buffer from an output's position to each tap (c, d, h, w)."""
        steps = (self.plane[1] * self.plane[2], self.plane[2], 1)
        along_axes = [
            [t * d % s * phase + t * d // s * step for t in range(k)]
            for k, d, s, phase, step in zip(
                spec.kernel, spec.dilation, spec.stride, self.phase, steps
            )
        ]
        channels = [c * spec.inner * self.channel for c in range(spec.weight.shape[1])]
        return [sum(o) for o in itertools.product(channels, *along_axes)]


class TileLayout:
    """Sizes of a chain for one tile; raises ValueError if stages do not fit each other.

    `limits` are those of the kernels that run it (see _core.plane_limits); `padded_rows` means that
    the input's rows are padded by something else than zeros.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        shape: Sequence[int],
        tile: Any,
        limits: PlaneLimits,
        padded_rows: bool = False,
    ) -> None:
        channels, *size = shape
        sizes = [_three(size)]
        for k, s in enumerate(stages):
            _check_stage(k, s, channels)
            sizes.append(output_size(s, sizes[-1]))
            channels = s.outer * s.weight.shape[0] * s.inner
        self.out_shape = (channels, *sizes[-1])
        requested = sizes[-1] if tile is None else tile
        self.tile = _three(max(1, min(t, n)) for t, n in zip(requested, sizes[-1]))
        self.stages = [
            _stage_sizes(s, size_in, size_out, extent, limits, k == 0, padded_rows and k == 0)
            for k, (s, size_in, size_out, extent) in enumerate(
                zip(stages, sizes, sizes[1:], extents(stages, sizes, self.tile))
            )
        ]
        self.workspace = max(s.buffer for s in self.stages)


def output_size(stage: StageSpec, size: Three) -> Three:
    """Return the spatial size of a stage's output."""
    ranges = [
        n + b + a - d * (k - 1) - 1
        for n, b, a, d, k in zip(size, stage.before, stage.after, stage.dilation, stage.kernel)
    ]
    if min(ranges) < 0:
        raise ValueError(
            f"kernel {stage.kernel} with dilation {stage.dilation} does not fit an input "
            f"of {size} padded by {stage.before} and {stage.after}"
        )
    return _three(r // s + 1 for r, s in zip(ranges, stage.stride))


def extents(stages: Sequence[StageSpec], sizes: Sequence[Three], tile: Three) -> list[Three]:
    """Return the samples of each stage's padded input that a tile of the output needs."""
    needed, out = [], tile
    for stage, size in zip(reversed(stages), reversed(sizes[:-1])):
        extent = _three(
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(out, stage.stride, stage.dilation, stage.kernel)
        )
        needed.append(extent)
        out = _three(min(n, whole) for n, whole in zip(extent, size))
    return needed[::-1]


def check_border(border: Sequence[Any], stages: Sequence[StageSpec], shape: Sequence[int]) -> None:
    """Raise ValueError unless each table has an index in the input per padded position, or -1."""
    for axis, table in enumerate(border):
        if table is None:
            continue
        size = shape[1 + axis]
        padded = size + stages[0].before[axis] + stages[0].after[axis]
        if len(table) != padded or not -1 <= min(table) <= max(table) < size:
            raise ValueError(
                f"border of axis {axis} must have {padded} indices between -1 and {size - 1}, "
                f"got {len(table)}"
            )


def check_padded_columns(k: int, spec: StageSpec, layout: TileLayout) -> None:
    """Raise ValueError unless stage `k` can pad its rows by index."""
    columns, size = spec.padded_columns, layout.stages[k].size_in[2]
    padded = size + spec.before[2] + spec.after[2]
    has_whole_rows = layout.tile[2] == layout.out_shape[3]
    fits = len(columns) == padded and 0 <= min(columns) <= max(columns) < size
    if k == 0 or spec.stride[2] != 1 or not has_whole_rows or not fits:
        raise ValueError(
            f"padded_columns of stage {k} must be {padded} columns between 0 and {size - 1}, of a "
            "later stage with stride 1 and tiles of whole rows"
        )


def inverse(permutation: Sequence[int]) -> list[int]:
    """Return the inverse of a permutation."""
    result = [0] * len(permutation)
    for j, c in enumerate(permutation):
        result[c] = j
    return result


def _stage_sizes(
    stage: StageSpec,
    size_in: Three,
    size_out: Three,
    extent: Three,
    limits: PlaneLimits,
    is_first: bool,
    padded_rows: bool,
) -> StageSizes:
    d, h, w = (-(-e // s) for e, s in zip(extent, stage.stride))
    # Runs continue over the ends of rows: zeros behind a row serve as those ahead of the next.
    before, after, shared = stage.before[2], stage.after[2], 0
    if (
        stage.weight.shape[1] > 1
        and stage.stride[2] == 1
        and extent[2] == size_in[2] + before + after
        and min(before, after) > 0
        and stage.padded_columns is None
        and not padded_rows
    ):
        shared = min(before, after, extent[2] - size_out[2])  # a row must hold its outputs
    plane = d, h, w - shared
    samples = math.prod(plane)
    phase = (stage.stride[1] * stage.stride[2] * samples, stage.stride[2] * samples, samples)
    channel = math.prod(stage.stride) * samples
    channels = stage.outer * stage.groups * stage.weight.shape[1] * stage.inner
    if is_first and stage.weight.shape[1] == 1:
        channels = min(channels, limits.packed_channels)
    # An input read in place needs no buffer; its tap offsets (8 bytes each) are stored there.
    offsets = 2 * math.prod(stage.weight.shape[1:])
    buffer = max(channels * channel + shared, offsets) + limits.overread
    return StageSizes(size_in, size_out, extent, plane, phase, channel, buffer)


def _check_stage(k: int, s: StageSpec, channels: int) -> None:
    if min(s.outer, s.groups, s.inner, *s.stride, *s.dilation, *s.weight.shape) < 1:
        raise ValueError(
            f"weight shape, stride, dilation and replications must be at least 1 (stage {k})"
        )
    if s.weight.shape[0] % s.groups:
        raise ValueError(
            f"output channels must be a multiple of {s.groups} groups, got {s.weight.shape[0]} "
            f"(stage {k})"
        )
    expected = s.outer * s.groups * s.weight.shape[1] * s.inner
    if expected != channels:
        raise ValueError(f"input of stage {k} must have {expected} channels, got {channels}")
    if s.permutation is not None and sorted(s.permutation) != list(range(channels)):
        raise ValueError(f"permutation must be one of {channels} channels (stage {k})")


def _three(values: Any) -> Three:
    a, b, c = values
    return int(a), int(b), int(c)
