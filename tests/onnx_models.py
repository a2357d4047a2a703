"""Builders of ONNX models for tests."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

# Sums of some hundred products of order 1 in float32, in another order, twice over in a chain:
# some sqrt(n) roundings of 6e-8 of magnitudes of some tens.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


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
