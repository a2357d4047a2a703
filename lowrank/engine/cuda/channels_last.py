"""Steps of the kernels on channels-last arrays: changes of layout, depthwise and fused stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from lowrank.engine.cuda import steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.cuda.launch import CUDA_TYPES, Kernel, vector_width
from lowrank.engine.cuda.steps import three

THREADS = 128  # per block of a depthwise step
OUTPUT_CHANNELS, ROW_BYTES = 32, 64  # the weights of a product are padded to multiples
ROWS = 8  # outputs per thread of a depthwise step
HELD_WORDS = 50  # taps of a thread in registers: more channels per thread would spill some
FUSED_CHANNELS = 4  # per thread of the depthwise part of a fused step


def layout(step: steps.KernelStep, dtype: Any) -> Run:
    """Build a change of layout."""
    channels, *spatial = step.in_shape
    rows, columns = channels, math.prod(spatial)
    if step.kind == "channels first":
        rows, columns = columns, rows
    kernel = Kernel(f"transpose<{CUDA_TYPES[dtype.name]}>", rows, columns)
    blocks = -(-rows // 32) * -(-columns // 32)
    return lambda x, y, _: kernel(len(x) * blocks, x, y)


def depthwise(bound: BoundStage, dtype: Any, sum_dtype: Any) -> Run:
    """Build a step with one input channel per group."""
    s = bound.stage
    channels, per = bound.out_shape[0], bound.weight.shape[1]
    taps = _taps(bound, sum_dtype)
    (_, high, wide), (_, out_high, out_wide) = bound.sizes
    width = vector_width(dtype.itemsize, channels) if per == 1 else 1
    words = math.prod(s.kernel) * sum_dtype.itemsize // 4
    while width > 1 and width * words > HELD_WORDS:
        width //= 2
    stride = s.geometry.stride[-1]
    rows = ROWS if stride == 1 else ROWS // 2
    numbers = *three(s.kernel)[1:], stride, rows, width
    kernel = Kernel(
        f"depthwise_last<{CUDA_TYPES[dtype.name]}, {', '.join(map(str, numbers))}>", taps,
        bound.bias(sum_dtype), *bound.padded_tables()[1:], per, channels, high, wide, out_high,
        out_wide, bound.activation, threads=THREADS,
    )  # fmt: skip
    threads = channels // width * out_wide * -(-out_high // rows)
    return lambda x, y, _: kernel(-(-len(x) * threads // THREADS), x, y, len(x))


def fused(part: Sequence[BoundStage], step: steps.KernelStep, dtype: Any, sum_dtype: Any) -> Run:
    """Build a depthwise and a pointwise stage, after a pointwise one if there are three."""
    *before, first, second = part
    s = first.stage
    taps, weight = _taps(first, sum_dtype), _packed(second.weight[0, :, :, 0], dtype)
    biases = [bound.bias(sum_dtype) for bound in part]
    weight0, bias0, activation0 = None, None, 0
    if before:
        weight0 = _packed(before[0].weight[0, :, :, 0], dtype)
        bias0, activation0 = biases[0], before[0].activation
    middle, channels = first.in_shape[0], first.out_shape[0]
    per = channels // middle
    width = FUSED_CHANNELS
    while width > 1 and (per > 1 or channels % width or width * taps.shape[0] > HELD_WORDS):
        width //= 2
    kernel, stride = three(s.kernel), s.geometry.stride[-1]
    (_, high, wide), (_, out_high, out_wide) = first.sizes
    shared = steps.fused_shared_bytes(
        channels, middle if before else 0, kernel, stride, dtype.itemsize
    )
    numbers = *kernel[1:], stride, *steps.FUSED_TILE, width, int(bool(before))
    launch = Kernel(
        f"fused<{CUDA_TYPES[dtype.name]}, {', '.join(map(str, numbers))}>", weight0, bias0, taps,
        biases[-2], weight, biases[-1], *first.padded_tables()[1:], part[0].in_shape[0], middle,
        per, step.out_shape[0], high, wide, out_high, out_wide, activation0, first.activation,
        second.activation, shared=shared,
    )  # fmt: skip
    tiles = math.prod(-(-n // t) for n, t in zip((out_high, out_wide), steps.FUSED_TILE))
    return lambda x, y, _: launch(len(x) * tiles, x, y)


def _taps(bound: BoundStage, sum_dtype: Any) -> Any:
    """Return the taps of a depthwise stage as (taps, channels)."""
    weight = bound.weight.reshape(-1, bound.weight.shape[-1])
    return cupy.ascontiguousarray(cupy.tile(weight, (bound.stage.outer, 1)).T.astype(sum_dtype))


def _packed(weight: Any, dtype: Any) -> Any:
    """Return a matrix (outputs, depth) in the order in which `product` in kernels.cu loads it.

    Each of 32 threads gets 16 bytes for a product of 16 outputs: of the outputs 0 and 1, then of
    the next inputs.
    """
    outs, depth = weight.shape
    unit = ROW_BYTES // dtype.itemsize
    rows, columns = -(-outs // OUTPUT_CHANNELS), -(-depth // unit)
    bits = np.dtype(f"u{dtype.itemsize}")
    padded = cupy.zeros((rows * OUTPUT_CHANNELS, columns * unit), bits)
    padded[:outs, :depth] = cupy.ascontiguousarray(weight).astype(dtype).view(bits)
    if dtype.itemsize == 4:  # round to TF32: the tensor cores drop 13 bits
        padded += bits.type(0x1000)
    # outputs: block, thread / 4, product, register; inputs: step, thread % 4, product, register
    parts = padded.reshape(rows, 8, 2, 2, columns, 4, 2, 2, -1)
    return cupy.ascontiguousarray(parts.transpose(0, 4, 2, 6, 1, 5, 7, 3, 8)).view(dtype)
