"""Images filtered by the engine: the separable form of a kernel, planned once and kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from lowrank import engine, selection
from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.arrays import as_native_order
from lowrank.core.geometry import as_integers
from lowrank.engine import dask as chunked
from lowrank.factorization import Factorization, dense
from lowrank.filters import arguments, choose, gpu

PLANS = 32  # that are kept for calls with the same kernel, size and border
# Of a kernel of numbers rounded to a precision: what is below is rounding, not rank.
_NOISE = 4


def separate(
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    shape: Sequence[int] | None = None,
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
) -> Factorization:
    """Write a filter as a chain of passes along fewer axes.

    Parameters
    ----------
    kernel : array_like
        The filter, over 1, 2 or 3 axes; integers are taken as float64.
    rank : int, optional
        Terms of the sum.  Over two axes the best filter of that rank; over three a CP sum.
    tolerance : float, optional
        Largest relative Frobenius error: the cheapest chain within it, of any form, such as
        spatial against spectral axes of a cube.  Without `rank` and `tolerance`: within
        rounding.
    shape : sequence of int, optional
        Size of the images that it is meant for, which costs are compared at; twice the kernel
        if not given.
    mode : str
        Border; this and the next two as for :func:`correlate`.
    cval : float
        The constant of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter.

    Returns
    -------
    Factorization
        With one channel in and out.  The dense kernel if no chain is cheaper.

    Raises
    ------
    ValueError, TypeError
        If the kernel is empty, not finite, not real, or the rank is not possible.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> sobel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    >>> [s.weight.shape for s in filters.separate(sobel).stages]
    [(1, 1, 3, 1), (1, 1, 1, 3)]
    """
    k = arguments.kernel(kernel)
    tolerance = _tolerance(tolerance, rank)
    conv = _stage(k, mode, cval, arguments.origins(origin, k.shape))
    if rank is not None:
        return choose.of_rank(conv, rank)
    shape = tuple(2 * n for n in k.shape) if shape is None else tuple(shape)
    tolerance = _rounding(k) if tolerance is None else tolerance
    families = choose.FAMILIES_OF_FILTERS
    return selection.choose(conv, shape, max_error=tolerance, families=families, axis="macs")[
        1
    ].build()


def correlate(
    image: Array,
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.Method = "auto",
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    axes: Sequence[int] | None = None,
    convolve: bool = False,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter an image, a volume, a cube or a series, the fastest way within a tolerance.

    Parameters
    ----------
    image : ndarray, dask.array.Array or cupy.ndarray
        Real.  float32 and float64 are computed in their own precision, float16 and 8- and
        16-bit integers in float32, wider ones in float64; integer results are rounded to
        nearest, halves to even, and saturate.  8- and 16-bit integers are read and written by
        the engine itself, and colours that lie together go through in one pass.
    kernel : array_like
        The filter, over 1, 2 or 3 axes; see :func:`separate`.
    rank : int, optional
        Filter with the best sum of that many separable terms instead.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that is run; rounding if not given.
    method : str
        ``"auto"``: what is predicted to be fastest within the tolerance; :func:`plan_filter`
        shows the choice.  ``"direct"``, ``"separable"`` and ``"fft"`` ask for a way.
    mode : str
        Border, by scipy.ndimage's names: ``"reflect"`` (``b a | a b c | c b``),
        ``"mirror"`` (``c b | a b c | b a``), ``"nearest"``, ``"wrap"`` or ``"constant"``.
    cval : float
        The constant of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter, one for all axes or one an axis, in scipy.ndimage's sense.
    axes : sequence of int, optional
        Axes of `image` that the kernel runs along, for an image with more axes than it, such
        as colours; the first ones if not given.
    convolve : bool
        Flip the kernel: a convolution in the mathematical sense.
    out : ndarray, optional
        Where to put the result; same shape and dtype as `image`.
    threads : int, optional
        Threads to use; all that OpenMP offers if not given.

    Returns
    -------
    ndarray or dask.array.Array
        Of the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        If a dtype, mode, origin, axis or kernel is not possible; the message says what is.

    Notes
    -----
    A Fourier transform spreads rounding over its block: what is far darker than the brightest
    sample near it is lost in that, in float32 below about 1e-6 of it.  For images of a high
    dynamic range ask for another `method`.  With ``"auto"`` images that hold NaN or infinities
    do not go by transforms.

    A CuPy array is filtered on its GPU and gives one, by the fewest multiply-adds in place of the
    least time; not by transforms.

    A Dask array gives a lazy one, in chunks that overlap where they are read, with the bits of the
    whole array in memory.  It does not go by transforms; where they are predicted to be fastest,
    the bits are those of the fastest other way.  Without `threads` a chunk runs on one thread in a
    worker of a pool, and on all in the main thread.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> step = np.repeat([[0.0, 0.0, 1.0, 1.0]], 4, axis=0)
    >>> filters.correlate(step, [[-1, 0, 1]])[0]
    array([0., 1., 1., 0.])
    """
    if isinstance(image, np.ma.MaskedArray):
        raise TypeError("image must be a plain array: a mask has no meaning here, fill it first")
    is_dask, on_gpu = chunked.is_dask_array(image), engine.on_gpu(image)
    if not is_dask and not on_gpu:
        image = np.asarray(image)
    elif is_dask and out is not None:
        raise TypeError("out must not be given for a Dask array: the result is one, computed later")
    k = arguments.kernel(kernel)
    origins = arguments.origins(origin, k.shape)
    if convolve:
        k = np.flip(k)
        origins = tuple(-o - (n % 2 == 0) for o, n in zip(origins, k.shape))
    work = arguments.work_dtype(image)
    along = arguments.axes(axes, image.ndim, k.ndim)
    if out is not None and type(out) is not type(image):
        raise TypeError(f"out must be an array like the image, got {type(out).__qualname__}")
    if out is not None and (out.shape != image.shape or out.dtype != image.dtype):
        raise ValueError(
            f"out must have shape {image.shape} and dtype {image.dtype}, "
            f"got {out.shape} and {out.dtype}"
        )
    together = along == tuple(range(k.ndim)) and (out is None or out.flags.c_contiguous)
    k = np.ascontiguousarray(k, work)
    arguments.mode(mode)
    if rank is not None:
        (rank,) = as_integers("rank", rank, 1)
    cval = arguments.real("cval", cval)
    tolerance = _tolerance(tolerance, rank)
    threads = threads if threads is None else as_integers("threads", threads, 1)[0]
    spatial = tuple(image.shape[a] for a in along)
    batch = image.size // max(math.prod(spatial), 1)
    request = Request(
        k.tobytes(), k.shape, k.dtype.str, spatial, batch, together, rank, tolerance, method, mode,
        cval, origins, threads,
    )  # fmt: skip
    if is_dask:
        from lowrank.filters import dask  # imports this module

        return dask.correlate(image, along, request)  # type: ignore[no-any-return]
    if on_gpu:
        with engine.at(image):
            return cast(Array, gpu.correlate(image, along, request, work, out))
    ways = _planned(request)
    out = np.empty(image.shape, image.dtype) if out is None else out
    if image.size == 0:
        return out
    if np.may_share_memory(image, out):
        image = image.copy()
    image = readable(image, work)
    result = as_native_order(out) if out.dtype == image.dtype else np.empty(out.shape, work)
    way = ways[0]
    if way.spreads and image.dtype.kind == "f" and not np.isfinite(image.sum()):
        way = ways[-1]
    run, shape = way.run, (-1, 1, *way.size)
    if way.woven or (together and batch == 1):
        run(np.ascontiguousarray(image).reshape(shape), result.reshape(shape))
    else:
        x, moved = (np.moveaxis(a, along, range(-k.ndim, 0)) for a in (image, result))
        y = moved.reshape(shape)
        run(x.reshape(shape), y)
        if not np.may_share_memory(y, result):
            moved[...] = y.reshape(moved.shape)
    if result.dtype != out.dtype:
        out[...] = written(result, out.dtype)
    return out


