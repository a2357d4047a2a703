"""Copies of PyTorch models, and the replacement of a layer wherever a model refers to it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
#: Entries of a module's dictionary in which PyTorch keeps its own.
_OWN = frozenset({*HOOKS, "_parameters", "_buffers", "_modules"})


def check_model(model: nn.Module) -> None:
    """Check that a model is a module of Python with weights.

    Parameters
    ----------
    model : nn.Module
        Any object.

    Raises
    ------
    TypeError
        If it is not a module, or one that Python does not run.
    ValueError
        If weights have no values yet.
    """
    kind = type(model).__qualname__
    if not isinstance(model, nn.Module):
        remedy = ": give the module that was exported" if kind == "ExportedProgram" else ""
        raise TypeError(f"model must be a torch.nn.Module, got {kind}{remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be a torch.nn.Module of Python, got a TorchScript module ({kind}): give "
            "the module that was scripted or traced"
        )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ValueError(
                f"model must have weights, got a lazy layer without them ({name}): run the model "
                "on an example first"
            )
        if t.is_meta:
            raise ValueError(
                f"model must have weights, got {name} on the meta device, without values: call "
                "model.to_empty(device='cpu') and load a state dict first"
            )


def copy_model(model: nn.Module, is_shared: bool = False) -> nn.Module:
    """Return a copy of a model, in which compiled modules are the modules that were compiled.

    Of a DistributedDataParallel, it is a copy of the module inside.
    Tensors that share memory still do in the copy, and weights that a forward pass has computed,
    such as those of ``torch.nn.utils.weight_norm``, are constants until the next one.

    Parameters
    ----------
    model : nn.Module
        Model to copy.
    is_shared : bool
        Whether the copy has the parameters of the model, and not copies of them.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If a part of the model cannot be copied.
    """
    if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    memo: dict[int, Any] = {}
    parameters = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    if is_shared:
        memo |= {id(p): p for p in parameters}
    else:
        memo |= _copy_overlapping([t for m in model.modules() for t in held_tensors(m)])
        memo |= {  # which copy.deepcopy refuses
            id(p): nn.Parameter(p.detach().clone(), p.requires_grad)
            for p in parameters
            if p.layout is not torch.strided
        }
    for module in model.modules():
        for value in _plain_values(module):
            if isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        with torch.no_grad():  # copies of TorchScript modules would have a history
            copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as cause:  # whatever a model holds: locks, files, process groups
        raise ValueError(
            f"the model cannot be copied ({type(cause).__name__}: {cause}): give the module that "
            "is wrapped (model.module), or remove what copy.deepcopy cannot copy"
        ) from cause
    for p, q in zip(model.parameters(), copied.parameters()):
        if p.requires_grad != q.requires_grad:
            q.requires_grad_(p.requires_grad)
    return _without_compilers(copied)


def _copy_overlapping(tensors: list[torch.Tensor]) -> dict[int, Any]:
    """Return copies of distinct tensors that share memory: a deep copy would separate them."""
    by_storage: dict[int, dict[int, torch.Tensor]] = {}
    for t in tensors:
        if is_plain(t):
            by_storage.setdefault(t.untyped_storage().data_ptr(), {})[id(t)] = t
    memo: dict[int, Any] = {}
    for shared in by_storage.values():
        if len(shared) < 2:
            continue
        storage = next(iter(shared.values())).untyped_storage().clone()
        for key, t in shared.items():
            values = torch.empty(0, dtype=t.dtype, device=t.device)
            values.set_(storage, t.storage_offset(), t.shape, t.stride())
            is_parameter = isinstance(t, nn.Parameter)
            memo[key] = nn.Parameter(values, t.requires_grad) if is_parameter else values
    return memo


def is_plain(t: torch.Tensor) -> bool:
    """Return whether a tensor has values at an address of its own.

    Parameters
    ----------
    t : torch.Tensor
        Any tensor.

    Returns
    -------
    bool
    """
    is_dense = t.layout is torch.strided and t.numel() > 0
    return is_dense and type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta


def _without_compilers(model: nn.Module) -> nn.Module:
    """Replace modules that torch.compile returned by those that it was given."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if hasattr(child, "_orig_mod") and isinstance(child, nn.Module):
                setattr(module, name, child._orig_mod)
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def run_eagerly() -> Iterator[None]:
    """Run functions that torch.compile returned as they were written: hooks see every layer."""
    if hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _plain_values(module: nn.Module) -> Iterator[Any]:
    """Yield the entries of a module's plain attributes, also those inside lists and dicts."""
    todo = [value for key, value in vars(module).items() if key not in _OWN]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        else:
            yield value


