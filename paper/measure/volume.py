"""Filters of volumes: the terms that each takes, what fewer of them cost in grey levels, and time.

A cut of 128 samples an axis from the middle of a magnetic resonance image of a head, where
LOWRANK_DATA has it, else of balls by formula. Gaussian, ball, Laplacian of Gaussian, a Gaussian
that is turned in space, and a wave; their magnitudes sum to one, so that no result is beyond 255.
For each, sums of few separable terms, with the error of the kernel and the largest and the RMS
error of the filtered volume in grey levels; `levelled` is the RMS error where the terms are
scaled to the sum of the kernel, which the mean of a volume asks for and the norm of an error does
not see. `sensitivity` to noise on the weights is 1 for the kernel, and large where terms cancel.

`macs` are multiply-adds a sample and `ratio` is the direct filter's over them. Seconds are
predicted, and medians of runs that take turns, one thread, float32; beside them SciPy's direct
sums and its Gaussian.
"""

import csv
import gzip
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import tables
from threadpoolctl import threadpool_limits

import lowrank
from lowrank import filters
from lowrank.filters import choose

SIDE = 128
REACHES = range(1, 8)  # kernels of 3 to 15 taps an axis; those that are odd have a Gaussian alone
TERMS = (1, 2, 3, 4, 6, 8)
REPEATS = 3


def head():
    """The volume, of numbers from 0 to 255, and its name."""
    folder = tables.folder()
    if folder:
        raw = gzip.decompress(Path(folder, "volumes", "t1_crop.nii.gz").read_bytes())
        whole = np.frombuffer(raw, np.uint8, offset=352).reshape((256,) * 3)
        cut = (slice(128 - SIDE // 2, 128 + SIDE // 2),) * 3
        return "head", whole[cut].astype(np.float32)
    print("LOWRANK_DATA is not set: balls by formula in place of a head", file=sys.stderr)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    volume = np.zeros((SIDE,) * 3, np.float32)
    for _ in range(60):
        centre, radius = rng.integers(0, SIDE, 3), rng.integers(4, 24)
        away = ((grid - centre[:, None, None, None]) ** 2).sum(0)
        volume[away < radius**2] = rng.integers(0, 256)
    return "balls", volume


def kernels(reach):
    """Kernels of 2 reach + 1 taps an axis, by name."""
    sigma = (reach + 0.4) / 4  # the library cuts at four of them
    found = {"Gaussian": filters.gauss(sigma, ndim=3)}
    if reach % 2 == 0:
        line = np.arange(-reach, reach + 1.0)
        z, y, x = np.meshgrid(line, line, line, indexing="ij")
        along, away = (z + y + x) / np.sqrt(3), z * z + y * y + x * x
        bell = np.exp(-away / sigma**2 / 6)
        found["ball"] = filters.ball(reach)
        found["Laplacian"] = filters.log(sigma, ndim=3)
        found["turned"] = np.exp(-(away - 0.75 * along**2) / sigma**2 / 2)  # twice as long as wide
        found["wave"] = bell * np.cos(np.pi * along / sigma / 2)
    return {name: (k / abs(k).sum()).astype(np.float32) for name, k in found.items()}


def clocked(calls):
    """Median seconds of calls that take turns; what takes long is run once."""
    times = {name: [] for name in calls}
    for _ in range(REPEATS + 1):
        for name, call in calls.items():
            if times[name] and min(times[name]) > 0.5:
                continue
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    # The first ones fetch pages.
    return {name: statistics.median(found[1:] or found) for name, found in times.items()}


def scipys(volume, kernel, name, reach):
    """SciPy's ways, which run on one thread."""
    out, ways = np.empty_like(volume), {}
    if (reach < 6 and reach % 2 == 0) or (reach == 6 and name in ("Gaussian", "ball")):
        # Seconds each: they go with the taps that are not zero, whatever their values.
        ways["SciPy direct", ""] = lambda: scipy.ndimage.correlate(volume, kernel, out)
    if name == "Gaussian":
        sigma = (reach + 0.4) / 4
        ways["SciPy passes", ""] = lambda: scipy.ndimage.gaussian_filter(volume, sigma, output=out)
    return ways


def ways(kernel, shape):
    """Options of a filter by their method and number of terms."""
    plan = filters.plan_filter(kernel, shape, threads=1)
    found = {(o.method, ""): o for o in plan.options if o.method != "separable"}
    for terms in TERMS:
        o = filters.plan_filter(kernel, shape, rank=terms, threads=1).choice
        found["separable", terms] = o
        if o.error < 1e-5:
            break
    return found


def misses(option, out, truth, kernel):
    """Errors in grey levels: the largest, the root of the mean square, and levelled."""
    level = kernel.sum() / option.chain.to_dense().sum() if abs(kernel.sum()) > 0.9 else 1.0
    off = [np.sqrt(((f * out - truth) ** 2).mean()) for f in (1.0, level)]
    return [f"{e:.3g}" for e in (abs(out - truth).max(), *off)]


def main(target):
    said, volume = head()
    images = volume[None, None]
    with open(target, "w", newline="") as file, threadpool_limits(1):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["volume", "kernel", "taps", "way", "terms", "rank", "error", "largest", "rms",
             "levelled", "sensitivity", "macs", "ratio", "predicted", "seconds"]
        )  # fmt: skip
        for reach, (name, kernel) in ((r, k) for r in REACHES for k in kernels(r).items()):
            options, outs, calls = ways(kernel, volume.shape), {}, {}
            for way, o in options.items():
                run, outs[way] = choose.runner(o, volume.shape, np.float32, 1), images.copy()
                calls[way] = lambda run=run, out=outs[way]: run(images, out)
            full = options["direct", ""].chain.cost(volume.shape).macs
            truth = outs["direct", ""]
            took = clocked(calls | scipys(volume, kernel, name, reach))
            for (way, terms), seconds in took.items():
                o = options.get((way, terms))
                if o is None:
                    about = [""] * 8
                else:
                    macs = o.chain.cost(volume.shape).macs
                    counts = [f"{macs / volume.size:g}", f"{full / macs:.4g}"]
                    off = misses(o, outs[way, terms].astype(float), truth, kernel)
                    if o.block:  # a transform of the kernel as it is
                        counts = [""] * 3
                    else:
                        # Of the dense filter 1; far above it where terms cancel.
                        sure = lowrank.certificate(options["direct", ""].chain, o.chain)
                        counts.insert(0, f"{sure.sensitivity:.4g}")
                    about = [f"{o.error:.3g}", *off, *counts, f"{o.seconds:.4g}"]
                rank = filters.rank(kernel, tolerance=1e-5)
                rows.writerow(
                    [said, name, kernel.shape[0], way, terms, rank, *about, f"{seconds:.4g}"]
                )


if __name__ == "__main__":
    main(sys.argv[1])
