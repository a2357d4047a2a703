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
