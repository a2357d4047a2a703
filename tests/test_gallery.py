"""The scripts of the gallery run, each on its own, and draw what they say."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import lowrank
from lowrank.perfmodel import calibration

GALLERY = Path(lowrank.__file__).parents[1] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("plot_*.py"))


def test_there_are_scripts_where_there_is_a_gallery():
    assert SCRIPTS or not GALLERY.exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_of_the_gallery_runs(script, monkeypatch, tmp_path, capsys):
    for name in libraries(script):
        pytest.importorskip(name)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def measured(*_):
        raise AssertionError("a page must not calibrate: it would take a minute")

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(map(drawn, plt.get_fignums())))
    monkeypatch.setattr(calibration, "measure", measured)
    monkeypatch.chdir(tmp_path)  # where a script writes its files
    try:
        with matplotlib.rc_context():
            runpy.run_path(str(script))
        assert not plt.get_fignums(), "every figure is shown"
    finally:
        plt.close("all")
    assert shown
    assert not re.search(r"\bnan\b", capsys.readouterr().out)


def libraries(script):
    """What a script imports at its top; a page may need an optional one."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


def drawn(number):
    """The number of a figure that has been drawn, which is when texts and layouts go wrong."""
    import matplotlib.pyplot as plt

    figure = plt.figure(number)
    figure.canvas.draw()
    assert all(ax.has_data() for ax in figure.axes)
    plt.close(figure)
    return number
