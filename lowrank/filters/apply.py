"""Filter images, volumes and series on the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core.arrays import as_native_order
from lowrank.core.geometry import as_integers
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, choose, conversion, dask, gpu
from lowrank.filters.outer import OuterProduct, compile_outer, outer_passes
from lowrank.filters.request import (
    CompiledFilter,
    FilterRequest,
    check_request,
    compile_request,
    plan_request,
)

MAX_COLOURS = 4  # of a picture
LIGHT_SAMPLES = 1 << 16  # of images that a plan would take longer than the filter


def correlate(
    image: Array,
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    axes: Sequence[int] | None = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter an image, a volume, a cube or a series by the fastest method within a tolerance.

    Parameters
    ----------
    image : ndarray, dask.array.Array or cupy.ndarray
        Real.  float32 and float64 are computed in their own precision, float16 and 8- and
        16-bit integers in float32, wider integers in float64; integer results are rounded to
        nearest even and saturate.
    kernel : array_like
        Filter over 1, 2 or 3 axes; see :func:`separate`.
    rank : int, optional
        Number of separable terms; their best sum runs instead of the kernel.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that runs; round-off by default.
    method : str
        ``"auto"`` (the method predicted to be fastest within the tolerance, see
        :func:`plan_filter`), ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str
        Border mode, by scipy.ndimage's names: ``"reflect"`` (``b a | a b c | c b``),
        ``"mirror"`` (``c b | a b c | b a``), ``"nearest"``, ``"wrap"`` or ``"constant"``.
    cval : float
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter as in scipy.ndimage, one for all axes or one per axis.
    axes : sequence of int, optional
        Axes of `image` that the kernel runs along.  Needed for a kernel with one axis and an image
        with several; else the first ones by default, so that the last may be channels.
    out : ndarray, optional
        Array for the result; same shape and dtype as `image`.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array
        Result, with the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        If a dtype, mode, origin, axis or kernel is invalid; the message lists what is allowed.

    Notes
    -----
    A Fourier transform spreads round-off over its block: in float32 samples below about 1e-6 of
    the brightest sample near them are lost.  For images of a high dynamic range choose another
    `method`.  ``"auto"`` does not transform images that contain NaN or infinities.

    A CuPy array is filtered on its GPU, by the method with the fewest MACs instead of the least
    time, without transforms.

    A Dask array gives a lazy array.  Its chunks overlap, and its bits are those of the whole
    array in memory, by the fastest method that is not a transform.  Without `threads` a chunk
    runs on one thread in a worker of a pool, and on all threads in the main thread.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> step = np.repeat([[0.0, 0.0, 1.0, 1.0]], 4, axis=0)
    >>> filters.correlate(step, [[-1, 0, 1]])[0]
    array([0., 1., 1., 0.])
    """
    return _filter(
        image, kernel, False, rank=rank, tolerance=tolerance, method=method, mode=mode, cval=cval,
        origin=origin, axes=axes, out=out, threads=threads,
    )  # fmt: skip


