"""Chains as trainable PyTorch modules."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from lowrank._typing import Array
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADDING_MODULES = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "zeros": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
}


# These functions branch on shapes, which symbolic tracing does not know: keep them as calls.
fx.wrap("split_blocks")
fx.wrap("merge_blocks")


def split_blocks(
    x: torch.Tensor, ndim: int, outer: int, inner: int, shuffle: tuple[int, int]
) -> torch.Tensor:
    """Shuffle channels, split them as (outer, channels, inner); outer and inner become batch."""
    a, b = shuffle
    shape = list(x.shape)  # lists and loops: TorchScript compiles them
    lead, space = shape[: len(shape) - ndim - 1], shape[len(shape) - ndim :]
    if ndim == 0:  # features of a linear layer
        x = x.reshape(lead + [a, b, -1]).transpose(-3, -2)  # noqa: RUF005
        return x.reshape(lead + [outer, -1, inner]).transpose(-2, -1)  # noqa: RUF005
    n, channels = 1, shape[len(lead)]
    for size in lead:
        n *= size
    if a > 1 and b > 1:
        x = x.reshape([n, a, b, channels // (a * b)] + space).transpose(1, 2)  # noqa: RUF005
    block = channels // (outer * inner)
    x = x.reshape([n, outer, block, inner] + space).movedim(3, 1)  # noqa: RUF005
    return x.reshape([n * inner * outer, block] + space)  # noqa: RUF005


def merge_blocks(
    y: torch.Tensor, x: torch.Tensor, ndim: int, outer: int, inner: int
) -> torch.Tensor:
    """Undo the split on the output: channels (outer, channels, inner), batch axes as in `x`."""
    lead, sizes = list(x.shape)[: x.ndim - ndim - 1], list(y.shape)
    if ndim == 0:
        return y.transpose(-2, -1).reshape(lead + [-1])  # noqa: RUF005
    n = 1
    for size in lead:
        n *= size
    y = y.reshape([n, inner, outer] + sizes[1:]).movedim(1, 3)  # noqa: RUF005
    return y.reshape(lead + [outer * sizes[1] * inner] + sizes[2:])  # noqa: RUF005


class TiedLayer(nn.Module):  # type: ignore[misc]
    """A layer whose weights are shared by several channel blocks: ``I_outer (x) W (x) I_inner``.

    The Kronecker families need it.  Blocks are moved to the batch axis, so that no weight is
    stored or trained twice.

    Parameters
    ----------
    block : nn.Module
        Convolution or linear layer that is applied to every block.
    outer, inner : int
        Replication outside and inside the channels of a block.
    shuffle : (int, int)
        Channel shuffle of the input: channels (a, b, rest) are read in the order (b, a, rest).
    """

    def __init__(self, block: nn.Module, outer: int, inner: int, shuffle: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.outer, self.inner, self.shuffle = block, outer, inner, shuffle
        self.ndim = max(p.ndim for p in block.parameters()) - 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to (batch, channels, *spatial) or an example; linear: (..., features)."""
        y = self.block(split_blocks(x, self.ndim, self.outer, self.inner, self.shuffle))
        return merge_blocks(y, x, self.ndim, self.outer, self.inner)

    def extra_repr(self) -> str:
        """Return the settings that PyTorch prints for this module."""
        return f"outer={self.outer}, inner={self.inner}, shuffle={self.shuffle}"


