"""How a chain is cut into steps on a GPU, and what each does: from shapes alone.

Plans are made of these steps, and the time model counts them, for chains of blank stages as well.
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

NARROW = 32  # output channels up to which a stage is summed where it lies, not unrolled for cuBLAS
FUSED = 64 * 128  # channels in times out, up to which depthwise and pointwise are one kernel
ROWS = 64  # output channels of a tile of a product
SHARED = 99 << 10  # bytes of shared memory that a block may take on every device since sm_86
TILES = ((1, 32, 64), (1, 32, 32), (1, 16, 32), (1, 16, 16))  # of filters in a plane,
BOXES = ((8, 8, 32), (4, 8, 32), (4, 8, 16), (4, 4, 16))  # and in a volume


class Step(NamedTuple):
    """Some stages in one go.

    Attributes
    ----------
    kind : str
        What runs them.
    first, many : int
        Number of the first stage, and of stages.
    shape, out : tuple of int
        (channels, \\*spatial) in and out.
    tile, taps : tuple of int
        Of a filter: samples of a tile, and taps of each of three axes; 0 for a first axis without
        any, 1 for the others.
    """

    kind: Kind
    first: int
    many: int
    shape: Ints
    out: Ints
    tile: Sizes = (1, 1, 1)
    taps: Sizes = (1, 1, 1)


def three(sizes: Iterable[int], fill: int = 1) -> Sizes:
    """Sizes of three axes; those that are missing come first."""
    sizes = tuple(sizes)
    d, h, w = (fill,) * (3 - len(sizes)) + sizes
    return d, h, w


def cut(
    stages: Sequence[Stage],
    shape: Ints,
    itemsize: int = 4,
    bare: Sequence[bool] | None = None,
    shared: int = SHARED,
) -> list[Step]:
    """The steps of a chain.

    Parameters
    ----------
    stages : sequence of Stage
        With weights, or blank.
    shape : tuple of int
        (channels, \\*spatial) of the input.
    itemsize : int
        Bytes of a sum.
    bare : sequence of bool, optional
        Whether a stage ends with neither bias nor activation.
    shared : int
        Bytes of shared memory that a block may take.

    Returns
    -------
    list of Step

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> from lowrank.engine.cuda.steps import cut
    >>> blur = filters.separate(filters.gauss(2.0))
    >>> [s.kind for s in cut(blur.stages, (1, 100, 100))]
    ['filter']
    """
    bare = [True] * len(stages) if bare is None else bare
    shapes = chain_shapes(stages, shape)
    found: list[Step] = []
    at = 0
    while at < len(stages):
        step = _next(stages, shapes, at, itemsize, bare, shared)
        found.append(step)
        at += step.many
    return found


def _next(
    stages: Sequence[Stage], shapes: Sequence[Ints], at: int, itemsize: int, bare: Sequence[bool],
    shared: int,
) -> Step:  # fmt: skip
    s = stages[at]
    for many in (3, 2):
        part = stages[at : at + many]
        if len(part) == many and all(bare[at : at + many - 1]) and is_filter(part):
            taps = _taps(part)
            tile = _tile(taps, itemsize, shared)
            if tile is not None:
                return Step("filter", at, many, shapes[at], shapes[at + many], tile, taps)
    one = (at, 1, shapes[at], shapes[at + 1])
    if s.weight.shape[1] == 1 and not s.transposed:
        if at + 1 < len(stages) and _pair(s, stages[at + 1]):
            return Step("depthwise + pointwise", at, 2, shapes[at], shapes[at + 2])
        return Step("depthwise", *one)
    outs = s.weight.shape[1] if s.transposed else len(s.weight) // s.groups
    if s.transposed or (outs <= NARROW and math.prod(s.kernel) > 1):
        return Step("dense", *one)
    return Step("matrix product", *one)


def _pair(first: Stage, second: Stage) -> bool:
    """Whether depthwise and pointwise are worth one kernel: sums are made once a block of rows."""
    plain = second.kind == "pointwise" and not second.transposed and second.shuffle == (1, 1)
    tied = first.outer * first.inner * second.outer * second.inner > 1
    g = second.geometry
    still = set(g.stride) == {1} and not any(map(any, g.padding))
    few = second.in_channels * second.out_channels <= FUSED
    return plain and not tied and still and few


def axes_of(stage: Stage) -> list[int]:
    """Axes with more than one tap."""
    return [a for a, n in enumerate(stage.kernel) if n > 1]


def is_filter(stages: Sequence[Stage]) -> bool:
    """Whether stages are a sum of terms on each channel, each a product of passes along axes."""
    first, seen = stages[0], set[int]()
    groups, terms = first.groups, len(first.weight) // first.groups
    for k, s in enumerate(stages):
        g, axes = s.geometry, axes_of(s)
        last = k == len(stages) - 1
        ins, outs = (1, terms) if k == 0 else (terms, 1) if last else (1, 1)
        many = groups if k == 0 or last else groups * terms
        plain = not s.transposed and s.shuffle == (1, 1) and set(g.stride) == {1}
        if (
            not plain or len(axes) != 1 or axes[0] in seen or g.dilation[axes[0]] != 1
            or (g.padding_mode == "constant" and g.value and any(map(any, g.padding)))
            or (s.outer, s.inner) != (first.outer, first.inner)
            or any(any(p) for a, p in enumerate(g.padding) if a != axes[0])
            or (s.groups, len(s.weight) // s.groups, s.weight.shape[1]) != (many, outs, ins)
        ):  # fmt: skip
            return False
        seen.add(axes[0])
    return True


def _taps(stages: Sequence[Stage]) -> Sizes:
    found = [0, 1, 1]  # an axis without taps has one of 1
    for s in stages:
        (axis,) = axes_of(s)
        found[axis + 3 - s.geometry.ndim] = s.kernel[axis]
    return found[0], found[1], found[2]


def fours(taps: Sizes) -> Sizes:
    """Taps as a filter holds them: up to multiples of 4."""
    d, h, w = (-(-n // 4) * 4 for n in taps)
    return d, h, w


def filter_bytes(taps: Sizes, tile: Sizes, itemsize: int) -> int:
    """Shared memory that a tile of a filter takes; see filter in kernels.cu."""
    (kd, kh, kw), (td, th, tw) = fours(taps), tile
    box = (td + kd) * (th + kh) * (tw + kw + 1 + tw + 1) + td * th * tw
    box += (td + kd) * th * tw if kd else 0
    return (box + kd + kh + kw) * itemsize


def halo(taps: Sizes, tile: Sizes) -> float:
    """Samples that a tile reads, for each that it gives."""
    return math.prod((t + k) / t for t, k in zip(tile, fours(taps)))


def _tile(taps: Sizes, itemsize: int, shared: int) -> Sizes | None:
    shapes = BOXES if taps[0] else TILES
    fitting = [t for t in shapes if filter_bytes(taps, t, itemsize) <= shared]
    if not fitting:
        return None
    # Two blocks beside each other hide what one waits for, if halos do not grow too much.
    beside = [t for t in fitting if filter_bytes(taps, t, itemsize) <= shared // 2]
    if beside and halo(taps, beside[0]) < 2 * halo(taps, fitting[0]):
        return beside[0]
    return fitting[0]
