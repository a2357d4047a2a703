"""Layers of an ONNX graph: nodes that are convolutions or products with constant weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, Pads
from lowrank.compress.model import Layer
from lowrank.engine.onnx import unique_name
from lowrank.factorization import Factorization, dense
from lowrank.interop.onnx.graph import Constants, Sizes, attributes, shapes, uses

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TYPES = ("float16", "float32", "float64")

#: Function that runs the network; it returns the batch size and the shapes of tensors by name,
#: or None if the network cannot be run.
Probe = Callable[[Sequence[str]], tuple[int, Mapping[str, Ints]] | None]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Layer and its location in the graph.

    Attributes
    ----------
    layer : Layer
        Convolution that can be replaced.
    op : str
        Operator of its node.
    dtype : dtype
        Type of the weights in the graph.
    input, output : str
        Names of its input and output tensors.
    rank : int
        Number of axes of the input.
    fixed : tuple of int or None
        Spatial size of the input, None if the graph does not fix it.
    """

    layer: Layer
    op: str
    dtype: np.dtype[Any]
    input: str
    output: str
    rank: int
    fixed: Ints | None


def find(model: Any, folder: Path | None, inputs: Sequence[str], probe: Probe) -> list[Site]:
    """Return the layers of the main graph of `model`, in its order; `inputs` are its inputs."""
    constant, sizes = Constants(model, folder), shapes(model)
    candidates = [
        (n, w) for n in model.graph.node if (w := constant_weight(n, constant)) is not None
    ]
    batches = {sizes[i][0] for i in inputs if sizes.get(i)}
    unknown = [
        n.input[0] for n, _ in candidates if _size(n, sizes.get(n.input[0]), batches) is None
    ]
    batch, run_shapes = (probe(list(dict.fromkeys(unknown))) if unknown else None) or (0, {})
    scales = _Scales(model.graph, constant)
    sites, used_names = [], set[str]()
    for node, weight in candidates:
        shape, run_shape = sizes.get(node.input[0]), run_shapes.get(node.input[0])
        fixed = _size(node, shape, batches)
        size = fixed or _size(node, run_shape, {batch}) or _size_if_batch_is_first(node, shape)
        name = unique_name(node.name or node.output[0], used_names)
        if size is None:
            raise ValueError(
                f"the input of layer {name!r} has no fixed size: give calibration data, or fix "
                "the shape of the network's inputs"
            )
        try:
            conv = convolution_of(node, weight, constant, size, fixed is not None)
        except (ValueError, TypeError) as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        if conv is None:
            continue
        used_names.add(name)
        layer = Layer(name, conv, size, scales.of(node))
        rank = len(shape or run_shape or ())
        sites.append(
            Site(layer, node.op_type, weight.dtype, node.input[0], node.output[0], rank, fixed)
        )
    return sites


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
) -> Factorization | None:
    """Return a node as a chain of one stage, or None if it cannot be replaced."""
    a = attributes(node)
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = constant(node.input[2])
        if bias is None:
            return None
    if node.op_type == "MatMul":
        return dense(weight.T[..., None])
    if node.op_type == "Gemm":
        if a.get("transA", 0):
            return None
        weight = (weight if a.get("transB", 0) else weight.T) * weight.dtype.type(a.get("alpha", 1))
        if bias is not None:
            if bias.size not in (1, len(weight)) or bias.size != np.prod(bias.shape[-1:]):
                return None  # one bias per row
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
    if pads is None:
        return None
    return dense(weight, bias, padding=pads, **options)


def padding_of(
    op: str, a: Mapping[str, Any], kernel: Ints, options: Mapping[str, Any], size: Ints, fixed: bool
) -> Pads | None:
    """Return the padding of each axis, with ``auto_pad`` and ``output_shape`` resolved, or None."""
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
            return None
        total = []
        for i in range(n):
            whole = (size[i] - 1) * stride[i] + options["output_padding"][i] + extent[i]
            total.append(whole - (output_shape[i] if output_shape else size[i] * stride[i]))
        if min(total) < 0:
            return None  # runtimes differ in the values of the samples beyond the output
    elif auto.startswith("SAME"):
        if max(stride) > 1 and not fixed:
            return None  # the padding depends on the input size
        total = [max((-(-m // s) - 1) * s + e - m, 0) for m, s, e in zip(size, stride, extent)]
    else:
        if auto == "VALID":
            pads = [0] * 2 * n
        if min(pads) < 0:
            return None  # negative padding crops the input
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
