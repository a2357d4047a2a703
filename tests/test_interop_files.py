"""Weights with a manifest, and models of Keras: in, out again, and what hostile files get.

Keras is not needed: files are written here in its forms, and run by a small interpreter of its
configurations that shares nothing with lowrank.  Where Keras is there, it is asked, too.
"""

import copy
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lowrank as lr
from lowrank import demo
from lowrank import io as tensors_io
from lowrank.interop.weights import WeightsFile, WeightsModel, layers, read_weights

h5py = pytest.importorskip("h5py")

from lowrank.interop.keras import KerasModel  # noqa: E402

# ---------------------------------------------------------------- weights with a manifest


@pytest.fixture
def described(tmp_path, rng):
    """A file with layers of all kinds, a tensor that is no layer, and its manifest."""
    tensors = {
        "a.weight": rng.standard_normal((8, 6, 3, 3)).astype(np.float32),
        "a.bias": rng.standard_normal(8).astype(np.float32),
        "g.weight": rng.standard_normal((8, 4, 5)),
        "up.weight": rng.standard_normal((6, 4, 4, 4)).astype(np.float32),
        "vol.weight": rng.standard_normal((4, 4, 3, 3, 3)).astype(np.float32),
        "table": np.arange(5),
        "half": np.array([1, 2, 0x3F80], "<u2").view(tensors_io.BFLOAT16),
    }
    entries = [
        {"name": "a", "weight": "a.weight", "bias": "a.bias", "stride": [2, 2],
         "padding": [[0, 1], [1, 1]], "in_size": [9, 11], "macs": 1},
        {"name": "g", "weight": "g.weight", "groups": 2, "padding": [2], "in_size": [20]},
        {"name": "up", "weight": "up.weight", "transposed": True, "stride": 2, "padding": 1,
         "in_size": [5, 6], "out_size": [11, 12]},
        {"name": "vol", "weight": "vol.weight", "padding": 2, "dilation": 2, "in_size": [6, 6, 6]},
    ]  # fmt: skip
    path = tmp_path / "net.safetensors"
    tensors_io.write_tensors(path, tensors, {"made": "here"})
    manifest = {"conv_layers": entries, "licence": "none", "total_conv_macs": 7, "parameters": 9}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


CHAINS = {
    "kronecker": lambda net: {"a": lr.kronecker(net["a"], 2, "2x3x1x1 last")},
    "groups": lambda net: {
        "g": lr.channel_svd(net["g"], 2),
        "a": lr.network_decoupling(net["a"], 1),
    },
    "transposed": lambda net: {"up": lr.spatial_svd(net["up"], 3), "vol": lr.cp(net["vol"], 5)},
    "shuffled": lambda net: {
        "g": lr.chain(
            [
                lr.Stage(np.ones((8, 4, 5)), lr.Geometry.of(1, padding=2), 2, shuffle=(2, 4)),
                lr.Stage(np.ones((4, 4, 1)), lr.Geometry.of(1), outer=2),
            ],
            np.arange(8.0),
        )
    },
}


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("which", CHAINS)
def test_chains_come_back_exactly(described, tmp_path, which, ending):
    if ending == "npz":  # which has no bfloat16
        tensors, _ = tensors_io.read_tensors(described)
        tensors_io.write_tensors(described, tensors, {})
    net = WeightsModel(described)
    chains = CHAINS[which]({x.name: x.conv for x in net.layers})
    new = net.replaced(chains)
    out = tmp_path / "out" / f"small.{ending}"
    out.parent.mkdir()
    new.save(out)
    assert {p.name for p in out.parent.iterdir()} == {f"small.{ending}", "small.json"}
    again = WeightsModel(out)
    assert again.chains.keys() == chains.keys()
    assert {x.name for x in again.layers} == {x.name for x in net.layers} - chains.keys()
    for name, f in chains.items():
        g = again.chains[name]
        fields = ("geometry", "groups", "family", "form", "rank", "dtype")
        assert [getattr(g, x) for x in fields] == [getattr(f, x) for x in fields]
        for a, b in zip(g.stages, f.stages, strict=True):
            np.testing.assert_array_equal(a.weight, b.weight)
            for x in ("geometry", "groups", "left", "right", "shuffle", "transposed"):
                assert getattr(a, x) == getattr(b, x)
        np.testing.assert_equal(g.bias, f.bias)
    # A second time nothing changes, and what is no layer was never touched.
    again.replaced({}).save(tmp_path / f"twice.{ending}")
    assert (tmp_path / f"twice.{ending}").stat().st_size == out.stat().st_size
    before, after = read_weights(described), read_weights(out)
    assert {"table", "half"} < after.keys()
    for name in before.keys() & after.keys() - {"a.bias", "g.bias"}:
        np.testing.assert_array_equal(before[name], after[name])


