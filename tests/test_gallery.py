"""The gallery's scripts run, each in its own folder, and draw figures with data."""

import ast
import re
from pathlib import Path

import pytest

import lowrank
from lowrank.perfmodel import calibration

GALLERY = Path(lowrank.__file__).parents[1] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("plot_*.py"))


def test_the_gallery_is_not_empty():
    assert SCRIPTS or not GALLERY.exists()


@pytest.mark.full
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_draw_figures_without_calibrating(script, monkeypatch, tmp_path, capsys):
    for name in imported_packages(script):
        pytest.importorskip(name)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def refuse(*_):
        raise AssertionError("a page must not calibrate: it would take a minute")

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(map(draw, plt.get_fignums())))
    monkeypatch.setattr(calibration, "measure", refuse)
    monkeypatch.chdir(tmp_path)  # where a script writes its files
    source = script.read_text().replace("EPOCHS = 15", "EPOCHS = 2")  # of a minute of training
    try:
        with matplotlib.rc_context():
            exec(compile(source, script, "exec"), {"__name__": "__main__"})
        assert not plt.get_fignums(), "every figure is shown"
    finally:
        plt.close("all")
    assert shown
    assert not re.search(r"\bnan\b", capsys.readouterr().out)


def imported_packages(script):
    """Yield the packages that a script imports at its top level; some are optional."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


def draw(number):
    """Draw a figure, which is when errors of text and layout appear; return its number."""
    import matplotlib.pyplot as plt

    figure = plt.figure(number)
    figure.canvas.draw()
    assert all(ax.has_data() for ax in figure.axes)
    plt.close(figure)
    return number
