"""Chains as PyTorch's own convolutions; PyTorch is imported only when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
    """Run one stage.

    Replications run along the batch or an additional axis, so that no weight is copied.

    Raises
    ------
    NotImplementedError
        If PyTorch has no operator for the padding of the stage.
    """
    g = s.geometry
    pads: list[Any] = [a for a, _ in g.padding]
    ends = list(g.output_padding)
    if s.transposed:
        ends = [end + a - b for end, (a, b) in zip(ends, g.padding)]
        if any(n < 0 or n >= max(m) for n, *m in zip(ends, g.stride, g.dilation)):
            raise NotImplementedError(f"PyTorch does not crop a convolution by {g.padding}")
    elif any(a != b for a, b in g.padding) or g.padding_mode != "zeros":
        t, pads = _pad(t, s), [0] * g.ndim
    if s.shuffle != (1, 1) and not s.transposed:
        t = _shuffle(t, *s.shuffle)
    settings = _Settings(s.transposed, list(g.stride), pads, list(g.dilation), ends, s.groups)
    t = _run_copies(t, s, weight, bias, settings)
    if s.shuffle != (1, 1) and s.transposed:
        t = _shuffle(t, *reversed(s.shuffle))
    return t


class _Settings(NamedTuple):
    """Arguments of a convolution beside its arrays."""

    transposed: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    groups: int

    def run(self, t: Any, weight: Any, bias: Any) -> Any:
        convolve = sys.modules["torch"].convolution
        transposed, stride, padding, dilation, output_padding, groups = self
        return convolve(
            t, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )

    def with_axis(self) -> _Settings:
        """Return the arguments with one more leading axis of one tap."""
        return self._replace(
            stride=[1, *self.stride], padding=[0, *self.padding],
            dilation=[1, *self.dilation], output_padding=[0, *self.output_padding],
        )  # fmt: skip


def _run_copies(t: Any, s: Stage, weight: Any, bias: Any, settings: _Settings) -> Any:
    """Run a stage that needs no more padding and no shuffle."""
    if s.outer > 1:
        n = len(t)
        t = t.reshape(n * s.outer, -1, *t.shape[2:])
        t = _run_copies(t, replace(s, outer=1, shuffle=(1, 1)), weight, bias, settings)
        return t.reshape(n, -1, *t.shape[2:])
    if s.inner == 1:
        return settings.run(t, weight, bias)
    t = t.reshape(len(t), -1, s.inner, *t.shape[2:])
    if s.geometry.ndim == 3:  # no fourth axis: replications run along the batch
        n = len(t)
        t = t.movedim(2, 1).reshape(n * s.inner, -1, *t.shape[3:])
        t = settings.run(t, weight, bias)
        t = t.reshape(n, s.inner, -1, *t.shape[2:]).movedim(1, 2)
        return t.reshape(n, -1, *t.shape[3:])
    t = settings.with_axis().run(t, weight.unsqueeze(2), bias)
    return t.reshape(len(t), -1, *t.shape[3:])


def _pad(t: Any, s: Stage) -> Any:
    g = s.geometry
    if not any(map(any, g.padding)):
        return t
    mode = {"zeros": "constant", "constant": "constant"}.get(g.padding_mode, g.padding_mode)
    if mode == "symmetric" or (g.padding_mode == "constant" and g.value):
        raise NotImplementedError(f"PyTorch does not pad in mode {g.padding_mode!r}, for {s!r}")
    widths = [n for pair in reversed(g.padding) for n in pair]
    return sys.modules["torch"].nn.functional.pad(t, widths, mode)


def _shuffle(t: Any, a: int, b: int) -> Any:
    """Permute channels from (a, b, rest) to (b, a, rest)."""
    return t.reshape(len(t), a, b, -1, *t.shape[2:]).transpose(1, 2).reshape(t.shape)
