"""ONNX networks on the engine, against onnxruntime."""

import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import CONVS, arrays, model_of, ran, small_net  # noqa: E402

from lowrank.interop.onnx import OnnxModel, on_engine  # noqa: E402
from lowrank.interop.onnx import engine as module  # noqa: E402

# Largest deviations, of the largest output: sums in another order, and fast algorithms.
TOLERANCE = {"direct": 3e-6, "auto": 3e-5}


def node(op, inputs, outputs, **attributes):
    """Return a node; names are separated by spaces."""
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def compare(model, *feeds, stays="", programs=1):
    """Compare outputs with onnxruntime's; `stays` are the types of nodes that are not run here."""
    for algorithm, tolerance in TOLERANCE.items():
        net = on_engine(model, threads=1, algorithm=algorithm)
        for feed in feeds:
            named = feed if isinstance(feed, dict) else {model.graph.input[0].name: feed}
            expected = ran(model, **named)
            actual = net(feed)
            assert len(actual) == len(expected)
            for a, e in zip(actual, expected):
                assert (a.shape, a.dtype) == (e.shape, e.dtype)
                np.testing.assert_allclose(a, e, 0, tolerance * abs(e).max())
    text = net.describe(feeds[0])
    rows = [line.split("  ")[0] for line in text.splitlines() if "  onnxruntime " in line]
    found = {word for row in rows for word in row.replace(",", "").split() if word.isalpha()}
    assert found == set(stays.split()), text
    pieces = net._plan(module.check_batch(net._inputs, feeds[0]))
    assert sum(p.program is not None for p in pieces) == programs, text
    assert max(map(len, text.splitlines())) <= 80
    return text


