"""Filters of images, volumes, cubes and series, of any rank, in scipy.ndimage's manners."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank import backends, reference, search
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.factorization import Factorization, dense
from lowrank.families import FAMILIES
from lowrank.geometry import integers
from lowrank.stage import Epilogue, Stage

#: scipy.ndimage's names of the border modes, and ours.
MODES: dict[str, PaddingMode] = {
    "reflect": "symmetric",
    "grid-mirror": "symmetric",
    "constant": "constant",
    "grid-constant": "constant",
    "nearest": "replicate",
    "mirror": "reflect",
    "wrap": "circular",
    "grid-wrap": "circular",
}

LONG = 64  # numbers that are worth an axis of their own
PLANS = 32  # that are kept for calls with the same kernel, size and border
# Of a kernel of numbers rounded to a precision: what is below is rounding, not rank.
_NOISE = 4


def separate(
    kernel: Any,
    *,
    rank: int | None = None,
    max_error: float | None = None,
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
    max_error : float, optional
        Largest relative Frobenius error: the cheapest chain within it, of any form, such as
        spatial against spectral axes of a cube.  Without `rank` and `max_error`: within
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
    k = _kernel(kernel)
    if rank is not None and max_error is not None:
        raise TypeError("give rank or max_error, not both")
    before = [n // 2 + o for n, o in zip(k.shape, _origins(origin, k.shape))]
    conv = dense(
        k[None, None],
        padding=[(b, n - 1 - b) for b, n in zip(before, k.shape)],
        padding_mode=_mode(mode),
        value=cval,
    )
    shape = tuple(2 * n for n in k.shape) if shape is None else tuple(shape)
    if rank is not None:
        long = sum(n > 1 for n in k.shape)
        if long < 2:
            if rank != 1:
                raise ValueError(f"a filter along one axis has rank 1, got rank {rank}")
            return conv
        family = "spatial" if long == 2 else "filter"
        return FAMILIES[family].fit(conv, rank, None)  # type: ignore[arg-type]
    if max_error is None:
        max_error = _NOISE * float(np.finfo(k.dtype).eps) * math.sqrt(k.size)
    families = ("spatial", "filter", "tensor_train")
    return search.choose(conv, shape, max_error=max_error, families=families)[1].build()


def correlate(
    image: Array,
    kernel: Any,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    axes: Sequence[int] | None = None,
    convolve: bool = False,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter an image, a volume, a cube or a series.

    Parameters
    ----------
    image : ndarray
        Real.  float32 and float64 are computed in their own precision, float16 and 8- and
        16-bit integers in float32, wider ones in float64; integer results are rounded to
        nearest, halves to even, and saturate.  8- and 16-bit integers are read and written by
        the engine itself, and colours that lie together go through in one pass.
    kernel : array_like
        The filter, over 1, 2 or 3 axes; see :func:`separate`.
    rank : int, optional
        Filter with the best sum of that many separable terms instead.
    max_error : float, optional
        Filter with the cheapest chain within this relative Frobenius error.
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
    ndarray
        Of the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        If a dtype, mode, origin, axis or kernel is not possible; the message says what is.

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
    image = np.asarray(image)
    k = _kernel(kernel)
    origins = _origins(origin, k.shape)
    if convolve:
        k = np.flip(k)
        origins = tuple(-o - (n % 2 == 0) for o, n in zip(origins, k.shape))
    work = _work_dtype(image)
    along = _axes(axes, image.ndim, k.ndim)
    if out is not None and not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__qualname__}")
    if out is not None and (out.shape != image.shape or out.dtype != image.dtype):
        raise ValueError(
            f"out must have shape {image.shape} and dtype {image.dtype}, "
            f"got {out.shape} and {out.dtype}"
        )
    together = along == tuple(range(k.ndim)) and (out is None or out.flags.c_contiguous)
    k = np.ascontiguousarray(k, work)
    _mode(mode)
    if rank is not None:
        (rank,) = integers("rank", rank, 1)
    cval = _real("cval", cval)
    max_error = None if max_error is None else _real("max_error", max_error)
    threads = threads if threads is None else integers("threads", threads, 1)[0]
    run, size = _planned(
        k.tobytes(), k.shape, k.dtype.str, tuple(image.shape[a] for a in along),
        math.prod(image.shape[k.ndim :]) if together else 1,
        rank, max_error, mode, cval, origins, threads,
    )  # fmt: skip
    out = np.empty(image.shape, image.dtype) if out is None else out
    if image.size == 0:
        return out
    if np.may_share_memory(image, out):
        image = image.copy()
    if image.dtype not in (work, *backends.INTEGERS) or not image.dtype.isnative:
        image = image.astype(work)
    result = out if out.dtype == image.dtype else np.empty(out.shape, work)
    shape = (-1, 1, *size)
    if together:
        run(np.ascontiguousarray(image).reshape(shape), result.reshape(shape))
    else:
        x, moved = (np.moveaxis(a, along, range(-k.ndim, 0)) for a in (image, result))
        y = moved.reshape(shape)
        run(x.reshape(shape), y)
        if not np.may_share_memory(y, result):
            moved[...] = y.reshape(moved.shape)
    if result is not out:
        out[...] = reference.saturated(result, out.dtype) if out.dtype.kind in "iu" else result
    return out


@functools.lru_cache(PLANS)
def _planned(
    kernel: bytes,
    taps: Ints,
    dtype: str,
    spatial: Ints,
    numbers: int,
    rank: int | None,
    max_error: float | None,
    mode: str,
    cval: float,
    origins: Ints,
    threads: int | None,
) -> tuple[backends.Runner, Ints]:
    """A planned filter, and the size of the images that it takes.

    What lies behind the filtered axes, so many `numbers`, goes through in one pass: a long row as
    an axis that nothing happens on, a few, such as colours, as samples of that many numbers.
    """
    chain = separate(
        np.frombuffer(kernel, dtype).reshape(taps),
        rank=rank,
        max_error=max_error,
        shape=[max(n, 1) for n in spatial],
        mode=mode,
        cval=cval,
        origin=origins,
    )
    stages = chain.stages
    if numbers >= LONG and len(taps) < 3:
        stages, spatial, numbers = tuple(map(_idle_axis, stages)), (*spatial, numbers), 1
    size = (*spatial[:-1], spatial[-1] * numbers)
    if 0 in size:
        spatial = tuple(max(n, 1) for n in spatial)  # never run
    ends = [Epilogue()] * len(stages)
    shape = (1, *spatial)
    return backends.plan(stages, shape, np.dtype(dtype), ends, threads, max(numbers, 1)), size


def gauss(sigma: float | Sequence[float], *, ndim: int = 2, truncate: float = 4.0) -> Array:
    """Gaussian filter; rank 1, and sums to 1.

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation in samples, above 0: one for all axes, or one an axis.
    ndim : int
        Number of axes, for a single `sigma`.
    truncate : float
        Where the filter is cut, in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        With ``n = int(truncate * sigma + 0.5)``, as in ``scipy.ndimage.gaussian_filter``.

    Raises
    ------
    ValueError
        If a `sigma` is not above 0.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.gauss(1.0).shape, filters.gauss([1.0, 2.0, 2.0]).shape
    ((9, 9), (9, 17, 17))
    """
    sigmas = [float(s) for s in np.atleast_1d(sigma)]
    sigmas *= ndim if np.ndim(sigma) == 0 else 1
    lines = [_bell(_positive("sigma", s), truncate) for s in sigmas]
    return _outer([g / g.sum() for g in lines])


def sobel(axis: int = -1, *, ndim: int = 2) -> Array:
    """Sobel's derivative filter: a difference along one axis, smoothed along the others; rank 1.

    Parameters
    ----------
    axis : int
        Axis of the derivative.
    ndim : int
        Number of axes.

    Returns
    -------
    ndarray of float64, shape (3, ...)
        Sums to 0; a slope of 1 gives 8 in two dimensions, as in ``scipy.ndimage.sobel``.

    Raises
    ------
    ValueError
        If there is no such axis.

    References
    ----------
    .. [1] I. Sobel, G. Feldman, "A 3x3 isotropic gradient operator for image processing", 1968.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.sobel()
    array([[-1.,  0.,  1.],
           [-2.,  0.,  2.],
           [-1.,  0.,  1.]])
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1}, got {axis}")
    lines = [np.array([1.0, 2.0, 1.0])] * ndim
    lines[axis] = np.array([-1.0, 0.0, 1.0])
    return _outer(lines)


