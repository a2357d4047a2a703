"""The engine on single stages and fused chains, beside NumPy's matrix product.

    python -m asv_benchmarks.benchmarks.kernels [THREADS]      prints the rates as a table

A share of 1 is the rate of a large float32 matrix product on one thread, measured in turns,
times the threads: what the machine gives to a library that has been tuned for it.  The product
keeps to one thread, since a BLAS whose threads spin while they wait takes ours their cores.
"""

import os
import statistics
import sys
import time
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np

from . import measure

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
    """(chain, input shape) of one of the above."""
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


def planned(name):
    """A call of one of the above on one thread."""
    f, shape = problem(name)
    x = np.ones((1, *shape), np.float32)
    run = f.compile(shape, np.float32, threads=1)
    out = run(x)
    return lambda: run(x, out)


#: Layers of well-known networks beside other libraries, one thread.
LAYERS = ("dense", "depthwise", "series", "mobilenet")
WORK = {name: partial(planned, name) for name in PROBLEMS} | measure.works(["call"])


class Problems:
    """Time of the engine over that of a matrix product with as many multiply-adds."""

    params = (list(PROBLEMS),)
    param_names = ["problem"]

    def setup_cache(self):
        found = {}
        for name in PROBLEMS:
            try:
                f, shape = problem(name)
                share, rate = measured(f, shape, threads=1)
            except measure.ABSENT:
                continue
            found[name] = 1 / share, 2e-9 * f.cost(shape).macs / rate
        return found

    setup_cache.timeout = 120

    def setup(self, found, name):
        if name not in found:
            raise NotImplementedError

    def track_time_over_gemm(self, found, name):
        return found[name][0]

    track_time_over_gemm.unit = "times a matrix product of as many multiply-adds"

    def track_time(self, found, name):
        return found[name][1]

    track_time.unit = "seconds"


class Layers(measure.Beside):
    """Layers, and MobileNet's blocks, beside the same in other libraries."""

    params = (measure.names(LAYERS), ["PyTorch", "onnxruntime"])

    def setup_cache(self):
        return measure.table(LAYERS)

    setup_cache.timeout = 600


class LayerTimes(measure.Alone):
    """Their own times."""

    params = (measure.names(LAYERS),)
    setup_cache = Layers.setup_cache


class Calls:
    """A call of a planned chain on a tiny input: what is paid beside the work."""

    params = (measure.names(["call"]),)

    def setup(self, name):
        self.call = measure.available(WORK[name])

    def time_call(self, name):
        self.call()


def measured(f, shape, threads, seconds=0.5):
    """(share of the rate of a matrix product, GFLOP/s): medians of runs that take turns."""
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
        share, rate = measured(*problem(name), threads)
        print(f"{name:26}  {rate:7.1f}  {share:.2f}")


if __name__ == "__main__":
    main()
