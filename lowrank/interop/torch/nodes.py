"""Tables of PyTorch's modules, functions and methods: what programs have for them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lowrank.interop.torch.modules import PADDING_MODES
from lowrank.interop.torch.operations import (
    adaptive_pool,
    channel_shuffle,
    chunk,
    concatenate,
    dropout,
    elementwise,
    expand_as,
    flatten,
    get_item,
    group_norm,
    identity,
    instance_norm,
    max_pool,
    mean,
    mean_pool,
    pad,
    pad_module,
    permute,
    pixel_shuffle,
    power,
    reshape,
    softmax,
    split,
    squeeze,
    transpose,
    unsqueeze,
    upsample,
)

Operation = Callable[..., Any]


def _of_each_ndim(family: Any, pattern: str, operation: Operation) -> dict[Any, Operation]:
    return {getattr(family, pattern.format(n)): partial(operation, n) for n in (1, 2, 3)}


add, multiply = partial(elementwise, "add"), partial(elementwise, "multiply")
_max, _mean = partial(adaptive_pool, "max pool"), partial(adaptive_pool, "mean pool")

# Settings of a module are the attributes that have the names of an operation's parameters.
_MODULES: dict[type[nn.Module], Operation] = {
    **_of_each_ndim(nn, "MaxPool{}d", max_pool), **_of_each_ndim(nn, "AvgPool{}d", mean_pool),
    **_of_each_ndim(nn, "AdaptiveMaxPool{}d", _max),
    **_of_each_ndim(nn, "AdaptiveAvgPool{}d", _mean),
    **_of_each_ndim(nn, "InstanceNorm{}d", instance_norm), nn.GroupNorm: group_norm,
    nn.Softmax: softmax,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), identity),
    nn.Upsample: upsample, nn.UpsamplingNearest2d: upsample, nn.PixelShuffle: pixel_shuffle,
    nn.ChannelShuffle: channel_shuffle, nn.Flatten: flatten,
    **{kind: partial(pad_module, mode) for kind, mode in PADDING_MODES.items()},
}  # fmt: skip
_FUNCTIONS: dict[Any, Operation] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), multiply),
    **dict.fromkeys((operator.pow, torch.pow, torch.square), power),
    **_of_each_ndim(functional, "max_pool{}d", max_pool),
    **_of_each_ndim(torch, "max_pool{}d", max_pool),
    **_of_each_ndim(functional, "avg_pool{}d", mean_pool),
    **_of_each_ndim(functional, "adaptive_max_pool{}d", _max),
    **_of_each_ndim(functional, "adaptive_avg_pool{}d", _mean),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenate),
    functional.instance_norm: partial(instance_norm, None), functional.group_norm: group_norm,
    **dict.fromkeys((functional.softmax, torch.softmax, "softmax"), softmax),
    torch.mean: mean, functional.pad: pad, functional.interpolate: upsample,
    functional.pixel_shuffle: pixel_shuffle, functional.channel_shuffle: channel_shuffle,
    torch.split: split, torch.chunk: chunk, operator.getitem: get_item, torch.reshape: reshape,
    torch.flatten: flatten, torch.squeeze: squeeze, torch.unsqueeze: unsqueeze,
    torch.transpose: transpose, torch.permute: permute,
    **dict.fromkeys(
        (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
        dropout,
    ),
}  # fmt: skip
_METHODS: dict[str, Operation] = {
    **dict.fromkeys(("add", "add_", "__add__", "__iadd__"), add),
    **dict.fromkeys(("mul", "mul_", "multiply"), multiply),
    "mean": mean, "split": split, "chunk": chunk, "view": reshape, "reshape": reshape,
    "flatten": flatten, "squeeze": squeeze, "unsqueeze": unsqueeze, "transpose": transpose,
    "permute": permute, "expand_as": expand_as,
    **dict.fromkeys(("pow", "square"), power),
    **dict.fromkeys(("contiguous", "clone", "detach"), identity),
}  # fmt: skip
# Operations whose outputs may share memory with their inputs in PyTorch.
ALIASES = (
    identity, dropout, split, chunk, get_item, reshape, flatten, squeeze, unsqueeze, transpose,
    permute, expand_as,
)  # fmt: skip


def find_operation(node: fx.Node, module: nn.Module | None) -> Operation | None:
    """Return the operation of a program that a node computes, or None.

    Parameters
    ----------
    node : fx.Node
        Node of a traced graph.
    module : nn.Module or None
        Module that the node calls, if it calls one.

    Returns
    -------
    callable or None
        ``operation(recorder, *args, **settings)`` of :class:`Tensor` arguments; it may still raise
        Unsupported for their shapes.
    """
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    operation = _MODULES.get(type(module))
    if operation is None:
        return None
    settings = {
        name: getattr(module, name)
        for name in inspect.signature(operation).parameters
        if hasattr(module, name)
    }
    return partial(operation, **settings)


# Activations of the engine, by the modules, functions and methods that compute them.
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, functional.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), "hard_swish"),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), "hard_sigmoid"),
    **dict.fromkeys((nn.SiLU, functional.silu), "silu"),
    **dict.fromkeys(
        (nn.Sigmoid, functional.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"
    ),
    **dict.fromkeys((nn.Tanh, functional.tanh, torch.tanh, "tanh", "tanh_"), "tanh"),
}  # fmt: skip


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Any:
    return _clamp(min_val, max_val)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return "leaky_relu", negative_slope


def _gelu(approximate: str = "none") -> Any:
    return ("gelu", 0.0) if approximate == "none" else None


def _elu(alpha: float = 1.0, inplace: bool = False) -> Any:
    return "elu", alpha


def _clamp(min: Any = None, max: Any = None) -> Any:
    if min != 0 or not isinstance(max, int | float | None):
        return None
    if max is None:
        return "relu", 0.0
    return ("relu6", 0.0) if max == 6 else ("clip", float(max))


# Activations that depend on settings, which have PyTorch's names.
_CHOICES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((nn.Hardtanh, functional.hardtanh), _hardtanh),
    **dict.fromkeys((nn.LeakyReLU, functional.leaky_relu), _leaky_relu),
    **dict.fromkeys((nn.ELU, functional.elu), _elu),
    **dict.fromkeys((nn.GELU, functional.gelu), _gelu),
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"), _clamp),
}


def find_activation(node: fx.Node, module: nn.Module | None) -> tuple[str, float] | None:
    """Return the activation that a node computes, if the engine has it, and its parameter.

    Parameters
    ----------
    node : fx.Node
        Node of a traced graph.
    module : nn.Module or None
        Module that the node calls, if it calls one.

    Returns
    -------
    (str, float) or None
        Name of the activation, and the slope of ``"leaky_relu"`` for negative values, the scale
        of ``"elu"`` or the upper bound of ``"clip"``.
    """
    called: Any = type(module) if node.op == "call_module" else node.target
    if called in _ACTIVATIONS:
        return _ACTIVATIONS[called], 0.0
    choose = _CHOICES.get(called)
    if choose is None:
        return None
    if node.op != "call_module":
        return choose(*node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
    names = inspect.signature(choose).parameters
    settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return choose(**settings)  # type: ignore[no-any-return]