def conv(rng, out, channels, kernel=(3, 3), x="x", y="y", w="w", **attributes):
    """Return a Conv node with padding that keeps the size, and its weights by name."""
    attributes.setdefault("pads", [k // 2 for k in kernel] * 2)
    fan_in = channels * np.prod(kernel) / attributes.get("group", 1)
    weight = (rng.standard_normal((out, channels, *kernel)) / fan_in**0.5).astype(np.float32)
    bias = rng.standard_normal(out).astype(np.float32)
    return node("Conv", f"{x} {w} {w}_b", y, **attributes), {w: weight, f"{w}_b": bias}


def after_conv(rng, nodes, shape=(2, 16, 9, 10), weights=None, out=16, **options):
    """Compare a network of a convolution from x to c and the nodes given, which make y."""
    first, w = conv(rng, out, shape[1], (3,) * (len(shape) - 2), y="c")
    stays, programs = options.pop("stays", ""), options.pop("programs", 1)
    inputs = {"x": ["N", *shape[1:]]}
    model = model_of([first, *nodes], inputs, weights=w | (weights or {}), **options)
    x = rng.standard_normal(shape).astype(np.float32)
    return compare(model, x, x[:1], stays=stays, programs=programs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_linear_networks_of_both_types(rng, dtype):
    w, v, b = arrays(rng, (20, 7), (20, 5), (5,), dtype=dtype)
    nodes = [
        node("Gemm", "x w", "1", transB=0, alpha=0.5),
        node("Relu", "1", "2"),
        node("Add", "b 2", "3"),
        node("MatMul", "3 v", "y"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {"w": w[:, :5].copy(), "v": v[:5], "b": b}
    model = model_of(nodes, {"x": ["N", 20]}, weights=weights, kind=kind)
    compare(model, *arrays(rng, (4, 20), (1, 20), dtype=dtype))


@pytest.mark.parametrize("opset", [7, 9, 13, 17, 22])
def test_small_network_of_every_opset(rng, opset):
    model, x = small_net(rng, opset=opset)
    text = compare(model, x, x[:1])
    convolutions = sum(text.count(kind) for kind in ("dense", "F(", "few outputs"))
    assert convolutions == 3, "batch norm and additions are fused"


def test_initializers_that_are_inputs_are_constants(rng):
    model, x = small_net(rng, ir=3)
    compare(model, x)


def test_published_cases(data):
    with np.load(data / "conformance" / "onnx_conv_cases.npz") as cases:
        for case in json.loads(str(cases["manifest"])):
            i = case["i"]
            x, w, y = (cases[f"{i}.{k}"] for k in "xwy")
            weights = {"w": w} | ({"b": cases[f"{i}.b"]} if case["bias"] else {})
            made = node(case["op"], "x w b" if case["bias"] else "x w", "y", **case["attrs"])
            model = model_of([made], {"x": ["N", *x.shape[1:]]}, weights=weights)
            compare(model, x)
            np.testing.assert_allclose(on_engine(model)(x)[0], y, 1e-5, 1e-5)


@pytest.mark.parametrize("case", CONVS)
def test_convolution_nodes(rng, case):
    op, weight, shape, given = CONVS[case]
    w, x = arrays(rng, weight, shape)
    b = rng.standard_normal(weight[0] if op == "Conv" else weight[1] * given.get("group", 1))
    nodes = [node(op, "x w b", "c", **given), node("Relu", "c", "y")]
    weights = {"w": w, "b": b.astype(np.float32)}
    model = model_of(nodes, {"x": ["N", *shape[1:]]}, weights=weights)
    assert "relu" not in compare(model, x, x[:1])


@pytest.mark.parametrize(
    ("op", "attributes", "opset"),
    [
        ("Relu", {}, 17),
        ("LeakyRelu", {}, 17),
        ("LeakyRelu", {"alpha": 0.3}, 17),
        ("HardSwish", {}, 17),
        ("HardSigmoid", {"alpha": 1 / 6}, 17),
        ("Sigmoid", {}, 17),
        ("Tanh", {}, 17),
        ("Elu", {}, 17),
        ("Elu", {"alpha": 0.3}, 17),
        ("Gelu", {}, 20),
        ("Clip", {"min": 0.0, "max": 6.0}, 7),
        ("Clip", {"min": 0.0, "max": 0.5}, 7),
        ("Clip", {"min": 0.0}, 7),
    ],
)
def test_activations_are_fused(rng, op, attributes, opset):
    text = after_conv(rng, [node(op, "c", "y", **attributes)], opset=opset)
    assert len(text.splitlines()) == 5, text  # header, pack, convolution, unpack, total


@pytest.mark.parametrize(
    ("op", "attributes", "opset"),
    [
        ("HardSigmoid", {}, 17),
        ("Gelu", {"approximate": "tanh"}, 20),
        ("Clip", {"min": -1.0, "max": 1.0}, 7),
        ("Softplus", {}, 17),
    ],
)
def test_other_activations_stay(rng, op, attributes, opset):
    after_conv(rng, [node(op, "c", "y", **attributes)], opset=opset, stays=op)


def test_bounds_and_slopes_that_are_inputs(rng):
    weights = {
        "low": np.float32(0), "high": np.float32(6), "slope": np.full((1, 1, 1), 0.2, np.float32),
        "slopes": rng.standard_normal((16, 1, 1)).astype(np.float32),
    }  # fmt: skip
    nodes = [node("Clip", "c low high", "1"), node("PRelu", "1 slope", "y")]
    after_conv(rng, nodes, weights=weights)
    after_conv(rng, [node("PRelu", "c slopes", "y")], weights=weights, stays="PRelu")


def gated(gate):
    return [node(gate, "c", "g"), node("Mul", "g c", "y")]


GELU = [
    node("Div", "c root", "1"),
    node("Erf", "1", "2"),
    node("Add", "one 2", "3"),
    node("Mul", "c 3", "4"),
    node("Mul", "4 half", "y"),
]


def test_activations_of_several_nodes(rng):
    constants = {
        "root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.array([0.5], np.float32),
    }  # fmt: skip
    for nodes in (gated("Sigmoid"), GELU):
        text = after_conv(rng, nodes, weights=constants)
        assert len(text.splitlines()) == 5, text
    sixth = [node("HardSigmoid", "c", "g", alpha=1 / 6), node("Mul", "c g", "y")]
    assert len(after_conv(rng, sixth).splitlines()) == 5


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(16, 1, 1), (1, 16, 1, 1), (1,), ()])
def test_arithmetic_with_constants_is_folded(rng, op, shape):
    weights = {"k": rng.uniform(0.5, 2, shape).astype(np.float32)}
    text = after_conv(rng, [node(op, "c k", "y")], weights=weights)
    assert len(text.splitlines()) == 5, text
    if op == "Div":
        nodes = [node("Sigmoid", "c", "1"), node("Add", "1 k", "2"), node(op, "k 2", "y")]
        after_conv(rng, nodes, weights=weights, stays="Div")
    else:
        after_conv(rng, [node(op, "k c", "1"), node("Relu", "1", "y")], weights=weights)


def test_constants_of_other_shapes_stay(rng):
    weights = {"k": rng.standard_normal((9, 10)).astype(np.float32)}
    after_conv(rng, [node("Add", "c k", "y")], weights=weights, stays="Add")
    after_conv(
        rng, [node("Mul", "c k", "y")], (2, 3, 9, 9), {"k": weights["k"][:, :9]}, stays="Mul"
    )


@pytest.mark.parametrize("channels", [3, 40])
def test_scales_that_cannot_be_folded(rng, channels):
    weights = {n: rng.uniform(0.5, 2, channels).astype(np.float32) for n in "gbmv"}
    weights["k"] = weights["g"].reshape(-1, 1, 1)
    nodes = [
        node("Relu", "c", "1"),
        node("BatchNormalization", "1 g b m v", "2", epsilon=1e-3),
        node("Mul", "2 k", "3"),
        node("Add", "3 1", "4"),
        node("Sigmoid", "4", "y"),
    ]
    text = after_conv(rng, nodes, out=channels, weights=weights)
    assert len(text.splitlines()) == 6, text


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [0, 1, 1, 0]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "VALID"},
        {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]},
    ],
)
def test_pooling(rng, op, attributes):
    after_conv(rng, [node(op, "c", "y", **attributes)], opset=19)
    if op == "AveragePool":
        attributes = attributes | {"count_include_pad": 1}
        pads = attributes.get("pads", [0])
        stays = "" if len(set(pads)) == 1 and "SAME" not in attributes.get("auto_pad", "") else op
        after_conv(rng, [node(op, "c", "y", **attributes)], opset=19, stays=stays)


