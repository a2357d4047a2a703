"""Gradients of the weight and the bias of a stage, and of padded inputs, as PyTorch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage
from lowrank.engine import gradients
from lowrank.engine.padding import padded_indices
from lowrank.interop.torch.chains import split_blocks
from lowrank.interop.torch.plans import compute_dtype, has_constant_border


def weight_gradient(
    stage: Stage, x: torch.Tensor, grad: torch.Tensor, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the weight and of the bias of a stage.

    Dense stages are computed by lowrank's engine, others by PyTorch's convolutions.

    Parameters
    ----------
    stage : Stage
        Stage; its weight gives a shape only.
    x : torch.Tensor, shape (batch, in_channels, \\*spatial)
        Its input.
    grad : torch.Tensor, shape (batch, out_channels, \\*spatial)
        Gradient of its output.
    threads : int
        Number of threads of lowrank's engine.

    Returns
    -------
    weight, bias : torch.Tensor
        Gradients, in the precision of the computation.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import lowrank
    >>> from lowrank.interop.torch.weight_gradients import weight_gradient
    >>> (stage,) = lowrank.dense(np.ones((4, 2, 3))).stages
    >>> weight, bias = weight_gradient(stage, torch.ones(1, 2, 5), torch.ones(1, 4, 3), threads=1)
    >>> weight[0, 0], bias[0]
    (tensor([3., 3., 3.]), tensor(3.))
    """
    g, dtype = stage.geometry, compute_dtype(x)
    x, grad = x.detach().to(dtype), grad.detach().to(dtype)
    source, result = x, grad
    if stage.transposed:  # the adjoint of a plain stage, which reads `grad` and writes `x`
        source, result = reached(stage, grad), x
    if g.padding_mode != "zeros" or any(a != b or a < 0 for a, b in g.padding):
        source = _pad(source, g)
        g = replace(g, padding=((0, 0),) * g.ndim, padding_mode="zeros")
    plain = replace(stage, geometry=g, transposed=False)
    axes = [0, *range(2, grad.ndim)]
    if gradients.has_gradient_kernel(plain, result.numel() // result.shape[1]):
        weight = torch.empty(stage.weight.shape, dtype=dtype)
        bias = None if stage.transposed else torch.empty(len(weight), dtype=dtype)
        gradients.weight_gradient(
            plain, source.numpy(), result.numpy(), weight.numpy(),
            None if bias is None else bias.numpy(), threads,
        )  # fmt: skip
        return weight, grad.sum(axes) if bias is None else bias
    source = split_blocks(source, g.ndim, stage.outer, stage.inner, stage.shuffle)
    result = split_blocks(result, g.ndim, stage.outer, stage.inner, (1, 1))
    _, weight, _ = torch.ops.aten.convolution_backward(
        result, source, source.new_empty(stage.weight.shape), None, g.stride,
        [a for a, _ in g.padding], g.dilation, False, [0] * g.ndim, stage.groups,
        [False, True, False],
    )  # fmt: skip
    return weight, grad.sum(axes)


def reached(stage: Stage, grad: torch.Tensor) -> torch.Tensor:
    """Return the part of a transposed stage's output gradient that depends on its input."""
    g = stage.geometry
    for axis, (added, step) in enumerate(zip(g.output_padding, g.stride), 2):
        if added >= step:
            grad = grad.narrow(axis, 0, grad.shape[axis] - added + step - 1)
    return grad


def _pad(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Return an input with the padding of a geometry."""
    if g.padding_mode in ("zeros", "constant"):
        pads = [n for pair in reversed(g.padding) for n in pair]
        return torch.nn.functional.pad(x, pads, value=g.value if has_constant_border(g) else 0.0)
    for axis, index in _tables(g, x.shape):
        x = x.index_select(axis, index)
    return x


def unpad(grad: torch.Tensor, g: Geometry, shape: Sequence[int]) -> torch.Tensor:
    """Return the gradient of an input from that of its padded copy."""
    if g.padding_mode == "constant":
        pads = [-n for pair in reversed(g.padding) for n in pair]
        return torch.nn.functional.pad(grad, pads)
    for axis, index in _tables(g, shape):
        size = [*grad.shape]
        size[axis] = shape[axis]
        grad = grad.new_zeros(size).index_add(axis, index, grad)
    return grad


def _tables(g: Geometry, shape: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the padded axes, and the input sample at each padded position."""
    for axis, (before, after) in enumerate(g.padding, 2):
        if before or after:
            index = padded_indices(int(shape[axis]), before, after, g.padding_mode, 1)
            yield axis, torch.tensor(index.tolist())
