"""Layers of an ONNX graph: which nodes are convolutions with constant weights, and of what kind."""

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
from lowrank.factorization import Factorization, dense
from lowrank.interop.onnx.graph import Constants, Sizes, attributes, shapes, uses

_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TYPES = ("float16", "float32", "float64")

#: Shapes that tensors of these names have in a run, the batch's size first; None if none can be.
Probe = Callable[[Sequence[str]], tuple[int, Mapping[str, Ints]] | None]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A layer and where it stands in the graph.

    Attributes
    ----------
    layer : Layer
        As compression sees it.
    op : str
        Type of its node.
    dtype : dtype
        Of the weights in the graph.
    input, output : str
        Tensors.
    rank : int
        Axes of the input.
    fixed : tuple of int or None
        Spatial size of the input where the graph says it.
    """

    layer: Layer
    op: str
    dtype: np.dtype[Any]
    input: str
    output: str
    rank: int
    fixed: Ints | None


def find(model: Any, folder: Path | None, inputs: Sequence[str], probe: Probe) -> list[Site]:
    """Layers of the main graph of `model`, in its order; `inputs` are those of the network."""
    constant, sizes = Constants(model, folder), shapes(model)
    picked = [(n, w) for n in model.graph.node if (w := _weight(n, constant)) is not None]
    batches = {sizes[i][0] for i in inputs if sizes.get(i)}
    open_ = [n.input[0] for n, _ in picked if _size(n, sizes.get(n.input[0]), batches) is None]
    batch, ran = (probe(list(dict.fromkeys(open_))) if open_ else None) or (0, {})
    scales = _Scales(model.graph, constant)
    found, taken = [], set[str]()
    for node, weight in picked:
        shape = sizes.get(node.input[0])
        fixed = _size(node, shape, batches)
        size = fixed or _size(node, ran.get(node.input[0]), {batch}) or _likely(node, shape)
        name = _unique(node.name or node.output[0], taken)
        if size is None:
            raise ValueError(
                f"the input of layer {name!r} has no fixed size: give calibration data, or fix "
                "the shape of the network's inputs"
            )
        try:
            conv = _conv(node, weight, constant, size, fixed is not None)
        except (ValueError, TypeError) as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        if conv is None:
            continue
        taken.add(name)
        layer = Layer(name, conv, size, scales.of(node))
        rank = len(shape or ran.get(node.input[0], ()))
        found.append(
            Site(layer, node.op_type, weight.dtype, node.input[0], node.output[0], rank, fixed)
        )
    return found


def _unique(name: str, taken: set[str]) -> str:
    found, i = name, 0
    while found in taken:
        i += 1
        found = f"{name}_{i}"
    return found


def _weight(node: Any, constant: Constants) -> Array | None:
    """The constant weight of a node that may be a layer."""
    if node.op_type not in _OPS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return None
    weight = constant(node.input[1])
    if weight is None or weight.dtype.name not in _TYPES or not weight.size:
        return None
    linear = node.op_type in ("Gemm", "MatMul")
    if weight.ndim not in ((2,) if linear else (3, 4, 5)) or constant.holds(node.input[0]):
        return None
    return weight


def _size(node: Any, shape: Sizes | None, batches: set[Any]) -> Ints | None:
    """Spatial size of a node's input, as far as its shape tells; of linear ones their vectors.

    The axis of the batch, of which `batches` are the known sizes and names, may be any but the
    last of a linear layer's input, or folded into one.
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


def _likely(node: Any, shape: Sizes | None) -> Ints | None:
    """Vectors of a linear layer if the first axis is the batch's, which nothing says."""
    if node.op_type in ("Conv", "ConvTranspose") or not shape:
        return None
    rest = [n for n in shape[1:-1] if isinstance(n, int)]
    return (math.prod(rest),) if len(rest) == len(shape) - 2 else None


def _conv(
    node: Any, weight: Array, constant: Constants, size: Ints, fixed: bool
) -> Factorization | None:
    """A node as a chain of one stage, or None if that is not what it is."""
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
                return None  # another for every row
            bias = np.broadcast_to(bias.reshape(-1), len(weight)) * bias.dtype.type(
                a.get("beta", 1)
            )
        return dense(weight[..., None], bias)
    n = weight.ndim - 2
    if len(size) != n:
        raise ValueError(f"a weight of shape {weight.shape} for an input of size {size}")
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
    pads = _pads(node.op_type, a, weight.shape[2:], options, size, fixed)
    if pads is None:
        return None
    return dense(weight, bias, padding=pads, **options)


def _pads(
    op: str, a: Mapping[str, Any], kernel: Ints, options: Mapping[str, Any], size: Ints, fixed: bool
) -> Pads | None:
    """Padding of each axis, with ``auto_pad`` and ``output_shape`` resolved."""
    n = len(kernel)
    auto = a.get("auto_pad", b"NOTSET").decode()
    stride, extent = options["stride"], _extent(kernel, options["dilation"])
    wanted = list(a.get("output_shape", []))[-n:]
    given = list(a.get("pads", [0] * 2 * n))
    if len(given) != 2 * n or len(wanted) not in (0, n):
        raise ValueError(f"pads {given} or output_shape {wanted} do not fit {n} axes")
    if op == "ConvTranspose" and (wanted or auto.startswith("SAME")):
        if wanted and not fixed:
            return None
        total = []
        for i in range(n):
            whole = (size[i] - 1) * stride[i] + options["output_padding"][i] + extent[i]
            total.append(whole - (wanted[i] if wanted else size[i] * stride[i]))
        if min(total) < 0:
            return None  # runtimes do not agree on what is there
    elif auto.startswith("SAME"):
        if max(stride) > 1 and not fixed:
            return None  # the padding is another for inputs of another size
        total = [max((-(-m // s) - 1) * s + e - m, 0) for m, s, e in zip(size, stride, extent)]
    else:
        if auto == "VALID":
            given = [0] * 2 * n
        if min(given) < 0:
            return None  # crops its input
        return tuple(zip(given[:n], given[n:]))
    # ONNX has the odd sample at the end for SAME_UPPER, else ahead, output_shape included.
    if auto == "SAME_UPPER":
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((t - t // 2, t // 2) for t in total)


def _extent(kernel: Ints, dilation: Sequence[int]) -> Ints:
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))


class _Scales:
    """Gains of the batch norms that are alone behind a layer."""

    def __init__(self, graph: Any, constant: Constants) -> None:
        self._uses: Counter[str] = uses(graph)
        self._norms = {n.input[0]: n for n in graph.node if n.op_type == "BatchNormalization"}
        self._constant = constant

    def of(self, node: Any) -> Array | None:
        """The gain behind a node, or None."""
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
