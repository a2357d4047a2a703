"""Chains as PyTorch modules, and PyTorch's convolutions as chains of one."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from lowrank._typing import Array, PaddingMode
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization, dense

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)
_PADS = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "zeros": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
}


# Shapes decide here, which symbolic tracing does not know: it takes these functions as they are.
fx.wrap("_apart")
fx.wrap("_together")


def _apart(
    x: torch.Tensor, ndim: int, left: int, right: int, shuffle: tuple[int, int]
) -> torch.Tensor:
    """Channels (left, channels, right), after the shuffle, with left and right in the batch."""
    a, b = shuffle
    if not ndim:  # features of a linear layer
        lead = x.shape[:-1]
        x = x.reshape(*lead, a, b, -1).transpose(-3, -2)
        return x.reshape(*lead, left, -1, right).transpose(-2, -1)
    n, (channels, *space) = math.prod(x.shape[: -ndim - 1]), x.shape[-ndim - 1 :]
    inner = channels // (left * right)
    if a > 1 and b > 1:
        x = x.reshape(n, a, b, channels // (a * b), *space).transpose(1, 2)
    x = x.reshape(n, left, inner, right, *space).movedim(3, 1)
    return x.reshape(n * right * left, inner, *space)


def _together(y: torch.Tensor, x: torch.Tensor, ndim: int, left: int, right: int) -> torch.Tensor:
    """The outputs of blocks as channels (left, channels, right), batched as `x` was."""
    if not ndim:
        return y.transpose(-2, -1).reshape(*x.shape[:-1], -1)
    lead = x.shape[: -ndim - 1]
    y = y.reshape(math.prod(lead), right, left, *y.shape[1:]).movedim(1, 3)  # n left out right
    return y.reshape(*lead, left * y.shape[2] * right, *y.shape[4:])


class Tied(nn.Module):  # type: ignore[misc]
    """A convolution whose weights serve several blocks of channels: ``I_left (x) W (x) I_right``.

    The Kronecker families need it.  Copies on the left go along the batch, copies on the right
    one after another, so that no weight is stored or trained twice.

    Parameters
    ----------
    inner : nn.Module
        The convolution of one block, or the linear layer.
    left, right : int
        Copies.
    shuffle : (int, int)
        Input channels, seen as (a, b, rest), are taken in the order (b, a, rest).
    """

    def __init__(self, inner: nn.Module, left: int, right: int, shuffle: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.left, self.right, self.shuffle = inner, left, right, shuffle
        self.ndim = max(p.ndim for p in inner.parameters()) - 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; (batch, channels, *spatial) or one example, of a linear layer (..., features)."""
        y = self.inner(_apart(x, self.ndim, self.left, self.right, self.shuffle))
        return cast(torch.Tensor, _together(y, x, self.ndim, self.left, self.right))

    def extra_repr(self) -> str:
        """What printing a model says of it."""
        return f"left={self.left}, right={self.right}, shuffle={self.shuffle}"


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's convolutions or linear layers, and does what they do.

    Parameters
    ----------
    module : nn.Module
        Of any kind.

    Returns
    -------
    bool
        False for a subclass with a forward pass of its own.

    Examples
    --------
    >>> from torch import nn
    >>> from lowrank.interop.torch.modules import is_layer
    >>> is_layer(nn.Conv1d(2, 3, 5)), is_layer(nn.ReLU())
    (True, False)
    """
    kind = next((k for k in LAYERS if isinstance(module, k)), None)
    return kind is not None and all(
        getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward", "_output_padding")
    )


def is_conv(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's convolutions; see :func:`is_layer`."""
    return is_layer(module) and not isinstance(module, nn.Linear)