def convolve(
    image: Array,
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    axes: Sequence[int] | None = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter by the flipped kernel: a convolution in the mathematical sense.

    Parameters
    ----------
    image : ndarray, dask.array.Array or cupy.ndarray
        As for :func:`correlate`.
    kernel : array_like
        Filter, which is flipped.
    rank : int, optional
        As for :func:`correlate`, and so are the next five.
    tolerance : float, optional
        Largest relative error of the kernel.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str
        Border mode.
    cval : float
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter as in ``scipy.ndimage.convolve``.
    axes : sequence of int, optional
        Axes of `image` that the kernel runs along.
    out : ndarray, optional
        Array for the result.
    threads : int, optional
        Number of threads.

    Returns
    -------
    ndarray or dask.array.Array
        Result, with the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        See :func:`correlate`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> spike = np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    >>> filters.convolve(spike, [1.0, 2.0, 3.0]), filters.correlate(spike, [1.0, 2.0, 3.0])
    (array([0., 1., 2., 3., 0.]), array([0., 3., 2., 1., 0.]))
    """
    return _filter(
        image, kernel, True, rank=rank, tolerance=tolerance, method=method, mode=mode, cval=cval,
        origin=origin, axes=axes, out=out, threads=threads,
    )  # fmt: skip


def _filter(
    image: Array,
    kernel: Any,
    flip: bool,
    *,
    mode: str,
    out: Array | None,
    **options: Any,
) -> Array:
    """Filter by a kernel or the flipped kernel; see :func:`correlate`."""
    if isinstance(image, np.ma.MaskedArray):
        raise TypeError("image must be a plain array, got a masked array: fill the mask first")
    is_dask, on_gpu = chunked.is_dask_array(image), engine.is_on_gpu(image)
    if not is_dask and not on_gpu:
        image = np.asarray(image)
    elif is_dask and out is not None:
        raise TypeError("out must be None for a Dask array: the result is computed later")
    is_outer = isinstance(kernel, OuterProduct) and options["rank"] in (None, 1)
    is_outer = is_outer and options["method"] in ("auto", "separable")
    if is_outer and not is_dask and not on_gpu:
        return _filter_outer(image, kernel, flip, mode, out, options)
    factors = (kernel.flipped() if flip else kernel).factors if is_outer else None
    kernel = arguments.as_kernel(kernel)
    work = arguments.work_dtype(image, kernel)
    request, along = check_request(image, kernel, work, flip=flip, mode=mode, out=out, **options)
    if is_dask:
        if factors is None and image.size <= LIGHT_SAMPLES:  # as in memory
            factors = request.factors()
        return dask.correlate(image, along, request, factors)  # type: ignore[no-any-return]
    if on_gpu:
        with engine.device_context(image):
            return cast(Array, gpu.correlate(image, along, request, work, out))
    out = np.empty(image.shape, image.dtype) if out is None else out
    if image.size == 0:
        return out
    if np.may_share_memory(image, out):
        image = image.copy()
    passes, compiled = request.passes(), None
    if passes is None or image.size > LIGHT_SAMPLES:
        chosen, exact = plan_request(request)
        is_exact = image.dtype.kind == "f" and not _can_run(chosen, image, request.is_strict)
        if not (is_exact and exact.multiplies_zeros and not _is_finite(image)):
            compiled = compile_request(request, is_exact)
        elif passes is None:
            return _correlate_directly(image, along, request, out)
    if compiled is None:
        assert passes is not None
        x = np.ascontiguousarray(image, work)
        result = out if out.dtype == work and out.flags.carray else np.empty(out.shape, work)
        run, axes = passes
        before = [request.taps[a] // 2 + request.origins[a] for a in axes]
        border = arguments.as_padding_mode(mode)
        run(x, result, [along[a] for a in axes], before, border, request.cval)
    else:
        x = conversion.as_engine_input(image, work)
        result = as_native_order(out) if out.dtype == x.dtype else np.empty(out.shape, work)
        _run(compiled, x, result, along, request.interleaved and request.channels == 1)
    if result is not out and not np.may_share_memory(result, out):
        out[...] = conversion.as_image(result, out.dtype)
    return out


def _filter_outer(
    image: Array,
    kernel: OuterProduct,
    flip: bool,
    mode: str,
    out: Array | None,
    options: Mapping[str, Any],
) -> Array:
    """Filter by the vectors of an outer product."""
    arguments.as_tolerance(options["tolerance"], options["rank"])
    threads = options["threads"]
    if threads is not None:
        (threads,) = as_integers("threads", threads, 1)
    cval, axes, origin = options["cval"], options["axes"], options["origin"]
    axes, origin = (v if v is None or np.ndim(v) == 0 else tuple(v) for v in (axes, origin))
    work = arguments.work_dtype(image, kernel)
    passes = outer_passes(kernel.key, flip, image.ndim, axes, origin, mode, work.name)
    cval = 0.0 if cval == 0 else arguments.as_real("cval", cval)
    given, out = out, arguments.as_out(image, out)
    if image.size == 0:
        return out
    if given is not None and np.may_share_memory(image, out):
        image = image.copy()
    # Tiles of a plan would consist of halo where a factor is as long as its axis.
    is_long = any(2 * n > image.shape[a] for n, a in zip(kernel.shape, passes.along))
    is_light = is_long or image.size <= LIGHT_SAMPLES
    if not is_light and passes.has_zeros and image.dtype.kind == "f":
        is_light = not _is_finite(image)  # taps of zero are skipped
    if is_light:
        x = np.ascontiguousarray(image, work)
        result = out if out.dtype == work and out.flags.carray else np.empty(out.shape, work)
        passes.run(x, result, passes.axes, passes.before, passes.border, cval)
        if result is not out:
            out[...] = conversion.as_image(result, out.dtype)
        return out
    along = passes.along
    spatial = tuple(image.shape[a] for a in along)
    channels = image.size // math.prod(spatial)
    interleaved = along == tuple(range(kernel.ndim)) and out.flags.c_contiguous
    run, shape, in_one_pass = compile_outer(
        passes.key, work.str, spatial, channels, interleaved, mode, cval, passes.origins, threads
    )
    x = conversion.as_engine_input(image, work)
    result = as_native_order(out) if out.dtype == x.dtype else np.empty(out.shape, work)
    compiled = CompiledFilter(run, shape, in_one_pass)
    _run(compiled, x, result, along, interleaved and channels == 1)
    if result is not out and not np.may_share_memory(result, out):
        out[...] = conversion.as_image(result, out.dtype)
    return out


def _can_run(method: choose.FilterMethod, image: Array, is_strict: bool) -> bool:
    """Return whether a method gives every output of an image to the rounding of direct sums."""
    if not method.spread and not method.multiplies_zeros:
        return True
    if not _is_finite(image):
        return False
    if not (method.spread and is_strict):
        return True
    least, most = float(image.min()), float(image.max())
    smallest = min(abs(least), abs(most)) if least * most > 0 else 0.0
    return method.spread * max(abs(least), abs(most)) <= smallest


def _is_finite(image: Array) -> bool:
    """Return whether no sample is NaN or infinite; sums of large samples would overflow."""
    return math.isfinite(float(image.min())) and math.isfinite(float(image.max()))


def _correlate_directly(image: Array, along: Ints, request: FilterRequest, out: Array) -> Array:
    """Filter an image by direct sums that skip taps of zero: what SciPy is for.

    Only for images that contain NaN or infinities, and kernels with zeros.
    """
    from scipy import ndimage  # slow to import, and rarely needed

    kernel = np.frombuffer(request.kernel, request.dtype).reshape(request.taps)
    ndimage.correlate(image, kernel, out, request.mode, request.cval, request.origins, axes=along)
    return out


def _run(
    compiled: CompiledFilter, image: Array, result: Array, along: Ints, is_plain: bool
) -> None:
    """Filter `image` into `result`, channel by channel unless they are interleaved."""
    shape = (-1, 1, *compiled.shape)
    if compiled.interleaved or is_plain:
        compiled.run(np.ascontiguousarray(image).reshape(shape), result.reshape(shape))
        return
    last = range(-len(along), 0)
    x, y = np.moveaxis(image, along, last), np.moveaxis(result, along, last)
    channels = y.reshape(shape)  # a copy if `result` is strided
    compiled.run(x.reshape(shape), channels)
    if not np.may_share_memory(channels, result):
        y[...] = channels.reshape(y.shape)


def filter_image(
    image: Array,
    kernel: Any,
    *,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str = "reflect",
    cval: float = 0.0,
    channel_axis: int | None = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Filter a picture by the fastest method within a tolerance.

    Parameters
    ----------
    image : ndarray or dask.array.Array, shape (height, width) or (height, width, colours)
        Picture of any real dtype; :func:`correlate` accepts volumes and series as well.
    kernel : array_like, shape (h, w)
        Filter, as a correlation: not flipped.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that runs; round-off by default.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str
        Border mode, by scipy.ndimage's names.
    cval : float
        Border value of mode ``"constant"``.
    channel_axis : int, optional
        Axis of the colours, if it is not the last one.
    out : ndarray, optional
        Array for the result; same shape and dtype as `image`.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array
        Result, with the shape and dtype of `image`.

    Raises
    ------
    ValueError, TypeError
        If the image is no picture, the kernel does not have two axes, or an argument is invalid.

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
    axes = None
    if channel_axis is not None:
        (colours,) = arguments.as_axes([channel_axis], np.ndim(image), 1)
        axes = [a for a in range(np.ndim(image)) if a != colours]
        if len(axes) != 2:
            raise ValueError(f"channel_axis must be None for a picture of shape {np.shape(image)}")
    elif np.ndim(image) == 3 and np.shape(image)[2] > MAX_COLOURS >= np.shape(image)[0]:
        raise ValueError(
            f"image must be (height, width, colours), got {np.shape(image)}: give channel_axis=0 "
            "if the first axis is that of the colours, or channel_axis=2"
        )
    return correlate(
        image, kernel, tolerance=tolerance, method=method, mode=mode, cval=cval, axes=axes, out=out,
        threads=threads,
    )  # fmt: skip
