"""ONNX models: layers of nodes, and chains written as nodes, run by onnxruntime."""

import itertools
import json
import math

import numpy as np
import pytest

import lowrank as lr
from lowrank.core import reference
from lowrank.families import FAMILIES, applicable

onnx = pytest.importorskip("onnx")
ml_dtypes = pytest.importorskip("ml_dtypes")  # which onnx requires
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import CLOSE, CONVS, arrays, model_of, ran, small_net  # noqa: E402

from lowrank.interop.onnx import OnnxModel, open_model, save  # noqa: E402
from lowrank.interop.onnx.chain import Writer, conv_chain  # noqa: E402


def chains_of(conv, copies=False, thorough=False):
    """Chains of every family and two forms, as exact as each can be, and rough.

    With `copies` only those whose copies go along an axis of their own.  Families that are fitted
    step by step take seconds at their largest rank: that is for `thorough`.
    """
    for name, forms in applicable(conv).items():
        for form in dict.fromkeys((forms[0], forms[-1])):
            points = list(FAMILIES[name].sweep(conv, form))
            if copies and all(s.inner == 1 for s in points[0].stages):
                continue
            if not (thorough or FAMILIES[name].exact):
                points = points[:2]
            for point in {p.rank: p for p in (points[0], points[-1])}.values():
                yield FAMILIES[name].fit(conv, point.rank, form)


def with_random_bias(f, rng):
    """Return `f` with a random bias, also if the layer has none."""
    return lr.chain(f.stages, rng.standard_normal(f.out_channels).astype(np.float32), f.groups)


def conv_net(rng, case, batch="N", sizes=True, bias=True, **options):
    """Return a model of one node between two others, its protobuf and an input."""
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
    return OnnxModel(model, None if sizes else [x]), model, x


@pytest.mark.parametrize("case", CONVS)
def test_conv_node_becomes_an_equal_layer(rng, case):
    net, model, x = conv_net(rng, case)
    (layer,) = net.layers
    assert layer.name == "layer"
    assert layer.input_size == x.shape[2:]
    np.testing.assert_allclose(-layer.conv(-x), ran(model, x=x)[0], **CLOSE)


#: Cases whose padding depends on the input size: they are left out if that is free.
FIXED = ("same lower", "output shape")


@pytest.mark.parametrize(
    ("case", "sizes"),
    [*((c, True) for c in CONVS), *((c, False) for c in CONVS if c not in FIXED)],
)
def test_chains_of_every_family_run_in_onnxruntime(rng, case, sizes):
    net, model, x = conv_net(rng, case, sizes=sizes)
    conv = net.layers[0].conv
    want = ran(model, x=x)[0]
    larger = np.concatenate([x, x, x])
    if not sizes:
        larger = np.concatenate([larger, larger], axis=-1)
    exact = 0
    # chains without copies have the same nodes for fixed and free sizes
    for f in chains_of(conv, sizes and case not in FIXED, case in ("1-D", "2-D", "transposed")):
        new = net.replaced({"layer": f})
        y = ran(new, x=x)[0]
        if f.error(conv.to_dense()) < 1e-6:
            np.testing.assert_allclose(y, want, **CLOSE, err_msg=repr(f))
            exact += 1
        for given in (x, larger):  # batches stay free, and so do sizes where they were
            expected = -reference.run_chain(f.stages, -given, f.bias)
            got = y if given is x else ran(new, x=given)[0]
            np.testing.assert_allclose(got, expected, **CLOSE, err_msg=repr(f))
    assert exact > 0 or sizes


