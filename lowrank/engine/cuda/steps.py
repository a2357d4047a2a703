"""Partition of a chain into GPU steps, from shapes alone.

Plans build these steps; the performance model counts their operations, also of abstract weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from lowrank._typing import Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Stage

Sizes = tuple[int, int, int]
Kind = Literal[
    "filter", "depthwise", "array code", "depthwise, channels last", "matrix product",
    "depthwise + pointwise", "pointwise + depthwise + pointwise", "channels last", "channels first",
]  # fmt: skip
#: Steps whose kernels read and write uint8 as well as the plan's own type.
READS_BYTES = ("filter", "depthwise")
#: Steps whose input and output are channels-last.
CHANNELS_LAST = ("matrix product", "depthwise + pointwise", "pointwise + depthwise + pointwise")
MAX_FILTER_TAPS = 32  # along an axis: loops are unrolled, and more take seconds to compile
MAX_UNROLLED_TAPS = 11  # along an axis of a depthwise kernel whose loops are unrolled
MAX_UNROLLED_STRIDE = 4
MAX_INTERLEAVED = 4  # values per sample, such as the colours of a pixel
SHARED_BYTES = 99 << 10  # of shared memory that a block may take on every device since sm_86
FUSED_TILE = 8, 16  # outputs per block of a fused step, along H and W
MAX_FUSED_TAPS = 25  # of a fused depthwise stage
MAX_MIDDLE_CHANNELS = 64  # between the stages of a fused step of three


class KernelStep(NamedTuple):
    """Consecutive stages that run as one step, or a change of layout.

    Attributes
    ----------
    kind : str
        Kernel or library that runs them.
    first, stage_count : int
        Index of the first stage, and number of stages; 0 for a change of layout.
    in_shape, out_shape : tuple of int
        (channels, \\*spatial) of input and output.
    taps : tuple of int
        Taps of a filter along three axes; 1 where it has no pass.
    """

    kind: Kind
    first: int
    stage_count: int
    in_shape: Ints
    out_shape: Ints
    taps: Sizes = (1, 1, 1)


def three(sizes: Iterable[int], fill: int = 1) -> Sizes:
    """Extend sizes to three axes by leading ones, or by `fill`."""
    sizes = tuple(sizes)
    d, h, w = (fill,) * (3 - len(sizes)) + sizes
    return d, h, w


def partition(
    stages: Sequence[Stage],
    shape: Ints,
    itemsize: int = 4,
    no_epilogue: Sequence[bool] | None = None,
    shared: int = SHARED_BYTES,
    tensor_cores: bool = False,
    interleaved: int = 1,
) -> list[KernelStep]:
    """Partition a chain into steps.

    Inputs and outputs of a chain are (batch, channels, \\*spatial).  Products run channels-last,
    between two changes of layout.

    Parameters
    ----------
    stages : sequence of Stage
        Stages; their weights may be abstract.
    shape : tuple of int
        (channels, \\*spatial) of the input.
    itemsize : int
        Bytes of an accumulator.
    no_epilogue : sequence of bool, optional
        Whether each stage has neither bias nor activation.
    shared : int
        Bytes of shared memory available to a block.
    tensor_cores : bool
        Whether products run on tensor cores, in TF32, float16 or bfloat16.
    interleaved : int
        Values per sample along the last axis.

    Returns
    -------
    list of KernelStep

    Raises
    ------
    ValueError
        If the chain cannot run on interleaved values.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> from lowrank.engine.cuda.steps import partition
    >>> blur = filters.separate(filters.gauss(2.0))
    >>> [s.kind for s in partition(blur.stages, (1, 100, 100))]
    ['filter']
    """
    no_epilogue = [True] * len(stages) if no_epilogue is None else no_epilogue
    shapes = chain_shapes(stages, shape)
    ends = shapes[0], shapes[-1]
    if stages[0].geometry.value:  # border values of later stages are responses to it
        steps = [KernelStep("array code", 0, len(stages), *ends)]
    else:
        steps = []
        first = 0
        while first < len(stages):
            after_product = bool(steps) and steps[-1].kind in CHANNELS_LAST
            kind, count, taps = _next_step(
                stages[first:], no_epilogue[first:], shared if tensor_cores else 0, itemsize,
                after_product,
            )  # fmt: skip
            ends = shapes[first], shapes[first + count]
            steps.append(KernelStep(kind, first, count, *ends, taps))
            first += count
    if interleaved > 1 and not (len(steps) == 1 and is_interleavable(stages, interleaved)):
        raise ValueError(
            f"interleaved must be 1 for this chain on a GPU, got {interleaved}: only one filter of "
            "images or depthwise stage of stride 1 runs on interleaved values"
        )
    return _with_layouts(stages, steps)


def _next_step(
    stages: Sequence[Stage], no_epilogue: Sequence[bool], shared: int, itemsize: int,
    after_product: bool,
) -> tuple[Kind, int, Sizes]:  # fmt: skip
    """Return the kind of the next step, its number of stages, and the taps of a filter."""
    for count in (3, 2):
        part = stages[:count]
        if after_product and all(s.weight.shape[1] == 1 and is_planar(s) for s in part):
            continue  # two depthwise steps move less than a filter between two changes of layout
        if len(part) == count and all(no_epilogue[: count - 1]) and is_filter(part):
            taps = _taps(part)
            terms = len(part[0].weight) // part[0].groups
            if max(taps) <= MAX_FILTER_TAPS and (taps[0] == 1 or terms == 1):
                return "filter", count, taps
    for count in (3, 2):
        if itemsize == 4 and len(stages) >= count and _can_fuse(stages[:count], shared):
            kind: Kind = "depthwise + pointwise"
            return (kind if count == 2 else "pointwise + depthwise + pointwise"), count, (1, 1, 1)
    s = stages[0]
    if s.transposed or s.shuffle != (1, 1) or s.inner > 1:
        return "array code", 1, (1, 1, 1)
    return ("depthwise" if s.weight.shape[1] == 1 else "matrix product"), 1, (1, 1, 1)


def _with_layouts(stages: Sequence[Stage], steps: Sequence[KernelStep]) -> list[KernelStep]:
    """Insert changes of layout; an unrolled depthwise step runs in either layout."""
    result: list[KernelStep] = []
    is_last = False
    for k, step in enumerate(steps):
        following = steps[k + 1].kind if k + 1 < len(steps) else "array code"
        wants_last = step.kind in CHANNELS_LAST
        if step.kind == "depthwise" and is_planar(stages[step.first]):
            wants_last = is_last or following in CHANNELS_LAST
            if wants_last:
                step = step._replace(kind="depthwise, channels last")
        if wants_last != is_last:
            result += _layout_step(wants_last, step.first, step.in_shape)
        result.append(step)
        is_last = wants_last
    if is_last:
        result += _layout_step(False, result[-1].first + 1, result[-1].out_shape)
    return result


def _layout_step(to_last: bool, first: int, shape: Ints) -> list[KernelStep]:
    if shape[0] == 1:
        return []  # both layouts are the same
    return [KernelStep("channels last" if to_last else "channels first", first, 0, shape, shape)]


def is_planar(stage: Stage) -> bool:
    """Return whether the loops over the taps of a depthwise stage are unrolled."""
    g = stage.geometry
    *_, stride = g.stride
    is_plain = g.ndim < 3 and {*g.dilation} == {1} and stride <= MAX_UNROLLED_STRIDE
    # A missing axis has stride 1, but one output and one tap, so that any stride is the same.
    return is_plain and {*g.stride} == {stride} and max(stage.kernel) <= MAX_UNROLLED_TAPS


def fused_shared_bytes(
    channels: int, middle: int, taps: Sizes, stride: int, itemsize: int = 4
) -> int:
    """Return the shared memory per block of the fused kernel; `middle` is 0 for two stages."""
    rows, columns = FUSED_TILE
    size = rows * columns * _pitch(channels * itemsize)
    halo = ((rows - 1) * stride + taps[1]) * ((columns - 1) * stride + taps[2])
    return size + (halo * _pitch(middle * itemsize) if middle else 0)


def _pitch(size: int) -> int:
    """Return the bytes between rows of `size` bytes; see pitch_of in kernels.cu."""
    return (-(-size // 64) | 1) * 64


def _can_fuse(stages: Sequence[Stage], shared: int) -> bool:
    """Return whether a depthwise and a pointwise stage, or three stages, run as one kernel."""
    *before, first, second = stages
    if any(s.transposed or s.shuffle != (1, 1) or s.outer * s.inner > 1 for s in stages):
        return False
    for s in (*before, second):
        if s.kind != "pointwise" or set(s.geometry.stride) != {1} or s.groups > 1:
            return False
        if any(map(any, s.geometry.padding)):
            return False
    if first.weight.shape[1] != 1 or not is_planar(first):
        return False
    middle = first.in_channels if before else 0
    if second.out_channels % 4:  # they are stored four at a time
        return False
    if middle > MAX_MIDDLE_CHANNELS or math.prod(first.kernel) > MAX_FUSED_TAPS:
        return False
    if before and (before[0].in_channels % 8 or middle % 8):  # and read 16 bytes at a time
        return False
    taps, stride = three(first.kernel), max(first.geometry.stride)
    return fused_shared_bytes(first.out_channels, middle, taps, stride) <= shared


def is_interleavable(stages: Sequence[Stage], values: int) -> bool:
    """Return whether a chain is one filter of images whose samples have up to four values."""
    first, last = stages[0], stages[-1]
    if not 1 < values <= MAX_INTERLEAVED or first.geometry.ndim > 2 or first.geometry.value:
        return False
    if len(stages) == 2 and is_filter(stages):
        return max(first.kernel + last.kernel) <= MAX_FILTER_TAPS
    is_depthwise = first.weight.shape[1] == 1 and not first.transposed
    is_plain = is_depthwise and first.shuffle == (1, 1) and first.inner == 1
    return len(stages) == 1 and is_plain and is_planar(first) and {*first.geometry.stride} == {1}


def axes_of(stage: Stage) -> list[int]:
    """Return the axes with more than one tap."""
    return [a for a, n in enumerate(stage.kernel) if n > 1]


def is_filter(stages: Sequence[Stage]) -> bool:
    """Return whether stages are a sum of rank-1 terms per channel, one 1-D pass per stage."""
    first, used_axes = stages[0], set[int]()
    groups, terms = first.groups, len(first.weight) // first.groups
    for k, s in enumerate(stages):
        g, axes = s.geometry, axes_of(s)
        last = k == len(stages) - 1
        ins, outs = (1, terms) if k == 0 else (terms, 1) if last else (1, 1)
        stage_groups = groups if k == 0 or last else groups * terms
        plain = not s.transposed and s.shuffle == (1, 1) and set(g.stride) == {1}
        if (
            not plain or len(axes) != 1 or axes[0] in used_axes or g.dilation[axes[0]] != 1
            or (s.outer, s.inner) != (first.outer, 1)
            or any(any(p) for a, p in enumerate(g.padding) if a != axes[0])
            or (s.groups, len(s.weight) // s.groups, s.weight.shape[1]) != (stage_groups, outs, ins)
        ):  # fmt: skip
            return False
        used_axes.add(axes[0])
    return True


def _taps(stages: Sequence[Stage]) -> Sizes:
    taps = [1, 1, 1]
    for s in stages:
        (axis,) = axes_of(s)
        taps[axis + 3 - s.geometry.ndim] = s.kernel[axis]
    return taps[0], taps[1], taps[2]
