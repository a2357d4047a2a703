"""ONNX networks: layers as nodes say, chains as nodes that do what they do, files that lie."""

import io
import itertools
import json
import os
import zipfile

import numpy as np
import pytest

import lowrank as lr
from lowrank import reference
from lowrank.families import FAMILIES, applicable

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from lowrank.interop.onnx import OnnxNet, open_net, read_batches, save  # noqa: E402
from lowrank.interop.onnx_data import inputs_of  # noqa: E402
from lowrank.interop.onnx_files import load  # noqa: E402

# Sums of some hundred products of order 1 in float32, in another order, twice over in a chain:
# some sqrt(n) roundings of 6e-8 of magnitudes of some tens.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def model_of(nodes, inputs, outputs=("y",), weights=None, opset=17, ir=8, kind=TensorProto.FLOAT):
    """A model; `inputs` are shapes by name, `weights` arrays by name."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        [numpy_helper.from_array(w, n) for n, w in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    inferred = onnx.shape_inference.infer_shapes(model)  # an output needs a shape to be valid
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return model


def ran(model, **feed):
    """All outputs of a model that the checker has passed in full."""
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


def chains_of(conv):
    """Chains of every family and two forms, as exact as each can be, and rough."""
    for name, forms in applicable(conv).items():
        for form in dict.fromkeys((forms[0], forms[-1])):
            points = list(FAMILIES[name].sweep(conv, form))
            for point in {id(p): p for p in (points[0], points[-1])}.values():
                yield FAMILIES[name].fit(conv, point.rank, form)


def bent(f, rng):
    """`f` with another bias: one that the layer may not have had."""
    return lr.chain(f.stages, rng.standard_normal(f.out_channels).astype(np.float32), f.groups)


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


def conv_net(rng, case, batch="N", sizes=True, bias=True, **options):
    """(net, its input) of one node between two others."""
    op, weight, shape, given = CONVS[case]
    w, x = arrays(rng, weight, shape)
    out = weight[0] if op == "Conv" else weight[1] * given.get("group", 1)
    weights = {"w": w}
    if bias:
        weights["b"] = rng.standard_normal(out).astype(np.float32)
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node(op, ["a", *weights], ["c"], "layer", **given),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    free = shape[2:] if sizes else [f"n{i}" for i in range(len(shape) - 2)]
    model = model_of(nodes, {"x": [batch, shape[1], *free]}, weights=weights, **options)
    return OnnxNet(model, None if sizes else [x]), model, x


@pytest.mark.parametrize("case", CONVS)
def test_a_conv_node_is_the_layer_it_says(rng, case):
    net, model, x = conv_net(rng, case)
    (layer,) = net.layers
    assert layer.name == "layer"
    assert layer.input_size == x.shape[2:]
    np.testing.assert_allclose(-layer.conv(-x), ran(model, x=x)[0], **CLOSE)


@pytest.mark.parametrize("sizes", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize("case", CONVS)
def test_chains_of_every_family_do_in_onnxruntime_what_they_do(rng, case, sizes):
    strided_same = case in ("same lower", "output shape")
    if strided_same and not sizes:
        pytest.skip("left alone; tested below")
    net, model, x = conv_net(rng, case, sizes=sizes)
    conv = net.layers[0].conv
    count = 0
    for f in chains_of(conv):
        new = net.replaced({"layer": f})
        expected = -reference.run_chain(f.stages, -x, f.bias)
        y = ran(new, x=x)[0]
        np.testing.assert_allclose(y, expected, **CLOSE, err_msg=repr(f))
        if f.error(conv.to_dense()) < 1e-6:
            np.testing.assert_allclose(y, ran(model, x=x)[0], **CLOSE, err_msg=repr(f))
            count += 1
        # batches stay free, and so do sizes where they were
        larger = np.concatenate([x, x, x])
        if not sizes:
            larger = np.concatenate([larger, larger], axis=-1)
        want = -reference.run_chain(f.stages, -larger, f.bias)
        np.testing.assert_allclose(ran(new, x=larger)[0], want, **CLOSE, err_msg=repr(f))
    assert count > 0
