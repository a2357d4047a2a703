"""Layers of ONNX models that stay: reasons and MACs, shared weights, and free input sizes."""

import math

import numpy as np
import pytest

import lowrank as lr
from lowrank.compress import compress_model, make_plan
from lowrank.families import FAMILIES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import CLOSE, arrays, model_of, ran  # noqa: E402

from lowrank.interop.files import read_layers  # noqa: E402
from lowrank.interop.onnx import OnnxModel  # noqa: E402

node = helper.make_node


def graph(nodes, output, weights=(), inputs=()):
    """Return the body of an If, a Loop or a Scan."""
    return helper.make_graph(
        nodes,
        "body",
        [helper.make_tensor_value_info(n, kind, shape) for n, kind, shape in inputs],
        [helper.make_tensor_value_info(n, kind, shape) for n, kind, shape in output],
        [numpy_helper.from_array(w, n) for n, w in dict(weights).items()],
    )


#: Inputs by name, weights, nodes whose last stays as "left", and its MACs per example.
LEFT = {
    "quantized": (
        {"x": (2, 4, 9, 9)},
        {"w": np.ones((6, 4, 3, 3), np.int8), "s": np.float32(0.1), "z": np.int8(0)},
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("QLinearConv", ["q", "s", "z", "w", "s", "z", "s", "z"], ["p"], "left"),
            node("DequantizeLinear", ["p", "s", "z"], ["o"]),
        ],
        6 * 4 * 9 * 7 * 7,
    ),
    "matrix of integers": (
        {"x": (2, 3, 5)},
        {"w": np.ones((5, 4), np.uint8), "z": np.uint8(1)},
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "sx", "zx"]),
            node("MatMulInteger", ["q", "w", "zx", "z"], ["i"], "left"),
            node("Cast", ["i"], ["o"], to=TensorProto.FLOAT),
        ],
        3 * 5 * 4,
    ),
    "first factor": (
        {"x": (2, 5, 6)},
        {"w": np.ones((4, 5), np.float32)},
        [node("MatMul", ["w", "x"], ["o"], "left")],
        4 * 5 * 6,
    ),
    "stack of matrices": (
        {"x": (2, 3, 4, 5)},
        {"w": np.ones((3, 5, 6), np.float32)},
        [node("MatMul", ["x", "w"], ["o"], "left")],
        3 * 4 * 5 * 6,
    ),
    "transposed input": (
        {"x": (2, 5)},
        {"w": np.ones((5, 6), np.float32)},
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0]),
            node("Gemm", ["t", "w"], ["o"], "left", transA=1),
        ],
        5 * 6,
    ),
    "einsum": (
        {"x": (2, 3, 5)},
        {"w": np.ones((4, 5, 6), np.float32)},
        [node("Einsum", ["x", "w"], ["o"], "left", equation="bsi,hio->bhso")],
        3 * 4 * 5 * 6,
    ),
    "einsum without an output": (
        {"x": (2, 3, 5)},
        {"w": np.ones((5, 6), np.float32)},
        [node("Einsum", ["x", "w"], ["o"], "left", equation="bsi, io")],
        3 * 5 * 6,
    ),
    "recurrent": (
        {"x": (2, 7, 5)},
        {
            "w": np.ones((2, 12, 5), np.float32),
            "r": np.ones((2, 12, 3), np.float32),
        },
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            node("LSTM", ["t", "w", "r"], ["", "o"], "left", hidden_size=3,
                 direction="bidirectional"),
        ],
        2 * 12 * (5 + 3) * 7,
    ),
    "transposed, stretched": (
        {"x": (2, 4, 5, 5)},
        {"w": np.ones((4, 6, 2, 2), np.float32)},
        [node("ConvTranspose", ["x", "w"], ["o"], "left", strides=[3, 3], output_shape=[15, 15])],
        4 * 6 * 4 * 25,
    ),
    "shared": (
        {"x": (2, 4, 9)},
        {"w": np.ones((4, 4, 3), np.float32)},
        [
            node("ReduceMax", ["w"], ["m"], "reader", keepdims=0),
            node("Conv", ["x", "w"], ["c"], "left"),
            node("Add", ["c", "m"], ["o"]),
        ],
        4 * 4 * 3 * 7,
    ),
    "computed kernel": (
        {"x": (2, 4, 9), "k": (4, 4, 3)},
        {},
        [node("Conv", ["x", "k"], ["o"], "left")],
        4 * 4 * 3 * 7,
    ),
}  # fmt: skip


