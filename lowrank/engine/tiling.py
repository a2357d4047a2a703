"""How a chain is cut for threads and caches: into tiles of the output, and parts of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank._kernels.layout import Layout
from lowrank._kernels.spec import StageSpec, Three

SHARE = 0.6  # of the L2 cache for the two buffers of a thread; weights and output take the rest
PER_THREAD = 3  # tiles a thread, so that one that is late does not keep the others waiting
HALO = 1.25  # work with borders over work without, at the most, for the sake of more tiles
MOST = 1.6  # the same where the threads would otherwise have to be called for every stage
ROWS = 8  # output channels that the micro-kernel does at a time
LOAD = 4  # multiply-adds that bringing one sample into a buffer is worth
WEIGHT = 4  # multiply-adds that a weight, which every tile reads anew, is worth
FEW = 4, 2  # samples at the end of a run that get no vector, and what each of them is worth
BEGIN = 0.4  # vectors that each run of up to three is worth beside them: factors are loaded anew
ROWS_CUT = 1.1  # price of work in parts of rows
DENSE, DEPTHWISE = 5e10, 2e10  # multiply-adds a second of one thread, roughly
SAMPLES = 4e9  # samples a second that one thread brings in or takes out, roughly
BAND = 4  # rows that a column of taps gives at a time
RUN = 8  # vectors of a row, at least, where rows are cut
VECTOR = 64  # bytes of the widest vector: what is left of a run at the end of a tile is idle


def tile(
    stages: Sequence[StageSpec],
    shape: Sequence[int],
    threads: int,
    itemsize: int,
    l1: int,
    l2: int,
    wake: float,
) -> Three:
    """Size of the output tiles of a chain for inputs of `shape` = (channels, d, h, w).

    An axis is halved at a time, that which adds the least work at borders, until the buffers fit
    the L2 cache (of `l2` bytes) and there is work for all threads, which take `wake` seconds to
    start.  A chain that reads its input where it lies goes on in bands of rows whose
    intermediates fit `l1`.
    """
    whole = Layout(stages, shape, None).out_shape[1:]
    lanes = VECTOR // itemsize
    rows_whole = any(s.fold is not None for s in stages)
    # What is read where it lies takes no buffer: only what follows has to fit the cache.
    in_place = _in_place(stages)
    streams = in_place and all(s.weight.shape[1] == 1 for s in stages[1:])
    least = (
        BAND if streams and stages[0].weight.shape[2] > 1 else 1,
        1,
        whole[2] if rows_whole else RUN * lanes,
    )
    size = list(whole)
    # A single stage is shared out by output channels, so that each thread reads its own weights.
    alone = len(stages) == 1 and _blocks(stages[0]) >= threads
    base = _work(stages, shape, whole, lanes)
    # Without a tile for each thread a chain runs stage by stage, and starts as many teams.
    teams = (len(stages) - 1) * wake * threads / seconds(stages, shape)
    dear = min(max(HALO, 1 + teams), MOST)
    while True:
        layout = Layout(stages, shape, size)
        held = _held(layout) if in_place else 2 * layout.workspace
        if len(stages) == 1 and stages[0].weight.shape[1] == 1:  # its channels go one by one
            held = layout.stages[0].channel
        fits = held * itemsize <= SHARE * l2
        count = math.prod(-(-n // t) for n, t in zip(whole, size))
        if fits and (alone or threads == 1 or count >= PER_THREAD * threads):
            break
        smaller = [
            [-(-n // 2) if a == axis else n for a, n in enumerate(size)]
            for axis in range(3)
            if size[axis] > least[axis]
        ]
        best = min(smaller, key=lambda s: _price(stages, shape, s, whole, lanes), default=None)
        most = base * (dear if count < threads else HALO)
        if best is None or (fits and _work(stages, shape, best, lanes) > most):
            break
        size = best
    if streams and size[0] == 1:
        while size[1] > BAND and _held(Layout(stages, shape, size)) * itemsize > SHARE * l1:
            size[1] = max(BAND, -(-size[1] // 2 // BAND) * BAND)
    return size[0], size[1], size[2]


def _in_place(stages: Sequence[StageSpec]) -> bool:
    """Whether the first of several stages reads rows of x where they lie."""
    first, *rest = stages
    plain = first.stride == (1, 1, 1) and first.source is None
    along = first.weight.shape[4] == 1 and first.before[2] == first.after[2] == 0
    return bool(rest) and plain and along


def _held(layout: Layout) -> int:
    """Elements of the buffers of all stages but the first."""
    return sum(sorted(s.buffer for s in layout.stages[1:])[-2:])


def seconds(stages: Sequence[StageSpec], shape: Sequence[int]) -> float:
    """A guess of the time of one example on one thread, good enough to tell small from large."""
    layout = Layout(stages, shape, None)
    total = (math.prod(shape) + math.prod(layout.out_shape)) / SAMPLES
    for spec, sizes in zip(stages, layout.stages):
        rows, *rest = spec.weight.shape
        done = spec.left * spec.right * rows * math.prod(sizes.size_out)
        rate = DENSE if rest[0] > 1 else DEPTHWISE
        total += done * math.prod(rest) / rate
    return total


def _price(
    stages: Sequence[StageSpec], shape: Sequence[int], size: Sequence[int], whole: Three, lanes: int
) -> float:
    """Work and weights over output samples; a little more where rows are not whole."""
    weights = WEIGHT * sum(math.prod(s.weight.shape) for s in stages) / _mean(whole, size)
    work = _work(stages, shape, size, lanes) + weights
    return float(work * (ROWS_CUT if size[2] < whole[2] else 1))


def parts(
    stages: Sequence[StageSpec], shape: Sequence[int], size: Sequence[int], threads: int
) -> int:
    """Parts of the output channels of a single stage, where tiles are too few for the threads."""
    if len(stages) > 1:
        return 1  # each part would do the stages before the last again
    tiles = math.prod(-(-n // t) for n, t in zip(Layout(stages, shape, size).out_shape[1:], size))
    each = PER_THREAD if stages[0].weight.shape[1] == 1 and threads > 1 else 1
    return max(1, min(_blocks(stages[0]), -(-each * threads // tiles)))


def _blocks(s: StageSpec) -> int:
    """Blocks of output channels that the micro-kernels do one after another."""
    return s.left * s.right * s.groups * -(-(len(s.weight) // s.groups) // ROWS)


def _work(
    stages: Sequence[StageSpec], shape: Sequence[int], size: Sequence[int], lanes: int
) -> float:
    """Multiply-adds and loads over output samples: what neighbours do twice, and idle lanes."""
    layout = Layout(stages, shape, size)
    work, out = 0.0, layout.tile
    for spec, sizes in zip(reversed(stages), reversed(layout.stages)):
        rows, *rest = spec.weight.shape
        samples = (out[1] - 1) * sizes.plane[2] + out[2]
        last = samples % lanes
        run: float = samples - last + (last * FEW[1] if last <= FEW[0] else lanes)
        run += -(-samples // (3 * lanes)) * BEGIN * lanes
        work += out[0] * run * rows * math.prod(rest) * spec.left * spec.right
        a, b, c = (min(n, m) for n, m in zip(sizes.extent, sizes.size_in))
        out = (a, b, c)
    loads = shape[0] * math.prod(layout.stages[0].extent)
    return (work + LOAD * loads) / _mean(layout.out_shape[1:], size)


def _mean(whole: Sequence[int], size: Sequence[int]) -> float:
    """Samples of a tile in the mean: the last ones of an axis are smaller."""
    return float(math.prod(n / -(-n // t) for n, t in zip(whole, size)))
