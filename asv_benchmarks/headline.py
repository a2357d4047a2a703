"""Times of common work in several libraries: the table of the README, the pages and the paper.

    python -m asv_benchmarks.headline [--rounds N] [--only WORD]

Writes paper/data/headline.json, which the paper reads, and the table of README.md.  Networks are in
the folder LOWRANK_DATA; without it their rows keep the values of the file.  A cell is the better of
one and two threads, in the fastest configuration of its library: PyTorch's better layout, the best
function of OpenCV and SciPy.  Every library runs in its own process, since idle thread pools would
occupy the others' cores.  The processes run alternately; a cell is the median of the rounds, and
its interval the middle ones of them.  The first call includes all that precedes it except imports:
planning, packing of weights, and for networks the translation (lowrank) or session (onnxruntime).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import scipy.signal
from scipy import stats

from asv_benchmarks import pages
from asv_benchmarks.benchmarks.libraries import (
    Call,
    cv2,
    onnxruntime_call,
    opencv_separable,
    set_threads,
    torch,
)
from asv_benchmarks.benchmarks.timing import measure_seconds
from asv_benchmarks.compare import cpu
from lowrank import filters
from lowrank._kernels import _core
from lowrank.core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "paper" / "data" / "headline.json"
SECONDS = 0.3  # per row and library in one process
COLUMNS = ("lowrank", "onnxruntime", "PyTorch", "OpenCV", "SciPy")
EXACT = "exact"
#: Rows of networks: name in `networks.NETWORKS`, and version.
NETWORKS = {
    "ResNet-20, 32²": ("resnet20_cifar10", EXACT),
    "ResNet-20 for 70 % of its time on one thread": ("resnet20_cifar10", "compressed"),
    "ResNet-18, 224²": ("resnet18", EXACT),
    "ResNet-18 at half of its MACs": ("resnet18", "half"),
    "style transfer, 256²": ("faststyle_udnie", EXACT),
    "style transfer at half of its MACs": ("faststyle_udnie", "half"),
    "MobileNet 0.25, 96²": ("vww_mobilenet_025_96", EXACT),
}
TIME, MACS = 0.7, 0.5  # budgets of the versions "compressed" and "half"


def noise(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Return random samples in [0, 255]."""
    return (np.random.default_rng(0).random(shape) * 255).astype(dtype)


def bell(taps: int) -> np.ndarray:
    """Return a normalized window."""
    line: np.ndarray = np.hanning(taps + 2)[1:-1].astype(np.float32)
    return line / line.sum()


def separable(taps: int, *shape: int, dtype: Any = np.float32) -> dict[str, Call]:
    """Return an outer product of two windows on an image."""
    image, line = noise(*shape, dtype=dtype), bell(taps)
    out = np.empty_like(image)
    kernel = filters.OuterProduct([line, line])
    return {
        "lowrank": lambda: filters.correlate(image, kernel, out=out),
        "OpenCV": opencv_separable(image, line)["cv2.sepFilter2D"],
        "SciPy": lambda: ndi.correlate1d(ndi.correlate1d(image, line, 0), line, 1),
    }


def sum_of_three(size: int) -> dict[str, Call]:
    """Return a filter of 15x15 taps and rank 3."""
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal(15) / 15, rng.standard_normal(15)) for _ in range(3)]
    kernel = sum(np.outer(a, b) for a, b in pairs).astype(np.float32)
    image, out = noise(size, size), np.empty((size, size), np.float32)
    border = cv2.BORDER_REFLECT

    def passes() -> object:
        total, *others = (cv2.sepFilter2D(image, -1, b, a, borderType=border) for a, b in pairs)
        for other in others:
            cv2.add(total, other, total)
        return total

    return {
        "lowrank": lambda: filters.correlate(image, kernel, out=out),
        "OpenCV": passes,  # takes less time than cv2.filter2D
        "SciPy": lambda: scipy.signal.fftconvolve(image, kernel[::-1, ::-1], "same"),
    }


def gaussian(size: int, sigma: float) -> dict[str, Call]:
    """Return a wide Gaussian, within 0.1 % of its norm in lowrank."""
    image = noise(size, size)
    kernel = filters.gauss(sigma)
    border, taps = cv2.BORDER_REFLECT, kernel.shape
    return {
        "lowrank": lambda: filters.filter_image(image, kernel, tolerance=1e-3),
        "OpenCV": lambda: cv2.GaussianBlur(image, taps, sigma, borderType=border),
        "SciPy": lambda: ndi.gaussian_filter(image, sigma),
    }