def as_nodes(f, x, sizes=True, opset=17, dtype=np.float32):
    """Return the output of a chain in onnxruntime, also of one that approximates no layer."""
    writer = Writer("layer", f.ndim, np.dtype(dtype), opset, {"x"})
    conv_chain(writer, f, "x", x.shape[2:] if sizes else None)
    nodes = [*writer.nodes, helper.make_node("Identity", [writer.nodes[-1].output[0]], ["y"])]
    free = x.shape[2:] if sizes else "abc"[: f.ndim]
    weights = {t.name: numpy_helper.to_array(t) for t in writer.tensors}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shapes = {"x": ["N", f.in_channels, *free]}
    return ran(model_of(nodes, shapes, weights=weights, opset=opset, kind=kind), x=x)[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("sizes", [True, False], ids=["fixed", "free"])
def test_copies_groups_shuffles_and_a_bias_together(rng, ndim, transposed, sizes):
    kernel, g = (3, 2, 2)[:ndim], lr.Geometry.of(ndim, stride=2, padding=1)
    first, last = arrays(rng, (4, 3, *kernel), (6 if transposed else 4, 2, *kernel))
    stages = [
        lr.Stage(first, g, 2, 2, 2, (4, 3), transposed),
        lr.Stage(last, g, 2, 2, 2, (8, 2), transposed),
    ]
    f = with_random_bias(lr.chain(stages), rng)
    (x,) = arrays(rng, (2, f.in_channels, *(6, 5, 4)[:ndim]))
    want = reference.run_chain(f.stages, x, f.bias)
    np.testing.assert_allclose(as_nodes(f, x, sizes), want, **CLOSE)


@pytest.mark.parametrize("opset", [9, 17, 19])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "symmetric", "constant"])
def test_padding_modes_become_pad_nodes_or_are_refused(rng, mode, opset):
    (w,) = arrays(rng, (6, 4, 3, 3))
    conv = lr.dense(w, padding=[(1, 2), (0, 1)], padding_mode=mode, value=3.0)
    (x,) = arrays(rng, (2, 4, 7, 8))
    for f in (conv, lr.spatial_svd(conv, rank=3), lr.tucker(conv, rank=(3, 3))):
        f = with_random_bias(f, rng)
        if mode == "symmetric" or (mode == "circular" and opset < 19):
            with pytest.raises(ValueError, match=f"'layer'.*padding_mode '{mode}'"):
                as_nodes(f, x, opset=opset)
            continue
        want = reference.run_chain(f.stages, x, f.bias)
        np.testing.assert_allclose(as_nodes(f, x, opset=opset), want, **CLOSE)


def test_large_output_padding_becomes_less_cropping_or_is_refused(rng):
    (w,) = arrays(rng, (4, 3, 4))
    (x,) = arrays(rng, (1, 4, 6))
    f = lr.dense(w, stride=2, padding=[(0, 3)], output_padding=2, transposed=True)
    np.testing.assert_allclose(as_nodes(f, x), f(x), **CLOSE)
    with pytest.raises(ValueError, match="output_padding"):
        as_nodes(lr.dense(w, stride=2, output_padding=2, transposed=True), x)


def test_layers_whose_padding_depends_on_a_free_size_are_left_out(rng):
    for case in FIXED:
        with pytest.raises(ValueError, match="no Conv"):
            conv_net(rng, case, sizes=False)


def gemm_net(rng, rows="N", **given):
    w, b, x = arrays(rng, (8, 6) if given.get("transB") else (6, 8), (8,), (4, 6))
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], **given)
    model = model_of([node], {"x": [rows, 6]}, weights={"w": w, "b": b})
    return OnnxModel(model, [x]), x


@pytest.mark.parametrize("rows", ["N", 4])
@pytest.mark.parametrize("given", [{}, {"transB": 1, "alpha": 0.5, "beta": 2.0}], ids=str)
def test_gemm_is_a_linear_layer(rng, given, rows):
    net, x = gemm_net(rng, rows, **given)
    (layer,) = net.layers
    assert (layer.name, layer.input_size) == ("y", (1,))
    (samples,) = net.inputs(["y"], {})
    np.testing.assert_array_equal(samples["y"][0], x[..., None])
    want = next(net.outputs({}))[0]
    np.testing.assert_allclose(layer.conv(x[..., None])[..., 0], want, **CLOSE)
    for f in (*chains_of(layer.conv), with_random_bias(lr.channel_svd(layer.conv, rank=2), rng)):
        new = net.replaced({"y": f})
        want = reference.run_chain(f.stages, x[..., None], f.bias)[..., 0]
        np.testing.assert_allclose(ran(new, x=x)[0], want, **CLOSE, err_msg=repr(f))
    ops = [n.op_type for n in net.replaced({"y": lr.channel_svd(layer.conv, rank=2)}).graph.node]
    assert ops == ["Gemm", "Gemm"]


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6)], ids=str)
def test_matmul_is_a_linear_layer(rng, shape):
    w, x = arrays(rng, (6, 8), shape)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    free = ["N", *"abc"[: len(shape) - 2], 6]
    net = OnnxModel(model_of([node], {"x": free}, weights={"w": w}), [x])
    (layer,) = net.layers
    assert layer.input_size == (np.prod(shape[1:-1], dtype=int),)
    (samples,) = net.inputs(["fc"], {})
    vectors = samples["fc"][0]
    assert vectors.shape == (3, 6, layer.input_size[0])
    np.testing.assert_array_equal(vectors.swapaxes(1, 2).ravel(), x.ravel())
    for f in (*chains_of(layer.conv), with_random_bias(lr.channel_svd(layer.conv, rank=2), rng)):
        want = reference.run_chain(f.stages, vectors, f.bias).swapaxes(1, 2).reshape(*shape[:-1], 8)
        y = ran(net.replaced({"fc": f}), x=x)[0]
        np.testing.assert_allclose(y, want, **CLOSE, err_msg=repr(f))
    shuffled = lr.chain([lr.Stage(*arrays(rng, (4, 3, 1)), lr.Geometry.of(1), 2, shuffle=(2, 3)),
                         lr.Stage(*arrays(rng, (8, 4, 1)), lr.Geometry.of(1))])  # fmt: skip
    want = shuffled(vectors).swapaxes(1, 2).reshape(*shape[:-1], 8)
    np.testing.assert_allclose(ran(net.replaced({"fc": shuffled}), x=x)[0], want, **CLOSE)


