"""Command time: rows of every runtime, and errors."""

import json
import sys

import numpy as np
import pytest

from lowrank import cli
from lowrank.cli import latency

pytest.importorskip("typer")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
QUICK = ("--threads", "1", "--repeat", "2")
SCRIPT = """
import torch
from torch import nn

def dense():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    print("made")
    return net, torch.ones(1, 3, 8, 8)

def wrong():
    return nn.ReLU()

def failing():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def lowrank(monkeypatch, capfd, tmp_path):
    """Run ``lowrank time`` in a temporary folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "net.py").write_text(SCRIPT)
    save_net(tmp_path / "free.onnx", ["N", 3, "H", "W"])
    save_net(tmp_path / "fixed.onnx", [1, 3, 8, 8])
    save_net(tmp_path / "larger.onnx", [1, 3, 9, 9])

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lowrank", "time", *words, *QUICK])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capfd.readouterr()
        return exit_info.value.code, out, err

    return run


def save_net(path, shape):
    weight = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, s)
        for name, s in (("x", shape), ("y", [shape[0], 8, *shape[2:]]))
    ]
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "net", values[:1], values[1:], [weight])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


def test_onnx_files_run_here_and_in_onnxruntime(lowrank):
    words = ("free.onnx", "fixed.onnx", "--batch", "1", "--input", "8x8", "--json")
    code, out, err = lowrank(*words)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["input"], result["threads"], result["rounds"]) == ("1x3x8x8", 1, 2)
    rows = {(r["network"], r["runtime"]): r for r in result["rows"]}
    assert list(rows) == [
        (network, runtime)
        for network in ("dense", "compressed")
        for runtime in ("lowrank", "onnxruntime")
    ]
    best = rows["dense", "onnxruntime"]["seconds"]
    for r in rows.values():
        low, high = r["quartiles"]
        assert 0 < low <= r["seconds"] <= high
        assert r["speedup"] == pytest.approx(best / r["seconds"])
        assert r["version"]
        assert r["missing"] is None


def test_scripts_give_pytorch_modules(lowrank):
    pytest.importorskip("torch")
    code, out, err = lowrank("net.py:dense", "--batch", "3", "--algorithm", "direct")
    assert code == 0
    assert "made" in err
    assert "made" not in out
    assert "3x3x8x8" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("dense")]
    assert [line[1] for line in lines] == ["lowrank", "onnxruntime", "PyTorch"]
    assert all(line[-1].endswith("x") for line in lines)
    assert max(map(len, out.splitlines())) <= 80
    assert "note" not in out


def test_a_runtime_that_is_not_installed_has_no_time(lowrank, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = lowrank("fixed.onnx")
    assert code == 0
    assert "note: onnxruntime, dense: not installed" in out
    assert "PyTorch runs no .onnx file" in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("dense    onnxruntime"))
    assert row[2:] == ["-"] * 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("net.keras",), "MODEL must be .onnx, or SCRIPT.py:FUNCTION"),
        (("gone.onnx",), "gone.onnx: no such file"),
        (("gone.py:f",), "gone.py: no such file"),
        (("free.onnx",), "--input must give the free sizes of 'x', float32 of shape (any, 3,"),
        (("fixed.onnx", "--batch", "2"), "must agree with 'x', float32 of shape (1, 3, 8, 8)"),
        (("fixed.onnx", "--input", "9x9"), "must agree with 'x'"),
        (("fixed.onnx", "--input", "0"), "--input must be 1 to 3 positive sizes"),
        (("net.py:dense", "--input", "8x8"), "--input is for .onnx files"),
        (("fixed.onnx", "--algorithm", "fast"), "--algorithm must be auto or direct, got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(lowrank, words, expected):
    code, out, err = lowrank(*words)
    assert (code, out) == (2, "")
    assert expected in err


def test_inputs_of_both_networks_must_be_equal(lowrank):
    code, out, err = lowrank("fixed.onnx", "larger.onnx")
    assert (code, out) == (2, "")
    assert (
        "both networks must take inputs of equal shapes, got 1x3x8x8 (fixed.onnx), 1x3x9x9" in err
    )


def test_errors_of_a_script_are_shown(lowrank):
    pytest.importorskip("torch")
    code, out, err = lowrank("net.py:failing")
    assert (code, out) == (2, "")
    assert "lowrank: MODEL: net.py:failing: RuntimeError: no weights" in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wrong", r"must return \(torch.nn.Module, .*got ReLU"), ("absent", "no function 'absent'")],
)
def test_a_script_must_return_a_module_and_an_example(lowrank, name, expected):
    pytest.importorskip("torch")
    job = latency.Job("dense", "PyTorch", f"net.py:{name}", 1, "auto")
    with pytest.raises(ValueError, match=expected):
        latency.load_module(job)
