"""The paper: figures, numbers and pages from committed tables, the same bytes every time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "paper"
NAMES = sorted(p.stem for p in (PAPER / "figures").glob("*.py"))
#: What takes seconds to measure; the others take a minute each, or have to have the machine alone.
QUICK = ("claims", "compound_scaling", "cost_ratio")


def run(*words, cwd=PAPER):
    env = os.environ | {"PYTHONPATH": f"{PAPER}{os.pathsep}{ROOT}"}
    env.pop("LOWRANK_DATA", None)  # the layers that come with the library are enough
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, check=True)


def test_every_figure_has_its_table():
    for folder, ending in (("measure", "*.py"), ("data", "*.csv")):
        assert sorted(p.stem for p in (PAPER / folder).glob(ending)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_builds_twice_the_same(tmp_path, name):
    pytest.importorskip("matplotlib")
    for ending in (".pdf", ".png"):
        first, second = (tmp_path / f"{n}{ending}" for n in "ab")
        for target in (first, second):
            run(PAPER / "figures" / f"{name}.py", PAPER / "data" / f"{name}.csv", target)
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", QUICK)
def test_what_is_counted_is_what_is_committed(tmp_path, name):
    table = tmp_path / "table.csv"
    run(PAPER / "measure" / f"{name}.py", table)
    assert table.read_text() == (PAPER / "data" / f"{name}.csv").read_text()


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({*NAMES} - {*QUICK}))
def test_what_is_measured_has_the_columns_that_are_committed(tmp_path, name):
    table = tmp_path / "table.csv"
    run(PAPER / "measure" / f"{name}.py", table)
    if not table.exists():
        pytest.skip("cannot be measured here, and said so")
    found, kept = (p.read_text().splitlines() for p in (table, PAPER / "data" / f"{name}.csv"))
    assert found[0] == kept[0]
    assert len(found) > 5


def test_the_paper_is_set_twice_the_same(tmp_path):
    pytest.importorskip("typst")
    pytest.importorskip("matplotlib")
    built = []
    for name in "ab":
        there = tmp_path / name
        shutil.copytree(PAPER, there, ignore=shutil.ignore_patterns("build"))
        (there / "build").mkdir()
        for figure in NAMES:
            target = there / "build" / f"{figure}.pdf"
            run(f"figures/{figure}.py", f"data/{figure}.csv", target, cwd=there)
        run("typeset.py", "build/paper.pdf", cwd=there)
        built.append((there / "build" / "paper.pdf").read_bytes())
    assert built[0] == built[1]
    assert built[0].startswith(b"%PDF")


def made(folder, *words, **env):
    """What make says in a copy of the paper, whether it succeeded, and the copy."""
    there = folder / "paper"
    shutil.copytree(PAPER, there, ignore=shutil.ignore_patterns("build", "__pycache__"))
    (there / "figures" / "nothing.py").touch()  # a figure that has no table
    done = subprocess.run(
        ["make", "-C", str(there), f"PYTHON={sys.executable}", *words],
        env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, there


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_what_cannot_be_measured_here_says_so_and_keeps_its_table(tmp_path):
    status, said, there = made(tmp_path, "measured-accuracy_resnet", LOWRANK_DATA="")
    assert status == 0
    assert "LOWRANK_DATA" in said
    assert "accuracy_resnet.csv stays as it is" in said
    kept, found = (p / "data" / "accuracy_resnet.csv" for p in (PAPER, there))
    assert found.read_bytes() == kept.read_bytes()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_a_figure_without_its_table_fails_alone(tmp_path):
    pytest.importorskip("matplotlib")
    status, said, there = made(tmp_path, "build/nothing.pdf", "build/cross.pdf", "-k")
    assert status != 0
    assert "data/nothing.csv is missing: make -C paper measured-nothing makes it" in said
    assert (there / "build" / "cross.pdf").exists()
    assert not (there / "build" / "nothing.pdf").exists()


def test_without_typst_the_word_is_what_to_install(tmp_path):
    (tmp_path / "typst.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "typeset.py", str(tmp_path / "paper.pdf")],
        cwd=PAPER, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "pip install --group paper" in done.stderr


def test_the_picture_is_of_the_committed_tables():
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-c", "import picture; print(picture.digest())"],
        cwd=PAPER, env=os.environ | {"PYTHONPATH": str(PAPER)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert f"of tables {done.stdout.strip()}" in (ROOT / "docs" / "picture.svg").read_text()
