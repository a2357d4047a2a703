"""Compare lowrank.ndimage with scipy.ndimage, function by function.

    OMP_NUM_THREADS=1 python -m asv_benchmarks.ndimage [--only WORD] [--seconds S] [--json]

Images of 512^2 and volumes of 128^3, float32 and float64, on one thread; medians of interleaved
calls that allocate their results.  The last lines are the geometric mean and the slowest function,
with the targets: 10 and 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import ndimage
from lowrank.ndimage.arguments import NAMES, SCIPY

SHAPES = (512, 512), (128, 128, 128)
MEAN, LEAST = 10.0, 1.0
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


def rows(only: str, seconds: float) -> Iterator[dict[str, Any]]:
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
                    yield {
                        "function": name,
                        "arguments": ", ".join(values),
                        "shape": shape,
                        "dtype": dtype,
                        "ours_s": ours,
                        "scipy_s": theirs,
                        "speedup": theirs / ours,
                    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per row")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = []
    for row in rows(given.only, given.seconds):
        found.append(row)
        if not given.json:
            size = "x".join(map(str, row["shape"]))
            print(
                f"{row['function']:28}{row['arguments']:20}{size:14}{row['dtype']:9}"
                f"{row['ours_s'] * 1e3:9.2f} ms{row['scipy_s'] * 1e3:9.2f} ms"
                f"{row['speedup']:8.1f}x",
                flush=True,
            )
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        return
    mean = math.exp(sum(math.log(r["speedup"]) for r in found) / len(found))
    least = min(found, key=lambda r: r["speedup"])
    name = f"{least['function']} {least['arguments']}"
    print(f"geometric mean {mean:.1f}x (target {MEAN:g}x)")
    print(f"least {least['speedup']:.1f}x, {name} (target {LEAST:g}x)")


if __name__ == "__main__":
    main()
