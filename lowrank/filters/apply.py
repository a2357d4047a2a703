"""Filter images, volumes and series on the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, choose, conversion, labelled, run
from lowrank.filters.outer import OuterProduct
from lowrank.filters.request import Call, as_call
from lowrank.filters.window import Padding

MAX_COLOURS = 4  # of a picture


def correlate(
    image: Any,
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str | Sequence[str] = "reflect",
    cval: complex = 0.0,
    origin: int | Sequence[int] = 0,
    axes: int | str | Sequence[int | str] | None = None,
    padding: Padding = "same",
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Any:
    """Filter an image, a volume, a cube or a series by the fastest method within a tolerance.

    Parameters
    ----------
    image : array_like, dask.array.Array, cupy.ndarray or xarray.DataArray
        Real, complex or bool, in any memory layout.  Arrays that are read at their first use, such
        as those of h5py and zarr, are refused: ``dask.array.from_array`` and ``from_zarr`` take
        them.
    kernel : array_like
        Filter over any number of axes, real or complex.  Correlation conjugates complex kernels,
        as NumPy and SciPy do.
    rank : int, optional
        Number of separable terms; their best sum runs instead of the kernel.  Up to 3 axes, real.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that runs; round-off by default.
    method : str
        ``"auto"`` (the method predicted to be fastest within the tolerance, see
        :func:`plan_filter`), ``"direct"``, ``"separable"``, ``"fft"`` or, for Gaussians of sigma 6
        or more, ``"multirate"``: in a time that does not depend on sigma, with the error that
        :func:`lowrank.filters.multirate.kernel_error` gives.
    mode : str or sequence of str
        Border mode, one for all axes of the kernel or one per axis, by scipy.ndimage's names:
        ``"reflect"`` (``b a | a b c | c b``), ``"mirror"`` (``c b | a b c | b a``),
        ``"nearest"``, ``"wrap"`` or ``"constant"``.
    cval : number
        Border value of mode ``"constant"``; may be complex for a complex image.
    origin : int or sequence of int
        Shift of the filter as in scipy.ndimage, one for all axes or one per axis.  Results of
        other sizes hold every window, in order, whatever the shift.
    axes : int or sequence of int, optional
        Axes of `image` that the kernel runs along, or names of dimensions of a DataArray.  Needed
        for a kernel with one axis and an image with several; else the first ones by default, so
        that the last may be channels.
    padding : str
        Size of the result: ``"same"`` as the image, ``"valid"`` (windows within the image: shorter
        by taps - 1 along each axis) or ``"full"`` (windows that touch the image: longer by
        taps - 1).  `mode` says what lies outside.
    dtype : dtype, optional
        Data type of the result: that of `out` or of the image by default, and complex for complex
        kernels.  Integers and bool are rounded to nearest even and saturate.
    out : ndarray, optional
        Array for the result, which is returned as it is: of any data type, byte order, strides and
        subclass.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray, dask.array.Array, cupy.ndarray or xarray.DataArray
        Result; a new array has the kind of `image`.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message lists what is allowed.

    Notes
    -----
    float16, float32, bool and integers of 8 and 16 bits are computed in float32, unless the result
    has 16-bit integers, or is wider; all else is computed in float64, which rounds integers beyond
    2^53, as SciPy does.
    Parts of complex images and kernels are filtered one by one.

    A Fourier transform spreads round-off over its block: in float32 samples below about 1e-6 of
    the brightest sample near them are lost.  For images of a high dynamic range choose another
    `method`.  ``"auto"`` does not transform images that contain NaN or infinities.

    An outer product of vectors runs by these.  Of a kernel over more than three axes that is none,
    slices over the last three axes run, one by one.

    A CuPy array is filtered on its GPU, by the method with the fewest MACs instead of the least
    time, without transforms.

    A Dask array gives a lazy array.  Its chunks overlap, and its bits are those of the whole
    array in memory (for outer products its accuracy only), by the fastest method that is not a
    transform.  Without `threads` a chunk runs on one thread in a worker of a pool, and on all
    threads in the main thread.

    A DataArray keeps its names and coordinates, and is lazy if its data are of Dask.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> step = np.repeat([[0.0, 0.0, 1.0, 1.0]], 4, axis=0)
    >>> filters.correlate(step, [[-1, 0, 1]])[0]
    array([0., 1., 1., 0.])
    >>> filters.correlate(step, [[-1, 0, 1]], padding="valid").shape
    (4, 2)
    >>> photograph = np.array([[9, 0, 0, 255]], np.uint8)
    >>> filters.correlate(photograph, [[-1, 0, 1]], dtype=np.int16)
    array([[ -9,  -9, 255, 255]], dtype=int16)
    """
    return _filter(
        image, kernel, False, rank=rank, tolerance=tolerance, method=method, mode=mode, cval=cval,
        origin=origin, axes=axes, padding=padding, dtype=dtype, out=out, threads=threads,
    )  # fmt: skip


def convolve(
    image: Any,
    kernel: Any,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str | Sequence[str] = "reflect",
    cval: complex = 0.0,
    origin: int | Sequence[int] = 0,
    axes: int | str | Sequence[int | str] | None = None,
    padding: Padding = "same",
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Any:
    """Filter by the flipped kernel: a convolution in the mathematical sense.

    Parameters
    ----------
    image : array_like, dask.array.Array, cupy.ndarray or xarray.DataArray
        As for :func:`correlate`.
    kernel : array_like
        Filter, which is flipped.
    rank : int, optional
        As for :func:`correlate`, and so are the next ten.
    tolerance : float, optional
        Largest relative error of the kernel.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str or sequence of str
        Border mode.
    cval : number
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter as in ``scipy.ndimage.convolve``.
    axes : int or sequence of int, optional
        Axes of `image` that the kernel runs along.
    padding : str
        Size of the result: ``"same"``, ``"valid"`` or ``"full"``.
    dtype : dtype, optional
        Data type of the result.
    out : ndarray, optional
        Array for the result.
    threads : int, optional
        Number of threads.

    Returns
    -------
    ndarray, dask.array.Array, cupy.ndarray or xarray.DataArray
        Result.

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
    >>> filters.convolve([1.0, 1.0], [1.0, 2.0, 3.0], padding="full", mode="constant")
    array([1., 3., 5., 3.])
    """
    return _filter(
        image, kernel, True, rank=rank, tolerance=tolerance, method=method, mode=mode, cval=cval,
        origin=origin, axes=axes, padding=padding, dtype=dtype, out=out, threads=threads,
    )  # fmt: skip


def separable_correlate(
    image: Any,
    factors: Sequence[Any],
    *,
    mode: str | Sequence[str] = "reflect",
    cval: complex = 0.0,
    origin: int | Sequence[int] = 0,
    axes: int | str | Sequence[int | str] | None = None,
    padding: Padding = "same",
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Any:
    """Filter by the outer product of vectors, which is never multiplied out.

    Parameters
    ----------
    image : array_like, dask.array.Array, cupy.ndarray or xarray.DataArray
        As for :func:`correlate`.
    factors : sequence of array_like
        One vector per axis of the kernel.
    mode : str or sequence of str
        Border mode; this and the next seven as for :func:`correlate`.
    cval : number
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter.
    axes : int or sequence of int, optional
        Axes of `image` that the factors run along.
    padding : str
        Size of the result: ``"same"``, ``"valid"`` or ``"full"``.
    dtype : dtype, optional
        Data type of the result.
    out : ndarray, optional
        Array for the result.
    threads : int, optional
        Number of threads.

    Returns
    -------
    ndarray, dask.array.Array, cupy.ndarray or xarray.DataArray
        Result.

    Raises
    ------
    ValueError, TypeError
        See :func:`correlate` and :class:`OuterProduct`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> volume = np.arange(60.0).reshape(3, 4, 5)
    >>> filters.separable_correlate(volume, [[1], [1, 2, 1], [-1, 0, 1]])[1, 1]
    array([4., 8., 8., 8., 4.])
    """
    return correlate(
        image, OuterProduct(factors), mode=mode, cval=cval, origin=origin, axes=axes,
        padding=padding, dtype=dtype, out=out, threads=threads,
    )  # fmt: skip


def _filter(
    image: Any,
    kernel: Any,
    flip: bool,
    *,
    rank: Any,
    tolerance: Any,
    method: choose.MethodName,
    mode: Any,
    cval: Any,
    origin: Any,
    axes: Any,
    padding: Any,
    dtype: Any,
    out: Any,
    threads: Any,
) -> Any:
    """Filter by a kernel or the flipped kernel; see :func:`correlate`."""
    given = image if labelled.is_data_array(image) else None
    if given is not None:
        image, axes = labelled.values_of(given), labelled.as_numbers(given, axes)
    image = _as_image(image)
    if out is not None and (given is not None or not engine.is_array(image)):
        kind = "Dask array: the result is computed later" if given is None else "DataArray"
        raise TypeError(f"out must be None for a {kind}")
    if not isinstance(kernel, OuterProduct):
        kernel = arguments.as_taps(kernel)
    is_complex = kernel.dtype.kind == "c"
    if is_complex and not flip:
        kernel = kernel.conj()
    if flip:
        kernel = kernel.flipped() if isinstance(kernel, OuterProduct) else np.flip(kernel)
    dtype = arguments.as_result_dtype(dtype, out, image, is_complex)
    is_complex = is_complex or image.dtype.kind == "c"
    call, imaginary = as_call(
        kernel, image.ndim, image.dtype, dtype, flip, rank, tolerance, method, mode, cval, origin,
        axes, padding, threads,
    )  # fmt: skip
    window = call.window
    if out is not None and out.shape != window.output_shape(image.shape):
        raise ValueError(
            f"out must have the shape of the result, {window.output_shape(image.shape)}, got "
            f"{out.shape}"
        )
    with np.errstate(all="ignore"), engine.device_context(image):
        if is_complex or dtype.kind == "c":
            result = _filter_parts(image, kernel, call, imaginary, dtype, out)
        else:
            result = run.correlate(image, kernel, call, dtype, out)
    return result if given is None else labelled.as_data_array(given, result, window)


def _as_image(image: Any) -> Any:
    """Return an array in memory, of Dask or on a GPU."""
    if chunked.is_dask_array(image):
        chunked.check_array("image", image)
        return image
    return image if engine.is_on_gpu(image) else arguments.as_array("image", image)


def _filter_parts(
    image: Any,
    kernel: Array | OuterProduct,
    call: Call,
    imaginary_cval: float,
    dtype: np.dtype[Any],
    out: Any,
) -> Any:
    """Filter the real and imaginary parts of an image by those of a kernel."""
    if call.rank is not None and kernel.dtype.kind == "c":
        raise ValueError(f"rank must be None for a complex kernel, got {call.rank}")
    images = [image.real, image.imag] if image.dtype.kind == "c" else [image]
    kernels = [kernel.real, kernel.imag] if kernel.dtype.kind == "c" else [kernel]
    fills = call.cval, imaginary_cval

    def term(i: int, k: int) -> Any:
        if i == len(images) or k == len(kernels):
            return None
        one = call._replace(cval=fills[i])
        return run.correlate(images[i], kernels[k], one, call.work)

    real, imaginary = term(0, 0), term(0, 1)
    if len(images) == 2:
        rest = term(1, 1)
        real = real if rest is None else real - rest
        imaginary = term(1, 0) if imaginary is None else imaginary + term(1, 0)
    result = conversion.as_complex(real, imaginary, dtype)
    if out is None:
        return result
    out[...] = result
    return out


def filter_image(
    image: Any,
    kernel: Any,
    *,
    tolerance: float | None = None,
    method: choose.MethodName = "auto",
    mode: str | Sequence[str] = "reflect",
    cval: complex = 0.0,
    channel_axis: int | None = None,
    padding: Padding = "same",
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Any:
    """Filter a picture by the fastest method within a tolerance.

    Parameters
    ----------
    image : array_like, shape (height, width) or (height, width, colours)
        Picture, as for :func:`correlate`, which accepts volumes and series as well.
    kernel : array_like, shape (h, w)
        Filter, as a correlation: not flipped.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that runs; round-off by default.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    mode : str or sequence of str
        Border mode, by scipy.ndimage's names; one, or those of the rows and of the columns.
    cval : number
        Border value of mode ``"constant"``.
    channel_axis : int, optional
        Axis of the colours, if it is not the last one.
    padding : str
        Size of the result: ``"same"``, ``"valid"`` or ``"full"``.
    dtype : dtype, optional
        Data type of the result; that of `out` or `image` by default.
    out : ndarray, optional
        Array for the result, of any data type.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray, dask.array.Array, cupy.ndarray or xarray.DataArray
        Result.

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
    image = image if labelled.is_data_array(image) else _as_image(image)
    if image.ndim not in (2, 3):
        raise ValueError(
            f"image must be (height, width) or (height, width, colours), got {image.shape}: "
            "filters.correlate takes any number of axes"
        )
    if np.ndim(kernel) != 2:
        raise ValueError(f"kernel must have two axes, got shape {np.shape(kernel)}")
    axes = None
    if channel_axis is not None:
        (colours,) = arguments.as_axes([channel_axis], image.ndim, 1)
        axes = [a for a in range(image.ndim) if a != colours]
        if len(axes) != 2:
            raise ValueError(f"channel_axis must be None for a picture of shape {image.shape}")
    elif image.ndim == 3 and image.shape[2] > MAX_COLOURS >= image.shape[0]:
        raise ValueError(
            f"image must be (height, width, colours), got {image.shape}: give channel_axis=0 "
            "if the first axis is that of the colours, or channel_axis=2"
        )
    return correlate(
        image, kernel, tolerance=tolerance, method=method, mode=mode, cval=cval, axes=axes,
        padding=padding, dtype=dtype, out=out, threads=threads,
    )  # fmt: skip
