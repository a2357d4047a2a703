"""Commands for whole networks: budgets, plans, and files written atomically."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_clock import FakeMeasurements

from lowrank import cli, demo, io, perfmodel
from lowrank.cli import interruption
from lowrank.compress import CompressionPlan, reconstruct
from lowrank.compress.plan import VERSION
from lowrank.interop import files
from lowrank.interop.weights import WeightsModel, layers
from lowrank.report import comparison

pytest.importorskip("typer")
DIGITS = str(demo.WEIGHTS)
QUICK = ("--families", "spatial_svd,channel_svd")


@pytest.fixture
def lowrank(monkeypatch, capsys, tmp_path):
    """Run a command in a temporary folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interruption, "end_process", lambda: None)  # it is that of the tests

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return run


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Measure layers for reports by a formula: the machine may be busy."""
    monkeypatch.setattr(comparison, "Measurements", FakeMeasurements({1: 1, 2: 1, 3: 1}))


@pytest.fixture
def calibration(tmp_path):
    """Write inputs of the layers; every second channel is twice the previous one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in WeightsModel(DIGITS).layers:
        x = rng.standard_normal((16, *layer.conv.input_shape(layer.input_size))).astype(np.float32)
        if x.shape[1] > 1:
            x[:, 1::2] = 2 * x[:, ::2]
        arrays[layer.name] = x
    np.savez(tmp_path / "data.npz", **arrays)
    return "data.npz"


@pytest.fixture
def calibrated(monkeypatch):
    """Return the arguments of calibrations, which this machine does not need."""
    asked = []
    here = replace(perfmodel.current(), calibrated=True)
    monkeypatch.setattr(perfmodel, "current", lambda: here)
    monkeypatch.setattr(perfmodel, "calibrate", lambda **options: asked.append(options))
    return asked


def macs(path):
    """Return the MACs of all layers of a weights file."""
    return sum(x.conv.cost(x.input_size).macs for x in layers(path))


def test_compress_keeps_the_budget(lowrank, tmp_path):
    code, out, err = lowrank("compress", DIGITS, "--macs", "0.5", "-o", "a.safetensors", *QUICK)
    assert (code, err) == (0, "")
    assert "white-noise" in out
    assert re.search(r"conv2 +(spatial_svd|channel_svd)", out)
    whole = sum(x.cost.macs for x in WeightsModel(DIGITS).layers)
    assert 0.3 * whole < macs(tmp_path / "a.safetensors") <= 0.5 * whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_calibration_data_reduce_the_output_errors(lowrank, calibration):
    words = ("compress", DIGITS, "--macs", "0.4", *QUICK, "--json", "-o", "a.npz")
    white = json.loads(lowrank(*words)[1])
    code, out, _ = lowrank(*words, "--calibrate", calibration)
    calibrated = json.loads(out)
    assert code == 0
    assert (white["examples"], calibrated["examples"]) == (0, 16)
    for found in (white, calibrated):
        assert found["macs"][1] <= 0.4 * found["macs"][0]
        assert all(x["kernel_error"] >= x["kernel_bound"] - 1e-6 for x in found["layers"][1:])
    errors = [
        [x["fitted"] for x in found["layers"] if x["fitted"]] for found in (white, calibrated)
    ]
    assert max(errors[1]) < min(errors[0])  # half of the channels are redundant


def test_compress_follows_an_edited_plan(lowrank, calibrated, tmp_path):
    words = ("plan", DIGITS, "--params", "30k", "--time", "0.9", "--no-measure", *QUICK)
    words = (*words, "--threads", "1")
    code, out, err = lowrank(*words, "--pin", "conv1", "-o", "plan.json")
    assert (code, err) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    plan = CompressionPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.total("params")[0] <= 30_000
    assert "conv1" not in plan.changed
    _, out, _ = lowrank(*words, "--pin", "conv1", "--json")
    assert json.loads(out)["layers"] == json.loads(plan.to_json())["layers"]
    # edited by hand: another rank, and no alternatives
    edited = json.loads(plan.to_json())
    del edited["alternatives"]
    name = plan.changed[0]
    edited["layers"][name] |= {"family": "spatial_svd", "variant": "h-w", "rank": [3]}
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    code, out, _ = lowrank("compress", DIGITS, "--plan", "plan.json", "-o", "a.npz", "--json")
    assert code == 0
    found = {x["name"]: x for x in json.loads(out)["layers"]}
    assert found[name]["rank"] == [3]


