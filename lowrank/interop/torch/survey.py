"""Survey of a PyTorch model: the layers that chains can stand in for, and why others stay.

A layer can be replaced only if nothing but its own call reads it.  What the model does is watched
while it runs one example, and then run again with every layer wrapped as its replacement would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.interop.torch.attention import Attention
from lowrank.interop.torch.batches import tensors_in
from lowrank.interop.torch.comparison import difference, repeatable
from lowrank.interop.torch.copies import (
    copy_model,
    held_tensors,
    is_plain,
    replace_module,
    with_sizes,
)
from lowrank.interop.torch.modules import LAYERS, obstacle

_READERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # by paths not always taken
_CALLED = "it is called past its hooks, or its weight is used outside of its own call"


class Survey(NamedTuple):
    """Layers of a model.

    Attributes
    ----------
    names : tuple of str
        Layers that can be replaced, in the order in which the example runs them; of layers that
        share their weights, the first.
    members : dict of str to tuple of str
        Modules that each of these layers stands for.
    left_out : dict of str to str
        All other convolutions and linear operations, with the reasons.
    left_out_macs : dict of str to int
        Their MACs.
    """

    names: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    left_out: dict[str, str]
    left_out_macs: dict[str, int]


def survey(model: nn.Module, original: nn.Module, run: Callable[[nn.Module], Any]) -> Survey:
    """Return what of a model can be replaced.

    Parameters
    ----------
    model : nn.Module
        Copy of the model in evaluation mode.
    original : nn.Module
        Model that was copied.
    run : callable
        Runs a model on one example and returns the output.

    Returns
    -------
    Survey

    Raises
    ------
    Exception
        Whatever `run` raises for `model`.
    """
    found = {
        name: m for name, m in model.named_modules() if isinstance(m, LAYERS) or _has_layer_name(m)
    }
    reasons = {name: reason for name, m in found.items() if (reason := obstacle(m))}
    for parent in model.modules():
        if isinstance(parent, _READERS) and not _has_plain_attention(parent):
            for name, m in found.items():
                if any(m is child for child in parent.children()):
                    reasons.setdefault(name, f"{type(parent).__name__} reads its weight")
    members, shared = _find_groups(model, original, found, reasons)
    reasons |= shared
    watched = copy_model(model, True)  # a run may change the state of a model
    watch = _Watch(watched, original)
    with repeatable(), watch:
        reference = run(watched)
    for name in found:
        if name in watch.readers:
            reasons.setdefault(name, watch.readers[name])
        elif name not in watch.calls:
            reasons.setdefault(name, "the first example does not run it")
    free = [n for n in watch.order if n in members and not _first(members[n], reasons)]
    probe = _Probe(model, run, reference, watch.calls)
    kept = probe.admit([], [members[n] for n in free])
    reasons |= probe.reasons
    inside = {name for one in kept for name in one}
    outside = {n: reasons.get(n, _CALLED) for n in found if n not in inside}
    for name in watch.macs:
        if name not in found:
            kind = type(watch.modules[name]).__qualname__
            outside[name] = f"{kind} computes a product with a weight that is in no layer"
    macs = {n: watch.macs.get(n, 0) for n in outside if n in watch.macs or n not in watch.calls}
    return Survey(tuple(one[0] for one in kept), {one[0]: one for one in kept}, outside, macs)


def _has_plain_attention(module: nn.Module) -> bool:
    """Return whether a transformer layer calls its modules, as its attention tells it to."""
    return isinstance(getattr(module, "self_attn", None), Attention)


def _first(names: Iterable[str], reasons: Mapping[str, str]) -> str:
    return next((reasons[n] for n in names if n in reasons), "")


def _is_scripted(module: nn.Module) -> bool:
    """Return whether a TorchScript module is one of the layers."""
    return isinstance(module, torch.jit.ScriptModule) and _has_layer_name(module)


def _has_layer_name(module: nn.Module) -> bool:
    """Return whether a module is called as one of the layers: scripted, quantised or another's."""
    name = getattr(module, "original_name", type(module).__name__)
    if not any(kind.__name__ == name for kind in LAYERS):
        return False
    return not any(isinstance(m, LAYERS) for m in module.modules())  # else a wrapper of one


def _span(t: torch.Tensor) -> tuple[int, int]:
    """Return the range of addresses of a tensor's values."""
    if not is_plain(t):
        return -id(t), 1 - id(t)
    size = 1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + size * t.element_size()