def test_the_manifest_says_what_the_stages_are(described):
    net = WeightsModel(described)
    f = lr.spatial_svd(net.layers[0].conv, 2)
    new = net.replaced({"a": f})
    first, last = new.manifest["conv_layers"][:2]
    assert (first["weight"], last["weight"]) == ("a.0.weight", "a.1.weight")
    assert (first["bias"], last["bias"]) == (None, "a.bias")
    assert first["in_size"] == [9, 11]
    assert first["out_size"] == last["in_size"] == [4, 11]
    assert last["out_size"] == list(net.layers[0].conv.output_shape((9, 11))[1:])
    assert [first["macs"], last["macs"]] == [c.macs for c in f.stage_costs((9, 11))]
    assert first["shape"] == list(f.stages[0].weight.shape)
    assert new.manifest["licence"] == "none"
    assert new.manifest["total_conv_macs"] == first["macs"] + last["macs"]
    old = net.replaced({})
    gone = old.tensors["a.weight"].size - sum(s.weight.size for s in f.stages)
    assert new.manifest["parameters"] == 9 - gone
    assert "a.weight" not in new.tensors
    assert new.metadata == {"made": "here"}
    assert new.tensors["half"].dtype == tensors_io.BFLOAT16


def test_layers_without_a_manifest_need_calibration(tmp_path, rng):
    path = tmp_path / "net.npz"
    w = rng.standard_normal((8, 6, 3, 3)).astype(np.float32)
    WeightsFile({"a.weight": w, "file": np.arange(3)}, {}, {}).save(path)
    path.with_suffix(".json").unlink()
    assert "size" in WeightsModel(path).left_out["a"]
    x = rng.standard_normal((100, 6, 9, 7)).astype(np.float32)
    np.savez(tmp_path / "x.npz", a=x)
    net = WeightsModel(path, calibration=tmp_path / "x.npz")
    assert net.layers[0].input_size == (9, 7)
    assert net.batches == 2
    got = list(net.inputs(["a"], {}))
    assert [len(batch["a"][0]) for batch in got] == [64, 36]
    np.testing.assert_array_equal(np.concatenate([b["a"][0] for b in got]), x)
    assert net.gradients(["a"], 0) is None
    assert list(net.outputs({})) == []
    net.replaced({"a": lr.channel_svd(net.layers[0].conv, 2)}).save(tmp_path / "new.npz")
    assert repr(layers(tmp_path / "new.npz")[0].conv).startswith("<Factorization channel_svd")
    np.testing.assert_array_equal(read_weights(tmp_path / "new.npz")["file"], np.arange(3))


def test_calibration_data_must_fit(tmp_path):
    def refused(match, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=match):
            WeightsModel(demo.WEIGHTS, calibration=tmp_path / "x.npz")

    refused("no layer is called 'conv9'", conv9=np.zeros((1, 1, 8, 8)))
    refused("conv1.*batch, 1 channels", conv1=np.zeros((2, 3, 8, 8)))
    refused("finite", conv1=np.full((2, 1, 8, 8), np.nan))
    refused("same batch", conv1=np.zeros((2, 1, 8, 8)), conv2=np.zeros((3, 32, 8, 8)))
    np.savez(tmp_path / "x.npz", conv1=np.zeros((2, 1, 8, 8)))
    net = WeightsModel(demo.WEIGHTS, calibration=tmp_path / "x.npz")
    with pytest.raises(ValueError, match="no inputs of conv2"):
        next(net.inputs(["conv1", "conv2"], {}))


def test_chains_that_do_not_fit_are_refused(tmp_path):
    net = WeightsModel(demo.WEIGHTS)
    conv = net.layers[1].conv
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        net.replaced({"conv9": conv})
    with pytest.raises(ValueError, match="another shape"):
        net.replaced({"conv1": conv})
    with pytest.raises(ValueError, match=r"\.onnx"):
        net.replaced({}).save(tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_chains_of_lowrank_are_reported(tmp_path):
    path = tmp_path / "chains.safetensors"
    f = lr.channel_svd(WeightsModel(demo.WEIGHTS).layers[1].conv, 4)
    lr.save(path, {"conv2": f})
    net = WeightsModel(path)
    assert net.layers == ()
    assert repr(net.chains["conv2"]) == repr(f)
    net.replaced({}).save(tmp_path / "again.safetensors")
    assert repr(lr.load(tmp_path / "again.safetensors")["conv2"]) == repr(f)


def npy(shape, descr="<f4", body=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"shape": shape, "fortran_order": False, "descr": descr}
    )
    return buffer.getvalue() + body


HOSTILE_NPZ = {
    "claims a terabyte": {"a.npy": npy((2**38,))},
    "claims more than memory": {"a.npy": npy((2**62, 2**62))},
    "negative": {"a.npy": npy((-4,), body=bytes(16))},
    "pickles": {"a.npy": npy((1,), "|O", b"cos\nsystem\n")},
    "no array": {"a.npy": b"hello"},
    "a bomb": {"a.npy": bytes(2**28)},
}


@pytest.mark.parametrize("what", HOSTILE_NPZ)
def test_hostile_arrays_are_refused(tmp_path, what):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in HOSTILE_NPZ[what].items():
            archive.writestr(name, data)
    for read in (read_weights, WeightsModel):
        with pytest.raises(ValueError, match=r"bad\.npz") as why:
            read(path)
        assert "\n" not in str(why.value)