def held_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a module holds itself: parameters, buffers and plain attributes.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Yields
    ------
    torch.Tensor
    """
    yield from (
        t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
    )
    yield from (v for v in _plain_values(module) if isinstance(v, torch.Tensor))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace a submodule under all its names; return the model, or `new` if it was the model.

    Plain lists, tuples, sets and dicts among the attributes of modules get the new module, too.
    """
    old = model.get_submodule(name)
    if old is model:
        return new
    for module in list(model.modules()):
        if module is old:
            continue
        for key, child in module._modules.items():
            if child is old:
                setattr(module, key, new)
        for key, value in list(vars(module).items()):
            if key not in _OWN:
                exchanged = _exchange(value, old, new, set())
                if exchanged is not value:
                    vars(module)[key] = exchanged
    return model


def _exchange(value: Any, old: nn.Module, new: nn.Module, seen: set[int]) -> Any:
    """Exchange a module inside plain containers, in place where they can change."""
    if value is old:
        return new
    if id(value) in seen:
        return value
    seen.add(id(value))

    def change(entry: Any) -> Any:
        return _exchange(entry, old, new, seen)

    if isinstance(value, dict):
        if old in value:  # in its place: the order may matter
            entries = [(change(key), entry) for key, entry in value.items()]
            value.clear()
            value.update(entries)
        _put(value.items(), change, value.__setitem__)
    elif isinstance(value, list):
        _put(enumerate(value), change, value.__setitem__)
    elif isinstance(value, set) and old in value:
        value.remove(old)
        value.add(new)
    elif isinstance(value, tuple | frozenset):
        entries = [change(entry) for entry in value]
        if any(a is not b for a, b in zip(entries, value)):
            is_named = hasattr(value, "_fields")
            return type(value)(*entries) if is_named else type(value)(entries)
    return value


def _put(items: Any, change: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> None:
    for key, entry in list(items):
        exchanged = change(entry)
        if exchanged is not entry:
            put(key, exchanged)


#: Settings of a layer that models read; those of the convolution that a chain represents.
_SIZES = (
    "in_features", "out_features", "nx", "nf", "in_channels", "out_channels", "kernel_size",
    "stride", "padding", "dilation", "transposed", "output_padding", "groups", "padding_mode",
)  # fmt: skip


class WeightSettings:
    """All but the values of the weight that a chain has replaced, for models that read these.

    Any other use, such as one of its values, raises an error, so that the layer is not replaced.

    Parameters
    ----------
    chain : nn.Module
        Chain in the place of the layer.
    shape : torch.Size
        Shape of the weight of the layer.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from lowrank.interop.torch.copies import WeightSettings
    >>> weight = WeightSettings(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)), torch.Size((3, 4)))
    >>> weight.dtype, weight.device, weight.shape, weight.ndim
    (torch.float32, device(type='cpu'), torch.Size([3, 4]), 2)
    """

    def __init__(self, chain: nn.Module, shape: torch.Size) -> None:
        self._chain, self.shape, self.ndim = chain, shape, len(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights of the chain."""
        return next(self._chain.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights of the chain."""
        return next(self._chain.parameters()).device


def with_sizes(chain: nn.Sequential, like: nn.Module) -> nn.Sequential:
    """Give a chain the sizes and settings of the layer that it replaces, and return it.

    Parameters
    ----------
    chain : nn.Sequential
        Chain to change.
    like : nn.Module
        Layer that it replaces.

    Returns
    -------
    nn.Sequential
        `chain`, with attributes such as ``out_features`` and ``weight.dtype``.
    """
    for name in _SIZES:
        if hasattr(like, name):
            setattr(chain, name, getattr(like, name))
    chain.weight = WeightSettings(chain, like.weight.shape)
    return chain
