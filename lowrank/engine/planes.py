"""Counts of chains on planes: what the kernels of segments do on one example."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank._kernels.layout import output_size
from lowrank._kernels.limits import BLOCK_ROWS, MAX_DEPTHWISE_TAPS, MAX_REMAINDER, SCATTER_TAPS
from lowrank._kernels.spec import StageSpec
from lowrank.engine.costs import Counts, add_counts
from lowrank.engine.lowering import Segment


def segment_counts(segment: Segment, lanes: int) -> Counts:
    """Return the counts of all stages of a segment, over all its tiles."""
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
        parts.append(_stage(spec, out, extent, in_image, is_first, is_last, lanes))
        out = in_image
    each = add_counts(parts)
    return {name: math.prod(tiles) * count for name, count in each.items()}


def _stage(
    spec: StageSpec,
    out: Sequence[float],
    extent: Sequence[float],
    in_image: Sequence[float],
    is_first: bool,
    is_last: bool,
    lanes: int,
) -> Counts:
    """Count one stage on one tile: `out` samples per axis, from `extent` of its input."""
    rows, per_group, *taps = spec.weight.shape
    rows //= spec.groups
    groups = spec.outer * spec.groups * spec.inner
    outputs = groups * rows * math.prod(out)
    inputs = groups * per_group * math.prod(in_image)
    is_strided = max(spec.stride) > 1
    # Unpadded rows are read in place if no tap crosses them.
    in_place = is_first and not is_strided and spec.before[2] == spec.after[2] == 0 and taps[2] == 1
    packed = {"pack": is_first * (not in_place) * inputs / lanes, "stage tile": 1.0}
    if per_group == 1 and math.prod(taps) <= MAX_DEPTHWISE_TAPS:
        return packed | _depthwise(spec, out, lanes)
    by_rows = _runs_by_rows(spec, out, extent, lanes)
    scattered = (not by_rows) * (not is_last) * outputs / lanes
    return packed | _dense(spec, out, extent, lanes, by_rows) | {"scatter": scattered}


def _runs_by_rows(
    spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int
) -> bool:
    """Return whether the engine stores row by row, without scattering: the rule of chain.inc."""
    terms, width = math.prod(spec.weight.shape[1:]), out[2]
    vectors, pitch = math.ceil(width / lanes), math.ceil(extent[2] / spec.stride[2])
    rows = min(spec.weight.shape[0] // spec.groups, BLOCK_ROWS)
    hides_latency = rows * min(vectors, 3) >= BLOCK_ROWS
    is_cheaper = vectors * lanes * terms <= pitch * terms + SCATTER_TAPS * lanes
    return width >= lanes and pitch > width and hides_latency and is_cheaper


def _dense(
    spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int, by_rows: bool
) -> Counts:
    """Count runs over rows, or over planes, where runs continue over the ends of rows."""
    rows = spec.weight.shape[0] // spec.groups
    terms = math.prod(spec.weight.shape[1:])
    groups = spec.outer * spec.groups * spec.inner
    depth, height, width = out
    length = (height - 1) * math.ceil(extent[2] / spec.stride[2]) + width
    runs, vectors = depth, max(1, math.ceil((length - MAX_REMAINDER) / lanes))
    if by_rows:
        runs, vectors = depth * height, math.ceil(width / lanes)
    blocks = groups * math.ceil(rows / BLOCK_ROWS)
    return {
        "plane product": groups * rows * terms * runs * vectors,
        "plane load": blocks * terms * runs * vectors,
        "plane run": blocks * runs * math.ceil(vectors / 3),
        "plane weight": blocks * BLOCK_ROWS * terms / lanes,
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
