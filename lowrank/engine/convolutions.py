"""Convolutions of a program: layouts of results, weights as the kernels read them, halos."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank._kernels import _core
from lowrank._kernels.spec import StageSpec
from lowrank._typing import Array, Ints
from lowrank.engine.algorithms import (
    algorithm_shape,
    direct_counts,
    fast_counts,
    few_outputs_counts,
    product_count,
    tile_block,
    tile_counts,
    transform_weight,
)
from lowrank.engine.buffers import ONES, VECTOR_OVERHANG, ZEROS, Value, round_up
from lowrank.engine.costs import Counts, output_blocks
from lowrank.engine.operations import Operation, make_operation
from lowrank.engine.schedule import Node, Reach

CACHE_LINE = 64  # bytes
L2_WEIGHTS = 0.3  # of the L2 cache for the weights of one block of terms
MIN_TERMS = 64  # of a block, so that products outweigh the loads and stores of sums
MIN_GAP_VECTORS = 4  # per sample: fewer need no gap for their samples to differ in cache sets
SLIDING_TAPS = 3, 5, 7  # along a row, for which kernels keep inputs in registers


def aligned(values: Array) -> Array:
    """Return a C-contiguous copy whose vectors cross no cache line."""
    memory = np.empty(values.size + CACHE_LINE // values.itemsize, values.dtype)
    start = -memory.ctypes.data % CACHE_LINE // values.itemsize
    copy = memory[start : start + values.size].reshape(values.shape)
    copy[...] = values
    return copy


def has_depthwise_kernel(spec: StageSpec) -> bool:
    """Return whether a stage has several groups of one input channel each."""
    return spec.weight.shape[1] == 1 and spec.outer * spec.groups * spec.inner > 1


def dense_layout(spec: StageSpec, lanes: int) -> tuple[Array, int]:
    """Return the positions of a result's channels and its width, with one group after another."""
    per_group = len(spec.weight) // spec.groups
    channels = np.arange(spec.outer * len(spec.weight) * spec.inner)
    order = channels.reshape(spec.outer, spec.groups, per_group, spec.inner).swapaxes(2, 3)
    position = np.empty_like(channels)
    position[order.reshape(-1)] = channels
    return position, len(channels) + round_up(per_group, lanes) - per_group


