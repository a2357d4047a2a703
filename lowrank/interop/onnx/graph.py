"""ONNX graphs: what uses what, which parts are needed, and nodes put in the place of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lowrank._typing import Array
from lowrank.interop.onnx.data import dims
from lowrank.interop.onnx.files import library, shell, values

Sizes = tuple[int | str | None, ...]


def attributes(node: Any) -> dict[str, Any]:
    """Attributes of a node by name, as Python's values."""
    get = library().helper.get_attribute_value
    return {a.name: get(a) for a in node.attribute}


def opset_of(model: Any) -> int:
    """Version of ONNX's own operators that a model uses."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads(node: Any) -> Iterator[str]:
    """Tensors that a node needs, those that its subgraphs take from outside among them."""
    yield from filter(None, node.input)
    for graph in _subgraphs(node):
        yield from (o.name for o in graph.output)
        for inner in graph.node:
            yield from reads(inner)


def uses(graph: Any) -> Counter[str]:
    """How often each tensor is needed, as an output of the graph, too."""
    found = Counter(name for node in graph.node for name in reads(node))
    found.update(o.name for o in graph.output)
    return found


def names(graph: Any) -> set[str]:
    """Every name that stands for something in a graph or a subgraph."""
    found = {v.name for part in (graph.input, graph.output, graph.initializer) for v in part}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for inner in _subgraphs(node):
            found |= names(inner)
    return found


class Constants:
    """Tensors of a graph that do not depend on its inputs, as far as weights are written so.

    They are initializers, Constant nodes, and those behind Identity.
    """

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
        """The initializer or Constant node behind a name, or None."""
        seen = set()
        while name in self._nodes and self._nodes[name].op_type == "Identity" and name not in seen:
            seen.add(name)
            name = self._nodes[name].input[0]
        return self._tensors.get(name, self._nodes.get(name))

    def holds(self, name: str) -> bool:
        """Whether a tensor is constant."""
        source = self._source(name)
        return source is not None and getattr(source, "op_type", "") != "Identity"

    def __call__(self, name: str) -> Array | None:
        """The values of a tensor, or None if it is computed, or an input."""
        source = self._source(name)
        if hasattr(source, "op_type"):
            source = next((a.t for a in source.attribute if a.name == "value"), None)
        return None if source is None else values(source, self._folder)


def inferred(model: Any) -> Any:
    """The model, without its large weights, with every shape that can be told ahead of a run."""
    onnx = library()
    try:
        return onnx.shape_inference.infer_shapes(shell(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as why:
        raise ValueError(f"shapes cannot be inferred: {' '.join(str(why).split())[:300]}") from None


def shapes(model: Any) -> dict[str, Sizes]:
    """Shape of every tensor that has one: a size is a number, a name, or None."""
    graph = inferred(model).graph
    found: dict[str, Sizes] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            sizes = zip(dims(kind.shape), kind.shape.dim)
            found[value.name] = tuple(d.dim_param or None if n is None else n for n, d in sizes)
    return found


def pruned(model: Any, wanted: Iterable[str]) -> Any:
    """A model of what the tensors `wanted` need, and nothing else; they are its outputs."""
    onnx = library()
    wanted = list(dict.fromkeys(wanted))
    needed, kept = set(wanted), []
    for node in reversed(model.graph.node):  # they are in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    new = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    new.graph.name = model.graph.name
    new.graph.node.extend(reversed(kept))
    for field in ("input", "initializer"):
        part = getattr(model.graph, field)
        getattr(new.graph, field).extend(v for v in part if v.name in needed)
    for sparse in model.graph.sparse_initializer:
        if sparse.values.name in needed:
            new.graph.sparse_initializer.append(sparse)
    types = {o.name: o for o in model.graph.output}
    new.graph.output.extend(types.get(n, onnx.ValueInfoProto(name=n)) for n in wanted)
    return new


def substitute(
    model: Any, parts: Mapping[str, Callable[[set[str]], tuple[list[Any], list[Any]]]]
) -> None:
    """Put nodes in the place of those whose first output is a key of `parts`, in `model` itself.

    A part makes its nodes and their initializers, given the names that are taken; the last of
    its outputs becomes that of the node.  Weights that nothing needs any more go.
    """
    graph, taken = model.graph, names(model.graph)
    new: list[Any] = []
    loose: list[str] = []
    for node in graph.node:
        if node.output[0] not in parts:
            new.append(node)
            continue
        nodes, tensors = parts[node.output[0]](taken)
        nodes[-1].output[0] = node.output[0]
        nodes[-1].doc_string = node.doc_string
        new += nodes
        loose += node.input[1:]
        graph.initializer.extend(tensors)
        if model.ir_version < 4:  # where initializers are defaults of inputs
            make = library().helper.make_tensor_value_info
            graph.input.extend(make(t.name, t.data_type, t.dims) for t in tensors)
    _set(graph.node, new)
    _drop_unused(graph, loose)
    there = {v.name for part in (graph.input, graph.initializer) for v in part}
    there.update(o for node in graph.node for o in node.output)
    _set(graph.value_info, [v for v in graph.value_info if v.name in there])
    notes = graph.quantization_annotation
    _set(notes, [q for q in notes if q.tensor_name in there])


def _set(field: Any, entries: Sequence[Any]) -> None:
    held = [type(e).FromString(e.SerializeToString()) for e in entries]
    del field[:]
    field.extend(held)


def _drop_unused(graph: Any, loose: Sequence[str]) -> None:
    """Remove constants of these names, and what they were made of, where nothing needs them."""
    used = uses(graph)
    made = {o: n for n in graph.node for o in n.output if n.op_type in ("Constant", "Identity")}
    gone, queue = set(), list(dict.fromkeys(filter(None, loose)))
    while queue:
        name = queue.pop()
        if used[name] or name in gone:
            continue
        gone.add(name)
        if name in made:
            for source in made[name].input:
                used[source] -= 1
                queue.append(source)
    constants = {t.name for t in graph.initializer} & gone
    for field in (graph.initializer, graph.input):
        for i in reversed([i for i, v in enumerate(field) if v.name in constants]):
            del field[i]
    for i in reversed(
        [i for i, n in enumerate(graph.node) if gone.issuperset(n.output) and n.output[0] in made]
    ):
        del graph.node[i]
