"""PyTorch modules as chains."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowrank._typing import Array, PaddingMode
from lowrank.core.geometry import Geometry
from lowrank.factorization import Factorization, chain, dense
from lowrank.interop.torch.chains import (
    CONVS,
    PADDING_MODULES,
    TRANSPOSED_CONVS,
    Bias,
    TiedLayer,
)
from lowrank.interop.torch.copies import HOOKS

LAYERS = (*CONVS, *TRANSPOSED_CONVS, nn.Linear)
PADDING_MODES = {
    kind: mode for mode, kinds in PADDING_MODULES.items() if mode != "zeros" for kind in kinds
} | dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "constant")


def is_layer(module: nn.Module) -> bool:
    """Return whether a module computes what one of PyTorch's convolutions or linear layers does.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Returns
    -------
    bool
        False for a subclass that overrides the forward pass, for a layer with hooks, and for
        weights that are not real floating-point numbers.

    Examples
    --------
    >>> from torch import nn
    >>> from lowrank.interop.torch.modules import is_layer
    >>> is_layer(nn.Conv1d(2, 3, 5)), is_layer(nn.ReLU())
    (True, False)
    """
    return isinstance(module, LAYERS) and not _differs_from_layer(module)


def _differs_from_layer(module: nn.Module) -> str:
    """Return why a layer does not compute what its class does in PyTorch; "" if it does."""
    kind = next(k for k in LAYERS if isinstance(module, k))
    own = ("forward", "__call__", "_conv_forward", "_output_padding", "_call_impl")
    for name in own:
        if getattr(type(module), name, None) is not getattr(kind, name, None):
            return f"its class {type(module).__qualname__} has its own {name}"
        if name in vars(module):
            return f"its method {name} was replaced"
    for hook in call_hooks(module):
        return f"it has a hook ({_describe_hook(hook)})"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.layout is not torch.strided:
        return f"its weight is of type {type(weight).__qualname__}, and must be a dense tensor"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, and must be real"
    return ""


def call_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of the calls of a module.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Returns
    -------
    list of callable
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for kind in kinds for hook in getattr(module, kind).values()]


#: Functions that make a parameter of a weight that a hook computes, by the hook's class.
_REMEDIES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}


def _describe_hook(hook: Any) -> str:
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    remedy = _REMEDIES.get(name)
    if type(hook).__module__ == "torch.nn.utils.prune":
        remedy = "torch.nn.utils.prune.remove"
    return name if remedy is None else f"{name}: {remedy} makes its weight a parameter"


def obstacle(module: nn.Module) -> str:
    """Return why a chain cannot stand in for a layer; "" if it can.

    Parameters
    ----------
    module : nn.Module
        Convolution, transposed convolution or linear layer, or of a subclass of them.

    Returns
    -------
    str
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module: use the module that was scripted"
    if not isinstance(module, LAYERS):
        kind = type(module)
        return f"its class is {kind.__module__}.{kind.__qualname__}, not that of torch.nn"
    if parametrize.is_parametrized(module):
        kinds = {type(p).__qualname__ for ps in module.parametrizations.values() for p in ps}
        return (
            f"its weight is computed ({', '.join(sorted(kinds))}): "
            "torch.nn.utils.parametrize.remove_parametrizations makes it a parameter"
        )
    if any(isinstance(getattr(type(module), name, None), property) for name in ("weight", "bias")):
        return f"its class {type(module).__qualname__} computes its weight"
    if found := _differs_from_layer(module):
        return found
    if type(module.weight) not in (torch.Tensor, nn.Parameter):
        return f"its weight is of type {type(module.weight).__qualname__}"
    for name in HOOKS:
        for hook in getattr(module, name).values():
            return f"it has a hook of its state dict ({_describe_hook(hook)})"
    return ""


