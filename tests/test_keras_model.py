"""Keras models: layers, and chains written as Keras layers, run by an interpreter and by Keras."""

import copy
import io
import os
import re
import zipfile

import numpy as np
import pytest

import lowrank as lr
from lowrank.families import NotApplicable, applicable

h5py = pytest.importorskip("h5py")

from keras_models import (  # noqa: E402
    MODELS,
    ROUNDING,
    SHAPES,
    compare,
    full,
    load,
    planar,
    run,
    write,
)  # fmt: skip

from lowrank.interop.keras import KerasModel  # noqa: E402


@pytest.fixture(params=["keras", "h5", "old.keras", "new.h5"])
def written(request, tmp_path, rng):
    """Return a function that writes a model in one format and returns its path and a new one."""

    def put(model):
        path = tmp_path / f"in.{request.param}"
        form = {"old.keras": 2, "new.h5": 3}.get(request.param)
        word = "_layer_checkpoint_dependencies" if form == 2 else "layers"
        write(path, model, form, word)
        return path, tmp_path / f"out{path.suffix}"

    return put


def test_layers_of_a_functional_model(written, rng):
    path, _ = written(planar(rng))
    net = KerasModel(path)
    found = {x.name: (x.conv.stages[0].weight.shape, x.input_size, x.times) for x in net.layers}
    assert found == {
        "c1": ((8, 3, 3, 3), (17, 19), 1),
        "dw": ((16, 1, 3, 3), (9, 10), 1),
        "shared": ((16, 16, 3, 5), (9, 10), 2),
        "dil": ((12, 32, 3, 3), (9, 10), 1),
        "one": ((12, 32, 1, 1), (9, 10), 1),
        "up": ((12, 6, 3, 3), (9, 10), 1),
        "inner/g": ((6, 3, 3, 2), (18, 20), 1),
        "inner/h": ((8, 6, 5, 4), (16, 19), 1),
        "fc": ((5, 8, 1), (1,), 1),
    }
    by_name = {x.name: x for x in net.layers}
    # TensorFlow's SAME for stride 2: the odd sample at the end
    assert by_name["c1"].conv.geometry.padding == ((1, 1), (1, 1))
    assert by_name["inner/h"].conv.geometry.padding == ((1, 2), (1, 2))
    assert by_name["up"].conv.output_shape((9, 10)) == (6, 18, 20)
    assert by_name["dw"].conv.groups == 8
    assert len(net.chains["sep"].stages) == 2
    assert list(net.left_out) == ["sep"]
    _, weights = load(path)
    gamma, _, _, variance = weights["bn2"]
    np.testing.assert_allclose(by_name["inner/g"].scale, gamma / np.sqrt(variance + 0.01), 1e-6)
    assert [x.name for x in net.layers if x.scale is not None] == ["inner/g"]


@pytest.mark.parametrize("which", MODELS)
def test_layers_compute_the_outputs_of_keras(written, rng, which):
    """Run every layer in lowrank on its input in the interpreter, and compare the outputs."""
    path, _ = written(MODELS[which](rng))
    net = KerasModel(path)
    convs = {x.name.split("/")[-1]: x.conv for x in net.layers} | net.chains
    seen = {}
    run(*load(path), rng.standard_normal((2, *SHAPES[which])), seen)
    assert convs.keys() <= seen.keys()
    for name, f in convs.items():
        x, y, activation = seen[name]
        if f.ndim == 1 and x.ndim == 2:
            x, y = x[:, None], y[:, None]
        got = np.moveaxis(f(np.moveaxis(x, -1, 1)), 1, -1)
        if activation == "relu":
            got = np.maximum(got, 0)
        np.testing.assert_allclose(got, y, rtol=0, atol=ROUNDING * abs(y).max())


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


#: Layers that every family must factor, and pairs of model and family without such layers.
MUST = {"planar": {"c1", "inner/h"}, "linear": {"a", "b"}, "solid": {"a", "b"}}


NOTHING = {("linear", "spatial_svd"), ("linear", "spatial_svd reversed"), ("solid", "kronecker")}


def cases(table):
    return [(w, f) for w in MODELS for f in table if (w, f) not in NOTHING]


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
            assert "Keras has no layers" in str(why)  # noqa: PT017
            assert f.stages[0].transposed or f.family == "kronecker"
            continue
        chains[x.name] = f
    assert chains.keys() >= must
    return chains


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize(("which", "family"), cases(EXACT))
def test_exact_chains_keep_the_outputs(tmp_path, rng, which, family, ending):
    path, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    write(path, MODELS[which](rng))
    net = KerasModel(path)
    net.replaced(applicable_chains(net, EXACT[family], MUST[which])).save(out)
    assert compare(path, out, rng.standard_normal((2, *SHAPES[which]))) < ROUNDING
    again = KerasModel(out)
    assert not {n for n, why in again.left_out.items() if "already" not in why}