def test_pooling_over_other_axes(rng):
    after_conv(rng, [node("MaxPool", "c", "y", kernel_shape=[3])], (2, 4, 11))
    pool = node("AveragePool", "c", "y", kernel_shape=[2, 1, 2], strides=[2, 1, 1])
    after_conv(rng, [pool], (2, 4, 5, 6, 7))


def test_indices_of_a_pool_stay(rng):
    nodes = [node("MaxPool", "c", "y i", kernel_shape=[2, 2]), node("Shape", "i", "s")]
    after_conv(rng, nodes, outputs=("y",))
    first, weights = conv(rng, 8, 3, y="c")
    model = model_of([first, nodes[0]], {"x": ["N", 3, 6, 6]}, weights=weights)
    model.graph.output.append(helper.make_tensor_value_info("i", TensorProto.INT64, None))
    compare(model_with_shapes(model), *arrays(rng, (2, 3, 6, 6)), stays="MaxPool")


def model_with_shapes(model):
    outputs = onnx.shape_inference.infer_shapes(model).graph.output
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


@pytest.mark.parametrize("opset", [13, 18])
def test_reductions(rng, opset):
    def reduce(op, axes, **attributes):
        if opset < 18:
            return [node(op, "c", "y", axes=axes, **attributes)]
        constant = numpy_helper.from_array(np.array(axes, np.int64))
        return [node("Constant", "", "a", value=constant), node(op, "c a", "y", **attributes)]

    for op in ("ReduceMean", "ReduceMax"):
        after_conv(rng, reduce(op, [2, 3]), opset=opset)
        after_conv(rng, reduce(op, [-1, 2], keepdims=0), opset=opset)
        after_conv(rng, reduce(op, [3], keepdims=0), opset=opset)
        after_conv(rng, reduce(op, [1, 2]), opset=opset, stays=op)
    for op in ("GlobalAveragePool", "GlobalMaxPool"):
        after_conv(rng, [node(op, "c", "1"), node("Flatten", "1", "y")], opset=opset)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_padding_before_a_convolution(rng, mode):
    first, weights = conv(rng, 4, 3, y="c")
    last, more = conv(rng, 5, 4, x="p", w="v", pads=[0, 1, 0, 0])
    pads = np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64)
    nodes = [first, node("Pad", "c pads", "p", mode=mode), last]
    weights |= more | {"pads": pads}
    model = model_of(nodes, {"x": ["N", 3, 6, 7]}, weights=weights, opset=19)
    text = compare(model, *arrays(rng, (2, 3, 6, 7)))
    assert ("pad " in text) == (mode != "constant")


def test_other_padding(rng):
    attributes = {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 0.5}
    after_conv(rng, [node("Pad", "c", "1", **attributes), node("Relu", "1", "y")], opset=10)
    channels = {"pads": [0, 2, 0, 0, 0, 3, 0, 0]}
    after_conv(rng, [node("Pad", "c", "y", **channels)], opset=10)
    for pads in ([1, *[0] * 7], [0, 0, -1, *[0] * 5], [0, 1, 1, *[0] * 5]):
        after_conv(rng, [node("Pad", "c", "y", pads=pads)], opset=10, stays="Pad")
    weights = {"pads": np.array([2, 1], np.int64), "axes": np.array([-1], np.int64)}
    nodes = [node("Identity", "c", "1"), helper.make_node("Pad", ["1", "pads", "", "axes"], ["y"])]
    after_conv(rng, nodes, weights=weights, opset=18)


