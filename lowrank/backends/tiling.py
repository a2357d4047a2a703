"""How large a tile is: from the caches, the shapes and the number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank._kernels.layout import Layout
from lowrank._kernels.spec import StageSpec, Three

SHARE = 0.5  # of the L2 cache for the two buffers of a thread; weights and output take the rest
PER_THREAD = 3  # tiles a thread, so that one that is late does not keep the others waiting
HALO = 1.25  # work with borders over work without, at the most, for the sake of more tiles


def tile(
    stages: Sequence[StageSpec], shape: Sequence[int], threads: int, itemsize: int, cache: int
) -> Three:
    """Size of the output tiles of a chain for inputs of `shape` = (channels, d, h, w).

    Rows are kept whole where there are several; the outermost axis that is longer than one is
    halved first, until the buffers fit the cache and there is work for all threads.
    """
    whole = Layout(stages, shape, None).out_shape[1:]
    size = list(whole)
    least = 64 if size[0] == size[1] == 1 else 1  # of a single row: pieces of some length
    order = [a for a in range(3) if size[a] > 1] or [2]
    while True:
        layout = Layout(stages, shape, size)
        fits = 2 * layout.workspace * itemsize <= SHARE * cache
        count = math.prod(-(-n // t) for n, t in zip(whole, size))
        enough = threads == 1 or count >= PER_THREAD * threads
        if fits and enough:
            break
        # The last axis is cut only when nothing else is left to cut.
        axis = next((a for a in order[:-1] or order if size[a] > least), order[-1])
        if size[axis] <= least:
            break
        smaller = list(size)
        smaller[axis] = -(-size[axis] // 2)
        if fits and _work(stages, shape, smaller) > HALO * _work(stages, shape, list(whole)):
            break
        size = smaller
    return size[0], size[1], size[2]


def _work(stages: Sequence[StageSpec], shape: Sequence[int], size: Sequence[int]) -> float:
    """Multiply-adds of a tile over its output samples: grows with what neighbours do twice."""
    layout = Layout(stages, shape, size)
    work, out = 0, layout.tile
    for spec, sizes in zip(reversed(stages), reversed(layout.stages)):
        rows, *rest = spec.weight.shape
        work += math.prod(out) * rows * math.prod(rest) * spec.left * spec.right
        a, b, c = (min(n, m) for n, m in zip(sizes.extent, sizes.size_in))
        out = (a, b, c)
    return work / math.prod(layout.tile)
