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

#: Default costs in FMAs of a vector: rounded from fits of `lowrank calibrate` on a Zen 4 core with
#: AVX-512; "load", "weight", "row", "strided", "few output term" and "lane sum" were set by hand
#: until choices agreed with measured times, since the fit counts traffic from beyond L2 by lines.
DEFAULT_COSTS = {
    # Programs on channels-last buffers.
    "product": 1.0,  # issue slots of direct sums
    "fast product": 1.0,  # issue slots of fast algorithms
    "block": 120.0,  # calls of the micro-kernel, which begin and end with loads and stores of sums
    "load": 0.3,  # vectors of weights that come from L2 for a block of pixels
    "few output term": 1.2,  # FMAs of kernels for few outputs
    "lane sum": 12.0,  # outputs of them, whose lanes are added up
    "transform": 3.0,  # vectors through one axis of a transform
    "tap": 1.1,  # FMAs of a depthwise kernel whose inputs stay in registers
    "loaded tap": 1.8,  # FMAs of the others
    "output": 6.0,  # vectors of depthwise outputs
    "move": 7.0,  # vectors packed, unpacked, copied or pooled
    "weight": 4.0,  # vectors of weights that come from beyond L2
    "step": 500.0,
    # Planes.
    "plane product": 0.9,
    "plane load": 1.0,  # vectors of inputs loaded for a block of output channels
    "plane run": 60.0,  # up to three vectors at a time
    "plane weight": 10.0,
    "row product": 0.9,  # FMAs of depthwise rows
    "row load": 0.6,  # vectors of inputs loaded by them; many cross cache lines
    "row": 120.0,  # four at a time
    "pack": 6.0,
    "scatter": 6.0,  # vectors stored into padded rows of the next stage
    "stage tile": 800.0,
    "strided": 14.0,  # vectors of inputs that are split into one row per phase of a stride
}
COST_SECONDS = 1.4e-10  # an FMA of a vector on that core, in seconds, from its FMA peak
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
    """Yield the first output and the vectors of the blocks of a group's outputs, nearly equal."""
    vectors = -(-outs // limits.lanes)
    count, first = -(-vectors // limits.vectors), 0
    for i in range(count):
        width = vectors // count + (i < vectors % count)
        yield first, width
        first += width * limits.lanes


def product_counts(
    name: str,
    spec: StageSpec,
    rows: float,
    pixels: int,
    terms: int,
    itemsize: int,
    limits: _core.BlockLimits,
) -> Counts:
    """Count sums over `terms` for rows of pixels; `name` is that of their issue slots.

    A slot issues an FMA or a load; the micro-kernel loads a weight per vector and an input per
    pixel.
    """
    l1, _, _ = _core.caches()
    slots = loads = calls = 0.0
    for _, vectors in output_blocks(len(spec.weight) // spec.groups, limits):
        most = limits.pixels[vectors - 1]
        count = -(-pixels // most)
        short, longer = divmod(pixels, count)
        for n, blocks in ((short, count - longer), (short + 1, longer)):
            slots += blocks * max(n * vectors, n + vectors, LATENCY_SLOTS)
        is_streamed = terms * vectors * limits.lanes * itemsize > L1_WEIGHTS * l1
        loads += count * vectors * is_streamed
        calls += count
    runs = spec.outer * spec.groups * spec.inner * rows
    return {name: runs * terms * slots, "load": runs * terms * loads, "block": runs * calls}


def weight_vectors(spec: StageSpec, size: int, lanes: int) -> float:
    """Return the vectors of `size` weights that copies of a stage read."""
    return spec.outer * spec.inner * math.ceil(size / lanes)