def _find_groups(
    model: nn.Module,
    original: nn.Module,
    layers: Mapping[str, nn.Module],
    reasons: Mapping[str, str],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the layers that one chain replaces, by the first of them, and why others stay.

    Layers that share all their weights, and do the same with them, are one unknown.
    """
    names = {m: n for n, m in model.named_modules()}
    holders: dict[tuple[int, int], set[nn.Module]] = {}
    for module in names:
        for t in held_tensors(module):
            holders.setdefault(_span(t), set()).add(module)
    spans = sorted(holders)
    # Sorted by address, each span can only overlap others up to the end of those before it.
    touching: dict[tuple[int, int], set[nn.Module]] = {span: set(holders[span]) for span in spans}
    for i, a in enumerate(spans):
        for b in spans[i + 1 :]:
            if b[0] >= a[1]:
                break
            touching[a] |= holders[b]
            touching[b] |= holders[a]
    shared: dict[str, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name, module in layers.items():
        if name in reasons:
            continue
        tensors = [t for t in (module.weight, module.bias) if t is not None]
        others = set().union(*(touching[_span(t)] for t in tensors)) - {module}
        if not others:
            groups[name] = (name,)
            continue
        alike = [names[m] for m in others if _is_alike(m, module, tensors)]
        if len(alike) == len(others) and not _first(alike, reasons):
            together = tuple(n for n in layers if n == name or n in alike)
            if together[0] == name:
                groups[name] = together
            continue
        theirs = ", ".join(sorted(names[m] or type(m).__qualname__ for m in others))
        shared[name] = f"its weight or bias is shared with {theirs}"
    return groups, shared


def _is_alike(other: nn.Module, module: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a module is the same layer, with the same parameters."""
    return (
        type(other) is type(module)
        and other.extra_repr() == module.extra_repr()
        and len(tensors) == sum(t is not None for t in (other.weight, other.bias))
        and all(any(t is u for u in held_tensors(other)) for t in tensors)
    )


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Record of a run: MACs by the innermost module, calls of layers, and who reads weights.

    Attributes
    ----------
    order : list of str
        Names of modules in the order of their first calls.
    calls : dict of str to int
        Number of calls of each module.
    macs : dict of str to int
        MACs of convolutions, and of products with a weight, by the module that computes them.
    readers : dict of str to str
        Reasons why layers whose weights others read stay.
    """

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.calls: dict[str, int] = {}
        self.macs: dict[str, int] = {}
        self.readers: dict[str, str] = {}
        self._stack = [""]
        self._weights, self._outside = _owners(model), _owners(original)
        self._hooks: list[Any] = []

    @property
    def order(self) -> list[str]:
        """Names of modules in the order of their first calls."""
        return list(self.calls)

    def __enter__(self) -> Any:
        self._has_fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it computes a layer in one operation
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self.calls[name] = self.calls.get(name, 0) + 1
                self._stack.append(name)
                if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors_in(args))):
                    self.readers[name] = "it is called inside torch.vmap or another transform"

            def leave(
                module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name
            ) -> None:
                self._stack.pop()
                if isinstance(module, nn.RNNBase):
                    x = args[0] if args else kwargs["input"]
                    self._count_recurrent(name, module, x)

            self._hooks.append(module.register_forward_pre_hook(enter, prepend=True))
            self._hooks.append(
                module.register_forward_hook(leave, with_kwargs=True, always_call=True)
            )
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.backends.mha.set_fastpath_enabled(self._has_fast_path)
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:  # the backward pass of a model's own gradient
            return out
        name = self._stack[-1]
        inner = self.modules[name]
        if isinstance(inner, nn.RNNBase):
            return out
        has_weight = isinstance(inner, LAYERS) or func is torch.ops.aten.convolution.default
        is_copy = func is torch.ops.aten.clone.default or _is_view(args, out)
        for t in args:
            if not (isinstance(t, torch.Tensor) and is_plain(t)):
                continue
            pointer = t.untyped_storage().data_ptr()
            owners = self._weights.get(pointer, [])
            has_weight = has_weight or bool(owners) or pointer in self._outside
            if name in owners or is_copy:
                continue
            for owner in owners:
                if _is_scripted(self.modules[owner]):
                    name = owner
                reader = name or type(inner).__qualname__
                self.readers.setdefault(owner, f"{reader} uses its weight outside of its own call")
            for owner in self._outside.get(pointer, []):
                self.readers.setdefault(
                    owner, "the model holds it where a copy does not follow, such as in a closure"
                )
        if has_weight and (macs := _count_macs(func, args, out)):
            self.macs[name] = self.macs.get(name, 0) + macs
        return out

    def _count_recurrent(self, name: str, module: nn.Module, x: Any) -> None:
        x = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        products = sum(p.numel() for p in module.parameters() if p.ndim == 2)
        self.macs[name] = self.macs.get(name, 0) + math.prod(x.shape[:-1]) * products


def _is_view(args: Any, out: Any) -> bool:
    """Return whether an operation only gives another view of its first argument."""
    if not (args and isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)):
        return False
    is_in_place = out is args[0]
    return (
        not is_in_place
        and is_plain(out)
        and is_plain(args[0])
        and (out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr())
    )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the modules that hold tensors, by the address of their memory."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for t in held_tensors(module):
            if is_plain(t):
                owners.setdefault(t.untyped_storage().data_ptr(), []).append(name)
    return owners


def _count_macs(func: Any, args: Any, out: Any) -> int:
    """Return the MACs of a convolution or a matrix product; 0 for other operations."""
    aten = torch.ops.aten
    if func is aten.convolution.default:
        x, weight, is_transposed = args[0], args[1], args[6]
        return int((x if is_transposed else out).numel() * weight[0].numel())
    if func in (aten.addmm.default, aten.baddbmm.default):
        return int(out.numel() * args[1].shape[-1])
    if func in (aten.mm.default, aten.bmm.default, aten.mv.default):
        return int(out.numel() * args[0].shape[-1])
    if func is aten._trilinear.default:
        return int(len(args[0]) * args[1].numel())
    return 0


class _Probe:
    """Runs of a model with layers wrapped as their replacements would be."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[nn.Module], Any],
        reference: Any,
        calls: Mapping[str, int],
    ) -> None:
        self.model, self.run, self.calls = model, run, calls
        self.reference = tensors_in(reference)
        self.reasons: dict[str, str] = {}
        with repeatable():
            again = tensors_in(run(copy_model(model, True)))
        # Outputs that differ anyway, such as those of noise, cannot be compared.
        self.is_repeatable = difference(self.reference, again) == ""

    def admit(
        self, kept: list[tuple[str, ...]], groups: list[tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """Return `kept` and those of `groups` with which the model still does the same."""
        if not groups:
            return kept
        reason = self._fails([*kept, *groups])
        if not reason:
            return [*kept, *groups]
        if len(groups) == 1:
            self.reasons |= dict.fromkeys(groups[0], reason)
            return kept
        half = len(groups) // 2
        return self.admit(self.admit(kept, groups[:half]), groups[half:])

    def _fails(self, groups: list[tuple[str, ...]]) -> str:
        """Return why a model with these layers wrapped does something else; "" if it does not."""
        model = copy_model(self.model, True)
        bypassed: list[str] = []
        counts: dict[str, int] = {}
        hooks: list[Any] = []
        for group in groups:
            old = [model.get_submodule(name) for name in group]
            wrapped = with_sizes(nn.Sequential(copy_model(old[0], True)), old[0]).eval()

            def count(module: nn.Module, args: Any, name: str = group[0]) -> None:
                counts[name] = counts.get(name, 0) + 1

            def note(module: nn.Module, args: Any, name: str = group[0]) -> None:
                bypassed.append(name)

            hooks.append(wrapped.register_forward_pre_hook(count))
            hooks += [m.register_forward_pre_hook(note) for m in old]
            for name in group:
                model = replace_module(model, name, wrapped)
        try:
            with repeatable():
                output = tensors_in(self.run(model))
        except Exception as why:  # whatever a model does with a layer
            return f"the model needs more of it than its call ({type(why).__name__}: {why})"
        for group in groups:
            if group[0] in bypassed:
                return "the model also holds it outside of its modules, such as in an object"
            if counts.get(group[0], 0) != sum(self.calls.get(name, 0) for name in group):
                return "the model does not call what stands in for it, as if it checked its type"
        if self.is_repeatable and (found := difference(self.reference, output)):
            return f"the output changes if its type does ({found})"
        return ""
