"""Constant tensors that the nodes of an ONNX graph compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.interop.onnx.graph import Constants, constant_nodes, prune, reads
from lowrank.interop.onnx.runtime import ReferenceSession, open_session, run_session


class ConstantExpressions(Constants):
    """Constant tensors of a graph, also those that nodes compute from constants.

    Such are quantized weights behind DequantizeLinear, and weights behind Cast, Transpose or
    Reshape.
    """

    def __init__(self, model: Any, folder: Any) -> None:
        super().__init__(model, folder)
        self._model = model
        self._computed = {o: n for n in constant_nodes(model.graph) for o in n.output if o}

    def holds(self, name: str) -> bool:
        """Whether a tensor is constant."""
        return name in self._computed or super().holds(name)

    def __call__(self, name: str) -> Array | None:
        """Return the values of a tensor, or None if it is not constant."""
        found = super().__call__(name)
        if found is not None or name not in self._computed:
            return found
        part = prune(self._model, [name])
        try:
            (value,) = run_session(open_session(part, self._folder, 1), [name], {})
        except ValueError as why:  # such as a type for which onnxruntime has no kernels
            try:
                (value,) = ReferenceSession(part, self._folder).run([name], {})
            except Exception:  # of any operator
                raise ValueError(f"tensor {name!r} cannot be computed: {why}") from None
        return np.asarray(value)

    def source(self, name: str) -> str:
        """Return the largest initializer or Constant that a constant tensor is computed from."""
        sources, queue = set[str](), [name]
        while queue:
            at = queue.pop()
            node = self._computed.get(at)
            if node is None or not list(reads(node)):
                sources.add(at)
            else:
                queue += reads(node)
        return max(sorted(sources), key=self._elements)

    def _elements(self, name: str) -> int:
        tensor = self._tensors.get(name)
        if tensor is not None:
            return math.prod(tensor.dims)
        value = self(name)
        return 0 if value is None else value.size

    def users(self, name: str) -> list[Any]:
        """Return the nodes that are not constant and read a constant or what is computed of it."""
        names, found = {name}, []
        for node in self._model.graph.node:
            if names.isdisjoint(reads(node)):
                continue
            if all(o in self._computed for o in node.output if o):
                names.update(node.output)
            else:
                found.append(node)
        return found
