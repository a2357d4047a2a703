"""Partition of an ONNX graph into programs and subgraphs that stay in onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lowrank._kernels._core import MAX_ARRAYS
from lowrank._typing import Ints
from lowrank.engine.network import Primitive, emit, fuse, value_shape
from lowrank.engine.program import Algorithm, Program, ProgramBuilder, Unsupported
from lowrank.interop.onnx.convolutions import LAYER_OPS
from lowrank.interop.onnx.graph import Constants, reads
from lowrank.interop.onnx.primitives import read
from lowrank.interop.onnx.runtime import Tensor

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


class _Item(NamedTuple):
    """Smallest part of a piece: a primitive, or a node of onnxruntime."""

    number: int  # of its last node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    primitive: Primitive | None


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
        items = []
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
                items.append(_Item(i, inputs, tuple(filter(None, node.output)), None))
        for p in fuse(live[::-1], uses):
            items.append(_Item(max(p.sources), p.inputs, (p.output,), p))
        self.items = sorted(items, key=lambda item: item.number)

    def pieces(self, algorithm: Algorithm) -> list[Piece]:
        """Return the pieces in execution order; raise _Demoted if a program cannot be built."""
        level: dict[str, int] = {}
        groups: dict[tuple[int, bool], list[_Item]] = {}
        for item in self.items:
            lowest = max((level.get(name, 0) for name in item.inputs), default=0)
            is_program = item.primitive is not None
            own = lowest + (lowest % 2 == is_program)
            level.update(dict.fromkeys(item.outputs, own))
            groups.setdefault((own, is_program), []).append(item)
        parts: list[list[_Item]] = []
        for (_, is_program), group in sorted(groups.items(), key=lambda pair: pair[0]):
            parts += _components(group) if is_program else [group]
        needed = Counter(self.outputs)
        for item in self.items:
            needed.update(set(item.inputs))
        for part in parts:
            numbers = {i for item in part if item.primitive for i in item.primitive.sources}
            if numbers and all(self.nodes[i].op_type not in LAYER_OPS for i in numbers):
                raise _Demoted(*numbers)  # packing costs more than is gained
        pieces = [self._piece(part, needed, algorithm) for part in parts]
        return [piece if b is None else _with_program(piece, b) for piece, b in pieces]

    def _piece(
        self, part: Sequence[_Item], needed: Counter[str], algorithm: Algorithm
    ) -> tuple[Piece, ProgramBuilder | None]:
        """Return a piece and, unless it is onnxruntime's, the builder of its program."""
        made = {name for item in part for name in item.outputs}
        uses = Counter(name for item in part for name in set(item.inputs))
        inputs = tuple(name for name in uses if name not in made)
        outputs = tuple(n for item in part for n in item.outputs if needed[n] > uses[n])
        primitives = [item.primitive for item in part if item.primitive is not None]
        if not primitives:
            return Piece(tuple(item.number for item in part), inputs, outputs), None
        numbers = tuple(sorted({i for p in primitives for i in p.sources}))
        if len(inputs) + len(outputs) > MAX_ARRAYS:
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


def _components(items: Sequence[_Item]) -> list[list[_Item]]:
    """Return items that share tensors, directly or through others, as one list each."""
    found: list[tuple[set[str], list[_Item]]] = []
    for item in items:
        names = {*item.inputs, *item.outputs}
        joined = [c for c in found if not names.isdisjoint(c[0])]
        found = [c for c in found if names.isdisjoint(c[0])]
        members = [member for c in joined for member in c[1]]
        found.append((names.union(*(c[0] for c in joined)), [*members, item]))
    return [sorted(members, key=lambda item: item.number) for _, members in found]
