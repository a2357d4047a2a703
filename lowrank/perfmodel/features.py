"""Features of a run: counts of vectors, samples, bytes and calls, each with a cost coefficient.

Features follow the plan that the engine would make, tiles included; weights are not read, so
chains of abstract weights can be counted.  They are few, and each has one physical cause:
coefficients are fitted to them, and a feature without a cost on the machine is noise.

One feature is in seconds: ``"fork/join"``, the latency of parallel regions in this process.  It
is measured, not fitted: it differs fiftyfold between processes whose idle threads sleep and spin.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lowrank._kernels import _core
from lowrank._kernels.layout import output_size
from lowrank._kernels.limits import (
    BLOCK_ROWS,
    MAX_CHANNELS_LAST_SAMPLES,
    MAX_DEPTHWISE_TAPS,
    MAX_REMAINDER,
    SCATTER_TAPS,
    VECTOR_BYTES,
)
from lowrank._kernels.spec import StageSpec
from lowrank._typing import Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier
from lowrank.engine.cuda import steps
from lowrank.engine.lowering import Segment, lower

Features = dict[str, float]

CACHE_LINE = 64  # bytes
THIN_CHANNELS = 8  # input channels, below which PyTorch has another method
# Fork/join latencies per convolution of PyTorch: measured with threads asleep and spinning.
TORCH_FORK_JOINS = 2.6
LONG_COLUMN = 512  # points of a transform along any axis but the last


class Work(NamedTuple):
    """A chain, its input and the threads it runs on.

    Attributes
    ----------
    stages : sequence of Stage
        Stages; their weights may be abstract.
    shape : tuple of int
        (channels, \\*spatial) of the input.
    batch, threads, itemsize, interleaved : int
        Number of examples and threads, bytes per value, values per sample.
    """

    stages: Sequence[Stage]
    shape: Ints
    batch: int = 1
    threads: int = 1
    itemsize: int = 4
    interleaved: int = 1


def lowrank(work: Work, max_threads: int) -> Features:
    """Count the features of this library's engine.

    Coefficients are known for 1 and for `max_threads` threads.
    """
    links = [(stage, Epilogue()) for stage in work.stages]
    dtype = f"f{work.itemsize}"
    total: Features = defaultdict(float)
    for segment in lower(links, work.shape, dtype, work.threads, work.interleaved, work.batch):
        images = 1 if segment.is_batched else work.batch
        tasks = segment.tasks * images
        saved = segment.seconds * images * (work.threads - 1) / work.threads
        is_parallel = (
            tasks > 1 and work.threads > 1 and saved >= _core.fork_join_seconds(work.threads)
        )
        threads = min(work.threads, tasks) if is_parallel else 1
        # The run ends with the thread that has the most tasks.
        share = tasks / math.ceil(tasks / threads)
        for name, count in _segment(segment, images, work.itemsize).items():
            total[name] += count / share
        samples = math.prod(segment.in_shape) + math.prod(segment.out_shape)
        moved = images * samples * work.itemsize
        weights = sum(s.weight.size for s in segment.specs) * work.itemsize
        for name, count in _memory_traffic(moved, moved + weights, threads, max_threads).items():
            total[name] += count
        total["call"] += 1
        total["parallel region"] += is_parallel
        total["fork/join"] += is_parallel * _core.fork_join_seconds(work.threads)
    return total


def _memory_traffic(moved: float, working_set: float, threads: int, max_threads: int) -> Features:
    """Count cache lines by the level of memory that serves them; sizes are in bytes.

    The miss rate of a level rises smoothly once the working set exceeds it.
    """
    l1, l2, l3 = _core.caches()
    # More threads than were measured get no more bandwidth than those.
    parallel = min(1.0, (threads - 1) / (max_threads - 1)) if max_threads > 1 else 0.0
    traffic = {"L2": moved * _miss_rate(working_set, l1) / threads}
    for name, size in (("L3", l2), ("memory", l3 / 2)):
        missed = moved * _miss_rate(working_set, size)
        traffic |= {name: missed * (1 - parallel), f"{name}, all threads": missed * parallel}
    return {name: count / CACHE_LINE for name, count in traffic.items()}


def _miss_rate(working_set: float, size: float) -> float:
    return max(0.0, 1 - size / working_set) if working_set else 0.0


def _segment(segment: Segment, images: int, itemsize: int) -> Features:
    """Count the features of all stages, over all tiles and images."""
    lanes = VECTOR_BYTES // itemsize
    counts = [-(-n // t) for n, t in zip(segment.out_shape[1:], segment.tile)]
    tiles = math.prod(counts) * images
    out: tuple[float, ...] = tuple(n / c for n, c in zip(segment.out_shape[1:], counts))
    total: Features = defaultdict(float)
    a, b, c = segment.in_shape[1:]
    input_sizes = [(a, b, c)]
    for spec in segment.specs:
        input_sizes.append(output_size(spec, input_sizes[-1]))
    for k in reversed(range(len(segment.specs))):
        spec, whole = segment.specs[k], input_sizes[k]
        extent = tuple(
            (n - 1) * s + d * (t - 1) + 1
            for n, s, d, t in zip(out, spec.stride, spec.dilation, spec.kernel)
        )
        in_image = tuple(min(n, m) for n, m in zip(extent, whole))
        is_first, is_last = k == 0, k == len(segment.specs) - 1
        stage = _stage(spec, out, extent, in_image, is_first, is_last, lanes)
        for name, count in stage.items():
            total[name] += tiles * count
        total["stage tile"] += tiles
        out = in_image
    return total


def _stage(
    spec: StageSpec,
    out: Sequence[float],
    extent: Sequence[float],
    in_image: Sequence[float],
    is_first: bool,
    is_last: bool,
    lanes: int,
) -> Features:
    """Count one stage on one tile: `out` samples per axis, from `extent` of its input."""
    rows, per_group, *taps = spec.weight.shape
    rows //= spec.groups
    groups = spec.outer * spec.groups * spec.inner
    depth, height, width = out
    outputs = groups * rows * depth * height * width
    inputs = groups * per_group * math.prod(in_image)
    is_strided = max(spec.stride) > 1
    # Unpadded rows are read in place if no tap crosses them.
    in_place = is_first and not is_strided and spec.before[2] == spec.after[2] == 0 and taps[2] == 1
    if per_group > 1 or math.prod(taps) > MAX_DEPTHWISE_TAPS:
        by_rows = _runs_by_rows(spec, out, extent, lanes)
        return _dense(spec, out, extent, lanes, by_rows) | {
            "pack strided" if is_strided else "pack": is_first * (not in_place) * inputs / lanes,
            "scatter": (not by_rows) * (not is_last) * outputs / lanes,
            "scatter output": (not by_rows) * is_last * outputs / lanes,
        }
    is_small_plane = height * width <= MAX_CHANNELS_LAST_SAMPLES
    if is_first and rows == 1 and groups >= lanes and is_small_plane:
        vectors = groups / lanes * depth * height * width
        return {
            "channels-last multiply": vectors * math.prod(taps),
            "channels-last sample": (outputs + inputs) / lanes,
        }
    return _depthwise(spec, out, lanes) | {
        "pack strided" if is_strided else "pack rows": is_first * (not in_place) * inputs / lanes,
        "scatter rows": (not is_last) * outputs / lanes,
    }


def _runs_by_rows(
    spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int
) -> bool:
    """Return whether the engine stores row by row, without scattering: the rule of chain.inc."""
    terms, width = math.prod(spec.weight.shape[1:]), out[2]
    vectors, pitch = math.ceil(width / lanes), math.ceil(extent[2] / spec.stride[2])
    rows = min(spec.weight.shape[0] // spec.groups, BLOCK_ROWS)
    hides_latency = rows * min(vectors, 3) >= BLOCK_ROWS
    is_cheaper = vectors * lanes * terms <= pitch * terms + SCATTER_TAPS * lanes
    return width >= lanes and pitch > width and hides_latency and is_cheaper


def _dense(
    spec: StageSpec, out: Sequence[float], extent: Sequence[float], lanes: int, by_rows: bool
) -> Features:
    """Count runs over rows, or over planes, where runs continue over the ends of rows."""
    rows = spec.weight.shape[0] // spec.groups
    terms = math.prod(spec.weight.shape[1:])
    groups = spec.outer * spec.groups * spec.inner
    depth, height, width = out
    length = (height - 1) * math.ceil(extent[2] / spec.stride[2]) + width
    runs, vectors = depth, max(1, math.ceil((length - MAX_REMAINDER) / lanes))
    if by_rows:
        runs, vectors = depth * height, math.ceil(width / lanes)
    blocks = groups * math.ceil(rows / BLOCK_ROWS)
    return {
        "multiply": groups * rows * terms * runs * vectors,
        "load": blocks * terms * runs * vectors,
        "run": blocks * runs * math.ceil(vectors / 3),
        "weight": blocks * BLOCK_ROWS * terms / lanes,
    }


def _depthwise(spec: StageSpec, out: Sequence[float], lanes: int) -> Features:
    """Count rows of one channel, four at a time where their taps overlap."""
    rows = spec.weight.shape[0] // spec.groups
    d, h, w = spec.kernel
    planes = spec.outer * spec.groups * spec.inner * rows
    depth, height, width = out
    # Rows shorter than a vector run in half and quarter vectors.
    vector = lanes if width >= lanes else lanes / 2 if width >= lanes / 2 else lanes / 4
    vectors = planes * depth * height * math.ceil(width / vector)
    overlaps = spec.stride[1] == 1 and spec.dilation[1] == 1
    loads = vectors * d * w * ((h + 3) / 4 if overlaps else h)
    return {
        "row multiply": vectors * d * h * w,
        "2-D multiply": vectors * d * h * w if w > 1 and d * h > 1 else 0,
        "unaligned load": loads if w > 1 else 0,  # some cross the ends of cache lines
        "aligned load": loads if w == 1 else 0,
        "row": planes * depth * height * (0.25 if overlaps else 1),
        "plane": planes,
    }


def cuda(work: Work, max_threads: int) -> Features:
    """Count the features of a GPU: launches, bytes, and MACs by the kernel that does them."""
    del max_threads  # a GPU decides itself
    total: Features = defaultdict(float)
    for step in steps.partition(work.stages, work.shape, max(4, work.itemsize)):
        stages = work.stages[step.first : step.first + step.stage_count]
        outputs = work.batch * math.prod(step.out_shape)
        terms = [math.prod(s.weight.shape[1:]) for s in stages]
        inputs = work.batch * math.prod(step.in_shape)
        moved = inputs + outputs + sum(s.weight.size for s in stages)
        total["launch"] += 1
        if step.kind == "filter":
            rank = len(stages[0].weight) // stages[0].groups
            # The first passes also run on the halo of the later ones.
            halo = steps.halo_factor(step.taps, step.tile)
            total["pass"] += outputs * rank * sum(steps.round_to_fours(step.taps)) * halo
        elif step.kind == "depthwise + pointwise":
            total["product in place"] += outputs * terms[1]
            # Each block of output channels computes the depthwise sums again.
            blocks = math.ceil(len(stages[1].weight) / steps.GEMM_ROWS)
            samples = work.batch * math.prod(step.out_shape[1:])
            total["row"] += samples * stages[1].in_channels * terms[0] * blocks
        elif step.kind == "matrix product":
            (s,) = stages
            total["product"] += outputs * terms[0]
            if math.prod(s.kernel) > 1 or set(s.geometry.stride) != {1}:
                outs = len(s.weight) // s.groups
                moved += 2 * outputs * terms[0] / outs  # unrolled: written and read again
                total["launch"] += 1
        else:
            (s,) = stages
            # A transposed stage reads all taps of every output, also those between samples.
            transposed_terms = len(s.weight) // s.groups * math.prod(s.kernel)
            total["row" if step.kind == "depthwise" else "sum"] += outputs * (
                transposed_terms if s.transposed else terms[0]
            )
        total["byte"] += moved * work.itemsize
    return total


def torch(work: Work, max_threads: int) -> Features:
    """Count the features of PyTorch's convolutions, one parallel region each.

    PyTorch has several methods, whose speeds have little in common: each has coefficients of its
    own, and so has work that does not get faster with more threads.
    """
    total: Features = defaultdict(float)
    lanes = VECTOR_BYTES // work.itemsize
    shapes = chain_shapes(work.stages, work.shape)
    for stage, before, after in zip(work.stages, shapes, shapes[1:]):
        inputs, outputs = (work.batch * math.prod(s) / lanes for s in (before, after))
        method, terms = _torch_method(stage, lanes)
        macs = stage.outer * stage.inner * terms * work.batch * math.prod(after[1:])
        features = {
            f"{method}: multiply": macs / lanes,
            f"{method}: in": inputs,
            f"{method}: out": outputs,
            "strided in": inputs * (max(stage.geometry.stride) > 1),
            "rearranged": (inputs + outputs) * (stage.outer * stage.inner > 1),
        }
        for name, count in features.items():
            total[name] += count / work.threads
            if work.threads > 1:
                total[f"{name}, not shared"] += count
        total["op"] += 1
        total["weight"] += stage.weight.size / lanes
        is_parallel = work.threads > 1
        total["parallel region"] += is_parallel
        latency = TORCH_FORK_JOINS * _core.fork_join_seconds(work.threads)
        total["fork/join"] += is_parallel * latency
        moved = (inputs + outputs) * VECTOR_BYTES
        working_set = moved + stage.weight.size * work.itemsize
        traffic = _memory_traffic(moved, working_set, work.threads, max_threads)
        for name, count in traffic.items():
            total[name] += count
    return total


def _torch_method(stage: Stage, lanes: int) -> tuple[str, int]:
    """Return PyTorch's method for a stage, and its MACs per output sample."""
    rows, per_group = stage.weight.shape[0] // stage.groups, stage.weight.shape[1]
    taps = math.prod(stage.kernel)
    terms = rows * per_group * taps
    if stage.groups > 1:
        method = "depthwise" if rows == per_group == 1 else "grouped"
    elif per_group < THIN_CHANNELS:
        method = "thin"
    else:
        method = "dense" if taps > 1 else "pointwise"
        terms = math.ceil(rows / lanes) * math.ceil(per_group / lanes) * lanes**2 * taps
    # Inner replication runs along an additional axis.
    return f"{method} {len(stage.kernel) + (stage.inner > 1)}-D", stage.groups * terms


def fft(
    taps: Ints, spatial: Ints, block: Ints, threads: int, max_threads: int, itemsize: int = 4
) -> Features:
    """Count the features of a filter by Fourier transforms of blocks."""
    transforms, points, _, groups = fourier.work(taps, spatial, block)
    samples = math.prod(spatial)
    used = 1 if samples < fourier.MIN_PARALLEL_SAMPLES else min(threads, groups)
    share = groups / math.ceil(groups / used)
    lanes = VECTOR_BYTES // itemsize
    count = transforms * points / lanes
    is_long = max(block[:-1], default=1) > LONG_COLUMN
    features = {
        "operation": count * math.log2(points) / share,
        "point": count / share,
        "long column": count * is_long / share,  # touches more pages than the TLB holds
        "group": groups / share,
        "call": 1.0,
        "parallel region": float(used > 1),
    }
    moved = 2 * samples * itemsize
    return features | _memory_traffic(moved, moved, used, max_threads)
