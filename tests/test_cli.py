"""The command: its tables, its JSON, its files, and its one line for every mistake."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import lowrank as lr
from lowrank import cli, demo, filters, perfmodel
from lowrank.cli.images import Name
from lowrank.interop.weights import layers
from lowrank.perfmodel import calibration, store

DIGITS = str(demo.WEIGHTS)


@pytest.fixture
def lowrank(monkeypatch, capsys, tmp_path):
    """Runs the command in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")  # narrow: no number may be cut for that

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


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


def test_approximate_shows_the_front_and_makes_the_pick(lowrank, tmp_path):
    words = ("approximate", DIGITS, "--layer", "conv3", "--max-error", "0.3")
    code, out, err = lowrank(*words, "--plot", "a.svg", "--save", "a.safetensors")
    assert (code, err) == (0, "")
    assert "pick:" in out
    f = lr.load(tmp_path / "a.safetensors")["conv3"]
    conv = next(x.conv for x in layers(DIGITS) if x.name == "conv3")
    assert 0 < f.error(conv.to_dense()) <= 0.3
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    code, out, _ = lowrank(*words, "--json")
    told = json.loads(out)
    assert told["layer"] == "conv3"
    assert told["input"] == [64, 4, 4]
    assert told["dense"]["macs"] == 64 * 64 * 9 * 16
    keys = {"family", "rank", "error", "bound", "macs", "params", "traffic", "stages"}
    assert all(keys <= c.keys() for c in [*told["front"], told["pick"]])
    assert told["pick"]["error"] == pytest.approx(f.error(conv.to_dense()))
    code, out, _ = lowrank("inspect", "a.safetensors", "--input", "4x4")
    assert "64x64x3x3" not in out
    code, out, _ = lowrank("approximate", "a.safetensors", "--input", "4x4")
    assert code == 2


def test_approximate_without_a_wish_picks_nothing(lowrank):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv2", "--families", "spatial_svd")
    assert code == 0
    assert "pick" not in out
    _, out, _ = lowrank("approximate", DIGITS, "--layer", "conv2", "--families", "cp", "--json")
    assert json.loads(out)["pick"] is None


@pytest.mark.parametrize(
    "wish",
    [
        ("--macs", "0.25"),
        ("--macs", "100k"),
        ("--params", "0.5"),
        ("--rank", "8"),
        ("--rank", "8,8", "--families", "tucker"),
        ("--max-error", "0.5", "--axis", "params"),
        ("--seconds", "50%", "--batch", "8", "--threads", "1"),
        ("--seconds", "30%"),
    ],
)
def test_approximate_by_any_wish(lowrank, wish):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", *wish, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["pick"]["macs"] < told["dense"]["macs"]
    if wish[0] == "--rank":
        assert told["pick"]["rank"] == [int(r) for r in wish[1].split(",")]


