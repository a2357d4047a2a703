"""Layers of an ONNX graph: nodes that are convolutions or products with constant weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints, Pads
from lowrank.compress.model import Layer
from lowrank.engine.onnx import unique_name
from lowrank.factorization import Factorization, dense
from lowrank.interop.onnx.constants import ConstantExpressions
from lowrank.interop.onnx.graph import (
    Constants,
    Sizes,
    as_numpy,
    attributes,
    shapes,
    subgraphs,
    uses,
)

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: Other operators with the weights of a convolution or a linear layer.
_OTHER_OPS = (
    "ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul", "DeformConv", "FusedConv",
    "FusedMatMul", "MatMulNBits", "QGemm", "QLinearConvTranspose",
)  # fmt: skip
_TYPES = ("float16", "bfloat16", "float32", "float64")

#: Function that runs the network; it returns the batch size and the shapes of tensors by name,
#: or None if the network cannot be run.
Probe = Callable[[Sequence[str]], tuple[int, Mapping[str, Ints]] | None]


class NotReplaceableError(ValueError):
    """Reason why a node stays as it is."""


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


def find(
    model: Any, folder: Path | None, inputs: Sequence[str], probe: Probe
) -> tuple[list[Site], dict[str, str]]:
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
    sites : list of Site
        Layers in the order of the graph.
    left_out : dict of str to str
        Reasons by name.

    Raises
    ------
    ValueError
        If a node is not valid.
    """
    constant, sizes = ConstantExpressions(model, folder), shapes(model)
    graph, left_out = model.graph, dict[str, str]()
    names, weights = _names(graph.node), dict[str, Array]()
    for node in graph.node:
        name = names[node.output[0]]
        try:
            weight = _weight(node, constant)
        except NotReplaceableError as why:
            left_out[name] = str(why)
            continue
        if weight is not None:
            weights[name] = weight
        left_out.update(_in_bodies(node, name))
    candidates = {names[n.output[0]]: n for n in graph.node if names[n.output[0]] in weights}
    groups, shared = _groups(candidates, constant)
    left_out |= shared
    batches = {sizes[i][0] for i in inputs if sizes.get(i)}
    first = [n for name in groups for n in groups[name]]
    unknown = [n.input[0] for n in first if _size(n, sizes.get(n.input[0]), batches) is None]
    batch, run_shapes = (probe(list(dict.fromkeys(unknown))) if unknown else None) or (0, {})
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
                if size is None:
                    raise NotReplaceableError(
                        "its input has no fixed size: give calibration data, or fix the shape of "
                        "the network's inputs"
                    )
                weight = weights[name]
                conv = convolution_of(node, weight, constant, size, fixed is not None)
                rank = len(shape or run_shape or ())
                uses.append(Use(node.input[0], node.output[0], rank, fixed))
                found.append((conv, size))
        except NotReplaceableError as why:
            left_out[name] = str(why)
            continue
        except (ValueError, TypeError) as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        (conv, size), times = found[0], len(nodes)
        if any(f.geometry != conv.geometry for f, _ in found):
            left_out[name] = "its nodes share a weight, but pad differently"
            continue
        scale = scales.of(nodes[0]) if times == 1 else None
        layer = Layer(name, conv, size, scale, times)
        sites.append(Site(layer, nodes[0].op_type, weights[name].dtype, tuple(uses)))
    return sites, left_out


def _names(nodes: Sequence[Any]) -> dict[str, str]:
    """Return distinct names of nodes by their first output."""
    used, names = set[str](), {}
    for node in nodes:
        name = unique_name(node.name or node.output[0], used)
        if node.op_type in LAYER_OPS:
            used.add(name)
        names[node.output[0]] = name
    return names


def _weight(node: Any, constant: ConstantExpressions) -> Array | None:
    """Return the constant weight of a layer, or None of a node without one.

    Raise a NotReplaceableError for layers that stay as they are.
    """
    if node.op_type in _OTHER_OPS:
        raise NotReplaceableError(f"it is a {node.op_type}")
    weight = constant_weight(node, constant)
    if weight is not None or node.op_type not in LAYER_OPS or len(node.input) < 2:
        return weight
    if node.domain not in ("", "ai.onnx"):
        raise NotReplaceableError(f"it is a {node.op_type} of the domain {node.domain}")
    linear = node.op_type in ("Gemm", "MatMul")
    holds = [constant.holds(name) for name in node.input[:2]]
    if all(holds) or (linear and not any(holds)):
        return None  # a constant, or a product of two values
    if not holds[1]:
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


def _in_bodies(node: Any, name: str) -> dict[str, str]:
    """Return layers in the bodies of a node, such as an If or a Loop, and why they stay."""
    found = {}
    for graph in subgraphs(node):
        for inner in graph.node:
            path = f"{name}/{inner.name or inner.output[0]}"
            if inner.op_type in (*LAYER_OPS, *_OTHER_OPS):
                found[path] = f"it is in the body of the {node.op_type} {name!r}"
            found |= _in_bodies(inner, path)
    return found


