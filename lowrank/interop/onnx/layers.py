"""Layers of an ONNX graph: nodes that are convolutions or products with constant weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.compress.model import Layer
from lowrank.engine.onnx import unique_name
from lowrank.factorization import Factorization
from lowrank.interop.onnx.constants import ConstantExpressions
from lowrank.interop.onnx.convolutions import (
    LAYER_OPS,
    NotReplaceableError,
    constant_weight,
    convolution_of,
)
from lowrank.interop.onnx.graph import (
    Constants,
    Sizes,
    attributes,
    first_output,
    infer_shapes,
    known_shapes,
    uses,
)
from lowrank.interop.onnx.omitted import Omissions, Probe
from lowrank.interop.onnx.products import is_product, weight_inputs, without_batch

_SUPPORTED = f"{', '.join(LAYER_OPS[:-1])} or {LAYER_OPS[-1]}"
_NO_SIZE = (
    "its input has no fixed size: give calibration data or the input size, or fix the shape of "
    "the network's inputs"
)


class Use(NamedTuple):
    """One node of a layer.

    Attributes
    ----------
    input, output : str
        Names of its input and output tensors.
    rank : int
        Number of axes of the input.
    fixed : tuple of int or None
        Spatial size of the input, None if the graph does not fix it.
    """

    input: str
    output: str
    rank: int
    fixed: Ints | None


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Layer and its location in the graph.

    Attributes
    ----------
    layer : Layer
        Convolution that can be replaced.
    op : str
        Operator of its nodes.
    dtype : dtype
        Type of the weights in the graph.
    uses : tuple of Use
        Its nodes; several share one weight.
    """

    layer: Layer
    op: str
    dtype: np.dtype[Any]
    uses: tuple[Use, ...]


class Found(NamedTuple):
    """Layers of a graph.

    Attributes
    ----------
    sites : list of Site
        Layers that can be replaced, in the order of the graph.
    left_out : dict of str to str
        Reasons why others are not among them, by name.
    left_out_macs : dict of str to int
        Their MACs per example, where they are known.
    unsized : dict of str to Factorization
        Those of them that could be replaced if the sizes of their inputs were known.
    """

    sites: list[Site]
    left_out: dict[str, str]
    left_out_macs: dict[str, int]
    unsized: dict[str, Factorization]


def find(model: Any, folder: Path | None, inputs: Sequence[str], probe: Probe) -> Found:
    """Return the layers of the main graph, and the reasons why others are not among them.

    Parameters
    ----------
    model : onnx.ModelProto
        Model without local functions.
    folder : path or None
        Folder of its external data.
    inputs : sequence of str
        Names of its inputs.
    probe : callable
        Function that runs the model.

    Returns
    -------
    Found

    Raises
    ------
    ValueError
        If a node is not valid.
    """
    inferred = infer_shapes(model).graph
    constant, sizes = ConstantExpressions(model, folder), known_shapes(inferred)
    graph = model.graph
    names, weights = _names(graph.node), dict[str, Array]()
    batches = {sizes[i][0] for i in inputs if sizes.get(i)}
    omitted = Omissions(constant, sizes, batches)
    unsized: dict[str, Factorization] = {}
    for node, with_shapes in zip(graph.node, inferred.node, strict=True):
        name = names[first_output(node)]
        try:
            weight = _weight(node, constant)
        except NotReplaceableError as why:
            omitted.add(name, node, str(why))
            continue
        if weight is not None:
            weights[name] = weight
        omitted.add_bodies(name, with_shapes)
    candidates = {n: x for x in graph.node if (n := names[first_output(x)]) in weights}
    groups = _groups(candidates, weights, constant, omitted)
    first = [n for name in groups for n in groups[name]]
    unknown = [n.input[0] for n in first if _size(n, sizes.get(n.input[0]), batches) is None]
    shown = probe(list(dict.fromkeys(unknown)), True) if unknown else None
    batch, run_shapes = shown or (0, {})
    scales = _Scales(graph, constant)
    sites = []
    for name, nodes in groups.items():
        uses, found = [], []
        try:
            for node in nodes:
                shape, run_shape = sizes.get(node.input[0]), run_shapes.get(node.input[0])
                fixed = _size(node, shape, batches)
                size = fixed or _size(node, run_shape, {batch})
                size = size or _size_if_batch_is_first(node, shape)
                weight = weights[name]
                if len(shape or run_shape or weight.shape) < 2:
                    raise NotReplaceableError("its input is one vector, without a batch")
                assumed = size or (1,) * max(weight.ndim - 2, 1)
                conv = convolution_of(node, weight, constant, assumed, fixed is not None)
                if size is None:
                    unsized[name] = conv
                    raise NotReplaceableError(_NO_SIZE)
                rank = len(shape or run_shape or ())
                uses.append(Use(node.input[0], node.output[0], rank, fixed))
                found.append((conv, size))
        except NotReplaceableError as why:
            for node in nodes:
                omitted.add(names[first_output(node)], node, str(why))
            continue
        except (ValueError, TypeError) as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        (conv, size), times = found[0], len(nodes)
        if any(f.geometry != conv.geometry for f, _ in found):
            for node in nodes:
                reason = "its nodes share a weight, but pad differently"
                omitted.add(names[first_output(node)], node, reason)
            continue
        scale = scales.of(nodes[0]) if times == 1 else None
        all_sizes = tuple(s for _, s in found)
        several = all_sizes if any(s != size for s in all_sizes) else ()
        layer = Layer(name, conv, size, scale, times, sizes=several)
        sites.append(Site(layer, nodes[0].op_type, weights[name].dtype, tuple(uses)))
    return Found(sites, omitted.reasons, omitted.count(probe), unsized)


