"""Compare lowrank.ndimage with scipy.ndimage, function by function.

    OMP_NUM_THREADS=1 python -m asv_benchmarks.ndimage [--only WORD] [--seconds S] [--json]

Images of 512^2 and volumes of 128^3, float32 and float64, on one thread; medians of interleaved
calls that allocate their results.  The last line has the geometric mean and the slowest function.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from asv_benchmarks.benchmarks.timing import measure_seconds
from asv_benchmarks.filter_targets import report
from asv_benchmarks.filter_work import Row
from lowrank import ndimage
from lowrank.ndimage.arguments import NAMES, SCIPY

SHAPES = (512, 512), (128, 128, 128)
RNG = np.random.default_rng(0)
#: Arguments of every function after the input, without weights.
CALLS: dict[str, list[dict[str, Any]]] = {
    "correlate1d": [{"weights": RNG.random(n)} for n in (3, 9)],
    "convolve1d": [{"weights": RNG.random(9), "axis": 0}],
    "correlate": [{}],
    "convolve": [{}],
    "gaussian_filter1d": [{"sigma": 2.0}],
    "gaussian_filter": [{"sigma": s} for s in (1.0, 2.0, 5.0)],
    "gaussian_laplace": [{"sigma": 2.0}],
    "gaussian_gradient_magnitude": [{"sigma": 2.0}],
    "laplace": [{}],
    "prewitt": [{}],
    "sobel": [{}],
    "uniform_filter1d": [{"size": n} for n in (3, 31, 101)],
    "uniform_filter": [{"size": n} for n in (3, 9, 31, 101)],
}


def rows(only: str, seconds: float) -> Iterator[Row]:
    """Measure every function whose name contains a word."""
    for shape in SHAPES:
        for dtype in ("float32", "float64"):
            x = RNG.random(shape).astype(dtype)
            for name in NAMES:
                if only not in name:
                    continue
                for kwargs in CALLS[name]:
                    given = kwargs
                    if name in ("correlate", "convolve"):  # not separable
                        given = {"weights": RNG.random((3,) * x.ndim)}
                    both = (getattr(ndimage, name), SCIPY[name])
                    calls = [functools.partial(f, x, **given) for f in both]
                    ours, theirs = measure_seconds(calls, seconds)
                    values = [f"{k}={v}" for k, v in kwargs.items() if np.ndim(v) == 0]
                    values += [f"{np.shape(v)} taps" for v in given.values() if np.ndim(v)]
                    size = "x".join(map(str, shape))
                    text = f"{' '.join([name, *values])}, {size} {dtype}"
                    yield Row("lowrank.ndimage", text, 1, ours, "SciPy", theirs)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per row")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    report(rows(given.only, given.seconds), given.json)


if __name__ == "__main__":
    main()
