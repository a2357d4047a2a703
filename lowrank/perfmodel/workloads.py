"""Calibration workloads: layers, chains and filters of many sizes.

Their sizes differ from those of common benchmarks and networks, so that these remain test data for
a model that was fitted to the workloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lowrank._typing import Ints
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage, abstract_weight
from lowrank.engine import fourier

StageShape = tuple[int, int | tuple[int, ...], bool, int]  # outputs, taps, depthwise, stride


class Workload(NamedTuple):
    """A chain of abstract weights, its input size and batch."""

    stages: tuple[Stage, ...]
    shape: Ints
    batch: int


def _chain(
    channels: int, size: int | Ints, *shapes: StageShape, batch: int = 1, ndim: int = 2
) -> Workload:
    """Return a chain whose stages keep the size of their input, except for strides."""
    stages, in_channels = [], channels
    for out, taps, depthwise, stride in shapes:
        kernel = (taps,) * ndim if isinstance(taps, int) else taps
        groups = in_channels if depthwise else 1
        geometry = Geometry.of(ndim, stride, [k // 2 for k in kernel])
        stages.append(
            Stage(abstract_weight((out, in_channels // groups, *kernel)), geometry, groups)
        )
        in_channels = out
    spatial = (size,) * ndim if isinstance(size, int) else size
    return Workload(tuple(stages), (channels, *spatial), batch)


class FFTWorkload(NamedTuple):
    """A filter by transforms: its taps, image size and block size."""

    taps: Ints
    spatial: Ints
    block: Ints


def fft_workloads() -> Iterator[FFTWorkload]:
    """Yield filters by transforms, in blocks of several sizes."""
    cases: list[tuple[Ints, Ints]] = [
        ((9, 9), (300, 300)), ((21, 21), (600, 500)), ((15, 15), (1100, 1300)),
        ((41, 41), (700, 900)), ((65, 65), (1500, 1200)), ((31, 31), (2300, 2000)),
        ((7, 7, 7), (70, 80, 90)), ((15, 15, 15), (120, 100, 110)),
        ((301,), (50_000,)), ((1001,), (700_000,)),
    ]  # fmt: skip
    for taps, spatial in cases:
        for block in fourier.blocks(taps, spatial)[::2]:
            if max(block) <= 8 * min(block):
                yield FFTWorkload(taps, spatial, block)


def workloads() -> Iterator[Workload]:
    """Yield layers, chains and filters of many sizes."""
    yield from _layers()
    yield from _chains()
    yield from _filters()
    yield from _ranks()


def _layers() -> Iterator[Workload]:
    dense = [
        (3, 32, 3, 112, 2, 1), (16, 16, 3, 40, 1, 1), (16, 48, 1, 72, 1, 1), (24, 96, 1, 44, 1, 1),
        (32, 32, 3, 72, 1, 1), (48, 48, 3, 40, 1, 1), (48, 96, 3, 40, 2, 1), (80, 80, 3, 34, 1, 1),
        (96, 96, 3, 20, 1, 1), (96, 96, 5, 20, 1, 1), (160, 160, 3, 24, 1, 1),
        (192, 192, 3, 12, 1, 1), (192, 192, 3, 12, 1, 8), (320, 320, 3, 10, 1, 1),
        (384, 384, 3, 6, 1, 1), (384, 384, 3, 6, 1, 8), (96, 192, 1, 20, 1, 1),
        (192, 96, 1, 20, 1, 1), (384, 384, 1, 10, 1, 1), (384, 768, 1, 6, 1, 1),
        (768, 384, 1, 6, 1, 8), (48, 12, 1, 48, 1, 1), (12, 48, 1, 48, 1, 1), (96, 24, 1, 24, 1, 4),
        (320, 80, 1, 12, 1, 1), (80, 320, 1, 12, 1, 1), (48, 48, 3, 40, 1, 8),
        (24, 24, 7, 30, 1, 1), (20, 20, 3, 60, 1, 1), (128, 256, 3, 20, 2, 1),
        (640, 640, 1, 8, 1, 8), (8, 8, 3, 100, 1, 1),
        (40, 3, 9, 60, 1, 1), (40, 40, 7, 40, 1, 1), (72, 72, 5, 14, 1, 8), (72, 72, 3, 14, 1, 8),
        (24, 24, 3, 28, 1, 8), (144, 72, 3, 28, 2, 8),
    ]  # fmt: skip
    for c, out, taps, size, stride, batch in dense:
        yield _chain(c, size, (out, taps, False, stride), batch=batch)
    for c, out, taps, size, batch in [
        (32, 32, 9, 3000, 1),
        (96, 96, 5, 500, 1),
        (64, 128, 3, 250, 4),
    ]:
        yield _chain(c, size, (out, taps, False, 1), batch=batch, ndim=1)
    for c, taps, volume in [(16, 3, (12, 20, 20)), (24, 3, (8, 14, 14)), (48, 3, (6, 10, 10))]:
        yield _chain(c, volume, (c, taps, False, 1), ndim=3)
    depthwise: list[tuple[int, Any, int, int, int]] = [
        (24, 3, 100, 1, 1), (24, 3, 100, 2, 1), (48, 5, 64, 1, 1), (96, 3, 48, 1, 1),
        (96, 3, 48, 2, 1), (96, 5, 40, 2, 1), (192, 3, 24, 1, 1), (192, 5, 24, 1, 1),
        (192, 3, 24, 2, 1), (384, 3, 12, 1, 1), (384, 5, 12, 1, 1), (384, 3, 12, 2, 1),
        (768, 3, 6, 1, 1), (768, 5, 6, 1, 1), (384, 3, 12, 1, 8), (96, 7, 30, 1, 1),
        (96, (3, 1), 48, 1, 1), (96, (1, 3), 48, 1, 1), (192, (5, 1), 20, 1, 1),
        (192, (1, 5), 20, 1, 1), (48, 3, 64, 1, 8),
    ]  # fmt: skip
    for c, taps, size, stride, batch in depthwise:
        yield _chain(c, size, (c, taps, True, stride), batch=batch)
    for c, taps, size in [(48, 9, 3000), (200, 9, 800), (10, 15, 60000), (96, 3, 2000)]:
        yield _chain(c, size, (c, taps, True, 1), ndim=1)
    for c, taps, volume in [(16, 3, (12, 20, 20)), (32, 5, (10, 16, 16))]:
        yield _chain(c, volume, (c, taps, True, 1), ndim=3)


def _chains() -> Iterator[Workload]:
    blocks = [
        (24, 48, 100, 1, 1), (48, 96, 64, 2, 1), (96, 96, 48, 1, 1), (160, 320, 24, 2, 1),
        (320, 320, 16, 1, 1), (384, 384, 12, 1, 8), (640, 640, 8, 1, 1), (640, 640, 8, 1, 8),
        (192, 192, 24, 1, 8),
    ]  # fmt: skip
    for c, out, size, stride, n in blocks:
        yield _chain(c, size, (c, 3, True, stride), (out, 1, False, 1), batch=n)
        if stride == 1:
            yield _chain(c, size, (out, 1, False, 1), (out, 3, True, 1), batch=n)
    for c, middle, size, taps, out in [(40, 72, 60, 9, 3), (72, 72, 50, 3, 1), (40, 40, 44, 5, 2),
                                       (72, 40, 90, 1, 3)]:  # fmt: skip
        yield _chain(c, size, (middle, 3, False, 1), (out, taps, False, 1))
    layers = [
        (48, 48, 3, 1), (48, 48, 3, 8), (96, 24, 3, 1), (96, 24, 3, 8), (192, 12, 3, 1),
        (192, 12, 3, 8), (384, 8, 3, 1), (384, 8, 3, 8), (80, 32, 5, 1), (160, 20, 3, 1),
        (320, 10, 5, 1),
    ]  # fmt: skip
    for c, size, k, n in layers:
        quarter, half = c // 4, c // 2
        down, across = (k, 1), (1, k)
        reduce: StageShape = (quarter, 1, False, 1)
        expand: StageShape = (c, 1, False, 1)
        for chain in (
            [reduce, (quarter, k, False, 1), expand],
            [expand, (c, down, True, 1), (c, across, True, 1), expand],
            [(half, 1, False, 1), (half, k, True, 1), expand],
            [(half, down, False, 1), (c, across, False, 1)],
            [(quarter, k, False, 1), expand],
            [reduce, (c, k, False, 1)],
        ):
            yield _chain(c, size, *chain, batch=n)
        if n == 1:
            yield _chain(c, size, (2 * c, k, True, 1), expand)
            yield _chain(
                c, size, reduce, (half, down, False, 1), (quarter, across, False, 1), expand
            )
            yield _chain(c, size, (2 * c, down, True, 1), (2 * c, across, True, 1), expand)
            yield from _kronecker(c, size, k)


def _kronecker(c: int, size: int, k: int) -> Iterator[Workload]:
    """Yield Kronecker products: small weights, replicated over channels."""
    unpadded, padded = Geometry.of(2), Geometry.of(2, padding=k // 2)
    down, across = Geometry.of(2, padding=(k // 2, 0)), Geometry.of(2, padding=(0, k // 2))
    shape = c, size, size
    for b, rank in ((2, 4), (8, 4), (16, 2)):
        a = c // b
        small, large = abstract_weight((rank * b, b, 1, 1)), abstract_weight((a, a * rank, k, k))
        yield Workload((Stage(small, unpadded, outer=a), Stage(large, padded, inner=b)), shape, 1)
        yield Workload((Stage(small, unpadded, inner=a), Stage(large, padded, outer=b)), shape, 1)
        first = Stage(abstract_weight((rank * b, b, 1, k)), across, outer=a)
        second = Stage(abstract_weight((a, a * rank, k, 1)), down, inner=b)
        yield Workload((first, second), shape, 1)


def _filters() -> Iterator[Workload]:
    lines = [(3, 700), (5, 1500), (7, 400), (11, 1000), (15, 700), (21, 1500), (31, 400), (41, 900),
             (63, 1000), (9, 2600), (3, 3000)]  # fmt: skip
    for k, size in lines:
        for rank in (1, 2, 4, 8) if size <= 1000 else (1, 3):
            yield _chain(1, size, (rank, (k, 1), True, 1), (1, (1, k), False, 1))
    for k, size in [(3, 700), (5, 1500), (7, 400), (9, 1000), (11, 700), (15, 1000), (21, 500),
                    (31, 300), (3, 3000)]:  # fmt: skip
        yield _chain(1, size, (1, k, False, 1))
    for k, size in [(3, 100), (7, 140), (11, 100), (5, 200), (21, 100)]:
        axes: list[StageShape] = [
            (1, tuple(k if b == a else 1 for b in range(3)), False, 1) for a in range(3)
        ]
        yield _chain(1, size, *axes, ndim=3)
    for k, size in [(3, 100), (5, 100), (7, 80)]:
        yield _chain(1, size, (1, k, False, 1), ndim=3)
    for k, size in [(9, 10_000), (101, 100_000), (31, 1_000_000)]:
        yield _chain(1, size, (1, k, False, 1), ndim=1)


def _ranks() -> Iterator[Workload]:
    """Yield chains whose ranks are no multiples of a vector, which fitted ranks rarely are."""
    for c, rank, size, stride in [(48, 10, 26, 1), (48, 18, 26, 1), (96, 14, 18, 1),
                                  (96, 22, 18, 2), (192, 6, 10, 1), (192, 50, 10, 1),
                                  (40, 26, 36, 1), (20, 9, 34, 1)]:  # fmt: skip
        narrow: StageShape = (rank, 1, False, 1)
        yield _chain(c, size, (rank, (3, 1), False, 1), (c, (1, 3), False, stride))
        yield _chain(c, size, (rank, 3, False, stride), (c, 1, False, 1))
        yield _chain(c, size, narrow, (c, 3, False, stride))
        yield _chain(c, size, narrow, (rank, 3, True, stride), (c, 1, False, 1))