def test_vectors_that_are_part_of_the_batch_axis(rng):
    w, x = arrays(rng, (6, 8), (3, 5, 6))
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"], "fc"),
    ]
    weights = {"w": w, "s": np.array([-1, 6])}
    for batch in ("N", 3):
        net = OnnxModel(model_of(nodes, {"x": [batch, 5, 6]}, weights=weights), [x])
        assert net.layers[0].input_size == (5,)
        (samples,) = net.inputs(["fc"], {})
        np.testing.assert_array_equal(samples["fc"][0], x.swapaxes(1, 2))


def test_vectors_before_the_batch_axis(rng):
    w, x = arrays(rng, (6, 8), (3, 5, 6))
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "w"], ["y"], "fc"),
    ]
    for batch in ("N", 3):
        net = OnnxModel(model_of(nodes, {"x": [batch, 5, 6]}, weights={"w": w}), [x])
        assert net.layers[0].input_size == (5,)
        (samples,) = net.inputs(["fc"], {})
        np.testing.assert_array_equal(samples["fc"][0], x.swapaxes(1, 2))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_are_read_and_written_back(rng, dtype):
    w, b, x = arrays(rng, (8, 6, 3, 3), (8,), (2, 6, 5, 5), dtype=dtype)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "c")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    net = OnnxModel(
        model_of([node], {"x": ["N", 6, 5, 5]}, weights={"w": w, "b": b}, kind=kind), [x]
    )
    conv = net.layers[0].conv
    assert conv.dtype == (np.float32 if dtype == np.float16 else np.float64)
    f = lr.spatial_svd(conv, rank=18)
    new = net.replaced({"c": f})
    assert {t.data_type for t in new.graph.initializer} == {kind}
    # onnxruntime has no Conv of float64
    onnx.checker.check_model(new, full_check=True)
    run = ran(new, x=x) if dtype == np.float16 else ReferenceEvaluator(new).run(None, {"x": x})
    y = run[0]
    assert y.dtype == dtype
    # two roundings to the type's precision of sums of magnitude 50, and of the weights
    tolerance = 50 * 8 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y, conv(x.astype(conv.dtype)), rtol=0, atol=tolerance)
    assert next(net.inputs(["c"], {}))["c"][0].dtype == np.float32
    if dtype == np.float16:
        (stage, last) = f.stages
        big = lr.chain([lr.Stage(stage.weight * 1e5, stage.geometry), last], f.bias)
        with pytest.raises(ValueError, match="'c': weights too large for float16"):
            net.replaced({"c": big})


def test_layers_of_a_network(rng):
    model, _ = small_net(rng)
    net = OnnxModel(model)
    assert [(n.name, n.input_size) for n in net.layers] == [
        ("conv", (8, 8)), ("4", (8, 8)), ("y", (1,)),
    ]  # fmt: skip
    # 2 / sqrt(4 + 1e-5), in float64 but for an epsilon in float32
    np.testing.assert_allclose(net.layers[0].scale, 2 / np.sqrt(4 + 1e-5), rtol=1e-7)
    assert net.layers[1].scale is None
    assert net.batches == 0
    assert list(net.outputs({})) == []
    assert net.gradients(["conv"], 0) is None


