"""Filters to time beside the same work of OpenCV, SciPy and scikit-image, one row per comparison.

Times are medians of interleaved calls.  `filter_targets` prints the rows with their targets.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage as scipy_ndimage

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import filters
from lowrank.filters import multirate

RNG = np.random.default_rng(0)
PLANNING_SECONDS = 5e-3  # largest time of a plan for an outer product
FIRST_SIZES = {2: (3, 31, 101, 321), 3: (3, 31, 121)}  # taps along each axis, by number of axes
FIRST_SHAPES = {2: (1024, 1024), 3: (128, 128, 128)}
CROPS = tuple(np.linspace(24, 96, 40).astype(int))
TAPS = tuple(range(3, 32, 4))
SIDES = 512, 1024, 2048, 4096
BOXES = 3, 5, 9, 15, 31, 101, 201
BOX_SHAPES = (512, 512), (2048, 2048), (4096, 4096), (512, 512, 3), (2048, 2048, 3)
UNIFORM_SHAPES = (512, 512), (128, 128, 128)
SIGMAS = 5.0, 10.0, 20.0, 50.0, 100.0
FLAT_SIGMA = 20.0  # from here on the time of a Gaussian should not grow
VOLUME = 128, 128, 128
SCALES = 1.0, 2.0


class Row(NamedTuple):
    """One comparison.

    Attributes
    ----------
    target : str
        Name of the target that the row counts for; empty if none.
    work : str
        What is computed.
    threads : int
        Number of threads.
    ours : float
        Seconds of this library per call, or bytes.
    peer : str
        Library or limit on the other side.
    theirs : float
        The peer's seconds or bytes.
    unit : str
        ``"s"`` or ``"B"``.
    """

    target: str
    work: str
    threads: int
    ours: float
    peer: str
    theirs: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """Peer's seconds or bytes over those of this library."""
        return self.theirs / self.ours

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.unit == "s" else (1e-6, "MB")
        sides = f"{self.ours * scale:10.3f} {unit}{self.theirs * scale:10.3f} {unit}"
        threads = count_threads(self.threads)
        return f"{self.work:60} {threads:10}{self.peer:22}{sides}{self.ratio:8.2f}x"


def count_threads(threads: int) -> str:
    """Return a number of threads with its unit."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _noise(shape: Sequence[int], dtype: Any) -> Any:
    return (RNG.random(shape) * 255).astype(dtype)


class Classical(NamedTuple):
    """A separable classical kernel with SciPy's function for it.

    Attributes
    ----------
    make : callable
        Maps a factor near 1, which no earlier kernel had, to a kernel that is in no cache.
    scipy : callable
        Filter an array.
    """

    make: Callable[[float], Any]
    scipy: Callable[[Any], Any]


def classical_kernels(taps: int, ndim: int) -> dict[str, Classical]:
    """Return separable classical kernels by name: of `taps` samples, and Sobel for three."""
    sigma = (taps - 1) / 8  # 4 sigma to each side
    kernels = {
        "gauss": Classical(
            lambda f: filters.gauss(sigma * f, ndim=ndim),
            functools.partial(scipy_ndimage.gaussian_filter, sigma=sigma),
        ),
        "box": Classical(
            lambda f: filters.OuterProduct([np.full(taps, f / taps)] * ndim),
            functools.partial(scipy_ndimage.uniform_filter, size=taps),
        ),
    }
    if taps == 3:
        kernels["sobel"] = Classical(
            lambda f: f * np.asarray(filters.sobel(ndim=ndim)), scipy_ndimage.sobel
        )
    return kernels


def first_rows(
    sizes: dict[int, tuple[int, ...]] = FIRST_SIZES,
    shapes: dict[int, tuple[int, ...]] = FIRST_SHAPES,
    repeats: int = 5,
) -> Iterator[Row]:
    """Measure first calls of separable classical kernels on one thread: plan, time and memory.

    Every first call has another kernel of the same form, so that nothing is in a cache.  The time
    of its plan is the difference to the next call, each the fastest of all.  `plan_filter`, which
    compares all methods, has no target.
    """
    for ndim, lengths in sizes.items():
        x = RNG.random(shapes[ndim], np.float32)
        for taps in lengths:
            for name, kernel in classical_kernels(taps, ndim).items():
                times: list[list[float]] = [[], [], [], []]
                for index in range(repeats + 1):  # the first is the warm call
                    fresh = kernel.make(1 - 1e-6 * (index + 1))
                    ours = functools.partial(filters.correlate, x, fresh, threads=1)
                    calls: list[Callable[[], object]] = [
                        ours,
                        ours,
                        functools.partial(kernel.scipy, x),
                        functools.partial(filters.plan_filter, fresh, x.shape, threads=1),
                    ]
                    for call, seconds in zip(calls, times):
                        start = time.perf_counter()
                        call()
                        seconds.append(time.perf_counter() - start)
                first, later, theirs, table = (np.array(t[1:]) for t in times)
                plan = max(float(first.min() - later.min()), 1e-6)
                work = f"{name} {_size([taps] * ndim)} on {_size(x.shape)}"
                limit = PLANNING_SECONDS
                yield Row("first call: plan", work, 1, plan, "limit", limit)
                yield Row("", f"plan_filter, {work}", 1, float(np.median(table)), "limit", limit)
                yield Row(
                    "first call: time", work, 1, float(np.median(first)), "SciPy",
                    float(np.median(theirs)),
                )  # fmt: skip
                allowed = 8 * taps**ndim + 2 * x.nbytes
                used = first_call_bytes(name, taps, x.shape)
                yield Row(
                    "first call: memory", work, 1, used, "kernel, image, output", allowed, "B"
                )


FIRST_CALL = """
import sys
import numpy as np
from asv_benchmarks.filter_work import classical_kernels
from lowrank import filters

def kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

taps, *shape = map(int, sys.argv[2:])
x = np.ones(shape, np.float32)
kernel = classical_kernels(taps, len(shape))[sys.argv[1]].make(1.0)
filters.correlate(x[:8, :8], filters.box(3, ndim=len(shape)), threads=1)  # imports
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is now what is in use
before = kib("VmRSS")
filters.correlate(x, kernel, threads=1)
print(kib("VmHWM") - before)
"""


def first_call_bytes(name: str, taps: int, shape: Sequence[int]) -> int:
    """Return the growth of the memory of a new process by its first call, output included.

    Linux alone counts it, by pages.
    """
    command = [sys.executable, "-c", FIRST_CALL, name, str(taps), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(1024 * int(done.stdout), mmap.PAGESIZE)


def crop_rows(sides: Sequence[int] = CROPS, seconds: float = 0.5) -> Iterator[Row]:
    """Measure passes over crops of different sizes on one thread: the first, and later ones."""
    import cv2

    cv2.setNumThreads(1)
    crops = [RNG.random((side, side), np.float32) for side in sides]
    disk = np.asarray(filters.disk(9.5))
    sobel = np.asarray(filters.sobel())
    work: dict[str, tuple[Callable[[float], Any], dict[str, Callable[[Any], Any]]]] = {
        "sobel": (lambda f: f * sobel, {"SciPy": scipy_ndimage.sobel}),
        "gauss(1.5)": (
            lambda f: filters.gauss(1.5 * f),
            {
                "SciPy": functools.partial(scipy_ndimage.gaussian_filter, sigma=1.5),
                "OpenCV": lambda x: cv2.GaussianBlur(x, (13, 13), 1.5),
            },
        ),
        "disk(9.5)": (
            lambda f: f * disk,
            {"SciPy": functools.partial(scipy_ndimage.correlate, weights=disk)},
        ),
    }

    def run(call: Callable[[Any], Any]) -> None:
        for crop in crops:
            call(crop)

    for name, (make, peers) in work.items():
        fresh = (make(1 - 1e-9 * i) for i in itertools.count(1))

        def first(fresh: Iterator[Any] = fresh) -> None:
            kernel = next(fresh)
            run(lambda x: filters.correlate(x, kernel, threads=1))

        later = functools.partial(
            run, functools.partial(filters.correlate, kernel=make(1.0), threads=1)
        )
        calls = [first, later, *(functools.partial(run, peer) for peer in peers.values())]
        first_time, later_time, *times = measure_seconds(calls, seconds)
        for peer, theirs in zip(peers, times):
            for which, ours in (("first pass", first_time), ("later passes", later_time)):
                text = f"{name}, {len(crops)} crops, {which}"
                yield Row(f"crops: {peer}", text, 1, ours, peer, theirs)


def outer_product_rows(
    threads: int,
    dtypes: Sequence[str] = ("float32", "uint8"),
    sides: Sequence[int] = SIDES,
    taps: Sequence[int] = TAPS,
    seconds: float = 0.3,
) -> Iterator[Row]:
    """Measure Gaussian outer products against the faster of two functions of OpenCV.

    float32 images are grey, uint8 images also have three colours.  Outputs are given.
    """
    import cv2

    cv2.setNumThreads(threads)
    for dtype in dtypes:
        for side in sides:
            for colours in ((), (3,)) if dtype == "uint8" else ((),):
                x = _noise((side, side, *colours), dtype)
                ours, theirs = np.empty_like(x), np.empty_like(x)
                for length in taps:
                    sigma = 0.3 * ((length - 1) * 0.5 - 1) + 0.8  # OpenCV's default
                    line = cv2.getGaussianKernel(length, sigma).ravel()
                    line32 = line.astype(np.float32)
                    kernel = filters.OuterProduct([line, line])
                    calls: list[Callable[[], object]] = [
                        functools.partial(
                            filters.correlate, x, kernel, mode="mirror", out=ours, threads=threads
                        ),
                        functools.partial(cv2.sepFilter2D, x, -1, line32, line32, dst=theirs),
                        functools.partial(cv2.GaussianBlur, x, (length, length), sigma, dst=theirs),
                    ]
                    found, *peers = measure_seconds(calls, seconds, rewarm=True)
                    name = ("sepFilter2D", "GaussianBlur")[int(np.argmin(peers))]
                    work = f"{length} taps, {_size(x.shape)} {dtype}"
                    yield Row(f"{dtype} outer products", work, threads, found, name, min(peers))


def box_rows(
    threads: int,
    shapes: Sequence[tuple[int, ...]] = BOX_SHAPES,
    sizes: Sequence[int] = BOXES,
    seconds: float = 0.3,
) -> Iterator[Row]:
    """Measure boxes against OpenCV; results are allocated."""
    import cv2

    cv2.setNumThreads(threads)
    for dtype in ("uint8", "float32"):
        for shape in shapes:
            x = _noise(shape, dtype)
            for size in sizes:
                ours = functools.partial(filters.correlate, x, filters.box(size), threads=threads)
                theirs = functools.partial(cv2.blur, x, (size, size))
                times = measure_seconds([ours, theirs], seconds)
                work = f"box {size}, {_size(shape)} {dtype}"
                yield Row("boxes", work, threads, times[0], "cv2.blur", times[1])


def uniform_rows(
    shapes: Sequence[tuple[int, ...]] = UNIFORM_SHAPES,
    sizes: Sequence[int] = BOXES[:-1],
    seconds: float = 0.3,
) -> Iterator[Row]:
    """Measure boxes against SciPy on one thread; results are allocated."""
    for dtype in ("float32", "float64", "uint8"):
        for shape in shapes:
            x = _noise(shape, dtype)
            for size in sizes:
                kernel = filters.box(size, ndim=len(shape))
                ours = functools.partial(filters.correlate, x, kernel, threads=1)
                theirs = functools.partial(scipy_ndimage.uniform_filter, x, size)
                times = measure_seconds([ours, theirs], seconds)
                work = f"box {size}, {_size(shape)} {dtype}"
                yield Row("boxes", work, 1, times[0], "SciPy", times[1])


def gaussian_rows(
    threads: int,
    shape: tuple[int, int] = (2048, 2048),
    sigmas: Sequence[float] = SIGMAS,
    seconds: float = 3.0,
) -> Iterator[Row]:
    """Measure Gaussians that a tolerance of 0.001 admits, with the error of their kernels.

    The peer is the fastest Gaussian from sigma 20 on.
    """
    x = RNG.random(shape, np.float32)
    kernels = [filters.gauss(sigma) for sigma in sigmas]
    calls = [
        functools.partial(filters.correlate, x, k, tolerance=1e-3, threads=threads) for k in kernels
    ]
    times = measure_seconds(calls, seconds)
    fastest = min(t for t, sigma in zip(times, sigmas) if sigma >= FLAT_SIGMA)
    for sigma, kernel, ours in zip(sigmas, kernels, times):
        error = multirate.kernel_error(kernel.factors) or 0.0  # exact below the method's sigma
        work = f"gauss {sigma:g}, {_size(shape)}, error {error:.1e}"
        target = "Gaussians" if sigma >= FLAT_SIGMA else ""
        yield Row(target, work, threads, ours, f"fastest from sigma {FLAT_SIGMA:g}", fastest)


def tensor_rows(
    threads: int,
    shape: tuple[int, int, int] = VOLUME,
    scales: Sequence[float] = SCALES,
    seconds: float = 5.0,
) -> Iterator[Row]:
    """Measure the Hessian and the structure tensor of a volume against scikit-image.

    scikit-image has two Hessians: by derivatives of Gaussians, as here, and by differences, its
    present default.  Its structure tensor has Sobel differences in the place of derivatives at
    scale 1.  It runs on one thread.
    """
    from skimage import feature

    x = RNG.random(shape, np.float32)
    target = f"Hessian, structure tensor: {count_threads(threads)}"
    for sigma in scales:
        hessian = functools.partial(filters.hessian, x, sigma, threads=threads)
        exact, by_differences = (
            functools.partial(feature.hessian_matrix, x, sigma, use_gaussian_derivatives=is_exact)
            for is_exact in (True, False)
        )
        tensor = functools.partial(filters.structure_tensor, x, 1.0, sigma, threads=threads)
        for work, ours, peer, theirs in (
            ("Hessian, sigma", hessian, "skimage, Gaussians", exact),
            ("Hessian, sigma", hessian, "skimage, differences", by_differences),
            (
                "structure tensor, rho",
                tensor,
                "skimage",
                functools.partial(feature.structure_tensor, x, sigma),
            ),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-image announces another default
                times = measure_seconds([ours, theirs], seconds)
            text = f"{work} {sigma:g}, {_size(shape)}"
            yield Row(target, text, threads, times[0], peer, times[1])
