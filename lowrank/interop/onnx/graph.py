"""ONNX graphs: uses of tensors, constants, shapes, pruning and substitution of nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.interop.common import one_line
from lowrank.interop.onnx.data import dims
from lowrank.interop.onnx.files import library, values, without_large_weights

Sizes = tuple[int | str | None, ...]

# Operators whose result differs from call to call.
_RANDOM = ("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli")
_OLDEST_OPSET = 7  # that onnxruntime runs


def attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a node by name, as Python values."""
    get = library().helper.get_attribute_value
    return {a.name: get(a) for a in node.attribute}


def opset_of(model: Any) -> int:
    """Return the version of ONNX's own operator set that a model uses."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def supported_opset(model: Any) -> int:
    """Return the opset of a model, or raise a ValueError if onnxruntime does not run it."""
    opset = opset_of(model)
    if opset < _OLDEST_OPSET:
        raise ValueError(
            f"the opset must be at least {_OLDEST_OPSET}, which onnxruntime runs, got {opset}: "
            "convert the model with onnx.version_converter"
        )
    return opset


def subgraphs(node: Any) -> Iterator[Any]:
    """Yield the graphs in the attributes of a node, such as the bodies of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def first_output(node: Any) -> str:
    """Return the first output of a node that is not left out."""
    return next(filter(None, node.output), "")


def reads(node: Any) -> Iterator[str]:
    """Yield the tensors that a node or its subgraphs read."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        yield from (o.name for o in graph.output)
        for inner in graph.node:
            yield from reads(inner)


def uses(graph: Any) -> Counter[str]:
    """Return the number of uses of each tensor; an output of the graph counts as one."""
    counts = Counter(name for node in graph.node for name in reads(node))
    counts.update(o.name for o in graph.output)
    return counts


def names(graph: Any) -> set[str]:
    """Return every name in a graph and its subgraphs."""
    used = {v.name for part in (graph.input, graph.output, graph.initializer) for v in part}
    for node in graph.node:
        used.update((node.name, *node.input, *node.output))
        for inner in subgraphs(node):
            used |= names(inner)
    return used


class Constants:
    """Constant tensors of a graph: initializers and Constant nodes, also behind Identity."""

    def __init__(self, model: Any, folder: Any) -> None:
        self._folder = folder
        self._tensors = {t.name: t for t in model.graph.initializer}
        self._nodes = {
            o: n
            for n in model.graph.node
            if n.op_type in ("Constant", "Identity")
            for o in n.output
        }

    def _source(self, name: str) -> Any:
        """Return the initializer or Constant node that a name refers to, or None."""
        visited = set()
        while (
            name in self._nodes and self._nodes[name].op_type == "Identity" and name not in visited
        ):
            visited.add(name)
            name = self._nodes[name].input[0]
        return self._tensors.get(name, self._nodes.get(name))

    def holds(self, name: str) -> bool:
        """Whether a tensor is constant."""
        source = self._source(name)
        return source is not None and getattr(source, "op_type", "") != "Identity"

    def __call__(self, name: str) -> Array | None:
        """Return the values of a tensor, or None if it is not constant."""
        source = self._source(name)
        if hasattr(source, "op_type"):
            source = next((a.t for a in source.attribute if a.name == "value"), None)
        return None if source is None else values(source, self._folder)


def as_numpy(array: Array) -> Array:
    """Return bfloat16 as float32, of which NumPy has all functions; other types unchanged."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def constant_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes that depend on constants only and give the same result every time."""
    constant = {t.name for t in graph.initializer}
    for node in graph.node:  # in topological order
        has_graph = any(a.HasField("g") or a.graphs for a in node.attribute)
        is_random = node.op_type.startswith(_RANDOM)
        if not has_graph and not is_random and constant.issuperset(reads(node)):
            constant.update(filter(None, node.output))
            yield node