def log(sigma: float, *, ndim: int = 2, truncate: float = 4.0) -> Array:
    """Laplacian of a Gaussian: as many separable terms as axes, two of them over two axes.

    Parameters
    ----------
    sigma : float
        Standard deviation in samples, above 0.
    ndim : int
        Number of axes.
    truncate : float
        Where the filter is cut, in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, ...)
        Sums to 0: blind to constants.

    Raises
    ------
    ValueError
        If `sigma` is not above 0.

    References
    ----------
    .. [1] D. Marr, E. Hildreth, "Theory of edge detection", Proc. R. Soc. London B 207, 1980.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> int(np.linalg.matrix_rank(filters.log(2.0), tol=1e-9))
    2
    """
    g = _bell(_positive("sigma", sigma), truncate)
    t = np.arange(len(g)) - len(g) // 2
    second = (t**2 / sigma**2 - 1) / sigma**2 * g
    second -= second.mean() * g / g.mean()  # of rank 2 still, and blind to constants
    lines = [[second if a == axis else g for a in range(ndim)] for axis in range(ndim)]
    kernel = sum(_outer(line) for line in lines) / g.sum() ** ndim
    return np.asarray(kernel)


def gabor(
    sigma: float,
    wavelength: float,
    *,
    angle: float = 0.0,
    phase: float = 0.0,
    truncate: float = 3.0,
) -> Array:
    """Gabor filter, a wave under a Gaussian: rank 1 along the axes, 2 at any other angle.

    Parameters
    ----------
    sigma : float
        Standard deviation of the Gaussian in samples, above 0.
    wavelength : float
        Of the wave, in samples, above 0.
    angle : float
        Direction of the wave in radians, from the second axis towards the first.
    phase : float
        Of the wave at the centre, in radians.
    truncate : float
        Where the filter is cut, in standard deviations.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)

    Raises
    ------
    ValueError
        If `sigma` or `wavelength` is not above 0.

    References
    ----------
    .. [1] J. G. Daugman, "Uncertainty relation for resolution in space, spatial frequency, and
       orientation optimized by two-dimensional visual cortical filters", J. Opt. Soc. Am. A 2,
       1985.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> int(np.linalg.matrix_rank(filters.gabor(3.0, 6.0, angle=0.5), tol=1e-9))
    2
    """
    g = _bell(_positive("sigma", sigma), truncate)
    t = np.arange(len(g)) - len(g) // 2
    along = t[None, :] * math.cos(angle) + t[:, None] * math.sin(angle)
    wave = np.cos(2 * math.pi * along / _positive("wavelength", wavelength) + phase)
    return np.asarray(np.outer(g, g) / g.sum() ** 2 * wave)


