"""Inputs of ONNX models."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank.interop.batches import Input
from lowrank.interop.onnx.files import library


def inputs_of(model: Any) -> tuple[Input, ...]:
    """Return the inputs that a caller of a model must give.

    Parameters
    ----------
    model : onnx.ModelProto
        ONNX model; initializers in its list of inputs are not returned.

    Returns
    -------
    tuple of Input

    Raises
    ------
    ValueError
        If an input is not a tensor of numbers, or has no shape.

    Examples
    --------
    >>> import pytest
    >>> onnx = pytest.importorskip("onnx")
    >>> from lowrank.interop.onnx.data import inputs_of
    >>> graph = onnx.parser.parse_graph("g (float[N, 3] x) => (float[N, 3] y) {y = Relu(x)}")
    >>> inputs_of(onnx.helper.make_model(graph))
    (Input(name='x', dtype=dtype('float32'), shape=(None, 3)),)
    """
    onnx = library()
    constants = {t.name for t in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        if value.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape"):
            raise ValueError(f"input {value.name!r} is not a tensor, or has no shape")
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        except (KeyError, TypeError):
            raise ValueError(f"input {value.name!r} has an unknown type") from None
        inputs.append(Input(value.name, dtype, dims(kind.shape)))
    return tuple(inputs)


def dims(shape: Any) -> tuple[int | None, ...]:
    """Return the sizes of a TensorShapeProto, None for free sizes."""
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in shape.dim)
