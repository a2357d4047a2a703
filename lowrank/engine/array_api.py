"""Chains in plain code for any library with the array API standard: correct, not fast.

Padding modes, strides, dilations and transposition are handled alike: tables of indices say which
sample each tap of each output reads.  The GPU kernels read the same tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core import reference
from lowrank.core.stage import Epilogue, Stage


def padded_indices(stage: Stage, axis: int, size: int) -> Array:
    """Return the sample at each position of a padded axis, -1 for the border value.

    The result is int32 of shape (before + size + after,).
    """
    g = stage.geometry
    line = np.arange(1, size + 1).reshape(1, 1, -1)
    mode = "zeros" if g.padding_mode == "constant" else g.padding_mode
    indices = reference.pad(line, (g.padding[axis],), mode, None)[0, 0] - 1
    return np.asarray(indices.astype(np.int32))


def tap_indices(stage: Stage, axis: int, size: int, out: int) -> Array:
    """Return the sample that each tap of each output reads along an axis, -1 for the border value.

    The result is int32 of shape (taps, out).
    """
    g = stage.geometry
    taps, outputs = np.arange(stage.kernel[axis])[:, None] * g.dilation[axis], np.arange(out)
    if not stage.transposed:
        return np.asarray(padded_indices(stage, axis, size)[outputs * g.stride[axis] + taps])
    upsampled = outputs + g.padding[axis][0] - taps
    is_sample = (upsampled % g.stride[axis] == 0) & (upsampled >= 0)
    is_sample &= upsampled < size * g.stride[axis]
    return np.where(is_sample, upsampled // g.stride[axis], -1).astype(np.int32)


def weight_matrices(stage: Stage) -> Any:
    """Return the weights as (groups, out, in, taps), out and in swapped if transposed."""
    rows, columns = stage.weight.shape[:2]
    w = stage.weight.reshape(stage.groups, rows // stage.groups, columns, -1)
    return w.swapaxes(1, 2) if stage.transposed else w


def border_values(stages: Sequence[Stage]) -> list[Array | None]:
    """Return the border value per input channel of each stage; None for zeros."""
    values = np.full(stages[0].in_channels, stages[0].geometry.value)
    borders: list[Array | None] = []
    for stage in stages:
        padded = stage.geometry.padding_mode == "constant" and values.any()
        borders.append(values if padded else None)
        if values.any():
            values = reference.dc_response(stage, values)
    return borders


def run(
    stages: Sequence[Stage],
    x: Any,
    weights: Sequence[Any],
    epilogues: Sequence[Epilogue],
    xp: Any,
    device: Any = None,
) -> Any:
    """Run `stages` on `x`, (batch, channels, *spatial), with arrays of the library `xp`.

    `weights` are the :func:`weight_matrices` of each stage as arrays of `xp` on `device`; biases
    are NumPy arrays.
    """
    borders = border_values(stages)
    placement = {} if device is None else {"device": device}

    def as_xp(values: Array, dtype: Any = None) -> Any:
        return xp.asarray(values, dtype=dtype, **placement)

    for stage, w, border, (bias, activation) in zip(stages, weights, borders, epilogues):
        size = tuple(x.shape[2:])
        channels, *out = stage.output_shape(tuple(x.shape[1:]))
        batch, replicas, (g, o, c, _) = x.shape[0], (stage.outer, stage.inner), w.shape
        is_shuffled = stage.shuffle != (1, 1)
        if is_shuffled and not stage.transposed:
            x = xp.take(x, as_xp(stage.channel_permutation()), axis=1)
            border = None if border is None else border[stage.channel_permutation()]
        tables = [tap_indices(stage, a, n, m) for a, (n, m) in enumerate(zip(size, out))]
        samples = int(np.prod(out, dtype=np.int64))
        y = xp.zeros((batch, replicas[0], g, o, replicas[1] * samples), dtype=x.dtype, **placement)
        for t, tap in enumerate(itertools.product(*map(range, stage.kernel))):
            shifted, inside = x, np.ones((1,) * (2 + len(out)), bool)
            for axis, (table, k) in enumerate(zip(tables, tap)):
                indices = as_xp(np.maximum(table[k], 0).astype(np.int64))
                shifted = xp.take(shifted, indices, axis=2 + axis)
                inside = inside & (table[k] >= 0).reshape(-1, *(1,) * (len(out) - 1 - axis))
            if not inside.all():
                value = xp.zeros((), dtype=x.dtype, **placement)
                if border is not None:
                    value = as_xp(border.reshape(-1, *(1,) * len(out)), x.dtype)
                shifted = xp.where(as_xp(inside), shifted, value)
            shifted = xp.reshape(shifted, (batch, replicas[0], g, c, replicas[1] * samples))
            y = y + xp.matmul(w[..., t], shifted)
        x = xp.reshape(y, (batch, channels, *out))
        if is_shuffled and stage.transposed:
            x = xp.take(x, as_xp(np.argsort(stage.channel_permutation())), axis=1)
        if bias is not None:
            x = x + as_xp(np.asarray(bias).reshape(-1, *(1,) * len(out)), x.dtype)
        if activation != "none":
            x = xp.clip(x, 0, 6.0 if activation == "relu6" else None)
    return x
