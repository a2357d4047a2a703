"""Features of a run: counts of vectors, samples, bytes and calls, each with a cost coefficient.

Features of this library's engine are the counts by which it chooses its plans (engine/costs.py),
shared out over threads, and its traffic; weights are not read, so chains of abstract weights can
be counted.  They are few, and each has one physical cause: coefficients are fitted to them, and a
feature without a cost on the machine is noise.

``"fork/join"``, the number of parallel regions, has a coefficient that is measured, not fitted: it
differs fiftyfold between processes whose idle threads sleep and spin.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Ints
from lowrank.core.cost import chain_shapes, stage_costs
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import channels_last, fourier
from lowrank.engine.cuda import steps
from lowrank.engine.lowering import lower
from lowrank.engine.machine import least_saving
from lowrank.engine.planes import segment_counts
from lowrank.engine.program import ProgramBuilder, Unsupported
from lowrank.engine.schedule import Node, Schedule
from lowrank.perfmodel import onnx

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
    in_network : bool
        Whether the neighbours of the chain have the runtime's own layout.
    """

    stages: Sequence[Stage]
    shape: Ints
    batch: int = 1
    threads: int = 1
    itemsize: int = 4
    interleaved: int = 1
    in_network: bool = False


def lowrank(work: Work, max_threads: int) -> Features:
    """Count the features of this library's engine, on the path that it would take.

    Coefficients are known for 1 and for `max_threads` threads.  A network is one program, so that
    chains in it have no path on planes, unless no program runs them.
    """
    links = [(stage, Epilogue()) for stage in work.stages]
    dtype = np.dtype(f"f{work.itemsize}")
    program = None
    if work.in_network:
        with contextlib.suppress(Unsupported):
            program = channels_last.program_builder(links, work.shape, dtype)
    elif work.interleaved == 1:
        program = channels_last.faster_program(links, work.shape, dtype, "auto")
    if program is not None:
        return _program(program, work, max_threads)
    total: Features = defaultdict(float)
    for segment in lower(links, work.shape, dtype, work.threads, work.interleaved, work.batch):
        images = 1 if segment.is_batched else work.batch
        tasks = segment.tasks * images
        saved = segment.seconds * images * (work.threads - 1) / work.threads
        is_parallel = tasks > 1 and work.threads > 1 and saved >= segment.fork_join
        threads = min(work.threads, tasks) if is_parallel else 1
        # The run ends with the thread that has the most tasks.
        share = tasks / math.ceil(tasks / threads)
        for name, count in segment_counts(segment, dtype.name).items():
            total[name] += images * count / share
        samples = math.prod(segment.in_shape) + math.prod(segment.out_shape)
        moved = images * samples * work.itemsize
        weights = sum(s.weight.size for s in segment.specs) * work.itemsize
        for name, count in _memory_traffic(moved, moved + weights, threads, max_threads).items():
            total[name] += count
        total["call"] += 1
        total["fork/join"] += is_parallel
    return total


def _program(builder: ProgramBuilder, work: Work, max_threads: int) -> Features:
    """Count a program, whose images threads share out; one by one if there are fewer.

    The rules are those of program.c.  In a network, arrays are packed and threads are forked once.
    """
    batch, threads, nodes = work.batch, work.threads, builder.nodes
    if work.in_network:
        nodes = [node for node in nodes if len(node.values) > 1]
    elif builder.seconds * batch * (threads - 1) / threads < least_saving():
        threads = 1
    schedule = Schedule(nodes, work.itemsize)
    per_thread = batch // threads  # images that a thread takes alone
    group = max(1, min(schedule.group, per_thread))
    alone = _most_images(per_thread * threads, group, threads)
    together = batch - per_thread * threads  # images that threads share
    arrays = batch * sum(map(math.prod, builder.arrays)) * work.itemsize
    weights = sum(node.weights for node in nodes)
    strands = len(schedule.strands)
    total: Features = defaultdict(float)
    traffic: list[tuple[float, float]] = []
    for segment in schedule.segments:
        images = min(group, schedule.images_together(segment))
        passes = math.ceil(alone / images)  # over the weights
        parts = strands or segment.bands
        for node in nodes[segment.first : segment.end]:
            share = strands / math.ceil(strands / threads) if strands else _share(node, threads)
            counts = node.make_counts()
            for name, count in counts.items():
                runs = passes if name == "weight" else alone
                total[name] += count * (runs + together / share)
            total["step"] += parts * (passes + together)
            total["barrier"] += segment.bands * together * (threads > 1 and not strands)
            touched = sum(v.samples for v in node.values) * work.itemsize
            traffic.append((batch * touched, images * touched / parts + node.weights))
            if len(node.values) == 1:  # packs or unpacks an array
                traffic.append((batch * math.prod(node.values[0].shape) * work.itemsize, arrays))
            # The first read of the weights finds what other operations left in the cache.
            read = counts.get("weight", 0) * builder.limits.lanes * work.itemsize
            passes_of_all = passes * min(threads, batch) + together
            traffic.append((node.weights * passes_of_all, weights + images * touched))
            again = max(0.0, read - node.weights) * passes_of_all
            traffic.append((again, images * touched + node.weights))
    for moved, working_set in traffic:
        lines = _memory_traffic(moved, working_set, threads, max_threads)
        for name, count in lines.items():
            total[name] += count
    if not work.in_network:
        total["call"] += 1
        total["fork/join"] += threads > 1
    return total


