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
Kind = Literal["filter", "depthwise + pointwise", "depthwise", "dense", "matrix product"]

#: Output channels up to which a dense stage is summed in place; wider ones are unrolled for cuBLAS.
MAX_DENSE_OUTPUTS = 32
MAX_FUSED_WEIGHTS = 64 * 128  # of a pointwise stage that is fused with the depthwise one before it
GEMM_ROWS = 64  # output channels of a tile of a product
SHARED_BYTES = 99 << 10  # of shared memory that a block may take on every device since sm_86
# Tiles of filters (d, h, w), the largest first.
TILES_2D = ((1, 32, 64), (1, 32, 32), (1, 16, 32), (1, 16, 16))
TILES_3D = ((8, 8, 32), (4, 8, 32), (4, 8, 16), (4, 4, 16))


class KernelStep(NamedTuple):
    """Consecutive stages that run as one kernel or matrix product.

    Attributes
    ----------
    kind : str
        Kernel or library that runs them.
    first, stage_count : int
        Index of the first stage, and number of stages.
    in_shape, out_shape : tuple of int
        (channels, \\*spatial) of input and output.
    tile, taps : tuple of int
        Output tile of a filter, and its taps along three axes.  Without taps, the first axis
        has 0 and the others 1.
    """

    kind: Kind
    first: int
    stage_count: int
    in_shape: Ints
    out_shape: Ints
    tile: Sizes = (1, 1, 1)
    taps: Sizes = (1, 1, 1)


def three(sizes: Iterable[int]) -> Sizes:
    """Extend sizes to three axes by leading ones."""
    sizes = tuple(sizes)
    d, h, w = (1,) * (3 - len(sizes)) + sizes
    return d, h, w


def partition(
    stages: Sequence[Stage],
    shape: Ints,
    itemsize: int = 4,
    no_epilogue: Sequence[bool] | None = None,
    shared: int = SHARED_BYTES,
) -> list[KernelStep]:
    """Partition a chain into steps.

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

    Returns
    -------
    list of KernelStep

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
    steps: list[KernelStep] = []
    first = 0
    while first < len(stages):
        step = _next_step(stages, shapes, first, itemsize, no_epilogue, shared)
        steps.append(step)
        first += step.stage_count
    return steps


def _next_step(
    stages: Sequence[Stage], shapes: Sequence[Ints], first: int, itemsize: int,
    no_epilogue: Sequence[bool], shared: int,
) -> KernelStep:  # fmt: skip
    s = stages[first]
    for count in (3, 2):
        part = stages[first : first + count]
        plain_until_last = all(no_epilogue[first : first + count - 1])
        if len(part) == count and plain_until_last and is_filter(part):
            taps = _taps(part)
            tile = _tile(taps, itemsize, shared)
            if tile is not None:
                ends = shapes[first], shapes[first + count]
                return KernelStep("filter", first, count, *ends, tile, taps)
    single = (first, 1, shapes[first], shapes[first + 1])
    if s.weight.shape[1] == 1 and not s.transposed:
        if first + 1 < len(stages) and _can_fuse(s, stages[first + 1]):
            return KernelStep("depthwise + pointwise", first, 2, shapes[first], shapes[first + 2])
        return KernelStep("depthwise", *single)
    outs = s.weight.shape[1] if s.transposed else len(s.weight) // s.groups
    if s.transposed or (outs <= MAX_DENSE_OUTPUTS and math.prod(s.kernel) > 1):
        return KernelStep("dense", *single)
    return KernelStep("matrix product", *single)


def _can_fuse(first: Stage, second: Stage) -> bool:
    """Return whether depthwise and pointwise pay as one kernel.

    Each block of output channels computes the depthwise sums again: wide stages do not pay.
    """
    plain = second.kind == "pointwise" and not second.transposed and second.shuffle == (1, 1)
    replicated = first.outer * first.inner * second.outer * second.inner > 1
    g = second.geometry
    unpadded = set(g.stride) == {1} and not any(map(any, g.padding))
    small = second.in_channels * second.out_channels <= MAX_FUSED_WEIGHTS
    return plain and not replicated and unpadded and small


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
            or (g.padding_mode == "constant" and g.value and any(map(any, g.padding)))
            or (s.outer, s.inner) != (first.outer, first.inner)
            or any(any(p) for a, p in enumerate(g.padding) if a != axes[0])
            or (s.groups, len(s.weight) // s.groups, s.weight.shape[1]) != (stage_groups, outs, ins)
        ):  # fmt: skip
            return False
        used_axes.add(axes[0])
    return True


def _taps(stages: Sequence[Stage]) -> Sizes:
    taps = [0, 1, 1]
    for s in stages:
        (axis,) = axes_of(s)
        taps[axis + 3 - s.geometry.ndim] = s.kernel[axis]
    return taps[0], taps[1], taps[2]


def round_to_fours(taps: Sizes) -> Sizes:
    """Round taps up to multiples of 4, as the filter kernel stores them."""
    d, h, w = (-(-n // 4) * 4 for n in taps)
    return d, h, w


def filter_shared_bytes(taps: Sizes, tile: Sizes, itemsize: int) -> int:
    """Return the shared memory per block of the filter kernel; see kernels.cu for its layout."""
    (kd, kh, kw), (td, th, tw) = round_to_fours(taps), tile
    elements = (td + kd) * (th + kh) * (tw + kw + 1 + tw + 1) + td * th * tw
    elements += (td + kd) * th * tw if kd else 0
    return (elements + kd + kh + kw) * itemsize


def halo_factor(taps: Sizes, tile: Sizes) -> float:
    """Return the samples read per output sample of a tile."""
    return math.prod((t + k) / t for t, k in zip(tile, round_to_fours(taps)))


def _tile(taps: Sizes, itemsize: int, shared: int) -> Sizes | None:
    tiles = TILES_3D if taps[0] else TILES_2D
    fitting = [t for t in tiles if filter_shared_bytes(taps, t, itemsize) <= shared]
    if not fitting:
        return None
    # Two blocks per multiprocessor hide each other's latency, unless halos grow too much.
    paired = [t for t in fitting if filter_shared_bytes(taps, t, itemsize) <= shared // 2]
    if paired and halo_factor(taps, paired[0]) < 2 * halo_factor(taps, fitting[0]):
        return paired[0]
    return fitting[0]
