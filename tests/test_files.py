"""Chains and weights in files: exact round trips, hostile files, files of other libraries."""

import json
import struct

import numpy as np
import pytest

import lowrank as lr
from lowrank import io
from lowrank.interop import files
from lowrank.interop.weights import layers, read_weights


@pytest.fixture
def chains(rng):
    w = rng.standard_normal((8, 6, 3, 3))
    conv = lr.dense(w, rng.standard_normal(8), stride=2, padding=((1, 0), (2, 1)), dilation=2)
    odd = lr.dense(w, padding=1, padding_mode="constant", value=0.1)
    up = lr.dense(w, stride=2, transposed=True, output_padding=1)
    stage = lr.Stage(rng.standard_normal((6, 2, 1)), lr.Geometry.of(1), 3, shuffle=(3, 2))
    return {
        "dense": conv,
        "tucker": lr.tucker(conv, (4, 3)).astype(np.float32),
        "tied": lr.kronecker(odd, 2, "2x2x1x1 last"),
        "up": lr.cp(up, 5).astype(np.float16),
        "shuffled": lr.chain([stage]),
        "layer.1.conv": lr.spatial_svd(conv, 3, "w-h"),
    }


def test_save_and_load_round_trip_exactly(tmp_path, chains):
    path = tmp_path / "chains.safetensors"
    lr.save(path, chains)
    loaded = lr.load(path)
    assert list(loaded) == list(chains)
    for name, f in chains.items():
        g = loaded[name]
        assert repr(g) == repr(f)
        assert (g.geometry, g.groups, g.variant, g.dtype) == (
            f.geometry,
            f.groups,
            f.variant,
            f.dtype,
        )
        for a, b in zip(g.stages, f.stages):
            np.testing.assert_array_equal(a.weight, b.weight)
            for field in ("geometry", "groups", "outer", "inner", "shuffle", "transposed"):
                assert getattr(a, field) == getattr(b, field)
        if f.bias is None:
            assert g.bias is None
        else:
            np.testing.assert_array_equal(g.bias, f.bias)
    assert [p.name for p in tmp_path.iterdir()] == ["chains.safetensors"]


def test_loaded_chains_have_the_same_output(tmp_path, chains, rng):
    path = tmp_path / "chains.safetensors"
    lr.save(path, chains)
    x = rng.standard_normal((1, 6, 12, 12)).astype(np.float32)
    f = lr.load(path)["tucker"]
    np.testing.assert_array_equal(f(x), chains["tucker"](x))


@pytest.mark.full
def test_safetensors_library_reads_the_tensors(tmp_path, chains):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "chains.safetensors"
    lr.save(path, chains)
    seen = safetensors.load_file(path)
    ours, _ = io.read_tensors(path)
    assert seen.keys() == ours.keys()
    assert {"tucker.0.weight", "tucker.2.weight", "tucker.bias"} < seen.keys()
    for name, tensor in seen.items():
        np.testing.assert_array_equal(tensor, ours[name])


