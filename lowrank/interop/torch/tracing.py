"""Rewriting of models for the engine: by torch.fx traces, or module by module."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lowrank.engine.program import Algorithm
from lowrank.interop.torch.chains import Bias, TiedLayer
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.fusion import find_fused_nodes
from lowrank.interop.torch.modules import from_sequence
from lowrank.interop.torch.partition import partition
from lowrank.interop.torch.program import ProgramModule


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


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Return a traced model, which shares the submodules of `model`; None if it has no trace.

    Submodules that cannot be traced are calls, and keep their convolutions.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception:  # control flow that depends on tensors, or anything else in a model
        return None
    traced = fx.GraphModule(model, graph)
    traced.meta["untraceable"] = tracer.untraceable
    return traced


def onto_engine(
    traced: fx.GraphModule, threads: int | None, algorithm: Algorithm
) -> fx.GraphModule:
    """Return a traced model whose parts run as programs; `traced` must not be used afterwards.

    Parameters
    ----------
    traced : fx.GraphModule
        What :func:`trace` returned for a model in evaluation mode.  Submodules that cannot be
        traced are rewritten with :func:`swap_modules`.
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
        swapped = swap_modules(traced.get_submodule(name), threads, algorithm)
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


def swap_modules(model: nn.Module, threads: int | None, algorithm: Algorithm) -> nn.Module:
    """Replace convolutions, and sequences of nothing but convolutions, in place.

    Parameters
    ----------
    model : nn.Module
        Model to change.
    threads : int or None
        Number of threads of the engine.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.

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
                replacements[module] = EngineModule([(f, "none")], threads, algorithm)
            else:
                for name, child in module.named_children():
                    new = swap(child)
                    if new is not child:
                        setattr(module, name, new)
        return replacements[module]

    return swap(model)
