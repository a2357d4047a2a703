"""Search of a traced graph for convolutions that one EngineModule can run together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import fx, nn

from lowrank.blocks import BatchNorm, fold_batch_norm
from lowrank.core.stage import Activation
from lowrank.factorization import Factorization, chain
from lowrank.interop.torch.chains import Bias
from lowrank.interop.torch.modules import from_module, merge_padding, to_numpy
from lowrank.interop.torch.nodes import find_activation

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class FusedNodes:
    """Consecutive nodes of a graph that become one EngineModule.

    Parameters
    ----------
    nodes : list of fx.Node
        First convolution, and the padding before it if there is any.
    f : Factorization
        Those nodes as a chain.
    """

    def __init__(self, nodes: list[fx.Node], f: Factorization) -> None:
        self.nodes, self.layer = nodes, nodes[-1]
        self.links: list[tuple[Factorization, Activation]] = [(f, "none")]

    def can_append(self, f: Factorization) -> bool:
        """Return whether a convolution may join.

        It joins where there is no bias or activation in between, and if it is a pointwise one
        after a depthwise one (MobileNet's pair).  Other pairs gain nothing: the tile that they
        would share is small beside their work.  A constant border counts from the input of an
        EngineModule, but from the input of the layer in PyTorch.
        """
        g = f.stages[0].geometry
        if g.padding_mode == "constant" and any(map(any, g.padding)):
            return False
        return self._ends_linear or (
            self.links[-1][0].stages[-1].kind == "depthwise" and f.stages[0].kind == "pointwise"
        )

    def append(self, f: Factorization, nodes: list[fx.Node]) -> None:
        """Add a convolution."""
        if self._ends_linear:
            last, _ = self.links[-1]
            self.links[-1] = (chain((*last.stages, *f.stages), f.bias), "none")
        else:
            self.links.append((f, "none"))
        self.nodes += nodes

    def absorb(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Add a bias, batch norm, activation or dropout; return False if it is none of these."""
        f, activation = self.links[-1]
        stage = f.stages[-1]
        found = find_activation(node, module)
        new_activation = found[0] if found and found[0] in get_args(Activation) else None
        if isinstance(module, _DROPOUTS):
            pass
        elif new_activation is not None and activation == "none":
            activation = cast(Activation, new_activation)
        elif activation != "none":
            return False
        elif isinstance(module, Bias):
            bias = to_numpy(module.bias)
            f = replace(f, bias=bias if f.bias is None else f.bias + bias)
        elif (
            isinstance(module, BATCH_NORMS)
            and module.running_mean is not None
            and module.running_var is not None
            and stage.outer * stage.inner == 1
            and not (stage.transposed and stage.shuffle != (1, 1))
        ):
            f = fold_batch_norm(f, batch_norm(module))
        else:
            return False
        self.links[-1] = (f, activation)
        self.nodes.append(node)
        return True

    @property
    def _ends_linear(self) -> bool:
        f, activation = self.links[-1]
        return f.bias is None and activation == "none"


def find_fused_nodes(traced: fx.GraphModule) -> list[FusedNodes]:
    """Return the convolutions of a graph with everything that may run along with each.

    Parameters
    ----------
    traced : fx.GraphModule
        Traced model; not changed.

    Returns
    -------
    list of FusedNodes
        Each convolution is in exactly one of them.
    """
    modules = dict(traced.named_modules(remove_duplicate=False))
    found: list[FusedNodes] = []
    by_last_node: dict[fx.Node, FusedNodes] = {}
    for node in traced.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        f = None if module is None or len(node.args) > 1 or node.kwargs else from_module(module)
        if f is None:
            fused = by_last_node.get(source)
            if fused is not None and len(source.users) == 1 and fused.absorb(node, module):
                del by_last_node[source]
                by_last_node[node] = fused
            continue
        nodes = [node]
        before = modules.get(source.target) if source.op == "call_module" else None
        padded = None if before is None or len(source.users) > 1 else merge_padding(before, f)
        if padded is not None:
            f, nodes, source = padded, [source, node], cast(fx.Node, source.args[0])
        fused = by_last_node.get(source)
        if fused is not None and len(source.users) == 1 and fused.can_append(f):
            del by_last_node[source]
            fused.append(f, nodes)
        else:
            fused = FusedNodes(nodes, f)
            found.append(fused)
        by_last_node[node] = fused
    return found


def batch_norm(module: Any) -> BatchNorm:
    """Return the parameters of a PyTorch module with running statistics."""
    ones = torch.ones_like(module.running_mean)
    scale = ones if module.weight is None else module.weight
    shift = 0 * ones if module.bias is None else module.bias
    mean, variance = to_numpy(module.running_mean), to_numpy(module.running_var)
    return BatchNorm(to_numpy(scale), to_numpy(shift), mean, variance, module.eps)