def _most_images(images: int, group: int, threads: int) -> int:
    """Return the most images that one of several threads runs, a group at a time."""
    groups = math.ceil(images / group)
    most = math.ceil(groups / threads) * group
    return most - (groups * group - images) * (groups % threads == 1 % threads)


def _share(node: Node, threads: int) -> float:
    """Return how many times faster threads run an operation on one image together."""
    units = node.work_units
    if units >= _core.MIN_UNITS * threads or units % threads == 0 or node.splits < threads:
        return units / math.ceil(units / threads)
    return node.splits / math.ceil(node.splits / threads)


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
            total["pass"] += outputs * rank * sum(step.taps)
            if step.taps[0] > 1:  # two kernels, and sums between them
                total["launch"] += 1
                moved += 2 * outputs
        elif step.kind == "matrix product":
            (s,) = stages
            total["product"] += outputs * terms[0]
            if math.prod(s.kernel) > 1 or set(s.geometry.stride) != {1}:
                outs = len(s.weight) // s.groups
                moved += 2 * outputs * terms[0] / outs  # unrolled: written and read again
                total["launch"] += 1
        elif step.kind == "array code":
            total["sum"] += sum(c.macs for c in stage_costs(stages, step.in_shape)) * work.batch
        elif stages:
            # The depthwise stage of a fused step is the last but one.
            *before, depthwise = stages[:-1] if len(stages) > 1 else stages
            samples = work.batch * math.prod(step.out_shape[1:])
            total["row"] += samples * depthwise.out_channels * math.prod(depthwise.kernel)
            if len(stages) > 1:
                inputs = work.batch * math.prod(step.in_shape[1:])
                total["product in place"] += outputs * terms[-1]
                total["product in place"] += inputs * sum(s.weight.size for s in before)
        total["byte"] += moved * work.itemsize
    return total


def onnxruntime(work: Work, max_threads: int) -> Features:
    """Count the features of onnxruntime's operations, one parallel region each.

    In a network, the layout of the neighbours decides which operations change it.
    """
    lanes = _widest_vector(work.itemsize)
    block = onnx.block_size(_core.ISAS[0], work.itemsize)
    total: Features = defaultdict(float)
    for node in onnx.nodes(work.stages, work.shape, work.batch, lanes, block, work.in_network):
        share = node.tasks / math.ceil(node.tasks / work.threads)
        for name, count in node.counts.items():
            total[name] += count / share
        moved = node.moved * work.itemsize
        for name, count in _memory_traffic(moved, moved, work.threads, max_threads).items():
            total[name] += count
        total["op"] += 1
        total["parallel region"] += work.threads > 1
    total["call"] += not work.in_network
    return total


def torch(work: Work, max_threads: int) -> Features:
    """Count the features of PyTorch's convolutions, one parallel region each.

    PyTorch has several methods, whose speeds have little in common: each has coefficients of its
    own, and so has work that does not get faster with more threads.
    """
    total: Features = defaultdict(float)
    lanes = _widest_vector(work.itemsize)
    shapes = chain_shapes(work.stages, work.shape)
    for stage, before, after in zip(work.stages, shapes, shapes[1:]):
        inputs, outputs = (work.batch * math.prod(s) / lanes for s in (before, after))
        method, terms = _torch_method(stage, lanes)
        samples = math.prod((before if stage.transposed else after)[1:])
        macs = stage.outer * stage.inner * terms * work.batch * samples
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
        total["parallel region"] += work.threads > 1
        total["fork/join"] += TORCH_FORK_JOINS * (work.threads > 1)
        moved = (inputs + outputs) * lanes * work.itemsize
        working_set = moved + stage.weight.size * work.itemsize
        traffic = _memory_traffic(moved, working_set, work.threads, max_threads)
        for name, count in traffic.items():
            total[name] += count
    return total


def _widest_vector(itemsize: int) -> int:
    """Return the lanes of this CPU's best instruction set, which other libraries use."""
    return _core.plane_limits(f"float{8 * itemsize}", _core.ISAS[0]).lanes


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
    lanes = _widest_vector(itemsize)
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
