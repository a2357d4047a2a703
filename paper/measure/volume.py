"""Filters of volumes: separable rank, error in grey levels, and time.

The central 128 samples per axis of a magnetic resonance image of a head, or synthetic balls
without LOWRANK_DATA.  Kernels: Gaussian, ball, Laplacian of Gaussian, rotated Gaussian and wave;
their magnitudes sum to 1, so results are at most 255.  For each, sums of few separable terms
(`terms`) with the error of the kernel and the largest and RMS error of the filtered volume in grey
levels; `levelled` is the RMS error with the terms scaled to the sum of the kernel, which corrects
the mean of the volume.  `sensitivity` to noise on the weights is 1 for the kernel and large where
terms cancel.

`macs` are per sample; `ratio` is the direct filter's MACs over them.  Times are predicted, and
medians of interleaved runs, one thread, float32, beside SciPy's direct and separable filters.
"""

import csv
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import tables
from threadpoolctl import threadpool_limits

import lowrank
from asv_benchmarks.benchmarks.timing import Seconds
from lowrank import filters
from lowrank.filters import choose

SIDE = 128
REACHES = range(1, 8)  # kernels of 3 to 15 taps per axis; odd reaches have a Gaussian only
TERMS = (1, 2, 3, 4, 6, 8)
REPEATS = 3


def head():
    """Return the name of the volume and its values, from 0 to 255."""
    folder = tables.folder()
    if folder:
        raw = gzip.decompress(Path(folder, "volumes", "t1_crop.nii.gz").read_bytes())
        whole = np.frombuffer(raw, np.uint8, offset=352).reshape((256,) * 3)
        cut = (slice(128 - SIDE // 2, 128 + SIDE // 2),) * 3
        return "head", whole[cut].astype(np.float32)
    print("LOWRANK_DATA is not set: synthetic balls replace the head", file=sys.stderr)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    volume = np.zeros((SIDE,) * 3, np.float32)
    for _ in range(60):
        centre, radius = rng.integers(0, SIDE, 3), rng.integers(4, 24)
        away = ((grid - centre[:, None, None, None]) ** 2).sum(0)
        volume[away < radius**2] = rng.integers(0, 256)
    return "balls", volume


def kernels(reach):
    """Return kernels of 2 reach + 1 taps per axis by name."""
    sigma = (reach + 0.4) / 4  # filters.gauss truncates at 4 sigma
    found = {"Gaussian": filters.gauss(sigma, ndim=3)}
    if reach % 2 == 0:
        line = np.arange(-reach, reach + 1.0)
        z, y, x = np.meshgrid(line, line, line, indexing="ij")
        along, away = (z + y + x) / np.sqrt(3), z * z + y * y + x * x
        bell = np.exp(-away / sigma**2 / 6)
        found["ball"] = filters.ball(reach)
        found["Laplacian"] = filters.log(sigma, ndim=3)
        found["rotated"] = np.exp(-(away - 0.75 * along**2) / sigma**2 / 2)  # twice as long as wide
        found["wave"] = bell * np.cos(np.pi * along / sigma / 2)
    return {name: (k / abs(k).sum()).astype(np.float32) for name, k in found.items()}


def measure_seconds(calls):
    """Return median seconds of interleaved calls; calls longer than 0.5 s run once."""
    times = {name: [] for name in calls}
    for _ in range(REPEATS + 1):
        for name, call in calls.items():
            if times[name] and min(times[name]) > 0.5:
                continue
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    # The first run faults pages in.
    return {name: Seconds(found[1:] or found) for name, found in times.items()}


def scipy_calls(volume, kernel, name, reach):
    """Return SciPy's calls, which run on one thread."""
    out, calls = np.empty_like(volume), {}
    if (reach < 6 and reach % 2 == 0) or (reach == 6 and name in ("Gaussian", "ball")):
        # Seconds each: the time depends on the number of non-zero taps only.
        calls["SciPy direct", ""] = lambda: scipy.ndimage.correlate(volume, kernel, out)
    if name == "Gaussian":
        sigma = (reach + 0.4) / 4
        calls["SciPy separable", ""] = lambda: scipy.ndimage.gaussian_filter(
            volume, sigma, output=out
        )
    return calls


def filter_options(kernel, shape):
    """Return the options of a filter by (method, number of terms)."""
    plan = filters.plan_filter(kernel, shape, threads=1)
    found = {(o.method, ""): o for o in plan.methods if o.method != "separable"}
    for terms in TERMS:
        o = filters.plan_filter(kernel, shape, rank=terms, threads=1).choice
        found["separable", terms] = o
        if o.error < 1e-5:
            break
    return found


def grey_level_errors(option, out, truth, kernel):
    """Return the largest, the RMS and the levelled RMS error in grey levels."""
    level = kernel.sum() / option.chain.to_dense().sum() if abs(kernel.sum()) > 0.9 else 1.0
    off = [np.sqrt(((f * out - truth) ** 2).mean()) for f in (1.0, level)]
    return [f"{e:.3g}" for e in (abs(out - truth).max(), *off)]


def main(target):
    label, volume = head()
    images = volume[None, None]
    with open(target, "w", newline="") as file, threadpool_limits(1):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["volume", "kernel", "taps", "method", "terms", "rank", "error", "largest", "rms",
             "levelled", "sensitivity", "macs", "ratio", "predicted", "seconds", "spread"]
        )  # fmt: skip
        for reach, (name, kernel) in ((r, k) for r in REACHES for k in kernels(r).items()):
            options, outs, calls = filter_options(kernel, volume.shape), {}, {}
            for method, o in options.items():
                run = choose.compile_method(o, volume.shape, np.float32, 1)
                outs[method] = images.copy()
                calls[method] = lambda run=run, out=outs[method]: run(images, out)
            full = options["direct", ""].chain.cost(volume.shape).macs
            truth = outs["direct", ""]
            took = measure_seconds(calls | scipy_calls(volume, kernel, name, reach))
            for (method, terms), seconds in took.items():
                o = options.get((method, terms))
                if o is None:
                    about = [""] * 8
                else:
                    macs = o.chain.cost(volume.shape).macs
                    counts = [f"{macs / volume.size:g}", f"{full / macs:.4g}"]
                    errors = grey_level_errors(o, outs[method, terms].astype(float), truth, kernel)
                    if o.block:  # FFT of the full kernel: no chain
                        counts = [""] * 3
                    else:
                        certificate = lowrank.certificate(options["direct", ""].chain, o.chain)
                        counts.insert(0, f"{certificate.sensitivity:.4g}")
                    about = [f"{o.error:.3g}", *errors, *counts, f"{o.seconds:.4g}"]
                rank = filters.rank(kernel, tolerance=1e-5)
                rows.writerow(
                    [
                        label,
                        name,
                        kernel.shape[0],
                        method,
                        terms,
                        rank,
                        *about,
                        f"{seconds:.4g}",
                        tables.spread(seconds),
                    ]
                )


if __name__ == "__main__":
    main(sys.argv[1])
