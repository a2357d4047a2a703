"""Nodes of an ONNX graph as convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, Pads
from lowrank.factorization import Factorization, dense
from lowrank.interop.onnx.graph import Constants, as_numpy, attributes

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TYPES = ("float16", "bfloat16", "float32", "float64")


class NotReplaceableError(ValueError):
    """Reason why a node stays as it is."""


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
    if list(a.get("kernel_shape", weight.shape[2:])) != list(weight.shape[2:]):
        raise ValueError(
            f"kernel_shape must be {list(weight.shape[2:])}, that of the weight, got "
            f"{list(a['kernel_shape'])}"
        )
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
