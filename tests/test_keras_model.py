"""Keras models: layers, their samples, and chains written as Keras layers, run by Keras."""

import numpy as np
import pytest
from keras_models import MODELS, L, full, keras, make

import lowrank as lr
from lowrank.compress import compress_model, make_plan
from lowrank.families import NotApplicable, applicable
from lowrank.interop.files import read_layers
from lowrank.interop.keras import KerasModel, save

ROUNDING = 1e-5  # float32 weights of up to three stages, some ten layers deep


def relative(a, b):
    """Return the largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return abs(a - b).max() / abs(b).max()


def test_layers_of_a_functional_model(rng):
    model, _ = make("planar", rng)
    net = KerasModel(model)
    found = {x.name: (x.conv.stages[0].weight.shape, x.input_size, x.times) for x in net.layers}
    assert found == {
        "c1": ((8, 3, 3, 3), (17, 19), 1),
        "dw": ((16, 1, 3, 3), (9, 10), 1),
        "shared": ((16, 16, 3, 5), (9, 10), 2),
        "dil": ((12, 48, 3, 3), (9, 10), 1),
        "one": ((12, 48, 1, 1), (9, 10), 1),
        "up": ((12, 6, 3, 3), (9, 10), 1),
        "up2": ((6, 6, 5, 5), (18, 20), 1),
        "inner/g": ((6, 3, 3, 2), (56, 43), 1),
        "inner/h": ((8, 6, 5, 4), (54, 42), 1),
        "inner/k": ((8, 6, 3, 3), (54, 42), 1),
        "fc": ((5, 8, 1), (1,), 1),
    }
    by_name = {x.name: x for x in net.layers}
    # TensorFlow's SAME for stride 2: the odd sample at the end
    assert by_name["c1"].conv.geometry.padding == ((1, 1), (1, 1))
    assert by_name["inner/h"].conv.geometry.padding == ((1, 2), (1, 1))
    assert by_name["up"].conv.output_shape((9, 10)) == (6, 18, 20)
    assert by_name["dw"].conv.groups == 8
    assert len(net.chains["sep"].stages) == 2
    assert list(net.left_out) == ["sep"]
    norm = model.get_layer("inner").get_layer("bn2")
    gamma, _, _, variance = norm.get_weights()
    np.testing.assert_allclose(by_name["inner/g"].scale, gamma / np.sqrt(variance + 0.01), 1e-6)
    assert [x.name for x in net.layers if x.scale is not None] == ["inner/g"]


@pytest.mark.parametrize("which", MODELS)
def test_layers_compute_the_outputs_of_keras(rng, which):
    """Run every layer in lowrank on its input in Keras; the gradient at it agrees in shape."""
    model, x = make(which, rng)
    net = KerasModel(model, calibration=[x])
    names = [layer.name for layer in net.layers]
    (inputs,), (gradients,) = list(net.inputs(names, {})), list(net.gradients(names, 0))
    outputs = {}
    for name, layer in net._keras.items():
        own = layer.activation
        layer.activation = lambda y, name=name: outputs.setdefault(name, []).append(y) or y
        model(x)
        layer.activation = own
    for layer in net.layers:
        name = layer.name
        assert len(inputs[name]) == len(gradients[name]) == layer.times
        for sample, gradient, y in zip(inputs[name], gradients[name], outputs[name], strict=True):
            assert sample.shape[2:] == layer.input_size
            found, y = layer.conv(sample), keras.ops.convert_to_numpy(y)
            assert found.shape == gradient.shape
            assert abs(gradient).max() > 0
            if layer.conv.ndim > 1 and which != "first":
                y = np.moveaxis(y, -1, 1)
            # EinsumDense may transpose its output: the values are compared in order of size
            np.testing.assert_allclose(
                np.sort(found, None), np.sort(y, None), rtol=0, atol=ROUNDING * abs(y).max()
            )


EXACT = {
    "identity": lambda f: f,
    "channel_svd output": lambda f: full(lr.channel_svd, f, variant="output"),
    "channel_svd input": lambda f: full(
        lr.channel_svd, f, variant=applicable(f).get("channel_svd", ("output",))[-1]
    ),
    "spatial_svd": lambda f: full(lr.spatial_svd, f),
    "spatial_svd reversed": lambda f: full(
        lr.spatial_svd, f, **{2: {"variant": "w-h"}, 3: {"variant": "w-dh"}}.get(f.ndim, {})
    ),
    "network_decoupling": lambda f: full(lr.network_decoupling, f, variant="dw-pw"),
    "network_decoupling reversed": lambda f: full(
        lr.network_decoupling, f, variant="pw-dw" if f.groups < 8 else "dw-pw"
    ),
    "filter_basis": lambda f: full(lr.filter_basis, f),
    "tucker": lambda f: lr.tucker(f, per_group(f)),
}
LOW = {
    "kronecker": lambda f: lr.kronecker(f, 1),
    "cp": lambda f: lr.cp(f, 2),
    "tucker_cp": lambda f: lr.tucker_cp(f, (2, 2, 2)),
    "tensor_train": lambda f: lr.tensor_train(f, (2,) * (1 + f.ndim)),
}
#: Layers that every family must factor, by model; linear layers have no spatial factors.
MUST = {
    "planar": {"c1", "inner/h"}, "linear": {"a", "b"}, "solid": {"a", "b"}, "first": {"a", "b"},
    "attention": {"heads", "fc"}, "video": {"each/conv", "frames/net/c"},
}  # fmt: skip
FOR_MATRICES = ("identity", "channel_svd output", "channel_svd input")
NOTHING = {
    ("linear", "spatial_svd"),
    ("linear", "spatial_svd reversed"),
    *((w, "kronecker") for w in ("solid", "first", "video")),
}


def cases(table):
    return [
        (w, f)
        for w in MODELS
        for f in table
        if (w, f) not in NOTHING and (w != "attention" or f in FOR_MATRICES)
    ]


def per_group(f):
    (stage,) = f.stages
    return stage.weight.shape[0] // stage.groups, stage.weight.shape[1]


def applicable_chains(net, family, must):
    """Return chains for all layers to which the family applies and that Keras can express."""
    chains = {}
    for x in net.layers:
        try:
            f = family(x.conv)
        except NotApplicable:
            continue
        try:
            net.replaced({x.name: f})
        except ValueError as why:
            assert "Keras has no" in str(why)  # noqa: PT017
            assert f.stages[0].transposed or f.family == "kronecker"
            continue
        chains[x.name] = f
    assert chains.keys() >= must
    return chains


@pytest.mark.parametrize(("which", "family"), cases(EXACT))
def test_exact_chains_keep_the_outputs(tmp_path, rng, which, family):
    model, x = make(which, rng)
    expected = model.predict(x, verbose=0)
    net = KerasModel(model, calibration=[x])
    chains = applicable_chains(net, EXACT[family], MUST[which])
    (found,) = next(net.outputs(chains))
    assert relative(found, expected) < ROUNDING
    new = net.replaced(chains)
    assert relative(new.predict(x, verbose=0), expected) < ROUNDING
    assert relative(model.predict(x, verbose=0), expected) == 0
    # Keras does not load operations such as 2 * x from its older format
    for ending in ("keras",) if which == "first" else ("keras", "h5"):
        save(new, tmp_path / f"out.{ending}")
        again = keras.saving.load_model(tmp_path / f"out.{ending}", compile=False)
        assert relative(again.predict(x, verbose=0), expected) < ROUNDING
        left = KerasModel(again).left_out
        assert left.keys() <= {*KerasModel(model).left_out, *_separable(again)}


def _separable(model, prefix=""):
    for layer in getattr(model, "layers", ()):
        if type(layer).__name__.startswith("Separable"):
            yield f"{prefix}{layer.name}"
        inner = layer.layer if isinstance(layer, L.TimeDistributed) else layer
        yield from _separable(inner, f"{prefix}{layer.name}/")
        if inner is not layer:
            yield from _separable(inner, f"{prefix}{layer.name}/{inner.name}/")
            if type(inner).__name__.startswith("Separable"):
                yield f"{prefix}{layer.name}/{inner.name}"


@pytest.mark.parametrize(("which", "family"), cases(LOW))
def test_low_rank_chains_equal_their_dense_kernels(rng, which, family):
    """Compare low ranks, tied and transposed stages with the model of their dense kernels."""
    model, x = make(which, rng)
    net = KerasModel(model, calibration=[x])
    chains = applicable_chains(net, LOW[family], MUST[which])
    found = net.replaced(chains).predict(x, verbose=0)
    for name, f in chains.items():
        layer, kernel = net._keras[name], f.to_dense()
        old, *bias = layer.get_weights()
        if type(layer).__name__.startswith("Depthwise"):
            kernel = kernel.reshape(old.shape[-2], old.shape[-1], *kernel.shape[2:])
            kernel = np.moveaxis(kernel, (0, 1), (-2, -1))
        else:
            kernel = np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(old.shape)
        layer.set_weights([kernel, *bias])
    assert relative(found, model.predict(x, verbose=0)) < ROUNDING


def test_depthwise_and_pointwise_stages_become_a_separable_layer(rng):
    model, _ = make("planar", rng)
    net = KerasModel(model)
    by_name = {x.name: x.conv for x in net.layers}
    chains = {n: lr.network_decoupling(by_name[n], 1, "dw-pw") for n in ("c1", "dil", "inner/h")}
    new = net.replaced(chains)
    for name in ("c1", "dil"):
        layer = new.get_layer(name)
        assert type(layer) is L.SeparableConv2D
        assert (layer.depth_multiplier, layer.padding) == (1, "same")
    assert new.get_layer("c1").activation is keras.activations.relu
    assert type(new.get_layer("inner").get_layer("h")) is L.SeparableConv2D
    assert set(KerasModel(new).chains) == {*chains, "sep"}


def test_only_the_last_layer_has_bias_and_activation(rng):
    model, _ = make("planar", rng)
    net = KerasModel(model)
    new = net.replaced({"c1": lr.spatial_svd(net.layers[0].conv, 2)})
    before, after = new.get_layer("c1_0"), new.get_layer("c1")
    assert (before.use_bias, before.activation) == (False, keras.activations.linear)
    assert (after.use_bias, after.activation) == (True, keras.activations.relu)
    assert (before.strides, after.strides) == ((2, 1), (1, 2))


def handmade(name, rng):
    """Return a layer, stages without a Keras layer, and the classes made for them."""
    n = rng.standard_normal
    g = lr.Geometry.of
    return {
        # 9 x 10 to 18 x 20, cropped at the start instead of the end
        "crop": (
            "up",
            [lr.Stage(n((12, 6, 3, 3)), g(2, 2, [(1, 0), (1, 0)]), transposed=True)],
            ["Conv2DTranspose", "Cropping2D"],
        ),
        "more at the end": (
            "up",
            [lr.Stage(n((12, 6, 2, 1)), g(2, 2, 0, output_padding=(0, 1)), transposed=True)],
            ["Conv2DTranspose"],
        ),
        "transposed groups": (
            "up",
            [
                lr.Stage(n((12, 2, 1, 1)), g(2), 4, transposed=True),
                lr.Stage(n((8, 2, 2, 1)), g(2, (2, 1)), 2, transposed=True),
                lr.Stage(n((4, 6, 1, 2)), g(2, (1, 2)), transposed=True),
            ],
            ["Conv2D", "Conv2DTranspose", "Conv2DTranspose"],
        ),
        "zeros ahead": (
            "dil",
            [lr.Stage(n((12, 48, 2, 2)), g(2, padding=[(0, 1), (1, 0)]))],
            ["ZeroPadding2D", "Conv2D"],
        ),
        # TensorFlow's depthwise convolutions have one stride; Keras strides or dilates
        "one stride only": (
            "c1",
            [
                lr.Stage(n((3, 1, 3, 1)), g(2, (2, 1), [1, 0]), 3),
                lr.Stage(n((8, 3, 1, 2)), g(2, (1, 2), [0, (2, 0)], (1, 2))),
            ],
            ["Conv2D", "ZeroPadding2D", "Conv2D"],
        ),
        "shuffled": (
            "one",
            [lr.Stage(n((12, 24, 1, 1)), g(2), 2, shuffle=(2, 4))],
            ["Conv2D"],
        ),
        "tied": (
            "dil",
            [
                lr.Stage(n((1, 1, 3, 3)), g(2, padding=1), outer=6, inner=8),
                lr.Stage(n((2, 8, 1, 1)), g(2), outer=6),
            ],
            ["DepthwiseConv2D", "Conv2D"],
        ),
        "tied mixtures": (
            "dil",
            [lr.Stage(n((3, 12, 3, 3)), g(2, padding=1), outer=2, inner=2)],
            ["Conv2D"],
        ),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "crop", "more at the end", "transposed groups", "zeros ahead", "one stride only",
        "shuffled", "tied", "tied mixtures",
    ],
)  # fmt: skip
def test_stages_without_a_keras_layer_are_written_as_others(rng, name):
    model, x = make("planar", rng)
    replaced, stages, kinds = handmade(name, rng)
    net = KerasModel(model, calibration=[x])
    conv = next(x.conv for x in net.layers if x.name == replaced)
    f = lr.chain(stages, rng.standard_normal(conv.out_channels))
    new = net.replaced({replaced: f})
    old = {layer.name for layer in model.layers} - {replaced}
    made = [layer for layer in new.layers if layer.name not in old]
    assert [type(layer).__name__ for layer in made] == kinds
    ((sample,),) = next(net.inputs([replaced], {})).values()
    y = np.moveaxis(sample, 1, -1)
    for layer in made:
        y = layer(y)
    expected = np.moveaxis(f(sample), 1, -1)
    if conv.out_channels == 8 or replaced == "one":
        expected = np.maximum(expected, 0)
    assert relative(keras.ops.convert_to_numpy(y), expected) < ROUNDING


def test_chains_that_keras_cannot_express_are_refused(tmp_path, rng):
    model, _ = make("planar", rng)
    net = KerasModel(model)
    by_name = {x.name: x.conv for x in net.layers}
    with pytest.raises(ValueError, match=r"'up'.*Keras has no layers.*MACs"):
        net.replaced({"up": lr.network_decoupling(by_name["up"], 2)})
    g = lr.Geometry.of(2, padding=(2, 2), dilation=2, padding_mode="reflect")
    with pytest.raises(ValueError, match="pads with zeros"):
        net.replaced({"dil": lr.chain([lr.Stage(by_name["dil"].stages[0].weight, g)])})
    with pytest.raises(ValueError, match=r"ending must be.*\.keras"):
        save(model, tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="no layer 'x'"):
        next(net.inputs(["x"], {}))


@pytest.mark.parametrize("which", MODELS)
def test_calibrated_compression_lowers_the_error(rng, which):
    """Compress by half with and without the inputs of the model, which are of few dimensions."""
    model, x = make(which, rng)
    low = rng.standard_normal((4, x[0].size)).astype(np.float32)
    x = (rng.standard_normal((40, 4)).astype(np.float32) @ low).reshape(40, *x.shape[1:])
    expected = model.predict(x, verbose=0)
    errors = []
    for batches in (None, [x[:20], x[20:]]):
        net = KerasModel(model, calibration=batches)
        plan = make_plan(net, params=0.6, measure=False)
        result = compress_model(net, plan, timed=False)
        new = net.replaced(result.chains)
        assert new.count_params() < model.count_params()
        errors.append(np.linalg.norm(new.predict(x, verbose=0) - expected))
    assert errors[1] < 0.8 * errors[0]


def test_layers_that_cannot_be_replaced_are_named(rng):
    class Own(L.Conv2D):
        def call(self, x):
            return super().call(x) * 2

    x = inp = keras.Input((9, 9, 3))
    x = L.SpectralNormalization(L.Conv2D(4, 3, name="inside"), name="spectral")(x)
    x = Own(4, 3, name="own")(x)
    x = L.Reshape((25, 4))(x)
    x = L.MultiHeadAttention(2, 4, name="att")(x, x)
    x = L.EinsumDense("abc,bcd->abd", (25, 4), name="separate")(x)
    model = keras.Model(inp, L.Dense(6, name="fc")(x))
    model.get_layer("fc").enable_lora(2)
    net = KerasModel(model)
    assert net.layers == ()
    assert "SpectralNormalization runs its layers inside" in net.left_out["spectral"]
    assert "is a Conv2D with code of its own, of class Own" in net.left_out["own"]
    assert "MultiHeadAttention runs" in net.left_out["att"]
    assert "not a product of a matrix" in net.left_out["separate"]
    assert "LoRA" in net.left_out["fc"]


def test_models_with_code_of_their_own_are_refused(rng):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = L.Conv2D(4, 3)

        def call(self, x):
            return self.conv(x)

    class Doubled(keras.Model):
        def call(self, *args, **kwargs):
            return 2 * super().call(*args, **kwargs)

    model = Own()
    model(np.zeros((1, 9, 9, 3), np.float32))
    inp = keras.Input((9, 9, 3))
    for refused in (model, Doubled(inp, L.Conv2D(4, 3)(inp))):
        with pytest.raises(ValueError, match=r"class (Own|Doubled) with code of its own"):
            KerasModel(refused)
    with pytest.raises(TypeError, match=r"keras\.Model, got 3"):
        KerasModel(3)
    with pytest.raises(ValueError, match="not built"):
        KerasModel(keras.Sequential([L.Dense(3)]))


def test_subclasses_of_functional_models_are_cloned(rng):
    class Trained(keras.Model):
        """Functional model with another training step."""

        def train_step(self, *args):
            raise NotImplementedError

    inp = keras.Input((9, 9, 3))
    model = Trained(inp, L.Conv2D(4, 3, name="a")(inp), name="t")
    net = KerasModel(model)
    new = net.replaced({"a": lr.channel_svd(net.layers[0].conv, 2)})
    assert type(new) is Trained
    assert [x.name for x in new.layers[1:]] == ["a_0", "a"]


def test_sizes_that_the_model_leaves_open(rng):
    inp = keras.Input((None, None, 3))
    model = keras.Model(inp, L.Conv2D(4, 3, padding="same", strides=2, name="a")(inp))
    assert "has no fixed size" in KerasModel(model).left_out["a"]
    assert KerasModel(model, input_size=(9, 8)).layers[0].input_size == (9, 8)
    with pytest.raises(ValueError, match=r"input size must be 2 positive numbers.*got \(9, 8, 4\)"):
        KerasModel(model, input_size=(9, 8, 4))
    net = KerasModel(model, calibration=[np.zeros((2, 7, 6, 3), np.float32)])
    assert net.layers[0].input_size == (7, 6)
    new = net.replaced({"a": lr.spatial_svd(net.layers[0].conv, 2)})
    assert new.get_layer("a").padding == "same"  # for any size
    assert new.inputs[0].shape == (None, None, None, 3)


def test_layers_of_unknown_input_sizes_can_be_read(rng, tmp_path):
    inp = keras.Input((12, None, 2))
    x = L.Conv2D(4, 3, padding="same", name="same")(inp)
    x = L.Conv2D(4, (3, 5), padding="same", strides=2, name="strided")(x)
    x = L.Permute((2, 1, 3))(L.DepthwiseConv2D(3, name="dw")(x))
    x = L.TimeDistributed(L.Flatten())(x)
    x = L.TimeDistributed(L.Dense(6, name="mix"), name="td")(x)
    model = keras.Model(inp, L.EinsumDense("...x,xy->...y", 3, name="last")(x))
    net = KerasModel(model)
    assert net.layers == ()
    assert net.unsized.keys() == {"same", "dw", "td/mix"}
    remedy = "its input has no fixed size: give calibration data or the input size"
    assert set(net.left_out.values()) == {remedy}
    with pytest.raises(ValueError, match=f"got none \\(same, strided, .*{remedy}"):
        make_plan(net, macs=0.5)
    save(model, tmp_path / "net.keras")
    found = read_layers(tmp_path / "net.keras")
    assert {y.name: y.input_size for y in found.layers} == {
        "same": None,
        "dw": None,
        "td/mix": None,
    }
    assert found.left_out == {"strided": remedy, "last": remedy}
    sized = KerasModel(model, input_size=(15,))
    assert [(y.name, y.input_size) for y in sized.layers] == [
        ("same", (12, 15)), ("strided", (12, 15)), ("dw", (6, 8)), ("td/mix", (1,)), ("last", (6,)),
    ]  # fmt: skip
    assert [y.times for y in sized.layers] == [1, 1, 1, 6, 1]
    known = {y.name: y.conv for y in sized.layers}
    for name, f in net.unsized.items():
        assert (f.geometry, f.groups) == (known[name].geometry, known[name].groups)
        np.testing.assert_array_equal(f.to_dense(), known[name].to_dense())


class Doubled(L.Conv2D):
    def call(self, x):
        return 2 * super().call(x)


def test_macs_of_layers_that_stay(rng):
    inp = keras.Input((16, 16, 3))
    x = L.Conv2D(8, 3, name="conv")(inp)
    x = Doubled(6, 3, strides=2, name="own")(x)
    x = L.SeparableConv2D(8, 3, name="separable")(x)
    x = L.Reshape((16, 8))(x)
    x = L.LSTM(5, return_sequences=True, name="lstm")(x)
    x = L.Bidirectional(L.GRU(4, return_sequences=True), name="both")(x)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = L.TimeDistributed(L.SimpleRNN(2), name="td")(L.Reshape((4, 4, 8))(x))
    stacked = L.RNN([L.GRUCell(2), L.LSTMCell(2)], return_sequences=True, name="stacked")
    x = stacked(stacked(L.Dense(2, name="d")(x)))
    model = keras.Model(inp, L.Dense(3, name="last")(x))
    expected = {
        "own": 6 * 8 * 9 * 6 * 6,
        "separable": 4 * 4 * (9 * 6 + 6 * 8),
        "lstm": 16 * 4 * 5 * (8 + 5),
        "both": 2 * 16 * 3 * 4 * (5 + 4),
        "attention": 16 * 3 * 8 * 2 * 3 + 16 * 2 * 3 * 8,
        "td/simple_rnn": 4 * 4 * 2 * (8 + 2),
        "stacked": 2 * 4 * (3 * 2 * (2 + 2) + 4 * 2 * (2 + 2)),
    }
    for data in (None, [rng.random((3, 16, 16, 3), np.float32)]):
        net = KerasModel(model, calibration=data)
        assert [y.name for y in net.layers] == ["conv", "d", "last"]
        assert net.left_out.keys() == expected.keys()
        found = {n.rstrip("_0123456789"): m for n, m in net.left_out_macs.items()}
        assert found == expected
    plan = make_plan(net, macs=0.7, families=["channel_svd"], gradients=False)
    own = sum(y.cost.macs for y in net.layers)
    share = expected["own"] / (own + sum(expected.values()))
    assert f"own ({share:.1%} of the MACs): it is a Conv2D with code of its own" in repr(plan)
    assert "(70% of the layers in the table)" in repr(plan)


REQUESTS = [
    ({"conv3": ("tucker", (500, 8))}, ValueError, r"got \(500, 8\) \(layer conv3\)"),
    ({"conv3": ("tucker", 4)}, ValueError, r"2 numbers, got 4 \(layer conv3\)"),
    ({"conv3": ("channel_svd", 3, "up")}, ValueError, r"variant .* got 'up' \(layer conv3\)"),
    ({"fc": ("spatial_svd", 2)}, ValueError, r"\(layer fc\)"),
    ({"conv3": ("svd", 3)}, ValueError, r"family must be one of .* got 'svd' \(layer conv3\)"),
    ({"conv9": ("tucker", (2, 2))}, ValueError, r"\(conv3, fc\), got 'conv9'"),
    ({"own": ("tucker", (2, 2))}, ValueError, "can be replaced, got 'own': it is a Conv2D with"),
]


def requests_net():
    inp = keras.Input((9, 9, 8))
    x = L.Conv2D(8, 3, name="conv3")(inp)
    x = L.GlobalAveragePooling2D()(Doubled(6, 3, name="own")(x))
    return KerasModel(keras.Model(inp, L.Dense(5, name="fc")(x)))


@pytest.mark.parametrize(("requested", "kind", "words"), REQUESTS)
def test_impossible_requests_name_the_layer(requested, kind, words):
    with pytest.raises(kind, match=words) as caught:
        make_plan(requests_net(), layers=requested)
    assert "\n" not in str(caught.value)


def test_requested_ranks_are_fitted(rng):
    net = requests_net()
    done = compress_model(net, layers={"conv3": ("tucker", (6, 5)), "fc": ("channel_svd", 2)})
    assert {n: c.rank for n, c in done.plan.layers.items()} == {"conv3": (6, 5), "fc": (2,)}
    x = rng.random((2, 9, 9, 8), np.float32)
    (want,) = next(KerasModel(net._model, calibration=[x]).outputs(done.chains))
    got = np.asarray(keras.ops.convert_to_numpy(net.replaced(done.chains)(x)))
    np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING * np.abs(want).max())


def test_frozen_layers_stay_frozen_and_mixed_precision_mixed(rng):
    model, _ = make("planar", rng)
    model.get_layer("c1").trainable = False
    model.get_layer("inner").trainable = False
    net = KerasModel(model)
    by_name = {x.name: x.conv for x in net.layers}
    chains = {n: lr.channel_svd(by_name[n], 2) for n in ("c1", "inner/h")}
    new = net.replaced(chains)
    assert not new.get_layer("c1").trainable
    assert not new.get_layer("inner").trainable
    assert not new.get_layer("inner").get_layer("h_0").trainable
    assert new.get_layer("dil").trainable
    inp = keras.Input((9, 9, 3))
    y = L.Conv2D(8, 3, dtype="mixed_float16", name="a")(inp)
    model = keras.Model(inp, L.Dense(5, dtype="float32", name="b")(y))
    net = KerasModel(model, calibration=[rng.standard_normal((2, 9, 9, 3))])
    new = net.replaced({x.name: lr.channel_svd(x.conv, 2) for x in net.layers})
    assert new.get_layer("a_0").compute_dtype == new.get_layer("a").compute_dtype == "float16"
    assert new.get_layer("b_0").compute_dtype == "float32"
    assert next(net.inputs(["a", "b"], {}))["b"][0].dtype == np.float32
    assert next(net.gradients(["a", "b"], 0))["a"][0].dtype == np.float32


def test_quantized_layers_stay_and_inputs_may_be_given_by_name(rng):
    inp = keras.Input((9, 9, 3))
    x = L.Conv2D(8, 3, name="a")(inputs=inp)
    model = keras.Model(inp, L.Dense(5, name="c")(L.Dense(6, name="b")(inputs=x)))
    model.get_layer("c").quantize("int8")
    net = KerasModel(model, calibration=[rng.standard_normal((2, 9, 9, 3))])
    assert net.left_out == {"c": "it is quantized to int8"}
    chains = {x.name: lr.channel_svd(x.conv, 3) for x in net.layers}
    assert chains.keys() == {"a", "b"}
    y = net.replaced(chains).predict(net._feeds[0][net._inputs[0].name], verbose=0)
    assert relative(next(net.outputs(chains))[0], y) < ROUNDING


def test_models_of_several_inputs_and_outputs(tmp_path, rng):
    a, b = keras.Input((8, 3), name="a"), keras.Input((5,), name="b", dtype="int32")
    x = L.Conv1D(6, 3, name="c")(a)
    z = L.Dense(4, name="d")(L.Flatten()(L.Embedding(9, 8)(b)))
    model = keras.Model({"a": a, "b": b}, [x, z])
    data = {"a": rng.standard_normal((5, 8, 3)), "b": rng.integers(0, 9, (5, 5))}
    np.savez(tmp_path / "x.npz", **data)
    net = KerasModel(model, calibration=tmp_path / "x.npz")
    assert net.batches == 1
    assert {x.name for x in net.layers} == {"c", "d"}
    shapes = [y.shape for y in next(net.outputs({}))]
    assert shapes == [(5, 6, 6), (5, 4)]
    assert next(net.gradients(["c", "d"], 0))["d"][0].shape == (5, 4, 1)
    with pytest.raises(ValueError, match="'b'"):
        KerasModel(model, calibration=[{"a": data["a"]}])
