"""The paper is rebuilt from committed tables, with the same bytes each time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "paper"
NAMES = sorted(p.stem for p in (PAPER / "figures").glob("*.py"))
#: Tables that are computed in seconds; the others take minutes, or an idle machine.
COMPUTED = ("claims", "compound_scaling", "cost_ratio")
#: Runs `python figures/name.py table target` for each target, in one process.
DRAW = """
import runpy, sys
from pathlib import Path
from matplotlib import pyplot as plt
for target in sys.argv[1:]:
    name = Path(target).stem
    script = f"figures/{name}.py"
    sys.argv = [script, f"data/{name}.csv", target]
    runpy.run_path(script, run_name="__main__")
    plt.close("all")
"""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")


def run(*words, cwd=PAPER):
    # A script finds those beside it, as if it were run by its path.
    folders = PAPER, PAPER / "figures", PAPER / "measure", ROOT
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    env.pop("LOWRANK_DATA", None)  # the layers that come with the library are enough
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, check=True)


def test_each_figure_has_a_table_and_a_measuring_script():
    for folder, ending in (("measure", "*.py"), ("data", "*.csv")):
        assert sorted(p.stem for p in (PAPER / folder).glob(ending)) == NAMES


@pytest.mark.full
def test_figures_and_pdf_are_reproducible(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typst")
    found = []
    for name in "ab":
        copy = tmp_path / name
        shutil.copytree(PAPER, copy, ignore=shutil.ignore_patterns("build"))
        build = copy / "build"
        build.mkdir()
        run("-c", DRAW, *(build / f"{n}{end}" for n in NAMES for end in (".pdf", ".png")))
        run("typeset.py", "build/paper.pdf", cwd=copy)
        found.append({p.name: p.read_bytes() for p in build.iterdir()})
    assert found[0]["paper.pdf"].startswith(b"%PDF")
    assert found[0].keys() >= {f"{name}.png" for name in NAMES}
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


@pytest.mark.full
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_tables_equal_the_committed_ones(tmp_path, name):
    table = tmp_path / "table.csv"
    run(PAPER / "measure" / f"{name}.py", table)
    assert table.read_text() == (PAPER / "data" / f"{name}.csv").read_text()


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({*NAMES} - {*COMPUTED}))
def test_measured_tables_have_the_committed_columns(tmp_path, name):
    table = tmp_path / "table.csv"
    run(PAPER / "measure" / f"{name}.py", table)
    if not table.exists():
        pytest.skip("this table cannot be measured on this machine")
    measured, committed = (
        p.read_text().splitlines() for p in (table, PAPER / "data" / f"{name}.csv")
    )
    assert measured[0] == committed[0]
    assert len(measured) > 5


def make(folder, *words, **env):
    """Run make in a copy of the paper; return its status, its output and the copy."""
    copy = folder / "paper"
    shutil.copytree(PAPER, copy, ignore=shutil.ignore_patterns("build", "__pycache__"))
    (copy / "figures" / "nothing.py").touch()  # a figure that has no table
    process = subprocess.run(
        ["make", "-C", str(copy), f"PYTHON={sys.executable}", *words],
        env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return process.returncode, process.stdout + process.stderr, copy


@needs_make
def test_a_table_that_cannot_be_measured_is_left_unchanged(tmp_path):
    status, output, copy = make(tmp_path, "measured-accuracy_latency", LOWRANK_DATA="")
    assert status == 0
    assert "LOWRANK_DATA" in output
    before, after = (p / "data" / "accuracy_latency.csv" for p in (PAPER, copy))
    assert after.read_bytes() == before.read_bytes()


@needs_make
def test_a_figure_without_a_table_fails_and_others_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    status, output, copy = make(tmp_path, "build/nothing.pdf", "build/cross.pdf", "-k")
    assert status != 0
    assert "nothing.csv is missing" in output
    assert "measured-nothing" in output  # the target that would make it
    assert (copy / "build" / "cross.pdf").exists()
    assert not (copy / "build" / "nothing.pdf").exists()


def test_typesetting_without_typst_names_the_package_to_install(tmp_path):
    (tmp_path / "typst.py").write_text("raise ImportError")
    process = subprocess.run(
        [sys.executable, "typeset.py", str(tmp_path / "paper.pdf")],
        cwd=PAPER, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode != 0
    assert "pip install" in process.stderr


def test_pictures_show_the_committed_results():
    pytest.importorskip("matplotlib")
    process = subprocess.run(
        [sys.executable, "-c", "import picture; print(picture.digest())"],
        cwd=PAPER, env=os.environ | {"PYTHONPATH": str(PAPER)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in ("picture.svg", "picture-phone.svg"):
        assert f"of results {process.stdout.strip()}" in (ROOT / "docs" / name).read_text()
