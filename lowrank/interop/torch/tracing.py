"""Rewriting of models for the engine: by torch.fx traces, or module by module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lowrank.engine.program import Algorithm
from lowrank.factorization import Factorization
from lowrank.interop.torch.chains import Bias, TiedLayer
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.fusion import find_fused_nodes
from lowrank.interop.torch.modules import call_hooks, from_sequence
from lowrank.interop.torch.partition import partition
from lowrank.interop.torch.program import ProgramModule


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Tracer that keeps modules whose forward pass cannot be traced as calls."""

    def __init__(self) -> None:
        super().__init__()
        self.untraceable: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, TiedLayer | Bias) or super().is_leaf_module(m, module_qualified_name):
            return True
        if call_hooks(m):  # a trace would run them once, and never again
            self.untraceable.add(module_qualified_name)
        return bool(call_hooks(m))

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


class HookedModule(nn.Module):  # type: ignore[misc]
    """A module whose hooks run, which is therefore in no program.

    Parameters
    ----------
    module : nn.Module
        Module with hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Return a traced model, which shares the submodules of `model`; None if it has no trace.

    Submodules that cannot be traced are calls, and keep their convolutions.
    """
    tracer = _Tracer()
    if call_hooks(model):  # which a graph does not have
        return None
    try:
        graph = tracer.trace(model)
    except Exception:  # control flow that depends on tensors, or anything else in a model
        return None
    traced = fx.GraphModule(model, graph)
    traced.meta["untraceable"] = tracer.untraceable
    for node in graph.nodes:
        if node.op == "call_module" and call_hooks(traced.get_submodule(node.target)):
            hooked = traced.get_submodule(node.target)
            if node.target not in tracer.untraceable and not isinstance(hooked, HookedModule):
                parent, _, leaf = node.target.rpartition(".")
                setattr(traced.get_submodule(parent), leaf, HookedModule(hooked))
    return traced


def onto_engine(
    traced: fx.GraphModule, threads: int | None, algorithm: Algorithm
) -> fx.GraphModule:
    """Return a traced model whose parts run as programs; `traced` must not be used afterwards.

    Parameters
    ----------
    traced : fx.GraphModule
        What :func:`trace` returned for a model in evaluation mode.  Submodules that cannot be
        traced are rewritten with :func:`swap_for_inference`.
    threads : int or None
        Number of threads of the engine.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.

    Returns
    -------
    fx.GraphModule
    """
    graph = traced.graph
    for name in traced.meta["untraceable"]:
        parent, _, leaf = name.rpartition(".")
        swapped = swap_for_inference(traced.get_submodule(name), threads, algorithm)
        setattr(traced.get_submodule(parent), leaf, swapped)
    for i, fused in enumerate(find_fused_nodes(traced)):
        name = f"lowrank_engine_{i}"
        traced.add_module(name, EngineModule(fused.links, threads, algorithm))
        last = fused.nodes[-1]
        with graph.inserting_after(last):
            new = graph.call_module(name, (fused.nodes[0].args[0],))
        new.meta["label"] = str(fused.layer.target)
        last.replace_all_uses_with(new)
        for node in reversed(fused.nodes):
            graph.erase_node(node)
    traced.recompile()
    return partition(traced, lambda part: ProgramModule(part, threads, algorithm))


def swap_modules(
    model: nn.Module, make_module: Callable[[nn.Module, Factorization], nn.Module]
) -> nn.Module:
    """Replace convolutions, and sequences of nothing but convolutions, in place.

    Parameters
    ----------
    model : nn.Module
        Model to change.
    make_module : callable
        Function of a module and its chain that returns the replacement.

    Returns
    -------
    nn.Module
        `model`, or its replacement if it is a convolution itself.
    """
    replacements: dict[nn.Module, nn.Module] = {}

    def swap(module: nn.Module) -> nn.Module:
        if module not in replacements:
            replacements[module] = module
            is_sequence = type(module) is nn.Sequential and not call_hooks(module)
            f = from_sequence(list(module) if is_sequence else [module])
            if f is not None:
                replacements[module] = make_module(module, f)
            else:
                for name, child in module.named_children():
                    new = swap(child)
                    if new is not child:
                        setattr(module, name, new)
        return replacements[module]

    return swap(model)


def swap_for_inference(model: nn.Module, threads: int | None, algorithm: Algorithm) -> nn.Module:
    """Replace what :func:`swap_modules` does; a model may still read attributes of the layers."""

    def make_module(layer: nn.Module, f: Factorization) -> nn.Module:
        module = EngineModule([(f, "none")], threads, algorithm)
        module.stand_in_for(layer)
        return module

    return swap_modules(model, make_module)
