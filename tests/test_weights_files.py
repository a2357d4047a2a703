"""Models of weights files: round trips of chains, manifests, calibration data, hostile files."""

import io
import json
import zipfile

import numpy as np
import pytest

import lowrank as lr
from lowrank import demo
from lowrank import io as tensors_io
from lowrank.compress import make_plan
from lowrank.interop.files import open_model, read_layers
from lowrank.interop.weights import WeightsFile, WeightsModel, layers, read_weights


@pytest.fixture
def described(tmp_path, rng):
    """Return a file with layers of all kinds, other tensors, and a manifest."""
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
         "padding": [[0, 1], [1, 1]], "in_size": [9, 11], "macs": 10368},
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
def test_saved_chains_are_read_back_exactly(described, tmp_path, which, ending):
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
        fields = ("geometry", "groups", "family", "variant", "rank", "dtype")
        assert [getattr(g, x) for x in fields] == [getattr(f, x) for x in fields]
        for a, b in zip(g.stages, f.stages, strict=True):
            np.testing.assert_array_equal(a.weight, b.weight)
            for x in ("geometry", "groups", "outer", "inner", "shuffle", "transposed"):
                assert getattr(a, x) == getattr(b, x)
        np.testing.assert_equal(g.bias, f.bias)
    # Saving again changes nothing, and tensors of no layer are unchanged.
    again.replaced({}).save(tmp_path / f"twice.{ending}")
    assert (tmp_path / f"twice.{ending}").stat().st_size == out.stat().st_size
    before, after = read_weights(described), read_weights(out)
    assert {"table", "half"} < after.keys()
    for name in before.keys() & after.keys() - {"a.bias", "g.bias"}:
        np.testing.assert_array_equal(before[name], after[name])


def test_manifest_describes_every_stage(described):
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


def test_calibration_data_that_do_not_fit_are_refused(tmp_path):
    def refused(match, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=match):
            WeightsModel(demo.WEIGHTS, calibration=tmp_path / "x.npz")

    refused("no layer 'conv9'", conv9=np.zeros((1, 1, 8, 8)))
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
    with pytest.raises(ValueError, match="layer 'conv1'"):
        net.replaced({"conv1": conv})
    with pytest.raises(ValueError, match=r"\.onnx"):
        net.replaced({}).save(tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_chains_saved_by_lowrank_are_not_layers(tmp_path):
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
def test_hostile_npz_files_are_refused(tmp_path, what):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in HOSTILE_NPZ[what].items():
            archive.writestr(name, data)
    for read in (read_weights, WeightsModel):
        with pytest.raises(ValueError, match=r"bad\.npz") as why:
            read(path)
        assert "\n" not in str(why.value)


def test_hostile_npy_file_is_refused(tmp_path):
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


CONTRADICTIONS = [
    ({"stride": [2, 2], "strides": 2}, "unknown key 'strides'"),
    ({"in_size": [0, 9]}, r"in_size must be at least 1 per axis, got \(0, 9\)"),
    ({"in_size": [9, -1]}, r"in_size must be at least 1 per axis, got \(9, -1\)"),
    ({"in_size": [1, 1], "padding": 0}, "kernel must not be larger"),
    ({"out_size": [5, 6]}, r"out_size must be \[4, 5\].*got \[5, 6\]"),
    ({"out_size": 5}, r"out_size must be \[4, 5\].*got 5"),
    ({"macs": 8640 + 1}, "macs must be 8640, .*got 8641"),
    ({"macs": True}, "macs must be an integer, got True"),
    ({"shape": [8, 6, 3]}, r"shape must be \[8, 6, 3, 3\], that of the tensor"),
    ({"groups": True}, "groups must be an integer, got True"),
    ({"left": 2}, "left must be 1 without 'of', .*got 2"),
    ({"right": 3}, "right must be 1 without 'of', .*got 3"),
    ({"shuffle": [2, 3]}, r"shuffle must be 1 without 'of', .*got \[2, 3\]"),
    ({"transposed": 0}, "transposed must be true or false, got 0"),
    ({"bias": "g.weight"}, r"bias must have shape \(8,\)"),
]


@pytest.mark.parametrize(("changed", "words"), CONTRADICTIONS)
def test_contradictions_in_a_manifest_are_named(described, changed, words):
    about = described.with_suffix(".json")
    manifest = json.loads(about.read_text())
    entry = manifest["conv_layers"][0] | {"padding": 0, "macs": None}
    manifest["conv_layers"][0] = entry | {"shuffle": [1, 1], "left": 1, "right": None}
    about.write_text(json.dumps(manifest))
    assert len(WeightsModel(described).layers) == 4
    manifest["conv_layers"][0] = entry | changed
    about.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"net\.json: layer 'a'.*{words}") as why:
        WeightsModel(described)
    assert "\n" not in str(why.value)


