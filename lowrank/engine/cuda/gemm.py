"""Steps that cuBLAS computes: a matrix product of the weights and the unrolled input."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.cuda.direct import gather_tables
from lowrank.engine.cuda.launch import CUDA_TYPES, Int64, Kernel, grid_size

#: cudaDataType_t, by the name of the dtype.
CUBLAS_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
# cublasComputeType_t: sums in float32, in float64 (for float64 only), in TF32 (if asked for)
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
MAX_UNROLLED = 1 << 28  # bytes of unrolled inputs at a time


def matrix_product(
    bound: BoundStage, dtype: Any, sum_dtype: Any
) -> tuple[Run, Callable[[int], int]]:
    """Build a step of cuBLAS; also return its scratch memory, in elements, for a batch.

    A plain pointwise stage multiplies its input as it is; others unroll it first (im2col).
    """
    s = bound.stage
    weight = cupy.ascontiguousarray(bound.weight).astype(dtype)
    groups, _, ins, taps = weight.shape
    size, out = bound.sizes
    plain = taps == 1 and size == out and not s.transposed and s.shuffle == (1, 1)
    plain = plain and not any(map(any, s.geometry.padding)) and set(s.geometry.stride) == {1}
    terms, tables = (None, []) if plain else gather_tables(bound, ins)
    bias, activation = bound.bias_and_activation(sum_dtype)
    permutation, border = bound.permutation_and_border(sum_dtype)
    columns = math.prod(out) * s.inner
    unrolled_size = s.outer * groups * ins * taps * columns  # elements per example
    chunk = max(1, MAX_UNROLLED // max(1, unrolled_size * dtype.itemsize))  # examples
    name = CUDA_TYPES[dtype.name]
    unroll = None if plain else Kernel(f"unroll<{name}>")
    epilogue = Kernel(f"epilogue<{name}>") if bias is not None or activation else None
    fixed = (ins, s.inner, Int64(ins * taps), *size, *out)

    def run(x: Any, y: Any, scratch: Any) -> None:
        for first in range(0, len(x), len(x) if unroll is None else chunk):
            source, target = x[first:], y[first:]
            if unroll is not None:
                source, target = source[:chunk], target[:chunk]
                unrolled = scratch[: len(source) * unrolled_size]
                unroll(
                    grid_size(unrolled.size), source, unrolled, permutation, border, terms, *tables,
                    Int64(len(source)), Int64(s.outer * groups), *fixed,
                )  # fmt: skip
                source = unrolled
            _multiply(weight, source, target, len(target) * s.outer, ins * taps, columns)
        if epilogue is not None:
            shape = len(y), bound.out_shape[0], math.prod(out)
            epilogue(grid_size(y.size), y, bias, *map(Int64, shape), activation)

    return run, lambda batch: 0 if plain else min(batch, chunk) * unrolled_size


def _multiply(weight: Any, x: Any, y: Any, batch: int, depth: int, columns: int) -> None:
    """Compute ``y[b, g] = weight[g] @ x[b, g]``, (outs, depth) times (depth, columns).

    CuPy's matrix product is not used: it makes lists of pointers where the weight is shared, and
    converts halves to float32.  cuBLAS is column-major: it gets the transposes, swapped.
    """
    cublas = importlib.import_module("cupy_backends.cuda.libs.cublas")
    groups, outs = weight.shape[:2]
    kind, item = CUBLAS_TYPES[y.dtype.name], y.dtype.itemsize
    scalar = np.float64 if y.dtype == np.float64 else np.float32
    one, zero = np.ones(1, scalar), np.zeros(1, scalar)
    compute = COMPUTE_64F if scalar is np.float64 else COMPUTE_32F
    if y.dtype == np.float32 and os.environ.get("CUPY_TF32", "0") not in ("", "0"):
        compute = COMPUTE_32F_FAST_TF32
    x_size, y_size, weight_size = depth * columns, outs * columns, outs * depth
    # Fewer calls: one per group over all examples, or one per example over all groups.
    by_group = groups <= batch
    for i in range(groups if by_group else batch):
        skip = i if by_group else i * groups
        count, step, weight_step = (batch, groups, 0) if by_group else (groups, 1, weight_size)
        cublas.gemmStridedBatchedEx(
            cupy.cuda.device.get_cublas_handle(), 0, 0, columns, outs, depth, one.ctypes.data,
            x.data.ptr + skip * x_size * item, kind, columns, step * x_size,
            weight.data.ptr + (i * weight_size * item if by_group else 0), kind, depth, weight_step,
            zero.ctypes.data,
            y.data.ptr + skip * y_size * item, kind, columns, step * y_size, count, compute, -1,
        )  # fmt: skip
