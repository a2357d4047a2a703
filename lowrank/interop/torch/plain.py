"""Plain layers for modules that compute what a layer does in another way.

Subclasses that compute their weights (weight standardization, equalized learning rates), linear
layers of other classes (``Conv1D`` of transformers), convolutions behind zeros of their own
(causal ones) and attention with weights but no layers of its
own: each is called, and a plain layer that computes the same stands in for it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.interop.torch.attention import Attention, linear
from lowrank.interop.torch.batches import tensors_in
from lowrank.interop.torch.chains import PADDING_MODULES, TRANSPOSED_CONVS
from lowrank.interop.torch.comparison import difference, repeatable
from lowrank.interop.torch.copies import (
    HOOKS,
    copy_model,
    held_tensors,
    is_plain,
    replace_module,
)
from lowrank.interop.torch.modules import LAYERS, is_layer

_CONV_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip
_MOST_SHIFTS = 4096  # positions of an input within a padded one that are compared


def find_plain_layers(
    model: nn.Module, run: Callable[[nn.Module], Any]
) -> tuple[dict[str, nn.Module], nn.Module]:
    """Return plain layers by the names of the modules that compute the same, and what uses them.

    Parameters
    ----------
    model : nn.Module
        Copy of a model in evaluation mode.
    run : callable
        Runs a model on one example and returns the output.

    Returns
    -------
    layers : dict of str to nn.Module
        nn.Linear, convolutions, sequences of a ``pad`` and a ``conv``, and :class:`Attention`.
    model : nn.Module
        Model in which they stand in; `model` itself if there are none.
    """
    candidates = {name: m for name, m in model.named_modules() if _is_candidate(m)}
    shared = _shared_by_modules(model)
    for name, module in list(candidates.items()):
        tensors = [t for m in module.modules() for t in held_tensors(m)]
        if not all(map(is_plain, tensors)) or any(t.data_ptr() in shared for t in tensors):
            del candidates[name]
    if not candidates:
        return {}, model
    with _without_fast_path():
        inputs: dict[str, Any] = {}
        reference = _run_and_record(copy_model(model, True), candidates, run, inputs)
        found: dict[str, nn.Module] = {}
        for name, args in inputs.items():
            with repeatable():
                plain = _plain(model.get_submodule(name), args)
            if plain is not None:
                found[name] = plain.requires_grad_(False)

        def admit(kept: list[str], names: list[str]) -> list[str]:
            if not names or computes_the_same([*kept, *names]):
                return [*kept, *names]
            if len(names) == 1:
                return kept
            half = len(names) // 2
            return admit(admit(kept, names[:half]), names[half:])

        def computes_the_same(names: Sequence[str]) -> bool:
            changed = put_plain_layers(copy_model(model, True), {n: found[n] for n in names})
            try:
                with repeatable():
                    return not difference(reference, tensors_in(run(changed)))
            except Exception:  # a model that reads attributes of the module
                return False

        names = admit([], list(found))
    found = {name: found[name] for name in names}
    return found, put_plain_layers(model, found)


def put_plain_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Replace modules by copies of plain layers, in their modes; return the model.

    Parameters
    ----------
    model : nn.Module
        Model to change.
    layers : mapping of str to nn.Module
        Plain layers by name.

    Returns
    -------
    nn.Module
    """
    for name, plain in layers.items():
        old = model.get_submodule(name)
        (first, *_) = old.parameters()
        new = copy_model(plain).to(first.device).train(old.training)
        model = replace_module(model, name, new.requires_grad_(first.requires_grad))
    return model


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Run without PyTorch's fused transformer layers, which call no modules."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or parametrize.is_parametrized(module):
        return False
    if any(getattr(m, kind) for m in module.modules() for kind in HOOKS):
        return False
    if type(module) is nn.MultiheadAttention:
        return module.bias_k is None and not module.add_zero_attn
    if any(True for _ in module.children()) or is_layer(module):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    weight = getattr(module, "weight", None)
    if not parameters or not all(p.is_floating_point() for p in parameters.values()):
        return False
    if not isinstance(weight, torch.Tensor) or weight.layout is not torch.strided:
        return False
    if isinstance(module, LAYERS):
        return True
    return weight.ndim == 2 and set(parameters) <= {"weight", "bias"}