def with_a_layer(shapes, weights, nodes, free, rng):
    """Return a model in which a replaceable layer stands before the others, and inputs."""
    width = shapes["x"][-1]
    weights = {**weights, "first": rng.standard_normal((width, width)).astype(np.float32)}
    renamed = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    for one in renamed:
        one.input[:] = ["mixed" if i == "x" else i for i in one.input]
    nodes = [node("MatMul", ["x", "first"], ["mixed"], "replaced"), *renamed]
    sizes = {"x": ["N", *("abcd"[: len(shapes["x"]) - 2] if free else shapes["x"][1:-1]), width]}
    if "k" in shapes:
        sizes["k"] = shapes["k"]
    values = {name: arrays(rng, shape)[0] for name, shape in shapes.items()}
    return model_of(nodes, sizes, ("o",), weights), values


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("case", LEFT)
def test_macs_of_layers_that_stay(rng, case, free):
    shapes, weights, nodes, macs = LEFT[case]
    if free and case in ("quantized", "transposed, stretched", "shared", "computed kernel",
                         "first factor", "stack of matrices"):  # fmt: skip
        free = "channels"  # axes that a weight fixes cannot be free
    model, values = with_a_layer(shapes, weights, nodes, free is True, rng)
    net = OnnxModel(model, [values])
    assert [x.name for x in net.layers] == ["replaced"]
    assert list(net.left_out) == ["left"]
    assert net.left_out_macs == {"left": macs}
    plan = make_plan(net, layers={"replaced": ("channel_svd", 1)})
    assert plan.left_out["left"].macs == macs
    own = net.layers[0].cost.macs
    text = repr(plan)
    assert f"1 layer with {macs / (macs + own):.0%} of the MACs" in text
    assert f"left ({macs / (macs + own):.1%} of the MACs): {net.left_out['left']}" in text
    budget = make_plan(net, macs=0.9, gradients=False)
    assert "(90% of the layers in the table)" in budget.title()


def test_macs_of_layers_in_bodies(rng):
    w, v, m = arrays(rng, (4, 4, 3), (4, 4, 3), (4, 4))
    conv = node("Conv", ["a", "v"], ["t"], "same", pads=[1, 1])
    branch = graph([conv], [("t", 1, None)])
    step = graph(
        [
            node("Conv", ["s", "u"], ["n"], "step", pads=[1, 1]),
            node("Identity", ["c"], ["d"]),
        ],
        [("d", TensorProto.BOOL, []), ("n", 1, ["N", 4, 9])],
        {"u": w},
        [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("s", 1, ["N", 4, 9])],
    )
    scanned = graph(
        [
            node("MatMul", ["e", "m"], ["p"], "product"),
            node("MatMul", ["p", "q"], ["z"], "of two values"),
        ],
        [("z", 1, ["N", 4, 4])],
        (),
        [("e", 1, ["N", 4, 4]), ("q", 1, ["N", 4, 4])],
    )
    del scanned.input[1:]
    scanned.node[1].input[1] = "e"
    nodes = [
        node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1]),
        node("If", ["flag"], ["b"], "if", then_branch=branch, else_branch=branch),
        node("Loop", ["trips", "", "b"], ["l"], "loop", body=step),
        node("Loop", ["count", "", "l"], ["k"], "unknown", body=step),
        node("Slice", ["a", "zero", "four", "two"], ["k4"]),
        node("Unsqueeze", ["k4", "zero"], ["k1"]),
        node("Concat", ["k1", "k1", "k1"], ["three"], axis=0),
        node("Scan", ["three"], ["y"], "scan", body=scanned, num_scan_inputs=1),
    ]
    weights = {
        "w": w, "v": v, "m": m, "flag": np.array(True), "trips": np.array(5), "zero": np.array([0]),
        "four": np.array([4]), "two": np.array([2]),
    }  # fmt: skip
    model = model_of(nodes, {"x": ["N", 4, 9]}, ("k", "y"), weights)
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    model.graph.input.append(count)
    (x,) = arrays(rng, (2, 4, 9))
    net = OnnxModel(model, [{"x": x, "count": np.array(1)}])
    assert [y.name for y in net.layers] == ["conv"]
    assert net.left_out == {
        "if/same": "it is in the body of the If 'if'",
        "if/same_1": "it is in the body of the If 'if'",
        "loop/step": "it is in the body of the Loop 'loop'",
        "unknown/step": "it is in the body of the Loop 'unknown'",
        "scan/product": "it is in the body of the Scan 'scan'",
    }
    one = 4 * 4 * 3 * 9
    assert net.left_out_macs == {
        "if/same": one, "if/same_1": one, "loop/step": 5 * one, "scan/product": 3 * 4 * 4 * 4,
    }  # fmt: skip
    f = lr.channel_svd(net.layers[0].conv, 4)
    for want, got in zip(next(net.outputs({})), next(net.outputs({"conv": f})), strict=True):
        scale = np.abs(want).max()  # of values that eight convolutions made large
        np.testing.assert_allclose(got / scale, want / scale, **CLOSE)


