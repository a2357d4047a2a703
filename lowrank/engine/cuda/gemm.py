"""Steps that cuBLAS computes: products of channels-last samples, unrolled or not, and weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from lowrank.engine.cuda import device
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.cuda.launch import CUDA_TYPES, Kernel, vector_width
from lowrank.engine.cuda.steps import three

#: cudaDataType_t, by the name of the dtype.
CUBLAS_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
# cublasComputeType_t: sums in float32, in float64 (for float64 only), in TF32 (if asked for)
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
MAX_UNROLLED = 1 << 28  # bytes of unrolled inputs at a time
MAX_PIXELS = 2**31 - 1  # of a product: cuBLAS and `unroll` count them in 32 bits


def uses_tensor_cores(dtype: Any) -> bool:
    """Return whether products of this type run in TF32, float16 or bfloat16 on this device."""
    has_them = int(cupy.cuda.Device().compute_capability) >= 80
    return has_them and (dtype.itemsize == 2 or (dtype == np.float32 and _is_tf32()))


def _is_tf32() -> bool:
    """Return whether float32 may be rounded to TF32 in products, by CuPy's variable for it."""
    return os.environ.get("CUPY_TF32", "0") not in ("", "0")


def matrix_product(
    bound: BoundStage, dtype: Any, sum_dtype: Any
) -> tuple[Run, Callable[[int], int]]:
    """Build a step of cuBLAS; also return its scratch memory, in elements, for a batch.

    A plain pointwise stage multiplies its input as it is; others unroll it first (im2col).
    """
    s, g = bound.stage, bound.stage.geometry
    groups, outs, ins, taps = bound.weight.shape
    weight = bound.weight.transpose(0, 3, 2, 1).reshape(groups, taps * ins, outs)
    weight = cupy.ascontiguousarray(cupy.tile(weight, (s.outer, 1, 1))).astype(dtype)
    groups *= s.outer
    size, out = bound.sizes
    is_plain = taps == 1 and size == out and not any(map(any, g.padding)) and {*g.stride} == {1}
    has_bias = bound.epilogue.bias is not None
    bias, activation = (bound.bias(sum_dtype) if has_bias else None), bound.activation
    pixels, depth, channels = math.prod(out), ins * taps, groups * outs
    rows, row = out[0] * out[1], out[2]  # of outputs per example, and samples per row
    unrolled_size = 0 if is_plain else groups * depth * row  # elements per row
    chunk = max(1, MAX_UNROLLED // max(1, unrolled_size * dtype.itemsize))  # rows
    name = CUDA_TYPES[dtype.name]
    if not is_plain:
        width = vector_width(dtype.itemsize, ins)
        kernel = three(s.kernel)
        unroll = Kernel(
            f"unroll<{name}, {width}>", *bound.padded_tables(), groups, ins, *size, *out, *kernel,
            *three(g.stride), *three(g.dilation),
        )  # fmt: skip
        threads = row * groups * kernel[0] * kernel[1] * (ins // width)  # per row
    width = vector_width(dtype.itemsize, channels)
    has_epilogue = has_bias or activation
    epilogue = Kernel(f"epilogue<{name}, {width}>", bias, channels, activation)
    multiply = _Product(weight)
    item = dtype.itemsize

    def run(x: Any, y: Any, scratch: Any) -> None:
        batch, target = len(x), y.data.ptr
        if batch * pixels > MAX_PIXELS:
            raise ValueError(
                f"a product must have at most {MAX_PIXELS} samples, got {batch * pixels}: run "
                "smaller batches"
            )
        if is_plain:
            multiply(x.data.ptr, target, batch * pixels)
        else:
            for first in range(0, batch * rows, chunk):
                count = min(chunk, batch * rows - first)
                unroll(-(-count * threads // unroll.threads), x, scratch, first, count)
                multiply(scratch.data.ptr, target + first * row * channels * item, count * row)
        if has_epilogue:
            blocks = -(-batch * pixels * channels // (width * epilogue.threads))
            epilogue(blocks, y, batch * pixels)

    return run, lambda batch: min(batch * rows, chunk) * unrolled_size


class _Product:
    """Products of samples (pixels, groups, depth) and weights (groups, depth, outs).

    CuPy's matrix product is not used: it makes lists of pointers where the weight is shared, and
    converts halves to float32.  cuBLAS is column-major: it gets the transposes, swapped.
    """

    def __init__(self, weight: Any) -> None:
        groups, depth, outs = weight.shape
        dtype = weight.dtype
        scalar = np.float64 if dtype == np.float64 else np.float32
        compute = COMPUTE_64F if scalar is np.float64 else COMPUTE_32F
        if dtype == np.float32 and _is_tf32():
            compute = COMPUTE_32F_FAST_TF32
        kind = CUBLAS_TYPES[dtype.name]
        self._held = weight, np.ones(1, scalar), np.zeros(1, scalar)  # read by every call
        one, zero = (number.ctypes.data for number in self._held[1:])
        self._outs, self._depth = outs, depth
        self._left = one, weight.data.ptr, kind, outs, depth * outs
        self._right = kind, groups * depth, depth, zero
        self._last = kind, groups * outs, outs, groups, compute, -1
        self._cublas, self._check = device.load_cublas(), cupy.cuda.cublas.check_status

    def __call__(self, x: int, y: int, pixels: int) -> None:
        """Multiply; `x` and `y` are addresses."""
        handle = cupy.cuda.device.get_cublas_handle()
        self._check(self._cublas.cublasSetStream_v2(handle, cupy.cuda.get_current_stream().ptr))
        self._check(
            self._cublas.cublasGemmStridedBatchedEx(
                handle, 0, 0, self._outs, pixels, self._depth, *self._left, x, *self._right, y,
                *self._last,
            )
        )  # fmt: skip
