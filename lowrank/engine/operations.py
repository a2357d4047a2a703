"""Operations of a program, as the C engine takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lowrank._kernels.spec import StageSpec
from lowrank._typing import Array, Ints
from lowrank.engine.buffers import ONES, ZEROS, Value, View

NO_VIEW = View(0, 0, ZEROS)
ROW = 192  # output samples of a unit of work, at most
JOINED_ROW = 48  # the same where rows are joined: blocks of 6, 8, 12 or 16 pixels fill it


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation as the C engine takes it; fields as in program.h.

    Attributes
    ----------
    macs : int
        MACs of direct sums for one example.
    error : float
        Predicted relative RMS error of the algorithm.
    """

    kind: str
    name: str
    input: View = NO_VIEW
    output: View = NO_VIEW
    other: View | None = None
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
    epsilon: float = 0.0
    alpha: float = 0.0
    mode: str = "copy"
    terms: int = 0
    terms_block: int = 1
    blocks: Sequence[Ints] = ()
    splits: int = 1
    algorithm: Ints = ZEROS
    tiles: int = 0
    multiplier: int = 1
    array: int = 0
    count_padding: bool = False
    offsets: Sequence[int] = ()
    weight: Any = None
    bias: Any = None
    mask: Any = None
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


def make_operation(
    kind: str,
    name: str,
    value: Value,
    result: Value,
    spec: StageSpec | None = None,
    **fields: Any,
) -> Operation:
    """Return an operation from a value, or what a stage reads of it, to another, by rows."""
    operation = Operation(
        kind, name, value.view(spec), result.view(), size=result.size, in_size=value.size,
        in_channels=value.width, channels=result.width, **fields,
    )  # fmt: skip
    return split_rows(operation, ROW)


def transfer(kind: Literal["pack", "unpack"], value: Value, array: int, splits: int) -> Operation:
    """Return the operation that reads a value from an array, or writes it to one."""
    channel = np.full(value.width, -1, np.int32)
    channel[value.position] = np.arange(value.shape[0])
    d, h, w = value.size
    source, target = (NO_VIEW, value.view()) if kind == "pack" else (value.view(), NO_VIEW)
    return Operation(
        kind, kind, source, target, size=value.size, unit=(1, 1, w), units=(d, h, 1),
        channels=value.width, channel=channel.tolist(), array=array, splits=splits,
    )  # fmt: skip


def reorder(value: Value, channels: Array, result: Value, name: str) -> Operation:
    """Return a copy of channels, given as places in the samples of `value`."""
    channel = np.full(result.width, -1, np.int32)
    channel[result.position] = channels
    return make_operation("combine", name, value, result, mode="reorder", channel=channel.tolist())


def split_rows(operation: Operation, most: int) -> Operation:
    """Return an operation whose units of work are rows, or parts of rows longer than `most`."""
    d, h, w = operation.size
    parts = -(-w // most)
    return replace(operation, unit=(1, 1, -(-w // parts)), units=(d, h, parts))


def rows_join(value: Value, result: Value, spec: StageSpec) -> bool:
    """Return whether a dense operation can take all samples as one row: pointwise, without gaps."""
    is_pointwise = spec.kernel == ONES and value.size == result.size
    return is_pointwise and not any(_has_gaps(v.view(), v.size) for v in (value, result))


def _has_gaps(view: View, size: Ints) -> bool:
    _, h, w = size
    return view.pitch[1] != w * view.pitch[2] or view.pitch[0] != h * w * view.pitch[2]


def join_rows(operation: Operation) -> Operation:
    """Return a pointwise dense operation with all samples in one row, if rows have no gaps.

    Short rows leave micro-kernels with few pixels, for which they load all weights.
    """
    views = [operation.input, operation.output, *([operation.other] if operation.other else [])]
    has_gaps = any(_has_gaps(v, operation.size) for v in views)
    is_pointwise = operation.taps == ONES and operation.in_size == operation.size
    if operation.kind != "dense" or not is_pointwise or has_gaps:
        return operation
    return split_rows(replace(operation, size=(1, 1, math.prod(operation.size))), JOINED_ROW)