def test_a_hostile_array_alone_is_refused(tmp_path):
    path = tmp_path / "bad.npy"
    path.write_bytes(npy((2**40,)))
    with pytest.raises(ValueError, match=r"bad\.npy.*claims"):
        read_weights(path)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "[" * 100_000, '{"conv_layers": 7}', '{"conv_layers": [{"weight": []}]}',
        '{"conv_layers": [{"weight": "conv1.weight", "bias": {}}]}',
        '{"conv_layers": [{"weight": "../../etc/passwd"}]}',
        '{"conv_layers": [{"weight": "conv1.weight", "of": "a", "groups": 0}]}',
        '{"conv_layers": [{"weight": "conv1.weight", "of": "a", "shuffle": "x"}]}',
        '{"conv_layers": [{"weight": "conv1.weight", "of": "a"}], "chains": {"a": {}}}',
        '{"conv_layers": [{"weight": "conv1.weight", "of": "a"}], "chains": []}',
        '{"conv_layers": [{"weight": "conv1.weight"}, {"weight": "conv1.weight"}]}',
    ],
)  # fmt: skip
def test_damaged_manifests_are_refused(tmp_path, text):
    about = tmp_path / "about.json"
    about.write_text(text)
    with pytest.raises(ValueError, match=r"about\.json|two layers") as why:
        WeightsModel(demo.WEIGHTS, manifest=about)
    assert "\n" not in str(why.value)


def test_nothing_is_written_when_writing_fails(described, tmp_path, monkeypatch):
    out = tmp_path / "out" / "old.npz"
    out.parent.mkdir()
    out.write_bytes(b"as it was")
    with pytest.raises(ValueError, match="bfloat16"):
        WeightsModel(described).replaced({}).save(out)
    assert [p.name for p in out.parent.iterdir()] == ["old.npz"]
    assert out.read_bytes() == b"as it was"


def test_the_trained_nets_go_out_and_in(data, tmp_path):
    for path in sorted((data / "weights").glob("*.safetensors")):
        net = WeightsModel(path)
        assert net.layers
        chains = {}
        for layer in net.layers:
            for family in (lr.spatial_svd, lr.network_decoupling, lr.channel_svd):
                try:
                    chains[layer.name] = family(layer.conv, 1)
                    break
                except ValueError:
                    continue
        out = tmp_path / path.name
        net.replaced(chains).save(out)
        again = WeightsModel(out)
        assert again.chains.keys() == chains.keys()
        for name, f in chains.items():
            g = again.chains[name]
            assert (repr(g), g.geometry) == (repr(f), f.geometry)
            np.testing.assert_array_equal(g.to_dense(), f.to_dense())


# ---------------------------------------------------------------- files of Keras, written here


def layer(kind, name, *inbound, **config):
    """A layer as configurations have it; `inbound` has a list of (layer, call) a call."""
    return {"kind": kind, "name": name, "inbound": inbound, "config": config}


def conv(kind, name, *inbound, size, weights, **config):
    """With Keras's own defaults spelled out, as it writes them."""
    n = int(re.search(r"(\d)D", kind)[1])
    config = {
        "kernel_size": [size] * n if isinstance(size, int) else list(size),
        "strides": [1] * n, "padding": "valid", "data_format": "channels_last",
        "dilation_rate": [1] * n, "activation": "linear", "use_bias": True, **config,
    }  # fmt: skip
    return layer(kind, name, *inbound, **config) | {"weights": weights}


def planar(rng):
    """A functional model in Keras's order of layers, whatever is in it."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    one = [("dw", 0)]
    inner = {
        "sequential": True,
        "name": "inner",
        "layers": [
            layer("InputLayer", "in2", batch_shape=[None, 18, 20, 6]),
            conv("Conv2D", "g", size=(3, 2), groups=2, filters=6, weights=[w(3, 2, 3, 6), w(6)]),
            layer("BatchNormalization", "bn2", axis=-1, epsilon=0.01)
            | {"weights": [w(6), w(6), w(6), 1 + w(6) ** 2]},
            conv("Conv2D", "h", size=(5, 4), strides=[2, 2], padding="same", filters=8,
                 activation="relu", weights=[w(5, 4, 6, 8), w(8)]),
        ],
    }  # fmt: skip
    return {
        "name": "net",
        "input": ["inp"],
        "output": ["fc"],
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 17, 19, 3]),
            conv("Conv2D", "c1", [("inp", 0)], size=3, strides=[2, 2], padding="same", filters=8,
                 activation="relu", weights=[w(3, 3, 3, 8), w(8)]),
            conv("DepthwiseConv2D", "dw", [("c1", 0)], size=3, padding="same", depth_multiplier=2,
                 use_bias=False, weights=[w(3, 3, 8, 2)]),
            conv("Conv2D", "shared", one, [("shared", 0)], size=(3, 5), padding="same",
                 filters=16, weights=[w(3, 5, 16, 16), w(16)]),
            conv("SeparableConv2D", "sep", one, size=3, padding="same", filters=16,
                 depth_multiplier=1, weights=[w(3, 3, 16, 1), w(1, 1, 16, 16), w(16)]),
            layer("Concatenate", "cat", [("shared", 1), ("sep", 0)], axis=-1),
            layer("Dropout", "drop", [("cat", 0)], rate=0.5),
            conv("Conv2D", "dil", [("drop", 0)], size=3, dilation_rate=[2, 2], padding="same",
                 filters=12, weights=[w(3, 3, 32, 12), w(12)]),
            conv("Conv2D", "one", [("cat", 0)], size=1, filters=12, activation="relu",
                 weights=[w(1, 1, 32, 12), w(12)]),
            layer("Add", "add", [("dil", 0), ("one", 0)]),
            conv("Conv2DTranspose", "up", [("add", 0)], size=3, strides=[2, 2], padding="same",
                 filters=6, output_padding=None, weights=[w(3, 3, 6, 12), w(6)]),
            inner | {"inbound": ([("up", 0)],)},
            layer("GlobalAveragePooling2D", "gap", [("inner", 0)], data_format="channels_last",
                  keepdims=False),
            layer("Dense", "fc", [("gap", 0)], units=5, activation="linear", use_bias=True)
            | {"weights": [w(8, 5), w(5)]},
        ],
    }  # fmt: skip


def linear(rng):
    """A Sequential model along one axis."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    return {
        "sequential": True,
        "name": "line",
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 40, 3]),
            conv("Conv1D", "a", size=5, padding="causal", dilation_rate=[2], filters=8,
                 weights=[w(5, 3, 8), w(8)]),
            conv("SeparableConv1D", "s", size=3, filters=8, depth_multiplier=2,
                 weights=[w(3, 8, 2), w(1, 16, 8), w(8)]),
            conv("DepthwiseConv1D", "d", size=3, strides=[2], padding="same", depth_multiplier=1,
                 weights=[w(3, 8, 1), w(8)]),
            conv("Conv1DTranspose", "t", size=5, strides=[2], filters=6, output_padding=None,
                 weights=[w(5, 6, 8), w(6)]),
            conv("Conv1D", "b", size=4, strides=[3], padding="same", filters=8, use_bias=False,
                 activation="relu", weights=[w(4, 6, 8)]),
            layer("Dense", "mix", units=7, activation="relu", use_bias=True)
            | {"weights": [w(8, 7), w(7)]},
            layer("Flatten", "flat", data_format="channels_last"),
            layer("Dense", "out", units=4, activation="linear", use_bias=False)
            | {"weights": [w(98, 4)]},
        ],
    }  # fmt: skip