def test_loops_that_may_end_early_have_no_known_macs(rng):
    (w,) = arrays(rng, (4, 4, 3))
    step = graph(
        [
            node("Conv", ["s", "w"], ["n"], "step", pads=[1, 1]),
            node("ReduceMax", ["n"], ["r"], keepdims=0),
            node("Less", ["r", "limit"], ["d"]),
        ],
        [("d", TensorProto.BOOL, []), ("n", 1, ["N", 4, 9])],
        {"limit": np.float32(9)},
        [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("s", 1, ["N", 4, 9])],
    )
    nodes = [
        node("Conv", ["x", "v"], ["a"], "conv", pads=[1, 1]),
        node("Loop", ["trips", "", "a"], ["y"], "loop", body=step),
    ]
    weights = {"w": w, "v": w, "trips": np.array(5)}
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, weights=weights))
    assert list(net.left_out) == ["loop/step"]
    assert net.left_out_macs == {}
    assert "left out, unchanged and in no budget: 1 layer\n" in repr(make_plan(net, macs=0.9))


def quantized_weight(i):
    """Return a DequantizeLinear node of its own, as quantizers write for every reader."""
    return node("DequantizeLinear", ["q", "s"], [f"w{i}"])


EYE = np.eye(4, dtype=np.float32)[..., None]
ONE = {
    "initializer": (["w", "w"], []),
    "Identity": (["w1", "w2"], [node("Identity", ["w"], ["w1"]), node("Identity", ["w"], ["w2"])]),
    "DequantizeLinear": (["w1", "w2"], [quantized_weight(1), quantized_weight(2)]),
    "Transpose": (
        ["w1", "w2"],
        [node("Transpose", ["t"], [f"w{i}"], perm=[1, 0, 2]) for i in (1, 2)],
    ),
    "Constant": (
        ["w1", "w2"],
        [
            node("Constant", [], [f"w{i}"], value=numpy_helper.from_array(EYE))
            for i in (1, 2)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ONE)
def test_nodes_that_compute_the_same_of_one_weight_are_one_layer(rng, what):
    names, nodes = ONE[what]
    w, b, x = arrays(rng, (4, 4, 3), (4,), (2, 4, 9))
    w = w + 2 * EYE
    q = np.clip(np.round(w / 0.02), -128, 127).astype(np.int8)
    used = {i for n in nodes for i in n.input} | {n for n in names if not nodes}
    held = {"w": w, "q": q, "s": np.float32(0.02), "t": w.swapaxes(0, 1)}
    weights = {"b": b, **{n: a for n, a in held.items() if n in used}}
    nodes = [
        *nodes,
        node("Conv", ["x", names[0], "b"], ["1"], "one"),
        node("Relu", ["1"], ["2"]),
        node("Conv", ["2", names[1], "b"], ["y"], "two"),
    ]
    model = model_of(nodes, {"x": ["N", 4, 9]}, weights=weights)
    net = OnnxModel(model, [x])
    ((layer,), left_out) = net.layers, net.left_out
    assert (layer.name, layer.times, left_out) == ("one", 2, {})
    f = lr.channel_svd(layer.conv, 2)
    new = net.replaced({"one": f})
    assert sum(math.prod(t.dims) for t in new.graph.initializer) == f.params
    assert {n.op_type for n in new.graph.node} == {"Conv", "Relu"}
    np.testing.assert_allclose(ran(new, x=x)[0], f(np.maximum(f(x), 0)), **CLOSE)


def test_constants_of_functions_that_are_called_twice_are_one_layer(rng):
    w, x = arrays(rng, (4, 4, 3), (2, 4, 9))
    function = helper.make_function(
        "own", "block", ["z"], ["o"],
        [
            node("Constant", [], ["k"], value=numpy_helper.from_array(w)),
            node("Conv", ["z", "k"], ["c"], pads=[1, 1]),
            node("Relu", ["c"], ["o"]),
        ],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [
        node("block", ["x"], ["a"], domain="own"),
        node("block", ["a"], ["y"], domain="own"),
    ]
    x_info, y_info = (helper.make_tensor_value_info(n, 1, ["N", 4, 9]) for n in "xy")
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "net", [x_info], [y_info]),
        functions=[function], opset_imports=domains, ir_version=8,
    )  # fmt: skip
    net = OnnxModel(model, [x])
    (layer,) = net.layers
    assert layer.times == 2
    f = lr.channel_svd(layer.conv, 2)
    new = net.replaced({layer.name: f})
    assert sum(math.prod(t.dims) for t in new.graph.initializer) == f.params
    np.testing.assert_allclose(ran(new, x=x)[0], np.maximum(f(np.maximum(f(x), 0)), 0), **CLOSE)


def branch(op):
    return graph([node(op, ["w"], ["t"])], [("t", 1, None)])


def test_functions_in_functions_overloads_and_their_attributes(rng):
    def function(name, nodes, overload="", attributes=()):
        domains = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        f = helper.make_function("own", name, ["z", "k"], ["o"], nodes, domains, attributes)
        f.overload = overload
        return f

    def call(name, x, y, overload="", **attributes):
        made = node(name, [x, "k" if x in "zr" else "w"], [y], domain="own", **attributes)
        made.overload = overload
        return made

    padded = node("Conv", ["z", "k"], ["o"])
    padded.attribute.add(name="pads", ref_attr_name="p", type=onnx.AttributeProto.INTS)
    functions = [
        function("inner", [node("Conv", ["z", "k"], ["o"], pads=[1, 1])]),
        function("outer", [call("inner", "z", "t"), node("Relu", ["t"], ["r"]),
                           call("inner", "r", "o")]),
        function("twice", [node("Conv", ["z", "k"], ["o"], pads=[2, 2], dilations=[2])], "a"),
        function("twice", [node("Neg", ["z"], ["n"]), call("inner", "z", "c"),
                           node("Add", ["n", "c"], ["o"])], "b"),
        function("given", [padded], "", ["p"]),
    ]  # fmt: skip
    w, x = arrays(rng, (4, 4, 3), (2, 4, 9))
    x_info, y_info = (helper.make_tensor_value_info(n, 1, ["N", 4, 9]) for n in "xy")
    for calls, times, stays in (
        ([call("outer", "x", "y")], 2, 0),
        ([call("outer", "x", "1"), call("twice", "1", "y", "b")], 3, 0),
        ([call("given", "x", "1", p=[1, 1]), call("outer", "1", "y")], 3, 0),
        ([call("twice", "x", "1", "a"), call("outer", "1", "y")], 0, 3),  # not the same function
    ):
        model = helper.make_model(
            helper.make_graph(
                calls, "net", [x_info], [y_info], [numpy_helper.from_array(w / 4, "w")]
            ),
            functions=functions, ir_version=10,
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
        )  # fmt: skip
        want = ran(model, x=x)[0]
        if stays:
            with pytest.raises(ValueError, match=r"its weight is shared with .*, .*"):
                OnnxModel(model, [x])
            continue
        net = OnnxModel(model, [x])
        (layer,) = net.layers
        assert (layer.times, net.left_out) == (times, {})
        exact = lr.channel_svd(layer.conv, 4)
        new = net.replaced({layer.name: exact})
        assert sum(math.prod(t.dims) for t in new.graph.initializer) == exact.params
        np.testing.assert_allclose(ran(new, x=x)[0], want, **CLOSE)


READERS = {
    "Gather": ([node("Gather", ["w", "i"], ["o"], "reader", axis=0)], "reader"),
    "Slice behind Identity": (
        [
            node("Identity", ["w"], ["v"]),
            node("Slice", ["v", "i", "j"], ["o1"]),
            node("Mul", ["o1", "x1"], ["o"], "reader"),
        ],
        "reader",
    ),
    "output": ([node("Identity", ["w"], ["o"])], "the output 'o' of the network"),
    "If": (
        [node("If", ["c"], ["o"], "if", then_branch=branch("Identity"), else_branch=branch("Neg"))],
        "if",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", READERS)
def test_weights_that_something_else_reads_stay(rng, what):
    more, who = READERS[what]
    w, x = arrays(rng, (4, 4, 3), (2, 4, 9))
    nodes = [
        node("ReduceMax", ["x"], ["x1"], keepdims=0),
        node("Gather", ["w", "n"], ["g"], axis=0)
        if what == "Gather"
        else node("Neg", ["x"], ["g"]),
        node("Conv", ["x", "w"], ["1"], "shared"),
        *more,
        node("Conv", ["1", "u"], ["y"], "own"),
    ]
    weights = {"w": w, "u": w, "i": np.array([0]), "j": np.array([1]), "c": np.array(True)}
    if what == "Gather":  # by values that are not constant
        nodes[1] = node("Cast", ["x1"], ["n"], to=TensorProto.INT64)
        nodes[3].input[1] = "n"
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, ("y", "o"), weights), [x])
    assert [n.name for n in net.layers] == ["own"]
    assert net.left_out == {"shared": f"its weight is shared with {who}"}
    assert net.left_out_macs == {"shared": 4 * 4 * 3 * 7}


def test_parts_of_one_weight_are_not_untied(rng):
    w, x = arrays(rng, (6, 18), (2, 5, 6))
    nodes = [
        node("Split", ["w"], ["q", "k", "v"], axis=1),
        *(node("MatMul", ["x", n], [f"{n}1"], n) for n in "qkv"),
        node("Sum", ["q1", "k1", "v1"], ["s"]),
        node("MatMul", ["s", "o"], ["y"], "out"),
    ]
    weights = {"w": w, "o": w[:, :6].copy()}
    net = OnnxModel(model_of(nodes, {"x": ["N", 5, 6]}, weights=weights), [x])
    assert [n.name for n in net.layers] == ["out"]
    assert net.left_out["q"] == "its weight is shared with k, v"
    assert sum(net.left_out_macs.values()) == 5 * 6 * 18
    # a part that nobody else reads
    nodes[1:] = [node("MatMul", ["x", "k"], ["y"], "k")]
    model = model_of(nodes, {"x": ["N", 5, 6]}, weights={"w": w})
    net = OnnxModel(model, [x])
    f = lr.channel_svd(net.layers[0].conv, 6)
    new = net.replaced({"k": f})
    assert sum(math.prod(t.dims) for t in new.graph.initializer) == f.params
    np.testing.assert_allclose(ran(new, x=x)[0], ran(model, x=x)[0], **CLOSE)


@pytest.mark.parametrize("how", ["initializer", "Constant"])
def test_sparse_weights_are_named(rng, how):
    (v,) = arrays(rng, (6, 6))
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    sparse = helper.make_sparse_tensor(
        values, numpy_helper.from_array(np.array([0, 9]), "w_i"), [6, 8]
    )
    nodes = [
        node("MatMul", ["x", "v"], ["a"], "dense"),
        node("MatMul", ["a", "w"], ["y"], "sparse"),
    ]
    if how == "Constant":
        nodes.insert(0, node("Constant", [], ["w"], sparse_value=sparse))
    model = model_of(nodes[-2:], {"x": ["N", 6], "w": [6, 8]}, weights={"v": v})
    del model.graph.input[1:]
    if how == "Constant":
        model.graph.node.insert(0, nodes[0])
    else:
        model.graph.sparse_initializer.append(sparse)
    net = OnnxModel(model)
    assert [n.name for n in net.layers] == ["dense"]
    assert net.left_out == {"sparse": "its weight is sparse"}


def test_a_kernel_shape_of_another_size_is_refused(rng):
    (w,) = arrays(rng, (4, 3, 3, 3))
    right = node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[3, 3])
    model = model_of([right], {"x": ["N", 3, 9, 9]}, weights={"w": w})
    assert len(OnnxModel(model).layers) == 1
    model.graph.node[0].attribute[0].ints[:] = [5, 3]
    with pytest.raises(ValueError, match=r"'conv': kernel_shape must be \[3, 3\].*got \[5, 3\]"):
        OnnxModel(model)


