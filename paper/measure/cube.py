"""A denoising filter of a hyperspectral cube: PSNR and time by rank.

The cube is the left half of AVIRIS Jasper Ridge, or a synthetic one without LOWRANK_DATA; each
band is centred, and white noise of half the cube's standard deviation is added.  The filter, 5 x 5
samples by 15 bands, is a Wiener filter: least squares from the second moments of patches of the
noisy cube and the noise variance, so its accuracy grows with the number of patches.

Variants: sums of outer products of three lines (`separable_sum`), a spatial followed by a spectral
stage (`dh-w`, the bipartition {i j | b}) and others.  `fit` is "weights" (smallest weight error) or
"output" (smallest output error, with the cube as calibration data of a one-layer network).  `psnr`
is against the clean cube, whose largest value is 1, `off` against the output of the full filter.
Times are medians of interleaved runs.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import scipy.ndimage
import tables
from threadpoolctl import threadpool_limits

import lowrank
from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import compress, filters
from lowrank.filters import choose

TAPS = (5, 5, 15)
NOISE = 0.5
PATCHES = (2500, 5000, 10000, 40000, 160000)
MAIN = 40000  # patches for which all variants are measured
SECONDS = 2.0  # all calls interleaved


def scene():
    """Return the name of the cube and its values, scaled to a largest value of 1."""
    folder = tables.folder()
    if folder:
        path = Path(folder, "hyperspectral", "jasper_ridge_left.npz")
        cube = np.load(path)["cube"].astype(np.float32)
        return "Jasper Ridge", cube / cube.max()
    print("LOWRANK_DATA is not set: a synthetic cube replaces Jasper Ridge", file=sys.stderr)
    rng = np.random.default_rng(0)
    shares = scipy.ndimage.gaussian_filter(rng.standard_normal((4, 100, 50)), (0, 3, 3))
    shares = np.exp(20 * shares) / np.exp(20 * shares).sum(0)
    bands = np.linspace(0, 1, 198)
    bumps = np.exp(-(((bands - rng.random((4, 6, 1))) / 0.08) ** 2)) * rng.random((4, 6, 1))
    cube = np.einsum("mij,mb->ijb", shares, bumps.sum(1)).astype(np.float32)
    return "synthetic", cube / cube.max()


def wiener(noisy, sigma, patches):
    """Return the filter that restores the centre of patches with the least squared error."""
    windows = np.lib.stride_tricks.sliding_window_view(noisy, TAPS)
    rng = np.random.default_rng(1)
    at = tuple(rng.integers(0, n, patches) for n in windows.shape[:3])
    x = windows[at].reshape(patches, -1)
    moments = (x.T @ x).astype(np.float64) / patches
    centre = len(moments) // 2
    target = moments[centre].copy()
    target[centre] -= sigma**2
    kernel = np.linalg.solve(moments, target).reshape(TAPS)
    return (kernel + kernel[::-1, ::-1, ::-1]) / 2  # second moments of pairs are symmetric


class Single:
    """A one-layer network with the noisy cube as calibration data."""

    batches = 1

    def __init__(self, conv, noisy):
        self.layers = (compress.Layer("filter", conv, noisy.shape),)
        self.noisy = noisy[None, None]

    def inputs(self, names, chains):
        yield dict.fromkeys(names, (self.noisy,))

    def gradients(self, names, seed):
        return None

    def outputs(self, chains):
        yield (chains.get("filter", self.layers[0].conv)(self.noisy),)

    def replaced(self, chains):
        return chains


def psnr(result, reference):
    return f"{-10 * np.log10(np.mean((result - reference.astype(float)) ** 2)):.3f}"


def main(target):
    name, clean = scene()
    clean -= clean.mean((0, 1))
    sigma = NOISE * clean.std()
    noise = np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    noisy = clean + sigma * noise
    images, size = noisy[None, None], clean.shape
    with open(target, "w", newline="") as file, threadpool_limits(1):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["cube", "patches", "variant", "fit", "rank", "macs", "error", "psnr", "off",
             "predicted", "seconds", "spread"]
        )  # fmt: skip
        rows.writerow([name, "", "noisy", "", "", "", "", psnr(noisy, clean), *[""] * 4])
        for patches in PATCHES:
            kernel = wiener(noisy, sigma, patches).astype(np.float32)
            plan = filters.plan_filter(kernel, size, threads=1)
            options = {o.method: o for o in plan.methods if o.method != "separable"}
            conv = options["direct"].chain
            whole = conv(images)[0, 0]
            chains = {("dense", "", ""): conv}
            net = Single(conv, noisy)
            statistics = compress.LayerStatistics(net, gradients=False)
            ranks = (1, 2, 3, 4, 6, 8) if patches == MAIN else (2,)
            for rank in ranks:
                chains["dh-w", "weights", rank] = lowrank.spatial_svd(conv, rank, variant="dh-w")
                chains["separable_sum", "weights", rank] = lowrank.separable_sum(conv, rank)
                if patches == MAIN and rank < 5:
                    chains["d-hw", "weights", rank] = lowrank.spatial_svd(
                        conv, rank, variant="d-hw"
                    )
                    train = lowrank.tensor_train(conv, (rank, rank), variant="sd-h-wt")
                    chains["train", "weights", rank] = train
                if rank < 5:
                    for family, each in (
                        ("separable_sum", sum(TAPS)),
                        ("spatial_svd", TAPS[0] * 5 + 15),
                    ):
                        share = (rank * each + 0.5) / kernel.size
                        small = compress.compress_model(
                            net, macs=share, families=[family], statistics=statistics
                        )
                        f = small.chains["filter"]
                        chains[f.variant or f.family, "output", rank] = f
            took, predicted = {}, {}
            if patches == MAIN:
                for key, f in chains.items():
                    if key[1] != "output":  # same time as those fitted to the weights
                        out, run = np.empty_like(images), f.compile(size, np.float32, threads=1)
                        took[key] = lambda run=run, out=out: run(images, out)
                        predicted[key] = lowrank.perfmodel.predict(f, size, threads=1).seconds
                run = choose.compile_method(options["fft"], size, np.float32, 1)
                out = np.empty_like(images)
                took["fft", "", ""] = lambda run=run, out=out: run(images, out)
                predicted["fft", "", ""] = options["fft"].seconds
                took["SciPy", "", ""] = lambda k=kernel: scipy.ndimage.correlate(noisy, k)
                took = dict(zip(took, measure_seconds(list(took.values()), SECONDS)))
            for key in dict.fromkeys([*chains, *took]):
                f = chains.get(key)
                about = [""] * 4
                if f is not None:
                    out = f(images)[0, 0]
                    counts = f.cost(size).macs / noisy.size, f.error(conv.to_dense())
                    off = "" if f is conv else psnr(out, whole)
                    about = [f"{counts[0]:g}", f"{counts[1]:.4f}", psnr(out, clean), off]
                times = [f"{t[key]:.4g}" if key in t else "" for t in (predicted, took)]
                rows.writerow([name, patches, *key, *about, *times,
                               tables.spread(took[key]) if key in took else ""])  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
