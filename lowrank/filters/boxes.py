"""Box filters, whose time per sample does not depend on the size of their windows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Array, Ints
from lowrank.engine.machine import fork_join_seconds
from lowrank.filters import conversion

#: Taps of all passes from which sums of windows are faster than MACs on floating-point images of
#: 512^2 to 4096^2, grey and in colours.  Of uint8 and uint16 they always are, and those of wider
#: integers are exact in float64.
LEAST_TAPS = 24
KEPT = 256  # latest filters whose plans are kept
SECONDS = 5e-10  # per sample and axis in float32, of one thread
NAMES = {"f": "float32", "d": "float64", "B": "uint8", "H": "uint16"}  # dtype.name takes 5 us
SUMS = 1 << 32  # of integers are below it
SINGLE_SUMS, SINGLE_DIVISOR = 1 << 24, 1 << 16  # whose quotients are rounded once in float32
EXACT_FACTOR = 1 << 14  # divisors, at most, that a factor in float32 replaces


class Window(NamedTuple):
    """A window along one axis of an array."""

    axis: int
    size: int
    before: int  # samples ahead of the output
    border: str
    fill: float  # border value: of the input of its pass


class Scale(NamedTuple):
    """Factors of the samples and of their sums, and the divisor of these."""

    before: float = 1.0
    after: float = 1.0
    divisor: float = 1.0

    @staticmethod
    def exact(tap: float) -> Scale:
        """Return the scale of a box of equal taps: taps of 1 / n are a division, rounded once."""
        inverse = round(1 / tap)
        if abs(inverse) > 1 and 1 / inverse == tap:
            return Scale(1.0, 1.0, inverse)
        return Scale(1.0, tap)

    @staticmethod
    def of(tap: float) -> Scale:
        """Return the same scale with a power of two ahead of the sums, up to the tap.

        It keeps sums of large samples finite.
        """
        before = 0.5 ** max(0, 1 - math.frexp(tap)[1])
        _, after, divisor = Scale.exact(tap)
        if divisor == 1:
            return Scale(before, after / before)
        return Scale(before, 1.0, divisor * before)


def equal_tap(factors: Sequence[Array]) -> float | None:
    """Return the tap of an outer product whose taps are all equal, or None.

    Parameters
    ----------
    factors : sequence of ndarray
        One vector per axis.

    Returns
    -------
    float or None
        None for taps of 0 as well.  What is 1 / n to rounding is 1 / n.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.filters.boxes import equal_tap
    >>> equal_tap([np.ones(3), np.full(5, 0.5)]), equal_tap([np.arange(3.0)])
    (0.5, None)
    """
    if all((f == f[0]).all() for f in factors):
        tap = math.prod(float(f[0]) for f in factors)
        if tap and math.isfinite(1 / tap):
            nearest = max(abs(round(1 / tap)), 1) * math.copysign(1, tap)
            eps = max(float(np.finfo(f.dtype).eps) for f in factors)
            return 1 / nearest if abs(nearest * tap - 1) <= 4 * eps else tap
    return None


def filter_box(
    image: Array,
    out: Array,
    axes: Sequence[int],
    sizes: Sequence[int],
    origins: Sequence[int],
    border: str,
    cval: float,
    tap: float | None,
    work: np.dtype[Any],
    threads: int | None = None,
) -> bool:
    """Filter an image by a box of equal taps, if that is faster than by its taps.

    Parameters
    ----------
    image, out : ndarray
        Arrays of one shape, which do not overlap.  Integers are summed exactly, and results are
        rounded to nearest, halves to even, and saturate.
    axes, sizes, origins : sequence of int
        Axis of each window, its number of samples, and its shift.
    border : str
        Padding mode.
    cval : float
        Border value of "constant".
    tap : float or None
        Value of every tap of the box, other than 0; None if they differ.
    work : dtype
        Type of the sums of floating-point images: float32 or float64.
    threads : int, optional
        Number of threads; all of OpenMP's by default.

    Returns
    -------
    bool
        Whether `out` has the result.
    """
    plan = _plan_image(
        image, out.dtype == image.dtype, axes, sizes, origins, border, cval, tap, work
    )
    if plan is None:
        return False
    x = np.ascontiguousarray(image, plan.dtype)
    is_plain = out.dtype == plan.dtype and out.flags.carray
    result = out if is_plain else np.empty(out.shape, plan.dtype)
    if plan.rounding is None:
        sum_windows(x, result, plan.windows, plan.scale, threads)
    else:
        ((shape, down, across),) = _steps(plan.windows, x.shape, math.inf)
        _run(x, result, shape, down, across, plan.scale, threads, plan.rounding)
    if result is not out:
        out[...] = conversion.as_image(result, out.dtype)
    return True


def takes_image(
    image: Array,
    axes: Sequence[int],
    sizes: Sequence[int],
    origins: Sequence[int],
    border: str,
    cval: float,
    tap: float | None,
    work: np.dtype[Any],
) -> bool:
    """Return whether :func:`filter_box` filters an image into results of its dtype.

    Its other arguments are described there.
    """
    return _plan_image(image, True, axes, sizes, origins, border, cval, tap, work) is not None


def _plan_image(
    image: Array, keeps_dtype: bool, axes: Sequence[int], sizes: Sequence[int],
    origins: Sequence[int], border: str, cval: float, tap: float | None, work: np.dtype[Any],
) -> _Plan | None:  # fmt: skip
    if tap is None or not image.size:
        return None
    return _plan(
        image.shape, image.dtype.newbyteorder("=").char, tuple(axes), tuple(sizes), tuple(origins),
        border, cval, tap, work.char, keeps_dtype,
    )  # fmt: skip


class _Plan(NamedTuple):
    """Windows of a box filter, and the type in which they are summed."""

    dtype: np.dtype[Any]
    windows: tuple[Window, ...]
    scale: Scale
    rounding: tuple[int, int, bool] | None  # of integers


@functools.lru_cache(KEPT)
def _plan(
    shape: Ints,
    given: str,
    axes: Ints,
    sizes: Ints,
    origins: Ints,
    border: str,
    cval: float,
    tap: float,
    work: str,
    keeps_dtype: bool,
) -> _Plan | None:
    """Plan a box filter of images of a shape and dtype; None if it is faster by its taps.

    Sums of integers are rounded to the dtype of the image, so that results have to keep it.
    """
    dtype, windows = np.dtype(given), []
    for axis, size, origin in sorted(zip(axes, sizes, origins)):
        if size > 1:
            windows.append(Window(axis, size, size // 2 + origin, border, cval))
    if not windows:
        return None
    if keeps_dtype and dtype in (np.uint8, np.uint16):
        plan = _plan_integers(dtype, shape, windows, Scale.exact(tap))
        if plan is not None:
            return plan
    is_wide_integer = dtype.kind != "f" and work == "d"
    if sum(w.size for w in windows) < LEAST_TAPS and not is_wide_integer:
        return None
    scale = Scale.of(tap)
    for k, w in enumerate(windows):
        windows[k] = w._replace(fill=cval)
        cval *= w.size * (scale.before if k == 0 else 1.0)
    return _Plan(np.dtype(work if dtype.kind == "f" else "d"), tuple(windows), scale, None)


def _plan_integers(
    dtype: np.dtype[Any], shape: Ints, windows: Sequence[Window], scale: Scale
) -> _Plan | None:
    """Plan a box filter of uint8 or uint16 by sums of integers, if these fit 32 bits."""
    area = math.prod(w.size for w in windows)
    largest = int(np.iinfo(dtype).max)
    first, *others = windows
    if len(windows) > 2 or (others and others[0].axis != first.axis + 1):
        return None
    if area * largest >= SUMS or min(scale.after, scale.divisor) < 0:
        return None
    if first.border == "constant" and not (0 <= first.fill <= largest and first.fill % 1 == 0):
        return None
    across = [w._replace(fill=first.fill * first.size) for w in others]
    divisor, after = scale.divisor, scale.after
    is_single = dtype == np.uint8 and area * largest < SINGLE_SUMS
    is_single = is_single and 1 < divisor <= SINGLE_DIVISOR
    multiplier = shift = 0
    if dtype == np.uint8 and divisor == area:
        multiplier, shift = _narrow_division(area)
    if not multiplier and divisor != 1 and _is_exact_factor(int(divisor), is_single):
        after, divisor = 1 / divisor, 1.0
    rounding = multiplier, shift, is_single
    return _Plan(dtype, (first, *across), Scale(1.0, after, divisor), rounding)


def sum_windows(
    x: Array, out: Array, windows: Sequence[Window], scale: Scale, threads: int | None = None
) -> None:
    """Store the scaled sums of windows in `out`.

    Parameters
    ----------
    x, out : ndarray
        C-contiguous arrays of one shape, float32 or float64, which do not overlap.
    windows : sequence of Window
        Windows in the order of their axes; at least one.
    scale : Scale
        Of the samples, and of the sums.
    threads : int, optional
        Number of threads; all of OpenMP's by default.
    """
    steps = _steps(tuple(windows), x.shape, _core.plane_limits(NAMES[x.dtype.char]).lanes)
    other = np.empty_like(out) if len(steps) > 1 else out
    for k, (shape, down, across) in enumerate(steps):
        target = out if (len(steps) - k) % 2 else other
        factors = Scale(
            scale.before if k == 0 else 1.0, *(scale[1:] if k + 1 == len(steps) else (1.0, 1.0))
        )
        _run(x, target, shape, down, across, factors, threads)
        x = target


def _run(
    x: Array,
    out: Array,
    shape: Ints,
    down: Window | None,
    across: Window | None,
    scale: Scale,
    threads: int | None,
    rounding: tuple[int, int, bool] = (0, 0, False),
) -> None:
    """Run one step."""
    none, name = (1, 0, "replicate", 0.0), NAMES[x.dtype.char]
    seconds = SECONDS * x.size * x.itemsize / 4 * ((down is not None) + (across is not None))
    _core.box(
        x, out, name, shape,
        none if down is None else down[1:], none if across is None else across[1:],
        before=scale.before, after=scale.after, divisor=scale.divisor, threads=threads or 0,
        seconds=seconds, fork_join=0.0 if threads == 1 else fork_join_seconds(),
        multiplier=rounding[0], shift=rounding[1], is_single=rounding[2],
    )  # fmt: skip


Step = tuple[Ints, Window | None, Window | None]


@functools.lru_cache(KEPT)
def _steps(windows: tuple[Window, ...], shape: Ints, lanes: float) -> tuple[Step, ...]:
    """Return the shape (images, rows, columns, channels) of each step, and its windows.

    Windows along neighbouring axes are one step if the samples of a column are fewer than a vector.
    """
    steps: list[Step] = []
    k = 0
    while k < len(windows):
        w = windows[k]
        outer, n, inner = _around(shape, w.axis)
        k += 1
        if k < len(windows) and windows[k].axis == w.axis + 1:
            *_, columns, rest = _around(shape, w.axis + 1)
            if rest < lanes:
                steps.append(((outer, n, columns, rest), w, windows[k]))
                k += 1
                continue
        if inner < lanes:
            steps.append(((1, outer, n, inner), None, w))
        else:
            steps.append(((outer, n, 1, inner), w, None))
    return tuple(steps)


def _around(shape: Ints, axis: int) -> Ints:
    """Return the samples of the axes ahead of an axis, its own, and those behind."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _is_exact_factor(divisor: int, is_single: bool) -> bool:
    """Return whether a product with 1 / divisor rounds as the quotient does.

    Quotients of odd divisors are 1 / (2 divisor) from the nearest half, at least: more than twice
    the rounding of 1 / divisor and of the product, of up to 256 or 65536.  Those of powers of two
    are exact.
    """
    is_odd = divisor % 2 == 1 and (not is_single or divisor < EXACT_FACTOR)
    return is_odd or divisor & (divisor - 1) == 0


@functools.lru_cache(256)
def _narrow_division(area: int) -> Ints:
    """Return a multiplier and a shift that divide sums of bytes in 16 bits; zeros if none do.

    floor(n / area) = (n * multiplier >> 16) >> shift for n up to 255 area + area / 2, if the
    excess of multiplier * area over 2^(16 + shift), times n, stays below that power.
    """
    largest = 255 * area + area // 2
    if largest < 1 << 16:
        for shift in range(8):
            power = 1 << (16 + shift)
            multiplier = -(-power // area)
            if multiplier < 1 << 16 and largest * (multiplier * area - power) < power:
                return multiplier, shift
    return 0, 0