def test_one_vector_is_no_batch(rng):
    w, v = arrays(rng, (6, 8), (1, 8))
    nodes = [
        node("MatMul", ["x", "w"], ["a"], "vector"),
        node("Unsqueeze", ["a", "axes"], ["b"]),
        node("Unsqueeze", ["b", "axes"], ["c"]),
        node("Conv", ["c", "k"], ["y"], "conv"),
    ]
    weights = {"w": w, "axes": np.array([0]), "k": v[..., None].swapaxes(0, 1)[:1]}
    net = OnnxModel(model_of(nodes, {"x": [6]}, weights=weights))
    assert net.left_out == {"vector": "its input is one vector, without a batch"}


FREE = ["N", 3, "h", "w"]


def free_net(rng, strides=1, **attributes):
    w, x = arrays(rng, (4, 3, 3, 3), (2, 3, 9, 7))
    attributes = {"pads": [1] * 4} | attributes
    nodes = [
        node("Conv", ["x", "w"], ["a"], "conv", strides=[strides] * 2, **attributes),
        node("Conv", ["a", "v"], ["y"], "last"),
    ]
    weights = {"w": w, "v": w[:, :1].repeat(4, axis=1)}
    return model_of(nodes, {"x": FREE}, weights=weights), x


def test_free_sizes_come_from_data_or_an_argument(rng):
    model, x = free_net(rng, strides=2)
    for net in (OnnxModel(model, [x]), OnnxModel(model, input_size=(9, 7))):
        assert [y.input_size for y in net.layers] == [(9, 7), (5, 4)]
        assert (net.left_out, net.unsized) == ({}, {})
    by_name = OnnxModel(model, input_size={"x": (9, 7)})
    assert by_name.layers[0].input_size == (9, 7)
    plan = make_plan(by_name, macs=0.5)
    done = compress_model(by_name, plan)
    new = by_name.replaced(done.chains)
    larger = np.concatenate([x, x], axis=-1)
    for given in (x, larger):  # the sizes stay free
        a = done.chains["conv"](given)
        np.testing.assert_allclose(ran(new, x=given)[0], done.chains["last"](a), **CLOSE)
    assert by_name.call({}, "onnxruntime", 3, 1)()[0].shape[:2] == (3, 4)


