"""Layers of an ONNX graph that stay as they are: the reasons, and their MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from lowrank._typing import Ints
from lowrank.engine.onnx import unique_name
from lowrank.interop.onnx.constants import ConstantExpressions
from lowrank.interop.onnx.graph import (
    Sizes,
    attributes,
    first_output,
    known_shapes,
    reads,
    subgraphs,
)
from lowrank.interop.onnx.products import (
    count_macs,
    counted_tensor,
    elements_per_example,
    is_product,
)

IsConstant = Callable[[str], bool]
#: Function that runs the network, with onnx's slow evaluator where onnxruntime does not if its
#: second argument is true; it returns the batch size and the shapes of tensors by name, or None if
#: their sizes are not known.
Probe = Callable[[Sequence[str], bool], tuple[int, Mapping[str, Ints]] | None]


class _Body(NamedTuple):
    """A graph in which nodes run.

    Attributes
    ----------
    name : str
        Name of the node that runs it.
    is_constant : callable
        Function that tells whether a tensor is constant in it.
    shapes : mapping of str to tuple
        Shapes of its tensors.
    times : int or None
        Number of runs per example, None if it depends on the data.
    """

    name: str
    is_constant: IsConstant
    shapes: Mapping[str, Sizes]
    times: int | None


class Omissions:
    """Layers that stay, their reasons and their MACs.

    Parameters
    ----------
    constant : ConstantExpressions
        Constants of the main graph.
    shapes : mapping of str to tuple
        Shapes of the tensors of the main graph.
    batches : set
        Sizes and symbols of the batch.

    Attributes
    ----------
    reasons : dict of str to str
        Reasons by the name of the layer.
    """

    def __init__(
        self, constant: ConstantExpressions, shapes: Mapping[str, Sizes], batches: set[Any]
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._constant, self._batches = constant, batches
        self._main = _Body("", self._is_constant, shapes, 1)
        self._nodes: dict[str, tuple[Any, _Body]] = {}

    def _is_constant(self, name: str) -> bool:
        return self._constant.holds(name) or self._constant.is_sparse(name)

    def add(self, name: str, node: Any, reason: str) -> None:
        """Record a node of the main graph.

        Parameters
        ----------
        name : str
            Name of the layer.
        node : onnx.NodeProto
            Its node.
        reason : str
            Why it stays, as a clause about it.
        """
        self._record(name, node, reason, self._main)

    def _record(self, name: str, node: Any, reason: str, body: _Body) -> None:
        self.reasons[name] = reason
        self._nodes[name] = node, body

    def add_bodies(self, name: str, node: Any) -> None:
        """Record the layers in the bodies of a node of the main graph, such as an If or a Loop.

        Parameters
        ----------
        name : str
            Name of the node.
        node : onnx.NodeProto
            Node, with the shapes that onnx infers.
        """
        self._add_bodies(name, node, self._main)

    def _add_bodies(self, name: str, node: Any, outer: _Body) -> None:
        for graph in subgraphs(node):
            constant = {t.name for t in graph.initializer}
            constant |= {s.values.name for s in graph.sparse_initializer}
            is_constant = partial(_is_any_constant, outer.is_constant, constant)
            shapes = {
                **outer.shapes,
                **known_shapes(graph),
                **{t.name: tuple(t.dims) for t in graph.initializer},
            }
            times = self._runs(node, graph, outer)
            body = _Body(name, is_constant, shapes, times)
            for inner in graph.node:
                if all(map(is_constant, reads(inner))) and not list(subgraphs(inner)):
                    constant.update(filter(None, inner.output))
                    continue
                path = unique_name(f"{name}/{inner.name or first_output(inner)}", {*self.reasons})
                if is_product(inner, is_constant):
                    reason = f"it is in the body of the {node.op_type} {name!r}"
                    self._record(path, inner, reason, body)
                self._add_bodies(path, inner, body)

    def _runs(self, node: Any, graph: Any, outer: _Body) -> int | None:
        """Return how often a body runs per example, None if that depends on the data."""
        own: int | None = None
        if node.op_type == "If":
            own = 1
        elif node.op_type == "Scan":
            a = attributes(node)
            scanned = node.input[len(node.input) - a["num_scan_inputs"]]
            shape = outer.shapes.get(scanned, ())
            axis = (a.get("scan_input_axes") or [0])[0]
            size = shape[axis] if shape else None
            own = size if isinstance(size, int) else None
        elif node.op_type == "Loop" and self._always_continues(node, graph):
            trips = self._constant(node.input[0]) if node.input[0] else None
            own = None if trips is None else int(trips.reshape(-1)[0])
        return None if own is None or outer.times is None else own * outer.times

    def _always_continues(self, node: Any, graph: Any) -> bool:
        """Return whether a Loop ends only after its number of trips."""
        start = node.input[1] if len(node.input) > 1 else ""
        first = None if not start else self._constant(start)
        if start and (first is None or not first.all()):
            return False
        kept = {graph.input[1].name}
        for inner in graph.node:
            if inner.op_type == "Identity" and inner.input[0] in kept:
                kept.add(inner.output[0])
        return graph.output[0].name in kept

    def count(self, probe: Probe) -> dict[str, int]:
        """Return the MACs per example of the layers of which they are known.

        Parameters
        ----------
        probe : callable
            Function that runs the model, for sizes that the graph does not give.

        Returns
        -------
        dict of str to int
        """
        elements = {name: self._elements(*found) for name, found in self._nodes.items()}
        unknown = [
            counted_tensor(node)
            for name, (node, body) in self._nodes.items()
            if elements[name] is None and body is self._main
        ]
        run: Mapping[str, Ints] = {}
        batch = 1
        if unknown:
            try:
                batch, run = probe(list(dict.fromkeys(unknown)), False) or (1, {})
            except ValueError:  # onnxruntime does not run all of these operators
                run = {}
        found = {}
        for name, (node, body) in self._nodes.items():
            shape = run.get(counted_tensor(node)) if body is self._main else None
            number = elements[name]
            if number is None and shape is not None:
                number = max(math.prod(shape) // max(batch, 1), 1)
            macs = count_macs(node, body.is_constant, partial(self._shape, body), number)
            if macs is not None and body.times is not None:
                found[name] = macs * body.times
        return found

    def _elements(self, node: Any, body: _Body) -> int | None:
        """Return the elements per example of the tensor by which MACs are counted, if known."""
        shape = body.shapes.get(counted_tensor(node))
        return None if shape is None else elements_per_example(node, shape, self._batches)

    def _shape(self, body: _Body, name: str) -> Sizes | None:
        if self._constant.holds(name):
            return self._constant.shape(name)
        return body.shapes.get(name)


def _is_any_constant(outer: IsConstant, inner: set[str], name: str) -> bool:
    return name in inner or outer(name)
