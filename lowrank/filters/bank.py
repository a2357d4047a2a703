"""Banks of filters: several results from one load of the image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.threads import as_threads
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, inputs, shared
from lowrank.filters.apply import correlate
from lowrank.filters.outer import OuterProduct, as_outer_product
from lowrank.filters.shared import KEPT, Border, Factors

#: Most taps of kernels that are not separable and run together, by direct sums: 1.2 to 1.5 times
#: as fast as one by one for 7x7 to 25x25 taps on 512^2.  Longer ones may be faster by transforms.
JOINT_TAPS = 1024
SCIPY_MODES = {mode: name for name, mode in reversed(arguments.MODES.items())}


def correlate_bank(
    image: Any,
    kernels: Sequence[Any],
    *,
    tolerance: float | None = None,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    axes: Sequence[int] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Filter an image by several kernels, with what they have in common computed once.

    Parameters
    ----------
    image : array_like, dask.array.Array or xarray.DataArray
        Real, of any number of axes; bool counts as 0 and 1.  A Dask array gives a lazy one, a
        DataArray an array without its names.
    kernels : sequence of array_like
        Filters over the same number of axes, of any sizes, as for :func:`correlate`.
    tolerance : float, optional
        Largest relative Frobenius error of each kernel that is not separable; round-off by
        default.
    mode : str or sequence of str
        Border mode by scipy.ndimage's names, one for all axes or one per axis; see
        :func:`correlate`.
    cval : float
        Border value of mode ``"constant"``.
    axes : sequence of int, optional
        Axes of `image` that the kernels run along, as for :func:`correlate`.
    dtype : dtype, optional
        float32 or float64, of the computation and the result.  By default float32 for float32,
        float16, bool and integers of up to 16 bits, else float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray or dask.array.Array, shape (len(kernels), \*image.shape)
        One result per kernel, stacked along a new first axis.

    Raises
    ------
    TypeError, ValueError
        If there is no kernel, kernels have different numbers of axes, or an argument is invalid.

    Notes
    -----
    Separable kernels run as passes along single axes.  Passes that several kernels begin with run
    once: Gaussian derivatives of a volume up to second order take 19 passes instead of 30.  Other
    kernels of one shape run together by direct sums, which load each sample once for all of them,
    up to 1024 taps; if a `tolerance` is given, each runs by its own fastest method instead.

    Memory: the image in `dtype` and the result.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> image = np.random.default_rng(0).random((64, 64))
    >>> angles = np.linspace(0, np.pi, 8, endpoint=False)
    >>> bank = [filters.gabor(2.0, 5.0, angle=a) for a in angles]
    >>> responses = filters.correlate_bank(image, bank)
    >>> responses.shape
    (8, 64, 64)
    >>> bool(np.allclose(responses[3], filters.correlate(image, bank[3])))
    True
    """
    x, dtype = inputs.as_samples(image, dtype)
    given = [
        k if isinstance(k, OuterProduct) else arguments.as_taps(k)
        for k in inputs.as_sequence_of("kernels", kernels)
    ]
    counts = sorted({k.ndim for k in given})
    if len(counts) > 1:
        raise ValueError(f"kernels must have the same number of axes, got {counts}")
    along = arguments.as_axes(axes, x.ndim, counts[0])
    border = inputs.as_border(mode, cval, len(along))
    tolerance = arguments.as_tolerance(tolerance, None)
    threads = as_threads(threads)
    if any(k.dtype.kind == "c" for k in given):  # a correlation conjugates them
        parts = [np.real(k) for k in given] + [-np.imag(k) for k in given]
        values = _filter_each(x, parts, along, border, tolerance, dtype, threads)
        return values[: len(given)] + 1j * values[len(given) :]
    return _filter_each(x, given, along, border, tolerance, dtype, threads)


def _filter_each(
    x: Array,
    given: Sequence[Any],
    along: Ints,
    border: Border,
    tolerance: float | None,
    dtype: np.dtype[Any],
    threads: int | None,
) -> Array:
    """Filter by real kernels; see :func:`correlate_bank`."""
    if chunked.is_dask_array(x):
        return _filter_lazily(x, given, along, border, tolerance, dtype, threads)
    factors = [_factors(k) for k in given]
    separable = [f for f in factors if f is not None]
    results = filter_shared(x, separable, along, border, dtype, threads)
    if len(separable) == len(given):
        return results
    out = np.empty((len(given), *x.shape), dtype)
    out[[f is not None for f in factors]] = results
    x = np.ascontiguousarray(x, dtype)
    by_shape: dict[Ints, list[int]] = {}
    for number, f in enumerate(factors):
        if f is None:
            by_shape.setdefault(given[number].shape, []).append(number)
    for numbers in by_shape.values():
        some = [given[number] for number in numbers]
        if tolerance is None and _runs_jointly(x, some, along, border):
            images = shared.as_batch(x)
            key = tuple(k.astype(dtype).tobytes() for k in some)
            skipped = x.ndim - (images.ndim - 2)
            axes = tuple(a - skipped for a in along)
            spatial = images.shape[2:]
            run = _compile_jointly(
                key, some[0].shape, dtype.str, spatial, axes, border.modes[0], border.value, threads
            )
            out[numbers] = run(images).swapaxes(0, 1).reshape(len(some), *x.shape)
        else:
            for number, k in zip(numbers, some):
                out[number] = _correlate(x, k, along, border, tolerance, dtype, threads)
    return out