def test_without_a_size_the_remedy_is_named(rng, tmp_path):
    model, _ = free_net(rng)
    net = OnnxModel(model)
    assert net.layers == ()
    remedy = "its input has no fixed size: give calibration data or the input size, or fix the"
    assert all(why.startswith(remedy) for why in net.left_out.values())
    with pytest.raises(ValueError, match=rf"got none \(conv, last: {remedy}"):
        make_plan(net, macs=0.5)
    # the layers can be read all the same
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    found = read_layers(path)
    assert [(y.name, y.input_size) for y in found.layers] == [("conv", None), ("last", None)]
    assert found.left_out == {}
    sized = read_layers(path, input_size=(9, 7)).layers
    assert [y.input_size for y in sized] == [(9, 7), (9, 7)]
    for size, words in (
        ((9,), r"2 positive numbers for the free sizes of 'x', .*got \(9,\)"),
        ((9, 0), "2 positive numbers"),
        ((9, True), "2 positive numbers"),
        ({"z": (9, 7)}, "no input 'z'"),
    ):
        with pytest.raises(ValueError, match=f"input size must be .*{words}"):
            OnnxModel(model, input_size=size)
    with pytest.raises(ValueError, match="input size must be None with calibration data"):
        OnnxModel(model, [np.zeros((1, 3, 9, 7), np.float32)], input_size=(9, 7))
    fixed, _ = free_net(rng)
    for i, n in ((2, 9), (3, 7)):
        fixed.graph.input[0].type.tensor_type.shape.dim[i].dim_value = n
    with pytest.raises(ValueError, match="the network fixes all sizes"):
        OnnxModel(fixed, input_size=(9, 7))


