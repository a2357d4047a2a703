"""Commands for layers, filters and calibration: tables, JSON, files and error lines."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_clock import FakeMeasurements

import lowrank as lr
from lowrank import cli, demo, filters, perfmodel
from lowrank.engine import machine
from lowrank.interop.weights import layers
from lowrank.perfmodel import calibration, store
from lowrank.selection import front as fronts

typer = pytest.importorskip("typer.main")
from lowrank.cli.program import app  # noqa: E402

Name = list(pytest.importorskip("lowrank.cli.images").Name)
DIGITS = str(demo.WEIGHTS)


@pytest.fixture
def lowrank(monkeypatch, capsys, tmp_path):
    """Run a command in a temporary folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")  # narrow: no number may be cut

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return run


@pytest.fixture
def clock(monkeypatch):
    """Measure by a formula, on a machine that is calibrated."""
    clock = FakeMeasurements({1: 1, 2: 1.5, 3: 1.5, 4: 1.5, 5: 1.5})
    here = replace(perfmodel.current(), calibrated=True)
    monkeypatch.setattr(perfmodel, "current", lambda: here)
    monkeypatch.setattr(fronts, "Measurements", clock)
    return clock


@pytest.fixture
def photo(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "photo.png")
    return pixels


def test_inspect_lists_every_layer(lowrank):
    code, out, err = lowrank("inspect", DIGITS)
    assert (code, err) == (0, "")
    assert "conv3" in out
    assert "64x64x3x3" in out
    assert "1,179,648" in out
    code, out, _ = lowrank("inspect", DIGITS, "--input", "16x16", "--json")
    rows = json.loads(out)["layers"]
    assert [r["layer"] for r in rows] == ["conv1", "conv2", "conv3"]
    assert rows[2]["macs"] == 64 * 64 * 9 * 256
    conv = layers(DIGITS)[2].conv
    front = lr.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
    half = [c.error for c in front if c.cost.macs <= rows[2]["macs"] / 2]
    assert rows[2]["error_at_half"]["spatial_svd"] == min(half)


def test_approximate_lists_the_front_and_builds_the_pick(lowrank, tmp_path):
    words = ("approximate", DIGITS, "--layer", "conv3", "--max-error", "0.3")
    code, out, err = lowrank(*words, "--plot", "a.svg", "--save", "a.safetensors")
    assert (code, err) == (0, "")
    assert "pick:" in out
    f = lr.load(tmp_path / "a.safetensors")["conv3"]
    conv = next(x.conv for x in layers(DIGITS) if x.name == "conv3")
    assert 0 < f.error(conv.to_dense()) <= 0.3
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    code, out, _ = lowrank(*words, "--json")
    result = json.loads(out)
    assert result["layer"] == "conv3"
    assert result["input"] == [64, 4, 4]
    assert result["dense"]["macs"] == 64 * 64 * 9 * 16
    keys = {"family", "rank", "error", "bound", "macs", "params", "traffic", "stages"}
    assert all(keys <= c.keys() for c in [*result["front"], result["pick"]])
    assert result["pick"]["error"] == pytest.approx(f.error(conv.to_dense()))
    code, out, _ = lowrank("inspect", "a.safetensors", "--input", "4x4")
    assert "64x64x3x3" not in out
    code, out, _ = lowrank("approximate", "a.safetensors", "--input", "4x4")
    assert code == 2


def test_approximate_without_a_criterion_picks_nothing(lowrank):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv2", "--families", "spatial_svd")
    assert code == 0
    assert "pick" not in out
    _, out, _ = lowrank("approximate", DIGITS, "--layer", "conv2", "--families", "cp", "--json")
    assert json.loads(out)["pick"] is None


