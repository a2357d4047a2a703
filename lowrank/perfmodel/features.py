"""What a run does, in counts that a machine has a rate for: vectors, samples, bytes, calls.

Counts follow the plan that the engine would make, tiles and all; weights are not touched, so
chains of blank stages can be counted.  They are meant to be few and to have a cause each: a
machine's rates are fitted to them, and a count that nothing on the machine does is noise.

One count is seconds itself: ``"wake"``, what this process takes to wake a team.  It is measured and
not fitted, since it differs fiftyfold between processes whose idle threads sleep and spin.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lowrank._kernels import _core
from lowrank._kernels.layout import output_size
from lowrank._kernels.spec import StageSpec
from lowrank._typing import Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier
from lowrank.engine.cuda import steps
from lowrank.engine.lowering import Part, lowered

Counts = dict[str, float]

LANES = 64  # bytes of a vector
ROWS = 8  # output channels that the micro-kernel does at a time, of runs of three vectors
FEW = 4  # samples at the end of a run that need no vector
PUTS = 32  # taps that take as long as putting what a row gave to its places
TAPS = 1024  # of one channel, at the most, that go by rows
SHORT = 256  # samples of a plane that goes by vectors of channels
LINE = 64  # bytes
THIN = 8  # input channels, below which PyTorch has another way
WAKES = (
    2.6  # of a team for one of PyTorch's convolutions: measured with threads asleep and spinning
)
LONG = 512  # points of a transform along any axis but the last


class Work(NamedTuple):
    """A chain on an input: what there is to count.

    Attributes
    ----------
    stages : sequence of Stage
        With weights, or blank.
    shape : tuple of int
        (channels, \\*spatial).
    batch, threads, itemsize, interleaved : int
        Examples, threads asked for, bytes of a number, numbers side by side in a sample.
    """

    stages: Sequence[Stage]
    shape: Ints
    batch: int = 1
    threads: int = 1
    itemsize: int = 4
    interleaved: int = 1


def runtime(work: Work, most: int) -> Counts:
    """Counts of our own engine, on a machine whose rates are known for 1 and for `most` threads."""
    links = [(stage, Epilogue()) for stage in work.stages]
    dtype = f"f{work.itemsize}"
    total: dict[str, float] = defaultdict(float)
    for part in lowered(links, work.shape, dtype, work.threads, work.interleaved, work.batch):
        images = 1 if part.batched else work.batch
        jobs = part.jobs * images
        saved = part.seconds * images * (work.threads - 1) / work.threads
        team = jobs > 1 and work.threads > 1 and saved >= _core.wake(work.threads)
        threads = min(work.threads, jobs) if team else 1
        # The last ones to finish keep the others waiting.
        share = jobs / math.ceil(jobs / threads)
        for name, count in _part(part, images, work.itemsize).items():
            total[name] += count / share
        moved = images * (math.prod(part.shape) + math.prod(part.out_shape)) * work.itemsize
        kept = sum(s.weight.size for s in part.specs) * work.itemsize
        for name, count in _moved(moved, moved + kept, threads, most).items():
            total[name] += count
        total["call"] += 1
        total["team"] += team
        total["wake"] += team * _core.wake(work.threads)
    return total


def _moved(moved: float, held: float, threads: int, most: int) -> Counts:
    """Lines read and written by the caches that they come from, where `held` bytes are in use.

    A level begins to be missed once it is full: a smooth step in place of a cliff.
    """
    l1, l2, l3 = _core.caches()
    # More threads than were measured move no more than those did.
    many = min(1.0, (threads - 1) / (most - 1)) if most > 1 else 0.0
    found = {"L2": moved * _beyond(held, l1) / threads}
    for name, size in (("L3", l2), ("memory", l3 / 2)):
        far = moved * _beyond(held, size)
        found |= {name: far * (1 - many), f"{name}, all threads": far * many}
    return {name: count / LINE for name, count in found.items()}


def _beyond(held: float, size: float) -> float:
    return max(0.0, 1 - size / held) if held else 0.0


def _part(part: Part, images: int, itemsize: int) -> Counts:
    """Counts of the stages of a part, over all tiles and images."""
    lanes = LANES // itemsize
    counts = [-(-n // t) for n, t in zip(part.out_shape[1:], part.tile)]
    tiles = math.prod(counts) * images
    out: tuple[float, ...] = tuple(n / c for n, c in zip(part.out_shape[1:], counts))
    total: dict[str, float] = defaultdict(float)
    a, b, c = part.shape[1:]
    sizes = [(a, b, c)]  # of the input of each stage
    for spec in part.specs:
        sizes.append(output_size(spec, sizes[-1]))
    for k in reversed(range(len(part.specs))):
        spec, whole = part.specs[k], sizes[k]
        extent = tuple(
            (n - 1) * s + d * (t - 1) + 1
            for n, s, d, t in zip(out, spec.stride, spec.dilation, spec.weight.shape[2:])
        )
        inside = tuple(min(n, m) for n, m in zip(extent, whole))
        first, last = k == 0, k == len(part.specs) - 1
        for name, count in _stage(spec, out, extent, inside, first, last, lanes).items():
            total[name] += tiles * count
        total["step"] += tiles
        out = inside
    return total


def _stage(
    spec: StageSpec,
    out: Sequence[float],
    extent: Sequence[float],
    inside: Sequence[float],
    first: bool,
    last: bool,
    lanes: int,
) -> Counts:
    """Counts of one stage on one tile: `out` samples of each axis from `extent` of its input."""
    rows, per, *taps = spec.weight.shape
    rows //= spec.groups
    inputs = spec.left * spec.groups * spec.right
    depth, height, width = out
    given = inputs * rows * depth * height * width
    taken = inputs * per * math.prod(inside)
    strided = max(spec.stride) > 1
    # Rows without a border are read where they lie, if taps do not cross them.
    in_place = first and not strided and spec.before[2] == spec.after[2] == 0 and taps[2] == 1
    if per > 1 or math.prod(taps) > TAPS:
        lines = _lines(spec, out, extent, lanes)
        return _dense(spec, out, extent, lanes, lines) | {
            "bring strided" if strided else "bring": first * (not in_place) * taken / lanes,
            "put": (not lines) * (not last) * given / lanes,
            "put out": (not lines) * last * given / lanes,
        }
    short = first and rows == 1 and inputs >= lanes and height * width <= SHORT
    if short:
        vectors = inputs / lanes * depth * height * width
        return {"lane": vectors * math.prod(taps), "lane sample": (given + taken) / lanes}
    return _depthwise(spec, out, lanes) | {
        "bring strided" if strided else "bring rows": first * (not in_place) * taken / lanes,
        "put rows": (not last) * given / lanes,
    }


def _lines(spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int) -> bool:
    """Whether the engine goes row by row, straight to its place: the rule of chain.inc."""
    terms, width = math.prod(spec.weight.shape[1:]), out[2]
    vectors, pitch = math.ceil(width / lanes), math.ceil(extent[2] / spec.stride[2])
    enough = min(spec.weight.shape[0] // spec.groups, ROWS) * min(vectors, 3) >= ROWS
    held = vectors * lanes * terms <= pitch * terms + PUTS * lanes
    return width >= lanes and pitch > width and enough and held


def _dense(
    spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int, lines: bool
) -> Counts:
    """Runs over rows, or over planes, whose rows go on into one another."""
    rows = spec.weight.shape[0] // spec.groups
    terms = math.prod(spec.weight.shape[1:])
    inputs = spec.left * spec.groups * spec.right
    depth, height, width = out
    length = (height - 1) * math.ceil(extent[2] / spec.stride[2]) + width
    planes, each = depth, max(1, math.ceil((length - FEW) / lanes))
    if lines:
        planes, each = depth * height, math.ceil(width / lanes)
    blocks = inputs * math.ceil(rows / ROWS)
    return {
        "multiply": inputs * rows * terms * planes * each,
        "load": blocks * terms * planes * each,
        "run": blocks * planes * math.ceil(each / 3),
        "weight": blocks * ROWS * terms / lanes,
    }


def _depthwise(spec: StageSpec, out: Sequence[float], lanes: int) -> Counts:
    """Rows of one channel, four at a time where their taps overlap."""
    rows = spec.weight.shape[0] // spec.groups
    d, h, w = spec.weight.shape[2:]
    planes = spec.left * spec.groups * spec.right * rows
    depth, height, width = out
    # A row shorter than a vector goes by half and quarter ones.
    narrow = lanes if width >= lanes else lanes / 2 if width >= lanes / 2 else lanes / 4
    vectors = planes * depth * height * math.ceil(width / narrow)
    close = spec.stride[1] == 1 and spec.dilation[1] == 1
    loads = vectors * d * w * ((h + 3) / 4 if close else h)
    return {
        "row multiply": vectors * d * h * w,
        "box multiply": vectors * d * h * w if w > 1 and d * h > 1 else 0,
        "across": loads if w > 1 else 0,  # loads that cross the ends of cache lines
        "along": loads if w == 1 else 0,
        "row": planes * depth * height * (0.25 if close else 1),
        "plane": planes,
    }


def cuda(work: Work, most: int) -> Counts:
    """Counts of a GPU: launches, bytes through its memory, and multiply-adds by what does them."""
    del most  # a GPU has as many threads as it has
    total: dict[str, float] = defaultdict(float)
    for step in steps.cut(work.stages, work.shape, max(4, work.itemsize)):
        stages = work.stages[step.first : step.first + step.many]
        given = work.batch * math.prod(step.out)
        each = [math.prod(s.weight.shape[1:]) for s in stages]
        moved = work.batch * math.prod(step.shape) + given + sum(s.weight.size for s in stages)
        total["launch"] += 1
        if step.kind == "filter":
            terms = len(stages[0].weight) // stages[0].groups
            # Rows of a halo go through the passes that come before theirs.
            total["pass"] += (
                given * terms * sum(steps.fours(step.taps)) * steps.halo(step.taps, step.tile)
            )
        elif step.kind == "depthwise + pointwise":
            total["product in place"] += given * each[1]
            # What a block of rows needs is made anew by each.
            blocks = math.ceil(len(stages[1].weight) / steps.ROWS)
            total["row"] += (
                work.batch * math.prod(step.out[1:]) * stages[1].in_channels * each[0] * blocks
            )
        elif step.kind == "matrix product":
            (s,) = stages
            total["product"] += given * each[0]
            if math.prod(s.kernel) > 1 or set(s.geometry.stride) != {1}:
                outs = len(s.weight) // s.groups
                moved += 2 * given * each[0] / outs  # unrolled, and read again
                total["launch"] += 1
        else:
            (s,) = stages
            # A transposed stage looks at all taps of every output, those between samples as well.
            rows = len(s.weight) // s.groups * math.prod(s.kernel)
            total["row" if step.kind == "depthwise" else "sum"] += given * (
                rows if s.transposed else each[0]
            )
        total["byte"] += moved * work.itemsize
    return total


def torch(work: Work, most: int) -> Counts:
    """Counts of PyTorch's convolutions, one after another, each with a team of its own.

    It has several ways to run a convolution, whose speeds have little in common: each has rates
    of its own, and so has what does not get faster with more threads.
    """
    total: dict[str, float] = defaultdict(float)
    lanes = LANES // work.itemsize
    shapes = chain_shapes(work.stages, work.shape)
    for stage, before, after in zip(work.stages, shapes, shapes[1:]):
        taken, given = (work.batch * math.prod(s) / lanes for s in (before, after))
        kind, terms = _kind(stage, lanes)
        multiplied = stage.outer * stage.inner * terms * work.batch * math.prod(after[1:])
        found = {
            f"{kind}: multiply": multiplied / lanes,
            f"{kind}: in": taken,
            f"{kind}: out": given,
            "strided in": taken * (max(stage.geometry.stride) > 1),
            "rearranged": (taken + given) * (stage.outer * stage.inner > 1),
        }
        for name, count in found.items():
            total[name] += count / work.threads
            if work.threads > 1:
                total[f"{name}, not shared"] += count
        total["op"] += 1
        total["weight"] += stage.weight.size / lanes
        total["team"] += work.threads > 1
        total["wake"] += (work.threads > 1) * WAKES * _core.wake(work.threads)
        moved = (taken + given) * LANES
        held = moved + stage.weight.size * work.itemsize
        for name, count in _moved(moved, held, work.threads, most).items():
            total[name] += count
    return total


def _kind(stage: Stage, lanes: int) -> tuple[str, int]:
    """Which of PyTorch's ways a stage goes, and the multiply-adds of an output sample there."""
    rows, per = stage.weight.shape[0] // stage.groups, stage.weight.shape[1]
    taps = math.prod(stage.kernel)
    terms = rows * per * taps
    if stage.groups > 1:
        kind = "depthwise" if rows == per == 1 else "grouped"
    elif per < THIN:
        kind = "thin"
    else:
        kind = "dense" if taps > 1 else "pointwise"
        terms = math.ceil(rows / lanes) * math.ceil(per / lanes) * lanes**2 * taps
    # Tied copies on the right go along one axis more.
    return f"{kind} {len(stage.kernel) + (stage.inner > 1)}-D", stage.groups * terms


def fft(
    taps: Ints, spatial: Ints, block: Ints, threads: int, most: int, itemsize: int = 4
) -> Counts:
    """Counts of a filter by transforms of blocks."""
    transforms, points, _, groups = fourier.work(taps, spatial, block)
    samples = math.prod(spatial)
    team = 1 if samples < fourier.ALONE else min(threads, groups)
    share = groups / math.ceil(groups / team)
    lanes = LANES // itemsize
    count = transforms * points / lanes
    deep = max(block[:-1], default=1)
    found = {
        "operation": count * math.log2(points) / share,
        "point": count / share,
        "long column": count * (deep > LONG) / share,  # walks over more pages than are at hand
        "group": groups / share,
        "call": 1.0,
        "team": float(team > 1),
    }
    moved = 2 * samples * itemsize
    return found | _moved(moved, moved, team, most)