def of_module(module: nn.Module) -> Factorization:
    """A layer as one dense stage with its bias, in float32 or float64.

    Parameters
    ----------
    module : nn.Module
        A convolution, transposed or not, or a linear layer, which is a pointwise one.

    Returns
    -------
    Factorization

    Raises
    ------
    ValueError
        If its padding cannot be expressed.
    """
    module = cast(Any, module)
    weight, bias = array(module.weight), None if module.bias is None else array(module.bias)
    if isinstance(module, nn.Linear):
        return dense(weight[:, :, None], bias=bias)
    ndim = weight.ndim - 2
    if isinstance(module, TRANSPOSED):
        return dense(
            weight, bias=bias, stride=module.stride, dilation=module.dilation,
            padding=[int(p) for p in module.padding], groups=module.groups, transposed=True,
            output_padding=module.output_padding,
        )  # fmt: skip
    if module.padding == "valid":
        padding: list[Any] = [0] * ndim
    elif module.padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, weight.shape[2:])]
        padding = [(r // 2, r - r // 2) for r in reach]
    else:
        padding = [int(p) for p in module.padding]
    return dense(
        weight, bias=bias, stride=module.stride, padding=padding, dilation=module.dilation,
        groups=module.groups, padding_mode=cast(PaddingMode, module.padding_mode),
    )  # fmt: skip


def array(t: torch.Tensor) -> Array:
    """A tensor's numbers in an array of at least float32."""
    t = t.detach().cpu()
    if t.dtype not in (torch.float32, torch.float64):
        t = t.float()
    return np.ascontiguousarray(t.numpy())


def held(t: torch.Tensor) -> Any:
    """A copy of a tensor's numbers where they are: NumPy's, or on a GPU CuPy's if there is CuPy."""
    if t.is_cuda and importlib.util.find_spec("cupy") is not None:
        cupy = importlib.import_module("cupy")
        with cupy.cuda.Device(t.device.index):
            torch.cuda.current_stream(t.device).synchronize()
            kept = cupy.from_dlpack(t.detach().float().contiguous())
            return kept.copy()
    return array(t).copy()


def to_module(f: Factorization, like: nn.Module, tied: bool = True) -> nn.Sequential:
    """A chain as trainable modules, one a stage.

    Parameters
    ----------
    f : Factorization
        The chain.
    like : nn.Module
        The layer that it replaces: precision, device, memory format and whether it is linear.
    tied : bool
        Whether copies of weights stay one parameter (:class:`Tied`); else they are written out.

    Returns
    -------
    nn.Sequential
        Its bias is that of the last stage.
    """
    weight = cast(torch.Tensor, like.weight)
    made: list[nn.Module] = []
    for i, stage in enumerate(f.stages):
        bias = f.bias if i == len(f.stages) - 1 else None
        if isinstance(like, nn.Linear):
            made += _linear(stage, bias, tied)
            continue
        if stage.outer * stage.inner > 1 or min(stage.shuffle) > 1:
            if tied:
                made += _tied(stage, bias)
                continue
            stage = expanded(stage)
        made += _conv(stage, bias)
    chain = nn.Sequential(*made).to(device=weight.device, dtype=weight.dtype)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if last and not weight.is_contiguous() and weight.is_contiguous(memory_format=last):
        chain = chain.to(memory_format=last)
    for p in chain.parameters():
        p.requires_grad_(weight.requires_grad)
    return chain.train(like.training)


def _linear(stage: Stage, bias: Array | None, tied: bool) -> list[nn.Module]:
    """A pointwise stage as a linear layer over the last axis."""
    copies = stage.outer * stage.inner > 1 or min(stage.shuffle) > 1
    if copies and tied and stage.groups == 1:
        rows, columns = stage.weight.shape[:2]
        inner = _put(nn.Linear(columns, rows, bias=False), stage.weight[..., 0], None)
        made: list[nn.Module] = [Tied(inner, stage.outer, stage.inner, stage.shuffle)]
        return made if bias is None else [*made, Bias(bias)]
    stage = expanded(stage)
    weight = chain_algebra.compose([stage], 1)[..., 0]
    return [_put(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias)]


def _conv(stage: Stage, bias: Array | None) -> list[nn.Module]:
    """A plain stage: a convolution, behind padding that convolutions do not do themselves."""
    g = stage.geometry
    n = g.ndim - 1
    keep: dict[str, Any] = {
        "stride": g.stride, "dilation": g.dilation, "groups": stage.groups,
        "bias": bias is not None,
    }  # fmt: skip
    if stage.transposed:
        if any(a != b for a, b in g.padding):
            raise ValueError(f"PyTorch crops transposed convolutions alike at both ends: {g}")
        conv = TRANSPOSED[n](
            stage.in_channels, stage.out_channels, stage.kernel,
            padding=[a for a, _ in g.padding], output_padding=g.output_padding, **keep,
        )  # fmt: skip
        return [_put(conv, stage.weight, bias)]
    even = all(a == b for a, b in g.padding)
    ahead: list[nn.Module] = []
    if any(map(any, g.padding)) and (not even or g.padding_mode not in ("zeros",)):
        if g.padding_mode not in _PADS:
            raise ValueError(f"PyTorch has no padding of mode {g.padding_mode}")
        pads = [p for pair in reversed(g.padding) for p in pair]
        kind = _PADS[g.padding_mode][n]
        value = {"constant": (g.value,), "zeros": (0.0,)}.get(g.padding_mode, ())
        ahead, padding = [kind(tuple(pads), *value)], [0] * g.ndim
    else:
        padding = [a for a, _ in g.padding]
    conv = CONVS[n](stage.in_channels, stage.out_channels, stage.kernel, padding=padding, **keep)
    return [*ahead, _put(conv, stage.weight, bias)]


def _tied(stage: Stage, bias: Array | None) -> list[nn.Module]:
    if stage.transposed and min(stage.shuffle) > 1:
        return _conv(expanded(stage), bias)  # a shuffle that undoes itself on the output
    inner = Stage(stage.weight, stage.geometry, stage.groups, transposed=stage.transposed)
    made: list[nn.Module] = [
        Tied(nn.Sequential(*_conv(inner, None)), stage.outer, stage.inner, stage.shuffle)
    ]
    if bias is not None:
        made.append(Bias(bias, stage.geometry.ndim))
    return made


class Bias(nn.Module):  # type: ignore[misc]
    """A number added to each channel, behind a stage whose weights are tied.

    Parameters
    ----------
    values : ndarray, shape (channels,)
        To begin with; they are trained like any.
    ndim : int
        Axes behind the channels: 0 for a linear layer.
    """

    def __init__(self, values: Array, ndim: int = 0) -> None:
        super().__init__()
        self.ndim = ndim
        self.bias = nn.Parameter(torch.from_numpy(np.array(values)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add it; (..., channels, *spatial)."""
        return x + self.bias.view(-1, *[1] * self.ndim)


def _put(module: Any, weight: Array, bias: Array | None) -> nn.Module:
    module.weight.data = torch.from_numpy(np.array(weight)).reshape(module.weight.shape)
    if bias is not None:
        module.bias.data = torch.from_numpy(np.array(bias))
    return cast(nn.Module, module)


def expanded(stage: Stage) -> Stage:
    """A stage with its copies and its shuffle written out, for what has neither.

    Parameters
    ----------
    stage : Stage

    Returns
    -------
    Stage
        Of ``left * groups`` groups where nothing is shuffled across them, else dense.
    """
    g, (rows, cols) = stage.groups, stage.weight.shape[:2]
    w = stage.weight.reshape(g, rows // g, cols, *stage.kernel)
    w = np.concatenate([w] * stage.outer)
    eye = np.eye(stage.inner, dtype=w.dtype)
    # (groups, out, in, taps) to (groups, out, right, in, right, taps)
    wide = np.einsum("goc...,rq->gorcq...", w, eye)
    groups = g * stage.outer
    wide = wide.reshape(groups, rows // g * stage.inner, cols * stage.inner, *stage.kernel)
    if min(stage.shuffle) > 1:
        full = np.zeros((groups, wide.shape[1], groups, wide.shape[2], *stage.kernel), w.dtype)
        for i in range(groups):
            full[i, :, i] = wide[i]
        full = full.reshape(groups * wide.shape[1], groups * wide.shape[2], *stage.kernel)
        moved = np.empty_like(full)
        moved[:, stage.channel_permutation()] = full  # column j of the shuffled input is channel source[j]
        return Stage(moved, stage.geometry, transposed=stage.transposed)
    flat = wide.reshape(groups * wide.shape[1], *wide.shape[2:])
    return Stage(np.ascontiguousarray(flat), stage.geometry, groups, transposed=stage.transposed)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """What a linear layer takes, (batch, ..., features), as (batch, features, vectors)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).transpose(1, 2)


def names_of(model: nn.Module, target: nn.Module) -> Sequence[str]:
    """All names under which a module hangs in a model."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if m is target]
