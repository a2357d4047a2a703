"""Steps of a plan, each built for the shapes of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cupy

from lowrank.core.stage import Epilogue
from lowrank.engine import array_api
from lowrank.engine.cuda import channels_last, device, gemm, planes, steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run


def build(
    step: steps.KernelStep,
    part: Sequence[BoundStage],
    dtype: Any,
    sum_dtype: Any,
    interleaved: int = 1,
) -> tuple[Run, Callable[[int], int]]:
    """Build a step of the stages `part`; also return its scratch memory, in elements, for a batch.

    `sum_dtype` is the type of the sums.
    """
    if step.kind == "matrix product":
        return gemm.matrix_product(part[0], dtype, sum_dtype)
    sums = 0
    if step.kind == "filter":
        run, sums = planes.filter_passes(part, step, dtype, sum_dtype, interleaved)
    elif step.kind == "depthwise":
        run = planes.depthwise(part[0], dtype, sum_dtype, interleaved)
    elif step.kind == "depthwise, channels last":
        run = channels_last.depthwise(part[0], dtype, sum_dtype)
    elif step.kind in ("channels last", "channels first"):
        run = channels_last.layout(step, dtype)
    elif step.kind == "array code":
        run = array_code(part, dtype)
    else:
        run = channels_last.fused(part, step, dtype, sum_dtype)
    return run, lambda batch: batch * sums * (sum_dtype.itemsize // dtype.itemsize)


def array_code(part: Sequence[BoundStage], dtype: Any) -> Run:
    """Build stages in plain array code, which runs all of them."""
    weights = [cupy.ascontiguousarray(bound.weight).astype(dtype) for bound in part]
    on_host = [replace(b.stage, weight=device.to_host(b.stage.weight)) for b in part]
    epilogues = []
    for bound in part:
        bias, activation = bound.epilogue
        epilogues.append(Epilogue(None if bias is None else device.to_host(bias), activation))

    def run(x: Any, y: Any, _: Any) -> None:
        y[...] = array_api.run(on_host, x, weights, epilogues, cupy)

    return run
