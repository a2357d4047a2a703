"""Division of a traced network into the parts that programs compute."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lowrank.interop.torch.network import is_layer_node, is_shape, is_supported
from lowrank.interop.torch.nodes import ALIASES, find_operation

_IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem,
)  # fmt: skip


def partition(
    traced: fx.GraphModule,
    make_module: Callable[[fx.GraphModule], nn.Module],
    excluded: frozenset[fx.Node] = frozenset(),
) -> fx.GraphModule:
    """Return a module with each largest part of supported nodes as one module.

    Parameters
    ----------
    traced : fx.GraphModule
        Traced network in evaluation mode; its graph may change, but not what it computes.
    make_module : callable
        Returns the module that runs a part.
    excluded : frozenset of fx.Node
        Nodes that are not supported, whatever they are.

    Returns
    -------
    fx.GraphModule
        Module that shares the submodules of `traced`.
    """
    return _Partition(traced, excluded).divide(make_module)


class _Partition:
    """Phases of the nodes of a graph: supported ones have even phases, others odd ones.

    A node's phase is at least those of the nodes that it depends on, so that phases can run one
    after another.
    """

    def __init__(self, traced: fx.GraphModule, excluded: frozenset[fx.Node]) -> None:
        self.traced, self.graph = traced, traced.graph
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self._give_each_user_its_shapes()
        self.nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.supported: set[fx.Node] = set()
        for node in self.nodes:
            is_entry = (  # of what may be several tensors
                node.target is operator.getitem
                and isinstance(node.args[1], int)
                and node.args[0] not in self.supported
            )
            if node not in excluded and not is_entry and is_supported(node, self._module(node)):
                self.supported.add(node)
        barriers = {n for n in self.nodes if self._mutates(n) and not self._is_pure(n)}
        if barriers:
            aliases = {n for n in self.supported if self._is_view(n)}
            self.supported -= barriers | aliases
        self.phase = self._phases(barriers)

    def divide(self, make_module: Callable[[fx.GraphModule], nn.Module]) -> fx.GraphModule:
        """Return the divided module."""
        parts = self._parts()
        new = fx.Graph()
        found: dict[fx.Node, fx.Node] = {}
        added: dict[str, nn.Module] = {}
        first = {part[0]: part for part in parts}
        inside = {node for part in parts for node in part}
        outputs = [n for n in self.graph.nodes if n.op == "output"]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                found[node] = new.node_copy(node)
        for node in (*sorted(self.nodes, key=self._place), *outputs):
            if node in first:
                name = f"program_{len(added)}"
                while hasattr(self.traced, name):
                    name = f"{name}_"
                part, inputs, results = self._extract(first[node])
                added[name] = make_module(part)
                call = new.call_module(name, tuple(found[n] for n in inputs))
                for i, result in enumerate(results):
                    one = len(results) == 1
                    found[result] = call if one else new.call_function(operator.getitem, (call, i))
            elif node not in inside:
                found[node] = new.node_copy(node, found.__getitem__)
        targets = {str(n.target) for n in new.nodes if n.op in ("call_module", "get_attr")}
        root = {t: added[t] if t in added else _attribute(self.traced, t) for t in targets}
        return fx.GraphModule(root, new).eval()

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _place(self, node: fx.Node) -> tuple[int, int]:
        return self.phase[node], self.order[node]

    def _give_each_user_its_shapes(self) -> None:
        """Copy nodes that compute shapes, so that each has one user and can go where that goes."""
        for node in reversed(list(self.graph.nodes)):
            if not is_shape(node):
                continue
            for user in list(node.users)[1:]:
                with self.graph.inserting_after(node):
                    copy = self.graph.node_copy(node)
                user.replace_input_with(node, copy)
            if not node.users:
                self.graph.erase_node(node)

    def _dependencies(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that a node reads, itself or through nodes that compute shapes."""
        return [
            source
            for n in node.all_input_nodes
            for source in (self._dependencies(n) if is_shape(n) else [n])
        ]

    def _phases(self, barriers: set[fx.Node]) -> dict[fx.Node, int]:
        phase: dict[fx.Node, int] = {}
        floor = highest = 0
        for node in self.nodes:
            if is_shape(node):
                continue
            low = max((floor, *(phase.get(n, 0) for n in self._dependencies(node))))
            if node in barriers:  # after all before it, and before all after it
                low = highest
            is_odd = node not in self.supported
            phase[node] = low + (low % 2 != is_odd)
            highest = max(highest, phase[node])
            if node in barriers:
                floor = phase[node]
        for node in reversed(self.nodes):
            if is_shape(node):
                (user,) = node.users
                phase[node] = phase.get(user, highest + 1)
                if user in self.supported:
                    self.supported.add(node)
        return phase

    def _parts(self) -> list[list[fx.Node]]:
        """Return the connected supported nodes of each phase, if they are worth a program."""
        parts: dict[fx.Node, list[fx.Node]] = {}
        for node in sorted(self.supported, key=self.order.__getitem__):
            part = [node]
            sources = [n for n in node.all_input_nodes if self.phase.get(n) == self.phase[node]]
            for other in {id(parts[n]): parts[n] for n in sources if n in parts}.values():
                part = other + part
            for member in part:
                parts[member] = part
        unique = {id(part): part for part in parts.values()}
        return [
            sorted(part, key=self._place)
            for part in unique.values()
            if any(is_layer_node(self._module(n)) for n in part)
        ]

    def _extract(self, part: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        """Return a part as a module, with the nodes that are its inputs and its results."""
        members = set(part)
        graph = fx.Graph()
        inputs = dict.fromkeys(n for m in part for n in m.all_input_nodes if n not in members)
        found = {n: graph.placeholder(n.name) for n in inputs}
        for node in part:
            found[node] = graph.node_copy(node, found.__getitem__)
        results = [n for n in part if any(user not in members for user in n.users)]
        outputs = tuple(found[n] for n in results)
        graph.output(outputs[0] if len(outputs) == 1 else outputs)
        return fx.GraphModule(self.traced, graph).eval(), list(inputs), results

    def _mutates(self, node: fx.Node) -> bool:
        """Return whether a node writes to its first argument."""
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        name = getattr(node.target, "__name__", str(node.target))
        if node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return not is_shape(node)
        if "out" in node.kwargs:
            return True
        try:
            names = list(inspect.signature(node.target).parameters)
        except (TypeError, ValueError):  # a method, or a function that is built in
            return False
        return (dict(zip(names, node.args)) | node.kwargs).get("inplace") is True

    def _is_pure(self, node: fx.Node) -> bool:
        """Return whether nothing reads what a supported node has overwritten."""
        memory = node
        while memory.op != "placeholder":
            if memory not in self.supported or not memory.args:
                return False
            if memory is not node and self._is_read_after(memory, node):
                return False
            if not self._is_view(memory):
                return True
            source = memory.args[0]
            if not isinstance(source, fx.Node):
                return False
            memory = source
        return False

    def _is_read_after(self, memory: fx.Node, node: fx.Node) -> bool:
        return any(
            self.order[user] > self.order[node]
            or (self._is_view(user) and self._is_read_after(user, node))
            for user in memory.users
            if user is not node
        )

    def _is_view(self, node: fx.Node) -> bool:
        """Return whether the output of a node may be memory of its first argument."""
        operation = find_operation(node, self._module(node))
        return getattr(operation, "func", operation) in ALIASES or self._mutates(node)


def _attribute(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root