def solid(rng):
    """A Sequential model along three axes."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    return {
        "sequential": True,
        "name": "solid",
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 7, 6, 5, 2]),
            conv("Conv3D", "a", size=3, padding="same", strides=[2, 2, 2], filters=6,
                 weights=[w(3, 3, 3, 2, 6), w(6)]),
            conv("Conv3DTranspose", "t", size=3, strides=[2, 2, 2], filters=4,
                 output_padding=None, weights=[w(3, 3, 3, 4, 6), w(4)]),
            layer("MaxPooling3D", "pool", pool_size=[2, 2, 2], strides=[2, 2, 2],
                  padding="valid", data_format="channels_last"),
            conv("Conv3D", "b", size=(2, 3, 2), filters=4, activation="relu",
                 weights=[w(2, 3, 2, 4, 4), w(4)]),
        ],
    }  # fmt: skip


SHAPES = {"planar": (17, 19, 3), "linear": (40, 3), "solid": (7, 6, 5, 2)}
MODELS = {"planar": planar, "linear": linear, "solid": solid}


def config_of(model, form):
    """A model's configuration, as Keras 3 or 2 writes it."""
    sequential = model.get("sequential", False)
    entries = []
    for x in model["layers"]:
        if "layers" in x:
            entry = config_of(x, form)
        else:
            own = dict(x["config"])
            if form == 2 and "batch_shape" in own:
                own["batch_input_shape"] = own.pop("batch_shape")
            entry = {"class_name": x["kind"], "config": {"name": x["name"], **own}}
            if form == 3:
                entry |= {"module": "keras.layers", "registered_name": None, "build_config": {}}
        if not sequential:
            entry["name"] = x["name"]
            entry["inbound_nodes"] = [node_of(call, form) for call in x["inbound"]]
        entries.append(entry)
    if form == 2 and sequential and entries[0]["class_name"] == "InputLayer":
        first = entries.pop(0)  # Keras 2 has the shape in the first layer that does something
        entries[0]["config"]["batch_input_shape"] = first["config"]["batch_input_shape"]
    config = {"name": model["name"], "layers": entries}
    if not sequential:
        config["input_layers"] = [[n, 0, 0] for n in model["input"]]
        config["output_layers"] = [[n, 0, 0] for n in model["output"]]
    kind = "Sequential" if sequential else "Functional"
    return {"class_name": kind, "config": config} | ({"module": "keras"} if form == 3 else {})


def node_of(call, form):
    if form == 2:
        return [[name, n, 0, {}] for name, n in call]
    tensors = [
        {"class_name": "__keras_tensor__",
         "config": {"shape": None, "dtype": "float32", "keras_history": [name, n, 0]}}
        for name, n in call
    ]  # fmt: skip
    return {"args": [tensors if len(tensors) > 1 else tensors[0]], "kwargs": {}}


KINDS = {"BatchNormalization": ["gamma", "beta", "moving_mean", "moving_variance"]}


def named_weights(x, prefix=""):
    """(name, array) of a layer, in the order of an ``.h5`` file."""
    if "layers" in x:
        found = [pair for y in x["layers"] for pair in named_weights(y)]
        moving = [p for p in found if "/moving" in p[0]]
        return [p for p in found if "/moving" not in p[0]] + moving
    arrays = x.get("weights", [])
    kinds = KINDS.get(x["kind"], ["kernel", "pointwise", "more"][: len(arrays)])
    if x["config"].get("use_bias") and arrays:
        kinds = [*kinds[: len(arrays) - 1], "bias"]
    return [(f"{x['name']}/{kind}:0", a) for kind, a in zip(kinds, arrays, strict=True)]


