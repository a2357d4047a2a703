"""Write the tables of README.md and the pages anew from the files of measured results.

    python -m asv_benchmarks.pages

The history needs asv.  A table stands between the marks `<!-- NAME: start -->` and
`<!-- NAME: end -->`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from lowrank.core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
RUNTIMES = {"lowrank": "lowrank", "onnxruntime": "onnxruntime", "torch": "PyTorch"}
ACCURACY = ROOT / "paper" / "data" / "accuracy_latency.csv"


def headline_table() -> str:
    """Return the times of common work in several libraries."""
    from asv_benchmarks import headline

    return headline.render(json.loads(headline.RESULTS.read_text()))


def history_table() -> str:
    """Return the speed of the milestones."""
    from asv_benchmarks import history  # needs asv

    return "\n".join(history.table(history.commits()))


def accuracy_table() -> str:
    """Return times and changes of accuracy of ResNet-20, by method and runtime."""
    with open(ACCURACY, newline="") as file:
        rows = list(csv.DictReader(file))
    points: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["method"] == "original":
            name, cell = "original", f"{three_digits(float(row['milliseconds']))} ms"
        else:
            name = f"{row['method']}, {row['value']}"
            change = f"{float(row['change']):+.1f}".replace("-", "−")
            cell = f"{float(row['time']):.2f}: {change}"
        points.setdefault(name, {})[row["runtime"]] = cell
    return "\n".join(
        [
            f"| method, share | {' | '.join(RUNTIMES.values())} |",
            "| --- |" + " --- |" * len(RUNTIMES),
            *(f"| {name} | {' | '.join(cells[r] for r in RUNTIMES)} |"
              for name, cells in points.items()),
        ]
    )  # fmt: skip


def three_digits(value: float) -> str:
    """Return three digits, halves rounded up as in the paper."""
    exact = Decimal(repr(value))
    unit = Decimal(1).scaleb(min(0, exact.adjusted() - 2))
    return f"{exact.quantize(unit, ROUND_HALF_UP):f}"


#: Page and table by the name in the marks.
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "headline": (README, headline_table),
    "history": (PERFORMANCE, history_table),
    "accuracy": (PERFORMANCE, accuracy_table),
}


def with_table(name: str) -> str:
    """Return the text of a page with a table from the committed results."""
    path, table = TABLES[name]
    start, end = (f"<!-- {name}: {word} -->\n" for word in ("start", "end"))
    before, rest = path.read_text("utf-8").split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{table().strip()}\n\n{end}{after}"


def write(name: str) -> None:
    """Write a table to its page."""
    text = with_table(name)
    with atomic_write(TABLES[name][0]) as part:
        part.write_text(text, "utf-8")


def main() -> None:
    """Write all tables."""
    for name in TABLES:
        write(name)


if __name__ == "__main__":
    main()