def test_replaced_model_keeps_everything_else(rng):
    model, x = small_net(rng)
    model.producer_name, model.doc_string = "someone", "a net"
    model.metadata_props.add(key="k", value="v")
    before = model.SerializeToString()
    net = OnnxModel(model)
    chains = {n.name: lr.channel_svd(n.conv, rank=2) for n in net.layers}
    new = net.replaced(chains)
    assert model.SerializeToString() == before
    for field in ("ir_version", "opset_import", "producer_name", "doc_string", "metadata_props"):
        assert getattr(new, field) == getattr(model, field), field
    assert new.graph.input == model.graph.input
    assert new.graph.output == model.graph.output
    assert [n.op_type for n in new.graph.node] == [
        "Conv", "Conv", "BatchNormalization", "Relu", "Conv", "Conv", "Add",
        "GlobalAveragePool", "Flatten", "MatMul", "MatMul",
    ]  # fmt: skip
    assert [n.name for n in new.graph.node if n.op_type == "Conv"] == [
        "conv.0", "conv.1", "4.0", "4.1",
    ]  # fmt: skip
    assert new.graph.node[5].doc_string == "the second"
    assert {t.name for t in new.graph.initializer} == {
        "g", "o", "v", "y.0.weight", "y.1.weight",
        *(f"{name}.{k}.weight" for name in ("conv", "4") for k in (0, 1)),
    }  # fmt: skip
    known = {v.name for v in new.graph.value_info}
    made = {o for n in new.graph.node for o in n.output}
    assert known == made - {"y"}
    # the network by hand
    first = np.maximum(chains["conv"](x) * 2 / np.sqrt(4 + 1e-5), 0)
    last = (first + chains["4"](first)).mean((2, 3))
    np.testing.assert_allclose(ran(new, x=x)[0], chains["y"](last[..., None])[..., 0], **CLOSE)
    net = OnnxModel(model, [x])
    np.testing.assert_allclose(next(net.outputs(chains))[0], ran(new, x=x)[0], **CLOSE)


def test_inputs_are_computed_with_replaced_layers(rng):
    model, x = small_net(rng)
    net = OnnxModel(model, [x[:3], {"x": x[3:]}])
    chains = {
        "conv": lr.channel_svd(net.layers[0].conv, rank=2),
        "y": lr.channel_svd(net.layers[2].conv, 1),
    }
    got = list(net.inputs(["4", "conv"], chains))
    assert net.batches == len(got) == 2
    want = np.maximum(chains["conv"](x) * 2 / np.sqrt(4 + 1e-5), 0)
    values = [np.concatenate([g[n][0] for g in got]) for n in ("4", "conv")]
    np.testing.assert_allclose(values[0], want, **CLOSE)
    np.testing.assert_array_equal(values[1], x)


def test_nodes_after_the_layers_are_not_run(rng):
    model, x = small_net(rng)
    # no runtime runs this
    model.graph.node.append(helper.make_node("Nonsense", ["5"], ["z"], domain="nowhere"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N"]))
    model.opset_import.add(domain="nowhere", version=1)
    net = OnnxModel(model, [x])
    assert next(net.inputs(["conv", "4"], {}))["4"][0].shape == (5, 6, 8, 8)
    with pytest.raises(ValueError, match="onnxruntime does not load"):
        next(net.outputs({}))


def test_names_of_layers_and_nodes_are_unique(rng):
    u, v, w = arrays(rng, *[(4, 4, 3)] * 3)
    nodes = [
        helper.make_node("Conv", ["x", "u"], ["same_1"], "same"),
        helper.make_node("Conv", ["same_1", "v"], ["same.0"], "same"),
        helper.make_node("Conv", ["same.0", "w"], ["y"]),
    ]
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, weights={"u": u, "v": v, "w": w}))
    assert [n.name for n in net.layers] == ["same", "same_1", "y"]
    new = net.replaced({n.name: lr.channel_svd(n.conv, rank=2) for n in net.layers})
    onnx.checker.check_model(new, full_check=True)
    for names in ([n.name for n in new.graph.node], [t.name for t in new.graph.initializer]):
        assert len(set(names)) == len(names) == 6


def test_nodes_without_constant_weights_are_not_layers(rng):
    a, b = arrays(rng, (4, 3, 3), (4, 4, 3))
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["1"], "fixed"),
        helper.make_node("Conv", ["1", "w"], ["2"], "given"),
        helper.make_node("Neg", ["b"], ["c"]),
        helper.make_node("Conv", ["2", "c"], ["y"], "computed"),
    ]
    model = model_of(nodes, {"x": ["N", 3, 9], "w": [4, 4, 3]}, weights={"a": a, "b": b})
    net = OnnxModel(model)
    assert [x.name for x in net.layers] == ["fixed", "computed"]
    assert net.left_out == {"given": "its weight is not constant"}
    np.testing.assert_array_equal(net.layers[1].conv.to_dense(), -b)
    new = net.replaced({"computed": lr.channel_svd(net.layers[1].conv, 2)})
    assert "Neg" not in {n.op_type for n in new.graph.node}
    assert "b" not in {t.name for t in new.graph.initializer}


