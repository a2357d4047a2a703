"""Rates of single stages and fused chains relative to NumPy's matrix product.

    python -m asv_benchmarks.benchmarks.kernels [THREADS]      prints a table of rates

A share of 1 is the rate of a large float32 GEMM on one thread, measured interleaved, times the
number of threads.  The GEMM runs on one thread because spinning BLAS threads would occupy our
cores.
"""

import os
import statistics
import sys
import time
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from . import tables
from .compat import MISSING

#: Spatial size of the input, then the stages: (out, in, kernel, stride, groups).
PROBLEMS = {
    "3x3 64 at 56": ((56, 56), (64, 64, (3, 3), 1, 1)),
    "1x1 64 at 56": ((56, 56), (64, 64, (1, 1), 1, 1)),
    "1x1, 3x3 fused, 64 at 56": ((56, 56), (64, 64, (1, 1), 1, 1), (64, 64, (3, 3), 1, 1)),
    "3x1, 1x3 fused, 64 at 56": ((56, 56), (64, 64, (3, 1), 1, 1), (64, 64, (1, 3), 1, 1)),
    "CP of rank 64, 64 at 56": (
        (56, 56),
        (64, 64, (1, 1), 1, 1),
        (64, 64, (3, 1), 1, 64),
        (64, 64, (1, 3), 1, 64),
        (64, 64, (1, 1), 1, 1),
    ),
    "3x3 stride 2, 64 at 56": ((56, 56), (64, 64, (3, 3), 2, 1)),
    "3x3 depthwise 64 at 56": ((56, 56), (64, 64, (3, 3), 1, 64)),
    "3x3 256 at 14": ((14, 14), (256, 256, (3, 3), 1, 1)),
    "3x3 512 at 7": ((7, 7), (512, 512, (3, 3), 1, 1)),
    "9 taps, 64 series of 4096": ((4096,), (64, 64, (9,), 1, 1)),
    "3x3x3 20 at 48": ((48, 48, 48), (20, 20, (3, 3, 3), 1, 1)),
}


def problem(name):
    """Return (chain, input shape) of a problem."""
    import lowrank as lr

    size, *specs = PROBLEMS[name]
    stages = [
        lr.Stage(
            np.ones((out, channels // groups, *kernel), np.float32),
            lr.Geometry.of(len(kernel), stride, [(k - 1) // 2 for k in kernel]),
            groups,
        )
        for out, channels, kernel, stride, groups in specs
    ]
    return lr.chain(stages), (specs[0][1], *size)


def compiled_call(name):
    """Return a call of a compiled problem on one thread."""
    f, shape = problem(name)
    x = np.ones((1, *shape), np.float32)
    run = f.compile(shape, np.float32, threads=1)
    out = run(x)
    return lambda: run(x, out)


#: Kinds of layers that are compared with other libraries.
LAYERS = ("dense", "depthwise", "series", "mobilenet")
WORK = {name: partial(compiled_call, name) for name in PROBLEMS} | tables.case_recipes(["call"])


class Problems:
    """Time relative to a matrix product with equal MACs."""

    params = (list(PROBLEMS),)
    param_names = ["problem"]

    def setup_cache(self):
        found = {}
        for name in PROBLEMS:
            try:
                f, shape = problem(name)
                share, rate = gemm_share(f, shape, threads=1)
            except MISSING:
                continue
            found[name] = 1 / share, 2e-9 * f.cost(shape).macs / rate
        return found

    setup_cache.timeout = 120

    def setup(self, found, name):
        if name not in found:
            raise NotImplementedError

    def track_time_over_gemm(self, found, name):
        return found[name][0]

    track_time_over_gemm.unit = "times a matrix product of equal MACs"

    def track_time(self, found, name):
        return found[name][1]

    track_time.unit = "seconds"


class Layers(tables.PeerRatios):
    """Times of layers and MobileNet blocks relative to other libraries."""

    params = (tables.case_names(LAYERS), ["PyTorch", "onnxruntime"])

    def setup_cache(self):
        return tables.measure_table(LAYERS)

    setup_cache.timeout = 600


class LayerTimes(tables.OwnTimes):
    """Absolute times."""

    params = (tables.case_names(LAYERS),)
    setup_cache = Layers.setup_cache


class Calls(tables.Recipes):
    """Call overhead: a compiled chain on a tiny input."""

    recipes = WORK

    params = (tables.case_names(["call"]),)

    def time_call(self, name):
        self.call()


def gemm_share(f, shape, threads, seconds=0.5):
    """Return (share of the GEMM rate, GFLOP/s): medians of interleaved runs."""
    x = np.ones((1, *shape), np.float32)
    run = f.compile(shape, np.float32, threads=threads)
    out = run(x)
    n = 768
    a, b, c = (np.ones((n, n), np.float32) for _ in range(3))
    ours, theirs = [], []
    np.matmul(a, b, out=c)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ours) < 5:
        start = time.perf_counter()
        run(x, out)
        middle = time.perf_counter()
        np.matmul(a, b, out=c)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    rate = 2e-9 * f.cost(shape).macs / statistics.median(ours)
    return rate / (threads * 2e-9 * n**3 / statistics.median(theirs)), rate


def main():
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(f"{'problem':26}  GFLOP/s  share of a matrix product, {threads} thread(s)")
    for name in PROBLEMS:
        share, rate = gemm_share(*problem(name), threads)
        print(f"{name:26}  {rate:7.1f}  {share:.2f}")


if __name__ == "__main__":
    main()
