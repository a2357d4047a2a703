"""ONNX files: external data, hostile and damaged files, atomic writing, calibration data."""

import io
import os
import zipfile

import numpy as np
import pytest

import lowrank as lr

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402
from onnx_models import CLOSE, arrays, model_of, ran, small_net  # noqa: E402

from lowrank.interop.onnx import OnnxModel, open_model, read_batches, save  # noqa: E402
from lowrank.interop.onnx.data import inputs_of  # noqa: E402
from lowrank.interop.onnx.files import load  # noqa: E402


def outside(model, folder, **entries):
    """Write a model with its weights in w.bin; `entries` replace those of tensor b."""
    data = b""
    for tensor in model.graph.initializer:
        record = {"location": "w.bin", "offset": len(data), "length": len(tensor.raw_data)}
        if tensor.name == "b":
            record |= entries
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in record.items():
            tensor.external_data.add(key=key, value=str(value))
    (folder / "w.bin").write_bytes(data)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


@pytest.mark.parametrize("small", [0, 65536], ids=["stays outside", "is read in"])
def test_external_data_are_read_and_written(rng, tmp_path, monkeypatch, small):
    monkeypatch.setattr("lowrank.interop.onnx.files._SMALL", small)
    model, x = small_net(rng)
    want = ran(model, x=x)[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = outside(model, tmp_path / "in")
    net = open_model(path, [x])
    np.testing.assert_allclose(next(net.outputs({}))[0], want, **CLOSE)
    f = lr.channel_svd(net.layers[0].conv, rank=2)
    new = net.replaced({"conv": f})
    new_y = ran(new, x=x)[0]
    np.testing.assert_allclose(new_y, next(net.outputs({"conv": f}))[0], **CLOSE)
    save(new, tmp_path / "out" / "small.onnx")
    assert sorted(os.listdir(tmp_path / "out")) == ["small.onnx", "small.onnx.data"]
    again = open_model(tmp_path / "out" / "small.onnx", [x])
    np.testing.assert_array_equal(next(again.outputs({}))[0], new_y)
    onnx.checker.check_model(str(tmp_path / "out" / "small.onnx"), full_check=True)
    # also over the original file
    save(new, path)
    np.testing.assert_array_equal(next(open_model(path, [x]).outputs({}))[0], new_y)


def test_large_models_are_written_to_two_files(rng, tmp_path, monkeypatch):
    model, x = small_net(rng)
    net = OnnxModel(model)
    new = net.replaced({"conv": lr.channel_svd(net.layers[0].conv, rank=2)})
    save(new, tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == ["a.onnx"]
    monkeypatch.setattr("lowrank.interop.onnx.files.LARGEST", 1000)
    save(new, tmp_path / "b.onnx")
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx", "b.onnx.data"]
    assert (tmp_path / "b.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size
    a, b = (next(open_model(tmp_path / n, [x]).outputs({}))[0] for n in ("a.onnx", "b.onnx"))
    np.testing.assert_array_equal(a, b)


HOSTILE = {
    "absolute": ({"location": "/etc/passwd"}, "not a path inside"),
    "up": ({"location": "../secret"}, "not a path inside"),
    "up within": ({"location": "a/../../secret"}, "not a path inside"),
    "drive": ({"location": r"C:\secret"}, "not a path inside"),
    "backslashes": ({"location": r"..\secret"}, "not a path inside"),
    "nowhere": ({"location": ""}, "not a path inside"),
    "missing": ({"location": "other.bin"}, "not a file"),
    "folder": ({"location": "."}, "not a file"),
    "link": ({"location": "link"}, "a link out of"),
    "linked folder": ({"location": "up/secret"}, "a link out of"),
    "long": ({"length": 10**15}, "takes 1296"),
    "short": ({"length": 8}, "takes 1296"),
    "far": ({"offset": 10**15}, "truncated"),
    "before": ({"offset": -8}, "from -8"),
    "words": ({"offset": "many"}, "not a number"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_external_data_are_refused(rng, tmp_path, case):
    entries, message = HOSTILE[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(5000))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    path = outside(small_net(rng)[0], folder, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        open_model(path)
    assert "net.onnx: external data of tensor 'b'" in str(caught.value)


def test_shape_larger_than_its_data_is_refused(rng, tmp_path):
    model, _ = small_net(rng)
    path = outside(model, tmp_path)
    model.graph.initializer[1].dims[0] = 2**50
    del model.graph.initializer[1].external_data[1:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"go beyond the end of 'w\.bin'"):
        open_model(path)
    model, _ = small_net(rng)
    model.graph.initializer[1].dims[0] = 2**50
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"net\.onnx: .*\bb\b"):
        open_model(path)


def test_truncated_and_other_files_are_refused(rng, tmp_path):
    whole = small_net(rng)[0].SerializeToString()
    path = tmp_path / "net.onnx"
    for data in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(1000),
                 rng.bytes(1000)):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"net\.onnx: (not an ONNX model|not a valid)"):
            open_model(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_model(tmp_path / "other.onnx")
    with pytest.raises(IsADirectoryError):
        open_model(tmp_path)


def test_damaged_files_raise_one_line_errors(rng, tmp_path):
    whole = small_net(rng)[0].SerializeToString()
    path = tmp_path / "net.onnx"
    errors = []
    for i in rng.integers(0, len(whole), 150):
        path.write_bytes(whole[:i] + rng.bytes(1) + whole[i + 1 :])
        try:
            open_model(path)
        except ValueError as why:
            errors.append(str(why))
    assert len(errors) > 5
    assert all(str(path) in e and "\n" not in e for e in errors), errors


def test_inputs_need_a_shape(rng, tmp_path):
    model, _ = small_net(rng)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="input 'x' must have a type and a shape, whose sizes may"):
        open_model(tmp_path / "net.onnx")


@pytest.mark.full  # it reads and writes 2.2 GB
def test_a_tensor_of_more_than_two_gigabytes(rng, tmp_path):
    w, x = arrays(rng, (8, 4), (2, 5, 4))
    rows = 2**27 + 3  # of 16 bytes
    nodes = [
        helper.make_node("Gather", ["table", "at"], ["e"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["a"], "fc"),
        helper.make_node("Concat", ["a", "e"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"x": ["N", 5, 4]}, ("a", "e"), {"w": w.T, "at": np.array([rows - 1])})
    del model.graph.node[2:]
    table = model.graph.initializer.add(name="table", data_type=TensorProto.FLOAT, dims=[rows, 4])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "t.bin"), ("offset", 0), ("length", rows * 16)):
        table.external_data.add(key=key, value=str(value))
    with open(tmp_path / "t.bin", "wb") as file:  # zeros, which take no space on the disk
        file.truncate(rows * 16 - 4)
        file.seek(rows * 16 - 4)
        file.write(np.float32(7).tobytes())
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    net = open_model(tmp_path / "net.onnx", [x])
    f = lr.channel_svd(net.layers[0].conv, 2)
    save(net.replaced({"fc": f}), tmp_path / "small.onnx")
    a, e = next(open_model(tmp_path / "small.onnx", [x]).outputs({}))
    np.testing.assert_allclose(a, f(x.swapaxes(1, 2)).swapaxes(1, 2), **CLOSE)
    np.testing.assert_array_equal(e, [[0, 0, 0, 7]])


def test_failed_save_leaves_the_old_file(rng, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    model, _ = small_net(rng)
    bad = onnx.ModelProto()
    bad.CopyFrom(model)
    bad.graph.node[0].op_type = "Convolution"
    with pytest.raises(ValueError, match="not a valid ONNX model"):
        save(bad, path)
    assert path.read_bytes() == b"before"

    def fails(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails)
        with pytest.raises(OSError, match="no space left"):
            save(model, path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["net.onnx"]
    save(model, path)
    assert load(path) == model
    assert os.listdir(tmp_path) == ["net.onnx"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        save(model, tmp_path / "nowhere" / "net.onnx")


def open_model_of(model, folder, batches):
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return open_model(folder / "model.onnx", batches)


def test_batches_are_read_from_a_file(rng, tmp_path):
    model, _ = small_net(rng)
    (x,) = arrays(rng, (130, 3, 8, 8), dtype=np.float64)
    path = tmp_path / "x.npz"
    np.savez(path, anything=x)
    net = open_model_of(model, tmp_path, path)
    assert net.batches == 3
    got = [b["conv"][0] for b in net.inputs(["conv"], {})]
    assert [len(g) for g in got] == [64, 64, 2]
    np.testing.assert_array_equal(np.concatenate(got), x.astype(np.float32))


def test_batches_of_several_inputs_and_of_fixed_size(rng, tmp_path):
    takes = inputs_of(model_of(
        [helper.make_node("Add", ["a", "b"], ["y"])], {"a": [4, 2], "b": [4, 2]}
    ))  # fmt: skip
    a, b = arrays(rng, (10, 2), (10, 2))
    np.savez(tmp_path / "ab.npz", a=a, b=b)
    batches = read_batches(tmp_path / "ab.npz", takes)
    assert [x["b"].shape for x in batches] == [(4, 2), (4, 2)]  # two are left over
    np.testing.assert_array_equal(batches[1]["a"], a[4:8])
    np.savez(tmp_path / "ab.npz", a=a, b=b[:5])
    with pytest.raises(ValueError, match="different numbers of examples"):
        read_batches(tmp_path / "ab.npz", takes)
    np.savez(tmp_path / "ab.npz", a=a[:3], b=b[:3])
    with pytest.raises(ValueError, match="too few examples"):
        read_batches(tmp_path / "ab.npz", takes)
    np.savez(tmp_path / "ab.npz", a=a, c=b)
    with pytest.raises(ValueError, match="no array 'b' among 'a', 'c'"):
        read_batches(tmp_path / "ab.npz", takes)


BAD = {
    "nan": (np.full((2, 3, 8, 8), np.nan), "NaN, infinite or too large"),
    "too large": (np.full((2, 3, 8, 8), 1e300), "NaN, infinite or too large"),
    "shape": (np.ones((2, 4, 8, 8)), r"takes 'x', float32 of shape \(any, 3, 8, 8\)"),
    "axes": (np.ones((3, 8, 8)), r"takes 'x', float32 of shape \(any, 3, 8, 8\)"),
    "empty": (np.ones((0, 3, 8, 8)), "too few examples|empty"),
    "complex": (np.ones((2, 3, 8, 8), complex), "got complex128"),
    "text": (np.full((2, 3, 8, 8), "a"), "got <U1"),
}


@pytest.mark.parametrize("case", BAD)
def test_batches_that_do_not_fit_are_refused(rng, tmp_path, case):
    array, message = BAD[case]
    model, _ = small_net(rng)
    np.savez(tmp_path / "x.npz", x=array)
    with pytest.raises(ValueError, match=message) as caught:
        open_model_of(model, tmp_path, tmp_path / "x.npz")
    assert "x.npz" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        OnnxModel(model, [array])


def test_damaged_calibration_files_are_refused(rng, tmp_path):
    model, x = small_net(rng)
    path = tmp_path / "x.npz"
    takes = inputs_of(model)
    np.savez(path, x=x)
    whole = path.read_bytes()
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        held, {"shape": (2**40, 3, 8, 8), "fortran_order": False, "descr": "<f4"}
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", held.getvalue())
    with pytest.raises(ValueError, match=r"huge\.npz: .* not as long as its shape"):
        read_batches(tmp_path / "huge.npz", takes)
    np.savez(path, x=np.array([{}]))
    with pytest.raises(ValueError, match="Python objects"):
        read_batches(path, takes)
    for data in (b"", b"hello", whole[:100], whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.npz: not an \.npz file"):
            read_batches(path, takes)
    with pytest.raises(FileNotFoundError):
        read_batches(tmp_path / "none.npz", takes)


def test_integer_inputs_keep_their_type(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    takes = inputs_of(model_of([node], {"x": ["N", 2]}, kind=TensorProto.INT32))
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([[1, 2]]))
    (batch,) = read_batches(path, takes)
    assert batch["x"].dtype == np.int32
    np.savez(path, x=np.array([[1, 2**40]]))
    with pytest.raises(ValueError, match="out of its range"):
        read_batches(path, takes)
    np.savez(path, x=np.array([[1.5, 2]]))
    with pytest.raises(ValueError, match="got float64"):
        read_batches(path, takes)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("gewichte-ü.bin".encode(), True),
        ("gewichte-ü.bin".encode("latin-1"), True),
        ("重み.bin".encode("shift-jis"), True),
        (b"100%2e.bin", True),
        (b"../\xff.bin", False),
        (b"\xc0\xae\xc0\xae/secret.bin", False),  # an overlong form of ..
        (b"/\xff.bin", False),
    ],
)
def test_external_data_of_any_encoding(rng, tmp_path, raw, found):
    model, x = small_net(rng)
    folder = tmp_path / "folder"
    folder.mkdir()
    stand_in = "x" * len(raw)
    onnx.save(
        model, folder / "net.onnx", save_as_external_data=True, location=stand_in, size_threshold=0
    )
    data = (folder / "net.onnx").read_bytes()
    assert data.count(stand_in.encode()) > 1
    (folder / "net.onnx").write_bytes(data.replace(stand_in.encode(), raw))
    if found:
        os.rename(folder / stand_in, os.fsencode(folder) + b"/" + raw)
        net = open_model(folder / "net.onnx", [x])
        assert next(net.outputs({}))[0].shape == (5, 4)
    else:
        os.rename(folder / stand_in, tmp_path / "secret.bin")
        with pytest.raises(ValueError, match=r"net\.onnx: external data of tensor") as why:
            open_model(folder / "net.onnx")
        str(why.value).encode()  # can be printed