def test_nodes_of_one_weight_are_one_layer(rng):
    w, b, x = arrays(rng, (4, 4, 3), (4,), (2, 4, 9))
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["1"], "first"),
        helper.make_node("Conv", ["1", "w", "b"], ["y"], "second"),
    ]
    for ir in (3, 8):
        model = model_of(nodes, {"x": ["N", 4, 9]}, weights={"w": w, "b": b}, ir=ir)
        net = OnnxModel(model, [x])
        ((layer,), left_out) = net.layers, net.left_out
        assert (layer.name, layer.times, left_out) == ("first", 2, {})
        f = lr.channel_svd(layer.conv, rank=2)
        a, c = next(net.inputs(["first"], {}))["first"]
        np.testing.assert_array_equal(a, x)
        np.testing.assert_allclose(c, layer.conv(x), **CLOSE)
        new = net.replaced({"first": f})
        params = sum(math.prod(t.dims) for t in new.graph.initializer)
        assert params == f.params
        assert not {"w", "b"} & {t.name for t in (*new.graph.initializer, *new.graph.input)}
        np.testing.assert_allclose(ran(new, x=x)[0], f(f(x)), **CLOSE)
        np.testing.assert_allclose(next(net.outputs({"first": f}))[0], f(f(x)), **CLOSE)


OTHERS = {
    "pads": {"node": helper.make_node("Conv", ["1", "w"], ["y"], "other", pads=[1, 1])},
    "bias": {"node": helper.make_node("Conv", ["1", "w", "b"], ["y"], "other")},
    "another operator": {"node": helper.make_node("Mul", ["1", "m"], ["y"], "other")},
    "an output": {"node": helper.make_node("Mul", ["w", "x1"], ["y"], "other")},
}


@pytest.mark.parametrize("what", OTHERS)
def test_weights_shared_with_something_else_stay(rng, what):
    w, b = arrays(rng, (4, 4, 3), (4,))
    nodes = [
        helper.make_node("ReduceMax", ["w"], ["m"], keepdims=1),
        helper.make_node("ReduceMax", ["x"], ["x1"], keepdims=1),
        helper.make_node("Conv", ["x", "w"], ["1"], "conv"),
        OTHERS[what]["node"],
        helper.make_node("Conv", ["1", "v"], ["z"], "last"),
    ]
    weights = {"w": w, "b": b, "v": w}
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, ("y", "z"), weights))
    assert [x.name for x in net.layers] == ["last"]
    assert net.left_out["conv"] == "its weight is shared with other"


def test_layers_in_bodies_are_named(rng):
    w, x = arrays(rng, (4, 4, 3), (2, 4, 9))
    then = helper.make_graph([helper.make_node("Identity", ["1"], ["t"])], "then", [],
                             [helper.make_tensor_value_info("t", 1, None)])  # fmt: skip
    other = helper.make_graph([helper.make_node("Conv", ["1", "u"], ["e"], "inner")], "else", [],
                              [helper.make_tensor_value_info("e", 1, None)])  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["1"], "conv"),
        helper.make_node("If", ["c"], ["2"], "if", then_branch=then, else_branch=other),
        helper.make_node("Conv", ["2", "v"], ["y"], "last"),
    ]
    weights = {"w": w, "v": w, "u": w, "c": np.array(False)}
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, weights=weights), [x])
    assert [n.name for n in net.layers] == ["conv", "last"]
    assert net.left_out == {"if/inner": "it is in the body of the If 'if'"}
    f = lr.channel_svd(net.layers[0].conv, rank=2)
    new = net.replaced({"conv": f})
    conv = net.layers[0].conv
    np.testing.assert_allclose(ran(new, x=x)[0], conv(conv(f(x))), **CLOSE)
    np.testing.assert_allclose(next(net.inputs(["last"], {"conv": f}))["last"][0], conv(f(x)),
                               **CLOSE)  # fmt: skip
    weights["u"] = weights.pop("w")  # that of the first layer, too
    nodes[0].input[1] = "u"
    net = OnnxModel(model_of(nodes, {"x": ["N", 4, 9]}, weights=weights), [x])
    assert net.left_out["conv"] == "its weight is shared with if"