def box(size: int, taps: int) -> dict[str, Call]:
    """Return means over a window, of an image of bytes."""
    image = noise(size, size, dtype=np.uint8)
    border, kernel = cv2.BORDER_REFLECT, filters.box(taps)
    return {
        "lowrank": lambda: filters.correlate(image, kernel),
        "OpenCV": lambda: cv2.blur(image, (taps, taps), borderType=border),
        "SciPy": lambda: ndi.uniform_filter(image, taps),
    }


def volume(side: int) -> dict[str, Call]:
    """Return a separable filter of a volume."""
    data, line = noise(side, side, side), bell(9)
    kernel = filters.OuterProduct([line] * 3)

    def passes() -> object:
        result = data
        for axis in range(3):
            result = ndi.correlate1d(result, line, axis)
        return result

    return {"lowrank": lambda: filters.correlate(data, kernel), "SciPy": passes}


FILTERS: dict[str, Callable[[], dict[str, Call]]] = {
    "separable 9×9, image of 2048²": lambda: separable(9, 2048, 2048),
    "separable 31×31, image of 2048²": lambda: separable(31, 2048, 2048),
    "separable 9×9, colours of 1024², uint8": lambda: separable(9, 1024, 1024, 3, dtype=np.uint8),
    "15×15 of rank 3, image of 2048²": lambda: sum_of_three(2048),
    "Gaussian of sigma 50 (lowrank: to 0.1 %), image of 2048²": lambda: gaussian(2048, 50.0),
    "mean of 31×31, image of 2048², uint8": lambda: box(2048, 31),
    "separable 9×9×9, volume of 256³": lambda: volume(256),
}


def network_start(title: str, column: str, threads: int, folder: Path) -> Callable[[], list[Call]]:
    """Return a function that calls a network in one library for the first time.

    It returns calls, one for each layout of PyTorch.
    """
    from asv_benchmarks.benchmarks import networks, whole
    from asv_benchmarks.benchmarks.net_onnx import onnx_model
    from lowrank.interop.torch import on_engine

    name, version = NETWORKS[title]
    model, x = networks.load(name, 1)
    if version != EXACT:
        model = torch.load(folder / f"{name}-{version}.pt", weights_only=False)
    if column == "lowrank":
        planned = functools.cache(lambda: on_engine(model, x, threads))
        return after_a_call([lambda: planned()(x)])
    folded = whole.folded_copy(model)
    if column == "onnxruntime":
        given = onnx_model(folded, x)
        return lambda: [onnxruntime_call(given, x.numpy(), threads)]  # has called it for a shape
    return after_a_call(list(whole.torch_calls(folded, x).values()))


def after_a_call(calls: list[Call]) -> Callable[[], list[Call]]:
    """Return a function that calls the first and returns all."""

    def start() -> list[Call]:
        calls[0]()
        return calls

    return start


