"""Keras files: what is loaded and what is refused, and writing that fails."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from keras_models import L, keras, linear

import lowrank as lr
from lowrank.interop import files
from lowrank.interop.keras import KerasModel, save

h5py = pytest.importorskip("h5py")


def write(path):
    """Save the Sequential model for a file that is damaged later."""
    keras.utils.clear_session()
    save(linear(), path)


def archive_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)


def good(tmp_path):
    write(tmp_path / "good.keras")
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
def test_hostile_archives_are_refused(tmp_path, what):
    path = tmp_path / "bad.keras"
    archive_of(path, MEMBERS[what](good(tmp_path)), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bad\.keras") as why:
        KerasModel(path)
    assert "\n" not in str(why.value)


def test_archive_members_of_the_same_name_are_refused(tmp_path):
    path = tmp_path / "bad.keras"
    with pytest.warns(UserWarning, match="Duplicate"):
        archive_of(path, [*good(tmp_path).items(), ("config.json", b"{}")])
    with pytest.raises(ValueError, match="same name"):
        KerasModel(path)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, ending, share):
    path = tmp_path / f"cut.{ending}"
    write(path)
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
    zeros = np.zeros(2**26, "f4")  # 256 MiB compressed to less than 1 MiB
    file["model_weights/a"].create_dataset("extra", data=zeros, compression="gzip", chunks=(2**22,))


def nested(file, folder):
    file.create_group("/".join("x" * 300))


def weights_alone(file, folder):
    del file.attrs["model_config"]


def endless(file, folder):
    """Make a global heap with an object of size 0, in which HDF5 would loop forever."""
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
    external_link, soft_link, circle, elsewhere, virtual, unwritten, packed, nested,
    weights_alone, endless,
]  # fmt: skip


@pytest.mark.parametrize("harm", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_hdf5_is_refused(tmp_path, harm):
    path = tmp_path / "bad.h5"
    write(path)
    KerasModel(path)
    with h5py.File(path, "a") as file:
        harm(file, tmp_path)
    with pytest.raises(ValueError, match=r"bad\.h5") as why:
        KerasModel(path)
    assert "\n" not in str(why.value)


def test_other_endings_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"ending must be.*\.keras"):
        KerasModel(tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError, match=r"net\.keras: no such file"):
        KerasModel(tmp_path / "net.keras")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        KerasModel(tmp_path / "folder.keras")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, ending):
    path, out = tmp_path / f"in.{ending}", tmp_path / "out" / f"out.{ending}"
    write(path)
    net = KerasModel(path)
    new = net.replaced({})
    out.parent.mkdir()
    out.write_bytes(b"as it was")

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        save(new, out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == b"as it was"


def test_code_of_lambda_layers_is_not_run(tmp_path):
    evil = tmp_path / "evil"
    model = keras.Sequential(
        [keras.Input((4,)), L.Lambda(lambda x, p=str(evil): [x, open(p, "w").close()][0])]
    )
    assert evil.exists()  # Keras builds the model with it
    evil.unlink()
    for ending in ("keras", "h5"):
        save(model, tmp_path / f"l.{ending}")
        with pytest.raises(ValueError, match=r"l\.(keras|h5).*Lambda layers hold code.*in Python"):
            KerasModel(tmp_path / f"l.{ending}")
    assert not evil.exists()
    assert KerasModel(model).layers == ()


class Scaled(L.Layer):
    """A layer of a user."""

    def call(self, x):
        return 2 * x


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_custom_objects_are_given_or_named(tmp_path, rng, ending):
    inp = keras.Input((9, 9, 3))
    model = keras.Model(inp, L.Conv2D(4, 3, name="b")(Scaled(name="s")(inp)))
    path = tmp_path / f"own.{ending}"
    save(model, path)
    with pytest.raises(ValueError, match=rf"own\.{ending}: .*Scaled is not Keras's own.*in Python"):
        files.open_model(path)
    net = KerasModel(path, custom_objects={"Scaled": Scaled})
    new = net.replaced({"b": lr.channel_svd(net.layers[0].conv, 4)})
    x = rng.standard_normal((2, 9, 9, 3)).astype(np.float32)
    np.testing.assert_allclose(
        new.predict(x, verbose=0), model.predict(x, verbose=0), rtol=0, atol=1e-4
    )


def test_models_of_keras_2_are_read(tmp_path, rng):
    """Read the configuration that Keras 2 writes to .h5 files."""
    about = {"name": "a", "kernel_size": [5], "strides": [1], "filters": 8, "use_bias": False}
    size = {"batch_input_shape": [None, 20, 3]}
    inputs = {"class_name": "InputLayer", "config": size | {"name": "a_input"}}
    layer = {"class_name": "Conv1D", "config": about | size}
    kernel = rng.standard_normal((5, 3, 8)).astype(np.float32)
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": {"name": "net", "layers": [inputs, layer]}}
        )
        file["model_weights/a/a/kernel:0"] = kernel
        file["model_weights/a"].attrs["weight_names"] = ["a/kernel:0"]
        file["model_weights"].attrs["layer_names"] = ["a"]
    net = files.open_model(path)
    np.testing.assert_array_equal(net.layers[0].conv.to_dense(), kernel.transpose(2, 1, 0))
    new = net.replaced({"a": lr.channel_svd(net.layers[0].conv, 2)})
    files.save(new, tmp_path / "new.h5")
    assert [x.name for x in files.open_model(tmp_path / "new.h5").layers] == ["a_0", "a"]


def test_files_of_compressed_models_need_keras_alone(tmp_path, rng):
    path = tmp_path / "small.keras"
    model = linear()
    net = KerasModel(model)
    by_name = {x.name: x.conv for x in net.layers}
    new = net.replaced({n: lr.channel_svd(by_name[n], 2) for n in ("a", "mix")})
    save(new, path)
    x = np.ones((1, 40, 3), np.float32)
    code = f"""
import sys
sys.modules["lowrank"] = None
import keras, numpy
print(keras.saving.load_model({str(path)!r}).predict(numpy.ones((1, 40, 3)), verbose=0).sum())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = new.predict(x, verbose=0).sum()
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("missing", "setting"), [("keras", None), ("torch", "torch")])
def test_what_to_install_is_said(tmp_path, missing, setting):
    write(tmp_path / "net.keras")
    code = f"""
import sys
sys.modules[{missing!r}] = None
from lowrank.cli import main
sys.argv = ["lowrank", "inspect", "net.keras"]
main()
"""
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    env |= {} if setting is None else {"KERAS_BACKEND": setting}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'lowrank[keras]'" in done.stderr
    assert done.stderr.count("\n") == 1
