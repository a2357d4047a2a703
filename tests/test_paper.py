"""The figures of the paper: each builds from its table, the same bytes every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[1] / "paper"
NAMES = sorted(p.stem for p in (PAPER / "figures").glob("*.py"))


def run(*words):
    env = os.environ | {"PYTHONPATH": str(PAPER)}
    env.pop("LOWRANK_DATA", None)  # the layers that come with the library are enough
    subprocess.run([sys.executable, *map(str, words)], cwd=PAPER, env=env, check=True)


def test_every_figure_has_its_table():
    assert sorted(p.stem for p in (PAPER / "measure").glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_builds_twice_the_same(tmp_path, name):
    pytest.importorskip("matplotlib")
    table = tmp_path / "table.csv"
    run(PAPER / "measure" / f"{name}.py", table)
    assert len(table.read_text().splitlines()) > 50
    for ending in (".pdf", ".png"):
        first, second = (tmp_path / f"{n}{ending}" for n in "ab")
        for target in (first, second):
            run(PAPER / "figures" / f"{name}.py", table, target)
        assert first.read_bytes() == second.read_bytes()
