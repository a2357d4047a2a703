"""MACs and time of separable layers, dense layers and self-attention by positions N, channels C.

Articles state O(N C k^2 + N C^2) for depthwise-separable layers and O(N^2 C + N C^2) for
self-attention.  The layers' MACs are counted by `Factorization.cost`; attention's are those of its
matrix products: 4 N C^2 for queries, keys, values and output, N^2 C for the scores and N^2 C for
the weighted values.  The softmax exponentials are not MACs but take time.

Times are medians of interleaved runs, one thread, float32: layers on lowrank on an image of N
positions, attention (one head) in PyTorch, by `scaled_dot_product_attention`, which is fused.
"""

import csv
import sys
import time

import numpy as np
import tables

import lowrank
from asv_benchmarks.benchmarks.timing import Seconds
from lowrank import Geometry, Stage

torch = tables.require_torch()
SIDES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
CHANNELS = (32, 64, 128, 256)
TAPS = 3
REPEATS = 7


def separable(c, rng):
    """Return a depthwise-separable layer."""
    depthwise = rng.standard_normal((c, 1, TAPS, TAPS), np.float32)
    pointwise = rng.standard_normal((c, c, 1, 1), np.float32)
    first = Stage(depthwise, Geometry.of(2, padding=TAPS // 2), groups=c)
    return lowrank.chain([first, Stage(pointwise, Geometry.of(2))])


def dense(c, rng):
    return lowrank.dense(rng.standard_normal((c, c, TAPS, TAPS), np.float32), padding=TAPS // 2)


def attention(c, x):
    """Return a call of self-attention over N vectors of C numbers."""
    project_in = torch.nn.Linear(c, 3 * c, bias=False)
    project_out = torch.nn.Linear(c, c, bias=False)

    def run():
        with torch.inference_mode():
            parts = project_in(x).chunk(3, -1)
            return project_out(torch.nn.functional.scaled_dot_product_attention(*parts))

    return run


def attention_macs(n, c):
    return 4 * n * c * c + 2 * n * n * c


def calls(c, side, rng):
    """Return a call and the MACs of each layer."""
    image = rng.standard_normal((1, c, side, side), np.float32)
    x = torch.from_numpy(np.ascontiguousarray(image.reshape(c, -1).T))[None, None]
    found = {}
    for name, f in (("separable", separable(c, rng)), ("dense", dense(c, rng))):
        run = f.compile(image.shape[1:], np.float32, threads=1)
        out = np.empty_like(image)
        found[name] = lambda run=run, out=out: run(image, out), f.cost(image.shape[1:]).macs
    found["attention"] = attention(c, x), attention_macs(side * side, c)
    return found


def main(target):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layer", "positions", "channels", "macs", "seconds", "spread"])
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
                    took = Seconds(times[name][1:])  # the first run faults pages in
                    rows.writerow([name, side * side, c, macs, f"{took:.4g}", tables.spread(took)])


if __name__ == "__main__":
    main(sys.argv[1])
