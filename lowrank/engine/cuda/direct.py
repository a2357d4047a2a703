"""Steps that kernels of kernels.cu compute: depthwise, dense, separable and filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from lowrank.engine.cuda import steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.cuda.launch import CUDA_TYPES, MAX_BLOCKS, Int64, Kernel, grid_size
from lowrank.engine.cuda.steps import three

UNROLLED_KERNELS = (3, 5, 7)  # square depthwise kernels with loops unrolled at compile time
ROWS_PER_THREAD = {1: 4, 2: 2}  # output rows per thread of an unrolled kernel, by stride
GEMM_COLUMNS = 64  # output samples of a tile of a product
NARROW_TILE = 16, 128  # output channels and samples of a tile where there are few channels


def depthwise(bound: BoundStage, dtype: Any, sum_dtype: Any) -> Run:
    """Build a step with one input channel per group."""
    s, g = bound.stage, bound.stage.geometry
    weight = cupy.ascontiguousarray(bound.weight).astype(dtype)
    kernel, stride, dilation = three(s.kernel), three(g.stride), three(g.dilation)
    multiplier = weight.shape[1]
    unrolled = (
        kernel[1] == kernel[2] in UNROLLED_KERNELS
        and stride[1] in ROWS_PER_THREAD
        and dilation[1] == 1
    )
    rows = ROWS_PER_THREAD[stride[1]] if unrolled else 1
    taps = f"{kernel[1]}, {kernel[2]}, {stride[1]}" if unrolled else "0, 0, 0"
    launch = Kernel(f"depthwise<{CUDA_TYPES[dtype.name]}, {taps}, {rows}>")
    tables = bound.padded_tables()
    bias, activation = bound.bias_and_activation(sum_dtype)
    permutation, border = bound.permutation_and_border(sum_dtype)
    (d, h, w), out = bound.sizes
    fixed = (
        s.outer, s.groups, s.inner, multiplier, d, h, w, *out, *kernel, *stride, *dilation,
        activation,
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        threads = y.shape[0] * bound.out_shape[0] * out[0] * -(-out[1] // rows) * out[2]
        launch(
            grid_size(threads), x, weight, bias, y, permutation, border, *tables, Int64(len(x)),
            *fixed,
        )  # fmt: skip

    return run


def gather_tables(bound: BoundStage, channels: int) -> tuple[Any, list[Any]]:
    """Return the terms of a dense stage, (channels * taps, 4), and the tables that they index.

    A term is (channel, d, h, w): the last three are offsets of a tap's row in the table of its
    axis.
    """
    _, out = bound.sizes
    kernel = three(bound.stage.kernel)
    grid = np.indices((channels, *kernel)).reshape(4, -1).T
    terms = np.ascontiguousarray(grid * np.array([1, *out]), np.int32)
    return cupy.asarray(terms), bound.tap_tables()


def dense(bound: BoundStage, dtype: Any, sum_dtype: Any) -> Run:
    """Build an implicit matrix product: inputs are gathered, not unrolled in memory."""
    s = bound.stage
    weight = cupy.ascontiguousarray(bound.weight).astype(dtype)
    groups, outs, ins, _ = weight.shape
    depth = math.prod(weight.shape[2:])
    terms, tables = gather_tables(bound, ins)
    out_permutation = None
    if s.transposed and s.shuffle != (1, 1):
        out_permutation = cupy.asarray(s.channel_permutation().astype(np.int32))
    bias, activation = bound.bias_and_activation(sum_dtype)
    permutation, border = bound.permutation_and_border(sum_dtype)
    (d, h, w), out = bound.sizes
    narrow = outs <= NARROW_TILE[0]
    rows, columns = NARROW_TILE if narrow else (steps.GEMM_ROWS, GEMM_COLUMNS)
    launch = Kernel(f"dense<{CUDA_TYPES[dtype.name]}, {rows}, {columns}>")
    blocks = -(-outs // rows) * s.outer * groups * s.inner
    fixed = (
        s.outer, groups, s.inner, ins, outs, Int64(depth), d, h, w, *out, activation
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = -(-y.shape[0] * math.prod(out) // columns)
        launch(
            blocks * tiles, x, weight, bias, y, permutation, out_permutation, border, terms,
            *tables, Int64(len(x)), *fixed,
        )  # fmt: skip

    return run


def separable(first: BoundStage, second: BoundStage, dtype: Any, sum_dtype: Any) -> Run:
    """Build a depthwise and a pointwise stage as one kernel, without an intermediate array."""
    s, g = first.stage, first.stage.geometry
    taps = cupy.ascontiguousarray(first.weight).astype(dtype)
    weight = cupy.ascontiguousarray(second.weight).astype(dtype)
    multiplier, outs = taps.shape[1], weight.shape[1]
    kernel, stride, dilation = three(s.kernel), three(g.stride), three(g.dilation)
    tables = first.padded_tables()
    taps_bias, taps_activation = first.bias_and_activation(sum_dtype)
    bias, activation = second.bias_and_activation(sum_dtype)
    permutation, border = first.permutation_and_border(sum_dtype)
    (d, h, w), out = first.sizes
    rows, columns = steps.GEMM_ROWS, GEMM_COLUMNS
    launch = Kernel(f"separable<{CUDA_TYPES[dtype.name]}, {rows}, {columns}>")
    fixed = (
        s.groups, multiplier, outs, d, h, w, *out, *kernel, *stride, *dilation, activation
    )  # fmt: skip

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = -(-y.shape[0] * math.prod(out) // columns)
        launch(
            tiles * -(-outs // rows), x, taps, taps_bias, taps_activation, weight, bias, y,
            permutation, border, *tables, Int64(len(x)), *fixed,
        )  # fmt: skip

    return run


def filter_passes(
    chain: Sequence[BoundStage], step: steps.KernelStep, dtype: Any, sum_dtype: Any
) -> Run:
    """Build all 1-D passes of all rank-1 terms of a filter as one kernel, in shared memory."""
    first, last = chain[0], chain[-1]
    s = first.stage
    groups, terms = s.groups, len(s.weight) // s.groups
    pass_along = {}
    for bound in chain:
        (axis,) = steps.axes_of(bound.stage)
        pass_along[axis + 3 - bound.stage.geometry.ndim] = bound
    rounded = steps.round_to_fours(step.taps)
    weight = cupy.zeros((groups, terms, sum(rounded)), dtype)
    offset, tables = 0, []
    out = three(step.out_shape[1:])
    for axis, count in enumerate(rounded):
        owner = pass_along.get(axis)
        if owner is not None:
            taps = owner.stage.weight.reshape(groups, terms, -1).astype(dtype)
            weight[:, :, offset : offset + taps.shape[2]] = taps
        elif count:
            weight[:, :, offset] = 1
        offset += count
        table = (owner or first).padded_tables()[axis]
        missing = max(0, out[axis] + max(count, 1) - 1 - len(table))  # seen by taps that are zero
        tables.append(cupy.concatenate([table, cupy.full(missing, -1, np.int32)]))
    bias, activation = last.bias_and_activation(sum_dtype)
    permutation, _ = first.permutation_and_border(sum_dtype)
    size = three(step.in_shape[1:])
    launch = Kernel(
        f"filter<{CUDA_TYPES[dtype.name]}>",
        steps.filter_shared_bytes(step.taps, step.tile, sum_dtype.itemsize),
    )
    fixed = (s.outer, groups, s.inner, terms, *size, *out, *step.taps, *step.tile, activation)

    def run(x: Any, y: Any, _: Any) -> None:
        tiles = len(y) * step.out_shape[0] * math.prod(-(-n // t) for n, t in zip(out, step.tile))
        launch(
            min(tiles, MAX_BLOCKS), x, weight, bias, y, permutation, *tables, Int64(len(x)), *fixed
        )

    return run