def infer_shapes(model: Any) -> Any:
    """Return the model without its large weights and with all shapes that onnx infers."""
    onnx = library()
    try:
        return onnx.shape_inference.infer_shapes(without_large_weights(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as why:
        raise ValueError(f"shapes cannot be inferred: {one_line(why)}") from None


def known_shapes(graph: Any) -> dict[str, Sizes]:
    """Return the shapes of a graph's tensors by name; a size is a number, a symbol, or None."""
    by_name: dict[str, Sizes] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            sizes = zip(dims(kind.shape), kind.shape.dim)
            by_name[value.name] = tuple(d.dim_param or None if n is None else n for n, d in sizes)
    return by_name


def prune(model: Any, outputs: Iterable[str]) -> Any:
    """Return a model that computes the tensors `outputs` and nothing else."""
    onnx = library()
    outputs = list(dict.fromkeys(outputs))
    needed, nodes = set(outputs), []
    for node in reversed(model.graph.node):  # they are in topological order
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(reads(node))
    new = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    new.graph.name = model.graph.name
    new.graph.node.extend(reversed(nodes))
    for field in ("input", "initializer"):
        part = getattr(model.graph, field)
        getattr(new.graph, field).extend(v for v in part if v.name in needed)
    for sparse in model.graph.sparse_initializer:
        if sparse.values.name in needed:
            new.graph.sparse_initializer.append(sparse)
    types = {o.name: o for o in model.graph.output}
    new.graph.output.extend(types.get(n, onnx.ValueInfoProto(name=n)) for n in outputs)
    return new


def substitute(
    model: Any, parts: Mapping[str, Callable[[set[str]], tuple[list[Any], list[Any]]]]
) -> None:
    """Replace the nodes of `model`, in place, whose first output is a key of `parts`.

    A part is a function of the names in use that returns new nodes and their initializers; the
    last of the nodes gets the output of the replaced node.  Unused weights are removed.
    """
    graph, used_names = model.graph, names(model.graph)
    new: list[Any] = []
    candidates: list[str] = []
    for node in graph.node:
        if node.output[0] not in parts:
            new.append(node)
            continue
        nodes, tensors = parts[node.output[0]](used_names)
        nodes[-1].output[0] = node.output[0]
        nodes[-1].doc_string = node.doc_string
        new += nodes
        candidates += node.input[1:]
        graph.initializer.extend(tensors)
        if model.ir_version < 4:  # an initializer is the default of an input
            make = library().helper.make_tensor_value_info
            graph.input.extend(make(t.name, t.data_type, t.dims) for t in tensors)
    _set(graph.node, new)
    _drop_unused(graph, candidates)
    existing = {v.name for part in (graph.input, graph.initializer) for v in part}
    existing.update(o for node in graph.node for o in node.output)
    _set(graph.value_info, [v for v in graph.value_info if v.name in existing])
    notes = graph.quantization_annotation
    _set(notes, [q for q in notes if q.tensor_name in existing])


def _set(field: Any, entries: Sequence[Any]) -> None:
    copies = [type(e).FromString(e.SerializeToString()) for e in entries]
    del field[:]
    field.extend(copies)


def _drop_unused(graph: Any, candidates: Sequence[str]) -> None:
    """Remove the constants among `candidates`, and their sources, that are not used."""
    counts = uses(graph)
    nodes = {o: n for n in constant_nodes(graph) for o in n.output}
    removed, queue = set(), list(dict.fromkeys(filter(None, candidates)))
    while queue:
        name = queue.pop()
        if counts[name] or name in removed:
            continue
        removed.add(name)
        if name in nodes and not any(counts[o] for o in nodes[name].output):
            removed.update(nodes[name].output)
            for source in filter(None, nodes[name].input):
                counts[source] -= 1
                queue.append(source)
    constants = {t.name for t in graph.initializer} & removed
    for field in (graph.initializer, graph.input):
        for i in reversed([i for i, v in enumerate(field) if v.name in constants]):
            del field[i]
    for i in reversed(
        [
            i
            for i, n in enumerate(graph.node)
            if removed.issuperset(filter(None, n.output)) and n.output[0] in nodes
        ]
    ):
        del graph.node[i]
