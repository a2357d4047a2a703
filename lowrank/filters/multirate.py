"""Gaussian filters whose time does not depend on sigma: few samples are filtered.

A Gaussian is the result of three: one of a small sigma, of which every `rate`-th sample is kept,
one on these samples, and one of the small sigma that interpolates between them.  Frequencies that
alias when samples are dropped pass both small Gaussians: their sigma and number of taps set the
error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Array
from lowrank.engine.machine import fork_join_seconds
from lowrank.filters.request import Call

#: Small Gaussians in samples that are kept: their sigma and their radius.  Errors of 1e-5 to 2e-5:
#: sigma 0.7 with radius 3 gives 1e-4 to 4e-4, sigma 1 with radius 5 gives 1e-6.
SMALL_SIGMA, RADIUS = 0.85, 4
MIDDLE_RADIUS = 5.0  # in standard deviations of the Gaussian on the samples that are kept
#: Samples of which one is kept, at most, and their number per sigma, at least: a larger rate would
#: save little, since the first and the last pass take the most time.
MAX_RATE, SAMPLES_PER_SIGMA = 16, 3
LEAST_SIGMA = 2.0 * SAMPLES_PER_SIGMA
#: Taps of all passes from which it is faster than sums of products, on 512^2 to 2048^2.
LEAST_TAPS = 130
SIZE = 1 << 16  # samples from which it is
SECONDS = 2e-9  # per sample in float32, of one thread
SHAPE_ERROR = 1e-5  # of taps, relative to the largest: others are not tried


class Resampling(NamedTuple):
    """Weighted sums along one axis: outputs from positions of a padded line."""

    starts: list[int]
    lists: list[int]
    weights: Array  # (lists, taps)
    before: int  # samples ahead of the line


class Gaussian(NamedTuple):
    """A Gaussian along one axis as three resamplings."""

    rate: int
    small: Array  # taps of the first one
    middle: Array  # taps on the samples that are kept
    between: Array  # (rate, taps): those of the interpolation, by phase
    total: float  # sum of the taps that it stands for
    error: float  # relative norm of its largest deviation from them, over all phases

    def down(self, n: int) -> Resampling:
        """Return the filter that keeps one of `rate` samples, beyond the ends of the line too."""
        radius, kept = len(self.small) // 2, len(self.middle) // 2
        taps = self.between.shape[1]
        first, last = 1 - taps // 2 - kept, (n - 1) // self.rate + taps // 2 + kept
        before = radius - first * self.rate
        starts = [i * self.rate for i in range(last - first + 1)]
        return Resampling(starts, [0] * len(starts), self.small[None] * self.total, before)

    def across(self, n: int) -> Resampling:
        """Return the filter of the n samples that were kept, without those beyond its reach."""
        starts = list(range(n - len(self.middle) + 1))
        return Resampling(starts, [0] * len(starts), self.middle[None], 0)

    def up(self, n: int) -> Resampling:
        """Return the interpolation of n samples."""
        starts = [i // self.rate for i in range(n)]
        return Resampling(starts, [i % self.rate for i in range(n)], self.between, 0)


def gaussian_sigma(taps: Array) -> float | None:
    """Return the standard deviation of taps that are a sampled Gaussian, or None.

    Parameters
    ----------
    taps : ndarray
        Vector.

    Returns
    -------
    float or None
        None as well for fewer than 3 taps or an even number.

    Examples
    --------
    >>> from lowrank import filters
    >>> from lowrank.filters.multirate import gaussian_sigma
    >>> round(gaussian_sigma(filters.gauss(20.0).factors[0]), 9)
    20.0
    """
    radius = len(taps) // 2
    peak, end = float(taps[radius]), float(taps[0])
    if radius == 0 or len(taps) % 2 == 0 or not 0 < end / (peak or 1.0) < 1:
        return None
    sigma = radius / math.sqrt(2 * math.log(peak / end))
    error = np.abs(taps / peak - _gaussian(np.arange(-radius, radius + 1), sigma)).max()
    return sigma if error <= SHAPE_ERROR else None


@functools.lru_cache(64)
def fit(key: bytes) -> Gaussian | None:
    """Return the resamplings that stand for the taps of a Gaussian, or None.

    Parameters
    ----------
    key : bytes
        Taps in float64.

    Returns
    -------
    Gaussian or None
        None for taps that are not Gaussian, or of a `sigma` below `LEAST_SIGMA`.
    """
    taps = np.frombuffer(key)
    sigma = gaussian_sigma(taps)
    if sigma is None or sigma < LEAST_SIGMA:
        return None
    rate = min(MAX_RATE, int(sigma / SAMPLES_PER_SIGMA))
    reach = RADIUS * rate
    at = np.arange(-reach, reach + 1)
    small = _gaussian(at, SMALL_SIGMA * rate)
    small /= small.sum()
    kept = np.arange(1 - RADIUS, RADIUS + 1) * rate  # around a phase
    distance = kept - np.arange(rate)[:, None]
    between = _gaussian(distance, SMALL_SIGMA * rate)
    between /= between.sum(1, keepdims=True)
    mean = (between * distance).sum(1)
    spread = float(((between * distance**2).sum(1) - mean**2).mean())
    middle_sigma = math.sqrt(sigma**2 - float(small @ at**2) - spread) / rate
    radius = math.ceil(MIDDLE_RADIUS * middle_sigma)
    middle = _gaussian(np.arange(-radius, radius + 1), middle_sigma)
    middle /= middle.sum()
    found = Gaussian(rate, small, middle, between, float(taps.sum()), 0.0)
    return found._replace(error=_largest_error(found, taps))


def _gaussian(x: Array, sigma: float) -> Array:
    return np.exp(-0.5 * (x / sigma) ** 2)


def _largest_error(g: Gaussian, taps: Array) -> float:
    """Return the relative error of the taps of an output, the largest of all phases."""
    reach, radius = len(g.small) // 2, len(g.middle) // 2
    half = max(len(taps) // 2, (radius + RADIUS) * g.rate + reach) + g.rate
    worst = 0.0
    for phase, between in enumerate(g.between):
        kernel = np.zeros(2 * half + 1)
        kept = np.convolve(between, g.middle)
        for k, weight in enumerate(kept, 1 - RADIUS - radius):
            first = half + k * g.rate - reach
            kernel[first : first + len(g.small)] += g.total * weight * g.small
        first = half + phase - len(taps) // 2
        kernel[first : first + len(taps)] -= taps
        worst = max(worst, float(np.linalg.norm(kernel)))
    return worst / float(np.linalg.norm(taps))


def kernel_error(factors: Sequence[Array]) -> float | None:
    """Return the relative Frobenius error of a Gaussian outer product by resampling, or None.

    Parameters
    ----------
    factors : sequence of ndarray
        One vector per axis; those with one tap are exact.

    Returns
    -------
    float or None
        Upper bound for the taps of every output: errors of the vectors add up.  None if a vector is
        not Gaussian or its sigma below `LEAST_SIGMA`.

    Examples
    --------
    >>> from lowrank import filters
    >>> from lowrank.filters.multirate import kernel_error
    >>> kernel_error(filters.gauss(50.0).factors) < 3e-4  # Gaussians truncated at 4 sigma
    True
    >>> kernel_error(filters.gauss(50.0, truncate=6.0).factors) < 5e-5
    True
    """
    gaussians = [fit(f.tobytes()) for f in factors if len(f) > 1]
    if not gaussians or None in gaussians:
        return None
    return math.prod(1 + g.error for g in gaussians if g is not None) - 1


def filter_gaussian(
    x: Array,
    factors: Sequence[Array],
    axes: Sequence[int],
    origins: Sequence[int],
    border: str,
    cval: float,
    threads: int | None = None,
) -> Array:
    """Return an image filtered by a Gaussian outer product.

    Parameters
    ----------
    x : ndarray
        Image in float32 or float64.
    factors : sequence of ndarray
        One vector per axis, of which :func:`kernel_error` is not None.
    axes, origins : sequence of int
        Axis of each vector, and its shift.
    border : str
        Padding mode.
    cval : float
        Border value of "constant".
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray
        C-contiguous.
    """
    passes, scale = [], 1.0
    for axis, origin, f in sorted(zip(axes, origins, factors), key=lambda p: p[0]):
        g = fit(f.tobytes())
        if g is None:
            scale *= float(f[0])
        else:
            passes.append((axis, g, origin))
    sizes = [x.shape[axis] for axis, *_ in passes]
    for axis, g, origin in passes:
        down = g.down(x.shape[axis])
        shifted = down._replace(before=down.before + origin)
        x = _resample(x, axis, shifted, border, cval, threads)
        cval *= g.total
    for axis, g, *_ in passes:
        x = _resample(x, axis, g.across(x.shape[axis]), "replicate", 0.0, threads)
    for (axis, g, *_), n in reversed(list(zip(passes, sizes))):
        x = _resample(x, axis, g.up(n), "replicate", 0.0, threads)
    return x if scale == 1 else x * x.dtype.type(scale)


def _resample(
    x: Array, axis: int, r: Resampling, border: str, fill: float, threads: int | None
) -> Array:
    """Apply weighted sums along one axis."""
    x = np.ascontiguousarray(x)
    n, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    out = np.empty((*x.shape[:axis], len(r.starts), *x.shape[axis + 1 :]), x.dtype)
    _core.resample(
        x, out, x.dtype.name, (x.size // (n * inner), n, inner), r.starts, r.lists,
        r.weights.astype(x.dtype), r.before, border, fill, threads=threads or 0,
        seconds=SECONDS * max(x.size, out.size) / 3,
        fork_join=0.0 if threads == 1 else fork_join_seconds(),
    )  # fmt: skip
    return out


def is_chosen(image: Array, kernel: Any, call: Call) -> bool:
    """Return whether resampling is asked for, or admitted by the tolerance and faster.

    Parameters
    ----------
    image : ndarray
        Image of any real dtype.
    kernel : OuterProduct or None
        Kernel; None if it is no outer product.
    call : Call
        Arguments of :func:`lowrank.filters.correlate`, checked.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        If the method is asked for and the kernel is not Gaussian, or its error above the tolerance.
    """
    is_forced = call.method == "multirate"
    if not is_forced and (
        call.method != "auto" or call.rank is not None or not call.tolerance or kernel is None
        or sum(kernel.shape) < LEAST_TAPS or image.size < SIZE
    ):  # fmt: skip
        return False
    if call.rank is not None:
        raise ValueError(f"method must be auto or separable if rank is given, got {call.method!r}")
    error = None if kernel is None else kernel_error(kernel.factors)
    if error is not None and (call.tolerance is None or error <= call.tolerance):
        # Its taps reach further than those of the kernel.
        return is_forced or image.dtype.kind != "f" or bool(np.isfinite(image).all())
    if not is_forced:
        return False
    raise ValueError(
        f"method must not be multirate for this kernel: it needs a Gaussian of sigma "
        f"{LEAST_SIGMA:g} or more along every axis"
        if error is None
        else f"tolerance must be at least {error:.3g} for method multirate, got {call.tolerance:g}"
    )