def worker(column: str, threads: int, titles: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the seconds of one library by title, of the first call and of later ones."""
    warnings.simplefilter("ignore")
    set_threads(threads)
    if column == "onnxruntime":
        torch.set_num_threads(1)  # which exports: its second thread would spin on a core for good
    found = {}
    for title in titles:
        if title in FILTERS:
            calls = FILTERS[title]()
            if column not in calls:
                continue
            start = after_a_call([calls[column]])
        elif column in ("lowrank", "PyTorch", "onnxruntime"):
            start = network_start(title, column, threads, folder)
        else:
            continue
        torch.set_grad_enabled(False)
        began = time.perf_counter()
        mine = start()
        first = time.perf_counter() - began
        found[title] = {"first": first, "later": min(measure_seconds(mine, SECONDS))}
    return found


def run_in_process(
    column: str, threads: int, titles: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run `worker` in a new process."""
    command = [sys.executable, "-m", "asv_benchmarks.headline", "--worker", column]
    command += ["--threads", str(threads), "--folder", str(folder), "--titles", *titles]
    # Threads may spin: no other library has threads.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "active"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compressed_networks(titles: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """Write the compressed versions of networks; return scores of the originals and of these."""
    from asv_benchmarks.benchmarks import nets, networks
    from lowrank.interop.torch import compress

    scores = {}
    for title in titles:
        name, version = NETWORKS.get(title, ("", EXACT))
        if version == "half":
            # Equal shares of all layers: such networks are for times alone.
            small = networks.Candidates(*networks.load(name, 1)).compress(MACS, 1, 1)
        elif version == "compressed":
            (case,) = nets.cases(name)
            given = case.calibration(0)
            small = compress(case.model, given, seconds=TIME, runtime="lowrank", threads=1).model
            scores[title] = [round(case.score(m), 2) for m in (case.model, small)]
        else:
            continue
        torch.save(small, folder / f"{name}-{version}.pt")
    return scores


def measure(titles: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return what the file of results holds."""
    counts = {column: (1,) if column == "SciPy" else (1, 2) for column in COLUMNS}
    runs = [(column, n) for column in COLUMNS for n in counts[column]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = compressed_networks(titles, folder)
        found = [{run: run_in_process(*run, titles, folder) for run in runs} for _ in range(rounds)]
    table = {
        title: {
            column: min(
                (_cell([r[column, n][title] for r in found], n) for n in counts[column]),
                key=lambda cell: cell["ms"],
            )
            for column in COLUMNS
            if title in found[0][column, counts[column][0]]
        }
        for title in titles
    }
    about = {"cpu": cpu(), "isa": _core.default_isa(), "date": str(datetime.date.today())}
    return {"machine": about, "rounds": rounds, "scores": scores, "rows": table}


def _cell(found: Sequence[dict[str, float]], threads: int) -> dict[str, Any]:
    """Return the median of the rounds in milliseconds, its interval, and the first call's."""
    times = sorted(1e3 * f["later"] for f in found)
    order = int(stats.binom.ppf(0.025, len(times), 0.5))  # of the sign test
    low, high = times[max(order - 1, 0)], times[min(-order, -1)]
    first = statistics.median(1e3 * f["first"] for f in found)
    cell = {"ms": statistics.median(times), "low": low, "high": high, "first": first}
    return {key: float(f"{value:.4g}") for key, value in cell.items()} | {"threads": threads}


def render(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    about = results["machine"]
    lines = [
        f"| milliseconds | lowrank | {' | '.join(COLUMNS[1:])} | first call | others' first |",
        "| --- |" + " --- |" * (len(COLUMNS) + 2),
        *(_line(title, cells) for title, cells in results["rows"].items()),
        "",
        f"One image, float32 unless noted, on two cores of {about['cpu']}, {about['isa'].upper()}, "
        f"{about['date']}: medians of {results['rounds']} processes per library, each in its "
        "fastest configuration on one or two threads, whose idle threads spin (SciPy has one). "
        "Bold is the fastest; a dash was not measured. First calls: lowrank's, planning included, "
        "and the shortest of another library. ResNet-18 has random weights, and networks at half "
        "of their MACs equal shares in all layers: for times alone.",
    ]
    for title, (before, after) in results["scores"].items():
        lines[-1] += (
            f" {title} has {after:.1f} % top-1 accuracy on 500 images, the original {before:.1f} % "
            "(one calibration seed)."
        )
    return "\n".join(lines) + "\n"


def _line(title: str, cells: dict[str, dict[str, float]]) -> str:
    best = min(cells, key=lambda column: cells[column]["ms"])
    words = {}
    for column, cell in cells.items():
        number = pages.three_digits(cell["ms"])
        words[column] = f"**{number}**" if column == best else number
    own, *others = (pages.three_digits(first) for first in first_calls(cells))
    times = [words.get(column, "-") for column in COLUMNS]
    return f"| {' | '.join([title, *times, own, *others])} |"


def first_calls(cells: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return the milliseconds of lowrank's first call and of the shortest other one."""
    first = {column: cell["first"] for column, cell in cells.items()}
    return first.pop("lowrank"), min(first.values())


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", metavar="WORD", help="rows with this in their title")
    for name, kind in {"--worker": str, "--threads": int, "--folder": Path}.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--titles", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.threads, given.titles, given.folder)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "scores": {}}
    if missing := [n for n, m in {"cv2": cv2, "torch": torch}.items() if m is None]:
        sys.exit(f"{', '.join(missing)} missing: .venv/bin/pip install --group bench")
    every = {**NETWORKS, **FILTERS}
    if not os.environ.get("LOWRANK_DATA"):
        print("LOWRANK_DATA names no folder: rows of networks stay as they are")
        every = FILTERS
    new = measure([title for title in every if given.only in title], given.rounds)
    merged = {key: results[key] | new[key] for key in ("rows", "scores")}
    merged = {
        key: {t: found[t] for t in NETWORKS | FILTERS if t in found}
        for key, found in merged.items()
    }
    results = new | merged
    with atomic_write(RESULTS) as path:
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    pages.write("headline")
    print(render(results), end="")


if __name__ == "__main__":
    main()