def test_padding_that_depends_on_a_free_size_is_named(rng):
    model, _ = free_net(rng, strides=2, pads=None, auto_pad="SAME_LOWER")
    net = OnnxModel(model, input_size=(9, 7))
    assert [y.name for y in net.layers] == ["last"]
    assert "padding SAME_LOWER depends on the input size" in net.left_out["conv"]
    assert net.left_out_macs["conv"] == 4 * 3 * 9 * 5 * 4


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset(rng, opset):
    w, b, u, v, c, m, x = arrays(
        rng, (8, 4, 3, 3), (8,), (8, 6, 3, 3), (6, 5), (5,), (5, 4), (2, 4, 6, 6)
    )
    nodes = [
        node("Conv", ["x", "w", "b"], ["1"], "conv", pads=[1] * 4),
        node("Relu", ["1"], ["2"]),
        node("ConvTranspose", ["2", "u"], ["3"], "up", strides=[2, 2]),
        node("GlobalAveragePool", ["3"], ["4"]),
        node("Flatten", ["4"], ["5"]),
        node("Gemm", ["5", "v", "c"], ["6"], "gemm"),
        node("MatMul", ["6", "m"], ["y"], "matmul"),
    ]
    ir = 3 if opset < 9 else 8 if opset < 19 else 10
    weights = {"w": w, "b": b, "u": u, "v": v, "c": c, "m": m}
    model = model_of(nodes, {"x": ["N", 4, 6, 6]}, weights=weights, opset=opset, ir=ir)
    net = OnnxModel(model, [x])
    assert [y.name for y in net.layers] == ["conv", "up", "gemm", "matmul"]
    for family in ("channel_svd", "spatial_svd", "tucker", "network_decoupling", "kronecker"):
        chains = {}
        for layer in net.layers:
            try:
                chains[layer.name] = FAMILIES[family].fit(layer.conv, 0.8)
            except ValueError:  # it does not apply to a matrix, or to so small a share
                continue
        assert chains
        new = net.replaced(chains)
        assert new.opset_import == model.opset_import
        np.testing.assert_allclose(ran(new, x=x)[0], next(net.outputs(chains))[0], **CLOSE)
        by_hand = x
        for layer in net.layers[:2]:
            f = chains.get(layer.name, layer.conv)
            by_hand = f(by_hand)
            by_hand = np.maximum(by_hand, 0) if layer.name == "conv" else by_hand.mean((2, 3))
        by_hand = by_hand[..., None]
        for layer in net.layers[2:]:
            by_hand = chains.get(layer.name, layer.conv)(by_hand)
        np.testing.assert_allclose(ran(new, x=x)[0], by_hand[..., 0], **CLOSE)


