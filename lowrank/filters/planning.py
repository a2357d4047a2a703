"""Plans of filters, without images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank.core.geometry import as_integers
from lowrank.filters import arguments
from lowrank.filters.choose import FilterPlan, MethodName
from lowrank.filters.request import as_call
from lowrank.filters.window import Padding


def plan_filter(
    kernel: Any,
    shape: Sequence[int],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: MethodName = "auto",
    dtype: Any = np.float32,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    axes: int | Sequence[int] | None = None,
    padding: Padding = "same",
    batch: int = 1,
    threads: int | None = None,
) -> FilterPlan:
    """Compare the methods for a filter, and show which one :func:`correlate` plans.

    Parameters
    ----------
    kernel : array_like
        Real filter over 1, 2 or 3 axes.
    shape : sequence of int
        Shape of the images.  Axes without taps are channels.
    rank : int, optional
        Number of separable terms; the plan is then their best sum alone.
    tolerance : float, optional
        Largest relative Frobenius error of the kernel that runs; round-off by default.
    method : str
        ``"auto"``, ``"direct"``, ``"separable"`` or ``"fft"``.
    dtype : dtype
        Data type of the images, which decides the precision of the computation.
    mode : str or sequence of str
        Border mode; this and the next four as for :func:`correlate`.
    cval : float
        Border value of mode ``"constant"``.
    origin : int or sequence of int
        Shift of the filter.
    axes : int or sequence of int, optional
        Axes that the kernel runs along.
    padding : str
        Size of the result: ``"same"``, ``"valid"`` or ``"full"``.
    batch : int
        Number of channels besides those of `shape`, adjacent in memory.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    FilterPlan
        Methods with their errors and predicted times; prints as a table.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, or no form of `method` is within the tolerance.

    Notes
    -----
    Some filters need no plan, and are not in the table: outer products along one or two axes run by
    bands of rows, boxes by sums of windows, and wide Gaussians with a `tolerance` by resampling.

    Times are predictions of :mod:`lowrank.perfmodel`.  The bound in grey levels holds for every
    image with values from 0 to 255: it is 255 times the larger of the sums of the positive and
    of the negative part of the kernel's error, and images of 0 and 255 attain it.

    Images of up to 2^14 samples run by the fewest MACs, without transforms: predictions would take
    longer than the filter.  Without a rank, a tolerance or a method, floating-point images with
    NaN, infinities, or small samples beside large ones run by direct sums or by the factors of an
    outer product.

    Examples
    --------
    >>> from lowrank import filters
    >>> plan = filters.plan_filter(filters.log(2.0), (1000, 1000))
    >>> sorted({m.method for m in plan.methods})
    ['direct', 'fft', 'separable']
    """
    k = arguments.as_kernel(kernel)
    if np.ndim(shape) != 1:
        raise ValueError(f"shape must be the sizes of the image's axes, got {np.ndim(shape)} axes")
    sizes = as_integers("shape", shape, np.size(shape))
    if min(sizes, default=1) < 1:
        raise ValueError(f"shape must be at least 1 along every axis, got {sizes}")
    if len(sizes) < k.ndim:
        raise ValueError(f"shape must have at least the kernel's {k.ndim} axes, got {sizes}")
    (channels,) = as_integers("batch", batch, 1)
    if channels < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    kind = arguments.as_dtype("dtype", dtype)
    call, _ = as_call(
        k, len(sizes), kind, kind, False, rank, tolerance, method, mode,
        arguments.as_real("cval", cval), origin, axes, padding, threads,
    )  # fmt: skip
    window = call.window
    window.output_shape(sizes)  # raises for images that are too short
    padded = sizes
    if not call.is_native:
        call, padded = call.inner, window.padded_shape(sizes)
    request = call.request(k, (*padded, channels), True)
    plan = request.plan(is_rough=False)
    if request.is_small:
        rough = request.plan().choice
        choice = next(m for m in plan.methods if (m.name, m.rank) == (rough.name, rough.rank))
        plan = replace(plan, choice=choice)
    return replace(plan, shape=tuple(sizes[a] for a in window.along))
