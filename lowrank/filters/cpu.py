"""Filters of NumPy arrays, on the engine."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core.arrays import as_native_order
from lowrank.engine.machine import least_saving
from lowrank.filters import boxes, choose, conversion, multirate
from lowrank.filters.outer import (
    OuterPasses,
    OuterProduct,
    compile_outer,
    outer_chain,
    outer_passes,
)
from lowrank.filters.request import (
    Call,
    CompiledFilter,
    FilterRequest,
    compile_request,
    plan_request,
)

LIGHT_SAMPLES = 1 << 16  # of images that a plan would take longer than the filter
#: Seconds that a parallel region of a filter saves at least: on a busy machine it may wait for
#: milliseconds.
LEAST_SAVING = 2e-4


def correlate(
    image: Array, kernel: Array | OuterProduct, call: Call, dtype: np.dtype[Any], out: Array | None
) -> Array:
    """Filter an image; the window is that of results of its size.

    Parameters
    ----------
    image : ndarray
        Real, not empty.
    kernel : ndarray or OuterProduct
        Kernel over 1 to 3 axes; an outer product runs by its factors.
    call : Call
        Other arguments of :func:`lowrank.filters.correlate`, checked.
    dtype : dtype
        Data type of the result.
    out : ndarray or None
        Array of this type for the result.

    Returns
    -------
    ndarray
        `out`, or a new array.
    """
    out = np.empty(image.shape, dtype) if out is None else out
    target = np.asarray(out)
    if np.may_share_memory(image, target):
        image = image.copy()
    if isinstance(kernel, OuterProduct):
        run_outer(image, kernel, call, target)
    else:
        _run_planned(image, kernel, call, target)
    return out


def run_outer(image: Array, kernel: OuterProduct, call: Call, out: Array) -> None:
    """Filter by the vectors of an outer product."""
    window, work = call.window, call.work
    if multirate.is_chosen(image, kernel, call):
        x = image.astype(work, copy=False)
        y = multirate.filter_gaussian(
            x, kernel.factors, window.along, window.origins, window.border, call.cval, call.threads
        )
        out[...] = conversion.as_image(y, out.dtype)
        return
    if kernel.equal_tap is not None and boxes.filter_box(
        image, out, window.along, window.taps, window.origins, window.border, call.cval,
        kernel.equal_tap, work, call.threads,
    ):  # fmt: skip
        return
    passes = outer_passes(kernel.key, window, work.str)
    if passes.takes_images(image.shape):
        _run_passes(passes, image, call, out, math.isfinite(call.cval))
        return
    # Tiles of a plan would consist of halo where a factor is as long as its axis.
    is_long = any(2 * n > image.shape[a] for n, a in zip(window.taps, window.along))
    # Taps of zero are skipped.
    spreads = passes.has_zeros and image.dtype.kind == "f" and not _is_finite(image)
    if is_long or image.size <= LIGHT_SAMPLES or spreads:
        _run_passes(passes, image, call, out, False)
        return
    spatial = tuple(image.shape[a] for a in window.along)
    channels = image.size // math.prod(spatial)
    interleaved = window.along == tuple(range(kernel.ndim)) and out.flags.c_contiguous
    chain = outer_chain(kernel.key, window, work.str, call.cval)
    compiled = compile_outer(chain, work.str, spatial, channels, interleaved, call.threads)
    _run(CompiledFilter(*compiled), image, call, out, interleaved and channels == 1)


def _run_passes(
    passes: OuterPasses, image: Array, call: Call, out: Array, as_integers: bool
) -> None:
    """Filter without a plan, and without conversion of integers if asked for."""
    if as_integers:
        x = conversion.as_engine_input(image, call.work)
        dtype = conversion.result_dtype(out.dtype, call.work)
    else:
        dtype = call.work
        x = image.astype(dtype, copy=False)
    result = out if out.dtype == dtype and out.flags.carray else np.empty(out.shape, dtype)
    threads, saving = 1, 0.0
    if image.size > LIGHT_SAMPLES and call.threads != 1:
        threads, saving = call.threads or 0, max(least_saving(), LEAST_SAVING)
    is_done = passes.run(
        np.ascontiguousarray(x), result, passes.axes, passes.before, passes.border, call.cval,
        threads, saving,
    )  # fmt: skip
    if not is_done:
        _run_passes(passes, image, call, out, False)
    elif result is not out:
        out[...] = conversion.as_image(result, out.dtype)


def _run_planned(image: Array, kernel: Array, call: Call, out: Array) -> None:
    """Filter by the method that is predicted to be fastest of those that suit the image."""
    request = call.request(kernel, image.shape, out.flags.c_contiguous)
    chosen, exact = plan_request(request)
    is_exact = not _is_rounded(image, call, out) and not _can_run(chosen, image, request)
    if is_exact and exact.multiplies_zeros and not _is_finite(image):
        _sum_taps(image, kernel, call, out)
        return
    if is_exact and exact.block is not None and _overflows(exact, image, request):
        if call.work == np.float64:
            raise ValueError("method must be auto or direct, got 'fft', whose sums would overflow")
        _run_planned(image, kernel, call._replace(work=np.dtype(np.float64)), out)
        return
    compiled = compile_request(request, is_exact)
    _run(compiled, image, call, out, request.interleaved and request.channels == 1)


def _is_rounded(image: Array, call: Call, out: Array) -> bool:
    """Return whether integers are rounded, and too small for rounding errors to matter."""
    if image.dtype.kind == "f" or out.dtype.kind == "f" or image.dtype.itemsize > 4:
        return False
    limits = np.iinfo(np.uint8 if image.dtype.kind == "b" else image.dtype)
    return call.window.border != "constant" or limits.min <= call.cval <= limits.max


def _can_run(method: choose.FilterMethod, image: Array, request: FilterRequest) -> bool:
    """Return whether a method gives every output of an image to the rounding of direct sums."""
    if not method.spread and not method.multiplies_zeros:
        return True
    if not _is_finite(image):
        return False
    if method.spread and _overflows(method, image, request):
        return False
    if not (method.spread and request.is_strict):
        return True
    least, most = _range(image, request)
    smallest = min(abs(least), abs(most)) if least * most > 0 else 0.0
    return method.spread * max(abs(least), abs(most)) <= smallest


def _overflows(method: choose.FilterMethod, image: Array, request: FilterRequest) -> bool:
    """Return whether sums of transforms or terms may overflow where direct sums do not."""
    kernel = np.frombuffer(request.kernel, request.dtype)
    terms = math.prod(method.block or request.taps)
    largest = max(map(abs, _range(image, request)))
    return largest * float(np.abs(kernel).sum()) * terms >= float(np.finfo(request.dtype).max)


def _range(image: Array, request: FilterRequest) -> tuple[float, float]:
    """Return the smallest and the largest sample, also of the border."""
    samples = [float(image.min()), float(image.max())]
    if request.border == "constant":
        samples.append(request.cval)
    return min(samples), max(samples)


def _is_finite(image: Array) -> bool:
    """Return whether no sample is NaN or infinite; sums of large samples would overflow."""
    return math.isfinite(float(image.min())) and math.isfinite(float(image.max()))


def _sum_taps(image: Array, kernel: Array, call: Call, out: Array) -> None:
    """Filter by direct sums that skip taps of zero.

    Only for images that contain NaN or infinities, and kernels with zeros.
    """
    x = conversion.pad(image.astype(call.work), call.window, call.cval, call.work)
    total = np.zeros(image.shape, call.work)
    for index in itertools.product(*map(range, kernel.shape)):
        tap = call.work.type(kernel[index])
        if tap:
            part = [slice(None)] * x.ndim
            for axis, i in zip(call.window.along, index):
                part[axis] = slice(i, i + image.shape[axis])
            total += tap * x[tuple(part)]
    out[...] = conversion.as_image(total, out.dtype)


def _run(compiled: CompiledFilter, image: Array, call: Call, out: Array, is_plain: bool) -> None:
    """Run a plan on `image`, channel by channel unless they are interleaved."""
    x = conversion.as_engine_input(image, call.work)
    dtype = conversion.result_dtype(out.dtype, call.work)
    is_direct = out.dtype == dtype and out.flags.aligned
    result = as_native_order(out) if is_direct else np.empty(out.shape, dtype)
    shape = (-1, 1, *compiled.shape)
    if compiled.interleaved or is_plain:
        compiled.run(np.ascontiguousarray(x).reshape(shape), result.reshape(shape))
    else:
        last = range(-len(call.window.along), 0)
        x, y = (np.moveaxis(a, call.window.along, last) for a in (x, result))
        channels = y.reshape(shape)  # a copy if `result` is strided
        compiled.run(x.reshape(shape), channels)
        if not np.may_share_memory(channels, result):
            y[...] = channels.reshape(y.shape)
    if not is_direct:
        out[...] = conversion.as_image(result, out.dtype)