def depthwise_layout(spec: StageSpec, value: Value) -> tuple[Array, int]:
    """Return the positions of a result's channels and its width: copies of the input's layout."""
    multiplier = len(spec.weight) // spec.groups
    copies = value.position + value.width * np.arange(multiplier)[:, None]
    # (outer, group, inner, multiplier) -> (outer, group, multiplier, inner)
    position = copies.T.reshape(spec.outer, spec.groups, spec.inner, multiplier).swapaxes(2, 3)
    return position.reshape(-1), value.width * multiplier


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution between values of a program.

    Attributes
    ----------
    name : str
        Name of the operation.
    spec : StageSpec
        Stage, without a permutation.
    value, result : Value
        Input and output.
    residual : Value or None
        Operand that is added before the activation.
    alpha : float
        Parameter of the activation.
    dtype : dtype
        Type of the program.
    limits : BlockLimits
        Block sizes of the kernels.
    algorithm : tuple of int
        Number of the fast algorithm along each axis, 0 for none.
    error : float
        Its predicted error.
    has_few_outputs : bool
        Whether lanes hold input channels, since outputs would fill few.
    """

    name: str
    spec: StageSpec
    value: Value
    result: Value
    residual: Value | None
    alpha: float
    dtype: Any
    limits: _core.BlockLimits
    algorithm: Ints = ZEROS
    error: float = 0.0
    has_few_outputs: bool = False

    def make_node(self) -> Node:
        """Return the node of the convolution; make the halo of its input large enough."""
        spec = self.spec
        inputs = (self.value, *([self.residual] if self.residual else []))
        reach: Reach | None = Reach(spec.kernel, spec.stride, spec.dilation, spec.before)
        self._grow_halo()
        if has_depthwise_kernel(spec):
            vectors = self.value.buffer.width // self.limits.lanes
            if vectors >= MIN_GAP_VECTORS and vectors % 2 == 0:
                self.value.buffer.gap = self.limits.lanes
            counts = self._depthwise_counts
            splits = self._depthwise_splits()
            return Node(
                inputs, self.result, self._depthwise, reach, make_counts=counts, splits=splits,
                is_channelwise=splits > 1, repack=self._repack,
            )  # fmt: skip
        sizes = spec, self.value, self.result, self.limits
        itemsize = np.dtype(self.dtype).itemsize
        weights = spec.weight.size * itemsize
        if self.has_few_outputs:
            counts = partial(few_outputs_counts, *sizes)
            return Node(
                inputs, self.result, self._few_outputs, reach, weights, make_counts=counts,
                repack=self._repack,
            )  # fmt: skip
        if not any(self.algorithm):
            counts = partial(direct_counts, *sizes, itemsize)
            splits = self._splits()
            return Node(
                inputs, self.result, self._direct, reach, weights, ONES, counts, splits,
                repack=self._repack,
            )  # fmt: skip
        counts = partial(fast_counts, self.algorithm, *sizes, itemsize)
        weights = math.prod(spec.weight.shape[:2]) * product_count(self.algorithm) * itemsize
        tile = *(algorithm_shape(n)[0] for n in self.algorithm[:2]), self.result.size[2]
        if any(d > 1 for n, d in zip(self.algorithm, spec.dilation) if n):
            reach = None  # tiles of one phase come before those of the next
        splits = self._splits()
        return Node(
            inputs, self.result, self._fast, reach, weights, tile, counts, splits,
            repack=self._repack,
        )  # fmt: skip

    def _repack(self, operation: Operation) -> None:
        """Write the weights and the bias of the stage to its operation."""
        if has_depthwise_kernel(self.spec):
            weight = self._depthwise_weight()
        elif self.has_few_outputs:
            weight = self._few_outputs_weight()
        else:
            weight, _ = self._packed(self._matrix())
        assert operation.weight is not None
        assert operation.bias is not None
        operation.weight[...] = weight.reshape(operation.weight.shape)
        if self.spec.bias is not None:
            operation.bias[self.result.position] = self.spec.bias

    def _splits(self) -> int:
        """Return the output-channel splits that threads can share."""
        copies = self.spec.outer * self.spec.groups * self.spec.inner
        outs = len(self.spec.weight) // self.spec.groups
        blocks = copies * len(list(output_blocks(outs, self.limits)))
        # Vectors of padding overlap the next group's outputs, unless groups are whole vectors.
        are_disjoint = outs % self.limits.lanes == 0 or copies == 1
        return blocks if are_disjoint else 1

    def _depthwise_splits(self) -> int:
        """Return the vectors of channels that can run alone."""
        has_multiplier = len(self.spec.weight) > self.spec.groups
        return 1 if has_multiplier else self.value.width // self.limits.lanes

    def _grow_halo(self) -> None:
        """Make the halo of the input large enough for the stage, and for its last tiles."""
        spec, size, buffer = self.spec, self.result.size, self.value.buffer
        counts = tile_counts(self.algorithm, spec.dilation, size)
        for a in range(3):
            m, r = algorithm_shape(self.algorithm[a])
            d, k = spec.dilation[a], spec.kernel[a]
            reach = (size[a] - 1) * spec.stride[a] + d * (k - 1)
            if self.algorithm[a]:
                last = range(max(0, counts[a] - min(size[a], d)), counts[a])
                reach = max(i % d + (i // d * m + m + r - 2) * d for i in last)
            buffer.before[a] = max(buffer.before[a], spec.before[a])
            buffer.after[a] = max(buffer.after[a], reach + 1 - spec.before[a] - self.value.size[a])

    def _direct(self) -> Operation:
        """Return the operation by direct sums."""
        taps = np.zeros(1, np.int64)
        for n, pitch in zip(self.spec.kernel, self.value.tap_pitch(self.spec.dilation)):
            taps = np.add.outer(taps, np.arange(n) * pitch).reshape(-1)
        return self._dense("dense", self._matrix(), taps)

    def _matrix(self) -> Array:
        """Return the weights of a dense operation, (groups, positions, terms, out)."""
        spec = self.spec
        per_group = spec.weight.shape[1]
        if any(self.algorithm):
            matrix = transform_weight(spec.weight, self.algorithm)
            matrix = matrix.reshape(spec.groups, -1, per_group, matrix.shape[2])
            return matrix.transpose(0, 3, 2, 1)
        taps = math.prod(spec.kernel)
        matrix = spec.weight.reshape(spec.groups, -1, per_group, taps).astype(self.dtype)
        # Terms in the order of kernels on planes, so that both give the same bits.
        in_order: Array = matrix.transpose(0, 2, 3, 1)
        return in_order.reshape(spec.groups, 1, per_group * taps, -1)

    def _fast(self) -> Operation:
        """Return the operation by fast algorithms: one matrix per position of a tile."""
        spec = self.spec
        operation = self._dense("winograd", self._matrix(), np.zeros(1, np.int64))
        tiles = tile_block(self.algorithm, self.value, self.limits, np.dtype(self.dtype).itemsize)
        return replace(
            operation, unit=ONES, units=tile_counts(self.algorithm, spec.dilation, operation.size),
            tap=self.value.tap_pitch(spec.dilation), dilation=spec.dilation,
            algorithm=self.algorithm, error=self.error, tiles=tiles,
        )  # fmt: skip

    def _few_outputs(self) -> Operation:
        """Return the operation whose terms are vectors of input channels under a tap."""
        spec, value, lanes = self.spec, self.value, self.limits.lanes
        taps = np.zeros(1, np.int64)
        for n, pitch in zip(spec.kernel, value.tap_pitch(spec.dilation)):
            taps = np.add.outer(taps, np.arange(n) * pitch).reshape(-1)
        outs, channels = spec.weight.shape[:2]
        offsets = np.add.outer(taps, np.arange(0, value.width, lanes)).reshape(-1)
        mask = None
        if value.width > channels:
            integers = np.zeros((len(taps), value.width), f"i{np.dtype(self.dtype).itemsize}")
            integers[:, value.position] = -1
            mask = integers.view(self.dtype)
        return make_operation(
            "few outputs", self.name, value, self.result, spec, **self._epilogue(),
            terms=len(offsets), offsets=offsets.tolist(), multiplier=outs, taps=spec.kernel,
            weight=aligned(self._few_outputs_weight()), mask=mask,
            macs=math.prod(self.result.shape) * math.prod(spec.weight.shape[1:]),
        )  # fmt: skip

    def _few_outputs_weight(self) -> Array:
        outs, channels = self.spec.weight.shape[:2]
        taps = math.prod(self.spec.kernel)
        weight = np.zeros((taps, self.value.width, outs), self.dtype)
        values = self.spec.weight.reshape(outs, channels, -1)
        weight[:, self.value.position] = values.transpose(2, 1, 0)
        return weight.reshape(taps, -1, self.limits.lanes, outs).swapaxes(2, 3)

    def _dense(self, kind: str, matrix: Array, taps: Array) -> Operation:
        """Return a dense operation.

        Parameters
        ----------
        kind : str
            Kind of the operation.
        matrix : ndarray, shape (groups, positions, terms, out)
            Weights.
        taps : ndarray
            Distance of each tap from the first one, in elements.
        """
        spec, lanes = self.spec, self.limits.lanes
        groups, _, terms, outs = matrix.shape
        copies = spec.outer, groups, spec.inner
        weight, starts = self._packed(matrix)
        channels = self.value.position.reshape(spec.outer, groups, -1, spec.inner)
        blocks: list[Ints] = []
        offsets: list[int] = []
        tables: dict[bytes, int] = {}  # start in `offsets` of each table of terms
        for number, (outer, group, inner) in enumerate(itertools.product(*map(range, copies))):
            table = np.add.outer(channels[outer, group, :, inner], taps).reshape(-1)
            start = tables.setdefault(table.tobytes(), len(offsets))
            if start == len(offsets):
                offsets += table.tolist()
            for first, vectors in output_blocks(outs, self.limits):
                blocks.append((vectors, number * outs + first, start, starts[group, first]))
        widest = max(b[0] for b in blocks) * lanes * np.dtype(self.dtype).itemsize
        return make_operation(
            kind, self.name, self.value, self.result, spec, **self._epilogue(),
            terms=terms, terms_block=max(MIN_TERMS, int(L2_WEIGHTS * _core.caches()[1] / widest)),
            blocks=blocks, offsets=offsets, splits=self._splits(),
            weight=weight, taps=spec.kernel,
            macs=math.prod(self.result.shape) * math.prod(spec.weight.shape[1:]),
        )  # fmt: skip

    def _packed(self, matrix: Array) -> tuple[Array, dict[tuple[int, int], int]]:
        """Return weights block after block, and the start of each (group, first output)."""
        packed, starts, at = [], {}, 0
        groups, positions, terms, outs = matrix.shape
        for group in range(groups):
            for first, vectors in output_blocks(outs, self.limits):
                block = np.zeros((positions, terms, vectors * self.limits.lanes), self.dtype)
                columns = matrix[group, :, :, first : first + block.shape[2]]
                block[:, :, : columns.shape[2]] = columns
                starts[group, first] = at
                packed.append(block.reshape(-1))
                at += block.size
        return aligned(np.concatenate(packed)), starts

    def _epilogue(self) -> dict[str, Any]:
        """Return the fields of an operation for its bias, residual and activation."""
        bias = np.zeros(self.result.width + VECTOR_OVERHANG, self.dtype)
        if self.spec.bias is not None:
            bias[self.result.position] = self.spec.bias
        other = None if self.residual is None else self.residual.view()
        activation = {"activation": self.spec.activation, "alpha": self.alpha}
        return {"bias": bias, "other": other, **activation}

    def _depthwise(self) -> Operation:
        """Return the operation of each channel alone."""
        spec, value = self.spec, self.value
        return make_operation(
            "depthwise", self.name, value, self.result, spec, **self._epilogue(),
            taps=spec.kernel, tap=value.tap_pitch(spec.dilation), stride=spec.stride,
            multiplier=len(spec.weight) // spec.groups, weight=aligned(self._depthwise_weight()),
            splits=self._depthwise_splits(),
            macs=math.prod(self.result.shape) * math.prod(spec.kernel),
        )  # fmt: skip

    def _depthwise_weight(self) -> Array:
        spec, value = self.spec, self.value
        channels, multiplier = value.shape[0], len(spec.weight) // spec.groups
        per_group = spec.weight.reshape(1, spec.groups, 1, multiplier, -1)
        shape = (spec.outer, spec.groups, spec.inner, *per_group.shape[3:])
        each = np.broadcast_to(per_group, shape).reshape(channels, multiplier, -1)
        weight = np.zeros((multiplier, each.shape[-1], value.width), self.dtype)
        weight[:, :, value.position] = each.transpose(1, 2, 0)
        return weight

    def _depthwise_counts(self) -> Counts:
        """Count the depthwise convolution of one example."""
        spec = self.spec
        slides = spec.stride[2] == spec.dilation[2] == 1 and spec.kernel[2] in SLIDING_TAPS
        vectors = self.result.vectors(self.limits.lanes)
        taps = "tap" if slides else "loaded tap"
        return {taps: vectors * math.prod(spec.kernel), "output": vectors}