@pytest.mark.parametrize(("which", "family"), cases(LOW))
def test_low_rank_chains_equal_their_dense_kernels(tmp_path, rng, which, family):
    """Compare low ranks, tied and transposed stages with a model of their dense kernels."""
    model = MODELS[which](rng)
    path, out, measure = (tmp_path / f"{name}.keras" for name in ("in", "out", "measure"))
    write(path, model)
    net = KerasModel(path)
    chains = applicable_chains(net, LOW[family], MUST[which])
    net.replaced(chains).save(out)
    dense = copy.deepcopy(model)
    for x in [*dense["layers"], *(y for z in dense["layers"] for y in z.get("layers", ()))]:
        f = chains.get(x["name"], chains.get(f"inner/{x['name']}"))
        if f is None:
            continue
        kernel = f.to_dense()
        shape = x["weights"][0].shape
        if x["kind"].startswith("Depthwise"):
            kernel = kernel.reshape(shape[-2], shape[-1], *kernel.shape[2:])
            x["weights"][0] = np.moveaxis(kernel, (0, 1), (-2, -1))
        else:
            x["weights"][0] = np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(shape)
    write(measure, dense)
    assert compare(measure, out, rng.standard_normal((2, *SHAPES[which]))) < ROUNDING


def test_depthwise_and_pointwise_stages_become_a_separable_layer(written, rng):
    path, out = written(planar(rng))
    net = KerasModel(path)
    by_name = {x.name: x.conv for x in net.layers}
    chains = {n: lr.network_decoupling(by_name[n], 1, "dw-pw") for n in ("c1", "dil", "inner/h")}
    net.replaced(chains).save(out)
    config, _ = load(out)
    found = {e["name"]: e for e in config["config"]["layers"]}
    for name in ("c1", "dil"):
        assert found[name]["class_name"] == "SeparableConv2D"
        assert found[name]["config"]["depth_multiplier"] == 1
    assert found["c1"]["config"]["activation"] == "relu"
    assert found["c1"]["config"]["padding"] == "same"
    assert found["inner"]["config"]["layers"][-1]["class_name"] == "SeparableConv2D"
    assert set(KerasModel(out).chains) == {*chains, "sep"}


def test_only_the_last_layer_has_bias_and_activation(written, rng):
    path, out = written(planar(rng))
    net = KerasModel(path)
    net.replaced({"c1": lr.spatial_svd(net.layers[0].conv, 2)}).save(out)
    entries = {e["name"]: e for e in load(out)[0]["config"]["layers"]}
    first, last = entries["c1_0"]["config"], entries["c1"]["config"]
    assert (first["use_bias"], first["activation"]) == (False, "linear")
    assert (last["use_bias"], last["activation"]) == (True, "relu")
    assert (first["strides"], last["strides"]) == ([2, 1], [1, 2])