@pytest.mark.parametrize("opset", [9, 10, 13])
def test_nearest_upsampling(rng, opset):
    weights = {"s": np.array([1, 1, 2, 3], np.float32)}
    inputs = ["c", "s"] if opset < 11 else ["c", "", "s"]
    op = "Upsample" if opset == 9 else "Resize"
    after_conv(rng, [helper.make_node(op, inputs, ["y"])], opset=opset, weights=weights)
    weights["s"] = np.array([1, 1, 1.5, 2], np.float32)
    after_conv(rng, [helper.make_node(op, inputs, ["y"])], opset=opset, weights=weights, stays=op)


@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel", "align_corners"])
@pytest.mark.parametrize("rounding", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_nearest_neighbours_of_every_rule(rng, coordinates, rounding):
    weights = {"n": np.array([2, 16, 18, 40], np.int64)}
    resize = helper.make_node(
        "Resize", ["c", "", "", "n"], ["y"], nearest_mode=rounding,
        coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    first, more = conv(rng, 16, 16, y="c")
    model = model_of([first, resize], {"x": [2, 16, 9, 10]}, weights=weights | more)
    stays = "Resize" if coordinates == "align_corners" else ""
    compare(model, *arrays(rng, (2, 16, 9, 10)), stays=stays)


def test_linear_interpolation_stays(rng):
    weights = {"s": np.array([1, 1, 2, 2], np.float32)}
    resize = helper.make_node("Resize", ["c", "", "s"], ["y"], mode="linear")
    after_conv(rng, [resize], weights=weights, stays="Resize")


def test_flattened_planes(rng):
    weights = {
        "shape": np.array([0, -1], np.int64), "v": rng.standard_normal((8, 96)).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
    }  # fmt: skip
    gemm = node("Gemm", "1 v b", "2", transB=1)
    for flat in (node("Flatten", "c", "1"), node("Reshape", "c shape", "1")):
        after_conv(rng, [flat, gemm, node("Tanh", "2", "y")], (2, 3, 2, 3), weights)
    relu = [node("Flatten", "c", "0"), node("Relu", "0", "1"), node("Gemm", "1 v b", "y", transB=1)]
    after_conv(rng, relu, (2, 3, 2, 3), weights)
    after_conv(rng, [node("Flatten", "c", "y")], (2, 3, 2, 3), weights)
    whole = {"shape": np.array([-1], np.int64)}
    after_conv(rng, [node("Reshape", "c shape", "y")], weights=whole, stays="Reshape")


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 3, 2]])
def test_axes_in_another_order_before_a_linear_layer(rng, perm):
    weights = {"v": rng.standard_normal((96, 8)).astype(np.float32)}
    nodes = [
        node("Relu", "c", "0"),
        node("Transpose", "0", "1", perm=perm),
        node("Flatten", "1", "2"),
        node("MatMul", "2 v", "y"),
    ]
    text = after_conv(rng, nodes, (2, 3, 2, 3), weights)
    assert len(text.splitlines()) == 6, text


def test_channel_shuffle(rng):
    a, b = (np.array(s, np.int64) for s in ([0, 4, 4, 9, 10], [0, 16, 9, 10]))
    nodes = [
        node("Reshape", "c a", "1"),
        node("Transpose", "1", "2", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "2 b", "3"),
        node("Conv", "3 v", "y", group=4),
    ]
    weights = {"a": a, "b": b, "v": rng.standard_normal((16, 4, 3, 3)).astype(np.float32)}
    text = after_conv(rng, nodes, weights=weights)
    assert len(text.splitlines()) == 6, text
    nodes = [node("Transpose", "c", "y", perm=[0, 1, 3, 2])]
    after_conv(rng, nodes, stays="Transpose")


def test_parts_of_channels(rng):
    sizes = {"sizes": np.array([5, 8, 3], np.int64)}
    nodes = [
        node("Split", "c sizes", "1 2 3", axis=1),
        node("Relu", "2", "4"),
        node("Concat", "3 4 1 1", "y", axis=-3),
    ]
    after_conv(rng, nodes, weights=sizes)
    weights = {"from": np.array([4, -3], np.int64), "to": np.array([-1, 2**40], np.int64)}
    weights |= {"axes": np.array([2, 3], np.int64), "step": np.array([2, 1], np.int64)}
    after_conv(rng, [node("Slice", "c from to axes step", "y")], weights=weights)
    weights["axes"] = np.array([1, -1], np.int64)
    after_conv(rng, [node("Slice", "c from to axes step", "y")], weights=weights, stays="Slice")
    after_conv(rng, [node("Slice", "c", "y", starts=[2], ends=[9], axes=[1])], opset=9)
    after_conv(rng, [node("Slice", "c", "y", starts=[0], ends=[1])], opset=9, stays="Slice")


