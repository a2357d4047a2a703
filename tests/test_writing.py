"""Files are written as a whole: the old one stays on every failure, and nothing is left behind."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import lowrank as lr
from lowrank import demo, report
from lowrank.compress import make_plan
from lowrank.core import files
from lowrank.interop.onnx.files import save as save_onnx
from lowrank.interop.weights import WeightsModel
from lowrank.report import figures


@pytest.fixture(scope="module")
def chain():
    w = np.random.default_rng(0).standard_normal((64, 16, 3, 3))
    return lr.spatial_svd(lr.dense(w, padding=1), 4)


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def _write_all(*paths):
    with files.atomic_write_all(*paths) as parts:
        for part in parts:
            part.write_text("new")


def _write_and_fail(*paths):
    with files.atomic_write_all(*paths) as parts:
        parts[0].write_text("newer")
        raise ZeroDivisionError


def test_files_appear_together_or_not_at_all(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("old a")
    with files.atomic_write_all(a, b) as parts:
        for part in parts:
            part.write_text("new")
        assert a.read_text() == "old a"
        assert not b.exists()
    assert a.read_text() == b.read_text() == "new"
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(a, b)
    assert a.read_text() == "new"
    assert _names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("has_links", [True, False])
def test_earlier_files_are_restored_if_a_later_one_fails(tmp_path, monkeypatch, exists, has_links):
    a, b = tmp_path / "a", tmp_path / "b"
    if exists:
        a.write_text("old")
    replace = os.replace

    def refuse(source, target):
        if Path(target) == b:
            raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))
        replace(source, target)

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(PermissionError) as error:
        _write_all(a, b)
    assert error.value.filename == str(b)
    assert _names(tmp_path) == (["a"] if exists else [])
    if exists:
        assert a.read_text() == "old"


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path, chain):
    path, gate = tmp_path / "chains.safetensors", threading.Barrier(8)

    def write(_):
        gate.wait()
        lr.save(path, {"layer": chain})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(240)))
    assert list(lr.load(path)) == ["layer"]
    assert _names(tmp_path) == [path.name]


def test_stale_and_foreign_files_stay(tmp_path, chain):
    path = tmp_path / "chains.safetensors"
    others = {f".{path.name}.{os.getpid()}.part", "chains.part.safetensors", ".lowrank-x"}
    for name in others:
        (tmp_path / name).write_text("mine")
    lr.save(path, {"layer": chain})
    assert {*_names(tmp_path)} == {path.name, *others}
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_a_link_is_followed_and_a_name_may_be_as_long_as_the_disk_allows(tmp_path, chain):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.safetensors", tmp_path / "far" / ("n" * 251 + ".saf")
    link.symlink_to(target)
    lr.save(link, {"layer": chain})
    assert link.is_symlink()
    assert list(lr.load(target)) == ["layer"]
    assert _names(target.parent) == [target.name]


@pytest.mark.parametrize(
    ("name", "text"),
    [("folder", "folder: is a folder"), ("pipe", "pipe: must be a plain file"),
     ("none/file", "file: there is no folder")],
)  # fmt: skip
def test_targets_that_are_no_files_are_refused(tmp_path, chain, name, text):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=text):
        lr.save(tmp_path / name, {"layer": chain})
    assert _names(tmp_path) == ["folder", "pipe"]


def _write_report(path):
    net = WeightsModel(demo.WEIGHTS)
    result = lr.compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    report.save(report.compare(net, result, measure=False), path)


def _write_plan(path):
    make_plan(WeightsModel(demo.WEIGHTS), macs=0.5).save(path)


def _write_figure(path):
    pytest.importorskip("matplotlib")
    figures.spectrum(lr.dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3))), path)


def _write_weights(path):
    WeightsModel(demo.WEIGHTS).replaced({}).save(path)


def _write_onnx(path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.parser.parse_graph(
        "g (float[N, 3, 64, 64] x) => (float[N, 3, 64, 64] y) {y = Add(x, w)}"
    )
    w = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    save_onnx(onnx.helper.make_model(graph), path)


WRITERS = {
    "chains.safetensors": lambda path: lr.save(
        path, {"layer": lr.dense(np.random.default_rng(0).standard_normal((32, 16, 3, 3)))}
    ),
    "report.html": _write_report,
    "plan.json": _write_plan,
    "figure.png": _write_figure,
    "net.safetensors": _write_weights,
    "net.npz": _write_weights,
    "net.onnx": _write_onnx,
}


@pytest.fixture(params=sorted(WRITERS))
def target(request, tmp_path):
    """Return a writer and the path of an old file that it would replace."""
    path = tmp_path / request.param
    path.write_bytes(b"old")
    return WRITERS[request.param], path


def test_a_full_disk_leaves_the_old_file_and_the_error_names_it(target):
    write, path = target
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # bytes of any file
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert _names(path.parent) == [path.name]


def test_a_read_only_folder_leaves_the_old_file_and_the_error_names_it(target, monkeypatch):
    write, path = target

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path.parent / ".lowrank-1"))

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match="Read-only file system") as error:
        write(path)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"


def test_an_error_that_names_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, files.atomic_write(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert error.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_killed_writer_leaves_the_old_file(tmp_path, chain, moment):
    path = tmp_path / "chains.safetensors"
    lr.save(path, {"old": chain})
    code = f"""
import os, signal
import numpy as np
import lowrank as lr
from lowrank import io
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, {moment!r}, die)
lr.save({str(path)!r}, {{"new": lr.dense(np.ones((8, 8, 3, 3)))}})
"""
    run = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(lr.load(path)) == ["old"]
    lr.save(path, {"new": chain})
    assert list(lr.load(path)) == ["new"]