def test_geometry_comes_from_options(lowrank, tmp_path):
    np.save(tmp_path / "w.npy", np.ones((8, 4, 3, 3), np.float32))
    lowrank("approximate", "w.npy", "--input", "9x9")
    words = ("--stride", "2,1", "--padding", "0:1,1", "--dilation", "1,2", "--groups", "2")
    code, out, _ = lowrank("approximate", "w.npy", "--input", "9x9", *words, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["input"] == [8, 9, 9]
    assert told["dense"]["macs"] == 8 * 4 * 9 * (4 * 7)
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


@pytest.mark.parametrize("name", list(Name))
def test_filter_knows_every_name(lowrank, photo, name):
    code, out, _ = lowrank("filter", "photo.png", "--kernel", name, "--angle", "30", "--json")
    assert code == 0
    assert json.loads(out)["error"] < 1e-6


def test_filter_takes_kernels_and_volumes_from_files(lowrank, tmp_path, rng):
    np.save(tmp_path / "k.npy", rng.standard_normal((3, 3, 3)))
    np.save(tmp_path / "v.npy", rng.standard_normal((8, 9, 10)))
    code, out, _ = lowrank("filter", "v.npy", "--kernel", "k.npy", "--rank", "2", "--json")
    assert code == 0
    assert json.loads(out)["family"] == "filter"
    assert np.load(tmp_path / "v.k.npy").shape == (8, 9, 10)


def test_a_pick_that_is_the_dense_kernel_says_what_is_possible(lowrank):
    code, out, _ = lowrank("approximate", DIGITS, "--layer", "conv3", "--max-error", "1e-4")
    assert code == 0
    assert "nothing within 0.0001 is cheaper than the dense kernel" in out
    assert "the cheapest within" in out


def test_filter_lists_its_methods(lowrank, photo):
    words = ("filter", "photo.png", "--kernel", "disk", "--radius", "4", "--tolerance", "0.1")
    code, out, _ = lowrank(*words)
    assert code == 0
    assert "direct" in out
    assert "fft" in out
    assert len(re.findall("^> ", out, re.M)) == 1
    _, out, _ = lowrank(*words, "--method", "fft", "--json")
    told = json.loads(out)
    assert told["method"] == "fft"
    assert {m["method"].split(",")[0].split()[0] for m in told["methods"]} == {
        "direct", "separable", "fft"
    }  # fmt: skip


def test_calibrate_measures_and_shows(lowrank, monkeypatch, tmp_path):
    shipped = perfmodel.current()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = replace(shipped, cpu=calibration.cpu(), isa=store._core.default_isa(), calibrated=True)
    asked = []

    def measure(progress, engines):
        progress("lowrank", 0.5)
        asked.append(engines)
        return here

    monkeypatch.setattr(calibration, "measure", measure)
    code, out, _ = lowrank("calibrate", "--show")
    assert code == 0
    assert "came with lowrank" in out
    code, out, err = lowrank("calibrate")
    assert (code, err) == (0, "")
    assert asked == [None]
    assert f"{here.coefficients['lowrank'].error:.1%}" in out
    assert str(perfmodel.path()) in out.replace("\n", "")
    code, out, _ = lowrank("calibrate", "--show", "--json")
    assert set(json.loads(out)["rates"]) == set(here.coefficients)
    lowrank("calibrate", "--runtime", "fft")
    assert asked == [None, ["fft"]]


A = ("approximate", DIGITS, "--layer", "conv3")
MISTAKES = [
    (("bogus",), "bogus"),
    (("calibrate", "--runtime", "warp"), "runtime must be one of fft, lowrank"),
    ((*A, "--seconds", "soon"), "seconds must be above 0"),
    ((*A, "--axis", "time"), "axis must be one of seconds"),
    ((*A, "--batch", "0"), "batch"),
    (("filter", "photo.png", "--kernel", "disk", "--method", "magic"), "method must be one of"),
    (("inspect", "gone.safetensors"), "gone.safetensors"),
    (("inspect", "."), "ending|come from"),
    (("inspect", __file__), r"\.py"),
    (("inspect", DIGITS, "--input", "8"), "input_shape|spatial"),
    (("inspect", DIGITS, "--input", "8by8"), "--input"),
    (("inspect", DIGITS, "--input", "0x8"), "--input"),
    (("inspect", DIGITS, "--oops"), "--oops"),
    (("approximate", DIGITS), "conv1, conv2, conv3"),
    (("approximate", DIGITS, "--layer", "conv9"), "'conv9'"),
    ((*A, "--max-error", "-1"), "max_error.*-1"),
    ((*A, "--max-error", "low"), "max-error"),
    ((*A, "--max-error", "0.1", "--macs", "0.5"), "one of"),
    ((*A, "--macs", "0"), "above 0"),
    ((*A, "--macs", "1e-9"), "cheapest is"),
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


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda w: " ".join(w[2:])[:40])
def test_a_mistake_gets_one_line_and_exit_code_2(lowrank, photo, words, message):
    code, out, err = lowrank(*words)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("lowrank: ")
    assert re.search(message, err), err


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "lowrank.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lowrank 0.")
    done = subprocess.run([*command[:-1], "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("inspect", "approximate", "filter"))


def test_approximate_on_every_net(lowrank, data):
    for path in sorted((data / "weights").glob("*.safetensors")):
        name = layers(path)[-1].name
        families = "encode,decode,spatial,decouple,basis,tucker"
        code, out, err = lowrank(
            "approximate", path, "--layer", name, "--macs", "0.5", "--families", families, "--json"
        )
        if code == 2:  # a depthwise or pointwise layer may have nothing so cheap
            assert "nothing costs at most" in err
        else:
            told = json.loads(out)
            assert told["pick"]["macs"] <= told["dense"]["macs"] / 2
