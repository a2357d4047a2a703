"""Chains on PyTorch's tensors: what its own convolutions make of the stages.

Imports nothing of PyTorch: a tensor brings it along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core.stage import Epilogue, Stage


def call(
    stages: Sequence[Stage],
    epilogues: Sequence[Epilogue],
    x: Array,
    channels_last: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Callable[[], Any]:
    """A call of `stages` on `x`, weights and input in PyTorch's memory and layout beforehand."""
    import torch

    formats = {}
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def of(a: Array | None) -> Any:
        if a is None:
            return None
        t = torch.from_numpy(np.require(a, requirements=["C", "W"]))
        t = t.to(device, getattr(torch, dtype) if dtype else None)
        return t.contiguous(memory_format=formats[t.ndim]) if t.ndim in formats else t

    given = of(x)
    layers = [(s, of(s.weight), of(e.bias), e.activation) for s, e in zip(stages, epilogues)]

    def go() -> Any:
        t = given
        with torch.inference_mode():
            for stage, weight, bias, activation in layers:
                t = run_stage(t, stage, weight, bias)
                if activation != "none":
                    t = getattr(torch.nn.functional, activation)(t, inplace=True)
        return t

    return go


def run_stage(t: Any, s: Stage, weight: Any, bias: Any = None) -> Any:
    """One plain stage of zero padding, alike at both ends.

    Tied copies go along the batch or one more axis, so that no weight is copied.
    """
    g = s.geometry
    if s.transposed or any(a != b for a, b in g.padding) or s.shuffle != (1, 1):
        raise NotImplementedError(f"{s!r} is no plain convolution of PyTorch's")
    if g.padding_mode != "zeros" and any(map(any, g.padding)):
        raise NotImplementedError(f"a border of {g.padding_mode} is padded outside PyTorch's")
    functional = sys.modules["torch"].nn.functional
    run = (functional.conv1d, functional.conv2d, functional.conv3d)
    stride, pads, dilation = list(g.stride), [a for a, _ in g.padding], list(g.dilation)
    if s.outer > 1:
        n = len(t)
        t = t.reshape(n * s.outer, -1, *t.shape[2:])
        t = run[g.ndim - 1](t, weight, bias, stride, pads, dilation, s.groups)
        return t.reshape(n, -1, *t.shape[2:])
    if s.inner > 1:
        t = t.reshape(len(t), -1, s.inner, *t.shape[2:])
        if g.ndim == 3:  # no fourth axis: copies along the batch
            n = len(t)
            t = t.movedim(2, 1).reshape(n * s.inner, -1, *t.shape[3:])
            t = run[2](t, weight, bias, stride, pads, dilation, s.groups)
            t = t.reshape(n, s.inner, -1, *t.shape[2:]).movedim(1, 2)
            return t.reshape(n, -1, *t.shape[3:])
        stride, pads, dilation = [1, *stride], [0, *pads], [1, *dilation]
        t = run[g.ndim](t, weight.unsqueeze(2), bias, stride, pads, dilation, s.groups)
        return t.reshape(len(t), -1, *t.shape[3:])
    return run[g.ndim - 1](t, weight, bias, stride, pads, dilation, s.groups)
