"""Keras files: hostile archives and HDF5 files, and writing that fails."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from keras_models import linear, write  # noqa: E402

from lowrank.interop.keras import KerasModel  # noqa: E402


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


def test_archive_members_of_the_same_name_are_refused(tmp_path, rng):
    path = tmp_path / "bad.keras"
    with pytest.warns(UserWarning, match="Duplicate"):
        archive_of(path, [*good(rng, tmp_path).items(), ("config.json", b"{}")])
    with pytest.raises(ValueError, match="same name"):
        KerasModel(path)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, rng, ending, share):
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
    zeros = np.zeros(2**26, "f4")  # 256 MiB compressed to less than 1 MiB
    file["model_weights/a"].create_dataset("extra", data=zeros, compression="gzip", chunks=(2**22,))


def nested(file, folder):
    file.create_group("/".join("x" * 300))


def named(file, folder):
    text = file.attrs["model_config"].replace('"name": "b"', '"name": "a"')
    file.attrs["model_config"] = text


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


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ending must be.*\.keras"):
        KerasModel(tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError):
        KerasModel(tmp_path / "net.keras")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_failed_save_leaves_the_old_file(tmp_path, rng, monkeypatch, ending):
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