def handmade(name, rng):
    """Return a layer, stages without a Keras layer, and the classes written for them."""
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
            [
                lr.Stage(
                    n((12, 6, 2, 1)), g(2, 2, 0, output_padding=(0, 1)), transposed=True
                )
            ],
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
            [lr.Stage(n((12, 32, 2, 2)), g(2, padding=[(0, 1), (1, 0)]))],
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
            [lr.Stage(n((12, 16, 1, 1)), g(2), 2, shuffle=(2, 4))],
            ["Conv2D"],
        ),
        "tied": (
            "dil",
            [
                lr.Stage(n((1, 1, 3, 3)), g(2, padding=1), outer=4, inner=8),
                lr.Stage(n((3, 8, 1, 1)), g(2), outer=4),
            ],
            ["DepthwiseConv2D", "Conv2D"],
        ),
        "tied mixtures": (
            "dil",
            [lr.Stage(n((3, 8, 3, 3)), g(2, padding=1), outer=2, inner=2)],
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
def test_stages_without_a_keras_layer_are_written_as_others(written, rng, name):
    path, out = written(planar(rng))
    replaced, stages, kinds = handmade(name, rng)
    net = KerasModel(path)
    conv = next(x.conv for x in net.layers if x.name == replaced)
    f = lr.chain(stages, rng.standard_normal(conv.out_channels))
    net.replaced({replaced: f}).save(out)
    config, weights = load(out)
    made = [e for e in config["config"]["layers"] if re.fullmatch(rf"{replaced}(_\d)?", e["name"])]
    assert [e["class_name"] for e in made] == kinds
    seen = {}
    run(config, weights, rng.standard_normal((2, 17, 19, 3)), seen)
    got = np.moveaxis(f(np.moveaxis(seen[made[0]["name"]][0], -1, 1)), 1, -1)
    got = np.maximum(got, 0) if conv.out_channels == 8 or replaced == "one" else got
    np.testing.assert_allclose(got, seen[replaced][1], rtol=0, atol=ROUNDING * abs(got).max())


def test_chains_that_keras_cannot_express_are_refused(tmp_path, rng):
    path = tmp_path / "in.keras"
    write(path, planar(rng))
    net = KerasModel(path)
    by_name = {x.name: x.conv for x in net.layers}
    with pytest.raises(ValueError, match=r"'up'.*Keras has no layers.*MACs"):
        net.replaced({"up": lr.network_decoupling(by_name["up"], 2)})
    g = lr.Geometry.of(2, padding=(2, 2), dilation=2, padding_mode="reflect")
    with pytest.raises(ValueError, match="pads with zeros"):
        net.replaced({"dil": lr.chain([lr.Stage(by_name["dil"].stages[0].weight, g)])})
    with pytest.raises(ValueError, match=r"ending must be \.keras"):
        net.replaced({}).save(tmp_path / "out.h5")


def test_other_contents_of_the_file_are_kept(written, rng):
    path, out = written(planar(rng))
    net = KerasModel(path)
    net.replaced({"c1": lr.channel_svd(net.layers[0].conv, 2)}).save(out)
    if path.suffix == ".keras":
        with zipfile.ZipFile(out) as archive:
            assert archive.read("assets/words.txt") == b"a b c"
            file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
        assert "optimizer" not in file  # it belongs to other weights
    else:
        with h5py.File(out) as file:
            assert file.attrs["keras_version"] == "2.15.0"
            assert "optimizer_weights" not in file
    assert compare(path, path, np.ones((1, 17, 19, 3))) == 0


def test_calibration_data_are_found_by_layer_name(tmp_path, rng):
    path = tmp_path / "in.keras"
    write(path, planar(rng))
    x, v = rng.standard_normal((3, 3, 17, 19)), rng.standard_normal((3, 8))
    np.savez(tmp_path / "x.npz", **{"c1": x, "fc": v})
    net = KerasModel(path, calibration=tmp_path / "x.npz")
    assert net.batches == 1
    (batch,) = net.inputs(["c1", "fc"], {})
    np.testing.assert_array_equal(batch["c1"][0], x.astype(np.float32))
    assert batch["fc"][0].shape == (3, 8, 1)


@pytest.fixture(scope="module")
def keras():
    pytest.importorskip("torch")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def branched(keras):
    """Return a model with branches, in which chains change Keras's order of layers."""
    L = keras.layers
    x = inp = keras.Input((17, 19, 3), name="inp")
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="c1")(x)
    x = L.BatchNormalization(name="bn1")(x)
    x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False, name="dw")(x)
    shared = L.Conv2D(16, (3, 5), padding="same", name="shared")
    a = shared(x)
    b = shared(a)
    s = L.SeparableConv2D(16, 3, padding="same", name="sep")(x)
    x = L.Concatenate()([b, s, a])
    z = L.Conv2D(12, 5, dilation_rate=2, padding="same", name="dil")(x)
    x = L.Add()([z, L.Conv2D(12, 3, padding="same", name="z")(x)])
    x = L.Conv2DTranspose(6, 3, strides=2, padding="same", name="up")(x)
    x = L.Conv2DTranspose(6, 5, strides=(3, 2), activation="tanh", name="up2")(x)
    y = inner = keras.Input(x.shape[1:])
    y = L.Conv2D(6, (3, 2), groups=2, name="g")(y)
    y = L.BatchNormalization()(y)
    left = L.Conv2D(8, (5, 4), strides=2, padding="same", name="h")(y)
    right = L.Conv2D(8, 3, strides=2, padding="same", name="k")(y)
    x = keras.Model(inner, L.Add()([left, right]), name="inner")(x)
    x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inp, L.Dense(5, name="fc")(x), name="net")


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore")  # Keras's own, which change from version to version
def test_keras_computes_the_same_outputs(keras, tmp_path, rng, ending):
    model = branched(keras)
    for variable in model.weights:
        value = rng.standard_normal(variable.shape) * 0.3
        variable.assign(abs(value) + 0.5 if "variance" in variable.path else value)
    x = rng.standard_normal((2, 17, 19, 3)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    path, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    model.save(path)
    net = KerasModel(path)
    names = ["c1", "dw", "shared", "dil", "z", "up", "up2", "inner/g", "inner/h", "inner/k", "fc"]
    assert sorted(x.name for x in net.layers) == sorted(names)
    bn = model.get_layer("inner").layers[2]
    assert isinstance(bn, keras.layers.BatchNormalization)
    families = {
        lr.network_decoupling: ("c1", "inner/k"),
        lr.spatial_svd: ("dil", "up", "up2", "shared"),
        lr.channel_svd: ("inner/g", "inner/h", "fc"),
    }
    by_name = {x.name: x.conv for x in net.layers}
    chains = {n: full(f, by_name[n]) for f, ns in families.items() for n in ns}
    net.replaced(chains).save(out)
    again = keras.models.load_model(out)
    assert isinstance(again.get_layer("c1"), keras.layers.SeparableConv2D)
    found = again.predict(x, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * abs(expected).max())
    # The model that Keras saves is read again.
    again.save(path)
    assert not [why for why in KerasModel(path).left_out.values() if "already" not in why]
