"""Normalised filters: weighted means of the samples that are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.engine import dask as chunked
from lowrank.filters import arguments, inputs
from lowrank.filters.bank import correlate_bank
from lowrank.filters.outer import OuterProduct, as_outer_product


def normalised_correlate(
    image: Any,
    kernel: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    fill_value: float = math.nan,
    mode: str | Sequence[str] = "constant",
    axes: Sequence[int] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Array:
    r"""Filter an image with missing samples: the mean of those under the kernel, weighted by it.

    .. math:: y_i = \frac{\sum_j k_j w_{i+j} x_{i+j}}{\sum_j k_j w_{i+j}}

    Parameters
    ----------
    image : array_like, numpy.ma.MaskedArray, dask.array.Array or xarray.DataArray
        Real, of any number of axes.  NaN counts as missing; bool counts as 0 and 1.  A Dask array
        gives a lazy one, a DataArray an array without its names.
    kernel : array_like
        Filter without negative taps, as for :func:`correlate`.  Its scale does not matter.
    mask : array_like of bool, optional
        True where samples are missing; broadcast to the shape of `image`.
    weights : array_like, optional
        Weights of the samples, finite and at least 0, such as inverse variances; broadcast to the
        shape of `image`.  1 by default.
    fill_value : float
        Result where all samples under the kernel are missing.
    mode : str or sequence of str
        Border mode, one for all axes or one per axis: in ``"constant"`` samples beyond the border
        are missing (the renormalised border); others of scipy.ndimage's modes extend the image and
        its weights, see :func:`correlate`.
    axes : sequence of int, optional
        Axes of `image` that the kernel runs along, as for :func:`correlate`.
    dtype : dtype, optional
        float32 or float64, of the computation and the result.  By default float32 for float32,
        float16, bool and integers of up to 16 bits, else float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    ndarray, numpy.ma.MaskedArray or dask.array.Array
        Means, of the shape of `image`.  For a masked array they are masked where all samples under
        the kernel are missing.

    Raises
    ------
    TypeError, ValueError
        If the kernel has negative taps or none above 0, weights are negative or not finite, or an
        argument is invalid.

    Notes
    -----
    Missing samples get a value as well, if there is one near them: holes are filled from their
    edges.  ``np.where(np.isnan(image), np.nan, result)`` keeps them.  Sums are direct or those of
    separable passes, never transforms, so that a weight of 0 is exactly 0: values do not leak into
    a hole, and zeros stay zeros.  An output whose samples have less than 1e-31 (float32) or 1e-292
    (float64) of the weight that a whole window of the heaviest samples would have counts as
    missing: rounding would decide it.  Infinities are samples, and so are the means over them.

    With an odd kernel and ``mode="constant"`` interior values are those of
    ``astropy.convolution.convolve(image, kernel[::-1, ::-1], nan_treatment="interpolate")``, which
    flips the kernel and counts samples beyond the border as 0 with full weight.

    A negative tap would let the sum of weights vanish between valid samples.  For a derivative of
    an image with holes, take that of the result.

    Memory: six images in `dtype`.

    References
    ----------
    .. [1] H. Knutsson, C.-F. Westin, "Normalized and differential convolution", CVPR 1993.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> image = np.array([[1.0, 1.0, np.nan, 4.0, 4.0]])
    >>> filters.normalised_correlate(image, filters.box([1, 3]))
    array([[1. , 1. , 2.5, 4. , 4. ]])
    >>> photons = np.ma.masked_equal([0, 7, 7, 0, 0, 0], 0)
    >>> filters.normalised_correlate(photons, [1, 2, 1])
    masked_array(data=[7.0, 7.0, 7.0, 7.0, --, --],
                 mask=[False, False, False, False,  True,  True],
           fill_value=1e+20)
    """
    is_masked = isinstance(image, np.ma.MaskedArray)
    if is_masked:
        missing = np.ma.getmaskarray(image)
        mask = missing if mask is None else missing | _as_mask(mask, image.shape)
        image = np.ma.getdata(image)
    x, dtype = inputs.as_samples(image, dtype)
    taps = kernel if isinstance(kernel, OuterProduct) else arguments.as_taps(kernel)
    if taps.dtype.kind == "c":
        raise TypeError(f"kernel must be real, got {taps.dtype}")
    along = arguments.as_axes(axes, x.ndim, taps.ndim)
    taps, total = _scale(taps)
    fill_value = arguments.as_real("fill_value", fill_value)
    weight = _as_weights(weights, x.shape, dtype)
    is_valid = weight > 0
    if mask is not None:
        is_valid = is_valid & ~_as_mask(mask, x.shape)
    if x.dtype.kind == "f":
        is_valid = is_valid & ~np.isnan(x)
    weight = np.where(is_valid, weight, dtype.type(0))
    values = np.where(is_valid, x.astype(dtype), dtype.type(0)) * weight
    sums = correlate_bank(
        np.stack([values, weight]), [taps], mode=mode, axes=[a + 1 for a in along], dtype=dtype,
        threads=threads,
    )[0]  # fmt: skip
    limits = np.finfo(dtype)
    has_weight = sums[1] > total * float(limits.tiny) / float(limits.eps)
    means = sums[0] / np.where(has_weight, sums[1], dtype.type(1))
    result: Array = np.where(has_weight, means, dtype.type(fill_value))
    return np.ma.MaskedArray(result, ~has_weight) if is_masked else result


def _scale(kernel: Any) -> tuple[Any, float]:
    """Return a kernel times a power of two, and its sum, which is at most 1.

    Then sums of large samples do not overflow.
    """
    if not isinstance(kernel, OuterProduct):
        kernel = as_outer_product(kernel, arguments.round_off(kernel)) or kernel
    is_outer = isinstance(kernel, OuterProduct)
    factors = kernel.factors if is_outer else [kernel.astype(np.float64)]
    least = most = 1.0
    for f in factors:
        ends = [a * float(b) for a in (least, most) for b in (f.min(), f.max())]
        least, most = min(ends), max(ends)
    if least < 0:
        raise ValueError(f"kernel must not have negative taps, got {least:g}")
    if most == 0:
        raise ValueError("kernel must have a tap above 0, got zeros")
    exponents = [math.frexp(abs(float(f.sum())))[1] for f in factors]
    scaled = [np.ldexp(f, -e) for f, e in zip(factors, exponents)]
    total = math.prod(float(f.sum()) for f in scaled)
    return OuterProduct(scaled) if is_outer else scaled[0].astype(kernel.dtype), total


def _as_mask(mask: Any, shape: Sequence[int]) -> Array:
    """Return a mask of the shape of an image."""
    m = mask if chunked.is_dask_array(mask) else arguments.as_array("mask", mask)
    if m.dtype != bool:
        raise TypeError(f"mask must be bool, True where samples are missing, got {m.dtype}")
    return _broadcast("mask", m, shape)


def _as_weights(weights: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return weights of the shape of an image, of which the largest is between 0.5 and 1."""
    if weights is None:
        return np.broadcast_to(dtype.type(1), shape)
    if chunked.is_dask_array(weights):
        raise TypeError(
            "weights must be a NumPy array, got a Dask array: give a mask, or no chunks"
        )
    w = arguments.as_array("weights", weights)
    if w.dtype.kind not in "biuf":
        raise TypeError(f"weights must be real, got {w.dtype}")
    w = _broadcast("weights", w, shape).astype(np.float64)
    if not w.size:
        return w.astype(dtype)
    least, most = float(w.min()), float(w.max())
    if not 0 <= least <= most < math.inf:
        raise ValueError(f"weights must be finite and at least 0, got {least:g} to {most:g}")
    _, exponent = math.frexp(most)
    scaled: Array = np.ldexp(w, -exponent).astype(dtype)
    return scaled


def _broadcast(name: str, value: Array, shape: Sequence[int]) -> Array:
    try:
        return np.broadcast_to(value, tuple(shape))
    except ValueError:
        raise ValueError(
            f"{name} must have the shape of the image, {tuple(shape)}, or broadcast to it, got "
            f"{value.shape}"
        ) from None
