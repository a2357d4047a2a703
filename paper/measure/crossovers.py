"""Predicted and measured time of a filter by method and kernel size.

One float32 image of 1024 x 1024, one thread.  Random kernels, run as R separable terms, by direct
sums and by FFT; the last two do not depend on the rank.
"""

import sys

import numpy as np
import tables

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import filters
from lowrank.filters import choose

SIZE = (1024, 1024)
RANKS = (1, 2, 4, 8)
SECONDS = 0.5  # per kernel size, all methods interleaved


def call(option):
    image = np.random.default_rng(0).random((1, 1, *SIZE), dtype=np.float32)
    run, out = choose.compile_method(option, SIZE, np.float32, 1), np.empty_like(image)
    return lambda: run(image, out)


def rows():
    for taps in (3, 5, 7, 9, 11, 15, 19, 25, 31, 41, 51, 63):
        rng = np.random.default_rng(taps)
        kernel = rng.standard_normal((taps, taps))
        options = {}
        for o in filters.plan_filter(kernel, SIZE, threads=1).methods:
            if o.method != "separable":
                options[o.method] = o
        for rank in RANKS:
            if rank < taps:
                plan = filters.plan_filter(kernel, SIZE, rank=rank, threads=1)
                options[f"rank {rank}"] = plan.choice
        times = measure_seconds([call(o) for o in options.values()], SECONDS)
        for (method, option), seconds in zip(options.items(), times):
            yield taps, method, f"{option.seconds:.4g}", f"{seconds:.4g}", tables.spread(seconds)


def main(target):
    tables.calibrated()
    tables.write(target, ["taps", "method", "predicted", "measured", "spread"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