def disk(radius: float) -> Array:
    """Uniform disk, the blur of a lens out of focus; sums to 1.  Of high rank.

    Parameters
    ----------
    radius : float
        In samples, above 0.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)
        With ``n = floor(radius)``.

    Raises
    ------
    ValueError
        If `radius` is not above 0.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.disk(1.0).round(1)
    array([[0. , 0.2, 0. ],
           [0.2, 0.2, 0.2],
           [0. , 0.2, 0. ]])
    """
    n = math.floor(_positive("radius", radius))
    t = np.arange(-n, n + 1)
    inside = (t[:, None] ** 2 + t**2 <= radius**2).astype(float)
    return np.asarray(inside / inside.sum())


def motion(length: int, *, angle: float = 0.0) -> Array:
    """Motion blur along a line; sums to 1.

    Parameters
    ----------
    length : int
        Of the line, in samples, above 0.
    angle : float
        Of the line in radians, from the second axis towards the first.

    Returns
    -------
    ndarray of float64, shape (2 * n + 1, 2 * n + 1)

    Raises
    ------
    ValueError
        If `length` is not above 0.

    Examples
    --------
    >>> from lowrank import filters
    >>> filters.motion(3)[1]
    array([0.33333333, 0.33333333, 0.33333333])
    """
    n = math.ceil(_positive("length", length) / 2)
    n = max(n - (length % 2), 1)
    t = np.arange(-n, n + 1)
    y, x = t[:, None], t[None, :]
    across = np.abs(-x * math.sin(angle) + y * math.cos(angle))
    along = np.abs(x * math.cos(angle) + y * math.sin(angle))
    line = np.clip(1 - across, 0, 1) * np.clip((length + 1) / 2 - along, 0, 1)
    return np.asarray(line / line.sum())


