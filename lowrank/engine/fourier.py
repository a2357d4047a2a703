"""Correlation by fast Fourier transforms: for kernels that are large and of high rank.

A transform costs the same for any kernel of its size, so it needs no separable form.  Images
are cut into blocks that overlap by the kernel less one, and of every block the outputs that its
circular correlation did not wrap around are kept: overlap-save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import fft

from lowrank._kernels import _core
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core import reference
from lowrank.core.geometry import as_integers
from lowrank.engine import INTEGERS

GROUP = 2**18  # points transformed in one call: enough to hide the call, few for the caches
ALONE = 2**17  # samples, below which more threads cost more than they save
LEAST = 32  # outputs of a block along an axis, below which calls cost more than transforms


class Work(NamedTuple):
    """What filtering one image by transforms takes; see :func:`work`.

    Attributes
    ----------
    transforms : int
        Real transforms of a block, forwards and back.
    points : int
        Of one transform.
    bytes : int
        Read and written by all passes, at any level of the memory.
    groups : int
        Of blocks that are transformed in one call.

    Examples
    --------
    >>> from lowrank.engine import fourier
    >>> fourier.work((31, 31), (1024, 1024), (288, 288)).transforms
    32
    """

    transforms: int
    points: int
    bytes: int
    groups: int


def blocks(kernel_shape: Sequence[int], spatial: Sequence[int]) -> tuple[Ints, ...]:
    """Sizes of blocks that are worth a look: the whole image, halves, quarters and so on.

    Parameters
    ----------
    kernel_shape : sequence of int
        Taps an axis, of 1 to 3 axes.
    spatial : sequence of int
        Size of the image, in samples an axis.

    Returns
    -------
    tuple of tuple of int
        Every combination of sizes an axis, the largest first.  A size holds a part of the
        image and its halo, the taps less one, and has no prime factor above 5; the smallest
        is where halos would outweigh what is kept.

    Raises
    ------
    ValueError, TypeError
        If the two do not have the same 1 to 3 axes, or a size is below 1.

    Examples
    --------
    >>> from lowrank.engine import fourier
    >>> fourier.blocks([31], [1024])
    ((1080,), (576,), (288,), (160,), (96,), (64,))
    """
    return tuple(itertools.product(*map(_sizes, *_shapes(kernel_shape, spatial))))


def work(
    kernel_shape: Sequence[int],
    spatial: Sequence[int],
    block: Sequence[int],
    dtype: Any = np.float32,
) -> Work:
    """Transforms and memory traffic of filtering one image in blocks of one size.

    Parameters
    ----------
    kernel_shape : sequence of int
        Taps an axis, of 1 to 3 axes.
    spatial : sequence of int
        Size of the image, in samples an axis.
    block : sequence of int
        Size of a block, halo included: at least the taps.
    dtype : dtype
        float32 or float64, that it is computed in.

    Returns
    -------
    Work
        Operations grow as ``transforms * points * log2(points)``.

    Raises
    ------
    ValueError, TypeError
        If the three do not have the same 1 to 3 axes, or a block is smaller than the kernel.

    Examples
    --------
    >>> from lowrank.engine import fourier
    >>> fourier.work((31, 31), (1024, 1024), (1080, 1080))
    Work(transforms=2, points=1166400, bytes=55131008, groups=1)
    """
    taps, sizes = _shapes(kernel_shape, spatial)
    block = _block(block, taps)
    counts = [_cut_evenly(n, b - k + 1)[0] for n, b, k in zip(sizes, block, taps)]
    spectrum = 2 * math.prod(block[:-1]) * (block[-1] // 2 + 1)  # numbers
    passes = 2 * len(block) + 1  # one an axis each way, and the product
    numbers = math.prod(counts) * 2 * passes * spectrum + 2 * math.prod(sizes)
    points = math.prod(block)
    return Work(
        transforms=2 * math.prod(counts),
        points=points,
        bytes=numbers * np.dtype(dtype).itemsize,
        groups=math.prod(counts[:-1]) * -(-counts[-1] // _together(counts[-1], points)),
    )


def plan(
    kernel: Array,
    spatial: Sequence[int],
    dtype: Any = np.float32,
    before: Sequence[int] | None = None,
    mode: PaddingMode = "zeros",
    value: float = 0.0,
    threads: int | None = None,
    block: Sequence[int] | None = None,
) -> Plan:
    r"""Plan to filter images of one size; the kernel's transform is made here, once.

    Parameters
    ----------
    kernel : ndarray
        The filter, over 1, 2 or 3 axes.
    spatial : sequence of int
        Size of the images, in samples an axis; that of the results, too.
    dtype : dtype
        float32 or float64, that it is computed in.
    before : sequence of int, optional
        Samples of border ahead of each axis; half of the taps if not given.
    mode : str
        Border, as in :class:`lowrank.Geometry`.
    value : float
        The constant of mode ``"constant"``.
    threads : int, optional
        Threads to use; all that OpenMP offers if not given.
    block : sequence of int, optional
        Size of a transform along each axis, halo included: at least the taps.  If not given,
        the one of :func:`blocks` with the fewest operations.

    Returns
    -------
    Plan
        To be called with images.

    Raises
    ------
    ValueError, TypeError
        If an argument is not possible; the message says what is.

    Notes
    -----
    With :math:`F` the discrete Fourier transform of a block :math:`x` of N points,

    .. math:: y = F^{-1}(\overline{F k} \cdot F x)

    is the circular correlation, which is the filter's wherever it does not wrap around: at
    all but the last taps less one of an axis.  Rounding spreads evenly over a block,

    .. math:: \|y - \hat y\|_2 \le \epsilon \log_2 2 N \, \max |F k| \, \|x\|_2,

    as large as the block is bright on the whole, and not as a sample is.  NaN and infinities
    spread, too.

    References
    ----------
    .. [1] T. G. Stockham, "High-speed convolution and correlation", AFIPS Spring Joint Computer
       Conference, 1966.
    .. [2] N. J. Higham, "Accuracy and stability of numerical algorithms", 2nd ed., 2002,
       chapter 24.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.engine import fourier
    >>> from lowrank.filters import disk
    >>> run = fourier.plan(disk(9.5), (100, 120), np.float64, mode="replicate")
    >>> bool(np.allclose(run(np.ones((1, 1, 100, 120))), 1))
    True
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    taps, sizes = _shapes(kernel.shape, spatial)
    if block is None:
        block = min(blocks(taps, sizes), key=partial(_operations, taps, sizes))
    block = _block(block, taps)
    ahead = [t // 2 for t in taps] if before is None else before
    axes = tuple(_axis(n, t, b, a, mode) for n, t, b, a in zip(sizes, taps, block, ahead))
    if threads is None:
        threads = _core.max_threads()
    (threads,) = as_integers("threads", threads, 1)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    # In float64, so that only the images are rounded; blocks along the last axis lie side by side.
    spectrum = np.conj(fft.rfftn(kernel.astype(np.float64), block))
    spectrum = spectrum.astype(np.result_type(dtype, np.complex64))[..., None, :]
    return Plan(axes, spectrum, dtype, float(value), threads)


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """How an axis of an image is cut into blocks, and what stands around it."""

    size: int
    block: int  # samples of a transform
    valid: int  # outputs of a block
    count: int  # blocks
    before: int  # samples that the border adds ahead
    source: Array | None  # index of every sample of the framed axis; None: the constant

    def cut(self, x: Array, axis: int, first: int, many: int, value: np.floating[Any]) -> Array:
        """What so `many` blocks see along `axis`: a view of `x`, unless they see the border."""
        start = first * self.valid - self.before
        stop = start + (many - 1) * self.valid + self.block
        low, high = max(start, 0), min(stop, self.size)
        inside = x[(*(slice(None),) * axis, slice(low, high))]
        if (low, high) == (start, stop):
            return inside
        ahead, behind = (self._border(x, axis, *e, value) for e in ((start, low), (high, stop)))
        return np.concatenate((ahead, inside, behind), axis)

    def _border(self, x: Array, axis: int, start: int, stop: int, value: np.floating[Any]) -> Array:
        if self.source is None:
            return np.full((*x.shape[:axis], stop - start, *x.shape[axis + 1 :]), value)
        return x.take(self.source[start + self.before : stop + self.before], axis)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A filter planned for images of one size; safe to call from several threads.

    Made by :func:`plan`.  Results do not depend on the number of threads.

    Attributes
    ----------
    axes : tuple
        How each axis of the images is cut into blocks.
    spectrum : ndarray
        The kernel's transform.
    dtype : dtype
        That it is computed in.
    value : float
        The constant around images.
    threads : int
        That share the blocks.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.engine import fourier
    >>> run = fourier.plan(np.ones(3), [5], np.float64)
    >>> run(np.ones((1, 1, 5))).round(9)
    array([[[2., 3., 3., 3., 2.]]])
    """

    axes: tuple[_Axis, ...]
    spectrum: Array
    dtype: np.dtype[Any]
    value: float
    threads: int

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Filter `x`, (batch, 1, *spatial), into `out`, which must not overlap it.

        Both are of the plan's dtype or 8- or 16-bit integers, which results are rounded to.
        """
        out = self._checked(x, out)
        jobs = self._jobs(len(x))
        threads = self.threads if x.size >= ALONE else 1
        team = min(threads, len(jobs))
        run = partial(self._run, x[:, 0], out[:, 0], threads // max(team, 1))
        if team > 1:
            with ThreadPoolExecutor(team) as pool:
                list(pool.map(run, jobs))
        else:
            for job in jobs:
                run(job)
        return out

    def _checked(self, x: Array, out: Array | None) -> Array:
        spatial = [a.size for a in self.axes]
        types = (self.dtype, *INTEGERS)
        out = np.empty(np.shape(x), self.dtype) if out is None else out
        for name, array in (("x", x), ("out", out)):
            if not isinstance(array, np.ndarray) or array.dtype not in types:
                raise TypeError(
                    f"{name} must be an array of {self.dtype}, or of 8- or 16-bit integers, got "
                    f"{getattr(array, 'dtype', None) or type(array).__qualname__}"
                )
            if array.shape != (*x.shape[:1], 1, *spatial):
                raise ValueError(
                    f"{name} must have shape (batch, 1, {', '.join(map(str, spatial))}), with the "
                    f"same batch for both, got {array.shape}"
                )
        return out

    def _jobs(self, batch: int) -> list[tuple[slice, Ints, int]]:
        """(images, first block along each axis, blocks along the last axis), whatever the team."""
        points = math.prod(a.block for a in self.axes)
        *leading, last = self.axes
        many = _together(last.count, points)
        images = max(GROUP // (points * many), 1) if many == last.count else 1
        return [
            (slice(i, i + images), (*lead, j), min(many, last.count - j))
            for i in range(0, batch, images)
            for lead in itertools.product(*(range(a.count) for a in leading))
            for j in range(0, last.count, many)
        ]

    def _run(self, x: Array, out: Array, workers: int, job: tuple[slice, Ints, int]) -> None:
        """Filter a group of blocks that lie side by side along the last axis."""
        images, first, many = job
        x, out = x[images], out[images]
        last = self.axes[-1]
        value = self.dtype.type(self.value)
        for i, axis in enumerate(self.axes, 1):
            each = many if axis is last else 1
            x = axis.cut(x, i, first[i - 1], each, value)
            start = first[i - 1] * axis.valid
            out = out[(*(slice(None),) * i, slice(start, start + each * axis.valid))]
        x = x.astype(self.dtype, copy=False)
        side_by_side = sliding_window_view(x, last.block, axis=-1)[..., :: last.valid, :]
        along = range(1, len(self.axes))
        f = fft.rfftn(side_by_side, axes=(*along, -1), workers=workers)
        f *= self.spectrum
        for i in along:  # an axis at a time: the next ones need only what is kept of it
            f = fft.ifft(f, axis=i, overwrite_x=True, workers=workers)
            f = f[(*(slice(None),) * i, slice(out.shape[i]))]
        y = fft.irfft(f, last.block, overwrite_x=True, workers=workers)
        if out.dtype != y.dtype:
            y = reference.saturate(y, out.dtype)
        whole, rest = divmod(out.shape[-1], last.valid)
        shape = (*out.shape[:-1], whole, last.valid)
        out[..., : whole * last.valid].reshape(shape)[...] = y[..., :whole, : last.valid]
        if rest:
            out[..., whole * last.valid :] = y[..., whole, :rest]


def _shapes(kernel_shape: Sequence[int], spatial: Sequence[int]) -> tuple[Ints, Ints]:
    n = len(kernel_shape)
    taps, sizes = as_integers("kernel_shape", kernel_shape, n), as_integers("spatial", spatial, n)
    if n not in (1, 2, 3) or min(*taps, *sizes) < 1:
        raise ValueError(
            f"kernel_shape and spatial must be 1 to 3 sizes of at least 1, got {taps} and {sizes}"
        )
    return taps, sizes


def _block(block: Sequence[int], taps: Ints) -> Ints:
    block = as_integers("block", block, len(taps))
    if any(b < k for b, k in zip(block, taps)):
        raise ValueError(f"block must be at least the kernel's {taps} along each axis, got {block}")
    return block


def _sizes(taps: int, size: int) -> list[int]:
    """Sizes of blocks along one axis, the largest first."""
    found = []
    parts = 1
    while parts == 1 or -(-size // parts) >= max(taps, LEAST):
        found.append(int(fft.next_fast_len(-(-size // parts) + taps - 1, real=True)))
        parts *= 2
    return found


def _cut_evenly(size: int, most: int) -> tuple[int, int]:
    """Blocks along an axis, and what each gives: alike, so that threads finish together."""
    count = -(-size // most)
    return count, -(-size // count)


def _together(count: int, points: int) -> int:
    """Blocks along the last axis that are transformed in one call."""
    return _cut_evenly(count, max(GROUP // points, 1))[1]


def _operations(taps: Ints, sizes: Ints, block: Ints) -> float:
    transforms, points, *_ = work(taps, sizes, block)
    return transforms * points * math.log2(points)


def _axis(size: int, taps: int, block: int, before: int, mode: str) -> _Axis:
    count, valid = _cut_evenly(size, block - taps + 1)
    source = None
    if mode not in ("zeros", "constant"):
        # The last block may see more than the kernel does: the border goes on.
        after = (count - 1) * valid + block - before - size
        line = np.arange(size)[None, None]
        source = reference.pad(line, ((before, max(after, 0)),), mode, None)[0, 0]
    return _Axis(size, block, valid, count, before, source)
