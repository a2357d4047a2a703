"""Compare box filters with OpenCV and SciPy, and Gaussians of any sigma with one another.

    python -m asv_benchmarks.filter_boxes [--threads N] [--only WORD] [--seconds S]

Medians of interleaved calls.  Boxes of 3 to 201 samples on images of 512^2 to 4096^2, grey and in
three colours, uint8 and float32, against `cv2.blur`, and against `scipy.ndimage.uniform_filter` on
one thread.  Gaussians of sigma 5 to 100 on 2048^2 with the error of the kernel, against the time of
sigma 20.  The last lines are the smallest ratios, with the targets.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import filters, ndimage
from lowrank.filters import multirate
from lowrank.ndimage.arguments import SCIPY

SIZES = (3, 5, 9, 15, 31, 101, 201)
SHAPES = ((512, 512), (2048, 2048), (4096, 4096), (512, 512, 3), (2048, 2048, 3))
SIGMAS = (5.0, 10.0, 20.0, 50.0, 100.0)
LEAST, MOST = 1.0, 1.5  # targets: of boxes to their peers, of sigmas beyond 20 to sigma 20
RNG = np.random.default_rng(0)


class Row(NamedTuple):
    """One comparison: peer's seconds per second of ours."""

    work: str
    seconds: float
    peer: str
    peer_seconds: float
    ratio: float

    def __str__(self) -> str:
        times = f"{self.seconds * 1e3:9.3f} ms{self.peer_seconds * 1e3:9.3f} ms"
        return f"{self.work:44}{self.peer:16}{times}{self.ratio:7.2f}x"


def box_rows(threads: int = 1, seconds: float = 0.3, only: str = "") -> Iterator[Row]:
    """Measure box filters against OpenCV, and against SciPy on one thread.

    Parameters
    ----------
    threads : int
        Threads of both libraries.
    seconds : float
        Time per row.
    only : str
        Part of the work's name.
    """
    import cv2

    cv2.setNumThreads(threads)
    for dtype in ("uint8", "float32"):
        for shape in SHAPES:
            x = (RNG.random(shape) * 255).astype(dtype)
            for size in SIZES:
                work = f"box {size}, {'x'.join(map(str, shape))} {dtype}, {threads} threads"
                if only not in work:
                    continue
                kernel = filters.box(size)
                ours = functools.partial(filters.correlate, x, kernel, threads=threads)
                theirs = functools.partial(cv2.blur, x, (size, size))
                a, b = measure_seconds([ours, theirs], seconds)
                yield Row(work, a, "cv2.blur", b, b / a)
    if threads > 1:
        return
    for dtype in ("float32", "float64", "uint8"):
        for shape in ((512, 512), (128, 128, 128)):
            x = (RNG.random(shape) * 255).astype(dtype)
            for size in SIZES[:-1]:
                work = f"uniform_filter {size}, {'x'.join(map(str, shape))} {dtype}"
                if only not in work:
                    continue
                both = (ndimage.uniform_filter, SCIPY["uniform_filter"])
                a, b = measure_seconds([functools.partial(f, x, size) for f in both], seconds)
                yield Row(work, a, "scipy.ndimage", b, b / a)


def gaussian_rows(threads: int = 1, seconds: float = 0.5) -> Iterator[Row]:
    """Measure Gaussians that a tolerance of 0.001 admits; the peer is sigma 20.

    Parameters
    ----------
    threads : int
        Number of threads.
    seconds : float
        Time of all rows.
    """
    x = RNG.random((2048, 2048), np.float32)
    kernels = [filters.gauss(sigma) for sigma in SIGMAS]
    calls: list[Any] = [
        functools.partial(filters.correlate, x, k, tolerance=1e-3, threads=threads) for k in kernels
    ]
    times = measure_seconds(calls, seconds)
    middle = times[SIGMAS.index(20.0)]
    for sigma, kernel, found in zip(SIGMAS, kernels, times):
        error = multirate.kernel_error(kernel.factors) or 0.0
        work = f"gauss {sigma:g}, error {error:.1e}, {threads} threads"
        yield Row(work, found, "gauss 20", middle, middle / found)


def main() -> None:
    """Print the rows, and the worst of them with the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of all libraries")
    parser.add_argument("--only", default="", help="part of a work's name")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per row")
    given = parser.parse_args()
    boxes = []
    for row in box_rows(given.threads, given.seconds, given.only):
        boxes.append(row)
        print(row, flush=True)
    gaussians = list(gaussian_rows(given.threads, given.seconds))
    print(*gaussians, sep="\n")
    if boxes:
        worst = min(boxes, key=lambda row: row.ratio)
        print(f"boxes: least {worst.ratio:.2f}x, {worst.work} (target {LEAST:g}x)")
    beyond = [row.seconds for row, sigma in zip(gaussians, SIGMAS) if sigma >= 20]
    print(f"sigma 20 to 100: {max(beyond) / min(beyond):.2f}x (target {MOST:g}x)")


if __name__ == "__main__":
    main()
