"""Reference implementation of chains in NumPy, which every engine is tested against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, Pads, trailing
from lowrank.core.stage import Epilogue, Stage

_NUMPY_MODE = {
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
    "symmetric": "symmetric",
}


def run_chain(stages: Sequence[Stage], x: Array, bias: Array | None = None) -> Array:
    """Run `stages` in order on `x`, (batch, channels, *spatial), then add `bias`.

    In mode ``"constant"`` the border value of an intermediate result is the response of the
    earlier stages to the border value of the first.
    """
    border = np.full(stages[0].in_channels, stages[0].geometry.value, x.dtype)
    for stage in stages:
        x = run_stage(stage, x, border)
        border = dc_response(stage, border)
    return apply_epilogue(x, Epilogue(bias))


def apply_epilogue(x: Array, epilogue: Epilogue) -> Array:
    """Add the bias to `x`, (batch, channels, *spatial) or (channels,), and apply the activation."""
    bias, activation = epilogue
    if bias is not None:
        x = x + bias.reshape(-1, *(1,) * max(x.ndim - 2, 0)).astype(x.dtype)
    if activation == "none":
        return x
    return np.asarray(np.clip(x, 0, 6 if activation == "relu6" else None))


def dc_response(stage: Stage, values: Array) -> Array:
    """Return the response to a constant input, one value per channel, away from the borders."""
    if stage.transposed:
        return np.zeros(stage.out_channels, values.dtype)  # its padding is always zeros
    ones = (1,) * stage.geometry.ndim
    flat = stage.weight.sum(axis=tuple(range(2, stage.weight.ndim)), keepdims=True)
    return _correlate(stage, flat, values.reshape(1, -1, *ones), ones, ones).reshape(-1)


def run_stage(stage: Stage, x: Array, border: Array | None = None) -> Array:
    """Cross-correlate `x`, (batch, channels, *spatial), with `stage`.

    `border` holds the border values of mode ``"constant"``, one per channel.
    """
    out = stage.output_shape(x.shape[1:])
    if stage.transposed:
        return _transposed_correlate(stage, x, out[1:])
    x = pad(x, stage.geometry.padding, stage.geometry.padding_mode, border)
    return _correlate(stage, stage.weight, x, out[1:], stage.geometry.stride)


def pad(x: Array, padding: Pads, mode: str, border: Array | None) -> Array:
    """Pad `x` in any mode, with the values `border`, one per channel, in mode ``"constant"``."""
    widths = [(0, 0), (0, 0), *padding]
    if not x.size and mode not in ("zeros", "constant"):
        mode = "zeros"  # NumPy cannot repeat samples of an empty array
    if mode == "constant" and border is not None:
        values = border.reshape(-1, *(1,) * (x.ndim - 2))
        is_inside = np.pad(np.ones(x.shape[2:], bool), padding)
        return np.where(is_inside, np.pad(x, widths), values).astype(x.dtype)
    if mode in ("zeros", "constant"):
        return np.pad(x, widths)
    return np.pad(x, widths, mode=_NUMPY_MODE[mode])  # type: ignore[call-overload,no-any-return]


def _correlate(stage: Stage, weight: Array, x: Array, out: Ints, stride: Ints) -> Array:
    g, c = stage.groups, weight.shape[1]
    x = x[:, stage.channel_permutation()]
    x = x.reshape(len(x), stage.outer, g, c, stage.inner, *x.shape[2:])
    w = weight.reshape(g, -1, c, *weight.shape[2:])
    y = np.zeros((len(x), stage.outer, g, w.shape[1], stage.inner, *out), x.dtype)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        window = [
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, stage.geometry.dilation, stride, out)
        ]
        y += np.einsum("goc,blgcr...->blgor...", w[trailing(*tap)], x[trailing(*window)])
    return y.reshape(len(x), stage.matrix_shape[0], *out)


def _transposed_correlate(stage: Stage, x: Array, out: Ints) -> Array:
    """Apply the adjoint of :func:`_correlate`, then crop the padding."""
    g, (o, c), geometry = stage.groups, stage.weight.shape[:2], stage.geometry
    size = x.shape[2:]
    x = x.reshape(len(x), stage.outer, g, o // g, stage.inner, *size)
    w = stage.weight.reshape(g, o // g, c, *stage.kernel)
    padded = [n + sum(p) for n, p in zip(out, geometry.padding)]
    y = np.zeros((len(x), stage.outer, g, c, stage.inner, *padded), x.dtype)
    for tap in itertools.product(*map(range, stage.kernel)):
        window = [
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, geometry.dilation, geometry.stride, size)
        ]
        y[trailing(*window)] += np.einsum("goc,blgor...->blgcr...", w[trailing(*tap)], x)
    inside = [slice(before, before + n) for (before, _), n in zip(geometry.padding, out)]
    y = np.asarray(y.reshape(len(x), stage.matrix_shape[1], *padded)[trailing(*inside)])
    return y[:, np.argsort(stage.channel_permutation())]


def saturate(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round to integers of `dtype`, halves to even, and clip; NaN becomes the smallest."""
    limits = np.iinfo(dtype)
    rounded = np.rint(np.where(np.isnan(values), limits.min, values))
    # The largest 64-bit integers are no floating-point numbers: clip below them, then set them.
    high = float(limits.max)
    if int(high) > limits.max:
        high = float(np.nextafter(high, 0))
    integers = np.clip(rounded, limits.min, high).astype(dtype)
    integers[rounded >= limits.max] = limits.max
    return integers
