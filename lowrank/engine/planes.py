"""Counts of chains on planes: what the kernels of segments do on one example."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank._kernels import _core
from lowrank._kernels.layout import output_size
from lowrank._kernels.spec import PlaneLimits, StagePath, StageSpec
from lowrank.engine.costs import Counts, add_counts
from lowrank.engine.lowering import Segment


def segment_counts(segment: Segment, dtype: str) -> Counts:
    """Return the counts of all stages of a segment, over all its tiles."""
    limits = _core.plane_limits(dtype)
    paths = _core.stage_paths(
        segment.specs, segment.in_shape, segment.tile, dtype=dtype, border=segment.border
    )
    tiles = [-(-n // t) for n, t in zip(segment.out_shape[1:], segment.tile)]
    out: tuple[float, ...] = tuple(n / c for n, c in zip(segment.out_shape[1:], tiles))
    a, b, c = segment.in_shape[1:]
    input_sizes = [(a, b, c)]
    for spec in segment.specs:
        input_sizes.append(output_size(spec, input_sizes[-1]))
    parts = []
    for k in reversed(range(len(segment.specs))):
        spec, whole = segment.specs[k], input_sizes[k]
        extent = tuple(
            (n - 1) * s + d * (t - 1) + 1
            for n, s, d, t in zip(out, spec.stride, spec.dilation, spec.kernel)
        )
        in_image = tuple(min(n, m) for n, m in zip(extent, whole))
        is_first, is_last = k == 0, k == len(segment.specs) - 1
        parts.append(_stage(spec, out, extent, in_image, paths[k], is_first, is_last, limits))
        out = in_image
    each = add_counts(parts)
    return {name: math.prod(tiles) * count for name, count in each.items()}


def _stage(
    spec: StageSpec,
    out: Sequence[float],
    extent: Sequence[float],
    in_image: Sequence[float],
    path: StagePath,
    is_first: bool,
    is_last: bool,
    limits: PlaneLimits,
) -> Counts:
    """Count one stage on one tile: `out` samples per axis, from `extent` of its input."""
    rows, per_group = spec.weight.shape[0] // spec.groups, spec.weight.shape[1]
    groups = spec.outer * spec.groups * spec.inner
    outputs = groups * rows * math.prod(out)
    inputs = groups * per_group * math.prod(in_image)
    packed = {"pack": is_first * (not path.keeps_rows) * inputs / limits.lanes, "stage tile": 1.0}
    if spec.stride[2] > 1:
        packed["strided"] = inputs / limits.lanes
    if path.input == "transposed":
        return {"stage tile": 1.0} | _transposed(spec, out, in_image, limits.lanes)
    if path.kernel.startswith("depthwise"):
        return packed | _depthwise(spec, out, limits.lanes)
    by_rows = path.kernel == "dense rows"
    scattered = (not by_rows) * (not is_last) * outputs / limits.lanes
    return packed | _dense(spec, out, extent, limits, by_rows) | {"scatter": scattered}


def _dense(
    spec: StageSpec,
    out: Sequence[float],
    extent: Sequence[float],
    limits: PlaneLimits,
    by_rows: bool,
) -> Counts:
    """Count runs over rows, or over planes, where runs continue over the ends of rows."""
    rows = spec.weight.shape[0] // spec.groups
    terms = math.prod(spec.weight.shape[1:])
    groups = spec.outer * spec.groups * spec.inner
    depth, height, width = out
    lanes, block_rows = limits.lanes, limits.block_rows
    length = (height - 1) * math.ceil(extent[2] / spec.stride[2]) + width
    runs, vectors = depth, max(1, math.ceil((length - limits.max_remainder) / lanes))
    if by_rows:
        runs, vectors = depth * height, math.ceil(width / lanes)
    blocks = groups * math.ceil(rows / block_rows)
    return {
        "plane product": groups * rows * terms * runs * vectors,
        "plane load": blocks * terms * runs * vectors,
        "plane run": blocks * runs * math.ceil(vectors / 3),
        "plane weight": blocks * block_rows * terms / lanes,
    }


def _transposed(
    spec: StageSpec, out: Sequence[float], in_image: Sequence[float], lanes: int
) -> Counts:
    """Count small planes, whose channels are transposed into vectors and back."""
    channels = spec.outer * spec.groups * spec.inner * spec.weight.shape[0] // spec.groups
    vectors = math.ceil(channels / lanes)
    outputs = vectors * math.prod(out)
    return {
        "tap": outputs * math.prod(spec.kernel),
        "output": outputs,
        "move": vectors * math.prod(in_image) + outputs,
    }


def _depthwise(spec: StageSpec, out: Sequence[float], lanes: int) -> Counts:
    """Count rows of one channel, four at a time where their taps overlap."""
    rows = spec.weight.shape[0] // spec.groups
    d, h, w = spec.kernel
    planes = spec.outer * spec.groups * spec.inner * rows
    depth, height, width = out
    # Rows shorter than a vector run in half and quarter vectors.
    vector = lanes if width >= lanes else lanes / 2 if width >= lanes / 2 else lanes / 4
    vectors = planes * depth * height * math.ceil(width / vector)
    overlaps = spec.stride[1] == 1 and spec.dilation[1] == 1
    return {
        "row product": vectors * d * h * w,
        "row load": vectors * d * w * ((h + 3) / 4 if overlaps else h),
        "row": planes * depth * height / 4,
    }