def requests_net(rng):
    """Return a model with a convolution, a matrix and a layer that stays, and an input."""
    w, u, v, x = arrays(rng, (16, 8, 3, 3), (8, 16, 3, 3), (8, 6), (2, 8, 9, 9))
    nodes = [
        node("Conv", ["x", "w"], ["a"], "conv1"),
        node("Conv", ["a", "u"], ["b"], "conv3"),
        node("ReduceMax", ["u"], ["m"], "reader", keepdims=0),
        node("Conv", ["b", "t"], ["c"], "conv4"),
        node("ReduceMean", ["c"], ["d"], axes=[2, 3], keepdims=0),
        node("MatMul", ["d", "v"], ["e"], "fc"),
        node("Add", ["e", "m"], ["y"]),
    ]
    weights = {"w": w, "u": u, "t": u[:, :8], "v": v}
    nodes[2].input[0] = "w"  # conv1 stays
    return OnnxModel(model_of(nodes, {"x": ["N", 8, 9, 9]}, weights=weights), [x]), x


def test_requested_ranks_are_fitted(rng):
    net, x = requests_net(rng)
    done = compress_model(net, layers={"conv3": ("tucker", (6, 5)), "fc": ("channel_svd", 0.9)})
    assert done.plan.layers["conv3"].rank == (6, 5)
    assert done.plan.changed == ["conv3", "fc"]
    assert sum(s.weight.size for s in done.chains["fc"].stages) <= 0.9 * 8 * 6
    new = net.replaced(done.chains)
    np.testing.assert_allclose(ran(new, x=x)[0], next(net.outputs(done.chains))[0], **CLOSE)
    assert [n.name for n in new.graph.node if n.name.startswith("conv3")] == [
        "conv3.0", "conv3.1", "conv3.2",
    ]  # fmt: skip