def _correlate(
    x: Array,
    kernel: Any,
    axes: Ints,
    border: Border,
    tolerance: float | None,
    dtype: np.dtype[Any],
    threads: int | None,
) -> Array:
    result: Array = correlate(
        x, kernel, tolerance=None if isinstance(kernel, OuterProduct) else tolerance,
        mode=[SCIPY_MODES[m] for m in border.modes], cval=border.value, axes=axes, dtype=dtype,
        threads=threads,
    )  # fmt: skip
    return result


def _filter_lazily(
    image: Any,
    kernels: Sequence[Any],
    axes: Ints,
    border: Border,
    tolerance: float | None,
    dtype: np.dtype[Any],
    threads: int | None,
) -> Array:
    """Stack lazy results, one per kernel."""
    return np.stack(
        [_correlate(image, k, axes, border, tolerance, dtype, threads) for k in kernels]
    )


def _runs_jointly(x: Array, kernels: Sequence[Any], axes: Ints, border: Border) -> bool:
    """Return whether kernels of one shape run together, and compute the same."""
    is_suited = len(kernels) > 1 and kernels[0].size <= JOINT_TAPS and len({*border.modes}) == 1
    if not is_suited or not shared.fits_engine(x, axes):
        return False
    return all(k.all() for k in kernels) or shared.is_finite(x)


@functools.lru_cache(KEPT)
def _compile_jointly(
    kernels: tuple[bytes, ...],
    taps: Ints,
    dtype: str,
    spatial: Ints,
    axes: Ints,
    mode: PaddingMode,
    value: float,
    threads: int | None,
) -> engine.Runner:
    """Compile kernels of one shape as a stage with one output channel each."""
    ndim, padding = len(spatial), [(0, 0)] * len(spatial)
    for a, n in zip(axes, taps):
        padding[a] = (n // 2, n - 1 - n // 2)
    lines = [np.frombuffer(k, dtype).reshape(taps) for k in kernels]
    # Kernels with axes of one tap for those that are not filtered.
    others = tuple(range(len(taps), ndim))
    free = [a for a in range(ndim) if a not in axes]
    weight = np.array(
        [np.moveaxis(np.expand_dims(k, others), range(ndim), [*axes, *free]) for k in lines]
    )
    geometry = Geometry.of(ndim, padding=padding, padding_mode=mode, value=value)
    stage = Stage(weight[:, None], geometry)
    return engine.plan([stage], (1, *spatial), np.dtype(dtype), [Epilogue()], threads)


def filter_shared(
    image: Array,
    kernels: Sequence[Factors],
    axes: Ints,
    border: Border,
    dtype: np.dtype[Any],
    threads: int | None,
    out: Array | None = None,
) -> Array:
    """Filter an image by outer products, given as the bytes of their factors.

    Parameters
    ----------
    image : ndarray or dask.array.Array
        Real.
    kernels : sequence of tuple of bytes
        float64 taps of the factors of each outer product, one per axis.
    axes : tuple of int
        Axes of the image that the factors run along.
    border : Border
        Modes and value of the border.
    dtype : dtype
        float32 or float64, of the result.
    threads : int or None
        Number of threads.
    out : ndarray, optional
        C-contiguous array of `dtype` for the results.

    Returns
    -------
    ndarray or dask.array.Array, shape (kernels, \\*image.shape)
    """
    if chunked.is_dask_array(image):
        outer = [OuterProduct([np.frombuffer(f) for f in k]) for k in kernels]
        return _filter_lazily(image, outer, axes, border, None, dtype, threads)
    work = dtype
    for taps in map(np.frombuffer, {f for k in kernels for f in k}):
        largest = float(np.abs(taps).max())
        if largest and not arguments.SINGLE[0] < largest < arguments.SINGLE[1]:
            work = np.dtype(np.float64)
    x = np.ascontiguousarray(image, work)
    out = np.empty((len(kernels), *x.shape), dtype) if out is None else out
    results = out if work == dtype else np.empty(out.shape, work)
    shared.correlate_shared(x, kernels, axes, border, threads, results)
    if results is not out:
        out[...] = results
    return out


def _factors(kernel: Any) -> Factors | None:
    """Return the bytes of the factors of an outer product, or None."""
    if not isinstance(kernel, OuterProduct):
        kernel = as_outer_product(kernel, arguments.round_off(kernel))
    return None if kernel is None else kernel.key