def test_chains_of_no_layer_are_named(described):
    net = WeightsModel(described)
    file = net.replaced({"a": lr.channel_svd(net.layers[0].conv, 2)})
    file.manifest["chains"]["b"] = file.manifest["chains"]["a"]
    file.save(described)
    with pytest.raises(ValueError, match="chains must name layers of several stages, a, got 'b'"):
        WeightsModel(described)


def test_macs_of_layers_that_are_chains_already(described, tmp_path):
    net = WeightsModel(described)
    f = lr.channel_svd(net.layers[0].conv, 2)
    net.replaced({"a": f}).save(tmp_path / "small.safetensors")
    again = WeightsModel(tmp_path / "small.safetensors")
    assert again.left_out == {"a": "it is a chain already"}
    assert again.left_out_macs == {"a": f.cost((9, 11)).macs}
    text = repr(make_plan(again, macs=0.5, families=["channel_svd"]))
    own = sum(x.cost.macs for x in again.layers)
    share = f.cost((9, 11)).macs
    assert f"a ({share / (own + share):.1%} of the MACs): it is a chain already" in text


def test_matrices_are_layers(tmp_path, rng):
    w, b = rng.standard_normal((5, 8)).astype(np.float32), np.ones(5, np.float32)
    np.savez(tmp_path / "net.npz", **{"fc.weight": w, "fc.bias": b})
    net = WeightsModel(tmp_path / "net.npz")
    (layer,) = net.layers
    assert (layer.name, layer.input_size, layer.cost.macs) == ("fc", (1,), w.size)
    f = lr.channel_svd(layer.conv, 2)
    net.replaced({"fc": f}).save(tmp_path / "small.npz")
    after = read_weights(tmp_path / "small.npz")
    assert {n: t.shape for n, t in after.items()} == {
        "fc.0.weight": (2, 8), "fc.1.weight": (5, 2), "fc.bias": (5,),
    }  # fmt: skip
    np.testing.assert_array_equal(
        WeightsModel(tmp_path / "small.npz").chains["fc"].to_dense(), f.to_dense()
    )


def test_input_sizes_of_layers_that_have_no_manifest(tmp_path, rng):
    arrays = {
        "conv.weight": rng.standard_normal((8, 6, 3, 3)),
        "fc.weight": rng.standard_normal((5, 8)),
    }
    path = tmp_path / "net.npz"
    np.savez(path, **arrays)
    found = read_layers(path, input_size=(9, 7)).layers
    assert [(x.name, x.input_size) for x in found] == [("conv", (9, 7)), ("fc", (1,))]
    with pytest.raises(ValueError, match=r"spatial axes as a layer, 1 or 2, got \(9, 7, 5\)"):
        read_layers(path, input_size=(9, 7, 5))
    with pytest.raises(ValueError, match="an input size is for networks of ONNX and Keras"):
        open_model(path, input_size=(9, 7))


def test_failed_save_leaves_the_old_file(described, tmp_path, monkeypatch):
    out = tmp_path / "out" / "old.npz"
    out.parent.mkdir()
    out.write_bytes(b"as it was")
    with pytest.raises(ValueError, match="bfloat16"):
        WeightsModel(described).replaced({}).save(out)
    assert [p.name for p in out.parent.iterdir()] == ["old.npz"]
    assert out.read_bytes() == b"as it was"


def test_trained_networks_are_saved_and_read_back(data, tmp_path):
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
