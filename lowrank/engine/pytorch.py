"""Chains as PyTorch's own convolutions; PyTorch is imported only when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core.stage import Epilogue, Stage


def bind_call(
    stages: Sequence[Stage],
    epilogues: Sequence[Epilogue],
    x: Array,
    channels_last: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Callable[[], Any]:
    """Return a call of `stages` on `x`, with weights and input already in PyTorch's layout."""
    import torch

    formats = {}
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def as_tensor(a: Array | None) -> Any:
        if a is None:
            return None
        t = torch.from_numpy(np.require(a, requirements=["C", "W"]))
        t = t.to(device, getattr(torch, dtype) if dtype else None)
        return t.contiguous(memory_format=formats[t.ndim]) if t.ndim in formats else t

    x_tensor = as_tensor(x)
    layers = [
        (s, as_tensor(s.weight), as_tensor(e.bias), e.activation) for s, e in zip(stages, epilogues)
    ]

    def run() -> Any:
        t = x_tensor
        with torch.inference_mode():
            for stage, weight, bias, activation in layers:
                t = run_stage(t, stage, weight, bias)
                if activation != "none":
                    t = getattr(torch.nn.functional, activation)(t, inplace=True)
        return t

    return run


def run_stage(t: Any, s: Stage, weight: Any, bias: Any = None) -> Any:
    """Run one stage with symmetric zero padding, neither transposed nor shuffled.

    Replications run along the batch or an additional axis, so that no weight is copied.
    """
    g = s.geometry
    if s.transposed or any(a != b for a, b in g.padding) or s.shuffle != (1, 1):
        raise NotImplementedError(f"PyTorch has no single convolution for {s!r}")
    if g.padding_mode != "zeros" and any(map(any, g.padding)):
        raise NotImplementedError(f"padding mode must be zeros here, got {g.padding_mode}")
    functional = sys.modules["torch"].nn.functional
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)
    stride, pads, dilation = list(g.stride), [a for a, _ in g.padding], list(g.dilation)
    if s.outer > 1:
        n = len(t)
        t = t.reshape(n * s.outer, -1, *t.shape[2:])
        t = convolve[g.ndim - 1](t, weight, bias, stride, pads, dilation, s.groups)
        return t.reshape(n, -1, *t.shape[2:])
    if s.inner > 1:
        t = t.reshape(len(t), -1, s.inner, *t.shape[2:])
        if g.ndim == 3:  # no fourth axis: replications run along the batch
            n = len(t)
            t = t.movedim(2, 1).reshape(n * s.inner, -1, *t.shape[3:])
            t = convolve[2](t, weight, bias, stride, pads, dilation, s.groups)
            t = t.reshape(n, s.inner, -1, *t.shape[2:]).movedim(1, 2)
            return t.reshape(n, -1, *t.shape[3:])
        stride, pads, dilation = [1, *stride], [0, *pads], [1, *dilation]
        t = convolve[g.ndim](t, weight.unsqueeze(2), bias, stride, pads, dilation, s.groups)
        return t.reshape(len(t), -1, *t.shape[3:])
    return convolve[g.ndim - 1](t, weight, bias, stride, pads, dilation, s.groups)