def test_strided_samples_and_zero_channels_are_a_pointwise_convolution(rng):
    weights = {k: np.array(v, np.int64) for k, v in {
        "zero": [0], "end": [99], "two": [2], "rows": [2], "columns": [3],
        "pads": [0, 8, 0, 0, 0, 8, 0, 0],
    }.items()}  # fmt: skip
    nodes = [
        node("Slice", "c zero end rows two", "1"),
        node("Slice", "1 zero end columns two", "2"),
        node("Pad", "2 pads", "3"),
        node("Relu", "3", "y"),
    ]
    text = after_conv(rng, nodes, weights=weights, opset=13)
    assert len(text.splitlines()) == 6, text


def test_residuals_are_fused(rng):
    nodes, weights = [], {}
    for i, (x, y) in enumerate([("x", "a"), ("a", "b"), ("r", "d"), ("r", "e")]):
        made, w = conv(rng, 16, 16, x=x, y=y, w=f"w{i}")
        nodes.append(made)
        weights |= w
    nodes[2:2] = [node("Add", "x b", "s"), node("Relu", "s", "r")]  # r = relu(x + conv(conv(x)))
    nodes += [node("Add", "d e", "t"), node("Add", "t r", "u"), node("Add", "u u", "y")]
    model = model_of(nodes, {"x": ["N", 16, 8, 8]}, weights=weights)
    text = compare(model, *arrays(rng, (2, 16, 8, 8), (1, 16, 8, 8)))
    assert text.count("\nadd ") == 2, text  # t + r and u + u


def test_values_with_other_uses_are_not_fused(rng):
    for outputs in (("y", "c"), ("y", "1")):
        nodes = [node("Relu", "c", "1"), node("Add", "1 c", "2"), node("Tanh", "2", "y")]
        after_conv(rng, nodes, outputs=outputs)


@pytest.mark.parametrize(("channels", "group"), [(32, 1), (32, 2), (20, 4), (6, 3), (32, 32)])
def test_residuals_of_grouped_convolutions(rng, channels, group):
    first, weights = conv(rng, channels, 3, y="c")
    per_group = channels // group
    last, more = conv(rng, channels, per_group, (1, 3), x="c", y="d", w="v", group=group)
    nodes = [first, last, node("Add", "d c", "s"), node("Mul", "s d", "y")]
    model = model_of(nodes, {"x": ["N", 3, 7, 6]}, weights=weights | more)
    compare(model, *arrays(rng, (2, 3, 7, 6)))


def test_operands_with_channels_in_another_order(rng):
    weights = {"a": np.array([0, 4, 5, 9, 10], np.int64), "b": np.array([0, 20, 9, 10], np.int64)}
    shuffle = [
        node("Reshape", "c a", "1"),
        node("Transpose", "1", "2", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "2 b", "3"),
    ]
    second, more = conv(rng, 20, 20, x="c", y="d", w="v")
    weights |= more
    for last in (["Add", "3 d"], ["Add", "d 3"], ["Mul", "3 d"]):
        nodes = [*shuffle, second, node(*last, "s"), node("Add", "s c", "y")]
        after_conv(rng, nodes, weights=weights, out=20)


def test_residual_of_a_transposed_convolution(rng):
    first, weights = conv(rng, 8, 3, y="c")
    weights["t"] = arrays(rng, (8, 3, 3, 3))[0]
    up = node("ConvTranspose", "c t", "u", pads=[1] * 4)
    nodes = [first, up, node("Add", "x u", "s"), node("Sigmoid", "s", "y")]
    model = model_of(nodes, {"x": ["N", 3, 7, 6]}, weights=weights)
    text = compare(model, *arrays(rng, (2, 3, 7, 6)))
    assert len(text.splitlines()) == 6, text


def test_squeeze_and_excitation(rng):
    first, weights = conv(rng, 24, 3, y="c")
    down, more = conv(rng, 6, 24, (1, 1), x="p", y="1", w="v")
    up, last = conv(rng, 24, 6, (1, 1), x="2", y="3", w="u")
    nodes = [
        first,
        node("GlobalAveragePool", "c", "p"),
        down,
        node("Relu", "1", "2"),
        up,
        node("Sigmoid", "3", "g"),
        node("Mul", "g c", "m"),
        node("Add", "m g", "a"),
        node("Relu", "a", "y"),
    ]
    model = model_of(nodes, {"x": ["N", 3, 9, 9]}, weights=weights | more | last)
    assert compare(model, *arrays(rng, (2, 3, 9, 9))).count("combine") == 2