def put_vars(group, model, word):
    counts = {}
    for x in model["layers"]:
        kind = "Sequential" if "layers" in x else x["kind"]
        snake = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind))
        n = counts[snake] = counts.get(snake, -1) + 1
        inside = group.require_group(word).create_group(snake.lower() + (f"_{n}" if n else ""))
        inside.create_group("vars").attrs["name"] = x["name"]
        for i, array in enumerate(x.get("weights", [])):
            inside["vars"][str(i)] = array
        if "layers" in x:
            put_vars(inside, x, word)


def write(path, model, form=None, word="layers"):
    """A model's file in the form of its ending."""
    if path.suffix == ".keras":
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_group("vars")
            put_vars(file, model, word)
            file.create_group("optimizer/vars")["0"] = np.int64(7)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
            archive.writestr("config.json", json.dumps(config_of(model, form or 3)))
            archive.writestr("model.weights.h5", buffer.getvalue())
            archive.writestr("assets/words.txt", "a b c")
    else:
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = "2.15.0"
            file.attrs["model_config"] = json.dumps(config_of(model, form or 2))
            top = file.create_group("model_weights")
            kept = [x for x in model["layers"] if x.get("kind") != "InputLayer"]
            top.attrs["layer_names"] = np.array([x["name"].encode() for x in kept], "S")
            for x in kept:
                group = top.create_group(x["name"])
                pairs = named_weights(x)
                group.attrs["weight_names"] = np.array([n.encode() for n, _ in pairs], "S")
                for name, array in pairs:
                    group[name] = array
            file.create_group("optimizer_weights")["iteration"] = np.int64(7)


# ---------------------------------------------------------------- a small interpreter


def load(path):
    """(configuration, weights by layer) of a file: by the names in it, not by any order."""
    found = {}
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))

        def visit(name, item):
            if name.endswith("vars") and "name" in item.attrs:
                found[item.attrs["name"]] = [item[str(i)][()] for i in range(len(item))]

        file.visititems(visit)
        return config, found
    with h5py.File(path) as file:
        config = json.loads(file.attrs["model_config"])
        top = file["model_weights"]
        for name in top.attrs["layer_names"]:
            group = top[name.decode()]
            for weight in group.attrs["weight_names"]:
                owner = weight.decode().split("/")[-2]
                found.setdefault(owner, []).append(group[weight.decode()][()])
    return config, found


def run(config, weights, x, seen=None):
    """What a model makes of `x`, channels last; `seen` gets what each layer takes and gives."""
    entries = config["config"]["layers"]
    if "output_layers" not in config["config"]:
        for entry in entries:
            x = step(entry, weights, [x], seen)
        return x
    by_name = {e["name"]: e for e in entries}
    done = {}

    def value(name, call):
        if (name, call) not in done:
            entry = by_name[name]
            if entry["class_name"] == "InputLayer":
                return x
            text = json.dumps(entry["inbound_nodes"][call])
            pairs = re.findall(r'\["(\w+)", (\d+), 0', text)
            xs = [value(n, int(c)) for n, c in pairs]
            done[name, call] = step(entry, weights, xs, seen)
        return done[name, call]

    ((name, call, _),) = config["config"]["output_layers"]
    return value(name, call)


def step(entry, weights, xs, seen):
    if "layers" in entry["config"]:
        return run(entry, weights, *xs, seen)
    y = applied(entry, weights, xs)
    if seen is not None:
        seen[entry["config"]["name"]] = (xs[0], y, entry["config"].get("activation"))
    return y


