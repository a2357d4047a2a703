"""Tables of the README and the pages are those of the committed results."""

import importlib
import json

import pytest

from asv_benchmarks import headline, pages


@pytest.mark.parametrize("name", pages.TABLES)
def test_pages_show_the_committed_results(name):
    if name == "history":
        pytest.importorskip("asv")
    page = pages.TABLES[name][0].read_text("utf-8")
    assert pages.with_table(name) == page, "run python -m asv_benchmarks.pages"


def test_the_committed_results_have_every_row():
    results = json.loads(headline.RESULTS.read_text())
    assert list(results["rows"]) == [*headline.NETWORKS, *headline.FILTERS]


@pytest.mark.parametrize("title", headline.FILTERS)
def test_libraries_compute_the_same(title):
    pytest.importorskip("cv2")
    if "256³" in title:
        pytest.skip("takes a second")
    found = {library: call() for library, call in headline.FILTERS[title]().items()}
    ours = found.pop("lowrank").astype(float)
    assert set(found) == {"OpenCV", "SciPy"}
    # Borders of FFTs are zero.  SciPy cuts bytes after each of two passes.
    margin = 200 if "sigma" in title else 32
    inner = (slice(margin, -margin),) * 2
    tolerance = 2 if "uint8" in title else 1e-4 * abs(ours).max()
    for other in found.values():
        assert abs(other.astype(float) - ours)[inner].max() <= tolerance


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.45, "12.5"), (9.625, "9.63"), (0.48, "0.480"), (954.4, "954"),
     (1278.0, "1278")],
)  # fmt: skip
def test_times_have_three_digits_and_halves_are_rounded_up(value, text):
    """The paper rounds so, too."""
    assert pages.three_digits(value) == text


def test_the_landing_page_rounds_as_the_readme(monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("typer")
    monkeypatch.syspath_prepend(pages.ROOT / "docs" / "_ext")
    digits = importlib.import_module("project_pages").digits
    rows = json.loads(headline.RESULTS.read_text())["rows"].values()
    times = [cell["ms"] for row in rows for cell in row.values()] + [11.85, 0.125, 0.9995]
    assert [digits(t, 3) for t in times] == [pages.three_digits(t) for t in times]