@pytest.mark.parametrize(
    "criterion",
    [
        ("--macs", "0.25"),
        ("--macs", "100k"),
        ("--params", "0.5"),
        ("--rank", "8"),
        ("--rank", "8,8", "--families", "tucker"),
        ("--max-error", "0.5", "--axis", "params"),
        ("--time", "50%", "--batch", "8", "--threads", "1", "--no-measure"),
        ("--seconds", "90%"),
    ],
)
def test_approximate_picks_by_every_criterion(lowrank, clock, criterion):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", *criterion, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["pick"]["macs"] < result["dense"]["macs"]
    if criterion[0] == "--rank":
        assert result["pick"]["rank"] == [int(r) for r in criterion[1].split(",")]


def test_a_time_budget_is_measured_on_the_runtime(lowrank, clock):
    words = ("approximate", DIGITS, "--layer", "conv3", "--families", "spatial_svd")
    words = (*words, "--runtime", "torch", "--batch", "2", "--threads", "1", "--input", "32x32")
    picks = [json.loads(lowrank(*words, "--time", "0.5", "--json")[1]) for _ in range(3)]
    assert picks[0] == picks[1] == picks[2]
    assert set(clock.calls) == {("torch", 2, 1, False)}
    assert picks[0]["pick"]["is_measured"]
    assert picks[0]["pick"]["seconds"] <= 0.5 * picks[0]["dense"]["seconds"]
    assert picks[0]["dense"]["efficiency"] == 1
    _, out, _ = lowrank(*words, "--time", "0.5")
    assert ", measured " in out
    clock.calls.clear()
    _, out, _ = lowrank(*words, "--time", "0.5", "--no-measure", "--json")
    assert not json.loads(out)["pick"]["is_measured"]
    assert clock.calls == []


def test_a_machine_without_calibration_is_calibrated_quickly(lowrank, clock, monkeypatch):
    words = ("approximate", DIGITS, "--layer", "conv3", "--families", "spatial_svd")
    words = (*words, "--input", "32x32")
    asked = []
    monkeypatch.setattr(perfmodel, "calibrate", lambda **options: asked.append(options))
    shipped = replace(perfmodel.current(), calibrated=False)
    monkeypatch.setattr(perfmodel, "current", lambda: shipped)
    code, _, err = lowrank(*words, "--time", "0.5", "--runtime", "torch")
    assert code == 0
    assert "no calibration of torch on this machine: measuring for 5 s" in err
    assert err.count("\n") == 1
    assert asked == [{"quick": True, "runtimes": ["torch"]}]
    assert lowrank(*words, "--macs", "0.5")[2] == ""
    assert len(asked) == 1


def test_slower_chains_are_marked(lowrank):
    words = ("approximate", DIGITS, "--layer", "conv3", "--families", "channel_svd")
    _, out, _ = lowrank(*words, "--axis", "macs", "--threads", "1", "--macs", "0.99")
    marked = [line for line in out.splitlines() if "x !" in line]
    assert marked
    assert "! slower than the dense kernel" in out
    assert "as fast: slower than the dense kernel" in out  # the pick