def _names(nodes: Sequence[Any]) -> dict[str, str]:
    """Return distinct names of nodes by their first output."""
    used, names = set[str](), {}
    for node in nodes:
        name = unique_name(node.name or first_output(node), used)
        if weight_inputs(node):
            used.add(name)
        names[first_output(node)] = name
    return names


def _weight(node: Any, constant: ConstantExpressions) -> Array | None:
    """Return the constant weight of a layer, or None of a node without one.

    Raise a NotReplaceableError for layers that stay as they are.
    """
    weight = constant_weight(node, constant)
    if weight is not None:
        return weight
    if not is_product(node, lambda n: constant.holds(n) or constant.is_sparse(n)):
        return None
    if node.op_type not in LAYER_OPS:
        raise NotReplaceableError(f"its operator {node.op_type} is not {_SUPPORTED}")
    if node.domain not in ("", "ai.onnx"):
        raise NotReplaceableError(f"it is a {node.op_type} of the domain {node.domain}")
    if any(map(constant.is_sparse, node.input[:2])):
        raise NotReplaceableError("its weight is sparse")
    if not constant.holds(node.input[1]):
        linear = node.op_type in ("Gemm", "MatMul")
        raise NotReplaceableError(
            "its weight is the first factor" if linear else "its weight is not constant"
        )
    found = constant(node.input[1])
    what = (
        "its weight is not a tensor"
        if found is None
        else (f"its weight is of type {found.dtype} and shape {found.shape}")
    )
    raise NotReplaceableError(what)


def _groups(
    candidates: Mapping[str, Any],
    weights: Mapping[str, Array],
    constant: ConstantExpressions,
    omitted: Omissions,
) -> dict[str, list[Any]]:
    """Return the nodes of each layer by its name, and leave out nodes that share their weight.

    Nodes that read one weight and do the same with it are one unknown.
    """
    alike: dict[Any, list[Any]] = {}
    keys = {}
    for name, node in candidates.items():
        given = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        key = (node.op_type, tuple(given), *map(constant.key, node.input[1:]))
        keys[name] = key
        alike.setdefault(key, []).append(node)
    groups: dict[str, list[Any]] = {}
    for name, node in candidates.items():
        together = alike[keys[name]]
        readers = constant.readers(node.input[1], weights[name].shape)
        outputs = {n.output[0] for n in together}
        if others := sorted({who for output, who in readers.items() if output not in outputs}):
            omitted.add(name, node, f"its weight is shared with {', '.join(others)}")
        elif node is together[0]:
            groups[name] = together
    return groups


def _size(node: Any, shape: Sizes | None, batches: set[Any]) -> Ints | None:
    """Return the spatial size of a node's input, for a linear node its number of vectors, or None.

    `batches` are the known sizes and symbols of the batch.  In the input of a linear node the
    batch may be any axis but the last, or part of one.
    """
    if shape is None or len(shape) < 2:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        known = tuple(n for n in shape[2:] if isinstance(n, int))
        return known if len(known) == len(shape) - 2 else None
    vectors = without_batch(shape[:-1], batches)
    return None if vectors is None else (vectors,)


def _size_if_batch_is_first(node: Any, shape: Sizes | None) -> Ints | None:
    """Return the number of vectors of a linear node, assuming that its first axis is the batch."""
    if node.op_type in ("Conv", "ConvTranspose") or not shape:
        return None
    rest = [n for n in shape[1:-1] if isinstance(n, int)]
    return (math.prod(rest),) if len(rest) == len(shape) - 2 else None


class _Scales:
    """Gains of the batch norms that are the only users of a layer's output."""

    def __init__(self, graph: Any, constant: Constants) -> None:
        self._uses: Counter[str] = uses(graph)
        self._norms = {n.input[0]: n for n in graph.node if n.op_type == "BatchNormalization"}
        self._constant = constant

    def of(self, node: Any) -> Array | None:
        """Return the gain of the batch norm after a node, or None."""
        output = node.output[0]
        norm = self._norms.get(output)
        if norm is None or self._uses[output] != 1 or node.op_type == "MatMul":
            return None
        a = attributes(norm)
        gamma, variance = self._constant(norm.input[1]), self._constant(norm.input[4])
        if a.get("training_mode", 0) or gamma is None or variance is None:
            return None
        spread = np.sqrt(variance.astype(np.float64) + a.get("epsilon", 1e-5))
        return np.asarray(gamma / spread)