def test_mobile_network(rng):
    nodes, weights, x, channels = [], {}, "x", 3
    for i, (out, group, stride) in enumerate([(16, 1, 2), (16, 16, 1), (32, 1, 1), (32, 32, 2)]):
        kernel = (1, 1) if i == 2 else (3, 3)
        made, w = conv(
            rng, out, channels // group, kernel, x=x, y=f"c{i}", w=f"w{i}", group=group,
            strides=[stride] * 2,
        )  # fmt: skip
        norm = {f"{k}{i}": rng.uniform(0.5, 1.5, out).astype(np.float32) for k in "gbmv"}
        weights |= w | norm
        nodes += [
            made,
            node("BatchNormalization", f"c{i} g{i} b{i} m{i} v{i}", f"n{i}"),
            node("Clip", f"n{i} zero six", f"r{i}"),
        ]
        x, channels = f"r{i}", out
    weights |= {"zero": np.float32(0), "six": np.float32(6)}
    weights["fc"] = rng.standard_normal((32, 10)).astype(np.float32)
    nodes += [
        node("ReduceMean", x, "p", axes=[2, 3], keepdims=0),
        node("Dropout", "p", "q"),
        node("MatMul", "q fc", "y"),
    ]
    model = model_of(nodes, {"x": ["N", 3, 17, 15]}, weights=weights)
    text = compare(model, *arrays(rng, (3, 3, 17, 15), (1, 3, 17, 15)))
    assert len(text.splitlines()) == 10, text  # header, pack, 4 + 1 layers, pooling, unpack, total


