"""Rewriting of models for the engine: by torch.fx traces, or module by module."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from lowrank.interop.torch.chains import Bias, TiedLayer
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.fusion import BATCH_NORMS, find_activation, find_fused_nodes
from lowrank.interop.torch.modules import from_sequence

_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Modules whose outputs never share memory with their inputs.
_NEW_OUTPUTS = (
    EngineModule, *BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm, nn.LayerNorm, nn.Linear,
)  # fmt: skip


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Tracer that keeps modules whose forward pass cannot be traced as calls."""

    def __init__(self) -> None:
        super().__init__()
        self.untraceable: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TiedLayer | Bias) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        last = next(iter(reversed(self.graph.nodes)))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.untraceable.add(name)
            return self.create_proxy("call_module", name, args, kwargs)


def trace_onto_engine(model: nn.Module, threads: int | None) -> nn.Module:
    """Return a traced model with fused convolutions; `model` must not be used afterwards.

    Parameters
    ----------
    model : nn.Module
        Model in evaluation mode.  Submodules that cannot be traced are rewritten with
        :func:`swap_modules`.
    threads : int or None
        Number of threads of the engine.

    Returns
    -------
    nn.Module

    Raises
    ------
    Exception
        Whatever tracing the model raises, for example for control flow that depends on tensors.
    """
    tracer = _Tracer()
    graph = tracer.trace(model)
    traced = fx.GraphModule(model, graph)
    for name in tracer.untraceable:
        parent, _, leaf = name.rpartition(".")
        swapped = swap_modules(traced.get_submodule(name), threads)
        setattr(traced.get_submodule(parent), leaf, swapped)
    for i, fused in enumerate(find_fused_nodes(traced)):
        name = f"lowrank_engine_{i}"
        traced.add_module(name, EngineModule(fused.links, threads))
        last = fused.nodes[-1]
        with graph.inserting_after(last):
            new = graph.call_module(name, (fused.nodes[0].args[0],))
        last.replace_all_uses_with(new)
        for node in reversed(fused.nodes):
            graph.erase_node(node)
    _write_in_place(traced)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def swap_modules(model: nn.Module, threads: int | None) -> nn.Module:
    """Replace convolutions, and sequences of nothing but convolutions, in place.

    Parameters
    ----------
    model : nn.Module
        Model to change.
    threads : int or None
        Number of threads of the engine.

    Returns
    -------
    nn.Module
        `model`, or its replacement if it is a convolution itself.
    """
    replacements: dict[nn.Module, nn.Module] = {}

    def swap(module: nn.Module) -> nn.Module:
        if module not in replacements:
            replacements[module] = module
            f = from_sequence(list(module) if type(module) is nn.Sequential else [module])
            if f is not None:
                replacements[module] = EngineModule([(f, "none")], threads)
            else:
                for name, child in module.named_children():
                    new = swap(child)
                    if new is not child:
                        setattr(module, name, new)
        return replacements[module]

    return swap(model)


def _write_in_place(traced: fx.GraphModule) -> None:
    """Let sums and ReLUs overwrite an operand in memory of its own that nothing else reads."""
    graph = traced.graph
    modules = dict(traced.named_modules(remove_duplicate=False))
    called = {n: modules.get(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    new_outputs = {n for n, module in called.items() if isinstance(module, _NEW_OUTPUTS)}
    for node in list(graph.nodes):
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        writable = [a for a in operands if a in new_outputs and len(a.users) == 1]
        if not writable:
            continue
        if find_activation(node, called.get(node)) == "relu":
            with graph.inserting_before(node):
                new = graph.call_function(torch.relu_, (writable[0],))
        elif (
            node.op == "call_function"
            and node.target in _ADDITIONS
            and len(operands) == len(node.args) == 2
            and operands[0] is not operands[1]
            and not node.kwargs
            # x += y must write to x
            and (node.target is not operator.iadd or operands[0] in writable)
        ):
            with graph.inserting_before(node):
                other = operands[1] if writable[0] is operands[0] else operands[0]
                new = graph.call_function(_add_in_place, (writable[0], other))
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        new_outputs.add(new)


def _add_in_place(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sum, in the memory of `a` if shapes and precisions are equal."""
    if a.shape == b.shape and a.dtype == b.dtype:
        return cast(torch.Tensor, a.add_(b))
    return a + b