def header(entries, body=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": b"",
    "short": b"abc",
    "text": b"this is no file of tensors, but it is long enough",
    "length beyond the file": header({}, length=2**63),
    "huge length": header({}, length=10**8),
    "not JSON": header(b"{'a'"),
    "not UTF-8": header(b"\xff\xfe{}"),
    "deep": header(b"[" * 100_000),
    "a list": header(b"[1, 2]"),
    "a number": header(b"7"),
    "metadata is a list": header({"__metadata__": [1]}),
    "entry is a number": header({"a": 1}),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "unknown type": header({"a": entry("F8_E4M3", (8,))}, bytes(8)),
    "shape is text": header({"a": entry(shape="ab")}, bytes(8)),
    "shape of halves": header({"a": entry(shape=(0.5, 4))}, bytes(8)),
    "negative shape": header({"a": entry(shape=(-1, -2))}, bytes(8)),
    "overflowing shape": header({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
    "too few bytes": header({"a": entry(offsets=(0, 4))}, bytes(8)),
    "beyond the data": header({"a": entry(offsets=(8, 16))}, bytes(8)),
    "backwards": header({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative offsets": header({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "overlap": header({"a": entry(), "b": entry()}, bytes(8)),
    "hole": header({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "bytes left over": header({"a": entry()}, bytes(16)),
    "cut short": header({"a": entry()}, bytes(7)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(tmp_path, what):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[what])
    for read in (lr.load, read_weights, layers):
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            read(path)


def test_bfloat16_and_float16_are_read(tmp_path):
    halves = np.array([1.5, -2.25], np.float32)
    bits = (halves.view(np.uint32) >> 16).astype(np.uint16)
    body = bits.tobytes() + halves.astype(np.float16).tobytes()
    path = tmp_path / "half.safetensors"
    entries = {"a": entry("BF16", (2,), (0, 4)), "b": entry("F16", (2,), (4, 8))}
    path.write_bytes(header(entries, body))
    found = read_weights(path)
    assert found["a"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], halves)
    np.testing.assert_array_equal(found["b"], halves)


def rewrite_record(path, change):
    """Rewrite a file with a changed metadata record."""
    tensors, metadata = io.read_tensors(path)
    known = json.loads(metadata["lowrank"])
    changed = change(known)
    text = changed if isinstance(changed, str) else json.dumps(known)
    io.write_tensors(path, tensors, {"lowrank": text})


DAMAGE = {
    "not JSON": (lambda r: "{", "damaged"),
    "a list": (lambda r: "[]", "damaged"),
    "a newer format": (lambda r: r.update(format=2), "format 2"),
    "no stages": (lambda r: r["layers"]["f"].update(stages=[]), "stage"),
    "a stage too many": (lambda r: r["layers"]["f"]["stages"].append({}), "lacks"),
    "no geometry": (lambda r: r["layers"]["f"].pop("geometry"), "lacks 'geometry'"),
    "groups of 0": (lambda r: r["layers"]["f"]["stages"][0].update(groups=0), "groups"),
    "groups of text": (lambda r: r["layers"]["f"]["stages"][0].update(groups="2"), "damaged"),
    "a long shuffle": (
        lambda r: r["layers"]["f"]["stages"][0].update(shuffle=[1, 1, 1]),
        "damaged",
    ),
    "a stride of 0": (lambda r: r["layers"]["f"]["geometry"].update(stride=[0, 1]), "stride"),
    "groups of true": (
        lambda r: r["layers"]["f"]["stages"][0].update(groups=True),
        "groups must be an integer, got True",
    ),
    "transposed by a number": (
        lambda r: r["layers"]["f"]["stages"][0].update(transposed=0),
        "transposed must be true or false, got 0",
    ),
    "an unknown border": (lambda r: r["layers"]["f"]["geometry"].update(padding_mode="x"), "mode"),
    "layers in a list": (lambda r: r.update(layers=[1]), "damaged"),
    "a layer of text": (lambda r: r["layers"].update(f="x"), "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_records_are_refused(tmp_path, rng, what):
    path = tmp_path / "f.safetensors"
    f = lr.spatial_svd(lr.dense(rng.standard_normal((4, 4, 3, 3))), 2)
    lr.save(path, {"f": f})
    change, message = DAMAGE[what]
    rewrite_record(path, change)
    with pytest.raises(ValueError, match=message):
        lr.load(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    lr.save(path, {"f": lr.dense(np.ones((1, 1, 3)))})
    tensors, metadata = io.read_tensors(path)
    io.write_tensors(path, {k: v * np.nan for k, v in tensors.items()}, metadata)
    with pytest.raises(ValueError, match="not finite"):
        lr.load(path)


def test_file_without_chains_names_dense(tmp_path):
    path = tmp_path / "w.safetensors"
    io.write_tensors(path, {"w": np.ones((2, 2, 3))}, {})
    with pytest.raises(ValueError, match=r"lowrank\.dense"):
        lr.load(path)


def test_failed_save_keeps_the_previous_file(tmp_path):
    path = tmp_path / "f.safetensors"
    lr.save(path, {"f": lr.dense(np.ones((1, 1, 3)))})
    before = path.read_bytes()
    broken = np.array([None])
    with pytest.raises(TypeError, match="'bad'"):
        io.write_tensors(path, {"bad": broken}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    with pytest.raises(TypeError, match="dict"):
        lr.save(path, lr.dense(np.ones((1, 1, 3))))


def test_layers_are_found_without_a_description(tmp_path, rng):
    tensors = {
        "a.weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "a.bias": np.ones(8, np.float32),
        "fc.weight": np.ones((10, 8), np.float32),
        "steps": np.array(7),
        "line": np.ones((4, 8, 5)),
        "counts": np.ones((2, 2, 3), np.int64),
    }
    np.savez(tmp_path / "net.npz", **tensors)
    found = layers(tmp_path / "net.npz")
    assert [x.name for x in found] == ["a", "fc", "line"]
    assert found[1].conv.stages[0].weight.shape == (10, 8, 1)
    assert [x.input_size for x in found] == [None, (1,), None]
    assert found[0].conv.bias is not None
    assert found[0].conv.output_shape((20, 21)) == (8, 20, 21)
    np.save(tmp_path / "one.npy", tensors["line"])
    assert [x.name for x in layers(tmp_path / "one.npy")] == ["one"]


def test_other_layers_are_read_beside_an_invalid_one(tmp_path):
    np.savez(tmp_path / "net.npz", a=np.ones((2, 2, 3)), b=np.full((2, 2, 3), np.nan))
    assert [x.name for x in layers(tmp_path / "net.npz", only="a")] == ["a"]
    with pytest.raises(ValueError, match=r"net\.npz: b.*NaN"):
        layers(tmp_path / "net.npz")


def test_bias_of_a_transposed_convolution_is_kept(tmp_path):
    weights = {"up.weight": np.ones((8, 4, 2, 2)), "up.bias": np.arange(4.0)}
    np.savez(tmp_path / "net.npz", **weights)
    (up,) = layers(tmp_path / "net.npz")
    assert up.conv.bias is None
    np.testing.assert_array_equal(up.bias, np.arange(4.0))


def test_layers_follow_the_description(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones((4, 2, 3, 3)), v=np.ones((4, 2, 3, 3)), b=np.ones(2))
    about = {
        "conv_layers": [
            {"weight": "w", "stride": [2, 1], "padding": [[0, 1], [1, 1]], "in_size": [8, 9]},
            {
                "name": "up", "weight": "v", "bias": "b", "stride": 2, "transposed": True,
                "in_size": [4, 4], "out_size": [8, 8],
            },
        ]
    }  # fmt: skip
    (tmp_path / "net.json").write_text(json.dumps(about))
    first, up = layers(tmp_path / "net.npz")
    assert (first.name, first.input_size) == ("w", (8, 9))
    assert first.conv.output_shape((8, 9)) == (4, 4, 9)
    assert up.conv.output_shape((4, 4)) == (2, 8, 8)
    about["conv_layers"][1]["out_size"] = [10, 9]
    (tmp_path / "net.json").write_text(json.dumps(about))
    assert layers(tmp_path / "net.npz")[1].conv.output_shape((4, 4)) == (2, 10, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "net.json: must describe layers as"),
        ("[]", "net.json: must describe layers as"),
        ('{"conv_layers": [{}]}', "net.json: must describe layers as"),
        ('{"conv_layers": [{"weight": "x"}]}', "'x'"),
        ('{"conv_layers": [{"weight": "w", "bias": "x"}]}', "'x'"),
        ('{"conv_layers": [{"weight": "w", "groups": 3}]}', "groups"),
        ('{"conv_layers": [{"weight": "w", "stride": 0}]}', "stride"),
        ('{"conv_layers": [{"weight": "w", "padding_mode": "odd"}]}', "padding_mode"),
        ('{"conv_layers": [{"weight": "w", "in_size": [8]}]}', "in_size.*2 entries"),
        ('{"conv_layers": 3}', "net.json: must describe layers as"),
        ('{"conv_layers": [{"weight": "w", "weight": "w"}]}', "'weight' is given twice"),
        ('{"conv_layers": [3]}', "net.json: must describe layers as"),
        ('{"conv_layers": [{"weight": 3}]}', "weight of entry 0.*got 3"),
        ('{"conv_layers": [{"weight": "w", "strides": 2}]}', "layer 'w': unknown key 'strides'"),
        ('{"conv_layers": [{"weight": "w", "groups": true}]}', "groups must be an integer.*True"),
        ('{"conv_layers": [{"weight": "w", "groups": 1.0}]}', r"groups must be an integer.*1\.0"),
        ('{"conv_layers": [{"weight": "w", "stride": [1, true]}]}', r"stride must be.*\[1, True\]"),
        ('{"conv_layers": [{"weight": "w", "padding": [[0, true], [1, 1]]}]}', "padding must be"),
        ('{"conv_layers": [{"weight": "w", "in_size": ["8", 8]}]}', "in_size must be"),
        ('{"conv_layers": [{"weight": "w", "value": NaN}]}', "value must be a finite number"),
        ('{"conv_layers": [{"weight": "w", "value": false}]}', "value must be a finite number"),
        ('{"conv_layers": [{"weight": "w", "transposed": 1}]}', "transposed must be true or false"),
        ('{"conv_layers": [{"weight": "w", "name": 3}]}', "name must be text, got 3"),
        ('{"conv_layers": [{"weight": "w", "bias": ["b"]}]}', "bias must be text"),
        ('{"conv_layers": [{"weight": "w", "shape": [4, 2, 3]}]}', r"shape must be \[4, 2, 3, 3\]"),
        (
            '{"conv_layers": [{"weight": "w", "in_size": [8, 8], "out_size": [8, 8]}]}',
            r"out_size must be \[6, 6\].*got \[8, 8\]",
        ),
        (
            '{"conv_layers": [{"weight": "w", "in_size": [8, 8], "macs": 2593}]}',
            "macs must be 2592.*got 2593",
        ),
        ('{"conv_layers": [{"weight": "w", "in_size": [2, 2]}]}', "layer 'w'"),
        (
            '{"conv_layers": [{"weight": "w", "transposed": true, "in_size": [8, 8], '
            '"out_size": [80, 8]}]}',
            r"out_size must be about \(10, 10\)",
        ),
        ('{"conv_layers": [], "chains": [1]}', "chains must be a table"),
        ('{"conv_layers": [], "chains": {"a": {"rnk": [1]}}}', "chain 'a': unknown key 'rnk'"),
        ('{"conv_layers": [], "chains": {"a": {"rank": [true]}}}', "rank must be"),
        ('{"conv_layers": [], "parameters": "many"}', "parameters must be an integer"),
    ],
)
def test_invalid_descriptions_are_refused(tmp_path, text, message):
    np.savez(tmp_path / "net.npz", w=np.ones((4, 2, 3, 3)))
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        layers(tmp_path / "net.npz")


def test_files_whose_content_does_not_match_their_suffix_are_refused(tmp_path):
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([{}], object))
    with pytest.raises(ValueError, match="Python objects"):
        read_weights(tmp_path / "o.npy")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"\.txt"):
        read_weights(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such file"):
        read_weights(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"gone\.npy"):
        read_weights(tmp_path / "gone.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        read_weights(tmp_path / "folder.npy")


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_files_that_are_cut_anywhere_are_refused_in_one_sentence(tmp_path, rng, ending):
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    w = rng.standard_normal((4, 3, 3, 3))
    if ending == ".npy":
        np.save(whole, w)
    elif ending == ".npz":
        np.savez_compressed(whole, w=w)
    else:
        io.write_tensors(whole, {"w": w}, {})
    data = whole.read_bytes()
    for length in [*range(0, 140), *range(140, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        for read in (read_weights, layers, files.read_layers):
            with pytest.raises(ValueError, match=rf"cut\{ending}") as why:
                read(path)
            assert "\n" not in str(why.value)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_files_with_any_byte_changed_are_read_or_refused(tmp_path, rng, ending):
    path = tmp_path / f"a{ending}"
    w = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    if ending == ".npy":
        np.save(path, w)
    elif ending == ".npz":
        np.savez(path, w=w)
    else:
        io.write_tensors(path, {"w": w}, {})
    data = path.read_bytes()
    refused = 0
    for at in range(0, min(len(data), 300)):
        for new in (0, 0x28, 0x7D, 0xFF):
            changed = bytearray(data)
            changed[at] = new
            path.write_bytes(changed)
            try:
                read_weights(path)
            except ValueError as why:
                refused += 1
                assert f"a{ending}" in str(why)  # noqa: PT017
                assert "\n" not in str(why)  # noqa: PT017
    assert refused > 100


def test_matrices_become_linear_chains_of_matrices(tmp_path, rng):
    path = tmp_path / "net.safetensors"
    w, b = rng.standard_normal((10, 8)), rng.standard_normal(10)
    io.write_tensors(path, {"fc.weight": w, "fc.bias": b}, {})
    for manifest in (None, {"conv_layers": [{"name": "fc", "weight": "fc.weight"}]}):
        if manifest:
            path.with_suffix(".json").write_text(json.dumps(manifest))
        net = files.open_model(path)
        assert [(x.name, x.input_size) for x in net.layers] == [("fc", (1,))]
        f = lr.channel_svd(net.layers[0].conv, 3)
        new = net.replaced({"fc": f})
        assert {n: t.shape for n, t in new.tensors.items() if "weight" in n} == {
            "fc.0.weight": (3, 8), "fc.1.weight": (10, 3),
        }  # fmt: skip
        new.save(tmp_path / "new.safetensors")
        again = files.open_model(tmp_path / "new.safetensors").chains["fc"]
        np.testing.assert_array_equal(again.to_dense(), f.to_dense())


@pytest.mark.full
def test_pytorch_state_dicts_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv2d(3, 8, 3)
    plain, wrapped, whole = (tmp_path / n for n in ("a.pt", "b.pth", "c.pt"))
    torch.save(conv.state_dict(), plain)
    torch.save({"epoch": 3, "state_dict": {"c.weight": conv.weight.bfloat16()}}, wrapped)
    torch.save(conv, whole)
    (found,) = layers(plain)
    np.testing.assert_array_equal(found.conv.to_dense(), conv.weight.detach().numpy())
    assert found.conv.bias is not None
    assert [x.name for x in layers(wrapped)] == ["c"]
    with pytest.raises(ValueError, match="state_dict"):
        read_weights(whole)
    (tmp_path / "d.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"d\.pt"):
        read_weights(tmp_path / "d.pt")


def test_pytorch_files_need_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"lowrank\[torch\]"):
        read_weights(tmp_path / "a.pt")


def test_every_network_of_the_data_reads_as_described(data):
    count = 0
    for path in sorted((data / "weights").glob("*.safetensors")):
        about = json.loads(path.with_suffix(".json").read_text())["conv_layers"]
        for layer, entry in zip(layers(path), about, strict=True):
            count += 1
            shape = layer.conv.output_shape(layer.input_size)
            assert list(shape[1:]) == entry["out_size"]
            assert layer.conv.cost(layer.input_size).macs == entry["macs"]
    assert count > 80