def test_limits_of_a_plan_file_are_budgets(lowrank, calibrated, tmp_path):
    words = ("plan", DIGITS, "--macs", "0.5", "--time", "0.97", "--no-measure", *QUICK)
    code, _, err = lowrank(*words, "--threads", "1", "-o", "plan.json")
    assert (code, err) == (0, "")
    text = (tmp_path / "plan.json").read_text()
    plan, written = CompressionPlan.from_json(text), json.loads(text)
    assert plan.limits["macs"] == 0.5 * plan.total("macs")[1]
    assert written["limits"]["seconds"] == f"{plan.limits['seconds']!r}s"
    written["limits"] = {"macs": "60%", "params": "20k", "seconds": "3ms"}
    edited = CompressionPlan.from_json(json.dumps(written))
    macs = plan.total("macs")[1]
    assert edited.limits == {"macs": 0.6 * macs, "params": 20_000.0, "seconds": 0.003}
    for limit in (3, "2", None, "0.5M"):
        written["limits"] = {"seconds": limit}
        with pytest.raises(ValueError, match=r"not a plan: seconds must be a"):
            CompressionPlan.from_json(json.dumps(written))


def test_cap_and_leave_out_restrict_the_plan(lowrank):
    words = ("plan", DIGITS, "--macs", "0.6", *QUICK, "--json")
    entry = json.loads(lowrank(*words, "--cap", "conv2=20%")[1])["layers"]["conv2"]
    assert entry["macs"] <= 0.2 * entry["dense"]["macs"]
    found = json.loads(lowrank(*words, "--leave-out", "conv2")[1])["layers"]
    assert sorted(found) == ["conv1", "conv3"]


def test_evaluate_runs_the_users_function_before_and_after(lowrank, tmp_path):
    (tmp_path / "score.py").write_text(
        "import os\nfrom helper import size\n\ndef score(path):\n    print('hi')\n"
        "    return size(path)\n\ndef crash(path):\n    raise KeyError('x')\n"
        "def none(path):\n    return float('nan')\n"
    )
    (tmp_path / "helper.py").write_text("import os\nsize = os.path.getsize\n")
    words = ("compress", DIGITS, "--macs", "0.5", *QUICK, "-o", "a.safetensors")
    code, out, err = lowrank(*words, "--json", "--evaluate", "score.py:score")
    assert code == 0
    assert err == "hi\nhi\n"
    sizes = [demo.WEIGHTS.stat().st_size, (tmp_path / "a.safetensors").stat().st_size]
    assert json.loads(out)["scores"] == sizes
    (tmp_path / "a.safetensors").unlink()
    for name, message in (("crash", "KeyError"), ("none", "nan"), ("gone", "no function")):
        code, out, err = lowrank(*words, "--evaluate", f"score.py:{name}")
        assert code == 2
        assert message in err
        assert not (tmp_path / "a.safetensors").exists()


def test_a_function_that_fails_on_the_compressed_network_keeps_it(lowrank, tmp_path):
    (tmp_path / "score.py").write_text("def f(path):\n    return 1 / ('a.safe' not in path)\n")
    words = ("compress", DIGITS, "--macs", "0.5", *QUICK, "-o", "a.safetensors")
    code, out, err = lowrank(*words, "--evaluate", "score.py:f", "--report", "page.html")
    assert code == 2
    assert err == (
        "lowrank: --evaluate: score.py:f: ZeroDivisionError: division by zero; "
        "the network was written to a.safetensors\n"
    )
    assert "wrote a.safetensors\nwrote a.json\nwrote page.html" in out
    assert 0 < macs(tmp_path / "a.safetensors") <= 0.5 * macs(DIGITS)
    assert "Your evaluation" not in (tmp_path / "page.html").read_text()