def test_u_net(rng):
    down, w = conv(rng, 16, 3, y="a")
    inner, v = conv(rng, 32, 16, x="p", y="b", w="v")
    last, u = conv(rng, 5, 32, x="cat", y="y", w="u")
    weights = w | v | u | {"t": arrays(rng, (32, 16, 2, 2))[0] / 8}
    nodes = [
        down,
        node("LeakyRelu", "a", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        inner,
        node("ConvTranspose", "b t", "up", strides=[2, 2]),
        node("Relu", "up", "up_r"),
        node("Concat", "up_r r", "cat", axis=1),
        last,
    ]
    model = model_of(nodes, {"x": ["N", 3, 12, 8]}, weights=weights)
    compare(model, *arrays(rng, (2, 3, 12, 8)))


def test_nodes_that_are_not_supported_split_the_network(rng):
    one, w = conv(rng, 16, 3, y="a")
    two, v = conv(rng, 16, 16, x="b", y="d", w="v")
    weights = w | v
    nodes = [
        one,
        node("LRN", "a", "b", size=3),
        two,
        node("Add", "d a", "e"),
        node("Softmax", "e", "y", axis=1),
    ]
    model = model_of(nodes, {"x": ["N", 3, 8, 8]}, weights=weights)
    stays = "LRN Softmax"
    text = compare(model, *arrays(rng, (2, 3, 8, 8), (5, 3, 8, 8)), stays=stays, programs=2)
    assert "1 LRN" in text


@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize("size", [(11,), (9, 10), (3, 4, 5)])
def test_instance_normalization(rng, channels, size):
    weights = {"t": arrays(rng, (channels,))[0]}
    for name, axes in (("s", ()), ("k", (1,) * len(size))):  # no sum cancels a channel
        weights[name] = rng.uniform(0.5, 2, (channels, *axes)).astype(np.float32)
    nodes = [
        node("InstanceNormalization", "c s t", "1", epsilon=1e-3),
        node("Mul", "1 k", "2"),
        node("Add", "c 2", "3"),
        node("InstanceNormalization", "3 s t", "4"),
        node("Elu", "4", "y"),
    ]
    text = after_conv(rng, nodes, (2, channels, *size), weights, channels)
    assert len(text.splitlines()) == 7, text  # header, pack, convolution, two of these, ...
    stays = "InstanceNormalization"
    nodes = [node(stays, "c s t", "y", epsilon=0.0)]
    after_conv(rng, nodes, (2, channels, *size), weights, channels, stays=stays)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize(("channels", "block"), [(12, 2), (36, 3), (80, 2)])
def test_depth_to_space(rng, mode, channels, block):
    last, weights = conv(rng, 2, channels // block**2, x="s", w="v")
    nodes = [
        node("Tanh", "c", "t"),
        node("DepthToSpace", "t", "s", blocksize=block, mode=mode),
        last,
    ]
    after_conv(rng, nodes, weights=weights, out=channels)


def test_squares_are_products(rng):
    weights = {"two": np.float32(2), "three": np.array([3], np.float32)}
    weights["twos"] = np.full((1, 1, 1, 1, 1), 2, np.float32)
    nodes = [node("Pow", "c two", "1"), node("Relu", "1", "y")]
    assert len(after_conv(rng, nodes, weights=weights).splitlines()) == 6
    for exponent in ("three", "twos"):  # another power, more axes
        nodes[0] = node("Pow", f"c {exponent}", "1")
        after_conv(rng, nodes, weights=weights, stays="Pow Relu")


def test_operations_without_a_layer_stay(rng):
    nodes = [node("Relu", "x", "1"), node("Softmax", "1", "2"), node("Tanh", "2", "y")]
    model = model_of(nodes, {"x": ["N", 3]})
    compare(model, *arrays(rng, (2, 3)), stays="Relu Softmax Tanh", programs=0)


def test_several_inputs_and_outputs(rng):
    left, w = conv(rng, 16, 3, x="a", y="1")
    right, v = conv(rng, 16, 2, x="b", y="2", w="v")
    nodes = [left, right, node("Add", "1 2", "3"), node("Relu", "3", "y"), node("Neg", "1", "z")]
    inputs = {"a": ["N", 3, 6, 6], "b": ["N", 2, 6, 6]}
    model = model_of(nodes, inputs, ("y", "1", "z"), weights=w | v)
    model.graph.output.append(model.graph.input[0])
    a, b = arrays(rng, (2, 3, 6, 6), (2, 2, 6, 6))
    compare(model, {"a": a, "b": b}, stays="Neg")


def test_one_batch_for_all_examples(rng):
    """At batch 1 the second input could be a batch; at batch 2 it is none."""
    first, weights = conv(rng, 16, 3, y="c")
    nodes = [first, node("Add", "c z", "s"), node("Relu", "s", "y")]
    model = model_of(nodes, {"x": ["N", 3, 6, 6], "z": [1, 16, 6, 6]}, weights=weights)
    x, z = arrays(rng, (2, 3, 6, 6), (1, 16, 6, 6))
    net = on_engine(model)
    for batch in (1, 2, 1):
        feed = {"x": x[:batch], "z": z}
        np.testing.assert_allclose(net(feed)[0], ran(model, **feed)[0], 0, 1e-4)


def test_programs_are_built_once_per_shape_without_the_batch(rng, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        return partition(*args)

    partition = module.partition
    monkeypatch.setattr(module, "partition", counted)
    first, weights = conv(rng, 4, 3)
    net = on_engine(model_of([first], {"x": ["N", 3, "h", "w"]}, weights=weights))
    for batch in (1, 2, 5, 1):
        net(np.ones((batch, 3, 8, 8), np.float32))
    assert len(calls) == 1
    for size in (*range(3, 13), 12, 3):
        net(np.ones((1, 3, size, size), np.float32))
    assert len(calls) == 1 + 9 + 1, "sizes 8 and 12 are there, 3 is not any more"
    assert len(net._plans) == 8


def test_shapes_computed_in_the_graph(rng):
    first, weights = conv(rng, 16, 3, y="c")
    weights |= {"v": arrays(rng, (16 * 36, 4))[0] / 24, "minus": np.array([-1], np.int64)}
    weights |= {"zero": np.array([0], np.int64)}
    nodes = [
        first,
        node("Shape", "c", "s"),
        node("Gather", "s zero", "n"),
        node("Concat", "n minus", "shape", axis=0),
        node("Reshape", "c shape", "f"),
        node("MatMul", "f v", "y"),
    ]
    model = model_of(nodes, {"x": ["N", 3, 6, 6]}, weights=weights)
    compare(model, *arrays(rng, (2, 3, 6, 6), (1, 3, 6, 6)))


def test_subgraphs_that_read_values_of_the_main_graph(rng):
    first, weights = conv(rng, 4, 3, y="c")
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(op, "c", name)], name, [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Neg"), ("else", "Exp"))
    }  # fmt: skip
    nodes = [
        first,
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "condition"),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    weights["zero"] = np.float32(0)
    model = model_of(nodes, {"x": ["N", 3, 6, 6]}, weights=weights)
    (x,) = arrays(rng, (2, 3, 6, 6))
    compare(model, x, -x, stays="ReduceSum Greater If")


def test_functions_of_the_model_are_inlined(rng):
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17, "own" : 1]>
        net (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, -2, 4}>
        {y = own.layer(x, w)}
        <domain: "own", opset_import: ["" : 17]>
        layer (a, b) => (c) {m = MatMul(a, b) c = Relu(m)}""")
    compare(model, *arrays(rng, (3, 2)))


def test_constants_are_folded(rng):
    (w,) = arrays(rng, (4, 3, 3, 3))
    weights = {"w": w, "k": w[0, 0, 0]}
    nodes = [
        node("Transpose", "w", "v", perm=[0, 1, 3, 2]),
        node("Conv", "x v", "y"),
        node("Neg", "k", "z"),
    ]
    model = model_of(nodes, {"x": ["N", 3, 6, 6]}, ("y", "z"), weights=weights)
    compare(model, *arrays(rng, (2, 3, 6, 6)))


def test_dropout_of_training_stays(rng):
    weights = {"ratio": np.float32(0), "training": np.array(True)}
    after_conv(rng, [node("Dropout", "c ratio training", "y")], weights=weights, stays="Dropout")
    weights["training"] = np.array(False)
    after_conv(rng, [node("Dropout", "c ratio training", "y")], weights=weights)


def test_half_precision_stays(rng):
    w, x = arrays(rng, (4, 3), (2, 3), dtype=np.float16)
    model = model_of(
        [node("Gemm", "x w", "y", transB=1)], {"x": ["N", 3]}, weights={"w": w},
        kind=TensorProto.FLOAT16,
    )  # fmt: skip
    net = on_engine(model)
    np.testing.assert_array_equal(net(x)[0], ran(model, x=x)[0])
    assert "1 Gemm" in net.describe(x)


def test_more_arrays_than_a_program_takes_stay(rng):
    nodes, weights = [], {}
    for i in range(20):
        made, w = conv(rng, 2, 2, (1, 1), y=f"y{i}", w=f"w{i}")
        nodes.append(made)
        weights |= w
    outputs = [f"y{i}" for i in range(20)]
    model = model_of(nodes, {"x": ["N", 2, 3, 3]}, outputs, weights=weights)
    compare(model, *arrays(rng, (1, 2, 3, 3)), stays="Conv", programs=0)


def test_the_batch_is_shared_by_threads(rng):
    model, x = small_net(rng)
    expected = on_engine(model, threads=1)(x)
    np.testing.assert_array_equal(on_engine(model, threads=2)(x)[0], expected[0])
    np.testing.assert_array_equal(on_engine(model)(x)[0], expected[0])


def test_files_and_external_data(rng, tmp_path):
    model, x = small_net(rng)
    path = tmp_path / "net.onnx"
    expected = on_engine(model)(x)[0]
    onnx.save(model, path, save_as_external_data=True, location="net.bin", size_threshold=0)
    np.testing.assert_array_equal(on_engine(path)(x)[0], expected)
    loaded = onnx.load(path, load_external_data=False)
    np.testing.assert_array_equal(on_engine(loaded, folder=tmp_path)(x)[0], expected)
    with pytest.raises(ValueError, match="folder is required"):
        on_engine(loaded)


def test_wrong_arguments(rng):
    model, _ = small_net(rng)
    for options in ({"threads": 0}, {"algorithm": "fast"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            on_engine(model, **options)
    with pytest.raises(ValueError, match="opset must be at least 7"):
        on_engine(small_net(rng, opset=6)[0])
    with pytest.raises(FileNotFoundError):
        on_engine("nowhere.onnx")


@pytest.mark.parametrize(
    "feed",
    [
        np.ones((1, 3, 8)),
        np.ones((1, 4, 8, 8)),
        np.full((1, 3, 8, 8), np.nan),
        np.ones((0, 3, 8, 8)),
        np.ones((1, 3, 8, 8), complex),
        {"other": np.ones((1, 3, 8, 8))},
    ],
)
def test_wrong_feeds_get_the_errors_of_calibration_data(rng, feed):
    model, x = small_net(rng)
    with pytest.raises(ValueError, match=r"takes|values for") as expected:
        OnnxModel(model, [feed])
    net = on_engine(model)
    for call in (net, net.describe):
        with pytest.raises(ValueError, match=r"takes|values for") as actual:
            call(feed)
        assert str(actual.value) == str(expected.value)
    assert net(x)[0].shape == (5, 4)


@pytest.mark.parametrize("name", ["resnet20", "vww"])
def test_trained_networks_are_one_program(data, name):
    pytest.importorskip("torch")
    from asv_benchmarks.benchmarks import net_onnx, nets

    (case,) = nets.cases(name)
    x = case.calibration(0)[0][:3]
    text = compare(net_onnx.onnx_model(case.model, x), x.numpy(), x[:1].numpy())
    assert text.count("pack") == 4, text  # one input and one output