def is_conv(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's convolutions; see :func:`is_layer`."""
    return is_layer(module) and not isinstance(module, nn.Linear)


def from_layer(module: nn.Module) -> Factorization:
    """Return a layer as one dense stage with its bias, in float32 or float64.

    Parameters
    ----------
    module : nn.Module
        Convolution, transposed convolution, or linear layer (a pointwise convolution).

    Returns
    -------
    Factorization

    Raises
    ------
    ValueError
        If a stage cannot express its padding.
    """
    module = cast(Any, module)
    weight, bias = to_numpy(module.weight), None if module.bias is None else to_numpy(module.bias)
    if isinstance(module, nn.Linear):
        return dense(weight[:, :, None], bias=bias)
    ndim = weight.ndim - 2
    if isinstance(module, TRANSPOSED_CONVS):
        return dense(
            weight, bias=bias, stride=module.stride, dilation=module.dilation,
            padding=[int(p) for p in module.padding], groups=module.groups, transposed=True,
            output_padding=module.output_padding,
        )  # fmt: skip
    if module.padding == "valid":
        padding: list[Any] = [0] * ndim
    elif module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, weight.shape[2:])]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [int(p) for p in module.padding]
    return dense(
        weight, bias=bias, stride=module.stride, padding=padding, dilation=module.dilation,
        groups=module.groups, padding_mode=cast(PaddingMode, module.padding_mode),
    )  # fmt: skip


def from_module(module: nn.Module) -> Factorization | None:
    """Return a convolution or a :class:`TiedLayer` as a chain; None for other modules."""
    if is_conv(module):
        return from_layer(module)
    if isinstance(module, TiedLayer):
        block = from_sequence(list(module.block.children()))
        if block is not None and len(block.stages) == 1:
            (stage,) = block.stages
            return chain(
                [replace(stage, outer=module.outer, inner=module.inner, shuffle=module.shuffle)]
            )
    return None


def from_sequence(modules: Sequence[nn.Module]) -> Factorization | None:
    """Return consecutive modules as one chain; None unless all are linear."""
    found: Factorization | None = None
    padding_module: nn.Module | None = None
    for module in modules:
        if isinstance(module, Bias) and found is not None and padding_module is None:
            if found.bias is not None:
                return None
            found = replace(found, bias=to_numpy(module.bias))
            continue
        if type(module) in PADDING_MODES and padding_module is None:
            padding_module = module
            continue
        f = from_module(module)
        if f is not None and padding_module is not None:
            f = merge_padding(padding_module, f)
            padding_module = None
        if f is None or (found is not None and found.bias is not None):
            return None
        if found is not None:
            if f.stages[0].geometry.padding_mode == "constant":
                return None
            f = chain((*found.stages, *f.stages), f.bias)
        found = f
    return found if padding_module is None else None


def merge_padding(padding_module: nn.Module, f: Factorization) -> Factorization | None:
    """Return a convolution that includes the padding module before it; None if it cannot."""
    mode = PADDING_MODES.get(cast(Any, type(padding_module)))
    stage = f.stages[0]
    g = stage.geometry
    if mode is None or len(f.stages) > 1 or stage.transposed or g.padding_mode != "zeros":
        return None
    ends = [int(p) for p in cast(Any, padding_module).padding]
    pairs = [(ends[i], ends[i + 1]) for i in range(0, len(ends), 2)][::-1]
    if len(pairs) != g.ndim or min(ends) < 0:
        return None
    value = float(getattr(padding_module, "value", 0.0)) if mode == "constant" else 0.0
    if mode == "constant" and value == 0.0:
        mode = "zeros"
    if mode != "zeros" and any(map(any, g.padding)):
        return None
    total = tuple((a + c, b + d) for (a, b), (c, d) in zip(pairs, g.padding))
    geometry = Geometry.of(g.ndim, g.stride, total, g.dilation, cast(Any, mode), value)
    return replace(f, stages=(replace(stage, geometry=geometry),), geometry=geometry)


def to_numpy(t: torch.Tensor) -> Array:
    """Return a tensor as a NumPy array of float32 or float64, without a copy where possible."""
    t = t.detach().cpu()
    if t.dtype not in (torch.float32, torch.float64):
        t = t.float()
    return np.ascontiguousarray(t.numpy())


def copy_to_array(t: torch.Tensor) -> Any:
    """Copy a tensor to a CuPy array if it is on a GPU and CuPy is installed, else to NumPy."""
    if t.is_cuda and importlib.util.find_spec("cupy") is not None:
        cupy = importlib.import_module("cupy")
        with cupy.cuda.Device(t.device.index):
            torch.cuda.current_stream(t.device).synchronize()
            found = cupy.from_dlpack(t.detach().float().contiguous()).copy()
            cupy.cuda.get_current_stream().synchronize()  # PyTorch may use the memory again
            return found
    return to_numpy(t).copy()
