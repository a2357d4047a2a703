"""Nodes of an ONNX graph as primitives of programs, for known shapes of all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine.network import Primitive, on_three
from lowrank.engine.program import Unsupported
from lowrank.interop.onnx.convolutions import constant_weight, convolution_of, padding_of
from lowrank.interop.onnx.graph import Constants, attributes
from lowrank.interop.onnx.runtime import Tensor

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout")


def read(
    node: Any, number: int, constant: Constants, tensors: Mapping[str, Tensor], used: Any
) -> list[Primitive]:
    """Return a node as primitives, one for each output that is used.

    Parameters
    ----------
    node : onnx.NodeProto
        Node of the main graph.
    number : int
        Number of the node, the primitives' source.
    constant : Constants
        Constants of the graph.
    tensors : mapping of str to Tensor
        Types and shapes of all tensors.
    used : container of str
        Tensors that are used.

    Returns
    -------
    list of Primitive
        Empty if the node is not supported.
    """
    handler = _HANDLERS.get(node.op_type)
    outputs = [o for o in node.output if o in used]
    if handler is None or node.domain not in ("", "ai.onnx") or not outputs:
        return []
    if (len(outputs) > 1 and node.op_type != "Split") or node.output[0] not in used:
        return []
    try:
        primitives = list(handler(_Node(node, constant, tensors, (number,))))
    except (ValueError, TypeError, LookupError):  # of a shape or an attribute
        return []
    for p in primitives:
        values = [tensors.get(name) for name in (*p.inputs, p.output)]
        if not all(map(_is_value, values)) or any(map(constant.holds, p.inputs)):
            return []
        if len({(t.kind, t.shape[0]) for t in values if t is not None}) > 1:
            return []
    return primitives


def _is_value(tensor: Tensor | None) -> bool:
    """Whether a program can hold a tensor: of its types, with batch and channels, all known."""
    if tensor is None or tensor.kind not in ("tensor(float)", "tensor(double)"):
        return False
    return len(tensor.shape) >= 2 and all(tensor.shape)


class _Node:
    """A node, its attributes, and what is known of its inputs and output."""

    def __init__(
        self, node: Any, constant: Constants, tensors: Mapping[str, Tensor], sources: Ints
    ) -> None:
        self.node, self.constant, self.tensors, self.sources = node, constant, tensors, sources
        self.op: str = node.op_type
        self.attributes = attributes(node)
        self.x: str = node.input[0]
        self.shape = self._shape(self.x)  # without the batch
        self.out = self._shape(node.output[0])

    def _shape(self, name: str) -> Ints:
        tensor = self.tensors.get(name)
        if tensor is None or not _is_value(tensor):
            if self.constant.holds(name):
                return ()
            raise Unsupported(f"tensor {name!r} of an unknown shape")
        return tuple(n for n in tensor.shape[1:] if n is not None)

    def value(self, number: int) -> Array | None:
        """Return the constant that is an input; None if there is no such input."""
        if number >= len(self.node.input) or not self.node.input[number]:
            return None
        value = self.constant(self.node.input[number])
        if value is None:
            raise Unsupported(f"input {number} of {self.op} is not constant")
        return value

    def argument(self, name: str, number: int, default: Any = None) -> Any:
        """Return an attribute that became an input in newer opsets, as Python values."""
        if name in self.attributes:
            return self.attributes[name]
        value = self.value(number)
        return default if value is None else value.tolist()

    def text(self, name: str, default: str) -> str:
        """Return an attribute of text."""
        return str(self.attributes.get(name, default.encode()).decode())

    def primitive(self, kind: str, inputs: Sequence[str] = (), **fields: Any) -> Primitive:
        """Return a primitive of the first output."""
        names = tuple(inputs or (self.x,))
        return Primitive(kind, names, self.node.output[0], self.out, self.sources, **fields)


def _convolution(n: _Node) -> Iterator[Primitive]:
    weight = constant_weight(n.node, n.constant)
    linear = n.op in ("Gemm", "MatMul")
    if weight is None or (linear and len(n.shape) > 1):
        return
    f = convolution_of(n.node, weight, n.constant, (1,) if linear else n.shape[1:], True)
    yield n.primitive("convolve", links=((f.stages[0], Epilogue(f.bias)),))


def _batch_norm(n: _Node) -> Iterator[Primitive]:
    a = n.attributes
    if a.get("training_mode", 0) or not a.get("spatial", 1):
        return
    values = [n.value(i) for i in range(1, 5)]
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    scale = gamma / np.sqrt(variance + a.get("epsilon", 1e-5))
    yield n.primitive("affine", scale=scale, shift=beta - mean * scale)


def _instance_norm(n: _Node) -> Iterator[Primitive]:
    scale, shift = n.value(1), n.value(2)
    options = {"epsilon": n.attributes.get("epsilon", 1e-5)}
    yield n.primitive("normalize", scale=scale, shift=shift, options=options)


def _softmax(n: _Node) -> Iterator[Primitive]:
    # Of (N, K) alone every opset means the same: before opset 13 the axis flattened what follows.
    if len(n.shape) == 1 and n.attributes.get("axis", 1) in (1, -1):
        yield n.primitive("softmax")


def _power(n: _Node) -> Iterator[Primitive]:
    exponent = n.value(1)
    if exponent is not None and exponent.size == 1 and exponent.item() == 2 and n.shape == n.out:
        yield n.primitive("multiply", (n.x, n.x))


def _arithmetic(n: _Node) -> Iterator[Primitive]:
    a, b = n.node.input
    if not n.constant.holds(a) and not n.constant.holds(b):
        kind = {"Add": "add", "Mul": "multiply"}.get(n.op)
        if kind is not None:
            yield n.primitive(kind, (a, b))
        return
    first = n.constant.holds(a)
    value, x = n.value(0 if first else 1), b if first else a
    shape = n._shape(x)
    if value is None or shape != n.out or value.size not in (1, shape[0]):
        return
    if value.size > 1 and (1,) * (len(shape) + 1 - value.ndim) + value.shape != (
        1, shape[0], *(1,) * (len(shape) - 1),
    ):  # fmt: skip
        return
    c = np.broadcast_to(value.reshape(-1).astype(np.float64), shape[0])
    if n.op == "Div" and (first or not c.all()):
        return
    scale, shift = np.ones(shape[0]), np.zeros(shape[0])
    if n.op in ("Mul", "Div"):
        scale = c if n.op == "Mul" else 1 / c
    elif n.op == "Sub" and first:
        scale, shift = -scale, c
    else:
        shift = -c if n.op == "Sub" else c
    yield n.primitive("affine", (x,), scale=scale, shift=shift)


def _activation(n: _Node) -> Iterator[Primitive]:
    a, alpha = n.attributes, 0.0
    name: str | None = {
        "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hard_swish",
        "LeakyRelu": "leaky_relu", "PRelu": "leaky_relu", "Elu": "elu",
    }.get(n.op)  # fmt: skip
    if n.op == "LeakyRelu":
        alpha = a.get("alpha", 0.01)
    elif n.op == "Elu":
        alpha = a.get("alpha", 1.0)
    elif n.op == "PRelu":
        slope = n.value(1)
        if slope is None or slope.size != 1:
            return
        alpha = float(slope.reshape(-1)[0])
    elif n.op == "HardSigmoid":
        if math.isclose(a.get("alpha", 0.2), 1 / 6, rel_tol=1e-6) and a.get("beta", 0.5) == 0.5:
            name = "hard_sigmoid"
    elif n.op == "Erf":  # a part of gelu
        name = "erf"
    elif n.op == "Gelu":
        name = "gelu" if n.text("approximate", "none") == "none" else None
    elif n.op == "Swish":
        name = "silu" if a.get("alpha", 1.0) == 1 else None
    elif n.op == "Clip":
        largest = float(np.finfo(np.float32).max)
        low, high = n.argument("min", 1, -largest), n.argument("max", 2, largest)
        if low == 0:
            name, alpha = "relu" if high >= largest else "relu6" if high == 6 else "clip", high
    if name is not None:
        yield n.primitive("activate", activation=name, alpha=alpha)


def _concatenation(n: _Node) -> Iterator[Primitive]:
    if n.attributes["axis"] in (1, -len(n.out)):
        yield n.primitive("concatenate", tuple(n.node.input))


def _pooling(n: _Node) -> Iterator[Primitive]:
    a, size = n.attributes, n.shape[1:]
    kernel = tuple(a["kernel_shape"])
    ones = [1] * len(kernel)
    stride, dilation = a.get("strides", ones), a.get("dilations", ones)
    geometry = {"stride": stride, "dilation": dilation}
    padding = padding_of(n.op, a, kernel, geometry, size, True)
    counts_padding = bool(a.get("count_include_pad", 0)) and any(map(any, padding))
    if counts_padding and any(b != e for b, e in padding):
        return
    yield _pool(
        n, "max pool" if n.op == "MaxPool" else "mean pool", n.out[1:], kernel,
        stride=on_three(stride, 1), dilation=on_three(dilation, 1),
        before=on_three((b for b, _ in padding), 0), count_padding=counts_padding,
    )  # fmt: skip


def _pool(n: _Node, kind: str, size: Ints, taps: Ints, **options: Any) -> Primitive:
    given = {"stride": (1, 1, 1), "before": (0, 0, 0)} | options
    given |= {"kind": kind, "size": on_three(size, 1), "taps": on_three(taps, 1)}
    return n.primitive("pool", options=given)


def _reduction(n: _Node) -> Iterator[Primitive]:
    rank = 1 + len(n.shape)
    axes = n.argument("axes", 1, [])
    if n.op.startswith("Global"):
        axes = list(range(2, rank))
    axes = [axis % rank for axis in axes]
    if not axes or min(axes) < 2:
        return
    sizes = list(enumerate(n.shape[1:], start=2))
    size = tuple(1 if axis in axes else m for axis, m in sizes)
    taps = tuple(m if axis in axes else 1 for axis, m in sizes)
    yield _pool(n, "max pool" if "Max" in n.op else "mean pool", size, taps)


def _padding(n: _Node) -> Iterator[Primitive]:
    rank = 1 + len(n.shape)
    mode = _PAD_MODES.get(n.text("mode", "constant"))
    pads = n.argument("pads", 1)
    value = float(np.ravel(n.argument("value", 2, 0.0))[0])
    axes = n.value(3)
    before, after, spatial = [0] * rank, [0] * rank, max(rank - 2, 1)
    for i, axis in enumerate(range(rank) if axes is None else axes):
        before[axis], after[axis] = pads[i], pads[i + len(pads) // 2]
    if mode is None or before[0] or after[0] or min(*before, *after) < 0:
        return
    if before[1] or after[1]:  # channels of zeros: a convolution with a part of the identity
        if mode == "constant" and not value and not any((*before[2:], *after[2:])):
            weight = np.eye(n.out[0], n.shape[0], -before[1], np.float32)
            stage = Stage(weight.reshape(*weight.shape, *(1,) * spatial), Geometry.of(spatial))
            yield n.primitive("convolve", links=((stage, Epilogue()),))
        return
    sides = {"before": on_three(before[2:], 0), "after": on_three(after[2:], 0)}
    yield n.primitive("pad", options={"mode": mode, "value": value, **sides})


def _resampling(n: _Node) -> Iterator[Primitive]:
    factors = [m // k for m, k in zip(n.out[1:], n.shape[1:])]
    if n.text("mode", "nearest") != "nearest" or n.out[0] != n.shape[0]:
        return
    if any(m != f * k for m, f, k in zip(n.out[1:], factors, n.shape[1:])):
        return
    is_old = n.op == "Upsample" or len(n.node.input) == 2
    scales = n.argument("scales", 1 if is_old else 2, [])
    if scales and list(scales) != [1, 1, *factors]:
        return
    if n.text("keep_aspect_ratio_policy", "stretch") != "stretch" or "axes" in n.attributes:
        return
    coordinates = n.text("coordinate_transformation_mode", "asymmetric" if is_old else "half_pixel")
    rounding = n.text("nearest_mode", "floor" if is_old else "round_prefer_floor")
    index: list[Array | None] = [None] * (3 - len(factors))
    for f, k in zip(factors, n.shape[1:]):
        x = np.arange(f * k, dtype=np.float64)
        if coordinates in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
            x = (x + 0.5) / f - 0.5
        elif coordinates == "asymmetric":
            x = x / f
        else:
            return
        rounded = {
            "floor": np.floor(x), "ceil": np.ceil(x),
            "round_prefer_floor": np.ceil(x - 0.5), "round_prefer_ceil": np.floor(x + 0.5),
        }[rounding]  # fmt: skip
        index.append(None if f == 1 else np.clip(rounded, 0, k - 1).astype(np.int32))
    yield n.primitive("resample", options={"index": tuple(index)})


def _depth_to_space(n: _Node) -> Iterator[Primitive]:
    block, out = n.attributes["blocksize"], n.out[0]
    if n.text("mode", "DCR") == "DCR":
        channels = np.arange(n.shape[0]).reshape(1, block, block, out)
    else:
        channels = np.arange(n.shape[0]).reshape(out, 1, block, block).transpose(1, 2, 3, 0)
    yield n.primitive("spread", options={"channels": channels})


def _view(n: _Node) -> Iterator[Primitive]:
    if n.op == "Dropout" and n.value(2):  # it is training
        return
    yield n.primitive("view")


def _transposition(n: _Node) -> Iterator[Primitive]:
    perm = n.attributes.get("perm", list(range(len(n.shape), -1, -1)))
    if perm[0] == 0:
        yield n.primitive("transpose", options={"order": [axis - 1 for axis in perm[1:]]})


def _split(n: _Node) -> Iterator[Primitive]:
    if n.attributes.get("axis", 0) not in (1, -1 - len(n.shape)):
        return
    start = 0
    for output in n.node.output:
        shape = n._shape(output)
        channels = list(range(start, start + shape[0]))
        yield Primitive("select", (n.x,), output, shape, n.sources, options={"channels": channels})
        start += shape[0]


def _slicing(n: _Node) -> Iterator[Primitive]:
    rank = 1 + len(n.shape)
    starts, ends = n.argument("starts", 1), n.argument("ends", 2)
    axes = n.argument("axes", 3, list(range(len(starts))))
    steps = n.argument("steps", 4, [1] * len(starts))
    index: list[Array | None] = [None] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps):
        axis %= rank
        if axis == 0 or step < 1:
            return
        index[axis] = np.arange(n.shape[axis - 1], dtype=np.int32)[start:end:step]
    channels = index[1]
    spatial = index[2:]
    if all(i is None for i in spatial) and channels is not None:
        yield n.primitive("select", options={"channels": channels.tolist()})
    elif channels is None and len(spatial) <= 3:
        tables = (*[None] * (3 - len(spatial)), *spatial)
        yield n.primitive("resample", options={"index": tables})


_HANDLERS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _convolution),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "Softmax": _softmax,
    "Pow": _power,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    **dict.fromkeys(
        ("Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "PRelu", "HardSigmoid", "Gelu",
         "Swish", "Clip", "Elu", "Erf"),
        _activation,
    ),
    "Concat": _concatenation,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pooling),
    **dict.fromkeys(
        ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"), _reduction
    ),
    "Pad": _padding,
    **dict.fromkeys(("Resize", "Upsample"), _resampling),
    "DepthToSpace": _depth_to_space,
    **dict.fromkeys(_VIEWS, _view),
    "Transpose": _transposition,
    "Split": _split,
    "Slice": _slicing,
}  # fmt: skip
