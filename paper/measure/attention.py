"""MACs and time of separable layers, dense layers and self-attention by positions N, channels C.

Articles state O(N C k^2 + N C^2) for depthwise-separable layers and O(N^2 C + N C^2) for
self-attention.  The layers' MACs are counted by `Factorization.cost`; attention's are those of its
matrix products: 4 N C^2 for queries, keys, values and output, N^2 C for the scores and N^2 C for
the weighted values.  The softmax exponentials are not MACs but take time.

Times are medians of interleaved runs, one thread, float32: layers on lowrank on an image of N
positions, attention (one head) with NumPy's matrix products.
"""

import csv
import math
import statistics
import sys
import time

import numpy as np
from threadpoolctl import threadpool_limits

import lowrank
from lowrank import Geometry, Stage

SIDES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
CHANNELS = (32, 64, 128, 256)
TAPS = 3
REPEATS = 5


def separable(c, rng):
    """Return a depthwise-separable layer."""
    depthwise = rng.standard_normal((c, 1, TAPS, TAPS), np.float32)
    pointwise = rng.standard_normal((c, c, 1, 1), np.float32)
    first = Stage(depthwise, Geometry.of(2, padding=TAPS // 2), groups=c)
    return lowrank.chain([first, Stage(pointwise, Geometry.of(2))])


def dense(c, rng):
    return lowrank.dense(rng.standard_normal((c, c, TAPS, TAPS), np.float32), padding=TAPS // 2)


def attention(c, rng):
    """Return a call of self-attention over N vectors of C numbers."""
    project_in = rng.standard_normal((c, 3 * c), np.float32) / math.sqrt(c)
    project_out = rng.standard_normal((c, c), np.float32) / math.sqrt(c)

    def run(x):
        queries, keys, values = np.split(x @ project_in, 3, axis=1)
        scores = queries @ keys.T
        scores *= 1 / math.sqrt(c)
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        return scores @ values @ project_out

    return run


def attention_macs(n, c):
    return 4 * n * c * c + 2 * n * n * c


def calls(c, side, rng):
    """Return a call and the MACs of each layer."""
    image = rng.standard_normal((1, c, side, side), np.float32)
    x = np.ascontiguousarray(image.reshape(c, -1).T)
    attend, found = attention(c, rng), {}
    for name, f in (("separable", separable(c, rng)), ("dense", dense(c, rng))):
        run = f.compile(image.shape[1:], np.float32, threads=1)
        out = np.empty_like(image)
        found[name] = lambda run=run, out=out: run(image, out), f.cost(image.shape[1:]).macs
    found["attention"] = lambda: attend(x), attention_macs(len(x), c)
    return found


def main(target):
    rng = np.random.default_rng(0)
    with open(target, "w", newline="") as file, threadpool_limits(1):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layer", "positions", "channels", "macs", "seconds"])
        for c in CHANNELS:
            for side in SIDES:
                found = calls(c, side, rng)
                times = {name: [] for name in found}
                many = 1 if side > 40 else 5  # the smallest are near the clock resolution
                for _ in range(REPEATS + 1):
                    for name, (call, _) in found.items():
                        start = time.perf_counter()
                        for _ in range(many):
                            call()
                        times[name].append((time.perf_counter() - start) / many)
                for name, (_, macs) in found.items():
                    took = statistics.median(times[name][1:])  # the first run faults pages in
                    rows.writerow([name, side * side, c, macs, f"{took:.4g}"])


if __name__ == "__main__":
    main(sys.argv[1])