def _groups(
    candidates: Mapping[str, Any], constant: ConstantExpressions
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return the nodes of each layer by its name, and why others stay.

    Nodes that read one weight and do the same with it are one unknown.
    """
    groups: dict[str, list[Any]] = {}
    left_out: dict[str, str] = {}
    by_output = {node.output[0]: name for name, node in candidates.items()}
    for name, node in candidates.items():
        users = constant.users(constant.source(node.input[1]))
        others = [u for u in users if u.output[0] != node.output[0]]
        if all(u.output[0] in by_output and _is_alike(u, node) for u in others):
            first = by_output[users[0].output[0]]
            groups.setdefault(first, []).append(node)
        else:
            theirs = ", ".join(sorted({u.name or u.output[0] for u in others}))
            left_out[name] = f"its weight is shared with {theirs}"
    return groups, left_out


def _is_alike(a: Any, b: Any) -> bool:
    """Return whether two nodes compute the same function of their inputs."""
    return bool(
        a.op_type == b.op_type
        and list(a.input)[1:] == list(b.input)[1:]
        and attributes(a) == attributes(b)
    )


def constant_weight(node: Any, constant: Constants) -> Array | None:
    """Return the constant weight of a node that may be a layer, or None."""
    if node.op_type not in LAYER_OPS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return None
    weight = constant(node.input[1])
    if weight is None or weight.dtype.name not in _TYPES or not weight.size:
        return None
    linear = node.op_type in ("Gemm", "MatMul")
    if weight.ndim not in ((2,) if linear else (3, 4, 5)) or constant.holds(node.input[0]):
        return None
    return weight


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
    free = [n for n in shape[:-1] if not isinstance(n, int)]
    rows = math.prod(n for n in shape[:-1] if isinstance(n, int))
    if len(free) == 1 and free[0] is not None and free[0] in batches:
        return (rows,)
    sizes = [n for n in batches if isinstance(n, int) and n]
    if free or len(sizes) != len(batches) or len(sizes) != 1:
        return None
    return (max(rows // sizes[0], 1),)


def _size_if_batch_is_first(node: Any, shape: Sizes | None) -> Ints | None:
    """Return the number of vectors of a linear node, assuming that its first axis is the batch."""
    if node.op_type in ("Conv", "ConvTranspose") or not shape:
        return None
    rest = [n for n in shape[1:-1] if isinstance(n, int)]
    return (math.prod(rest),) if len(rest) == len(shape) - 2 else None


def convolution_of(
    node: Any, weight: Array, constant: Constants, size: Ints, fixed: bool
) -> Factorization:
    """Return a node as a chain of one stage, or raise a NotReplaceableError."""
    a = attributes(node)
    bias = None
    weight = as_numpy(weight)
    if len(node.input) > 2 and node.input[2]:
        bias = constant(node.input[2])
        if bias is None:
            raise NotReplaceableError("its bias is not constant")
        bias = as_numpy(bias)
    if node.op_type == "MatMul":
        return dense(weight.T[..., None])
    if node.op_type == "Gemm":
        if a.get("transA", 0):
            raise NotReplaceableError("its input is transposed")
        weight = (weight if a.get("transB", 0) else weight.T) * weight.dtype.type(a.get("alpha", 1))
        if bias is not None:
            if bias.size not in (1, len(weight)) or bias.size != np.prod(bias.shape[-1:]):
                raise NotReplaceableError("it has one bias per row")
            bias = np.broadcast_to(bias.reshape(-1), len(weight)) * bias.dtype.type(
                a.get("beta", 1)
            )
        return dense(weight[..., None], bias)
    n = weight.ndim - 2
    if len(size) != n:
        raise ValueError(f"weight of shape {weight.shape} does not fit input size {size}")
    options: dict[str, Any] = {
        "stride": list(a.get("strides", [1] * n)),
        "dilation": list(a.get("dilations", [1] * n)),
        "groups": a.get("group", 1),
    }
    if node.op_type == "ConvTranspose":
        options |= {
            "transposed": True,
            "output_padding": list(a.get("output_padding", [0] * n)),
        }
    if any(len(v) != n for v in options.values() if isinstance(v, list)):
        raise ValueError(f"attributes {options} do not have {n} entries")
    pads = padding_of(node.op_type, a, weight.shape[2:], options, size, fixed)
    return dense(weight, bias, padding=pads, **options)


def padding_of(
    op: str, a: Mapping[str, Any], kernel: Ints, options: Mapping[str, Any], size: Ints, fixed: bool
) -> Pads:
    """Return the padding of each axis, with ``auto_pad`` and ``output_shape`` resolved.

    Raise a NotReplaceableError if there is none that holds for every input.
    """
    n = len(kernel)
    auto = a.get("auto_pad", b"NOTSET").decode()
    stride = options["stride"]
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, options["dilation"])]
    output_shape = list(a.get("output_shape", []))[-n:]
    pads = list(a.get("pads", [0] * 2 * n))
    if len(pads) != 2 * n or len(output_shape) not in (0, n):
        raise ValueError(f"pads {pads} or output_shape {output_shape} do not fit {n} axes")
    if op == "ConvTranspose" and (output_shape or auto.startswith("SAME")):
        if output_shape and not fixed:
            raise NotReplaceableError("its output_shape holds for one input size")
        total = []
        for i in range(n):
            whole = (size[i] - 1) * stride[i] + options["output_padding"][i] + extent[i]
            total.append(whole - (output_shape[i] if output_shape else size[i] * stride[i]))
        if min(total) < 0:  # runtimes differ in the values of these samples
            raise NotReplaceableError("its output has samples beyond those of the kernel")
    elif auto.startswith("SAME"):
        if max(stride) > 1 and not fixed:
            raise NotReplaceableError(f"its padding {auto} depends on the input size")
        total = [max((-(-m // s) - 1) * s + e - m, 0) for m, s, e in zip(size, stride, extent)]
    else:
        if auto == "VALID":
            pads = [0] * 2 * n
        if min(pads) < 0:
            raise NotReplaceableError("its padding is negative")
        return tuple(zip(pads[:n], pads[n:]))
    # The odd sample is at the end for SAME_UPPER, otherwise (also for output_shape) at the start.
    if auto == "SAME_UPPER":
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((t - t // 2, t // 2) for t in total)


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
