"""Operators of ONNX and onnxruntime that compute products with weights, and their MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from lowrank.interop.onnx.graph import Sizes, attributes

#: Input that is the kernel of a convolution.
_CONVOLUTIONS = {
    "Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3, "QLinearConvTranspose": 3,
    "DeformConv": 1, "FusedConv": 1, "NhwcFusedConv": 1,
}  # fmt: skip
#: Inputs that are the factors of a matrix product.
_MATRICES = {
    **dict.fromkeys(
        (
            "MatMul", "Gemm", "MatMulInteger", "FusedMatMul", "TransposeMatMul", "FusedGemm",
            "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "GemmFloat8", "Einsum",
        ),
        (0, 1),
    ),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), (0, 3)),
}  # fmt: skip
#: Products with a packed matrix, whose number of rows is the attribute K.
_PACKED = ("MatMulNBits", "MatMulBnb4")
_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
_ATTENTION = ("Attention", "QAttention")  # of onnxruntime; ONNX's own has no weights

ShapeOf = Callable[[str], Sizes | None]
ElementsOf = Callable[[str], int | None]


def weight_inputs(node: Any) -> tuple[int, ...]:
    """Return the inputs of a node that may be weights; none of other operators.

    Parameters
    ----------
    node : onnx.NodeProto
        Node of any operator.

    Returns
    -------
    tuple of int
        Numbers of inputs, all of which the node has.
    """
    op = node.op_type
    found: tuple[int, ...] = ()
    if op in _CONVOLUTIONS:
        found = (_CONVOLUTIONS[op],)
    elif op == "Einsum":
        found = tuple(range(len(node.input)))
    elif op in _MATRICES:
        found = _MATRICES[op]
    elif op in _RECURRENT:
        found = (1, 2)
    elif op in (*_PACKED, *_ATTENTION):
        found = (1,)
    return tuple(i for i in found if i < len(node.input) and node.input[i])


def is_product(node: Any, is_constant: Callable[[str], bool]) -> bool:
    """Return whether a node computes products of a value and weights.

    Parameters
    ----------
    node : onnx.NodeProto
        Node of any operator.
    is_constant : callable
        Function that tells whether a tensor is constant.

    Returns
    -------
    bool
        True of a convolution even if the network computes its kernel.
    """
    numbers = weight_inputs(node)
    if not numbers or all(is_constant(name) for name in node.input if name):
        return False
    if node.op_type in _CONVOLUTIONS:
        return True
    return any(is_constant(node.input[i]) for i in numbers)


def counted_tensor(node: Any) -> str:
    """Return the tensor whose size the MACs of a product are proportional to.

    Parameters
    ----------
    node : onnx.NodeProto
        Node for which :func:`is_product` is true.

    Returns
    -------
    str
        Its input or its output.
    """
    by_input = (*_RECURRENT, *_ATTENTION, "ConvTranspose", "QLinearConvTranspose")
    return str(node.input[0] if node.op_type in by_input else node.output[0])


def elements_per_example(node: Any, shape: Sizes, batches: set[Any]) -> int | None:
    """Return the elements of one example in a tensor of a product.

    Parameters
    ----------
    node : onnx.NodeProto
        Node for which :func:`is_product` is true.
    shape : tuple
        Shape of its input or output, with sizes, symbols and None.
    batches : set
        Known sizes and symbols of the batch.

    Returns
    -------
    int or None
        None if sizes are not known.
    """
    if node.op_type in _CONVOLUTIONS:  # the batch is their first axis
        rest = [n for n in shape[1:] if isinstance(n, int)]
        return math.prod(rest) if len(rest) == len(shape) - 1 else None
    return without_batch(shape, batches)


def without_batch(shape: Sizes, batches: set[Any]) -> int | None:
    """Return the product of sizes of which one, or a part of one, is the batch.

    Parameters
    ----------
    shape : tuple
        Sizes, symbols and None.
    batches : set
        Known sizes and symbols of the batch.

    Returns
    -------
    int or None
        None if it is not known.
    """
    free = [n for n in shape if not isinstance(n, int)]
    known = math.prod(n for n in shape if isinstance(n, int))
    if len(free) == 1 and free[0] is not None and free[0] in batches:
        return known
    sizes = [n for n in batches if isinstance(n, int) and n]
    if free or len(sizes) != len(batches) or len(sizes) != 1:
        return None
    return max(known // sizes[0], 1)


def count_macs(
    node: Any, is_constant: Callable[[str], bool], shape_of: ShapeOf, elements: int | None
) -> int | None:
    """Return the MACs of a product for one example.

    Parameters
    ----------
    node : onnx.NodeProto
        Node for which :func:`is_product` is true.
    is_constant : callable
        Function that tells whether a tensor is constant.
    shape_of : callable
        Function that returns the shape of a tensor, None if it is not known.
    elements : int or None
        Elements of :func:`counted_tensor` for one example.

    Returns
    -------
    int or None
        None if sizes are not known.
    """
    if elements is None:
        return None
    try:
        return int(elements * math.prod(_macs_per_element(node, is_constant, shape_of)))
    except (TypeError, IndexError, StopIteration):  # sizes that are not numbers, or missing
        return None


def _macs_per_element(
    node: Any, is_constant: Callable[[str], bool], shape_of: ShapeOf
) -> Iterator[int | Fraction]:
    """Yield factors of the MACs per element of the tensor that is counted."""
    op, a = node.op_type, attributes(node)
    numbers = weight_inputs(node)
    if op in _CONVOLUTIONS:
        yield from map(_number, (shape_of(node.input[numbers[0]]) or (None,))[1:])
    elif op in _PACKED:
        yield _number(a.get("K"))
    elif op in _ATTENTION:
        yield _number((shape_of(node.input[1]) or ())[-1])
    elif op in _RECURRENT:
        weights = [shape_of(node.input[i]) or (None,) for i in numbers]
        ins = _number((shape_of(node.input[0]) or ())[-1])
        yield Fraction(sum(math.prod(map(_number, w)) for w in weights), ins)
    elif op == "Einsum":
        yield from _summed(a["equation"].decode(), [shape_of(n) for n in node.input])
    else:
        number = next(i for i in reversed(numbers) if is_constant(node.input[i]))
        shape = shape_of(node.input[number]) or ()
        is_first = number == numbers[0]
        is_transposed = bool(a.get("transA" if is_first else "transB", 0))
        yield _number(shape[-1] if len(shape) < 2 or is_first != is_transposed else shape[-2])


def _summed(equation: str, shapes: list[Sizes | None]) -> Iterator[int]:
    """Yield the sizes of the axes that an einsum sums over."""
    terms, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:  # the output has the letters that are there once
        output = "".join(c for c in terms if terms.count(c) == 1)
    sizes: dict[str, Any] = {}
    for term, shape in zip(terms.split(","), shapes):
        if "." not in term and shape is not None:
            sizes |= {c: n for c, n in zip(term, shape) if isinstance(n, int)}
    for c in {*terms} - {*output, ",", "."}:
        yield _number(sizes.get(c))


def _number(size: Any) -> int:
    """Return a size, or raise a TypeError if it is not a number."""
    if not isinstance(size, int):
        raise TypeError(f"size must be a number, got {size!r}")
    return size