def _bell(sigma: float, truncate: float) -> Array:
    n = int(truncate * sigma + 0.5)
    return np.asarray(np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2))


def _outer(lines: Sequence[Array]) -> Array:
    kernel = np.ones(())
    for line in lines:
        kernel = np.multiply.outer(kernel, line)
    return kernel


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return value


def _kernel(kernel: Any) -> Array:
    k = np.asarray(kernel)
    if k.dtype.kind in "iub":
        k = k.astype(np.float64)
    k = k.astype(k.dtype.newbyteorder("="), copy=False)
    if k.dtype == np.float16:
        k = k.astype(np.float32)
    if k.dtype not in (np.float32, np.float64):
        raise TypeError(f"kernel must be real, float32 or float64, got {k.dtype}")
    if k.ndim not in (1, 2, 3) or k.size == 0:
        raise ValueError(f"kernel must have 1 to 3 axes and no empty one, got shape {k.shape}")
    if not np.isfinite(k).all():
        raise ValueError("kernel holds NaN or infinite values")
    return k


def _idle_axis(stage: Stage) -> Stage:
    """The stage with one more axis, behind the others, that nothing happens on."""
    g = stage.geometry
    longer = replace(
        g,
        stride=(*g.stride, 1),
        padding=(*g.padding, (0, 0)),
        dilation=(*g.dilation, 1),
        output_padding=(*g.output_padding, 0),
    )
    return replace(stage, weight=stage.weight[..., None], geometry=longer)


def _real(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None


def _mode(mode: str) -> PaddingMode:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return MODES[mode]


def _origins(origin: int | Sequence[int], taps: Ints) -> Ints:
    origins = integers("origin", origin, len(taps))
    for o, n in zip(origins, taps):
        if not -(n // 2) <= o <= (n - 1) // 2:
            raise ValueError(
                f"origin must be from {-(n // 2)} to {(n - 1) // 2} for {n} taps, got {o}"
            )
    return origins


def _work_dtype(image: Array) -> np.dtype[Any]:
    native = image.dtype.newbyteorder("=")
    if native in (np.float32, np.float64):
        return native
    if native == np.float16:
        return np.dtype(np.float32)
    if image.dtype.kind in "iu":
        return np.dtype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    raise TypeError(
        f"image must be floating-point or integers, got {image.dtype}: convert it first"
    )


def _axes(axes: Sequence[int] | None, image: int, kernel: int) -> Ints:
    if kernel > image:
        raise ValueError(f"a kernel over {kernel} axes does not fit an image with {image}")
    along = tuple(range(kernel)) if axes is None else integers("axes", axes, kernel)
    if any(not -image <= a < image for a in along) or len({a % image for a in along}) < kernel:
        raise ValueError(f"axes must be different and from {-image} to {image - 1}, got {axes!r}")
    return tuple(a % image for a in along)
