"""Constant tensors that the nodes of an ONNX graph compute, and who reads them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.interop.onnx.graph import Constants, constant_nodes, first_output, prune, reads
from lowrank.interop.onnx.runtime import ReferenceSession, open_session, run_session


class ConstantExpressions(Constants):
    """Constant tensors of a graph, also those that nodes compute from constants.

    Such are quantized weights behind DequantizeLinear, and weights behind Cast, Transpose or
    Reshape.
    """

    def __init__(self, model: Any, folder: Any) -> None:
        super().__init__(model, folder)
        self._model = model
        self._computed: dict[str, Any] = {}
        self._keys: dict[str, str] = {}
        self._sources: dict[str, dict[str, int]] = {}  # elements by the key of the source
        for tensor in model.graph.initializer:
            self._add(tensor.name, f"initializer {tensor.name}", math.prod(tensor.dims))
        for node in constant_nodes(model.graph):
            self._add_node(node)
        self._sparse = {s.values.name for s in model.graph.sparse_initializer}
        for node in model.graph.node:
            has_sparse = any(a.HasField("sparse_tensor") for a in node.attribute)
            if has_sparse or (node.op_type == "Identity" and node.input[0] in self._sparse):
                self._sparse.update(node.output)
        self._readers = self._find_readers()

    def _add(self, name: str, key: str, elements: int) -> None:
        self._keys[name], self._sources[name] = key, {key: elements}

    def _add_node(self, node: Any) -> None:
        inputs = list(reads(node))
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        # Constants of equal values are one: inlined functions, and quantized models, repeat them.
        parts = (node.domain, node.op_type, attributes, [self._keys.get(n) for n in node.input])
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        sources = {k: n for name in inputs for k, n in self._sources[name].items()}
        for i, output in enumerate(node.output):
            self._computed[output] = node
            if not inputs:
                self._add(output, f"{digest} {i}", sum(map(_elements, node.attribute)))
                continue
            is_same = node.op_type == "Identity"
            self._keys[output] = self._keys[inputs[0]] if is_same else f"{digest} {i}"
            self._sources[output] = sources

    def _find_readers(self) -> dict[str, dict[str, str]]:
        """Return who reads the values of each source, by the name of a tensor that they compute."""
        readers: dict[str, dict[str, str]] = {}
        for node in self._model.graph.node:
            output = first_output(node)
            if output in self._computed:
                continue
            for name in reads(node):
                for key in self._sources.get(name, ()):
                    readers.setdefault(key, {})[output] = node.name or output
        for output in (o.name for o in self._model.graph.output):
            for key in self._sources.get(output, ()):
                readers.setdefault(key, {})[output] = f"the output {output!r} of the network"
        return readers

    def holds(self, name: str) -> bool:
        """Whether a tensor is constant."""
        return name in self._computed or super().holds(name)

    def is_sparse(self, name: str) -> bool:
        """Whether a tensor is a constant of which only some values are stored."""
        return name in self._sparse

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

    def shape(self, name: str) -> Ints | None:
        """Return the shape of a constant tensor, or None if it is not constant."""
        if name in self._tensors:
            return tuple(self._tensors[name].dims)
        value = self(name)
        return None if value is None else value.shape

    def key(self, name: str) -> str:
        """Return a key that two constant tensors share if they are computed from the same.

        Parameters
        ----------
        name : str
            Name of a tensor.

        Returns
        -------
        str
            The name itself if the tensor is not constant.
        """
        return self._keys.get(name, name)

    def readers(self, name: str, shape: Ints) -> dict[str, str]:
        """Return the nodes and outputs that read the values of a weight.

        Parameters
        ----------
        name : str
            Name of a constant tensor.
        shape : tuple of int
            Its shape.

        Returns
        -------
        dict of str to str
            Names of nodes and outputs of the network, by the first tensor that they compute.
        """
        sources = self._sources[name]
        largest = max(sources.values())
        # Smaller constants are scales, zero points and shapes, which layers may share.
        held = [k for k, n in sources.items() if n == largest or n > max(shape)]
        return {output: who for k in held for output, who in self._readers[k].items()}


def _elements(attribute: Any) -> int:
    """Return the number of elements of an attribute of a Constant."""
    if attribute.HasField("t"):
        return math.prod(attribute.t.dims)
    return max(len(attribute.floats), len(attribute.ints), 1)
