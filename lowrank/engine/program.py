"""Programs: chains and whole networks as operations on channels-last buffers in one arena.

A :class:`ProgramBuilder` takes operations on values in the order in which they run; ``build``
chooses buffers, halos and algorithms and makes the C engine's program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from lowrank._kernels import _core
from lowrank._kernels.layout import output_size
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import Algorithm as Algorithm
from lowrank.engine.algorithms import choose_algorithm, has_few_outputs
from lowrank.engine.buffers import ONES, ZEROS, Buffer, round_up
from lowrank.engine.buffers import Value as Value
from lowrank.engine.convolutions import (
    Convolution,
    dense_layout,
    depthwise_layout,
    has_depthwise_kernel,
)
from lowrank.engine.costs import COST_SECONDS, Counts, add_counts, default_cost
from lowrank.engine.machine import least_saving
from lowrank.engine.operations import Operation as Operation
from lowrank.engine.operations import join_rows, make_operation, reorder, transfer
from lowrank.engine.padding import padded_indices
from lowrank.engine.schedule import Node, Reach, Schedule
from lowrank.engine.stages import on_three_axes, stage_padding, stage_spec, transposed_phases

Link = tuple[Stage, Epilogue]


class Unsupported(ValueError):
    """A program has no operation for something; the message says for what."""


@dataclass(frozen=True, eq=False)
class Program:
    """A program for one shape of its inputs."""

    core: _core.Program
    operations: tuple[Operation, ...]
    repackers: tuple[Callable[[], None], ...] = ()

    def repack(self) -> None:
        """Pack the weights of all stages again, whose memory has changed."""
        for repack in self.repackers:
            repack()

    def __call__(self, inputs: Sequence[Array], outputs: Sequence[Array], threads: int) -> None:
        """Run on arrays (batch, channels, d, h, w)."""
        self.core([*inputs, *outputs], threads)


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
        self.nodes: list[Node] = []
        self.arrays: list[Ints] = []
        self.outputs: list[int] = []

    @property
    def counts(self) -> Counts:
        """Counts of one example, of all nodes together."""
        each = [node.make_counts() for node in self.nodes]
        return add_counts([*each, {"step": len(each)}])

    @property
    def seconds(self) -> float:
        """Estimated seconds of one example on one thread, to tell small from large."""
        return default_cost(self.counts) * COST_SECONDS

    def input(self, shape: Ints) -> Value:
        """Return the value of a new input array, (batch, *shape)."""
        value = self._value(shape)
        number = self._array(shape)
        self._transfer("pack", (), value, value, number)
        return value

    def output(self, value: Value) -> None:
        """Write a value to a new output array."""
        number = self._array(value.shape)
        self.outputs.append(number)
        self._transfer("unpack", (value,), None, value, number)

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
        shape = (spec.outer * len(spec.weight) * spec.inner, *output_size(spec, value.size))
        algorithm: Ints = ZEROS
        error, is_few = 0.0, False
        if has_depthwise_kernel(spec):
            result = self._value(shape, *depthwise_layout(spec, value))
        else:
            result = self._value(shape, *dense_layout(spec, self.limits.lanes))
            algorithm, error = self._choose_algorithm(spec, value, result)
            if self.algorithm == "auto" and not any(algorithm):
                # Sums over lanes have another order than direct sums elsewhere.
                itemsize = self.dtype.itemsize
                is_few = has_few_outputs(spec, value, result, self.limits, itemsize)
        residual = self._like(residual, result)
        convolution = Convolution(
            name, spec, value, result, residual, alpha, self.dtype, self.limits, algorithm, error,
            is_few,
        )  # fmt: skip
        self.nodes.append(convolution.make_node())
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
            add = self._transposed if stage.transposed else self._stage
            value = add(value, stage, epilogue, residual if is_last else None, alpha, each)
        return value

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
            return make_operation(
                kind, name, value, result, taps=taps, stride=stride, dilation=dilation,
                before=before, count_padding=count_padding,
            )  # fmt: skip

        self._move((value,), result, make, Reach(taps, stride, dilation, before))
        return result

    def normalize(
        self,
        value: Value,
        weight: Array,
        bias: Array,
        epsilon: float,
        residual: Value | None = None,
        activation: str = "none",
        alpha: float = 0.0,
        name: str = "normalize",
    ) -> Value:
        """Return a value with zero mean and unit variance per channel, times weight, plus bias."""
        result = self._value(value.shape, value.position, value.width)
        residual = self._like(residual, result)
        vectors = value.width // self.limits.lanes

        def make() -> Operation:
            scale, shift = (np.zeros(value.width, self.dtype) for _ in range(2))
            scale[value.position], shift[value.position] = weight, bias
            operation = make_operation(
                "normalize", name, value, result, other=residual and residual.view(),
                weight=scale, bias=shift, epsilon=epsilon, activation=activation, alpha=alpha,
            )  # fmt: skip
            return replace(operation, unit=ONES, units=(1, 1, vectors))

        self._move((value, *([residual] if residual else [])), result, make, None)
        return result

    def softmax(self, value: Value, name: str = "softmax") -> Value:
        """Return exp(x - max) over its sum, over the channels of every sample."""
        result = self._value(value.shape, value.position, value.width)

        def make() -> Operation:
            mask = np.zeros(value.width, f"i{self.dtype.itemsize}")
            mask[value.position] = -1
            return make_operation("softmax", name, value, result, mask=mask.view(self.dtype))

        self._move((value,), result, make)
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
            operand = None
            if other is not None:
                operand = other.view(broadcast=other.size != result.size)
            return make_operation(
                "combine", name or mode, value, result, other=operand, activation=activation,
                alpha=alpha, mode=mode, index=index,
            )  # fmt: skip

        reach = None if any(i is not None for i in index) else Reach()
        self._move((value, *([other] if other else [])), result, make, reach)
        return result

    def permute(self, value: Value, permutation: Sequence[int]) -> Value:
        """Return a value whose channel j is channel permutation[j]: the same memory."""
        position = value.position[np.asarray(permutation)]
        value.has_alias = True
        return Value(value.shape, position, value.width, value.buffer, value.start)

    def concatenate(self, values: Sequence[Value], name: str = "concatenate") -> Value:
        """Return the channels of all values, one after another."""
        width = sum(v.width for v in values)
        buffer = Buffer(values[0].size, width)
        start, positions, copies = 0, [], []
        for value in values:
            positions.append(value.position + start)
            if value.buffer.width == value.width and self._can_move(value):
                value.buffer, value.start = buffer, start  # its operation writes here
                value.has_alias = True
            else:
                part = Value(value.shape, value.position, value.width, buffer, start)
                copies.append((value, part))
            start += value.width
        for value, part in copies:

            def make(value: Value = value, part: Value = part) -> Operation:
                return make_operation("combine", name, value, part)

            self._move((value,), part, make)
        shape = (sum(v.shape[0] for v in values), *values[0].size)
        return Value(shape, np.concatenate(positions), width, buffer)

    def depth_to_space(self, value: Value, channels: Array, name: str = "depth to space") -> Value:
        """Return a block of samples in place of each sample.

        `channels` has the input channels of each sample of a block, (d, h, w, out).
        """
        *block, out = channels.shape
        result = self._value((out, *(n * b for n, b in zip(value.size, block))))
        for place in np.ndindex(*block):
            part = self._value((out, *value.size))
            part.move_to_every(result, place, tuple(block))
            self._reorder(value, value.position[channels[place]], part, name)
        return result

    def pad(self, value: Value, before: Three, after: Three, index: tuple[Any, Any, Any]) -> Value:
        """Return a padded value: `index` gives the source of each sample, or -1 for zero."""
        d, h, w = (b + n + a for b, n, a in zip(before, value.size, after))
        return self.combine(value, size=(d, h, w), index=index, name="pad")

    def build(
        self,
        group: int | None = None,
        names: Sequence[str] = (),
        fork_join: float | None = None,
    ) -> Program:
        """Return the program.

        Parameters
        ----------
        group : int, optional
            Number of images that run as a group and share weights.
        names : sequence of str, optional
            Names of the arrays in error messages, in the order of their numbers.
        fork_join : float, optional
            Seconds that several threads must save to run; default: three fork/join latencies.
        """
        itemsize = self.dtype.itemsize
        schedule = Schedule(self.nodes, itemsize, group)
        operations = [node.make() for node in self.nodes]
        for first, _, bands in schedule.segments:
            if bands == 1:
                operations[first] = join_rows(operations[first])
        core = _core.Program(
            operations, schedule.steps(operations), self.arrays, self.outputs,
            arena=schedule.arena, group=schedule.group, dtype=self.dtype.name, isa=self.isa,
            names=names, seconds=self.seconds,
            fork_join=least_saving() if fork_join is None else fork_join,
        )  # fmt: skip
        repackers = tuple(
            partial(node.repack, operation)
            for node, operation in zip(self.nodes, operations)
            if node.repack is not None
        )
        return Program(core, tuple(operations), repackers)

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
        before, after = stage_padding(stage)
        is_padded = g.padding_mode != "zeros" and any((*before, *after))
        if is_padded:
            if g.padding_mode == "constant" and g.value:
                raise Unsupported("padding with a constant other than zero")
            d, h, w = (
                padded_indices(n, b, a, g.padding_mode, 1) if b or a else None
                for n, b, a in zip(value.size, before, after)
            )
            value = self.pad(value, before, after, (d, h, w))
        return self.convolve(value, stage_spec(stage, epilogue, is_padded), residual, alpha, name)

    def _transposed(
        self,
        value: Value,
        stage: Stage,
        epilogue: Epilogue,
        residual: Value | None,
        alpha: float,
        name: str,
    ) -> Value:
        if stage.shuffle != (1, 1):
            raise Unsupported("a transposed convolution with a channel shuffle")
        g = stage.geometry
        channels, *size = stage.output_shape((value.shape[0], *value.size[3 - g.ndim :]))
        step, (d, h, w) = on_three_axes(g.stride, 1), on_three_axes(size, 1)
        result = None
        for spec, first, count in transposed_phases(stage, epilogue, value.size, (d, h, w)):
            operand = residual and residual.every(first, step, count)
            part = self.convolve(value, spec, operand, alpha, name)
            if result is None:
                result = self._value((channels, d, h, w), part.position, part.width)
            part.move_to_every(result, first, step)
        assert result is not None
        return result

    def _choose_algorithm(self, spec: StageSpec, value: Value, result: Value) -> tuple[Ints, float]:
        """Return the number of the algorithm along each axis, and its predicted error."""
        if self.algorithm == "direct":
            return ZEROS, 0.0
        return choose_algorithm(spec, value, result, self.limits, self.dtype)

    def _like(self, value: Value | None, result: Value, broadcast: bool = False) -> Value | None:
        """Return an operand with its channels in the places that those of `result` have."""
        if value is None:
            return None
        sizes = {result.size, ONES} if broadcast else {result.size}
        if value.shape[0] != result.shape[0] or value.size not in sizes:
            raise ValueError(
                f"an operand of shape {value.shape} does not fit a result of {result.shape}"
            )
        if value.width == result.width and np.array_equal(value.position, result.position):
            return value
        reordered = self._value(value.shape, result.position, result.width)
        self._reorder(value, value.position, reordered, "reorder")
        return reordered

    def _reorder(self, value: Value, channels: Array, result: Value, name: str) -> None:
        """Copy channels, given as places in the samples of a value, to those of a result."""
        self._move((value,), result, lambda: reorder(value, channels, result, name))

    def _array(self, shape: Ints) -> int:
        """Return the number of a new array."""
        self.arrays.append(tuple(shape))
        return len(self.arrays) - 1

    def _move(
        self,
        inputs: tuple[Value, ...],
        output: Value | None,
        make: Callable[[], Operation],
        reach: Reach | None = Reach(),  # noqa: B008 - immutable
    ) -> None:
        """Add a node that moves data, without MACs."""
        moved = {"move": (output or inputs[0]).vectors(self.limits.lanes)}
        self.nodes.append(Node(inputs, output, make, reach, make_counts=lambda: moved))

    def _transfer(
        self,
        kind: Literal["pack", "unpack"],
        inputs: tuple[Value, ...],
        output: Value | None,
        value: Value,
        array: int,
    ) -> None:
        """Add a node that reads a value from an array, or writes it to one."""
        splits = value.width // self.limits.lanes
        self._move(inputs, output, lambda: transfer(kind, value, array, splits))
        self.nodes[-1] = self.nodes[-1]._replace(splits=splits, is_channelwise=splits > 1)

    def _can_move(self, value: Value) -> bool:
        """Return whether a value can be written elsewhere: nothing else uses its buffer yet."""
        writes = [n for n in self.nodes if n.output is not None and n.output.buffer is value.buffer]
        reads = [n for n in self.nodes if any(v.buffer is value.buffer for v in n.inputs)]
        return len(writes) == 1 and writes[0].output is value and not reads and not value.has_alias

    def _value(self, shape: Ints, position: Array | None = None, width: int = 0) -> Value:
        """Return a value in a new buffer; default: with its channels in order."""
        channels, d, h, w = shape
        if position is None:
            position, width = np.arange(channels), channels
        width = round_up(width, self.limits.lanes)
        return Value(tuple(shape), position, width, Buffer((d, h, w), width))
