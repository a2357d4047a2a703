"""Tabulate speed by commit, and list the series that have risen.

    python -m asv_benchmarks.history [--step PERCENT] [--machine NAME]

Reads asv's results in asv_benchmarks/results.  The table, which docs/performance.md shows, has
geometric means of ratios to other libraries, ours / theirs: lower is better.  A column keeps to the
series that all its commits have, whose number is in its title; a dash is a commit that lacks the
feature.

A series has risen if its last value exceeds the least median of three consecutive earlier ones by
more than the step.  That is a suspicion, since each value is of one run, and runs of one commit
differ: asv_benchmarks.gate decides, by processes of both builds in alternation.  Only ratios,
errors and bytes are compared, since times of other days are another machine's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from asv.results import iter_results_for_machine

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = "zen4-2cores"
#: Columns of the table: benchmark, and words of the parameters.
COLUMNS = {
    "layers / onnxruntime": ("kernels.Layers.track_ours_over_peer", ("onnxruntime",)),
    "chains / onnxruntime": ("chains.Chains.track_ours_over_peer", ("onnxruntime",)),
    "networks / onnxruntime": ("programs.Programs.track_ours_over_peer", ("'onnxruntime'",)),
    "half of the MACs / exact onnxruntime": (
        "programs.Programs.track_ours_over_peer", ("exact network, onnxruntime",),
    ),
    "filters / OpenCV": ("filters.Filters.track_ours_over_peer", ("OpenCV",)),
    "3-D Gaussian, first call, s": ("filters.FirstCalls.track_seconds", ("3-D Gaussian, 25",)),
}  # fmt: skip
#: Ends of the names of benchmarks that other load does not change.
STEADY = ("ours_over_peer", "ours_over_tensorly", "over_gemm", "track_error", "track_found",
          "track_kept", "track_bytes", "track_heavy", "track_params", "traffic")  # fmt: skip


class Commit(NamedTuple):
    """Results of a commit.

    Attributes
    ----------
    name : str
        First eight digits of its hash.
    date : datetime
        When it was committed.
    values : dict of (str, tuple of str) to float
        Value by benchmark and parameters.
    """

    name: str
    date: datetime
    values: dict[tuple[str, tuple[str, ...]], float]


def commits(machine: str = MACHINE, folder: Path = RESULTS) -> list[Commit]:
    """Return the results of a machine in the order of the commits."""
    found = []
    for one in iter_results_for_machine(str(folder), machine):
        values = {}
        for key in one.get_all_result_keys():
            params = one.get_result_params(key)
            numbers = one.get_result_value(key, params)
            for combination, number in zip(itertools.product(*params), numbers or ()):
                if number is not None and math.isfinite(number):
                    values[key, combination] = float(number)
        date = datetime.fromtimestamp(one.date / 1000, UTC)
        found.append(Commit(one.commit_hash[:8], date, values))
    return sorted(found, key=lambda c: c.date)


def means(
    history: list[Commit], benchmark: str, words: tuple[str, ...]
) -> tuple[int, list[float | None]]:
    """Return the number of series that no commit lacks, and their geometric mean by commit."""
    rows = [
        {
            params: value
            for (name, params), value in commit.values.items()
            if name == benchmark and all(word in " ".join(params) for word in words)
        }
        for commit in history
    ]
    some = [set(row) for row in rows if row]
    common = set.intersection(*some) if some else set()
    return len(common), [
        statistics.geometric_mean([row[params] for params in common]) if row and common else None
        for row in rows
    ]


def slower(history: list[Commit], step: float) -> Iterator[tuple[float, str, str, str]]:
    """Yield (ratio, benchmark, parameters, commit of the best) of series that have risen."""
    names = {key for commit in history for key in commit.values if key[0].endswith(STEADY)}
    for key in sorted(names):
        series = [(commit.values[key], commit.name) for commit in history if key in commit.values]
        if len(series) < 4 or series[-1][1] != history[-1].name:
            continue
        windows = [
            (statistics.median(value for value, _ in series[k : k + 3]), series[k + 1][1])
            for k in range(len(series) - 3)
        ]
        best, where = min(windows)
        if best > 0 and series[-1][0] > (1 + step) * best:
            yield series[-1][0] / best, key[0], ", ".join(key[1]), where


def table(history: list[Commit]) -> Iterator[str]:
    """Yield the lines of a Markdown table of COLUMNS."""
    found = {title: means(history, *column) for title, column in COLUMNS.items()}
    titles = [f"{title} ({count})" for title, (count, _) in found.items()]
    yield f"| commit | date | {' | '.join(titles)} |"
    yield "| --- | --- |" + " --- |" * len(COLUMNS)
    for commit, *values in zip(history, *(column for _, column in found.values())):
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        yield f"| {commit.name} | {commit.date:%Y-%m-%d} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and the series that have risen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=15, help="percent (default: 15)")
    parser.add_argument("--machine", default=MACHINE)
    given = parser.parse_args()
    history = commits(given.machine)
    print(*table(history), sep="\n")
    found = sorted(slower(history, given.step / 100), reverse=True)
    print(f"\n{len(found)} series have risen by more than {given.step:g} %")
    for ratio, name, params, where in found:
        print(f"{ratio:6.2f}  {name}  {params}  (least around {where})")


if __name__ == "__main__":
    main()