def _shared_by_modules(model: nn.Module) -> set[int]:
    """Return the addresses of tensors that more than one module holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for pointer in {t.data_ptr() for t in held_tensors(module) if is_plain(t)}:
            holders[pointer] = holders.get(pointer, 0) + 1
    return {pointer for pointer, count in holders.items() if count > 1}


def _run_and_record(
    model: nn.Module,
    names: Mapping[str, Any],
    run: Callable[[nn.Module], Any],
    inputs: dict[str, Any],
) -> list[torch.Tensor]:
    """Run a model, and record the arguments of the first call of modules."""
    for name in names:

        def record(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            given = [*args, *kwargs.values()]
            inputs.setdefault(name, [t.clone() if torch.is_tensor(t) else t for t in given])

        model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    with repeatable():
        return tensors_in(run(model))


def _plain(module: nn.Module, args: list[Any]) -> nn.Module | None:
    """Return a plain layer that computes the same as a module on its input; None if none does."""
    if isinstance(module, nn.MultiheadAttention):
        return Attention(module)
    if len(args) != 1 or not torch.is_tensor(args[0]) or not args[0].is_floating_point():
        return None
    (x,) = args
    # Weights that depend on the input, as those of dynamic convolutions, differ on another one.
    inputs = [x, torch.randn_like(x) * (x.std() + 1) + x.mean()]
    is_linear = not isinstance(module, LAYERS) or isinstance(module, nn.Linear)
    try:
        if not is_linear:  # padding that depends on the size does so within a stride
            ndim = module.weight.ndim - 2
            lead, space = x.shape[: x.ndim - ndim], x.shape[x.ndim - ndim :]
            inputs += [
                torch.randn(*lead, *(n + i for n in space), dtype=x.dtype, device=x.device)
                for i in range(1, max(module.stride) + 1)
            ]
        expected = [module(t.clone()) for t in inputs]
        if not all(torch.is_tensor(y) for y in expected):
            return None
        for plain in _linears(module, x.shape[-1]) if is_linear else _convolutions(module, x):
            if all(not difference([y], [plain(t)]) for y, t in zip(expected, inputs)):
                return plain.eval()
    except Exception:  # a module with another meaning of its weight
        return None
    return None


def _linears(module: Any, columns: int) -> Iterator[nn.Module]:
    """Yield linear layers that may compute the same: by the weight, its transpose, or products."""
    bias = getattr(module, "bias", None)
    bias = bias if torch.is_tensor(bias) else None
    for weight in (module.weight, module.weight.T):
        if weight.shape[1] == columns:
            yield linear(weight, bias)
    rows = torch.eye(columns, dtype=module.weight.dtype, device=module.weight.device)
    at_zero = module(torch.zeros_like(rows[:1]))[0]
    yield linear((module(rows) - at_zero).T, at_zero if bool(at_zero.any()) else None)


class _Convolutions(TorchDispatchMode):  # type: ignore[misc]
    """Arguments of the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def _convolutions(module: Any, x: torch.Tensor) -> Iterator[nn.Module]:
    """Yield the convolution with the weight that a module has computed, also behind zeros."""
    with _Convolutions() as run:
        module(x.clone())
    for y, weight, bias, stride, padding, dilation, is_transposed, _, groups in run.found:
        if weight.shape != module.weight.shape:
            continue
        kind = next(k for k in LAYERS if isinstance(module, k))
        settings = {name: getattr(module, name) for name in _CONV_SETTINGS}
        if isinstance(module, TRANSPOSED_CONVS):
            settings["output_padding"] = module.output_padding
        yield _convolution(kind, settings, weight, bias)
        pads = None if is_transposed else _find_zeros(x, y, weight.ndim - 2)
        if pads is not None:
            settings |= {
                "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
                "padding_mode": "zeros",
            }  # fmt: skip
            pad = PADDING_MODULES["constant"][weight.ndim - 3](pads, 0.0)
            conv = _convolution(kind, settings, weight, bias)
            yield nn.Sequential(OrderedDict(pad=pad, conv=conv))


def _convolution(
    kind: Any, settings: Mapping[str, Any], weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    layer: nn.Module = kind(**settings, bias=bias is not None).to(weight.device, weight.dtype)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def _find_zeros(x: torch.Tensor, y: torch.Tensor, ndim: int) -> tuple[int, ...] | None:
    """Return the zeros around `x` in `y`, from the last axis on; None if it is not in there."""
    y = y if x.ndim == y.ndim else y[0]
    if x.ndim != y.ndim or x.shape[:-ndim] != y.shape[:-ndim]:
        return None
    totals = [b - a for a, b in zip(x.shape[-ndim:], y.shape[-ndim:])][::-1]
    if min(totals) < 0 or math.prod(t + 1 for t in totals) > _MOST_SHIFTS:
        return None
    for before in itertools.product(*(range(t + 1) for t in totals)):
        pads = tuple(p for b, t in zip(before, totals) for p in (b, t - b))
        if torch.equal(functional.pad(x, pads), y):
            return pads
    return None
