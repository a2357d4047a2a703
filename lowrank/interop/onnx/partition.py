"""Partition of an ONNX graph into programs and subgraphs that stay in onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank._typing import Ints
from lowrank.engine.network import Primitive, emit, fuse, value_shape
from lowrank.engine.program import Algorithm, Program, ProgramBuilder, Unsupported
from lowrank.interop.onnx.graph import Constants, reads
from lowrank.interop.onnx.layers import LAYER_OPS
from lowrank.interop.onnx.primitives import read
from lowrank.interop.onnx.runtime import Tensor

_MAX_ARRAYS = 16  # of a program, inputs and outputs
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a graph that runs as a whole.

    Attributes
    ----------
    nodes : tuple of int
        Numbers of its nodes.
    inputs, outputs : tuple of str
        Tensors that it reads and writes.
    program : Program or None
        Program that computes it; None if it runs in onnxruntime.
    shapes : mapping of str to tuple of int
        Shapes without the batch of all tensors of a program.
    arrays : tuple of tuple of int
        Shapes without the batch of a program's arrays, inputs then outputs.
    """

    nodes: Ints
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    program: Program | None = None
    shapes: Mapping[str, Ints] = field(default_factory=dict)
    arrays: tuple[Ints, ...] = ()

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the piece computes tensors of these shapes: its own, with any batch."""
        if self.program is None:
            return True
        batches = {tensors[name].shape[0] for name in self.shapes}
        return len(batches) == 1 and all(
            tensors[name].shape[1:] == shape for name, shape in self.shapes.items()
        )


class _Demoted(Exception):
    """Nodes must stay in onnxruntime; `args` are their numbers."""


def partition(
    model: Any, constant: Constants, tensors: Mapping[str, Tensor], algorithm: Algorithm
) -> list[Piece]:
    """Return the pieces of a graph, in execution order, for known shapes of its tensors."""
    nodes = list(model.graph.node)
    outputs = [o.name for o in model.graph.output]
    used = {name for node in nodes for name in reads(node)}.union(outputs)
    primitives = {
        i: found
        for i, node in enumerate(nodes)
        if (found := read(node, i, constant, tensors, used))
    }
    while True:
        try:
            pieces = _Partition(nodes, outputs, primitives, constant, tensors).pieces(algorithm)
            if all(tensors[n].kind.startswith("tensor(") for p in pieces for n in p.inputs):
                return pieces
            raise _Demoted(*primitives)  # sequences are not passed from piece to piece
        except _Demoted as why:
            for i in why.args:
                del primitives[i]


class _Partition:
    """Pieces of a graph of which some nodes are primitives, by their numbers.

    Pieces have levels, even ones for programs and odd ones for onnxruntime: that of a node is the
    lowest one of its kind that is not below those of the nodes that it reads from.
    """

    def __init__(
        self,
        nodes: Sequence[Any],
        outputs: Sequence[str],
        primitives: Mapping[int, Sequence[Primitive]],
        constant: Constants,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.nodes, self.tensors, self.outputs = nodes, tensors, outputs
        # Backwards from the outputs: nodes that compute shapes are not needed by primitives.
        uses = Counter(outputs)
        live: list[Primitive] = []
        items: list[tuple[int, tuple[str, ...], tuple[str, ...], Primitive | None]] = []
        for i in range(len(nodes) - 1, -1, -1):
            node = nodes[i]
            if not any(uses[o] for o in node.output):
                continue
            for p in primitives.get(i, ()):
                if uses[p.output]:
                    live.append(p)
                    uses.update(p.inputs)
            if i not in primitives:
                # Tensors of subgraphs are not among those of the main graph.
                names = (n for n in reads(node) if n in tensors and not constant.holds(n))
                inputs = tuple(dict.fromkeys(names))
                uses.update(inputs)
                items.append((i, inputs, tuple(filter(None, node.output)), None))
        items += [(max(p.sources), p.inputs, (p.output,), p) for p in fuse(live[::-1], uses)]
        self.items = sorted(items, key=lambda item: item[0])

    def pieces(self, algorithm: Algorithm) -> list[Piece]:
        """Return the pieces in execution order; raise _Demoted if a program cannot be built."""
        level: dict[str, int] = {}
        groups: dict[tuple[int, bool], list[Any]] = {}
        for item in self.items:
            _, inputs, outputs, p = item
            lowest = max((level.get(name, 0) for name in inputs), default=0)
            own = lowest + (lowest % 2 == (p is not None))
            level.update(dict.fromkeys(outputs, own))
            groups.setdefault((own, p is not None), []).append(item)
        parts: list[list[Any]] = []
        for (_, is_program), group in sorted(groups.items(), key=lambda pair: pair[0]):
            parts += _components(group) if is_program else [group]
        needed = Counter(self.outputs)
        for _, inputs, _, _ in self.items:
            needed.update(set(inputs))
        for part in parts:
            numbers = {i for *_, p in part if p is not None for i in p.sources}
            if numbers and all(self.nodes[i].op_type not in LAYER_OPS for i in numbers):
                raise _Demoted(*numbers)
        pieces = [self._piece(part, needed, algorithm) for part in parts]
        return [piece if b is None else _with_program(piece, b) for piece, b in pieces]

    def _piece(
        self, part: Sequence[Any], needed: Counter[str], algorithm: Algorithm
    ) -> tuple[Piece, ProgramBuilder | None]:
        made = [name for _, _, outputs, _ in part for name in outputs]
        reads_of = Counter(name for _, inputs, _, _ in part for name in set(inputs))
        inputs = tuple(name for name in reads_of if name not in set(made))
        outputs = tuple(name for name in made if needed[name] > reads_of[name])
        primitives = [item[3] for item in part]
        if primitives[0] is None:
            return Piece(tuple(item[0] for item in part), inputs, outputs), None
        numbers = tuple(sorted({i for p in primitives for i in p.sources}))
        if len(inputs) + len(outputs) > _MAX_ARRAYS:
            raise _Demoted(*numbers)
        builder = ProgramBuilder(_TYPES[self.tensors[inputs[0]].kind], algorithm)
        shapes: dict[str, Ints] = {}
        values = {}
        for name in inputs:
            shapes[name] = tuple(n for n in self.tensors[name].shape[1:] if n is not None)
            try:
                values[name] = builder.input(value_shape(shapes[name]))
            except Unsupported:
                readers = (p for p in primitives if name in p.inputs)
                raise _Demoted(*{i for p in readers for i in p.sources}) from None
        for p in primitives:
            try:
                values[p.output] = emit(builder, p, values, shapes)
            except ValueError:  # Unsupported, or a shape that does not fit
                raise _Demoted(*p.sources) from None
        for name in outputs:
            builder.output(values[name])
        arrays = tuple(values[name].shape for name in (*inputs, *outputs))
        return Piece(numbers, inputs, outputs, shapes=shapes, arrays=arrays), builder


def _with_program(piece: Piece, builder: ProgramBuilder) -> Piece:
    try:
        return replace(piece, program=builder.build())
    except ValueError:
        raise _Demoted(*piece.nodes) from None


def _components(items: Sequence[Any]) -> list[list[Any]]:
    """Return items that share tensors, directly or through others, as one list each."""
    found: list[tuple[set[str], list[Any]]] = []
    for item in items:
        names = {*item[1], *item[2]}
        joined = [c for c in found if not names.isdisjoint(c[0])]
        found = [c for c in found if names.isdisjoint(c[0])]
        members = [m for c in joined for m in c[1]]
        found.append((names.union(*(c[0] for c in joined)), [*members, item]))
    return [sorted(members, key=lambda item: item[0]) for _, members in found]