def applied(entry, weights, xs):
    kind, c = entry["class_name"], entry["config"]
    own = [w.astype(float) for w in weights.get(c["name"], [])]
    x = xs[0]
    n = x.ndim - 2
    if kind in ("InputLayer", "Dropout"):
        return x
    if kind == "Add":
        return sum(xs)
    if kind == "Concatenate":
        return np.concatenate(xs, c["axis"])
    if kind == "Flatten":
        return x.reshape(len(x), -1)
    if kind.startswith("GlobalAverage"):
        return x.mean(tuple(range(1, n + 1)))
    if kind.startswith("MaxPooling"):
        axes = [v for m in x.shape[1:-1] for v in (m // 2, 2)]
        x = x[(slice(None), *(slice(m // 2 * 2) for m in x.shape[1:-1]))]
        return x.reshape(len(x), *axes, x.shape[-1]).max(tuple(range(2, 2 * n + 1, 2)))
    if kind == "BatchNormalization":
        gamma, beta, mean, variance = own
        return gamma * (x - mean) / np.sqrt(variance + c["epsilon"]) + beta
    if kind.startswith(("ZeroPadding", "Cropping")):
        pairs = c["padding" if kind.startswith("Zero") else "cropping"]
        pairs = [pairs] if n == 1 else pairs
        if kind.startswith("Zero"):
            return np.pad(x, [(0, 0), *pairs, (0, 0)])
        inside = [slice(a, m - b) for (a, b), m in zip(pairs, x.shape[1:])]
        return x[(slice(None), *inside)]
    bias = own.pop() if c["use_bias"] else 0
    if kind == "Dense":
        y = x @ own[0]
    elif kind.endswith("Transpose"):
        y = spread(x, own[0], c)
    elif kind.startswith("Conv"):
        y = grouped(x, own[0], c, c.get("groups", 1))
    else:
        depth = own[0].reshape(*own[0].shape[:n], 1, -1)
        y = grouped(x, depth, c, x.shape[-1])
        if kind.startswith("Separable"):
            y = y @ own[1].reshape(own[1].shape[-2:])
    y = y + bias
    return np.maximum(y, 0) if c["activation"] == "relu" else y


def windows(x, taps, c):
    """(tap, samples that it sees) of a padded input."""
    sizes = []
    pads = []
    for m, k, s, d in zip(x.shape[1:], taps, c["strides"], c["dilation_rate"]):
        e = (k - 1) * d + 1
        if c["padding"] == "same":
            sizes.append(-(-m // s))
            total = max((sizes[-1] - 1) * s + e - m, 0)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((e - 1 if c["padding"] == "causal" else 0, 0))
            sizes.append((m + sum(pads[-1]) - e) // s + 1)
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    for tap in np.ndindex(*taps):
        at = [
            slice(t * d, t * d + (m - 1) * s + 1, s)
            for t, d, s, m in zip(tap, c["dilation_rate"], c["strides"], sizes)
        ]
        yield tap, x[(slice(None), *at)]


def grouped(x, kernel, c, groups):
    taps = kernel.shape[:-2]
    outs = np.split(kernel, groups, -1)
    total = 0
    for tap, seen in windows(x, taps, c):
        parts = np.split(seen, groups, -1)
        total = total + np.concatenate([p @ k[tap] for p, k in zip(parts, outs)], -1)
    return total


def spread(x, kernel, c):
    """The gradient of a convolution: TensorFlow's definition of a transposed one."""
    taps = kernel.shape[:-2]
    whole, inside = [], []
    more = c.get("output_padding") or [None] * len(taps)
    for m, k, s, d, o in zip(x.shape[1:], taps, c["strides"], c["dilation_rate"], more):
        e = (k - 1) * d + 1
        assert o is None or c["padding"] == "valid"  # all that is written
        size = m * s if c["padding"] == "same" else (m - 1) * s + max(e, s)
        size = size if o is None else (m - 1) * s + e + o
        before = max(e - s, 0) // 2 if c["padding"] == "same" else 0
        whole.append(max((m - 1) * s + e, before + size))
        inside.append(slice(before, before + size))
    y = np.zeros((len(x), *whole, kernel.shape[-2]))
    for tap in np.ndindex(*taps):
        at = [
            slice(t * d, t * d + (m - 1) * s + 1, s)
            for t, d, s, m in zip(tap, c["dilation_rate"], c["strides"], x.shape[1:])
        ]
        y[(slice(None), *at)] += x @ kernel[tap].T
    return y[(slice(None), *inside)]


def compare(before, after, x):
    """Largest difference of what two files make of `x`, as a share of the largest output."""
    a, b = run(*load(before), x), run(*load(after), x)
    assert a.shape == b.shape
    return abs(a - b).max() / abs(a).max()


ROUNDING = 1e-5  # float32 weights of up to three stages, some ten layers deep


# ---------------------------------------------------------------- models of Keras


@pytest.fixture(params=["keras", "h5", "old.keras", "new.h5"])
def written(request, tmp_path, rng):
    """Writes a model in one of the forms, and where to put the next."""

    def put(model):
        path = tmp_path / f"in.{request.param}"
        form = {"old.keras": 2, "new.h5": 3}.get(request.param)
        word = "_layer_checkpoint_dependencies" if form == 2 else "layers"
        write(path, model, form, word)
        return path, tmp_path / f"out{path.suffix}"

    return put


def test_layers_are_those_of_the_model(written, rng):
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
def test_the_layers_do_what_keras_does(written, rng, which):
    """Each kind, run by lowrank on the samples that it gets: the interpreter agrees."""
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
    "the same": lambda f: f,
    "channel_svd": lambda f: full(lr.channel_svd, f),
    "channel_svd": lambda f: full(lr.channel_svd, f),
    "spatial_svd": lambda f: full(lr.spatial_svd, f),
    "spatial back": lambda f: full(
        lr.spatial_svd, f, **{2: {"form": "w-h"}, 3: {"form": "w-dh"}}.get(f.ndim, {})
    ),
    "network_decoupling": lambda f: full(lr.network_decoupling, f, form="dw-pw"),
    "decouple back": lambda f: full(
        lr.network_decoupling, f, form="pw-dw" if f.groups < 8 else "dw-pw"
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
#: What the families do, at the least; where there is nothing for them they are not asked.
MUST = {"planar": {"c1", "inner/h"}, "linear": {"a", "b"}, "solid": {"a", "b"}}
NOTHING = {("linear", "spatial_svd"), ("linear", "spatial back"), ("solid", "kronecker")}


def cases(table):
    return [(w, f) for w in MODELS for f in table if (w, f) not in NOTHING]


def per_group(f):
    (stage,) = f.stages
    return stage.weight.shape[0] // stage.groups, stage.weight.shape[1]


def taken(net, family, must):
    """Chains for all layers that the family and Keras have something for."""
    chains = {}
    for x in net.layers:
        try:
            f = family(x.conv)
        except lr.families.NotApplicable:
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


def full(family, f, **options):
    """At the first rank that is exact."""
    weight = f.stages[0].weight
    for rank in range(1, 10_000):
        found = family(f, rank, **options)
        if found.error(weight) < 1e-6:
            return found
    raise AssertionError("no rank is exact")


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize(("which", "family"), cases(EXACT))
def test_exact_chains_change_nothing(tmp_path, rng, which, family, ending):
    path, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    write(path, MODELS[which](rng))
    net = KerasModel(path)
    net.replaced(taken(net, EXACT[family], MUST[which])).save(out)
    assert compare(path, out, rng.standard_normal((2, *SHAPES[which]))) < ROUNDING
    again = KerasModel(out)
    assert not {n for n, why in again.left_out.items() if "already" not in why}


@pytest.mark.parametrize(("which", "family"), cases(LOW))
def test_chains_do_what_their_kernels_do(tmp_path, rng, which, family):
    """Low ranks, tied and transposed stages: the model with the dense kernels is the measure."""
    model = MODELS[which](rng)
    path, out, measure = (tmp_path / f"{name}.keras" for name in ("in", "out", "measure"))
    write(path, model)
    net = KerasModel(path)
    chains = taken(net, LOW[family], MUST[which])
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


def test_depthwise_and_pointwise_become_separable(written, rng):
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
    """Chains of stages that Keras has no plain layers for, and what it takes to say them."""
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
def test_stages_that_keras_has_no_name_for(written, rng, name):
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


def test_what_keras_cannot_say_is_refused(tmp_path, rng):
    path = tmp_path / "in.keras"
    write(path, planar(rng))
    net = KerasModel(path)
    by_name = {x.name: x.conv for x in net.layers}
    with pytest.raises(ValueError, match=r"'up'.*Keras has no layers.*multiply-adds"):
        net.replaced({"up": lr.network_decoupling(by_name["up"], 2)})
    g = lr.Geometry.of(2, padding=(2, 2), dilation=2, padding_mode="reflect")
    with pytest.raises(ValueError, match="pads with zeros"):
        net.replaced({"dil": lr.chain([lr.Stage(by_name["dil"].stages[0].weight, g)])})
    with pytest.raises(ValueError, match=r"came as \.keras"):
        net.replaced({}).save(tmp_path / "out.h5")


def test_other_things_in_the_file_stay(written, rng):
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


def test_open_sizes_are_left_out_until_they_are_given(tmp_path, rng):
    model = linear(rng)
    model["layers"] = model["layers"][:6]
    model["layers"][0]["config"]["batch_shape"] = [None, None, 3]
    path, out = tmp_path / "in.keras", tmp_path / "out.keras"
    write(path, model)
    assert KerasModel(path).layers == ()
    assert "size" in KerasModel(path).left_out["a"]
    net = KerasModel(path, input_shape=(40, 3))
    assert [x.input_size for x in net.layers] == [(40,), (38,), (19,), (41,)]
    net.replaced({"b": lr.channel_svd(net.layers[-1].conv, 2)}).save(out)
    config = load(out)[0]["config"]["layers"]
    assert config[-2]["config"]["padding"] == "same"  # for any size


def test_calibration_by_name(tmp_path, rng):
    path = tmp_path / "in.keras"
    write(path, planar(rng))
    x, v = rng.standard_normal((3, 3, 17, 19)), rng.standard_normal((3, 8))
    np.savez(tmp_path / "x.npz", **{"c1": x, "fc": v})
    net = KerasModel(path, calibration=tmp_path / "x.npz")
    assert net.batches == 1
    (batch,) = net.inputs(["c1", "fc"], {})
    np.testing.assert_array_equal(batch["c1"][0], x.astype(np.float32))
    assert batch["fc"][0].shape == (3, 8, 1)


def test_lambda_layers_are_not_run(tmp_path, rng):
    model = linear(rng)
    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAAAAAAA", "defaults": None}}
    model["layers"].insert(3, layer("Lambda", "evil", function=code))
    path = tmp_path / "in.keras"
    write(path, model)
    net = KerasModel(path)
    assert [x.name for x in net.layers] == ["a"]
    assert {"d", "t", "b"} <= net.left_out.keys()


# ---------------------------------------------------------------- hostile files


def archive_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)


def good(rng, tmp_path):
    write(tmp_path / "good.keras", linear(rng))
    with zipfile.ZipFile(tmp_path / "good.keras") as archive:
        return {n: archive.read(n) for n in archive.namelist()}


MEMBERS = {
    "no configuration": lambda m: [(k, v) for k, v in m.items() if k != "config.json"],
    "no weights": lambda m: [(k, v) for k, v in m.items() if "weights" not in k],
    "a path up": lambda m: [*m.items(), ("../evil.txt", b"x")],
    "a path up in the middle": lambda m: [*m.items(), ("assets/../../evil.txt", b"x")],
    "an absolute path": lambda m: [*m.items(), ("/tmp/evil.txt", b"x")],
    "a drive": lambda m: [*m.items(), ("C:\\evil.txt", b"x")],
    "configuration no JSON": lambda m: [*(m | {"config.json": b"{"}).items()],
    "configuration a list": lambda m: [*(m | {"config.json": b"[]"}).items()],
    "configuration deep": lambda m: [*(m | {"config.json": b"[" * 200_000}).items()],
    "no layers": lambda m: [*(m | {"config.json": b'{"config": {"name": "x"}}'}).items()],
    "layers are numbers": lambda m: [*(m | {"config.json": b'{"config": [1, 2]}'}).items()],
    "weights no HDF5": lambda m: [*(m | {"model.weights.h5": b"x" * 5000}).items()],
    "weights cut": lambda m: [*(m | {"model.weights.h5": m["model.weights.h5"][:-900]}).items()],
    "a bomb": lambda m: [*m.items(), ("assets/zeros", bytes(2**28))],
}


@pytest.mark.parametrize("what", MEMBERS)
def test_hostile_archives_are_refused(tmp_path, rng, what):
    path = tmp_path / "bad.keras"
    archive_of(path, MEMBERS[what](good(rng, tmp_path)), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bad\.keras") as why:
        KerasModel(path)
    assert "\n" not in str(why.value)


def test_members_of_one_name_are_refused(tmp_path, rng):
    path = tmp_path / "bad.keras"
    with pytest.warns(UserWarning, match="Duplicate"):
        archive_of(path, [*good(rng, tmp_path).items(), ("config.json", b"{}")])
    with pytest.raises(ValueError, match="one name"):
        KerasModel(path)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_files_cut_short_are_refused(tmp_path, rng, ending, share):
    path = tmp_path / f"cut.{ending}"
    write(path, linear(rng))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"cut\.{ending}") as why:
        KerasModel(path)
    assert "\n" not in str(why.value)


def external_link(file, folder):
    file["model_weights/a/extra"] = h5py.ExternalLink(str(folder / "secret.h5"), "/x")


def soft_link(file, folder):
    file["model_weights/a/extra"] = h5py.SoftLink("/model_weights")


def circle(file, folder):
    file["model_weights/a/extra"] = file["model_weights"]


def elsewhere(file, folder):
    (folder / "secret.bin").write_bytes(bytes(16))
    where = [(str(folder / "secret.bin"), 0, 16)]
    file["model_weights/a"].create_dataset("extra", (4,), "f4", external=where)


def virtual(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = np.zeros(4)
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "x", (4,))
    file["model_weights/a"].create_virtual_dataset("extra", layout)


def unwritten(file, folder):
    file["model_weights/a"].create_dataset("extra", (2**40,), "f8", chunks=(2**20,))


def packed(file, folder):
    zeros = np.zeros(2**26, "f4")  # 256 MiB in less than one
    file["model_weights/a"].create_dataset("extra", data=zeros, compression="gzip", chunks=(2**22,))


def nested(file, folder):
    file.create_group("/".join("x" * 300))


def named(file, folder):
    text = file.attrs["model_config"].replace('"name": "b"', '"name": "a"')
    file.attrs["model_config"] = text


def weights_alone(file, folder):
    del file.attrs["model_config"]


def endless(file, folder):
    """A heap of texts with an object of no size, on which HDF5 would wait for ever."""
    path = Path(file.filename)
    file.close()
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL\x01\0\0\0")
    size = int.from_bytes(data[heap + 24 : heap + 32], "little")
    free = heap + 16 + 16 + -(-size // 8) * 8
    while data[free] or data[free + 1]:
        free += 16 + -(-int.from_bytes(data[free + 8 : free + 16], "little") // 8) * 8
    data[free + 8 : free + 16] = bytes(8)
    path.write_bytes(data)


HOSTILE = [
    external_link, soft_link, circle, elsewhere, virtual, unwritten, packed, nested, named,
    weights_alone, endless,
]  # fmt: skip


@pytest.mark.parametrize("harm", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_hdf5_is_refused(tmp_path, rng, harm):
    path = tmp_path / "bad.h5"
    write(path, linear(rng))
    KerasModel(path)
    with h5py.File(path, "a") as file:
        harm(file, tmp_path)
    with pytest.raises(ValueError, match=r"bad\.h5") as why:
        KerasModel(path)
    assert "\n" not in str(why.value)


def test_a_kernel_of_another_shape_is_left_out(tmp_path, rng):
    model = linear(rng)
    model["layers"][1]["weights"][0] = np.zeros((5, 4, 8), np.float32)  # four channels, not three
    model["layers"][4]["weights"][0] = np.full((5, 6, 8), np.nan, np.float32)
    write(tmp_path / "odd.h5", model)
    net = KerasModel(tmp_path / "odd.h5")
    assert "channels" in net.left_out["a"]
    assert "NaN" in net.left_out["t"]
    assert [x.name for x in net.layers] == ["d", "b", "mix", "out"]


def test_layers_in_a_circle_are_refused(tmp_path, rng):
    model = planar(rng)
    model["layers"][1]["inbound"] = ([("dil", 0)],)
    write(tmp_path / "round.keras", model)
    with pytest.raises(ValueError, match=r"round\.keras.*circle"):
        KerasModel(tmp_path / "round.keras")


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.keras"):
        KerasModel(tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError):
        KerasModel(tmp_path / "net.keras")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_model_is_written_whole_or_not_at_all(tmp_path, rng, monkeypatch, ending):
    path, out = tmp_path / f"in.{ending}", tmp_path / "out" / f"out.{ending}"
    write(path, linear(rng))
    new = KerasModel(path).replaced({})
    out.parent.mkdir()
    out.write_bytes(b"as it was")

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fails)
    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="no space"):
        new.save(out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == b"as it was"


# ---------------------------------------------------------------- Keras itself


@pytest.fixture(scope="module")
def keras():
    pytest.importorskip("torch")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def branched(keras):
    """Branches of different depth: chains change the order in which Keras counts its layers."""
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
def test_keras_agrees(keras, tmp_path, rng, ending):
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
    # And what Keras makes of it goes in once more.
    again.save(path)
    assert not [why for why in KerasModel(path).left_out.values() if "already" not in why]
