"""Builders of ONNX models for tests."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

# Sums of some hundred products of order 1 in float32, in another order, twice over in a chain:
# some sqrt(n) roundings of 6e-8 of magnitudes of some tens.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# Operator, shapes of weight and input, and attributes of nodes.
CONVS = {
    "1-D": ("Conv", (8, 6, 5), (2, 6, 20), {"pads": [2, 1]}),
    "1-D strided": ("Conv", (8, 6, 4), (2, 6, 21), {"strides": [2], "dilations": [2]}),
    "2-D": ("Conv", (8, 6, 3, 3), (2, 6, 9, 10), {"pads": [1, 1, 1, 1]}),
    "asymmetric": ("Conv", (4, 6, 3, 4), (2, 6, 9, 10), {"pads": [0, 2, 1, 1]}),
    "groups": ("Conv", (8, 4, 3, 3), (2, 8, 9, 10), {"group": 2, "pads": [1] * 4}),
    "depthwise": ("Conv", (8, 1, 3, 3), (2, 8, 9, 10), {"group": 8, "strides": [2, 1]}),
    "dilated": ("Conv", (6, 4, 3, 3), (2, 4, 12, 13), {"dilations": [2, 3], "pads": [2] * 4}),
    "strided": ("Conv", (6, 4, 4, 4), (2, 4, 13, 14), {"strides": [2, 3], "pads": [1] * 4}),
    "3-D": ("Conv", (4, 4, 3, 2, 3), (2, 4, 6, 7, 8), {"pads": [1, 0, 1, 1, 1, 1]}),
    "pointwise": ("Conv", (8, 6, 1, 1), (2, 6, 5, 4), {}),
    "same upper": ("Conv", (6, 4, 3, 4), (2, 4, 9, 10), {"auto_pad": "SAME_UPPER"}),
    "same lower": (
        "Conv", (6, 4, 4, 4), (2, 4, 10, 9), {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
    ),
    "valid": ("Conv", (6, 4, 3, 3), (2, 4, 9, 10), {"auto_pad": "VALID", "strides": [2, 2]}),
    "transposed 1-D": (
        "ConvTranspose", (4, 6, 4), (2, 4, 7),
        {"strides": [3], "output_padding": [2], "pads": [1, 2]},
    ),
    "transposed": (
        "ConvTranspose", (4, 6, 4, 4), (2, 4, 5, 6),
        {"strides": [2, 2], "output_padding": [1, 0], "pads": [1, 1, 1, 2]},
    ),
    "transposed groups": (
        "ConvTranspose", (8, 2, 3, 3), (2, 8, 5, 6),
        {"strides": [2, 1], "group": 2, "dilations": [1, 2]},
    ),
    "transposed 3-D": (
        "ConvTranspose", (4, 4, 2, 3, 2), (1, 4, 3, 4, 5), {"strides": [2, 2, 1]},
    ),
    "transposed same": (
        "ConvTranspose", (4, 6, 3, 4), (2, 4, 5, 6), {"strides": [2, 1], "auto_pad": "SAME_UPPER"},
    ),
    "output shape": (
        "ConvTranspose", (4, 6, 4, 4), (2, 4, 5, 6), {"strides": [2, 2], "output_shape": [11, 11]},
    ),
}  # fmt: skip


def model_of(nodes, inputs, outputs=("y",), weights=None, opset=17, ir=8, kind=TensorProto.FLOAT):
    """Return a model; `inputs` are shapes by name, `weights` arrays by name."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        [numpy_helper.from_array(w, n) for n, w in (weights or {}).items()],
    )
    if ir < 4:  # initializers are values of inputs
        graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    inferred = onnx.shape_inference.infer_shapes(model)  # an output needs a shape to be valid
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return model


def ran(model, **feed):
    """Return all outputs of a model after onnx's full check."""
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def arrays(rng, *shapes, dtype=np.float32):
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def small_net(rng, batches=None, folder=None, **options):
    """Return a model of two convolutions, batch norm, branch and linear layer, and an input."""
    a, b, fc, x = arrays(rng, (6, 3, 3, 3), (6, 6, 3, 3), (6, 4), (5, 3, 8, 8))
    one = np.ones(6, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["1"], "conv", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["1", "g", "o", "o", "v"], ["2"]),
        helper.make_node("Relu", ["2"], ["3"], "relu"),
        helper.make_node("Identity", ["b"], ["b2"]),
        helper.make_node("Conv", ["3", "b2"], ["4"], doc_string="the second", pads=[1] * 4),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(fc)),
        helper.make_node("Add", ["3", "4"], ["5"]),
        helper.make_node("GlobalAveragePool", ["5"], ["6"]),
        helper.make_node("Flatten", ["6"], ["7"]),
        helper.make_node("MatMul", ["7", "k"], ["y"]),
    ]
    weights = {"a": a, "b": b, "g": 2 * one, "o": 0 * one, "v": 4 * one}
    model = model_of(nodes, {"x": ["N", 3, 8, 8]}, weights=weights, **options)
    return model, x