class Bias(nn.Module):  # type: ignore[misc]
    """A trainable bias per channel, after a stage with tied weights.

    Parameters
    ----------
    values : ndarray, shape (channels,)
        Initial values.
    ndim : int
        Number of spatial axes; 0 for a linear layer.
    """

    def __init__(self, values: Array, ndim: int = 0) -> None:
        super().__init__()
        self.ndim = ndim
        self.bias = nn.Parameter(torch.from_numpy(np.array(values)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the bias to (..., channels, *spatial)."""
        return x + self.bias.reshape([-1] + [1] * self.ndim)


def to_module(f: Factorization, like: nn.Module, tied: bool = True) -> nn.Sequential:
    """Return a chain as trainable modules, one or more per stage; the last one has the bias.

    Parameters
    ----------
    f : Factorization
        The chain.
    like : nn.Module
        Layer that the chain replaces; it determines the precision, device, memory format, mode
        and whether the modules are linear layers.
    tied : bool
        Whether tied weights stay one parameter (:class:`TiedLayer`) or are expanded to one dense
        or grouped weight.

    Returns
    -------
    nn.Sequential

    Raises
    ------
    ValueError
        If PyTorch has no such padding.
    """
    weight = cast(torch.Tensor, like.weight)
    modules: list[nn.Module] = []
    for i, stage in enumerate(f.stages):
        bias = f.bias if i == len(f.stages) - 1 else None
        if isinstance(like, nn.Linear):
            modules += _linear_modules(stage, bias, tied)
        elif not _is_replicated(stage):
            modules += _conv_modules(stage, bias)
        elif tied:
            modules += _tied_modules(stage, bias)
        else:
            modules += _conv_modules(expand_replication(stage), bias)
    chain = nn.Sequential(*modules).to(device=weight.device, dtype=weight.dtype)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if (
        channels_last
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=channels_last)
    ):
        chain = chain.to(memory_format=channels_last)
    for p in chain.parameters():
        p.requires_grad_(weight.requires_grad)
    return chain.train(like.training)


def expand_replication(stage: Stage) -> Stage:
    """Return an equal stage without replication or shuffle.

    Parameters
    ----------
    stage : Stage
        Any stage.

    Returns
    -------
    Stage
        Stage of ``outer * groups`` groups, or a dense one if the shuffle mixes groups.
    """
    g, (rows, cols) = stage.groups, stage.weight.shape[:2]
    w = stage.weight.reshape(g, rows // g, cols, *stage.kernel)
    w = np.concatenate([w] * stage.outer)
    eye = np.eye(stage.inner, dtype=w.dtype)
    # (groups, out, in, taps) to (groups, out, inner, in, inner, taps)
    wide = np.einsum("goc...,rq->gorcq...", w, eye)
    groups = g * stage.outer
    wide = wide.reshape(groups, rows // g * stage.inner, cols * stage.inner, *stage.kernel)
    if min(stage.shuffle) > 1:
        full = np.zeros((groups, wide.shape[1], groups, wide.shape[2], *stage.kernel), w.dtype)
        for i in range(groups):
            full[i, :, i] = wide[i]
        full = full.reshape(groups * wide.shape[1], groups * wide.shape[2], *stage.kernel)
        unshuffled = np.empty_like(full)
        unshuffled[:, stage.channel_permutation()] = full
        return Stage(unshuffled, stage.geometry, transposed=stage.transposed)
    flat = wide.reshape(groups * wide.shape[1], *wide.shape[2:])
    return Stage(np.ascontiguousarray(flat), stage.geometry, groups, transposed=stage.transposed)


def _is_replicated(stage: Stage) -> bool:
    return stage.outer * stage.inner > 1 or min(stage.shuffle) > 1


def _linear_modules(stage: Stage, bias: Array | None, tied: bool) -> list[nn.Module]:
    """Return a pointwise stage as a linear layer over the last axis."""
    if _is_replicated(stage) and tied and stage.groups == 1:
        rows, columns = stage.weight.shape[:2]
        block = _with_weights(nn.Linear(columns, rows, bias=False), stage.weight[..., 0], None)
        layer = TiedLayer(block, stage.outer, stage.inner, stage.shuffle)
        return [layer] if bias is None else [layer, Bias(bias)]
    weight = chain_algebra.compose([expand_replication(stage)], 1)[..., 0]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return [_with_weights(linear, weight, bias)]


def _conv_modules(stage: Stage, bias: Array | None) -> list[nn.Module]:
    """Return a stage without replication as a convolution, after a padding module if needed."""
    g = stage.geometry
    n = g.ndim - 1
    options: dict[str, Any] = {
        "stride": g.stride, "dilation": g.dilation, "groups": stage.groups,
        "bias": bias is not None,
    }  # fmt: skip
    if stage.transposed:
        if any(a != b for a, b in g.padding):
            raise ValueError(
                "padding of a transposed convolution must be the same at both ends in PyTorch, "
                f"got {g.padding}"
            )
        conv = TRANSPOSED_CONVS[n](
            stage.in_channels, stage.out_channels, stage.kernel,
            padding=[a for a, _ in g.padding], output_padding=g.output_padding, **options,
        )  # fmt: skip
        return [_with_weights(conv, stage.weight, bias)]
    is_symmetric = all(a == b for a, b in g.padding)
    padding_modules: list[nn.Module] = []
    if any(map(any, g.padding)) and (not is_symmetric or g.padding_mode != "zeros"):
        if g.padding_mode not in PADDING_MODULES:
            raise ValueError(
                f"padding_mode must be one that PyTorch has ({', '.join(PADDING_MODULES)}), "
                f"got {g.padding_mode}"
            )
        pads = [p for pair in reversed(g.padding) for p in pair]
        kind = PADDING_MODULES[g.padding_mode][n]
        value = {"constant": (g.value,), "zeros": (0.0,)}.get(g.padding_mode, ())
        padding_modules, padding = [kind(tuple(pads), *value)], [0] * g.ndim
    else:
        padding = [a for a, _ in g.padding]
    conv = CONVS[n](stage.in_channels, stage.out_channels, stage.kernel, padding=padding, **options)
    return [*padding_modules, _with_weights(conv, stage.weight, bias)]


def _tied_modules(stage: Stage, bias: Array | None) -> list[nn.Module]:
    if stage.transposed and min(stage.shuffle) > 1:  # the shuffle is on the output: not a TiedLayer
        return _conv_modules(expand_replication(stage), bias)
    block = Stage(stage.weight, stage.geometry, stage.groups, transposed=stage.transposed)
    layer = TiedLayer(
        nn.Sequential(*_conv_modules(block, None)), stage.outer, stage.inner, stage.shuffle
    )
    return [layer] if bias is None else [layer, Bias(bias, stage.geometry.ndim)]


def _with_weights(module: Any, weight: Array, bias: Array | None) -> nn.Module:
    module.weight.data = torch.from_numpy(np.array(weight)).reshape(module.weight.shape)
    if bias is not None:
        module.bias.data = torch.from_numpy(np.array(bias))
    return cast(nn.Module, module)
