"""Counts of what kernels do for one example, and the default cost of each.

The engine chooses by counts times default costs: a fast algorithm or direct sums, and a program
or planes.  The performance model counts the same and fits the costs of a machine.  Weights are
not read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from lowrank._kernels import _core
from lowrank._kernels.spec import StageSpec

Counts = dict[str, float]

#: Default costs in FMAs of a vector.  Those of programs were measured one by one on a Zen 5 core
#: with AVX-512; those of planes are a fit of `lowrank calibrate` there, over the cost of a product.
DEFAULT_COSTS = {
    # Programs on channels-last buffers.
    "product": 1.0,  # issue slots of direct sums
    "fast product": 1.0,  # issue slots of fast algorithms
    "load": 0.3,  # vectors of weights that come from L2 for a block of pixels
    "few output term": 1.2,  # FMAs of kernels for few outputs
    "lane sum": 12.0,  # outputs of them, whose lanes are added up
    "transform": 4.0,  # vectors through one axis of a transform
    "tap": 1.2,  # FMAs of a depthwise kernel whose inputs stay in registers
    "loaded tap": 2.0,  # FMAs of the others
    "output": 4.0,  # vectors of depthwise outputs
    "move": 8.0,  # vectors packed, unpacked, copied or pooled
    "weight": 1.0,  # vectors of weights, which each image or group of images reads again
    # Planes.
    "plane product": 1.0,
    "plane load": 0.5,  # vectors of inputs loaded for a block of output channels
    "plane run": 20.0,  # up to three vectors at a time
    "plane weight": 4.0,
    "row product": 0.9,  # FMAs of depthwise rows
    "row load": 1.0,  # vectors of inputs loaded by them; many cross cache lines
    "row": 60.0,  # up to four at a time
    "pack": 12.0,
    "scatter": 12.0,  # vectors stored into padded rows of the next stage
    "stage tile": 150.0,
}
COST_SECONDS = 1.4e-10  # an FMA of a vector on that core, in seconds
# A block with fewer sums waits for their latency: 4 cycles, 2 FMAs per cycle.
LATENCY_SLOTS = 8
L1_WEIGHTS = 0.5  # of the L1 cache for weights that blocks of pixels find there


def default_cost(counts: Counts) -> float:
    """Return the cost of counts, in FMAs of a vector."""
    return sum(DEFAULT_COSTS[name] * count for name, count in counts.items())


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Return the sum of counts."""
    total: Counts = defaultdict(float)
    for counts in parts:
        for name, count in counts.items():
            total[name] += count
    return dict(total)


def output_blocks(outs: int, limits: _core.BlockLimits) -> Iterator[tuple[int, int]]:
    """Yield the first output and the vectors of the blocks of a group's outputs."""
    lanes, most = limits.lanes, limits.vectors
    for first in range(0, outs, most * lanes):
        yield first, min(most, -(-(outs - first) // lanes))


def product_counts(
    spec: StageSpec, rows: float, pixels: int, terms: int, itemsize: int, limits: _core.BlockLimits
) -> tuple[float, float]:
    """Return the issue slots and the loads from L2 of sums over `terms` for rows of pixels.

    A slot issues an FMA or a load; the micro-kernel loads a weight per vector and an input per
    pixel.
    """
    l1, _, _ = _core.caches()
    slots = loads = 0.0
    for _, vectors in output_blocks(len(spec.weight) // spec.groups, limits):
        most = limits.pixels[vectors - 1]
        count = -(-pixels // most)
        short, longer = divmod(pixels, count)
        for n, blocks in ((short, count - longer), (short + 1, longer)):
            slots += blocks * max(n * vectors, n + vectors, LATENCY_SLOTS)
        is_streamed = terms * vectors * limits.lanes * itemsize > L1_WEIGHTS * l1
        loads += count * vectors * is_streamed
    groups = spec.outer * spec.groups * spec.inner
    return groups * rows * terms * slots, groups * rows * terms * loads


def weight_vectors(size: int, lanes: int) -> float:
    """Return the vectors that hold weights."""
    return math.ceil(size / lanes)