IMPOSSIBLE = [
    ({"conv3": ("tucker", (500, 8))}, ValueError, r"got \(500, 8\) \(layer conv3\)"),
    ({"conv3": ("tucker", (0, 8))}, ValueError, r"got \(0, 8\) \(layer conv3\)"),
    ({"conv3": ("tucker", 4)}, ValueError, r"2 numbers, got 4 \(layer conv3\)"),
    ({"conv3": ("tucker", (6, "5"))}, TypeError, r"got \(6, '5'\) \(layer conv3\)"),
    ({"conv3": ("channel_svd", 2.5)}, TypeError, r"got 2.5 \(layer conv3\)"),
    ({"conv3": ("channel_svd", True)}, TypeError, r"got True \(layer conv3\)"),
    ({"conv3": ("channel_svd", 1e-6)}, ValueError, r"rank must be at least .*\(layer conv3\)"),
    ({"conv3": ("channel_svd", 3, "up")}, ValueError, r"variant .* got 'up' \(layer conv3\)"),
    ({"fc": ("spatial_svd", 2)}, ValueError, r"\(layer fc\)"),
    ({"conv3": ("svd", 3)}, ValueError, r"family must be one of .* got 'svd' \(layer conv3\)"),
    ({"conv3": (3, "svd")}, ValueError, r"family must be one of .* got 3 \(layer conv3\)"),
    ({"conv3": "tucker"}, ValueError, r"rank must be given if no budget is.*\(layer conv3\)"),
    ({"conv3": 4}, TypeError, r"layers\['conv3'\] must be a family, .* got 4"),
    ({"conv9": ("tucker", (2, 2))}, ValueError, r"may change \(conv3, conv4, fc\), got 'conv9'"),
    ({"conv1": ("tucker", (2, 2))}, ValueError, "can be replaced, got 'conv1': its weight is sha"),
]


@pytest.mark.parametrize(("requested", "kind", "words"), IMPOSSIBLE)
def test_impossible_requests_name_the_layer(rng, requested, kind, words):
    net, _ = requests_net(rng)
    with pytest.raises(kind, match=words) as caught:
        make_plan(net, layers=requested)
    assert "\n" not in str(caught.value)