def test_the_first_line_is_the_latency_or_the_warning_that_accuracy_falls(
    lowrank, calibration, tmp_path
):
    (tmp_path / "score.py").write_text("def f(path):\n    return 0.75 if 'a.s' in path else 1.0\n")
    words = ("compress", DIGITS, "--macs", "0.5", *QUICK, "-o", "a.safetensors", "--evaluate")
    out = lowrank(*words, "score.py:f")[1].splitlines()
    assert out[0].startswith(
        "warning: no calibration data: accuracy will fall (evaluation: 1 before, 0.75 after)"
    )
    assert re.match(r"latency .* -> .* in lowrank, batch 1", out[1])
    out = lowrank(*words, "score.py:f", "--calibrate", calibration)[1].splitlines()
    assert re.match(r"latency .* -> .* in lowrank, batch 1", out[0])
    assert out[1] == "evaluation: 1 before, 0.75 after"
    assert "warning" not in "\n".join(out)
    # A plan on its own starts the same way.
    out = lowrank("plan", DIGITS, "--macs", "0.5", *QUICK)[1].splitlines()
    assert out[0].startswith("warning: no calibration data: accuracy will fall, since")
    assert out[1].startswith("latency ")


def test_times_are_those_of_the_runtime(lowrank, calibrated):
    words = ("plan", DIGITS, *QUICK, "--json", "--threads", "1")
    plans = {
        runtime: json.loads(lowrank(*words, "--macs", "0.5", "--runtime", runtime)[1])
        for runtime in ("lowrank", "torch")
    }
    for runtime, plan in plans.items():
        assert plan["latency"]["runtime"] == plan["about"]["runtime"] == runtime
        layer = WeightsModel(DIGITS).layers[1]
        at = perfmodel.predict(
            layer.conv, layer.input_size, threads=1, runtime=runtime, in_network=True
        )
        assert plan["layers"]["conv2"]["dense"]["seconds"] == pytest.approx(at.seconds)
    words = (*words, "--time", "0.95", "--no-measure")
    lowrank(*words)
    assert calibrated == []
    # Coefficients of a runtime that are missing are measured.
    here = perfmodel.current()
    coefficients = {k: v for k, v in here.coefficients.items() if k != "torch"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perfmodel, "current", lambda: replace(here, coefficients=coefficients))
        lowrank(*words, "--runtime", "torch")
    assert calibrated == [{"quick": True, "runtimes": ["torch"]}]


def test_tables_fit_in_80_columns(lowrank, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(0)
    names = [f"stage{i}.block{i}.convolution{i}" for i in range(3)]
    weights = {n: rng.standard_normal((64, 64, 3, 3)).astype(np.float32) for n in names}
    net_of(tmp_path / "net.npz", weights)
    out = lowrank("plan", "net.npz", "--macs", "0.3", "--families", "tucker,channel_svd")[1]
    table = [line for line in out.splitlines() if line.startswith(("layer", "stage", "all"))]
    assert len(table) == 5
    assert max(map(len, table)) <= 80
    assert "Columns that do not fit in 80 characters: params" in out
    head = table[0].split()
    assert head.index("time") + 2 == head.index("macs")  # with its share
    assert head.count("of") == 2


def test_an_interrupted_run_resumes_from_the_finished_layers(lowrank, monkeypatch, tmp_path):
    fitted = reconstruct.fit
    calls = []

    def count(layer, *args, **options):
        if len(calls) == 1 and interrupted:
            raise KeyboardInterrupt
        calls.append(layer.name)
        return fitted(layer, *args, **options)

    monkeypatch.setattr(reconstruct, "fit", count)
    words = ("compress", DIGITS, "--macs", "0.4", *QUICK)
    interrupted = False
    lowrank(*words, "-o", "whole.safetensors")
    names, calls = calls, []
    assert len(names) > 1
    interrupted = True
    code, _, err = lowrank(*words, "--resume", "kept", "-o", "a.safetensors")
    assert code == 130
    assert "resume" in err
    assert not (tmp_path / "a.safetensors").exists()
    interrupted = False
    code, _, _ = lowrank(*words, "--resume", "kept", "-o", "a.safetensors")
    assert code == 0
    assert calls == names  # each was fitted once
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    # another budget is another run
    calls.clear()
    lowrank("compress", DIGITS, "--macs", "0.3", *QUICK, "--resume", "kept", "-o", "b.safetensors")
    assert calls


def net_of(path, weights, **about):
    """Write a weights file with its description."""
    np.savez(path, **{f"{name}.weight": w for name, w in weights.items()})
    entries = [
        {
            "name": name, "weight": f"{name}.weight", "shape": list(w.shape), "stride": [1, 1],
            "padding": [0, 0], "dilation": [1, 1], "groups": 1, "transposed": False,
            "in_size": [8, 8], **about,
        }
        for name, w in weights.items()
    ]  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps({"conv_layers": entries}))