def test_options_override_the_geometry(lowrank, tmp_path):
    np.save(tmp_path / "w.npy", np.ones((8, 4, 3, 3), np.float32))
    lowrank("approximate", "w.npy", "--input", "9x9")
    words = ("--stride", "2,1", "--padding", "0:1,1", "--dilation", "1,2", "--groups", "2")
    code, out, _ = lowrank("approximate", "w.npy", "--input", "9x9", *words, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["input"] == [8, 9, 9]
    assert result["dense"]["macs"] == 8 * 4 * 9 * (4 * 7)
    code, out, _ = lowrank("approximate", "w.npy", "--input", "9x9", "--transposed", "--json")
    assert json.loads(out)["dense"]["macs"] == 8 * 4 * 9 * 81


def test_filter_writes_the_picture(lowrank, photo, tmp_path):
    image = pytest.importorskip("PIL.Image")
    words = ("filter", "photo.png", "--kernel", "disk", "--radius", "4", "--rank", "3")
    code, out, err = lowrank(*words, "--mode", "nearest", "--plot", "form.png")
    assert (code, err) == (0, "")
    assert "> separable h-w" in out
    expected = filters.correlate(photo.astype(np.float32), filters.disk(4), rank=3, mode="nearest")
    written = np.asarray(image.open(tmp_path / "photo.disk.png"))
    np.testing.assert_array_equal(written, np.clip(np.rint(expected), 0, 255))
    assert (tmp_path / "form.png").exists()
    code, out, _ = lowrank(*words, "--json", "--out", "b.npy")
    assert json.loads(out)["stages"] == [[3, 1, 9, 1], [1, 3, 1, 9]]
    assert json.loads(out)["error"] == pytest.approx(
        filters.separate(filters.disk(4), rank=3).error(filters.disk(4)[None, None])
    )
    assert np.load(tmp_path / "b.npy").dtype == np.float32


@pytest.mark.parametrize("name", Name)
def test_filter_accepts_every_name(lowrank, photo, name):
    code, out, _ = lowrank("filter", "photo.png", "--kernel", name, "--angle", "30", "--json")
    assert code == 0
    assert json.loads(out)["error"] < 1e-6


def test_filter_reads_kernels_and_volumes_from_files(lowrank, tmp_path, rng):
    np.save(tmp_path / "k.npy", rng.standard_normal((3, 3, 3)))
    np.save(tmp_path / "v.npy", rng.standard_normal((8, 9, 10)))
    code, out, _ = lowrank("filter", "v.npy", "--kernel", "k.npy", "--rank", "2", "--json")
    assert code == 0
    assert json.loads(out)["family"] == "separable_sum"
    assert np.load(tmp_path / "v.k.npy").shape == (8, 9, 10)


def test_a_dense_pick_is_explained(lowrank):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", "--max-error", "1e-4")
    assert code == 0
    assert "pick: the dense kernel" in out
    assert "the cheapest within" in out


def test_filter_lists_its_methods(lowrank, photo):
    words = ("filter", "photo.png", "--kernel", "disk", "--radius", "4", "--tolerance", "0.1")
    code, out, _ = lowrank(*words)
    assert code == 0
    assert "direct" in out
    assert "fft" in out
    assert len(re.findall("^> ", out, re.M)) == 1
    _, out, _ = lowrank(*words, "--method", "fft", "--json")
    result = json.loads(out)
    assert result["method"] == "fft"
    # No sum of terms is looked for: that would take a decomposition.
    assert {m["method"].split(",")[0] for m in result["methods"]} == {"direct", "fft"}


def test_calibrate_measures_and_shows_the_model(lowrank, monkeypatch, tmp_path):
    shipped = perfmodel.current()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = replace(shipped, cpu=machine.cpu(), isa=store._core.default_isa(), calibrated=True)
    runtimes = []

    def measure(progress, engines, quick):
        progress("lowrank", 0.5)
        runtimes.append((engines, quick))
        return here

    monkeypatch.setattr(calibration, "measure", measure)
    code, out, _ = lowrank("calibrate", "--show")
    assert code == 0
    assert "coefficients of another machine" in out
    assert "%" not in out  # the errors of another machine say nothing about this one
    code, out, _ = lowrank("calibrate", "--show", "--json")
    foreign = json.loads(out)
    assert not foreign["calibrated"]
    assert {c["error"] for c in foreign["coefficients"].values()} == {None}
    code, out, err = lowrank("calibrate")
    assert (code, err) == (0, "")
    assert runtimes == [(None, False)]
    assert f"{here.coefficients['lowrank'].error:.1%}" in out
    assert str(perfmodel.path()) in out.replace("\n", "")
    code, out, _ = lowrank("calibrate", "--show", "--json")
    own = json.loads(out)
    assert own["calibrated"]
    assert {n: c["error"] for n, c in own["coefficients"].items()} == {
        n: c.error for n, c in here.coefficients.items()
    }
    lowrank("calibrate", "--runtime", "fft", "--quick")
    assert runtimes == [(None, False), (["fft"], True)]


A = ("approximate", DIGITS, "--layer", "conv3")
MISTAKES = [
    (("bogus",), "bogus"),
    (("calibrate", "--runtime", "warp"), "runtime must be one of fft, lowrank"),
    ((*A, "--seconds", "soon"), "--time must be.*unit.*got 'soon'"),
    ((*A, "--time", "2"), "--time must be.*unit.*got '2'"),
    ((*A, "--runtime", "warp"), "--runtime must be one of lowrank, onnxruntime.*got 'warp'"),
    ((*A, "--axis", "time"), "axis must be one of seconds"),
    ((*A, "--batch", "0"), "batch"),
    (("filter", "photo.png", "--kernel", "disk", "--method", "magic"), "method must be one of"),
    (("inspect", "gone.safetensors"), "gone.safetensors"),
    (("inspect", "."), "is a folder"),
    (("inspect", __file__), r"\.py"),
    (("inspect", DIGITS, "--input", "8"), "input_shape|spatial"),
    (("inspect", DIGITS, "--input", "8by8"), "--input"),
    (("inspect", DIGITS, "--input", "0x8"), "--input"),
    (("inspect", DIGITS, "--oops"), "--oops"),
    (("approximate", DIGITS), "conv1, conv2, conv3"),
    (("approximate", DIGITS, "--layer", "conv9"), "'conv9'"),
    ((*A, "--max-error", "-1"), "--max-error must be.*below 1, got -1"),
    ((*A, "--max-error", "2"), "--max-error must be.*at least 0 and below 1, got 2"),
    ((*A, "--max-error", "low"), "max-error"),
    ((*A, "--max-error", "0.1", "--macs", "0.5"), "only one of"),
    ((*A, "--macs", "0"), "--macs must be a share"),
    ((*A, "--macs", "3ms"), "--macs must be a share.*got '3ms'"),
    ((*A, "--params", "150%"), "--params must be a share.*got '150%'"),
    ((*A, "--macs", "1e-9"), "infeasible"),
    ((*A, "--macs", "many"), "'many'"),
    ((*A, "--macs", "20X"), "'20X'"),
    ((*A, "--rank", "0"), "from 1 to"),
    ((*A, "--rank", "x"), "--rank"),
    ((*A, "--rank", "10000"), "from 1 to"),
    ((*A, "--families", "cq"), "'cq'"),
    ((*A, "--families", ","), "--families"),
    ((*A, "--axis", "time"), "'time'"),
    ((*A, "--axis", "params", "--macs", "0.5"), "axis"),
    ((*A, "--stride", "0"), "stride"),
    ((*A, "--stride", "a"), "--stride"),
    ((*A, "--stride", "1,2,3"), "stride"),
    ((*A, "--padding", "1:2:3"), "--padding"),
    ((*A, "--padding", "-1"), "padding"),
    ((*A, "--groups", "3"), "groups"),
    ((*A, "--padding-mode", "odd"), "padding_mode"),
    ((*A, "--input", "1x1", "--padding", "0"), "larger|more than"),
    ((*A, "--plot", "a.txt"), r"\.svg"),
    ((*A, "--plot", "no/folder/a.svg"), "folder"),
    ((*A, "--save", "a.safetensors"), "--save"),
    ((*A, "--macs", "0.5", "--save", "a.npz"), r"\.safetensors"),
    ((*A, "--macs", "0.5", "--save", "no/a.safetensors"), "no"),
    (("filter", "gone.png", "--kernel", "gauss"), "gone.png"),
    (("filter", __file__, "--kernel", "gauss"), "picture"),
    (("filter", "photo.png"), "kernel"),
    (("filter", "photo.png", "--kernel", "gaus"), "'gaus'"),
    (("filter", "photo.png", "--kernel", "gone.npy"), "gone.npy"),
    (("filter", "photo.png", "--kernel", "gauss", "--sigma", "0"), "sigma"),
    (("filter", "photo.png", "--kernel", "disk", "--radius", "-2"), "radius"),
    (("filter", "photo.png", "--kernel", "motion", "--length", "0"), "length"),
    (("filter", "photo.png", "--kernel", "gauss", "--rank", "99"), "rank"),
    (("filter", "photo.png", "--kernel", "gauss", "--rank", "1", "--tolerance", "1"), "not both"),
    (("filter", "photo.png", "--kernel", "gauss", "--mode", "mirrored"), "'mirrored'"),
    (("filter", "photo.png", "--kernel", "gauss", "--out", "a.txt"), r"--out.*\.txt"),
    (("filter", "photo.png", "--kernel", "gauss", "--out", "no/a.png"), "--out.*folder"),
    (("filter", "photo.png", "--kernel", "disk", "--tolerance", "-1"), "tolerance.*-1"),
    (("filter", "photo.png", "--kernel", "gauss", "--sigma", "1e9"), "memory|large"),
    ((*A, "--macs", "."), "'.'"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[" ".join(w[2:])[:60] for w, _ in MISTAKES]
)
def test_wrong_arguments_give_one_line_and_exit_code_2(lowrank, photo, words, message):
    code, out, err = lowrank(*words)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("lowrank: ")
    assert re.search(message, err), err


@pytest.mark.parametrize("module", ["lowrank", "lowrank.cli"])
def test_the_module_runs_as_a_command(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lowrank 0.")
    done = subprocess.run([*command[:-1], "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("inspect", "approximate", "filter"))
    for arguments in ([], ["-h"]):
        command = [sys.executable, "-m", module, *arguments]
        same = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (same.stdout, same.stderr) == (done.stdout, "")


def test_approximate_on_every_network(lowrank, data):
    for path in sorted((data / "weights").glob("*.safetensors")):
        name = layers(path)[-1].name
        families = "channel_svd,spatial_svd,network_decoupling,filter_basis,tucker"
        code, out, err = lowrank(
            "approximate", path, "--layer", name, "--macs", "0.5", "--families", families, "--json"
        )
        if code == 2:  # depthwise and pointwise layers may have no chain within the budget
            assert "nothing costs at most" in err
        else:
            result = json.loads(out)
            assert result["pick"]["macs"] <= result["dense"]["macs"] / 2


def test_without_typer_the_command_names_what_to_install():
    script = "import sys; sys.modules['typer'] = None; from lowrank import cli; cli.main()"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "pip install 'lowrank[cli]'" in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_narrow_terminal_drops_optional_columns(lowrank, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", "--families", "spatial_svd")
    table = [line for line in out.splitlines() if "spatial_svd" in line and "conv3" not in line]
    assert max(map(len, table)) <= 80
    assert "Columns that do not fit in 80 characters: fused" in out
    assert "~" in table[0]
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", "--families", "spatial_svd")
    assert "Columns" not in out


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("approximate", str(demo.WEIGHTS), "--layer", "conv33"), "conv3"),
        (("plan", str(demo.WEIGHTS), "--macs", "0.5", "--pin", "cnv2"), "conv2"),
        (("plan", str(demo.WEIGHTS), "--macs", "0.5", "--families", "spatal_svd"), "spatial_svd"),
        (("plan", str(demo.WEIGHTS), "--macs", "0.5", "--runtime", "onxruntime"), "onnxruntime"),
        (("calibrate", "--runtime", "onnxrntime"), "onnxruntime"),
        (("filter", "x.npy", "--kernel", "gausss"), "gauss"),
    ],
)
def test_misspelt_names_get_a_suggestion(lowrank, words, near):
    code, out, err = lowrank(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("lowrank: ")
    assert err.endswith(f": did you mean {near}?\n")


def test_names_that_resemble_none_get_no_suggestion(lowrank):
    _, _, err = lowrank("approximate", str(demo.WEIGHTS), "--layer", "zzzz")
    assert "did you mean" not in err


@pytest.mark.parametrize("name", sorted(typer.get_command(app).commands))
def test_help_fits_80_columns_and_ends_with_an_example(lowrank, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = lowrank(name, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    _, examples = out.split("Examples:")
    lines = [line.split() for line in examples.splitlines() if line.strip()]
    assert lines
    assert all(words[:2] == ["lowrank", name] for words in lines)
    assert not re.search(r"<(str|int|float|path|bool)", out.partition("Options:")[2])
