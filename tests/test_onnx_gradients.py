"""Gradients of ONNX networks against differences of onnxruntime's outputs."""

from dataclasses import replace

import numpy as np
import pytest

from lowrank import compress

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from onnx import helper  # noqa: E402
from onnx_models import arrays, model_of, ran, small_net  # noqa: E402

from lowrank.interop.onnx import OnnxModel  # noqa: E402

#: Operators behind a convolution with output "c" of shape (3, 4, 6, 8), its constants and
#: attributes.
AFTER = {
    "Conv": ([(6, 2, 3, 3), (6,)], {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 2}),
    "Conv dilated": ([(2, 4, 2, 3)], {"dilations": [2, 1]}),
    "ConvTranspose": (
        [(4, 3, 3, 3), (3,)], {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 1]},
    ),
    "BatchNormalization": ([(4,), (4,), (4,), np.arange(1, 5)], {}),
    "InstanceNormalization": ([(4,), (4,)], {}),
    "Relu": ([], {}),
    "LeakyRelu": ([], {"alpha": 0.3}),
    "Elu": ([], {"alpha": 0.7}),
    "Clip": ([np.float32(0), np.float32(0.8)], {}),
    "HardSwish": ([], {}),
    "HardSigmoid": ([], {"alpha": 1 / 6}),
    "Sigmoid": ([], {}),
    "Tanh": ([], {}),
    "Erf": ([], {}),
    "Exp": ([], {}),
    "Pow": ([np.float32(2)], {}),
    "Mul": ([(4, 1, 1)], {}),
    "Sub": ([(4, 6, 8)], {}),
    "MatMul": ([(8, 5)], {}),
    "MaxPool": ([], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "MaxPool dilated": ([], {"kernel_shape": [2, 2], "dilations": [2, 1], "pads": [1, 0, 0, 1]}),
    "AveragePool": ([], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "strides": [2, 1]}),
    "AveragePool counted": (
        [], {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2], "count_include_pad": 1},
    ),
    "GlobalAveragePool": ([], {}),
    "GlobalMaxPool": ([], {}),
    "ReduceMean": ([], {"axes": [3]}),
    "Pad": ([np.array([0, 0, 1, 2, 0, 0, 0, 1])], {}),
    "Pad reflected": ([np.array([0, 0, 1, 2, 0, 0, 2, 1])], {"mode": "reflect"}),
    "Pad of channels": ([np.array([0, 1, 0, 0, 0, 2, 0, 0])], {}),
    "Resize": ([np.float32([]), np.float32([1, 1, 2, 3])], {}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "DepthToSpace by columns": ([], {"blocksize": 2, "mode": "CRD"}),
    "Flatten": ([], {}),
    "Transpose": ([], {"perm": [0, 2, 1, 3]}),
    "Slice": ([np.array([1]), np.array([4]), np.array([3])], {}),
    "Slice of channels": ([np.array([1]), np.array([3]), np.array([1])], {}),
}  # fmt: skip


def convolution(rng, nodes, outputs=("y",), **weights):
    """Return a model of a convolution from "x" to "c" and other nodes, and an input."""
    w, x = arrays(rng, (4, 3, 1, 3), (3, 3, 6, 10))
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), *nodes]
    return model_of(nodes, {"x": ["N", 3, 6, 10]}, outputs, {"w": w} | weights), x


def check(model, x, seed=5):
    """Compare the derivative along a change of the layer "c" with a difference quotient."""
    net = OnnxModel(model, [x])
    (found,) = next(net.gradients(["c"], seed))["c"]
    conv = net.layers[0].conv
    (stage,) = conv.stages
    (change,) = arrays(np.random.default_rng(1), stage.weight.shape)
    step = 2e-4  # float32 leaves two digits of the difference, and few maxima change places

    def loss(share):
        moved = replace(stage, weight=stage.weight + np.float32(share * step) * change)
        outputs = ran(net.replaced({"c": replace(conv, stages=(moved,))}), x=x)
        random = torch.Generator().manual_seed(seed)
        return sum(
            float((torch.tensor(y).double() * torch.randn(y.shape, generator=random)).sum())
            for y in outputs
        )

    moves = replace(conv, stages=(replace(stage, weight=change),), bias=None)(x)
    assert found.shape == moves.shape
    want = (loss(1) - loss(-1)) / (2 * step)
    terms = found.astype(np.float64) * moves
    # The sum of thousands of terms of either sign cancels to about the root of their squares.
    assert terms.sum() == pytest.approx(want, abs=0.02 * np.sqrt(np.square(terms).sum()))


@pytest.mark.parametrize("name", AFTER)
def test_gradients_are_limits_of_differences(rng, name):
    constants, attributes = AFTER[name]
    weights = {
        f"k{i}": arrays(rng, v)[0] if isinstance(v, tuple) else np.asarray(v)
        for i, v in enumerate(constants)
    }
    if name == "BatchNormalization":
        weights["k3"] = weights["k3"].astype(np.float32)
    names = list(weights)
    if name == "Resize":
        names = ["", *names[1:]]
        del weights["k0"]
    node = helper.make_node(name.split()[0], ["c", *names], ["y"], **attributes)
    model, x = convolution(rng, [node], **weights)
    check(model, x)


def test_branches_meet(rng):
    nodes = [
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Sigmoid", ["c"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("Mul", ["d", "c"], ["e"]),
        helper.make_node("Concat", ["e", "a"], ["f"], axis=1),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", "v"], ["i"]),
        helper.make_node("Softmax", ["i"], ["y"]),
    ]
    (v,) = arrays(rng, (8, 5))
    check(*convolution(rng, nodes, ("y", "d"), v=v))


def test_layers_behind_each_other_are_seen_in_one_run(rng):
    model, x = small_net(rng)
    net = OnnxModel(model, [x, x[:2]])
    names = [layer.name for layer in net.layers]
    for batch, found in zip((5, 2), net.gradients(names, 0)):
        shapes = {k: g.shape for k, (g,) in found.items()}
        assert shapes == {"conv": (batch, 6, 8, 8), "4": (batch, 6, 8, 8), "y": (batch, 4, 1)}
        assert all(g.any() for (g,) in found.values())
    plan = compress.make_plan(net, macs=0.6)
    assert plan.about["gradients"]


def test_networks_that_are_not_differentiated_have_no_gradients(rng, monkeypatch):
    model, x = convolution(rng, [helper.make_node("Round", ["c"], ["y"])])
    net = OnnxModel(model, [x])
    assert net.gradients(["c"], 0) is None
    assert not compress.make_plan(net, macs=0.9).about["gradients"]
    model, x = small_net(rng)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert OnnxModel(model, [x]).gradients(["conv"], 0) is None