def test_layers_left_unchanged_are_named(lowrank, tmp_path):
    net_of(tmp_path / "net.npz", {n: np.eye(8, dtype=np.float32)[..., None, None] for n in "ab"})
    about = json.loads((tmp_path / "net.json").read_text())
    del about["conv_layers"][1]["in_size"]
    (tmp_path / "net.json").write_text(json.dumps(about))
    code, out, _ = lowrank("compress", "net.npz", "--macs", "0.5", "-o", "c.npz")
    assert code == 0
    assert "note: left out, unchanged and in no budget: 1 layer" in out
    assert "note: b: its input size" in out
    assert [x.name for x in layers(tmp_path / "c.npz")] == ["a", "b"]


def test_no_file_is_written_if_nothing_can_be_saved(lowrank, tmp_path):
    net_of(tmp_path / "net.npz", {"a": np.ones((2, 2, 1, 1), np.float32)})
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = lowrank("compress", "net.npz", "--macs", "0.9", "-o", "b.npz")
    assert (code, err) == (1, "")
    assert "nothing to compress" in out
    code, out, _ = lowrank("compress", DIGITS, "--macs", "1", *QUICK, "-o", "b.npz", "--json")
    assert code == 1
    assert json.loads(out)["changed"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == before


C = ("compress", DIGITS, "-o", "a.safetensors")
MISTAKES = [
    (C, "give a budget: --time, --macs"),
    ((*C, "--macs", "0.0001"), "infeasible: the minimum"),
    ((*C, "--macs", "7"), "share in|infeasible"),
    ((*C, "--macs", "nan"), "share in"),
    ((*C, "--macs", "7X"), "'7X'"),
    ((*C, "--seconds", "soon"), "--time must be a share.*with a unit.*'soon'"),
    ((*C, "--time", "3"), "--time must be a share.*with a unit.*'3'"),
    ((*C, "--bytes", "3ms"), "--bytes must be a share.*'3ms'"),
    ((*C, "--macs", "0.5", "--runtime", "tf"), "--runtime must be one of lowrank.*'tf'"),
    ((*C, "--macs", "0.5", "--families", "cq"), "'cq'"),
    ((*C, "--macs", "0.5", "--families", ","), "--families"),
    ((*C, "--macs", "0.5", "--pin", "conv9"), "'conv9'"),
    ((*C, "--macs", "0.5", "--cap", "conv2"), "NAME=SHARE"),
    ((*C, "--macs", "0.5", "--cap", "conv2=2"), "NAME=SHARE"),
    ((*C, "--macs", "0.5", "--cap", "conv2=0.0001"), "cap of conv2 must be at least"),
    ((*C, "--macs", "0.5", "--leave-out", "*"), "convolution"),
    ((*C, "--macs", "0.5", "--batch", "0"), "batch"),
    ((*C, "--macs", "0.5", "--passes", "0"), "passes"),
    ((*C, "--macs", "0.5", "--plan", "plan.json"), "--plan excludes --macs"),
    ((*C, "--seconds", "0.5", "--plan", "plan.json"), "--plan excludes --time"),
    ((*C, "--runtime", "torch", "--plan", "plan.json"), "--plan excludes --runtime"),
    ((*C, "--plan", "gone.json"), "gone.json"),
    ((*C, "--plan", "broken.json"), "broken.json: not a plan"),
    ((*C, "--plan", "other.json"), "must be of this model.*conv9"),
    ((*C, "--plan", "family.json"), "family of conv2 must be one of"),
    ((*C, "--macs", "0.5", "--calibrate", "gone.npz"), "gone.npz"),
    ((*C, "--macs", "0.5", "--calibrate", "shape.npz"), "shape.npz: 'conv2' must"),
    ((*C, "--macs", "0.5", "--calibrate", "nan.npz"), "nan.npz: 'conv2' must"),
    ((*C, "--macs", "0.5", "--calibrate", "part.npz"), "no inputs of conv"),
    ((*C, "--macs", "0.5", "--calibrate", "plan.json"), "come as .npz"),
    ((*C, "--macs", "0.5", "--report", "a.svg"), r"\.html"),
    ((*C, "--macs", "0.5", "--report", "no/a.html"), "folder"),
    ((*C, "--macs", "0.5", "--evaluate", "score"), "SCRIPT.py:FUNCTION"),
    ((*C, "--macs", "0.5", "--evaluate", "gone.py:f"), "gone.py"),
    (("compress", DIGITS, "--macs", "0.5", "-o", DIGITS), "the original"),
    (("compress", DIGITS, "--macs", "0.5", "-o", "a.onnx"), "came as .safetensors"),
    (("compress", DIGITS, "--macs", "0.5", "-o", "no/a.npz"), "folder"),
    (("compress", DIGITS, "--macs", "0.5"), "out"),
    (("compress", "gone.onnx", "--macs", "0.5", "-o", "a.onnx"), "gone.onnx"),
    (("compress", "net.pth", "--macs", "0.5", "-o", "a.pth"), "PyTorch"),
    (("compress", "net.txt", "--macs", "0.5", "-o", "a.txt"), "'.txt'"),
    (("compress", "net.npz", "--macs", "0.5", "-o", "net.safetensors"), "net.json, the original"),
    (("compress", "none.npz", "--macs", "0.5", "-o", "a.npz"), "convolution"),
    (("plan", "bare.npz", "--macs", "0.5"), "no layer can be compressed: bare"),
    (("plan", DIGITS, "--macs", "0.5", "-o", DIGITS), "another file of this command"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[" ".join(w[3:])[:60] for w, _ in MISTAKES]
)
def test_wrong_arguments_give_one_line_and_no_file(lowrank, tmp_path, words, message):
    if message == "gone.onnx":
        pytest.importorskip("onnxruntime")
    net_of(tmp_path / "net.npz", {"a": np.ones((4, 4, 3, 3), np.float32)})
    np.savez(tmp_path / "none.npz", vector=np.ones(3, np.float32))
    np.savez(tmp_path / "bare.npz", **{"bare.weight": np.ones((4, 4, 3, 3), np.float32)})
    np.savez(tmp_path / "shape.npz", conv2=np.ones((2, 3, 8, 8), np.float32))
    np.savez(tmp_path / "nan.npz", conv2=np.full((2, 32, 8, 8), np.nan, np.float32))
    np.savez(tmp_path / "part.npz", conv2=np.ones((2, 32, 8, 8), np.float32))
    cost = {"macs": 1, "params": 1, "traffic": 1, "fused": 1, "peak": 1, "itemsize": 4}
    entry = cost | {
        "family": "spatial_svd",
        "variant": "h-w",
        "rank": [1],
        "error": 0.1,
        "bound": 0,
    }
    dense = cost | {"family": "dense", "variant": "", "rank": [], "error": 0, "bound": 0}
    entry |= {"dense": dense}
    about = {"batch": 1, "seed": 0, "threads": None, "runtime": "lowrank"}
    plan = {"version": VERSION, "limits": {}, "loss": 0, "gap": 0, "about": about, "layers": {}}
    texts = {
        "plan": json.dumps(plan),
        "broken": json.dumps(plan)[:-9],
        "other": json.dumps(plan | {"layers": {"conv9": entry}}),
        "family": json.dumps(plan | {"layers": {"conv2": entry | {"family": "cq"}}}),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    for name in ("net.pth", "net.txt"):
        (tmp_path / name).write_text("x")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = lowrank(*words)
    assert code == 2, out
    assert err.count("\n") == 1
    assert err.startswith("lowrank: ")
    assert re.search(message, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_damaged_files_of_every_format_are_refused(lowrank, tmp_path):
    rng = np.random.default_rng(0)
    whole = {".safetensors": demo.WEIGHTS.read_bytes(), ".keras": b"PK\3\4", ".h5": b"\x89HDF"}
    np.savez(tmp_path / "net.npz", w=np.ones((4, 4, 3, 3), np.float32))
    whole[".npz"] = (tmp_path / "net.npz").read_bytes()
    for ending, data in whole.items():
        for length in (0, 1, 7, len(data) // 3, len(data) - 1):
            path = tmp_path / f"cut{ending}"
            path.write_bytes(data[:length])
            with pytest.raises((ValueError, ImportError)):
                files.open_model(path)
        noise = rng.integers(0, 256, 400, dtype=np.uint8).tobytes()
        path.write_bytes(noise)
        with pytest.raises((ValueError, ImportError)):
            files.open_model(path)
    code, out, err = lowrank("compress", path.name, "--macs", "0.5", "-o", f"a{path.suffix}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / f"a{path.suffix}").exists()


def test_a_failed_write_keeps_the_old_file(lowrank, monkeypatch, tmp_path):
    (tmp_path / "a.safetensors").write_text("as it was")

    def full(*_):
        raise OSError(28, "No space left on device", "a.safetensors")

    monkeypatch.setattr("lowrank.io.write_tensors", full)
    code, _, err = lowrank("compress", DIGITS, "--macs", "0.5", *QUICK, "-o", "a.safetensors")
    assert code == 2
    assert "No space left" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "as it was"


def test_compress_onnx(lowrank, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((8, i, 3, 3)).astype(np.float32), name)
        for name, i in (("v", 3), ("w", 8))
    ]
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "net (float[N, 3, 9, 9] x) => (float[N, 8, 5, 5] y)"
        "{a = Conv(x, v)  r = Relu(a)  y = Conv(r, w)}"
    )
    model.graph.initializer.extend(weights)
    onnx.save(model, tmp_path / "net.onnx")
    x = rng.standard_normal((40, 3, 9, 9)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    code, out, err = lowrank(
        "compress", "net.onnx", "--calibrate", "x.npz", "--macs", "0.6", "--passes", "2",
        "-o", "small.onnx", "--report", "page.html", "--threads", "1", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["examples"] == 40
    assert result["measured"][0] > 0
    old, new = (
        files.open_model(tmp_path / n, tmp_path / "x.npz") for n in ("net.onnx", "small.onnx")
    )
    assert sum(a.cost.macs for a in new.layers) <= 0.6 * sum(a.cost.macs for a in old.layers)
    y, z = (np.concatenate([o[0] for o in net.outputs({})]) for net in (old, new))
    # the error reported for the last layer is the error of the network
    fitted = result["layers"][-1]["fitted"]
    assert (
        0
        < np.linalg.norm(z - y) / np.linalg.norm(y - y.mean((0, 2, 3), keepdims=True))
        < 2 * fitted
    )
    code, _, err = lowrank("compress", "net.onnx", "--macs", "0.5", "-o", "net.onnx")
    assert code == 2
    assert "the original" in err
    np.savez(tmp_path / "x.npz", x=x[:, :2])
    words = ("compress", "net.onnx", "--calibrate", "x.npz", "--macs", "0.5", "-o", "b.onnx")
    assert "has shape" in lowrank(*words)[2]
    x[3, 0, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", x=x)
    assert "NaN" in lowrank(*words)[2]
    assert not (tmp_path / "b.onnx").exists()


def test_compress_keras(lowrank, tmp_path):
    from keras_models import L, keras

    rng = np.random.default_rng(0)
    layers = [keras.Input((20, 8)), L.Conv1D(16, 5, name="a"), L.Dense(12, name="b")]
    model = keras.Sequential(layers)
    model.save(tmp_path / "net.keras")
    x = rng.standard_normal((80, 20, 2)) @ rng.standard_normal((2, 8))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    words = ("compress", "net.keras", "--params", "0.5", "--calibrate", "x.npz", *QUICK)
    code, out, err = lowrank(*words, "-o", "small.keras", "--report", "page.html")
    assert (code, err) == (0, "")
    assert "white-noise" not in out
    small = keras.saving.load_model(tmp_path / "small.keras")
    assert small.count_params() < 0.6 * model.count_params()
    y, z = (m.predict(x.astype(np.float32), verbose=0) for m in (model, small))
    assert np.linalg.norm(z - y) < 0.01 * np.linalg.norm(y)  # inputs of two dimensions
    assert "80 examples in 2 batches." in (tmp_path / "page.html").read_text()
    assert lowrank(*words, "-o", "small.h5")[0] == 2
    np.savez(tmp_path / "x.npz", x=x.swapaxes(1, 2))
    assert "has shape (80, 8, 20)" in lowrank(*words, "-o", "small.keras")[2]


def test_compress_every_trained_network(lowrank, data, tmp_path):
    for path in sorted((data / "weights").glob("*.safetensors")):
        if path.stat().st_size < 400_000:
            code, _, err = lowrank(
                "compress", path, "--macs", "0.7", *QUICK, "-o", "a.safetensors", "--refit"
            )
            assert code == 0, err
            assert macs(tmp_path / "a.safetensors") <= 0.7 * macs(path)


def test_time_left_is_estimated_from_the_first_step_on():
    from rich.progress import Progress

    from lowrank.cli.console import _TimeLeft

    clock = iter([0.0, *[30.0] * 99])
    bar = Progress(get_time=lambda: next(clock))
    bar.add_task("layers", total=1.0)
    (task,) = bar.tasks
    assert _TimeLeft().render(task) == ""
    bar.update(task.id, completed=0.25)
    assert _TimeLeft().render(task) == "1:30 left"
    bar.update(task.id, completed=1.0)
    assert _TimeLeft().render(task) == ""


def network(name, tmp_path, rng):
    """Write a network with a convolution in the format of the ending; return the path."""
    path, w = tmp_path / name, rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
            net (float[N, 3, 9, 9] x) => (float[N, 8, 7, 7] y) {y = Conv(x, w)}""")
        model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
        path.write_bytes(model.SerializeToString())
    elif path.suffix in (".keras", ".h5"):
        from keras_models import L, keras

        from lowrank.interop.keras import save

        layers = [keras.Input((9, 9, 3)), L.Conv2D(8, 3, name="y", use_bias=False)]
        model = keras.Sequential(layers)
        model.layers[0].set_weights([w.transpose(2, 3, 1, 0)])
        save(model, path)
    elif path.suffix in (".pt", ".pth"):
        torch = pytest.importorskip("torch")
        torch.save({"y.weight": torch.tensor(w)}, path)
    elif path.suffix == ".safetensors":
        io.write_tensors(path, {"y.weight": w}, {})
    else:
        np.savez(path, **{"y.weight": w})
    return path, w


ENDINGS = ["onnx", "keras", "h5", "safetensors", "npz", "pt"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_inspect_and_approximate_read_what_compress_reads(tmp_path, rng, ending, lowrank):
    path, w = network(f"net.{ending}", tmp_path, rng)
    ((layer,), left_out) = files.read_layers(path)
    assert (layer.name, left_out) == ("y", {})
    np.testing.assert_array_equal(layer.conv.to_dense(), w)
    code, out, err = lowrank("inspect", path, "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)["layers"]
    assert row["layer"] == "y"
    assert row["macs"] in (None, 7 * 7 * w.size)
    size = () if layer.input_size else ("--input", "9x9")
    words = ("--rank", "2", "--families", "spatial_svd", *size, "--json")
    code, out, err = lowrank("approximate", path, *words)
    assert (code, err) == (0, "")
    assert json.loads(out)["pick"]["rank"] == [2]
    code, _, err = lowrank("approximate", path, "--layer", "z")
    assert code == 2
    assert "--layer must be one of y, got 'z'" in err


def test_sizes_that_a_network_leaves_free(tmp_path, rng, lowrank):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 6, h, w] x) => (float[N, 8, i, j] y) {[conv] y = Conv(x, k)}""")
    k = rng.standard_normal((8, 6, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(k, "k"))
    path, small = tmp_path / "free.onnx", tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    code, _, err = lowrank("plan", path, "--macs", "0.5")
    assert code == 2
    assert "no layer can be compressed: conv: its input has no fixed size" in err
    assert "--calibrate or --input gives the sizes" in err
    code, out, err = lowrank("plan", path, "--macs", "0.5", "--input", "9x7", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["layers"]["conv"]["dense"]["macs"] == 7 * 5 * k.size
    code, out, err = lowrank("compress", path, "--macs", "0.5", "--input", "9x7", "-o", small)
    assert (code, err) == (0, "")
    assert [d.dim_param for d in onnx.load(small).graph.input[0].type.tensor_type.shape.dim] == [
        "N", "", "h", "w",
    ]  # fmt: skip
    for size, macs in ((None, None), ("9x7", 7 * 5 * k.size)):
        words = ("--json",) if size is None else ("--json", "--input", size)
        code, out, err = lowrank("inspect", path, *words)
        assert (code, err) == (0, "")
        assert [(r["layer"], r["macs"]) for r in json.loads(out)["layers"]] == [("conv", macs)]
    for command in ("inspect", "plan"):
        more = () if command == "inspect" else ("--macs", "0.5")
        code, _, err = lowrank(command, path, "--input", "9", *more)
        assert code == 2
        assert "input size must be 2 positive numbers for the free sizes of 'x'" in err
    code, _, err = lowrank("approximate", path, "--input", "9", "--rank", "2")
    assert (code, err) == (2, "lowrank: --input must be 2 sizes for layer 'conv', got 9\n")


def test_input_is_for_layers_with_as_many_axes(tmp_path, rng, lowrank):
    path = tmp_path / "net.npz"
    conv, matrix = rng.standard_normal((8, 6, 3, 3)), rng.standard_normal((5, 8))
    np.savez(path, **{"conv.weight": conv, "fc.weight": matrix})
    code, out, err = lowrank("inspect", path, "--input", "9x9", "--json")
    assert (code, err) == (0, "")
    macs = {row["layer"]: row["macs"] for row in json.loads(out)["layers"]}
    assert macs == {"conv": 9 * 9 * conv.size, "fc": matrix.size}


@pytest.mark.parametrize("name", ["inspect", "approximate", "compress"])
def test_existence_is_checked_before_the_ending(tmp_path, lowrank, name):
    more = ["--macs", "0.5", "-o", tmp_path / "a.npz"] if name == "compress" else []
    for file in ("gone.npz", "gone.onnx", "gone.keras", "gone.txt", "gone"):
        path = tmp_path / file
        assert lowrank(name, path, *more) == (2, "", f"lowrank: {path}: no such file\n")
    path = tmp_path / "a.txt"
    path.write_text("x")
    code, _, err = lowrank(name, path, *more)
    assert code == 2
    assert f"{path}: the ending must be one of .onnx, .keras" in err
