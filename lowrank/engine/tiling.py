"""Tiles of a chain's output, and splits of its output channels, for caches and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank._kernels import _core
from lowrank._kernels.layout import TileLayout
from lowrank._kernels.spec import PlaneLimits, StageSpec, Three

L2_SHARE = 0.6  # of the cache for a thread's two buffers; weights and output take the rest
TASKS_PER_THREAD = 3  # so that one late thread does not keep the others waiting
MAX_HALO = 1.25  # work with halos over work without, at the most, to get more tiles
MAX_HALO_FEW_TASKS = 1.6  # the same while there are fewer tiles than threads
MIN_ROWS = 4  # of a tile whose taps go down columns: a depthwise kernel makes 4 rows at a time
MIN_ROW_VECTORS = 8  # of a row that is cut
# Costs in MACs, fitted to measurements:
PACK_COST = 4  # per sample packed into a buffer
WEIGHT_COST = 4  # per weight, which every tile reads again
REMAINDER_COST = 2  # per sample in lanes: remainder samples get no vector
RUN_COST = 0.4  # per run of up to three vectors, in vectors: weights are loaded again
CUT_ROW_FACTOR = 1.1  # on the work of tiles with cut rows
# Rough throughputs of one thread:
DENSE_MACS, DEPTHWISE_MACS = 5e10, 2e10  # MACs per second
SAMPLES = 4e9  # samples per second, packed or stored


class Layouts:
    """Layouts of a chain for inputs of `shape` = (channels, d, h, w), each computed once.

    `dtype` is the name of the plan's type; `limits` are those of the kernels that run it.
    """

    def __init__(self, stages: Sequence[StageSpec], shape: Sequence[int], dtype: str) -> None:
        self.stages, self.shape, self.dtype = stages, shape, dtype
        self.limits = _core.plane_limits(dtype)
        self._known: dict[tuple[int, ...] | None, TileLayout] = {}

    def __call__(self, tile: Sequence[int] | None) -> TileLayout:
        """Return the layout for one tile of the output; None: for the whole output."""
        key = None if tile is None else tuple(tile)
        if key not in self._known:
            self._known[key] = TileLayout(self.stages, self.shape, tile, self.limits)
            self._known.setdefault(self._known[key].tile, self._known[key])
        return self._known[key]


def choose_tile(
    layouts: Layouts,
    threads: int,
    l1: int,
    l2: int,
    latency: float,
) -> Three:
    """Choose the output tile of a chain.

    One axis is halved at a time, the one that adds the least halo work, until the buffers fit the
    L2 cache (`l2` bytes) and every thread has work; `latency` is the fork/join latency in
    seconds.  Chains that read their input in place are also cut into row tiles whose
    intermediates fit `l1`.
    """
    stages, whole = layouts.stages, layouts(None).tile
    limits, itemsize = layouts.limits, np.dtype(layouts.dtype).itemsize
    needs_whole_rows = any(s.padded_columns is not None for s in stages)
    # An input read in place takes no buffer: only the later stages have to fit the cache.
    (path, *later) = _core.stage_paths(stages, layouts.shape, dtype=layouts.dtype)
    in_place = bool(later) and path.keeps_rows
    by_rows = in_place and all(s.weight.shape[1] == 1 for s in stages[1:])
    least = (
        MIN_ROWS if by_rows and stages[0].weight.shape[2] > 1 else 1,
        1,
        whole[2] if needs_whole_rows else MIN_ROW_VECTORS * limits.lanes,
    )
    size = list(whole)
    # A single stage is split by output channels, so that each thread reads its own weights.
    splits_channels = len(stages) == 1 and _channel_blocks(stages[0], limits) >= threads
    untiled_work = _work(layouts, whole)
    # With fewer tiles than threads the chain would run stage by stage: one fork/join per stage.
    saved = (len(stages) - 1) * latency * threads / estimate_seconds(layouts)
    max_halo_few_tasks = min(max(MAX_HALO, 1 + saved), MAX_HALO_FEW_TASKS)
    while True:
        layout = layouts(size)
        elements = _later_buffers(layout) if in_place else 2 * layout.workspace
        if len(stages) == 1 and stages[0].weight.shape[1] == 1:  # channels run one by one
            elements = layout.stages[0].channel
        fits = elements * itemsize <= L2_SHARE * l2
        count = math.prod(-(-n // t) for n, t in zip(whole, size))
        if fits and (splits_channels or threads == 1 or count >= TASKS_PER_THREAD * threads):
            break
        halved = [
            [-(-n // 2) if a == axis else n for a, n in enumerate(size)]
            for axis in range(3)
            if size[axis] > least[axis]
        ]
        best = min(halved, key=lambda s: _price(layouts, s), default=None)
        max_work = untiled_work * (max_halo_few_tasks if count < threads else MAX_HALO)
        if best is None or (fits and _work(layouts, best) > max_work):
            break
        size = best
    if by_rows and size[0] == 1:
        while size[1] > MIN_ROWS:
            elements = _later_buffers(layouts(size))
            if elements * itemsize <= L2_SHARE * l1:
                break
            size[1] = max(MIN_ROWS, -(-size[1] // 2 // MIN_ROWS) * MIN_ROWS)
    return size[0], size[1], size[2]


def _later_buffers(layout: TileLayout) -> int:
    """Return the elements of the two largest buffers of all stages but the first."""
    return sum(sorted(s.buffer for s in layout.stages[1:])[-2:])


def estimate_seconds(layouts: Layouts) -> float:
    """Estimate the time of one example on one thread, well enough to tell small from large."""
    layout = layouts(None)
    total = (math.prod(layouts.shape) + math.prod(layout.out_shape)) / SAMPLES
    for spec, sizes in zip(layouts.stages, layout.stages):
        rows, *rest = spec.weight.shape
        outputs = spec.outer * spec.inner * rows * math.prod(sizes.size_out)
        throughput = DENSE_MACS if rest[0] > 1 else DEPTHWISE_MACS
        total += outputs * math.prod(rest) / throughput
    return total


def _price(layouts: Layouts, size: Sequence[int]) -> float:
    """Return the work and weight reads per output sample; a little more for cut rows."""
    whole = layouts(None).tile
    weights = WEIGHT_COST * sum(math.prod(s.weight.shape) for s in layouts.stages)
    weights /= _mean_samples(whole, size)
    work = _work(layouts, size) + weights
    return float(work * (CUT_ROW_FACTOR if size[2] < whole[2] else 1))


def channel_splits(layouts: Layouts, size: Sequence[int], threads: int) -> int:
    """Choose the output-channel splits of a single stage with too few tiles for the threads."""
    stages, whole = layouts.stages, layouts(None).tile
    if len(stages) > 1:
        return 1  # each split would repeat the stages before the last
    tiles = math.prod(-(-n // t) for n, t in zip(whole, size))
    per_thread = TASKS_PER_THREAD if stages[0].weight.shape[1] == 1 and threads > 1 else 1
    blocks = _channel_blocks(stages[0], layouts.limits)
    return max(1, min(blocks, -(-per_thread * threads // tiles)))


def _channel_blocks(s: StageSpec, limits: PlaneLimits) -> int:
    """Return the blocks of output channels that the micro-kernels process one by one."""
    return s.outer * s.inner * s.groups * -(-(len(s.weight) // s.groups) // limits.block_rows)


def _work(layouts: Layouts, size: Sequence[int]) -> float:
    """Return the MACs and loads per output sample, including halos and idle lanes."""
    layout, lanes = layouts(size), layouts.limits.lanes
    work, out = 0.0, layout.tile
    for spec, sizes in zip(reversed(layouts.stages), reversed(layout.stages)):
        rows, *rest = spec.weight.shape
        samples = (out[1] - 1) * sizes.plane[2] + out[2]
        remainder = samples % lanes
        run: float = samples - remainder
        run += remainder * REMAINDER_COST if remainder <= layouts.limits.max_remainder else lanes
        run += -(-samples // (3 * lanes)) * RUN_COST * lanes
        work += out[0] * run * rows * math.prod(rest) * spec.outer * spec.inner
        a, b, c = (min(n, m) for n, m in zip(sizes.extent, sizes.size_in))
        out = (a, b, c)
    loads = layouts.shape[0] * math.prod(layout.stages[0].extent)
    return (work + PACK_COST * loads) / _mean_samples(layouts(None).tile, size)


def _mean_samples(whole: Sequence[int], size: Sequence[int]) -> float:
    """Return the mean samples per tile: the last ones along an axis are smaller."""
    return float(math.prod(n / -(-n // t) for n, t in zip(whole, size)))
