"""The table of the README is that of the committed results."""

import json
from pathlib import Path

import pytest

from asv_benchmarks import headline

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_shows_the_committed_results():
    results = json.loads(headline.RESULTS.read_text())
    assert list(results["rows"]) == [*headline.NETWORKS, *headline.FILTERS]
    before, _, rest = README.read_text().partition(headline.START)
    table, mark, _ = rest.partition(headline.END)
    assert before
    assert mark
    assert table.strip() == headline.render(results).strip()


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
    assert headline._three_digits(value) == text
