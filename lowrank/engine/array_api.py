"""Chains in plain array code, of any library with the array API standard: right, not fast.

Borders, strides, dilations and transposition are all the same here: a table says which sample each
tap of each output sees.  The kernels of the GPU read the same tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core import reference
from lowrank.core.stage import Epilogue, Stage


def places(stage: Stage, axis: int, size: int) -> Array:
    """Sample at each place of a padded axis, -1 outside: int32, (before + size + after,)."""
    g = stage.geometry
    line = np.arange(1, size + 1).reshape(1, 1, -1)
    mode = "zeros" if g.padding_mode == "constant" else g.padding_mode
    found = reference.pad(line, (g.padding[axis],), mode, None)[0, 0] - 1
    return np.asarray(found.astype(np.int32))


def seen(stage: Stage, axis: int, size: int, out: int) -> Array:
    """Sample that each tap of each output sees along an axis, -1 outside: int32, (taps, out)."""
    g = stage.geometry
    tap, place = np.arange(stage.kernel[axis])[:, None] * g.dilation[axis], np.arange(out)
    if not stage.transposed:
        return np.asarray(places(stage, axis, size)[place * g.stride[axis] + tap])
    at = place + g.padding[axis][0] - tap
    there = (at % g.stride[axis] == 0) & (at >= 0) & (at < size * g.stride[axis])
    return np.where(there, at // g.stride[axis], -1).astype(np.int32)


def matrices(stage: Stage) -> Any:
    """Weights as (groups, out, in, taps), of what runs: a transposed stage the other way round."""
    rows, columns = stage.weight.shape[:2]
    w = stage.weight.reshape(stage.groups, rows // stage.groups, columns, -1)
    return w.swapaxes(1, 2) if stage.transposed else w


def outsides(stages: Sequence[Stage]) -> list[Array | None]:
    """What stands outside the input of each stage, a number a channel; None for zeros."""
    values = np.full(stages[0].in_channels, stages[0].geometry.value)
    found: list[Array | None] = []
    for stage in stages:
        found.append(values if stage.geometry.padding_mode == "constant" and values.any() else None)
        if values.any():
            values = reference.dc_response(stage, values)
    return found


def run(
    stages: Sequence[Stage],
    x: Any,
    weights: Sequence[Any],
    epilogues: Sequence[Epilogue],
    xp: Any,
    device: Any = None,
) -> Any:
    """Run `stages` on `x`, (batch, channels, *spatial), with arrays of the library `xp`.

    `weights` are :func:`matrices` of each stage there, and biases are NumPy arrays.
    """
    outside = outsides(stages)
    placed = {} if device is None else {"device": device}

    def here(values: Array, dtype: Any = None) -> Any:
        return xp.asarray(values, dtype=dtype, **placed)

    for stage, w, border, (bias, activation) in zip(stages, weights, outside, epilogues):
        size = tuple(x.shape[2:])
        channels, *out = stage.output_shape(tuple(x.shape[1:]))
        batch, copies, (g, o, c, _) = x.shape[0], (stage.outer, stage.inner), w.shape
        shuffled = stage.shuffle != (1, 1)
        if shuffled and not stage.transposed:
            x = xp.take(x, here(stage.channel_permutation()), axis=1)
            border = None if border is None else border[stage.channel_permutation()]
        tables = [seen(stage, a, n, m) for a, (n, m) in enumerate(zip(size, out))]
        y = xp.zeros((batch, copies[0], g, o, copies[1] * _many(out)), dtype=x.dtype, **placed)
        for t, tap in enumerate(itertools.product(*map(range, stage.kernel))):
            part, inside = x, np.ones((1,) * (2 + len(out)), bool)
            for axis, (table, k) in enumerate(zip(tables, tap)):
                part = xp.take(part, here(np.maximum(table[k], 0).astype(np.int64)), axis=2 + axis)
                there = (table[k] >= 0).reshape(-1, *(1,) * (len(out) - 1 - axis))
                inside = inside & there
            if not inside.all():
                other = xp.zeros((), dtype=x.dtype, **placed)
                if border is not None:
                    other = here(border.reshape(-1, *(1,) * len(out)), x.dtype)
                part = xp.where(here(inside), part, other)
            part = xp.reshape(part, (batch, copies[0], g, c, copies[1] * _many(out)))
            y = y + xp.matmul(w[..., t], part)
        x = xp.reshape(y, (batch, channels, *out))
        if shuffled and stage.transposed:
            x = xp.take(x, here(np.argsort(stage.channel_permutation())), axis=1)
        if bias is not None:
            x = x + here(np.asarray(bias).reshape(-1, *(1,) * len(out)), x.dtype)
        if activation != "none":
            x = xp.clip(x, 0, 6.0 if activation == "relu6" else None)
    return x


def _many(sizes: Sequence[int]) -> int:
    return int(np.prod(sizes, dtype=np.int64)) if sizes else 1
