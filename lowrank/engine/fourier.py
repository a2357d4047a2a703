"""Correlation by fast Fourier transforms, for large kernels of high rank.

The cost does not depend on the kernel's rank.  Images are cut into overlapping blocks, and the
outputs of each block's circular correlation that do not wrap around are kept: overlap-save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lowrank._kernels import _core
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core import reference
from lowrank.core.geometry import as_integers
from lowrank.core.threads import as_threads
from lowrank.engine import INTEGERS

GROUP_POINTS = 2**18  # per call: enough to hide its overhead, few enough for the caches
MIN_PARALLEL_SAMPLES = 2**17  # below which more threads cost more than they save
PLAIN = 2.0**40  # largest tap, and its inverse, whose transform is not scaled
MIN_BLOCK_OUTPUTS = 32  # along an axis, below which calls cost more than transforms


class FourierWork(NamedTuple):
    """Transforms and memory traffic of filtering one image; see :func:`work`.

    Attributes
    ----------
    transforms : int
        Number of real transforms of a block, forward and inverse.
    points : int
        Points per transform.
    bytes : int
        Bytes read and written by all passes, at any level of the memory.
    groups : int
        Number of groups of blocks that one call transforms.

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
    """Return candidate sizes of blocks: for the whole image, halves, quarters and so on.

    Parameters
    ----------
    kernel_shape : sequence of int
        Taps along each of 1 to 3 axes.
    spatial : sequence of int
        Samples of the image along each axis.

    Returns
    -------
    tuple of tuple of int
        Combinations of sizes per axis, the largest first.  A size holds a part of the image
        and its halo (taps - 1), and has no prime factor above 5; below the smallest, halos
        would outweigh the outputs.

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
) -> FourierWork:
    """Count the transforms and memory traffic of filtering one image in blocks of one size.

    Parameters
    ----------
    kernel_shape : sequence of int
        Taps along each of 1 to 3 axes.
    spatial : sequence of int
        Samples of the image along each axis.
    block : sequence of int
        Size of a block, halo included: at least the taps.
    dtype : dtype
        Precision of the computation: float32 or float64.

    Returns
    -------
    FourierWork
        Counts; operations grow as ``transforms * points * log2(points)``.

    Raises
    ------
    ValueError, TypeError
        If the three do not have the same 1 to 3 axes, or a block is smaller than the kernel.

    Examples
    --------
    >>> from lowrank.engine import fourier
    >>> fourier.work((31, 31), (1024, 1024), (1080, 1080))
    FourierWork(transforms=2, points=1166400, bytes=55131008, groups=1)
    """
    taps, sizes = _shapes(kernel_shape, spatial)
    block = _block(block, taps)
    counts = [_split_evenly(n, b - k + 1)[0] for n, b, k in zip(sizes, block, taps)]
    spectrum = 2 * math.prod(block[:-1]) * (block[-1] // 2 + 1)  # real values
    passes = 2 * len(block) + 1  # one per axis each way, and the product
    values = math.prod(counts) * 2 * passes * spectrum + 2 * math.prod(sizes)
    points = math.prod(block)
    return FourierWork(
        transforms=2 * math.prod(counts),
        points=points,
        bytes=values * np.dtype(dtype).itemsize,
        groups=math.prod(counts[:-1]) * -(-counts[-1] // _blocks_per_group(counts[-1], points)),
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
) -> FourierPlan:
    r"""Plan the filtering of images of one size; transforms the kernel once.

    Parameters
    ----------
    kernel : ndarray
        The filter, over 1, 2 or 3 axes.
    spatial : sequence of int
        Samples of images and results along each axis.
    dtype : dtype
        Precision of the computation: float32 or float64.
    before : sequence of int, optional
        Padding ahead of each axis; default: half of the taps.
    mode : str
        Padding mode, as in :class:`lowrank.Geometry`.
    value : float
        Border value of mode ``"constant"``.
    threads : int, optional
        Number of threads; default: all that OpenMP offers.
    block : sequence of int, optional
        Size of a transform along each axis, halo included: at least the taps.  Default: the
        one of :func:`blocks` with the fewest operations.

    Returns
    -------
    FourierPlan
        Callable that filters images.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type or value.

    Notes
    -----
    With :math:`F` the discrete Fourier transform of a block :math:`x` of N points,

    .. math:: y = F^{-1}(\overline{F k} \cdot F x)

    is the circular correlation, which equals the filter's output wherever it does not wrap
    around: at all but the last taps - 1 outputs of an axis.  The rounding error spreads evenly
    over a block,

    .. math:: \|y - \hat y\|_2 \le \epsilon \log_2 2 N \, \max |F k| \, \|x\|_2,

    in proportion to the norm of the block, not to a single sample.  NaN and infinities also
    spread over a block.

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
    before = [t // 2 for t in taps] if before is None else before
    axes = tuple(_axis(n, t, b, a, mode) for n, t, b, a in zip(sizes, taps, block, before))
    threads = as_threads(threads) or _core.max_threads()
    # In float64, so that only the images are rounded; the new axis is that of blocks in a group.
    taps_in_double = kernel.astype(np.float64)
    peak = float(np.abs(taps_in_double).max())
    scale = 1.0 if peak == 0 or 1 / PLAIN <= peak <= PLAIN else 2.0 ** (math.frexp(peak)[1] - 1)
    spectrum = np.conj(_scipy_fft().rfftn(taps_in_double / scale, block))
    spectrum = spectrum.astype(np.result_type(dtype, np.complex64))[..., None, :]
    return FourierPlan(axes, spectrum, dtype, float(value), threads, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """Blocks and padding along one axis of an image."""

    size: int
    block: int  # samples per transform
    valid: int  # outputs per block
    count: int  # number of blocks
    before: int  # padding ahead
    padded_indices: Array | None  # sample at each padded position; None: the border value

    def read(self, x: Array, axis: int, first: int, count: int, value: np.floating[Any]) -> Array:
        """Return the input of `count` blocks along `axis`: a view of `x` unless padded."""
        start = first * self.valid - self.before
        stop = start + (count - 1) * self.valid + self.block
        low, high = max(start, 0), min(stop, self.size)
        inside = x[(*(slice(None),) * axis, slice(low, high))]
        if (low, high) == (start, stop):
            return inside
        before, after = (self._pad(x, axis, *r, value) for r in ((start, low), (high, stop)))
        return np.concatenate((before, inside, after), axis)

    def _pad(self, x: Array, axis: int, start: int, stop: int, value: np.floating[Any]) -> Array:
        if self.padded_indices is None:
            return np.full((*x.shape[:axis], stop - start, *x.shape[axis + 1 :]), value)
        return x.take(self.padded_indices[start + self.before : stop + self.before], axis)


@dataclass(frozen=True, slots=True, eq=False)
class FourierPlan:
    """A filter planned for images of one size; safe to call from several threads.

    :func:`plan` returns it.  Results do not depend on the number of threads.

    Attributes
    ----------
    axes : tuple
        Blocks and padding along each axis.
    spectrum : ndarray
        Transform of the kernel.
    dtype : dtype
        Precision of the computation.
    value : float
        Border value.
    threads : int
        Number of threads.
    scale : float
        Power of two by which the kernel was divided.

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
    scale: float = 1.0

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Filter `x`, (batch, 1, *spatial), into `out`, which must not overlap it.

        Both have the plan's dtype or 8- or 16-bit integers; results are rounded and saturated.
        Images whose transforms overflow are divided by a power of two first.
        """
        out = self._checked(x, out)
        self._filter(x, out, self.value, self.scale)
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(out.sum())  # finite only if all are; takes a small part of a transform
        if x.dtype.kind == "f" and not math.isfinite(total):
            peak = max(float(np.abs(x).max(initial=0)), abs(self.value))
            if math.isfinite(peak):
                unit = 2.0 ** (math.frexp(peak)[1] - 1)
                self._filter(x / x.dtype.type(unit), out, self.value / unit, self.scale, unit)
        return out

    def _filter(self, x: Array, out: Array, value: float, *scales: float) -> None:
        """Filter `x` into `out`, multiplied by powers of two."""
        tasks = self._tasks(len(x))
        threads = self.threads if x.size >= MIN_PARALLEL_SAMPLES else 1
        workers = min(threads, len(tasks))
        run = partial(self._run, x[:, 0], out[:, 0], value, scales, threads // max(workers, 1))
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(run, tasks))
        else:
            for task in tasks:
                run(task)

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

    def _tasks(self, batch: int) -> list[tuple[slice, Ints, int]]:
        """Return tasks (images, first block along each axis, blocks along the last axis).

        They do not depend on the number of threads, so that results do not either.
        """
        points = math.prod(a.block for a in self.axes)
        *leading, last = self.axes
        group = _blocks_per_group(last.count, points)
        images = max(GROUP_POINTS // (points * group), 1) if group == last.count else 1
        return [
            (slice(i, i + images), (*lead, j), min(group, last.count - j))
            for i in range(0, batch, images)
            for lead in itertools.product(*(range(a.count) for a in leading))
            for j in range(0, last.count, group)
        ]

    def _run(
        self,
        x: Array,
        out: Array,
        border_value: float,
        scales: Sequence[float],
        workers: int,
        task: tuple[slice, Ints, int],
    ) -> None:
        """Filter a group of neighbouring blocks along the last axis."""
        images, first, group = task
        x, out = x[images], out[images]
        last = self.axes[-1]
        value = self.dtype.type(border_value)
        for i, axis in enumerate(self.axes, 1):
            count = group if axis is last else 1
            x = axis.read(x, i, first[i - 1], count, value)
            start = first[i - 1] * axis.valid
            out = out[(*(slice(None),) * i, slice(start, start + count * axis.valid))]
        x = x.astype(self.dtype, copy=False)
        fft = _scipy_fft()
        blocks_of_group = sliding_window_view(x, last.block, axis=-1)[..., :: last.valid, :]
        leading = range(1, len(self.axes))
        f = fft.rfftn(blocks_of_group, axes=(*leading, -1), workers=workers)
        with np.errstate(over="ignore", invalid="ignore"):  # seen in the results
            f *= self.spectrum
        for i in leading:  # crop after each axis: the next ones transform less
            f = fft.ifft(f, axis=i, overwrite_x=True, workers=workers)
            f = f[(*(slice(None),) * i, slice(out.shape[i]))]
        y = fft.irfft(f, last.block, overwrite_x=True, workers=workers)
        with np.errstate(over="ignore", under="ignore"):
            for scale in scales:  # one by one: their product may overflow where results do not
                if scale != 1:
                    y *= self.dtype.type(scale)
        if out.dtype != y.dtype:
            y = reference.saturate(y, out.dtype)
        whole, rest = divmod(out.shape[-1], last.valid)
        shape = (*out.shape[:-1], whole, last.valid)
        out[..., : whole * last.valid].reshape(shape)[...] = y[..., :whole, : last.valid]
        if rest:
            out[..., whole * last.valid :] = y[..., whole, :rest]


def _scipy_fft() -> ModuleType:
    """Import scipy.fft when needed: it imports scipy.special, which takes longer than lowrank."""
    from scipy import fft

    return fft  # type: ignore[no-any-return]


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
    """Return candidate sizes of blocks along one axis, the largest first."""
    sizes = []
    parts = 1
    while parts == 1 or -(-size // parts) >= max(taps, MIN_BLOCK_OUTPUTS):
        sizes.append(int(_scipy_fft().next_fast_len(-(-size // parts) + taps - 1, real=True)))
        parts *= 2
    return sizes


def _split_evenly(size: int, most: int) -> tuple[int, int]:
    """Return the number of parts and their size: equal, so that threads finish together."""
    count = -(-size // most)
    return count, -(-size // count)


def _blocks_per_group(count: int, points: int) -> int:
    """Return the number of blocks along the last axis that one call transforms."""
    return _split_evenly(count, max(GROUP_POINTS // points, 1))[1]


def _operations(taps: Ints, sizes: Ints, block: Ints) -> float:
    transforms, points, *_ = work(taps, sizes, block)
    return transforms * points * math.log2(points)


def _axis(size: int, taps: int, block: int, before: int, mode: str) -> _Axis:
    count, valid = _split_evenly(size, block - taps + 1)
    padded_indices = None
    if mode not in ("zeros", "constant"):
        # The last block may read more than its outputs need: the padding continues.
        after = (count - 1) * valid + block - before - size
        line = np.arange(size)[None, None]
        padded_indices = reference.pad(line, ((before, max(after, 0)),), mode, None)[0, 0]
    return _Axis(size, block, valid, count, before, padded_indices)
