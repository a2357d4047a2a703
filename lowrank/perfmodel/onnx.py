"""Features of chains in onnxruntime, whose CPU kernels are those of its library MLAS.

Convolutions over two axes write a layout of blocks of channels (NCHWc).  They read it too, if
their channels are a multiple of four and at least one block; fewer channels are read as they are.
Others, and grouped ones whose groups do not fill blocks, unroll their input for a matrix product.
Reorder operations stand wherever the layout changes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lowrank._typing import Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Stage

CHANNEL_MULTIPLE = 4  # of inputs that can be reordered to blocks
BLOCKS = {"avx2": 8, "avx512": 16}  # channels; MLAS has no blocks on other CPUs
MOST_FILTERS = 4  # blocks of output channels that a kernel computes together
LATENCY = 4  # FMAs in flight that hide the latency of one
POINTWISE_CHANNELS = 128  # input channels of a pass of the pointwise kernel


class Node(NamedTuple):
    """An operation of the graph: its counts for one thread, and the tasks that threads share."""

    counts: dict[str, float]
    tasks: int
    moved: float = 0.0  # elements read and written, weights included


class Run(NamedTuple):
    """Counts of a kernel over one run of outputs, for each input channel and tap."""

    slots: float = 0.0  # FMAs, or the latency of fewer
    loads: float = 0.0  # vectors of weights, and inputs that are broadcast
    stores: float = 0.0  # vectors of sums


def block_size(isa: str, itemsize: int) -> int:
    """Return the channels of a block; 0 if there is no blocked layout for the CPU or the type."""
    return BLOCKS.get(isa, 0) if itemsize == 4 else 0


def nodes(
    stages: Sequence[Stage], shape: Ints, batch: int, lanes: int, block: int, in_network: bool
) -> Iterator[Node]:
    """Yield the operations of a chain, with the changes of layout between them.

    In a network, the neighbours of a chain over two axes have the blocked layout.
    """
    shapes = chain_shapes(stages, shape)
    has_blocks = in_network and block > 0 and len(shape) == 3
    is_blocked = has_blocks and shape[0] % CHANNEL_MULTIPLE == 0
    for stage, before, after in zip(stages, shapes, shapes[1:]):
        parts = list(_operations(stage, before, after, batch, lanes, block))
        for reads_blocks, writes_blocks, node, size in parts:
            if is_blocked != reads_blocks:
                yield _reorder(size, batch, lanes, block)
            yield node
            is_blocked = writes_blocks
    if is_blocked != (has_blocks and shapes[-1][0] % CHANNEL_MULTIPLE == 0):
        yield _reorder(shapes[-1], batch, lanes, block)


def _reorder(shape: Ints, batch: int, lanes: int, block: int) -> Node:
    """Return a change between the plain and the blocked layout."""
    channels, *size = shape
    blocks = math.ceil(channels / block)
    samples = batch * blocks * block * math.prod(size)
    return Node({"reordered": samples / lanes}, batch * blocks, 2 * samples)


def _move(shape: Ints, batch: int, lanes: int) -> Node:
    samples = batch * math.prod(shape)
    return Node({"moved": samples / lanes}, 1, 2 * samples)


def _operations(
    s: Stage, before: Ints, after: Ints, batch: int, lanes: int, block: int
) -> Iterator[tuple[bool, bool, Node, Ints]]:
    """Yield whether an operation reads and writes blocks, its node, and the shape of its input."""
    g, examples = s.geometry, batch
    shape = before
    if g.padding_mode != "zeros" and any(map(any, g.padding)):
        shape = (before[0], *(n + a + b for n, (a, b) in zip(before[1:], g.padding)))
        yield False, False, _move(shape, batch, lanes), before
    if s.shuffle != (1, 1):
        moved = after if s.transposed else shape
        yield False, False, _move(moved, batch, lanes), moved
    if s.outer > 1:  # a view: copies are examples
        batch *= s.outer
    size, kernel, stride = shape[1:], s.kernel, g.stride
    out, padding, dilation = after[1:], g.padding, g.dilation
    if g.padding_mode != "zeros":
        padding = ((0, 0),) * g.ndim
    if s.inner > 1:
        is_first_pointwise = kernel[0] == stride[0] == 1 and not any(padding[0])
        if is_first_pointwise and not s.transposed:
            size, out = (s.inner * size[0], *size[1:]), (s.inner * out[0], *out[1:])
        elif g.ndim < 3:
            size, out, kernel = (s.inner, *size), (s.inner, *out), (1, *kernel)
            stride, dilation, padding = (1, *stride), (1, *dilation), ((0, 0), *padding)
        else:
            yield False, False, _move(shape, batch, lanes), shape
            yield False, False, _move(after, batch, lanes), after
            batch *= s.inner
    conv = Convolution(
        s.groups, s.weight.shape[1], len(s.weight) // s.groups, size, out, kernel, stride,
        dilation, tuple(a for a, _ in padding), batch,
    )  # fmt: skip
    if s.transposed:
        yield False, False, conv.transposed(lanes), shape
        return
    method = conv.method(block) if block else "plain"
    must_be_plain = s.outer * s.inner > 1
    if method == "plain":
        yield False, False, conv.plain(lanes), shape
        return
    yield method != "thin", not must_be_plain, conv.blocked(method, block, lanes), shape
    if must_be_plain:
        yield False, False, _reorder(after, examples, lanes, block), after


class Convolution(NamedTuple):
    """A convolution as onnxruntime runs it: without copies, transposition and padding modes."""

    groups: int
    ins: int  # input channels of a group
    outs: int
    size: Ints
    out: Ints
    kernel: Ints
    stride: Ints
    dilation: Ints
    before: Ints
    batch: int

    def method(self, block: int) -> str:
        """Return the method: "direct", "pointwise", "depthwise" and "thin" write blocks."""
        if len(self.size) != 2:
            return "plain"
        is_thin = self.groups == 1 and self.ins < block
        if not is_thin and self.groups * self.ins % CHANNEL_MULTIPLE:
            return "plain"
        if self.groups > 1 and self.ins == self.outs == 1:
            return "depthwise"
        if self.groups > 1 and (self.ins % block or self.outs % block):
            return "plain"
        if is_thin:
            return "thin"
        is_pointwise = self.kernel == (1, 1) and not any(self.before)
        return "pointwise" if is_pointwise and self.out == self._strided() else "direct"

    def _strided(self) -> Ints:
        return tuple(math.ceil(n / s) for n, s in zip(self.size, self.stride))

    @property
    def moved(self) -> float:
        """Elements read and written."""
        inputs = self.batch * self.groups * self.ins * math.prod(self.size)
        outputs = self.batch * self.groups * self.outs * math.prod(self.out)
        return inputs + outputs + self.groups * self.ins * self.outs * math.prod(self.kernel)

    def blocked(self, method: str, block: int, lanes: int) -> Node:
        """Count a convolution that writes blocks."""
        per_block = block / lanes
        groups, blocks = self.groups, math.ceil(self.outs / block)
        if method == "depthwise":
            groups, blocks = math.ceil(self.groups / block), 1
        rows, row_taps = self.out[0], self._row_taps() * self.kernel[1]
        inside = self._inside()
        if method == "pointwise":
            row_taps = 1
            inside = self.out[1]
            if self.stride == (1, 1):
                rows, inside = 1, math.prod(self.out)
            else:
                row_taps = rows
        alone = 0 if method == "pointwise" else self.out[1] - inside
        channels = math.ceil(self.ins / block) * block
        passes = math.ceil(channels / (POINTWISE_CHANNELS if method == "pointwise" else block))
        if method == "thin":
            channels = passes = self.ins
        elif method == "depthwise":
            channels = passes = 1
        total: dict[str, float] = defaultdict(float)
        sets = [MOST_FILTERS] * (blocks // MOST_FILTERS) + [blocks % MOST_FILTERS]
        times = self.batch * groups * per_block
        for filters in filter(None, sets):
            run = count_run(inside, alone, filters, 6 if block == 16 else 3)
            name = "depthwise product" if method == "depthwise" else "product"
            total[name] += times * channels * row_taps * run.slots
            if method != "depthwise":
                total["load"] += times * channels * row_taps * run.loads
            total["store"] += times * passes * rows * run.stores
        tasks = self.batch * groups * math.ceil(blocks / MOST_FILTERS) * self.out[0]
        return Node(dict(total), tasks, self.moved)

    def plain(self, lanes: int) -> Node:
        """Count a convolution by a matrix product of the unrolled input."""
        samples, terms = math.prod(self.out), self.ins * math.prod(self.kernel)
        is_direct = math.prod(self.kernel) == 1 and self.out == self.size
        times = self.batch * self.groups
        unrolled = times * terms * samples / lanes
        is_row = self.outs == 1  # its product with a matrix packs nothing
        counts = {
            "row product": is_row * unrolled,
            "matrix product": (not is_row) * unrolled * max(self.outs, LATENCY),
            "packed": (not is_row) * unrolled,
            f"unrolled {len(self.size)}-D": (not is_direct) * unrolled,
            "group": float(times),
        }
        return Node(counts, max(times, math.ceil(samples / lanes)), self.moved)

    def transposed(self, lanes: int) -> Node:
        """Count a transposed convolution: a matrix product, whose columns are added up."""
        samples, terms = math.prod(self.size), self.ins * math.prod(self.kernel)
        times = self.batch * self.groups
        counts = {
            "matrix product": times * max(terms, LATENCY) * self.outs * samples / lanes,
            "packed": times * self.outs * samples / lanes,
            "added": times * terms * samples / lanes,
            "group": float(times),
        }
        return Node(counts, times, self.moved)

    def _row_taps(self) -> int:
        """Return the taps along the first axis that lie inside the input, over all rows."""
        (n, *_), (s, *_), (d, *_), (b, *_) = self.size, self.stride, self.dilation, self.before
        total = 0
        for t in range(self.kernel[0]):
            first = max(0, math.ceil((b - t * d) / s))
            last = min(self.out[0] - 1, (n - 1 + b - t * d) // s)
            total += max(0, last - first + 1)
        return total

    def _inside(self) -> int:
        """Return the outputs of a row whose taps all lie inside the input."""
        n, s, d, b = (v[1] for v in (self.size, self.stride, self.dilation, self.before))
        first = min(self.out[1], math.ceil(b / s))
        last = min(self.out[1] - 1, (n + b - d * (self.kernel[1] - 1) - 1) // s)
        return max(0, last - first + 1)


def count_run(inside: int, alone: int, filters: int, most: int) -> Run:
    """Count a run of outputs, of which those at its ends are computed alone."""
    whole, rest = divmod(inside, most)
    sizes = [(most, whole)]
    for n in (3, 2):
        if n < most and rest >= n:
            sizes.append((n, 1))
            rest -= n
    sizes.append((1, rest + alone))
    slots = loads = stores = 0.0
    for n, count in sizes:
        slots += count * max(n * filters, LATENCY)
        loads += count * (n * (filters > 1) + filters)
        stores += count * n * filters
    return Run(slots, loads, stores)
