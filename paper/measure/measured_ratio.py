"""Cost ratios stated by articles, counted and measured.

2/m: an m x m filter of an image as two passes.  3/K^2: a K x K x K filter of a volume as three
passes.  1/N + 1/h^2: a layer of N channels and h x h taps, depthwise then pointwise.  Each library
runs its own dense and its own separated implementation, on one thread.
"""

import sys
from functools import partial

import numpy as np
import tables
from scipy import ndimage

import lowrank
from asv_benchmarks.benchmarks.libraries import cv2, torch_peers
from asv_benchmarks.benchmarks.timing import measure_seconds

try:
    import torch
except ImportError:
    torch = None
    print("measured_ratio: PyTorch is missing (pip install --group bench); its rows are left out")
SECONDS = 0.25  # per pair of calls


def filters(ndim, side, sizes):
    """Yield cases of an image or volume with a rank-1 kernel."""
    x = np.random.default_rng(0).random((1, 1, *(side,) * ndim), dtype=np.float32)
    for taps in sizes:
        line = np.hanning(taps + 2)[1:-1].astype(np.float32)
        kernel = line
        for _ in range(ndim - 1):
            kernel = np.multiply.outer(kernel, line)
        full = lowrank.dense(kernel[None, None], padding=taps // 2, padding_mode="symmetric")
        separated = lowrank.filters.separate(kernel, rank=1)

        def direct(kernel=kernel):
            return ndimage.correlate(x[0, 0], kernel)

        def passes(line=line):
            y = x[0, 0]
            for axis in range(ndim):
                y = ndimage.correlate1d(y, line, axis)
            return y

        calls = {"lowrank": tuple(planned(f, x) for f in (full, separated))}
        calls["SciPy"] = direct, passes
        if cv2 is not None and ndim == 2:
            plane, (a, b) = x[0, 0], (np.empty_like(x[0, 0]) for _ in range(2))
            border = {"borderType": cv2.BORDER_REFLECT}
            calls["OpenCV"] = (
                partial(cv2.filter2D, plane, -1, kernel, a, **border),
                partial(cv2.sepFilter2D, plane, -1, line, line, b, **border),
            )
        yield taps, full, separated, x, calls


def layers(h, size, widths):
    for n in widths:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, n, size, size), dtype=np.float32)
        full = lowrank.dense(rng.standard_normal((n, n, h, h), dtype=np.float32), padding=h // 2)
        stages = [
            lowrank.Stage(
                rng.standard_normal((n, 1, h, h), dtype=np.float32),
                lowrank.Geometry.of(2, padding=h // 2),
                groups=n,
            ),
            lowrank.Stage(
                rng.standard_normal((n, n, 1, 1), dtype=np.float32), lowrank.Geometry.of(2)
            ),
        ]
        separated = lowrank.chain(stages)
        calls = {"lowrank": tuple(planned(f, x) for f in (full, separated))}
        for layout, pair in zip(
            ("PyTorch", "PyTorch, channels last"),
            zip(torch_peers(full.stages, x).values(), torch_peers(stages, x).values()),
        ):
            calls[layout] = pair
        yield n, full, separated, x, calls


def planned(f, x):
    run = f.compile(x.shape[1:], np.float32, threads=1)
    out = run(x)
    return lambda: run(x, out)


def rows():
    for claim, cases, limit in (
        ("2/m", filters(2, 1024, (3, 5, 7, 9, 13, 17, 23, 31)), lambda m: 2 / m),
        ("3/K²", filters(3, 96, (3, 5, 7, 9, 11)), lambda k: 3 / k**2),
        ("1/N + 1/h²", layers(3, 28, (16, 32, 64, 128, 256, 512)), lambda n: 1 / n + 1 / 9),
    ):
        for size, full, separated, x, calls in cases:
            counted = separated.cost(x.shape[1:]).macs / full.cost(x.shape[1:]).macs
            for library, pair in calls.items():
                dense, chain = measure_seconds(list(pair), SECONDS)
                yield (claim, size, f"{limit(size):.6f}", f"{counted:.6f}", library,
                       f"{dense:.4g}", f"{chain:.4g}", tables.spread(dense, chain))  # fmt: skip


def main(target):
    if torch is not None:
        torch.set_num_threads(1)
    if cv2 is not None:
        cv2.setNumThreads(1)
    header = ["claim", "size", "limit", "counted", "library", "dense", "separated", "spread"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
