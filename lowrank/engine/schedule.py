"""Schedule of a program: in bands, image by image or group by group, over one arena."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lowrank._kernels import _core
from lowrank._kernels.spec import Three
from lowrank._typing import Ints
from lowrank.engine.buffers import ONES, ZEROS, Value, place_buffers
from lowrank.engine.costs import Counts
from lowrank.engine.operations import ROW, Operation

MAX_GROUP = 8  # images that share weights
MAX_ARENA = 1 << 26  # bytes of the buffers of a group
GROUP_WEIGHTS = 0.4  # of the L2 cache: weights beyond are shared by the images of a group
GROUP_BYTES = 0.5  # of the L2 cache for what an operation reads and writes of such images
BAND_WEIGHTS = 0.4  # of the L2 cache for the weights of operations that run by bands
BAND_BYTES = 0.2  # of the L2 cache for one band of the largest buffer

L1_SHARE = 0.6  # of the L1 cache for the samples of channels that run through all operations


class Step(NamedTuple):
    """Some units of work of an operation; fields as in program.h."""

    op: int
    begin: int
    end: int
    first: int
    last: int
    begin_split: int
    end_split: int
    strand: int = -1


class Reach(NamedTuple):
    """Samples of its first input that an operation needs, along each axis."""

    kernel: Ints = ONES
    stride: Ints = ONES
    dilation: Ints = ONES
    before: Ints = ZEROS

    def end(self, axis: int, outputs: int, size: int) -> int:
        """Return the end of the range that the first `outputs` samples need."""
        last = (outputs - 1) * self.stride[axis] - self.before[axis]
        return max(0, min(size, last + self.dilation[axis] * (self.kernel[axis] - 1) + 1))


class Node(NamedTuple):
    """An operation before buffers have places; `make` returns it when they have.

    Attributes
    ----------
    inputs : tuple of Value
        Values that it reads.
    output : Value or None
        Value that it writes; None for an array.
    make : callable
        Function that returns the operation.
    reach : Reach or None
        Samples that it needs; None if it needs its whole first input at once.
    weights : int
        Bytes of its weights.
    tile : tuple of int
        Outputs that are computed together along each axis.
    make_counts : callable
        Function that returns the counts of one example; without reading weights.
    splits : int
        Output-channel splits that threads can share.
    is_channelwise : bool
        Whether channels run alone; splits are then vectors of them.
    repack : callable or None
        Function that writes weights whose memory has changed to the operation.
    """

    inputs: tuple[Value, ...]
    output: Value | None
    make: Callable[[], Operation]
    reach: Reach | None = Reach()
    weights: int = 0
    tile: Ints = ONES
    make_counts: Callable[[], Counts] = dict
    splits: int = 1
    is_channelwise: bool = False
    repack: Callable[[Operation], None] | None = None

    @property
    def size(self) -> Three:
        """Size of the output, or of what is written to an array."""
        return (self.output or self.inputs[0]).size

    @property
    def work_units(self) -> int:
        """Number of units of work: rows, or rows of tiles."""
        d, h, w = (math.ceil(n / t) for n, t in zip(self.size, self.tile))
        return d * h * math.ceil(w / ROW)

    @property
    def values(self) -> tuple[Value, ...]:
        """Inputs and output."""
        return self.inputs if self.output is None else (*self.inputs, self.output)


class Segment(NamedTuple):
    """Nodes [first, end), which run by bands of one axis, in turns."""

    first: int
    end: int
    bands: int


class Schedule:
    """Order of the units of work of a program, and the arena of its buffers.

    Parameters
    ----------
    nodes : sequence of Node
        Operations in order.
    itemsize : int
        Bytes of an element.
    group : int, optional
        Number of images that run as a group; default: several if their weights exceed L2.

    Attributes
    ----------
    segments : list of Segment
        Operations that run by bands, and the others one by one.
    group : int
        Number of images that run as a group.
    arena : int
        Elements of the buffers of a group.
    strands : list of (int, int)
        Vectors of channels that run through all operations, if channels run alone in each.
    """

    def __init__(self, nodes: Sequence[Node], itemsize: int, group: int | None = None) -> None:
        self.nodes, self.itemsize = nodes, itemsize
        _, self.l2, _ = _core.caches()
        self.segments = list(self._segments())
        # Operations of a segment take turns: all its buffers are in use at the same time.
        turns = [
            [value.buffer for node in nodes[first:end] for value in node.values]
            for first, end, _ in self.segments
        ]
        self.group = self._group(place_buffers(turns, 1)) if group is None else group
        self.arena = place_buffers(turns, self.group)
        self.strands = self._strands()

    def steps(self, operations: Sequence[Operation]) -> list[Step]:
        """Return the steps in the order in which they run.

        Images of a group run one after another while their samples fill L2, and together where
        several fit, so that weights in L2 serve all of them.
        """
        if self.strands:
            return self._strand_steps(operations)
        steps: list[Step] = []
        for images, run in itertools.groupby(self.segments, key=self.images_together):
            parts = [part for segment in run for part in self._parts(operations, segment)]
            for image in range(0, self.group, images):
                end = min(image + images, self.group)
                steps += [Step(*p, image, end, 0, operations[p[0]].splits) for p in parts]
        return steps

    def _strands(self) -> list[tuple[int, int]]:
        """Return the first vector of channels and the end of each strand; none unless all apply.

        Strands take a few vectors of channels through all operations, in L1, and threads need no
        barrier between them.
        """
        is_channelwise = all(node.is_channelwise for node in self.nodes)
        splits = {node.splits for node in self.nodes}
        if not is_channelwise or len(splits) > 1 or splits <= {1} or self.group > 1:
            return []
        (vectors,) = splits
        l1, _, _ = _core.caches()
        buffers = {id(v.buffer): v.buffer for node in self.nodes for v in node.values}
        each = sum(b.elements for b in buffers.values()) * self.itemsize / vectors
        together = max(1, int(L1_SHARE * l1 / each))
        return [(start, min(start + together, vectors)) for start in range(0, vectors, together)]

    def _strand_steps(self, operations: Sequence[Operation]) -> list[Step]:
        """Return the steps of one strand after another."""
        return [
            Step(i, 0, op.work_units, 0, 1, start, end, number)
            for number, (start, end) in enumerate(self.strands)
            for i, op in enumerate(operations)
        ]

    def _segments(self) -> Iterator[Segment]:
        """Yield the segments.

        Bands keep what one operation writes in L2 until the next reads it.  They pay if buffers
        exceed L2, and if the weights, which every band reads again, do not.
        """
        first = 0
        while first < len(self.nodes):
            end = self._end_of_bands(first)
            written = [n.output for n in self.nodes[first:end] if n.output is not None]
            most = max((v.buffer.elements for v in written), default=0) * self.itemsize
            bands = -(-most // max(1, int(BAND_BYTES * self.l2)))
            if end - first < 2 or bands < 2:
                end, bands = first + 1, 1
            yield Segment(first, end, bands)
            first = end

    def _end_of_bands(self, first: int) -> int:
        """Return the end of the nodes from `first` on that can run by bands of one axis."""
        start = self.nodes[first]
        axis, weights, end = _band_axis(start.size), start.weights, first + 1
        if start.reach is None or axis == 2:  # rows of packing are whole
            return end
        for node in self.nodes[end:]:
            weights += node.weights
            sizes = [node.size, *(v.size for v in node.inputs)]
            if (
                node.reach is None
                or weights > BAND_WEIGHTS * self.l2
                or any(_band_axis(size) != axis for size in sizes)
                or any(v.step != ONES for v in node.values)
            ):
                break
            end += 1
        return end

    def _group(self, arena: int) -> int:
        """Return the number of images of a group; `arena` is the elements of one image."""
        if sum(node.weights for node in self.nodes) <= GROUP_WEIGHTS * self.l2:
            return 1
        return max(1, min(MAX_GROUP, MAX_ARENA // max(1, arena * self.itemsize)))

    def images_together(self, segment: Segment) -> int:
        """Return the number of images that each operation of a segment runs on at a time."""
        first, end, bands = segment
        if self.group == 1 or bands > 1:
            return 1
        most = max(sum(v.buffer.elements for v in n.values) for n in self.nodes[first:end])
        fitting = max(1, int(GROUP_BYTES * self.l2 / (most * self.itemsize)))
        return min(self.group, 1 << (fitting.bit_length() - 1))

    def _parts(
        self, operations: Sequence[Operation], segment: Segment
    ) -> list[tuple[int, int, int]]:
        """Return (operation, first unit, end) of a segment's steps, band after band."""
        first, end, bands = segment
        if bands == 1:
            return [(first, 0, operations[first].work_units)]
        axis = _band_axis(self.nodes[first].size)
        done = dict.fromkeys(range(first, end), 0)
        parts = []
        for band in range(1, bands + 1):
            needed = self._needed(segment, axis, band)
            for i in range(first, end):
                op = operations[i]
                per = op.work_units // op.units[axis] if op.units[axis] else 0
                tile = self.nodes[i].tile[axis] if op.kind == "winograd" else op.unit[axis]
                units = min(op.units[axis], -(-needed[i] // tile))
                if units > done[i]:
                    parts.append((i, done[i] * per, units * per))
                    done[i] = units
        return parts

    def _needed(self, segment: Segment, axis: int, band: int) -> dict[int, int]:
        """Return the outputs of each node that the first `band` bands of the last ones need."""
        first, end, bands = segment
        needed = dict.fromkeys(range(first, end), 0)
        for i in reversed(range(first, end)):
            node = self.nodes[i]
            n = node.size[axis]
            users = [
                (j, k)
                for j in range(i + 1, end)
                for k, v in enumerate(self.nodes[j].inputs)
                if node.output is not None and v.buffer is node.output.buffer
            ]
            if band == bands or not users:
                needed[i] = max(needed[i], n * band // bands)
                continue
            for j, k in users:
                user = self.nodes[j]
                tile = user.tile[axis]
                outputs = -(-needed[j] // tile) * tile  # tiles also read beyond the last output
                reach = user.reach if k == 0 and user.reach is not None else Reach()
                needed[i] = max(needed[i], reach.end(axis, outputs, n) if outputs else 0)
        return needed


def _band_axis(size: Ints) -> int:
    """Return the first axis with more than one sample, along which bands lie."""
    return next((a for a, n in enumerate(size) if n > 1), 2)
