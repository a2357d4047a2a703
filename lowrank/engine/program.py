"""Programs: chains and whole networks as operations on channels-last buffers in one arena.

A :class:`ProgramBuilder` takes operations on values in the order in which they run; ``build``
chooses buffers, halos and algorithms and makes the C engine's program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lowrank._kernels import _core, toom_cook
from lowrank._kernels.layout import output_size
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import Algorithm as Algorithm
from lowrank.engine.padding import padded_indices

Link = tuple[Stage, Epilogue]

MAX_ERROR = 1e-4  # predicted, relative, of a fast algorithm in float32
ONES, ZEROS = (1, 1, 1), (0, 0, 0)
L2_WEIGHTS = 0.3  # of the L2 cache for the weights of one block of terms
L2_TILES = 0.35  # of the L2 cache for the transformed inputs of a block of tiles
MAX_GROUP = 8  # images that share weights
MAX_ARENA = 1 << 26  # bytes of the buffers of a group
GROUP_WEIGHTS = 0.4  # of the L2 cache: weights beyond are shared by the images of a group
GROUP_BYTES = 0.5  # of the L2 cache for what an operation reads and writes of such images
BAND_WEIGHTS = 0.4  # of the L2 cache for the weights of operations that run by bands
BAND_BYTES = 0.2  # of the L2 cache for one band of the largest buffer
JOINED_ROW = 48  # the same where rows are joined: blocks of 6, 8, 12 or 16 pixels fill it
# Costs in FMAs of a vector, from measurements on AVX-512:
MOVE_COST = 8.0  # per vector that is packed, unpacked, copied or pooled
DEPTHWISE_COST = 1.2, 2.0  # per tap and vector where inputs stay in registers, and elsewhere
OUTPUT_COST = 4.0  # per vector of the output of a depthwise convolution
ROW = 192  # output samples of a unit of work, at most


class Unsupported(ValueError):
    """A program has no operation for something; the message says for what."""


@dataclass(eq=False)
class _Buffer:
    """Memory of one or more values: samples with a halo."""

    size: Three
    width: int  # channels, padding included
    before: list[int] = field(default_factory=lambda: [0, 0, 0])
    after: list[int] = field(default_factory=lambda: [0, 0, 0])
    gap: int = 0  # elements between samples, so that neighbours share no set of the L1 cache
    border: object = None  # what the halo holds, if not zeros
    first: int = -1  # numbers of the segments that write it first and read it last
    last: int = -1
    offset: int = 0  # in the arena

    @property
    def pitch(self) -> Three:
        _, h, w = (b + n + a for b, n, a in zip(self.before, self.size, self.after))
        sample = self.width + self.gap
        return h * w * sample, w * sample, sample

    @property
    def elements(self) -> int:
        d = self.before[0] + self.size[0] + self.after[0]
        return d * self.pitch[0] + VECTOR_OVERHANG

    @property
    def key(self) -> object:
        """Buffers of the same key can share memory: their halos are in the same places."""
        return self.size, self.width, self.gap, tuple(self.before), tuple(self.after), self.border


VECTOR_OVERHANG = 64  # elements behind a buffer that the last block's padding may write


@dataclass(eq=False)
class Value:
    """A value of a program: (channels, d, h, w) of each example.

    Attributes
    ----------
    shape : tuple of int
        (channels, d, h, w).
    position : ndarray of int
        Place of each channel in a sample of its buffer, counted from `start`.
    """

    shape: Ints
    position: Array
    width: int
    buffer: _Buffer
    start: int = 0
    first: Ints = ZEROS  # sample of the buffer of sample 0, and their distance along each axis
    step: Ints = ONES
    has_alias: bool = False  # another value is in the same memory

    @property
    def size(self) -> Three:
        _, d, h, w = self.shape
        return d, h, w


class Operation(NamedTuple):
    """An operation as the C engine takes it; fields as in program.h."""

    kind: str
    name: str
    input: tuple[int, int, Ints] = (0, 0, ZEROS)
    output: tuple[int, int, Ints] = (0, 0, ZEROS)
    other: tuple[int, int, Ints] | None = None
    size: Ints = ONES
    in_size: Ints = ONES
    unit: Ints = ONES
    units: Ints = ONES
    in_channels: int = 0
    channels: int = 0
    taps: Ints = ONES
    tap: Ints = ZEROS
    stride: Ints = ONES
    dilation: Ints = ONES
    before: Ints = ZEROS
    activation: str = "none"
    alpha: float = 0.0
    mode: str = "copy"
    terms: int = 0
    terms_block: int = 1
    blocks: Sequence[tuple[int, int, int, int]] = ()
    splits: int = 1
    algorithm: Ints = ZEROS
    tiles: int = 0
    multiplier: int = 1
    array: int = 0
    count_padding: bool = False
    offsets: Sequence[int] = ()
    weight: Any = None
    bias: Any = None
    channel: Sequence[int] = ()
    index: tuple[Any, Any, Any] = (None, None, None)
    macs: int = 0
    error: float = 0.0

    @property
    def samples_moved(self) -> int:
        """Elements read and written for one example, at any level of the memory."""
        outputs = math.prod(self.size) * self.channels
        inputs = math.prod(self.in_size) * (self.in_channels or self.channels)
        weights = 0 if self.weight is None else int(self.weight.size)
        return outputs + max(inputs, outputs) + weights

    @property
    def work_units(self) -> int:
        """Number of units of work: boxes of outputs, or rows of tiles."""
        return math.prod(self.units[:2] if self.kind == "winograd" else self.units)


class _Reach(NamedTuple):
    """Which samples of its first input an operation needs, along each axis."""

    kernel: Ints = ONES
    stride: Ints = ONES
    dilation: Ints = ONES
    before: Ints = ZEROS

    def end(self, axis: int, outputs: int, size: int) -> int:
        """Return the end of the range that the first `outputs` samples need."""
        last = (outputs - 1) * self.stride[axis] - self.before[axis]
        return max(0, min(size, last + self.dilation[axis] * (self.kernel[axis] - 1) + 1))


class _Node(NamedTuple):
    """An operation before buffers have places: `make` returns it then.

    `reach` is None if the operation needs its whole input at once; `weights` is in bytes; `tile`
    is the outputs that are computed together along each axis.
    """

    inputs: tuple[Value, ...]
    output: Value | None
    make: Any
    reach: _Reach | None = _Reach()
    weights: int = 0
    tile: Ints = ONES
    cost: float = 0.0  # estimated, in FMAs of a vector

    @property
    def size(self) -> Three:
        """Size of the output, or of what is written to an array."""
        return (self.output or self.inputs[0]).size


class ProgramBuilder:
    """Builds a program from operations on values.

    Parameters
    ----------
    dtype : dtype
        float32 or float64.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.
    isa : str, optional
        Instruction set; default: the best.
    """

    def __init__(self, dtype: Any, algorithm: Algorithm = "auto", isa: str | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.algorithm = algorithm
        self.isa = _core.default_isa() if isa is None else isa
        self.limits = _core.block_limits(self.dtype.name, self.isa)
        self.nodes: list[_Node] = []
        self.arrays: list[Ints] = []
        self.outputs: list[int] = []

    def input(self, shape: Ints) -> Value:
        """Return the value of a new input array, (batch, *shape)."""
        value = self._identity(shape)
        number = self._array(shape)

        def make() -> Operation:
            return self._transfer("pack", value, number)._replace(output=_view(value))

        self._add((), value, make)
        return value

    def output(self, value: Value) -> None:
        """Write a value to a new output array."""
        number = self._array(value.shape)
        self.outputs.append(number)

        def make() -> Operation:
            return self._transfer("unpack", value, number)._replace(input=_view(value))

        self._add((value,), None, make)

    def convolve(
        self,
        value: Value,
        spec: StageSpec,
        residual: Value | None = None,
        alpha: float = 0.0,
        name: str = "convolution",
    ) -> Value:
        """Return the convolution of a value: plus a residual, then the activation of `spec`."""
        if spec.permutation is not None:
            value = self.permute(value, spec.permutation)
        size = output_size(spec, value.size)
        out_channels = spec.outer * len(spec.weight) * spec.inner
        groups = spec.outer * spec.groups * spec.inner
        multiplier = len(spec.weight) // spec.groups
        if spec.weight.shape[1] == 1 and groups >= self.limits.lanes // 2:
            return self._depthwise(value, spec, size, multiplier, residual, alpha, name)
        lanes = self.limits.lanes
        if groups == 1:
            result = self._identity((out_channels, *size))
        else:  # group after group, each with its channels side by side
            order = np.arange(out_channels).reshape(spec.outer, spec.groups, multiplier, spec.inner)
            order = order.swapaxes(2, 3).reshape(-1)
            position = np.empty(out_channels, np.int64)
            position[order] = np.arange(out_channels)
            overhang = _round_up(multiplier, lanes) - multiplier
            result = self._value((out_channels, *size), position, out_channels + overhang)
        residual = self._like(residual, result)
        algorithm, error = self._choose_algorithm(spec, value, result)
        cost = direct_cost(spec, result, self)
        if any(algorithm):
            cost = winograd_cost(algorithm, spec, value, result, self)
        _grow_halo(value, spec, result.size, algorithm)

        def make() -> Operation:
            return self._dense(value, spec, result, residual, alpha, name, algorithm, error)

        reach = _Reach(spec.kernel, spec.stride, spec.dilation, spec.before)
        positions = math.prod(m + r - 1 for m, r in map(_shape_of, algorithm))
        weights = spec.weight.size // math.prod(spec.kernel) * positions
        if not any(algorithm):
            weights = spec.weight.size
        tile = tuple(_shape_of(n)[0] for n in algorithm)
        if any(algorithm):  # a unit of work is a row of tiles
            tile = (*tile[:2], result.size[2])
        if any(d > 1 for n, d in zip(algorithm, spec.dilation) if n):
            reach = None  # tiles of one phase come before those of the next
        self._add(
            (value, *([residual] if residual else [])), result, make, reach,
            weights * self.dtype.itemsize, tile, cost,
        )  # fmt: skip
        return result

    def chain(
        self,
        value: Value,
        links: Sequence[Link],
        residual: Value | None = None,
        alpha: float = 0.0,
        name: str = "convolution",
    ) -> Value:
        """Return the result of a chain's stages: the residual is added after the last bias.

        Axes of the stages are the last ones of the value.
        """
        for number, (stage, epilogue) in enumerate(links):
            is_last = number == len(links) - 1
            each = name if len(links) == 1 else f"{name}.{number}"
            value = self._stage(value, stage, epilogue, residual if is_last else None, alpha, each)
        return value

    def _stage(
        self,
        value: Value,
        stage: Stage,
        epilogue: Epilogue,
        residual: Value | None,
        alpha: float,
        name: str,
    ) -> Value:
        g = stage.geometry
        free = 3 - g.ndim

        def on_three(values: Sequence[int], neutral: int) -> Three:
            a, b, c = (*(neutral,) * free, *values)
            return a, b, c

        if stage.transposed:
            return self._transposed(value, stage, epilogue, residual, alpha, name)
        before, after = (on_three([p[i] for p in g.padding], 0) for i in range(2))
        if g.padding_mode != "zeros" and any((*before, *after)):
            if g.padding_mode == "constant" and g.value:
                raise Unsupported("padding with a constant other than zero")
            index = tuple(
                padded_indices(n, b, a, g.padding_mode, 1) if b or a else None
                for n, b, a in zip(value.size, before, after)
            )
            value = self.pad(value, before, after, index)  # type: ignore[arg-type]
            before = after = ZEROS
        weight = stage.weight.reshape(*stage.weight.shape[:2], *on_three(stage.kernel, 1))
        permutation = stage.channel_permutation() if stage.shuffle != (1, 1) else None
        spec = StageSpec(
            weight, stage.outer, stage.groups, stage.inner, on_three(g.stride, 1),
            on_three(g.dilation, 1), before, after, permutation, None, epilogue.bias,
            epilogue.activation,
        )  # fmt: skip
        return self.convolve(value, spec, residual, alpha, name)

    def _transposed(
        self,
        value: Value,
        stage: Stage,
        epilogue: Epilogue,
        residual: Value | None,
        alpha: float,
        name: str,
    ) -> Value:
        """Return a transposed convolution: one convolution for each phase of its stride.

        Output sample y of the uncropped result has phase y % s and sees input sample y // s - u
        through tap phase + s * u.
        """
        g, groups = stage.geometry, stage.groups
        if stage.shuffle != (1, 1):
            raise Unsupported("a transposed convolution with a channel shuffle")
        free = 3 - g.ndim
        ones, zeros = (1,) * free, (0,) * free
        o, c = stage.weight.shape[:2]
        w = stage.weight.reshape(groups, o // groups, c, *ones, *stage.kernel)
        w = w.swapaxes(1, 2).reshape(groups * c, o // groups, *ones, *stage.kernel)
        shape = stage.output_shape((value.shape[0], *value.size[free:]))
        size: Three = (*ones, *shape[1:])  # type: ignore[assignment]
        stride, dilation = (*ones, *g.stride), (*ones, *g.dilation)
        crop = (*zeros, *(b for b, _ in g.padding))
        result = None
        for phase in itertools.product(*map(range, stride)):
            taps, before, after, first, count = [], [], [], [], []
            for a in range(3):
                s, d, k = stride[a], dilation[a], w.shape[2 + a]
                used = [t for t in range(k) if (t * d - phase[a]) % s == 0]
                # Taps of a phase are s / gcd(s, d) apart, and read inputs d / gcd apart.
                step = dilation[a] // math.gcd(s, d)
                start = -(-(crop[a] - phase[a]) // s) if crop[a] > phase[a] else 0
                n = -(-(size[a] + crop[a] - phase[a]) // s) - start
                taps.append(used[::-1])
                reach = [(t * d - phase[a]) // s for t in used]
                lowest = start - max(reach, default=0)  # input of the first output's first tap
                highest = start + n - 1 - min(reach, default=0)
                before.append(-lowest)
                after.append(highest + 1 - value.size[a])
                first.append(start * s + phase[a] - crop[a])
                count.append(n)
                dilation_a = step if len(used) > 1 else 1
                taps[-1] = (taps[-1], dilation_a)
            if min(count) <= 0:
                continue
            kernel = w
            for a, (used, _) in enumerate(taps):
                kernel = (
                    kernel.take(used, axis=2 + a)
                    if used
                    else np.zeros_like(kernel.take([0], axis=2 + a))
                )
            spec = StageSpec(
                np.ascontiguousarray(kernel), stage.outer, groups, stage.inner, ONES,
                tuple(d for _, d in taps), tuple(before), tuple(after), None, None,  # type: ignore[arg-type]
                epilogue.bias, epilogue.activation,
            )  # fmt: skip
            part = self.convolve(
                value, spec, residual and _every(residual, first, stride, count), alpha, name
            )
            if result is None:
                result = Value(
                    (part.shape[0], *size), part.position, part.width, _Buffer(size, part.width)
                )
            _write_every(part, result, first, stride)
        assert result is not None
        return result

    def pool(
        self,
        value: Value,
        kind: Literal["max pool", "mean pool"],
        size: Three,
        taps: Three,
        stride: Three,
        before: Three,
        dilation: Three = ONES,
        count_padding: bool = False,
        name: str = "pool",
    ) -> Value:
        """Return maxima or means over windows; `size` is that of the output."""
        result = self._value((value.shape[0], *size), value.position, value.width)

        def make() -> Operation:
            return Operation(
                kind, name, _view(value), _view(result), None, size, value.size,
                **_rows(size), in_channels=value.width, channels=value.width, taps=taps,
                stride=stride, dilation=dilation, before=before, count_padding=count_padding,
            )  # fmt: skip

        self._add((value,), result, make, _Reach(taps, stride, dilation, before))
        return result

    def combine(
        self,
        value: Value,
        other: Value | None = None,
        mode: Literal["copy", "add", "multiply"] = "copy",
        activation: str = "none",
        alpha: float = 0.0,
        index: tuple[Any, Any, Any] = (None, None, None),
        size: Three | None = None,
        name: str = "",
    ) -> Value:
        """Return a value, its sum or its product with another of the same size or of one sample.

        `index` gives the input sample at each output sample along an axis; -1 is `alpha`.
        """
        result = self._value((value.shape[0], *(size or value.size)), value.position, value.width)
        other = self._like(other, result, broadcast=True)

        def make() -> Operation:
            return Operation(
                "combine", name or mode, _view(value), _view(result),
                None if other is None else _view(other, broadcast=other.size != result.size),
                result.size, value.size, **_rows(result.size), in_channels=value.width,
                channels=value.width, activation=activation, alpha=alpha, mode=mode, index=index,
            )  # fmt: skip

        reach = None if any(i is not None for i in index) else _Reach()
        self._add((value, *([other] if other else [])), result, make, reach)
        return result

    def permute(self, value: Value, permutation: Sequence[int]) -> Value:
        """Return a value whose channel j is channel permutation[j]: the same memory."""
        position = value.position[np.asarray(permutation)]
        value.has_alias = True
        return Value(value.shape, position, value.width, value.buffer, value.start)

    def concatenate(self, values: Sequence[Value], name: str = "concatenate") -> Value:
        """Return the channels of all values, one after another."""
        width = sum(v.width for v in values)
        buffer = _Buffer(values[0].size, width)
        start, positions, copies = 0, [], []
        for value in values:
            positions.append(value.position + start)
            if value.buffer.width == value.width and self._can_move(value):
                value.buffer, value.start = buffer, start  # its operation writes here
            else:
                copies.append((value, start))
            start += value.width
        result = Value(
            (sum(v.shape[0] for v in values), *values[0].size),
            np.concatenate(positions), width, buffer,
        )  # fmt: skip
        for value, start in copies:
            part = Value(value.shape, value.position, value.width, buffer, start)

            def make(value: Value = value, part: Value = part) -> Operation:
                return Operation(
                    "combine", name, _view(value), _view(part), None, value.size, value.size,
                    **_rows(value.size), in_channels=value.width, channels=value.width,
                )  # fmt: skip

            self._add((value,), part, make)
        return result

    def _like(self, value: Value | None, result: Value, broadcast: bool = False) -> Value | None:
        """Return an operand with its channels in the places that those of `result` have."""
        if value is None:
            return None
        sizes = {result.size, ONES} if broadcast else {result.size}
        if value.shape[0] != result.shape[0] or value.size not in sizes:
            raise ValueError(
                f"an operand of shape {value.shape} does not fit a result of {result.shape}"
            )
        if np.array_equal(value.position, result.position):
            return value
        reordered = self._value(value.shape, result.position, result.width)
        self._reorder(value, value.position, reordered, "reorder")
        return reordered

    def _reorder(self, value: Value, channels: Array, result: Value, name: str) -> None:
        """Copy channels, given as places in the samples of a value, to those of a result."""
        channel = np.full(result.width, -1, np.int32)
        channel[result.position] = channels

        def make() -> Operation:
            return Operation(
                "combine", name, _view(value), _view(result), None, value.size, value.size,
                **_rows(value.size), in_channels=value.width, channels=result.width,
                mode="reorder", channel=channel.tolist(),
            )  # fmt: skip

        self._add((value,), result, make)

    def depth_to_space(self, value: Value, channels: Array, name: str = "depth to space") -> Value:
        """Return a block of samples in place of each sample.

        `channels` has the input channels of each sample of a block, (d, h, w, out).
        """
        *block, out = channels.shape
        d, h, w = (n * b for n, b in zip(value.size, block))
        result = self._identity((out, d, h, w))
        for place in np.ndindex(*block):
            part = self._identity((out, *value.size))
            _write_every(part, result, place, tuple(block))
            self._reorder(value, value.position[channels[place]], part, name)
        return result

    def pad(self, value: Value, before: Three, after: Three, index: tuple[Any, Any, Any]) -> Value:
        """Return a padded value: `index` gives the source of each sample, or -1 for zero."""
        size = tuple(b + n + a for b, n, a in zip(before, value.size, after))
        return self.combine(value, size=size, index=index, name="pad")  # type: ignore[arg-type]

    def build(self, group: int | None = None, names: Sequence[str] = ()) -> Program:
        """Return the program."""
        segments = self._segments()
        arena = self._place(1, segments)
        if group is None:
            weights = sum(node.weights for node in self.nodes)
            fitting = MAX_ARENA // max(1, arena * self.dtype.itemsize)
            shares = weights > GROUP_WEIGHTS * _core.caches()[1]
            group = max(1, min(MAX_GROUP, fitting)) if shares else 1
        arena = self._place(group, segments)
        self.in_bands = {
            self.nodes[i].output for a, b, bands in segments if bands > 1 for i in range(a, b)
        }
        operations = [node.make() for node in self.nodes]
        steps = self._steps(operations, segments, group)
        core = _core.Program(
            operations, steps, self.arrays, self.outputs, arena=arena, group=group,
            dtype=self.dtype.name, isa=self.isa, names=names,
        )  # fmt: skip
        return Program(core, tuple(operations), arena * self.dtype.itemsize)

    def _segments(self) -> list[tuple[int, int, int]]:
        """Return (first, end, bands): operations that run by bands of one axis, in turns.

        Bands keep what one operation writes in L2 until the next reads it.  They pay if buffers
        exceed L2, and if the weights, which every band reads again, do not.
        """
        _, l2, _ = _core.caches()
        segments, first = [], 0
        while first < len(self.nodes):
            end, weights, bands = first + 1, self.nodes[first].weights, 1
            axis = _band_axis(self.nodes[first].size)
            while end < len(self.nodes) and self.nodes[first].reach is not None:
                node = self.nodes[end]
                weights += node.weights
                sizes = [v.size for v in node.inputs]
                if (
                    node.reach is None
                    or weights > BAND_WEIGHTS * l2
                    or axis == 2  # rows of packing are whole
                    or _band_axis(node.size) != axis
                    or any(_band_axis(s) != axis for s in sizes)
                    or any(v.step != ONES for v in (*node.inputs, node.output) if v is not None)
                ):
                    break
                end += 1
            written = [n.output for n in self.nodes[first:end] if n.output is not None]
            most = max((v.buffer.elements for v in written), default=0) * self.dtype.itemsize
            bands = -(-int(most) // max(1, int(BAND_BYTES * l2)))
            if end - first < 2 or bands < 2:
                end, bands = first + 1, 1
            segments.append((first, end, bands))
            first = end
        return segments

    def _steps(
        self,
        operations: Sequence[Operation],
        segments: Sequence[tuple[int, int, int]],
        group: int,
    ) -> list[tuple[int, int, int, int, int]]:
        """Return (operation, first unit, end, first image, end) in the order in which they run.

        Images of a group run one after another while their samples fill L2, and together where
        several fit, so that weights in L2 serve all of them.
        """
        together = [self._images_together(segment, group) for segment in segments]
        steps = []
        for images, run in itertools.groupby(range(len(segments)), key=together.__getitem__):
            parts = [p for k in run for p in self._segment_steps(operations, segments[k])]
            for image in range(0, group, images):
                steps += [(*part, image, min(image + images, group)) for part in parts]
        return steps

    def _images_together(self, segment: tuple[int, int, int], group: int) -> int:
        first, end, bands = segment
        if group == 1 or bands > 1:
            return 1
        _, l2, _ = _core.caches()
        most = 0
        for node in self.nodes[first:end]:
            values = (*node.inputs, *([node.output] if node.output else []))
            most = max(most, sum(v.buffer.elements for v in values) * self.dtype.itemsize)
        fitting = max(1, int(GROUP_BYTES * l2 / most))
        return min(group, 1 << (fitting.bit_length() - 1))

    def _segment_steps(
        self, operations: Sequence[Operation], segment: tuple[int, int, int]
    ) -> list[tuple[int, int, int]]:
        first, end, bands = segment
        if bands == 1:
            return [(first, 0, operations[first].work_units)]
        axis = _band_axis(self.nodes[first].size)
        done = dict.fromkeys(range(first, end), 0)
        steps = []
        for band in range(1, bands + 1):
            needed = self._needed(first, end, axis, band, bands)
            for i in range(first, end):
                op = operations[i]
                per = op.work_units // op.units[axis] if op.units[axis] else 0
                tile = self.nodes[i].tile[axis] if op.kind == "winograd" else op.unit[axis]
                units = min(op.units[axis], -(-needed[i] // tile))
                if units > done[i]:
                    steps.append((i, done[i] * per, units * per))
                    done[i] = units
        return steps

    def _needed(self, first: int, end: int, axis: int, band: int, bands: int) -> dict[int, int]:
        """Return the outputs of each operation that the first `band` bands of the last ones need."""
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
                outputs = min(user.size[axis], -(-needed[j] // tile) * tile)
                reach = user.reach if k == 0 and user.reach is not None else _Reach()
                needed[i] = max(needed[i], reach.end(axis, outputs, n) if outputs else 0)
        return needed

    def _array(self, shape: Ints) -> int:
        self.arrays.append(tuple(shape))
        return len(self.arrays) - 1

    def _add(
        self, inputs: tuple[Value, ...], output: Value | None, make: Any, *details: Any
    ) -> None:
        node = _Node(inputs, output, make, *details)
        if not node.cost:
            value = output or inputs[0]
            node = node._replace(cost=MOVE_COST * self._vectors(value))
        self.nodes.append(node)

    def _vectors(self, value: Value) -> float:
        return math.prod(value.size) * value.width / self.limits.lanes

    @property
    def cost(self) -> float:
        """Estimated time of one example, in FMAs of a vector."""
        return sum(node.cost for node in self.nodes)

    def _can_move(self, value: Value) -> bool:
        """Return whether a value can be written elsewhere: nothing else uses its buffer yet."""
        writes = [n for n in self.nodes if n.output is not None and n.output.buffer is value.buffer]
        reads = [n for n in self.nodes if any(v.buffer is value.buffer for v in n.inputs)]
        return len(writes) == 1 and writes[0].output is value and not reads and not value.has_alias

    def _identity(self, shape: Ints) -> Value:
        return self._value(shape, np.arange(shape[0]), shape[0])

    def _value(self, shape: Ints, position: Array, width: int) -> Value:
        _, d, h, w = shape
        width = _round_up(width, self.limits.lanes)
        return Value(tuple(shape), position, width, _Buffer((d, h, w), width))

    def _transfer(self, kind: str, value: Value, number: int) -> Operation:
        channel = np.full(value.width, -1, np.int32)
        channel[value.position] = np.arange(value.shape[0])
        d, h, w = value.size
        return Operation(
            kind, kind, size=value.size, unit=(1, 1, w), units=(d, h, 1), channels=value.width,
            channel=channel.tolist(), array=number,
        )  # fmt: skip

    def _bias(self, spec: StageSpec, result: Value) -> Array:
        bias = np.zeros(result.width + VECTOR_OVERHANG, self.dtype)
        if spec.bias is not None:
            bias[result.position] = spec.bias
        return bias

    def _depthwise(
        self,
        value: Value,
        spec: StageSpec,
        size: Three,
        multiplier: int,
        residual: Value | None,
        alpha: float,
        name: str,
    ) -> Value:
        """Convolve each channel alone: a copy of the input's layout for each of its outputs."""
        channels = value.shape[0]
        copies = value.position + value.width * np.arange(multiplier)[:, None]
        # (outer, group, inner, multiplier) -> (outer, group, multiplier, inner)
        position = copies.T.reshape(spec.outer, spec.groups, spec.inner, multiplier)
        position = position.swapaxes(2, 3).reshape(-1)
        result = self._value((channels * multiplier, *size), position, value.width * multiplier)
        residual = self._like(residual, result)
        _grow_halo(value, spec, size, ZEROS)
        vectors = value.buffer.width // self.limits.lanes
        if vectors >= 4 and vectors % 2 == 0:
            value.buffer.gap = self.limits.lanes

        def make() -> Operation:
            per_group = spec.weight.reshape(1, spec.groups, 1, multiplier, -1)
            shape = (spec.outer, spec.groups, spec.inner, multiplier, per_group.shape[-1])
            each = np.broadcast_to(per_group, shape).reshape(channels, multiplier, -1)
            weight = np.zeros((multiplier, each.shape[-1], value.width), self.dtype)
            weight[:, :, value.position] = each.transpose(1, 2, 0)
            return Operation(
                "depthwise", name, _view(value, spec), _view(result), _optional_view(residual),
                size, value.size, **_rows(size), in_channels=value.width, channels=result.width,
                taps=spec.kernel, tap=_tap_pitch(value, spec), stride=spec.stride,
                activation=spec.activation, alpha=alpha, multiplier=multiplier, weight=weight,
                bias=self._bias(spec, result),
                macs=channels * multiplier * math.prod(size) * math.prod(spec.kernel),
            )  # fmt: skip

        reach = _Reach(spec.kernel, spec.stride, spec.dilation, spec.before)
        slides = spec.stride[2] == spec.dilation[2] == 1 and spec.kernel[2] in (3, 5, 7)
        per_tap = DEPTHWISE_COST[0 if slides else 1]
        cost = self._vectors(result) * (per_tap * math.prod(spec.kernel) + OUTPUT_COST)
        self._add((value, *([residual] if residual else [])), result, make, reach, 0, ONES, cost)
        return result

    def _choose_algorithm(self, spec: StageSpec, value: Value, result: Value) -> tuple[Ints, float]:
        """Return the number of the algorithm along each axis, and its predicted error."""
        if self.algorithm == "direct":
            return ZEROS, 0.0
        best, best_error, least = ZEROS, 0.0, direct_cost(spec, result, self)
        for candidate in _algorithms(spec):
            error = predicted_error(candidate, spec.weight.shape[1], self.dtype)
            if error > MAX_ERROR:
                continue
            cost = winograd_cost(candidate, spec, value, result, self)
            if cost < least:
                best, best_error, least = candidate, error, cost
        return best, best_error

    def _dense(
        self,
        value: Value,
        spec: StageSpec,
        result: Value,
        residual: Value | None,
        alpha: float,
        name: str,
        algorithm: Ints,
        error: float,
    ) -> Operation:
        lanes, vectors = self.limits.lanes, self.limits.vectors
        rows, per_group = spec.weight.shape[:2]
        outs, groups = rows // spec.groups, spec.groups
        tap_pitch = _tap_pitch(value, spec)
        is_fast = any(algorithm)
        taps = np.zeros(1, np.int64)
        if not is_fast:
            for n, pitch in zip(spec.kernel, tap_pitch):
                taps = np.add.outer(taps, np.arange(n) * pitch).reshape(-1)
        copies = spec.outer, groups, spec.inner
        channels = value.position.reshape(spec.outer, groups, per_group, spec.inner)
        terms = len(taps) * per_group
        if is_fast:
            transformed = transform_weight(spec.weight, algorithm)
            positions = transformed.shape[2]
            matrix = transformed.reshape(groups, outs, per_group, positions)
            matrix = matrix.transpose(0, 3, 2, 1)  # (group, position, in, out)
        else:
            positions = 1
            matrix = spec.weight.reshape(groups, outs, per_group, -1).astype(self.dtype)
            # Terms in the order of kernels on planes, so that both give the same bits.
            matrix = matrix.transpose(0, 2, 3, 1).reshape(groups, 1, terms, outs)
        packed, starts, at = [], {}, 0
        for g in range(groups):
            for o in range(0, outs, vectors * lanes):
                n = min(vectors, -(-(outs - o) // lanes))
                block = np.zeros((positions, terms, n * lanes), self.dtype)
                columns = matrix[g, :, :, o : o + n * lanes]
                block[:, :, : columns.shape[2]] = columns
                packed.append(block.reshape(-1))
                starts[g, o] = at
                at += block.size
        blocks, offsets, tables = [], [], {}
        for number, (l, g, r) in enumerate(itertools.product(*map(range, copies))):
            table = np.add.outer(channels[l, g, :, r], taps).reshape(-1)
            start = tables.setdefault(table.tobytes(), len(offsets))
            if start == len(offsets):
                offsets += table.tolist()
            for o in range(0, outs, vectors * lanes):
                n = min(vectors, -(-(outs - o) // lanes))
                blocks.append((n, number * outs + o, start, starts[g, o]))
        _, l2, _ = _core.caches()
        widest = max(b[0] for b in blocks) * lanes * self.dtype.itemsize
        terms_block = max(64, int(L2_WEIGHTS * l2 / widest))
        common = dict(
            other=_optional_view(residual), size=result.size, in_size=value.size,
            in_channels=value.width, channels=result.width, activation=spec.activation, alpha=alpha,
            terms=terms, terms_block=terms_block, blocks=blocks, offsets=offsets,
            splits=len(blocks) if outs % lanes == 0 or len(blocks) == 1 or math.prod(copies) == 1 else 1,
            weight=np.concatenate(packed), bias=self._bias(spec, result),
            macs=math.prod(result.shape) * per_group * math.prod(spec.kernel), taps=spec.kernel,
        )  # fmt: skip
        if not is_fast:
            views = {"input": _view(value, spec), "output": _view(result)}
            operation = Operation("dense", name, **views, **_rows(result.size), **common)
            return operation if result in self.in_bands else _join_rows(operation, value.size)
        units = tile_counts(algorithm, spec.dilation, result.size)
        return Operation(
            "winograd", name, _view(value, spec), _view(result), tap=tap_pitch, units=units,
            dilation=spec.dilation, algorithm=algorithm, error=error,
            tiles=_tiles_at_once(units, positions, value.width, self), **common,
        )  # fmt: skip

    def _place(self, group: int, segments: Sequence[tuple[int, int, int]]) -> int:
        """Give every buffer a place in the arena; return the elements of the arena."""
        # Operations of a segment take turns: all its buffers are in use at the same time.
        turn = {i: n for n, (a, b, _) in enumerate(segments) for i in range(a, b)}
        buffers: dict[int, _Buffer] = {}
        for node in self.nodes:
            for value in (*node.inputs, *([node.output] if node.output else [])):
                value.buffer.first = -1
        for i, node in enumerate(self.nodes):
            for value in (*node.inputs, *([node.output] if node.output else [])):
                buffer = value.buffer
                buffers.setdefault(id(buffer), buffer)
                buffer.first = turn[i] if buffer.first < 0 else buffer.first
                buffer.last = turn[i]
        arena = 0
        free: dict[object, list[int]] = {}
        ends: dict[int, list[_Buffer]] = {}
        starts: dict[int, list[_Buffer]] = {}
        for buffer in buffers.values():
            starts.setdefault(buffer.first, []).append(buffer)
            ends.setdefault(buffer.last, []).append(buffer)
        for i in range(len(segments)):
            for buffer in starts.get(i, ()):
                waiting = free.get(buffer.key)
                if waiting:
                    buffer.offset = waiting.pop()
                    continue
                buffer.offset = arena
                arena += _round_up(group * buffer.elements, 16)
            for buffer in ends.get(i, ()):
                free.setdefault(buffer.key, []).append(buffer.offset)
        return arena


@dataclass(frozen=True, eq=False)
class Program:
    """A program for one shape of its inputs."""

    core: Any
    operations: tuple[Operation, ...]
    arena_bytes: int

    def __call__(self, inputs: Sequence[Array], outputs: Sequence[Array], threads: int) -> None:
        """Run on arrays (batch, channels, d, h, w)."""
        self.core([*inputs, *outputs], threads)


def transform_weight(weight: Array, algorithm: Ints) -> Array:
    """Return G g along all axes, (rows, in, positions), computed in float64."""
    transformed = weight.astype(np.float64)
    for axis, number in enumerate(algorithm, start=2):
        if number:
            g = np.array(toom_cook.matrices(*toom_cook.ALGORITHMS[number - 1]).g, np.float64)
            transformed = np.moveaxis(np.tensordot(transformed, g, (axis, 1)), -1, axis)
    return transformed.reshape(*weight.shape[:2], -1)


def predicted_error(algorithm: Ints, channels: int, dtype: Any) -> float:
    """Predict the relative RMS error of a fast algorithm, for white inputs and weights.

    Every product carries the rounding of its two transforms (two roundings per axis each), and a
    sum over n channels adds sqrt(n / 6) roundings; the algorithm amplifies both.
    """
    gain, axes = 1.0, 0
    for number in algorithm:
        if number:
            gain *= toom_cook.error_gain(*toom_cook.ALGORITHMS[number - 1])
            axes += 1
    unit = np.finfo(dtype).eps / 2
    return float(unit * gain * math.sqrt(channels / 6 + 4 * axes))


def _algorithms(spec: StageSpec) -> list[Ints]:
    """Return the fast algorithms of a stage: the same number of outputs along all axes."""
    if spec.stride != ONES or not any(k > 1 for k in spec.kernel):
        return []
    found = []
    for outputs in (2, 4, 6):
        numbers = []
        for taps in spec.kernel:
            pair = (outputs, taps)
            if taps == 1:
                numbers.append(0)
            elif pair in toom_cook.ALGORITHMS:
                numbers.append(1 + toom_cook.ALGORITHMS.index(pair))
            else:
                break
        if len(numbers) == 3:
            found.append(tuple(numbers))
    return found


def _shape_of(number: int) -> tuple[int, int]:
    """Return the outputs and taps of an algorithm; 1 and 1 for none."""
    return toom_cook.ALGORITHMS[number - 1] if number else (1, 1)


def tile_counts(algorithm: Ints, dilation: Ints, size: Ints) -> Three:
    """Return the number of tiles along each axis; each phase of a dilation has its own."""
    counts = []
    for number, d, n in zip(algorithm, dilation, size):
        outputs, _ = _shape_of(number)
        # Tile i has phase i % d; the last round may have tiles that start beyond the output.
        per_phase = -(-(-(-n // d)) // outputs)
        counts.append(min(n, d) * per_phase if number else n)
    a, b, c = counts
    return a, b, c


def direct_cost(spec: StageSpec, result: Value, builder: ProgramBuilder) -> float:
    """Estimate the cycles of a direct convolution."""
    lanes = builder.limits.lanes
    groups = spec.outer * spec.groups * spec.inner
    vectors = groups * -(-(len(spec.weight) // spec.groups) // lanes)
    return math.prod(result.size) * vectors * math.prod(spec.weight.shape[1:])


def winograd_cost(
    algorithm: Ints, spec: StageSpec, value: Value, result: Value, builder: ProgramBuilder
) -> float:
    """Estimate the cycles of a fast convolution, in FMAs."""
    lanes = builder.limits.lanes
    groups = spec.outer * spec.groups * spec.inner
    vectors = groups * -(-(len(spec.weight) // spec.groups) // lanes)
    shapes = [_shape_of(n) for n in algorithm]
    positions = math.prod(m + r - 1 for m, r in shapes)
    tiles = math.prod(tile_counts(algorithm, spec.dilation, result.size))
    axes = sum(n > 0 for n in algorithm)
    products = positions * tiles * vectors * spec.weight.shape[1]
    transforms = positions * tiles * (value.width + result.width) / lanes * (1 + 1.5 * axes)
    weights = positions * spec.weight.shape[0] * spec.weight.shape[1] / lanes
    return products + 2 * transforms + 4 * weights


def _tiles_at_once(units: Ints, positions: int, width: int, builder: ProgramBuilder) -> int:
    """Return the tiles of a block: whole blocks of pixels, whose inputs stay in L2."""
    _, l2, _ = _core.caches()
    fitting = L2_TILES * l2 / (positions * width * builder.dtype.itemsize)
    most = builder.limits.pixels[-1]
    return max(most, int(min(fitting, 8 * most)) // most * most)


def _band_axis(size: Ints) -> int:
    """Return the first axis with more than one sample, along which bands lie."""
    return next((a for a, n in enumerate(size) if n > 1), 2)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rows(size: Three, most: int = ROW) -> dict[str, Any]:
    """Return units of rows, or parts of rows longer than `most`."""
    d, h, w = size
    parts = -(-w // most)
    return {"unit": (1, 1, -(-w // parts)), "units": (d, h, parts)}


def _join_rows(op: Operation, in_size: Three) -> Operation:
    """Return a pointwise operation with all samples in one row, if no gaps lie between rows.

    Short rows leave micro-kernels with few pixels, for which they load all weights.
    """
    views = [op.input, op.output, *([op.other] if op.other else [])]
    d, h, w = op.size
    has_gaps = any(v[2][1] != w * v[2][2] or v[2][0] != h * w * v[2][2] for v in views)
    if op.taps != ONES or in_size != op.size or has_gaps:
        return op
    size = 1, 1, d * h * w
    return op._replace(size=size, **_rows(size, JOINED_ROW))


def _view(
    value: Value, spec: StageSpec | None = None, broadcast: bool = False
) -> tuple[int, int, Ints]:
    """Return where samples of a value are: of its own, or the first tap of a stage's outputs."""
    buffer = value.buffer
    pitch = tuple(p * s for p, s in zip(buffer.pitch, value.step))
    origin = buffer.offset + value.start
    origin += sum(f * p for f, p in zip(value.first, buffer.pitch))
    shift = buffer.before if spec is None else [h - b for h, b in zip(buffer.before, spec.before)]
    origin += sum(s * p for s, p in zip(shift, buffer.pitch))
    stride = ONES if spec is None else spec.stride
    steps = ZEROS if broadcast else tuple(p * s for p, s in zip(pitch, stride))
    return origin, buffer.elements, steps


def _every(value: Value, first: Ints, step: Ints, size: Ints) -> Value:
    """Return every step-th sample of a value, as a value of the same memory."""
    return replace(value, shape=(value.shape[0], *size), first=tuple(first), step=tuple(step))


def _write_every(value: Value, result: Value, first: Ints, step: Ints) -> None:
    """Let the operation of `value` write to every step-th sample of `result`."""
    value.buffer, value.first, value.step = result.buffer, tuple(first), tuple(step)


def _optional_view(value: Value | None) -> tuple[int, int, Ints] | None:
    return None if value is None else _view(value)


def _tap_pitch(value: Value, spec: StageSpec) -> Three:
    a, b, c = (p * d for p, d in zip(value.buffer.pitch, spec.dilation))
    return a, b, c


def _grow_halo(value: Value, spec: StageSpec, size: Three, algorithm: Ints) -> None:
    """Make the halo of a value's buffer large enough for a stage, and for its last tiles."""
    buffer = value.buffer
    for a in range(3):
        m, r = _shape_of(algorithm[a])
        d, k = spec.dilation[a], spec.kernel[a]
        reach = (size[a] - 1) * spec.stride[a] + d * (k - 1)
        if algorithm[a]:
            tiles = tile_counts(algorithm, spec.dilation, size)[a]
            phases = min(size[a], d)
            reach = max(
                i % d + (i // d * m + m + r - 2) * d for i in range(max(0, tiles - phases), tiles)
            )
        buffer.before[a] = max(buffer.before[a], spec.before[a])
        buffer.after[a] = max(buffer.after[a], reach + 1 - spec.before[a] - value.size[a])