def test_layers_in_loops_and_local_functions(rng):
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        net (float[N, 4, 9] x) => (float[N, 4, 9] y)
        <float[4, 4, 3] w, float[4, 4, 3] v, int64 trips = {2}, bool go = {1}> {
            a = own.padded(x, w)
            y = Loop(trips, go, a) <body = g (int64 i, bool c, float[N, 4, 9] s)
                => (bool d, float[N, 4, 9] t) { d = Identity(c)
                [step] t = Conv <pads = [1, 1]> (s, v) }>
        }
        <domain: "own", opset_import: ["" : 17]>
        padded (z, k) => (o) { [inner] o = Conv <pads = [1, 1]> (z, k) }""")
    w, v, x = arrays(rng, (4, 4, 3), (4, 4, 3), (2, 4, 9))
    model.graph.initializer.extend(
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")]
    )
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name != "x":
            del model.graph.input[i]
    net = OnnxModel(model, [x])
    ((layer,), (left,)) = net.layers, net.left_out.items()
    np.testing.assert_array_equal(layer.conv.to_dense(), w)
    assert left[0].endswith("/step")
    assert "in the body of the Loop" in left[1]
    new = net.replaced({layer.name: lr.channel_svd(layer.conv, 4)})
    np.testing.assert_allclose(ran(new, x=x)[0], ran(model, x=x)[0], **CLOSE)


def behind(what, rng):
    """Return the weight of a convolution, the nodes that compute it, and their constants."""
    w = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    q = np.clip(np.round(w / 0.02), -128, 127).astype(np.int8)
    node = helper.make_node
    scales = np.linspace(0.01, 0.02, 6).astype(np.float32)
    folded = numpy_helper.from_array(w.reshape(6, -1))
    blocks = rng.uniform(0.01, 0.02, (6, 2, 3, 3)).astype(np.float32)
    gains = scales[:, None, None, None]
    return {
        "DequantizeLinear": (
            q * np.float32(0.02),
            [node("DequantizeLinear", ["q", "s", "z"], ["w"])],
            {"q": q, "s": np.float32(0.02), "z": np.int8(0)},
        ),
        "DequantizeLinear by channel": (
            ((q // 2).astype(np.float32) - 1) * scales[:, None, None, None],
            [node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0)],
            {"q": q // 2, "s": scales, "z": np.ones(6, np.int8)},
        ),
        "Cast": (
            w.astype(np.float16).astype(np.float32),
            [node("Cast", ["h"], ["w"], to=TensorProto.FLOAT)],
            {"h": w.astype(np.float16)},
        ),
        "Cast of bfloat16": (
            w.astype(ml_dtypes.bfloat16).astype(np.float32),
            [node("Cast", ["h"], ["w"], to=TensorProto.FLOAT)],
            {"h": w.astype(ml_dtypes.bfloat16)},
        ),
        "Transpose and Identity": (
            w,
            [node("Transpose", ["t"], ["i"], perm=[3, 2, 0, 1]), node("Identity", ["i"], ["w"])],
            {"t": w.transpose(2, 3, 1, 0)},
        ),
        "Constant and Reshape": (
            w,
            [
                node("Constant", [], ["c"], value=folded),
                node("Reshape", ["c", "to"], ["w"]),
            ],
            {"to": np.array([6, 4, 3, 3])},
        ),
        "DequantizeLinear by block": (
            (q.reshape(6, 2, 2, 3, 3) * blocks[:, :, None]).reshape(w.shape),
            [node("DequantizeLinear", ["q", "s"], ["w"], axis=1, block_size=2)],
            {"q": q, "s": blocks},
        ),
        "DequantizeLinear of 4 bits": (
            (q // 16) * np.float32(0.3),
            [node("DequantizeLinear", ["q", "s"], ["w"])],
            {"q": (q // 16).astype(ml_dtypes.int4), "s": np.float32(0.3)},
        ),
        "DequantizeLinear of 8-bit floats": (
            w.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.5),
            [node("DequantizeLinear", ["q", "s"], ["w"])],
            {"q": w.astype(ml_dtypes.float8_e4m3fn), "s": np.float32(0.5)},
        ),
        "QuantizeLinear and back": (
            q * np.float32(0.02),
            [
                node("QuantizeLinear", ["f", "s", "z"], ["q"]),
                node("DequantizeLinear", ["q", "s", "z"], ["w"]),
            ],
            {"f": q * np.float32(0.02), "s": np.float32(0.02), "z": np.int8(0)},
        ),
        "Slice and Unsqueeze": (
            w[:, :, :1],
            [
                node("Slice", ["t", "from", "to", "axes"], ["u"]),
                node("Unsqueeze", ["u", "last"], ["w"]),
            ],
            {
                "t": np.concatenate([w[:, :, 0], w[:, :, 0]]), "from": np.array([6]),
                "to": np.array([12]), "axes": np.array([0]), "last": np.array([2]),
            },
        ),
        "ConstantOfShape": (
            np.full((6, 4, 3, 3), 0.25, np.float32),
            [
                node("ConstantOfShape", ["n"], ["w"],
                     value=numpy_helper.from_array(np.float32([0.25]))),
            ],
            {"n": np.array([6, 4, 3, 3])},
        ),
        "Expand of a Constant of numbers": (
            np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None, None], (6, 4, 3, 3)),
            [
                node("Constant", [], ["c"], value_floats=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
                node("Reshape", ["c", "tall"], ["r"]),
                node("Expand", ["r", "n"], ["w"]),
            ],
            {"tall": np.array([6, 1, 1, 1]), "n": np.array([6, 4, 3, 3])},
        ),
        "weight normalization": (
            w / np.sqrt(np.square(w).sum((1, 2, 3), keepdims=True)) * gains,
            [
                node("Mul", ["v", "v"], ["v2"]),
                node("ReduceSum", ["v2", "axes"], ["n2"]),
                node("Sqrt", ["n2"], ["n"]),
                node("Div", ["v", "n"], ["u"]),
                node("Mul", ["u", "g"], ["w"]),
            ],
            {"v": w, "g": gains, "axes": np.array([1, 2, 3])},
        ),
        "Concat and Mul": (
            2 * w,
            [node("Concat", ["a", "b"], ["c"], axis=0), node("Add", ["c", "c"], ["w"])],
            {"a": w[:2], "b": w[2:]},
        ),
    }[what]  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        "DequantizeLinear", "DequantizeLinear by channel", "Cast", "Cast of bfloat16",
        "Transpose and Identity", "Constant and Reshape", "Concat and Mul",
        "DequantizeLinear by block", "DequantizeLinear of 4 bits",
        "DequantizeLinear of 8-bit floats", "QuantizeLinear and back", "Slice and Unsqueeze",
        "ConstantOfShape", "Expand of a Constant of numbers", "weight normalization",
    ],
)  # fmt: skip
def test_weights_behind_other_nodes(rng, tmp_path, what):
    weight, nodes, constants = behind(what, rng)
    (x,) = arrays(rng, (2, 4, 7, 7))
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    newer = any(t in what for t in ("block", "bits", "8-bit"))
    opset = {"opset": 21, "ir": 10} if newer else {}
    model = model_of([*nodes, conv], {"x": ["N", 4, 7, 7]}, weights=constants, **opset)
    net = OnnxModel(model, [x])
    (layer,) = net.layers
    np.testing.assert_allclose(layer.conv.to_dense(), weight, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(next(net.outputs({}))[0], layer.conv(x), **CLOSE)
    f = lr.channel_svd(layer.conv, 3)
    new = net.replaced({"conv": f})
    assert [n.op_type for n in new.graph.node] == ["Conv", "Conv"]
    assert new.graph.input == model.graph.input
    assert sum(math.prod(t.dims) for t in new.graph.initializer) == f.params
    np.testing.assert_allclose(ran(new, x=x)[0], f(x), **CLOSE)
    # the same from a file with external data
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    (again,) = open_model(path).layers
    np.testing.assert_array_equal(again.conv.to_dense(), layer.conv.to_dense())


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_types_without_kernels_of_onnxruntime_are_run_elsewhere(rng, kind):
    dtype = np.dtype(kind) if kind == "float64" else np.dtype(ml_dtypes.bfloat16)
    w, b, v, x = (
        a.astype(dtype) for a in arrays(rng, (8, 6, 3, 3), (8,), (4, 8, 3, 3), (2, 6, 9, 9))
    )
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["1"], "first"),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "v"], ["y"], "last"),
    ]
    number = helper.np_dtype_to_tensor_dtype(dtype)
    model = model_of(
        nodes, {"x": ["N", 6, 9, 9]}, weights={"w": w, "b": b, "v": v}, kind=number, opset=22, ir=10
    )
    net = OnnxModel(model, [x])
    assert [y.conv.dtype for y in net.layers] == [np.float32 if kind == "bfloat16" else dtype] * 2
    with pytest.warns(UserWarning, match="onnxruntime does not load.*reference evaluator"):
        (batch,) = net.inputs(["first", "last"], {})
    first = net.layers[0].conv
    tolerance = 1e-6 if kind == "float64" else 0.1  # 8 bits of sums of magnitude 10
    np.testing.assert_allclose(
        batch["last"][0], np.maximum(first(x.astype(first.dtype)), 0), rtol=0, atol=tolerance
    )
    f = lr.channel_svd(net.layers[1].conv, 4)
    new = net.replaced({"last": f})
    assert {t.data_type for t in new.graph.initializer} == {number}
    with pytest.warns(UserWarning, match="reference evaluator"):
        ((found,),) = net.outputs({"last": f})
    np.testing.assert_allclose(
        found, f(batch["last"][0].astype(f.dtype)), rtol=0, atol=8 * tolerance
    )
    assert net.gradients(["last"], 0) is None
    with pytest.raises(ValueError, match="onnxruntime does not load"):
        net.call({}, "onnxruntime", 2, 1)


def test_outputs_without_a_shape(rng, tmp_path):
    model, x = small_net(rng)
    expected = ran(model, x=x)[0]
    for forget in ("shape", "type"):
        if forget == "shape":
            model.graph.output[0].type.tensor_type.ClearField("shape")
        else:
            model.graph.output[0].ClearField("type")
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        net = open_model(tmp_path / "net.onnx", [x])
        np.testing.assert_array_equal(next(net.outputs({}))[0], expected)
        new = net.replaced({"conv": lr.channel_svd(net.layers[0].conv, 6)})
        save(new, tmp_path / "new.onnx")
        again = open_model(tmp_path / "new.onnx", [x])
        np.testing.assert_allclose(next(again.outputs({}))[0], expected, **CLOSE)


def test_other_layers_are_named(rng):
    w, x = arrays(rng, (4, 3, 3, 3), (1, 3, 8, 8))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["1"], "same", strides=[2, 2], auto_pad="SAME_UPPER"),
        helper.make_node("Transpose", ["1"], ["2"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["m", "2"], ["3"], "first factor"),
        helper.make_node("MatMul", ["2", "t"], ["4"], "many"),
        helper.make_node("MatMul", ["2", "f"], ["y"], "last"),
    ]
    weights = {
        "w": w, "m": np.ones((1, 1), np.float32), "t": np.ones((1, 1, 4, 4), np.float32),
        "f": np.ones((4, 5), np.float32),
    }  # fmt: skip
    shape = {"x": ["N", 3, "h", 8]}
    net = OnnxModel(model_of(nodes, shape, ("y",), weights), [x])
    assert [y.name for y in net.layers] == ["last"]
    assert "depends on the input size" in net.left_out["same"]
    assert net.left_out["first factor"] == "its weight is the first factor"
    assert "shape (1, 1, 4, 4)" in net.left_out["many"]


def test_chains_that_do_not_fit_are_refused(rng):
    model, _ = small_net(rng)
    net = OnnxModel(model)
    conv = net.layers[0].conv
    with pytest.raises(ValueError, match="no layer 'conv9' among conv, 4, y"):
        net.replaced({"conv9": conv})
    with pytest.raises(ValueError, match=r"'conv'.*\(6, 8, 8\), got \(6, 6, 6\)"):
        net.replaced({"conv": lr.dense(conv.to_dense())})
    with pytest.raises(ValueError, match="layer 'conv': input_shape must be"):
        net.replaced({"conv": net.layers[1].conv})
    with pytest.raises(TypeError, match="must be a Factorization"):
        net.replaced({"conv": conv.to_dense()})


def test_old_opsets_and_networks_without_layers_are_refused(rng):
    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(ValueError, match="has no Conv, ConvTranspose, Gemm or MatMul"):
        OnnxModel(model_of([relu], {"x": ["N", 3]}))
    with pytest.raises(ValueError, match=r"opset.*at least 7.*got 6"):
        OnnxModel(model_of([relu], {"x": ["N", 3]}, opset=6))


def test_layer_with_nan_weights_is_named(rng):
    w = np.full((4, 3, 3), np.nan, np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    with pytest.raises(ValueError, match=r"layer 'conv'.*NaN"):
        OnnxModel(model_of([node], {"x": ["N", 3, 9]}, weights={"w": w}))


def test_conformance_cases_of_onnx(data):
    with np.load(data / "conformance" / "onnx_conv_cases.npz") as cases:
        manifest = json.loads(str(cases["manifest"]))
        for case in manifest:
            names = ["x", "w", "b"] if case["bias"] else ["x", "w"]
            values = {k: cases[f"{case['i']}.{k}"] for k in (*names, "y")}
            x, y = values["x"], values["y"]
            node = helper.make_node(case["op"], names, ["y"], "layer", **case["attrs"])
            weights = {k: values[k] for k in names[1:]}
            model = model_of([node], {"x": ["N", *x.shape[1:]]}, weights=weights)
            net = OnnxModel(model, [x])
            conv = net.layers[0].conv
            np.testing.assert_allclose(conv(x), y, **CLOSE, err_msg=case["name"])
            for f in itertools.islice(chains_of(conv), 6):
                got = ran(net.replaced({"layer": f}), x=x)[0]
                np.testing.assert_allclose(got, f(x), **CLOSE, err_msg=case["name"])
    assert len(manifest) == 14
