"""How long a filter takes each way, by the size of its kernel: predicted, and by the clock.

One image of 1024 x 1024 float32 numbers, one thread.  Random kernels of rank R, of which the
separable form is one of R terms; direct sums and transforms do not care for rank.
"""

import csv
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from lowrank import filters
from lowrank.filters import choose

SIZE = (1024, 1024)
RANKS = (1, 2, 4, 8)
REPEATS = 3


def measured(option):
    image = np.random.default_rng(0).random((1, 1, *SIZE), dtype=np.float32)
    run, out = choose.runner(option, SIZE, np.float32, 1), np.empty_like(image)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run(image, out)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one fetches pages


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["taps", "way", "predicted", "measured"])
        for taps in (3, 5, 7, 9, 11, 15, 19, 25, 31, 41, 51, 63):
            rng = np.random.default_rng(taps)
            kernel = rng.standard_normal((taps, taps))
            options = {}
            for o in filters.plan_filter(kernel, SIZE, threads=1).options:
                if o.method != "separable":
                    options[o.method] = o
            for rank in RANKS:
                if rank < taps:
                    plan = filters.plan_filter(kernel, SIZE, rank=rank, threads=1)
                    options[f"rank {rank}"] = plan.choice
            for way, option in options.items():
                rows.writerow([taps, way, f"{option.seconds:.4g}", f"{measured(option):.4g}"])


if __name__ == "__main__":
    main(sys.argv[1])
