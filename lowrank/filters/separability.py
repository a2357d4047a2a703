"""Separable forms of a filter, and its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank import selection
from lowrank.factorization import Factorization
from lowrank.filters import arguments, choose
from lowrank.filters.window import as_convolution, as_window


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
        Filter over 1, 2 or 3 axes; integers are converted to float64.
    rank : int, optional
        Number of separable terms: the best filter of that rank over two axes, a CP sum over
        three.
    tolerance : float, optional
        Largest relative Frobenius error of the result, which is then the cheapest chain of any
        family and variant.  Default, if `rank` is not given either: round-off.
    shape : sequence of int, optional
        Size of the images for which costs are compared; twice the kernel by default.
    mode : str
        Border mode; this and the next two as for :func:`correlate`.
    cval : float
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter.

    Returns
    -------
    Factorization
        Chain with one input and one output channel; the dense kernel if no chain is cheaper.

    Raises
    ------
    ValueError, TypeError
        If the kernel is empty, not finite or not real, or the rank is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> sobel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    >>> [s.weight.shape for s in filters.separate(sobel).stages]
    [(1, 1, 3, 1), (1, 1, 1, 3)]
    """
    k = arguments.as_kernel(kernel)
    tolerance = arguments.as_tolerance(tolerance, rank)
    axes = tuple(range(k.ndim))
    window = as_window(k.shape, k.ndim, axes, origin, mode, "same")
    if not window.has_one_border:
        raise ValueError(f"mode must be one border mode for all axes of a chain, got {mode}")
    conv = as_convolution(k, window, arguments.as_real("cval", cval))
    if rank is not None:
        return choose.fit_rank(conv, rank)
    shape = tuple(2 * n for n in k.shape) if shape is None else tuple(shape)
    tolerance = arguments.round_off(k) if tolerance is None else tolerance
    _, candidate = selection.choose(
        conv, shape, max_error=tolerance, families=choose.filter_families(), axis="macs"
    )
    return candidate.build()


def rank(kernel: Any, *, tolerance: float | None = None) -> int:
    """Return the number of separable terms of a kernel; 1 means that it is separable.

    Parameters
    ----------
    kernel : array_like
        Filter over 1, 2 or 3 axes.
    tolerance : float, optional
        Singular values up to this share of the largest count as zero.  Default: round-off in
        the kernel's precision.

    Returns
    -------
    int
        Exact over 1 and 2 axes, and for values of 0 and 1.  Over three axes larger values are
        lower bounds: the largest rank of the three unfoldings.

    Raises
    ------
    ValueError, TypeError
        If the kernel is empty, not finite or not real, or the tolerance is negative.

    Examples
    --------
    >>> from lowrank import filters
    >>> [filters.rank(k) for k in (filters.gauss(2.0), filters.log(2.0), filters.disk(5.0))]
    [1, 2, 4]
    """
    k = arguments.as_kernel(kernel)
    if tolerance is None:
        tolerance = arguments.round_off(k)
    elif not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    largest = np.abs(k).max()
    if largest == 0:
        return 0
    k = (k / largest).astype(np.float64)  # its squares neither overflow nor underflow
    largest_rank = 1
    for axis in range(k.ndim):
        s = np.linalg.svd(np.moveaxis(k, axis, 0).reshape(k.shape[axis], -1), compute_uv=False)
        largest_rank = max(largest_rank, int((s > tolerance * s[0]).sum()))
    return largest_rank