def filter_image(
    image: Array,
    kernel: Any,
    *,
    tolerance: float | None = None,
    method: choose.Method = "auto",
    mode: str = "reflect",
    cval: float = 0.0,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter a picture, the fastest way within a tolerance.

    Parameters
    ----------
    image : ndarray or dask.array.Array, shape (height, width) or (height, width, colours)
        Of any real type; see :func:`correlate`, which takes volumes and series as well.
    kernel : array_like, shape (h, w)
        The filter, as a correlation: not flipped.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that is run; rounding if not given.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str
        Border, by scipy.ndimage's names.
    cval : float
        The constant of mode ``"constant"``.
    out : ndarray, optional
        Where to put the result; same shape and dtype as `image`.
    threads : int, optional
        Threads to use; all that OpenMP offers if not given.

    Returns
    -------
    ndarray or dask.array.Array
        Of the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        If the image is no picture, the kernel has not two axes, or an argument is not possible.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank import filters
    >>> picture = np.random.default_rng(0).random((64, 64, 3), np.float32)
    >>> blurred = lowrank.filter_image(picture, filters.disk(5), tolerance=0.1)
    >>> bool(np.abs(blurred - lowrank.filter_image(picture, filters.disk(5))).max() < 0.1)
    True
    """
    if np.ndim(image) not in (2, 3):
        raise ValueError(
            f"image must be (height, width) or (height, width, colours), got {np.shape(image)}: "
            "filters.correlate takes any number of axes"
        )
    if np.ndim(kernel) != 2:
        raise ValueError(f"kernel must have two axes, got shape {np.shape(kernel)}")
    return correlate(
        image, kernel, tolerance=tolerance, method=method, mode=mode, cval=cval, out=out,
        threads=threads,
    )  # fmt: skip


def plan_filter(
    kernel: Any,
    shape: Sequence[int],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.Method = "auto",
    dtype: Any = np.float32,
    mode: str = "reflect",
    cval: float = 0.0,
    batch: int = 1,
    threads: int | None = None,
) -> choose.FilterPlan:
    """Show the ways to run a filter, and the one that :func:`correlate` takes.

    Parameters
    ----------
    kernel : array_like
        The filter, over 1, 2 or 3 axes.
    shape : sequence of int
        Size of the images along the same axes.
    rank : int, optional
        The best sum of that many separable terms, and nothing else.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that is run; rounding if not given.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    dtype : dtype
        float32 or float64, that it is computed in.
    mode : str
        Border, by scipy.ndimage's names.
    cval : float
        The constant of mode ``"constant"``.
    batch : int
        Colours or bands, which lie behind the axes of the filter: 3 for (height, width, 3).
    threads : int, optional
        Threads to use; all that OpenMP offers if not given.

    Returns
    -------
    FilterPlan
        A table that prints itself; the options with their errors and predicted times.

    Raises
    ------
    ValueError, TypeError
        If an argument is not possible, or nothing of `method` is within the tolerance.

    Notes
    -----
    Times are those of :mod:`lowrank.perfmodel`.  The bound in grey levels holds for every image
    with values from 0 to 255: it is 255 times the larger of the sums of the positive and of the
    negative part of what the kernel misses, and images of 0 and 255 attain it.

    Examples
    --------
    >>> from lowrank import filters
    >>> plan = filters.plan_filter(filters.log(2.0), (1000, 1000))
    >>> sorted({o.method for o in plan.options})
    ['direct', 'fft', 'separable']
    """
    k = arguments.kernel(kernel)
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    spatial = as_integers("shape", shape, k.ndim)
    if min(spatial) < 1:
        raise ValueError(f"shape must be at least 1 along every axis, got {spatial}")
    k = np.ascontiguousarray(k, dtype)
    conv = _stage(k, mode, arguments.real("cval", cval), (0,) * k.ndim)
    tolerance = _tolerance(tolerance, rank)
    tolerance = _rounding(k) if tolerance is None else tolerance
    (planes,) = as_integers("batch", batch, 1)
    if planes < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return choose.plan_of(
        conv, spatial, tolerance, rank=rank, method=method, planes=planes, together=True,
        itemsize=k.itemsize, threads=threads,
    )  # fmt: skip


def rank(kernel: Any, *, tolerance: float | None = None) -> int:
    """Terms that a kernel has as a sum of separable ones; 1 means that it is separable.

    Parameters
    ----------
    kernel : array_like
        The filter, over 1, 2 or 3 axes.
    tolerance : float, optional
        Singular values up to this share of the largest count as zero.  If not given, what
        rounding to the kernel's precision makes of zeros.

    Returns
    -------
    int
        Exact over 1 and 2 axes, and wherever it is 0 or 1.  Over three axes otherwise a lower
        bound: the largest rank of the three unfoldings.

    Raises
    ------
    ValueError, TypeError
        If the kernel is empty, not finite, not real, or the tolerance is negative.

    Examples
    --------
    >>> from lowrank import filters
    >>> [filters.rank(k) for k in (filters.gauss(2.0), filters.log(2.0), filters.disk(5.0))]
    [1, 2, 4]
    """
    k = arguments.kernel(kernel)
    if tolerance is None:
        tolerance = _rounding(k)
    elif not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    largest = np.abs(k).max()
    if largest == 0:
        return 0
    k = (k / largest).astype(np.float64)  # no square of it overflows, or vanishes
    found = 1
    for axis in range(k.ndim):
        s = np.linalg.svd(np.moveaxis(k, axis, 0).reshape(k.shape[axis], -1), compute_uv=False)
        found = max(found, int((s > tolerance * s[0]).sum()))
    return found


class Request(NamedTuple):
    """What is asked for, checked: all that the choice of a way depends on."""

    kernel: bytes
    taps: Ints
    dtype: str
    spatial: Ints
    batch: int
    together: bool
    rank: int | None
    tolerance: float | None
    method: choose.Method
    mode: str
    cval: float
    origins: Ints
    threads: int | None

    def plan(self) -> choose.FilterPlan:
        """The ways for images of this size."""
        k = np.frombuffer(self.kernel, self.dtype).reshape(self.taps)
        conv = _stage(k, self.mode, self.cval, self.origins)
        size = tuple(max(n, 1) for n in self.spatial)  # of an empty image: never run
        return choose.plan_of(
            conv, size, _rounding(k) if self.tolerance is None else self.tolerance, rank=self.rank,
            method=self.method, planes=max(self.batch, 1), together=self.together,
            itemsize=k.itemsize, threads=self.threads,
        )  # fmt: skip

    def lasting(self, plan: choose.FilterPlan) -> choose.Option:
        """The choice; where it was free, one that does without transforms.

        They spread NaN and infinities, and their rounding depends on where blocks are cut.
        """
        if plan.choice.block is None or self.method != "auto":
            return plan.choice
        return next(o for o in plan.options if o.block is None and o.error <= plan.tolerance)


@functools.lru_cache(PLANS)
def _planned(request: Request) -> list[_Way]:
    """The way that is chosen, and the one for images that hold NaN or infinities."""
    plan = request.plan()
    some = dict.fromkeys((plan.choice, request.lasting(plan)))
    size = tuple(max(n, 1) for n in request.spatial)
    planes = max(request.batch, 1)
    return [_Way.of(o, size, np.dtype(request.dtype), request.threads, planes) for o in some]


def readable(image: Array, work: np.dtype[Any]) -> Array:
    """`image` in a type that a plan reads: its own, or `work`."""
    if image.dtype in (work, *engine.INTEGERS) and image.dtype.isnative:
        return as_native_order(image)
    return image.astype(work)


def written(result: Array, dtype: np.dtype[Any]) -> Array:
    """What a plan gave as an image of `dtype`: integers rounded, and saturated."""
    if result.dtype == dtype:
        return result
    return reference.saturate(result, dtype) if dtype.kind in "iu" else result.astype(dtype)


class _Way(NamedTuple):
    """What runs, images of which size it takes, and whether colours go through as they lie."""

    run: Any
    size: Ints
    woven: bool
    spreads: bool

    @classmethod
    def of(
        cls, o: choose.Option, spatial: Ints, dtype: Any, threads: int | None, planes: int
    ) -> _Way:
        run = choose.runner(o, spatial, dtype, threads, planes)
        size = (*spatial[:-1], spatial[-1] * planes) if o.woven else spatial
        if o.woven and planes >= choose.LONG and len(spatial) < 3:
            size = (*spatial, planes)
        return cls(run, size, o.woven, o.block is not None)


def _stage(kernel: Array, mode: str, cval: float, origins: Ints) -> Factorization:
    """The filter as a dense stage of one channel that keeps the size."""
    before = [n // 2 + o for n, o in zip(kernel.shape, origins)]
    return dense(
        kernel[None, None],
        padding=[(b, n - 1 - b) for b, n in zip(before, kernel.shape)],
        padding_mode=arguments.mode(mode),
        value=cval,
    )


def _tolerance(tolerance: Any, rank: int | None) -> float | None:
    if tolerance is None:
        return None
    limit = arguments.real("tolerance", tolerance)
    if rank is not None:
        raise TypeError("give rank or tolerance, not both")
    return limit


def _rounding(kernel: Array) -> float:
    """What rounding makes of a kernel, as a share of its norm."""
    return _NOISE * float(np.finfo(kernel.dtype).eps) * math.sqrt(kernel.size)
