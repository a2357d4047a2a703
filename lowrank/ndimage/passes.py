"""Passes along single axes, as SciPy runs them one after another through the output array."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank import filters
from lowrank._kernels._core import Passes
from lowrank._typing import Array
from lowrank.engine import INTEGERS
from lowrank.engine.machine import least_saving
from lowrank.filters import boxes
from lowrank.filters.cpu import LEAST_SAVING
from lowrank.ndimage.arguments import SCIPY, UnsupportedError, as_border, as_number, is_finite

MAX_PASSES = 8  # of a call of the kernel
KEPT = 256  # latest filters that are kept
EPS = float(np.finfo(np.float64).eps)
SINGLE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
EXACT, EXACT_SINGLE = 2.0**53, 2.0**24  # below them, integers are numbers of float64 and float32
PARALLEL_SAMPLES = 1 << 16  # of arrays that a parallel region may be worth while for
#: Planned filters along three axes are faster on arrays and taps from these sizes on: 0.6 of the
#: time for 17 taps on 128^3, 0.8 for 3 taps, but 1.3 for 65 taps in float64.
PLANNED_SAMPLES, PLANNED_TAPS, PLANNED_VOLUME, LONGEST_ON_VOLUMES = 1 << 17, 5, 1 << 20, 48


class Pass(NamedTuple):
    """Filter along one axis, divided by `divisor`."""

    axis: int
    weights: Array
    before: int  # taps ahead of the output
    mode: str  # by SciPy's names
    border: str
    divisor: float
    size: int  # of a window of equal taps
    key: bytes  # of the weights
    largest: float  # magnitude of a weight
    has_zeros: bool

    def run_scipy(self, x: Array, output: Any, cval: float) -> Array:
        """Filter along the last axis by SciPy, into an array or one of a dtype."""
        name = "uniform_filter1d" if self.size else "correlate1d"
        origin = self.before - len(self.weights) // 2
        result: Array = SCIPY[name](
            x, self.size or self.weights, -1, output, self.mode, cval, origin
        )
        return result


def as_pass(
    axis: int, weights: Array, before: int, mode: Any, divisor: float = 1.0, size: int = 0
) -> Pass:
    """Return a pass of float64 weights, which is kept with what is known of these."""
    return _keep_pass(axis, weights.tobytes(), before, as_border(mode), mode, divisor, size)


@functools.lru_cache(KEPT)
def _keep_pass(
    axis: int, key: bytes, before: int, border: str, mode: str, divisor: float, size: int
) -> Pass:
    weights = np.frombuffer(key)
    largest = float(np.abs(weights).max())
    has_zeros = not weights.all()
    return Pass(axis, weights, before, mode, border, divisor, size, key, largest, has_zeros)


def box(axis: int, size: int, before: int, mode: Any) -> Pass:
    """Return the mean of a window.

    Taps are a power of two, so that sums of integers are exact and do not overflow, and means are
    rounded once.
    """
    tap = _power_of_two(size)
    return as_pass(axis, np.full(size, tap), before, mode, size * tap, size)


def _power_of_two(n: int) -> float:
    """Return the largest power of two that is at most 1 / n."""
    return 0.5 ** (n - 1).bit_length()


def run_passes(x: Array, output: Array, passes: Sequence[Pass], cval: Any) -> Array:
    """Filter `x` into `output`, and return `output`.

    Parameters
    ----------
    x, output : ndarray
        Arrays of one shape: real, or both complex.
    passes : sequence of Pass
        Filters in their order.
    cval : number
        Border value, in every pass the same.

    Returns
    -------
    ndarray
    """
    if not x.size:
        raise UnsupportedError
    if x.dtype.kind != "c":
        fill = as_number(cval)
        _check(x, output, passes, fill)
        _run_real(x, output, passes, fill)
        return output
    parts = [
        (x.real, output.real, as_number(np.real(cval))),
        (x.imag, output.imag, as_number(np.imag(cval))),
    ]
    if output.dtype.kind != "c":
        raise UnsupportedError
    for source, target, fill in parts:
        _check(source, target, passes, fill)
    for source, target, fill in parts:
        _run_real(source, target, passes, fill)
    return output


def _check(x: Array, output: Array, passes: Sequence[Pass], cval: float) -> None:
    """Raise `UnsupportedError` for arrays that SciPy refuses or computes differently."""
    for dtype in (x.dtype, output.dtype):
        if dtype.kind not in "biuf" or (dtype.kind == "f" and dtype.itemsize not in (4, 8)):
            raise UnsupportedError
    if not output.flags.writeable or len(passes) > MAX_PASSES:
        raise UnsupportedError
    # SciPy multiplies NaN by taps of zero, which the kernels skip, casts it to integers, and
    # carries it to the end of a line in running sums.
    is_sensitive = output.dtype.kind != "f" or any(p.has_zeros or p.size for p in passes)
    if is_sensitive and not (math.isfinite(cval) and is_finite(x)):
        raise UnsupportedError


def _run_real(x: Array, output: Array, passes: Sequence[Pass], cval: float) -> None:
    if output.dtype.kind == "f":
        work = _work_dtype(x, output, passes)
        x = np.require(x, work, ["C", "A"])
        is_plain = output.dtype == work and output.flags.carray
        if is_plain and not np.may_share_memory(x, output):
            _run_float(x, output, passes, cval)
        else:
            result = np.empty(x.shape, work)
            _run_float(x, result, passes, cval)
            output[...] = result
        return
    target = output.view(np.uint8) if output.dtype == bool else output  # SciPy stores 2 as 2
    native = target.dtype.newbyteorder("=")
    for p in passes:
        x = _run_truncated(x, p, cval, native)
    target[...] = x


def _work_dtype(x: Array, output: Array, passes: Sequence[Pass]) -> np.dtype[Any]:
    """Return float32 if arrays and taps are float32, else float64."""
    if not x.dtype.newbyteorder("=") == output.dtype.newbyteorder("=") == np.float32:
        return np.dtype(np.float64)
    is_single = all(not p.largest or SINGLE[0] < p.largest < SINGLE[1] for p in passes)
    return np.dtype(np.float32 if is_single else np.float64)


def _run_float(x: Array, out: Array, passes: Sequence[Pass], cval: float) -> None:
    """Filter between contiguous arrays of the dtype of the computation.

    `x` may hold small integers, for a pass that takes them.
    """
    if _are_windows(passes):
        _sum_windows(x, out, passes, cval)
        return
    run = _compile(tuple(p.key for p in passes), out.dtype.name)
    axes, before = [p.axis for p in passes], [p.before for p in passes]
    if len(passes) == 3 and _run_planned(x, out, passes, cval):
        return
    fills, scale = [], 1.0  # arrays between passes have not been divided yet
    for p in passes:
        fills.append(cval * scale)
        scale *= p.divisor
    threads, saving = (
        (1, 0.0) if x.size < PARALLEL_SAMPLES else (0, max(least_saving(), LEAST_SAVING))
    )
    run(x, out, axes, before, [p.border for p in passes], fills, threads, saving)
    if scale != 1:
        out /= scale


@functools.lru_cache(KEPT)
def _compile(weights: tuple[bytes, ...], dtype: str) -> Passes:
    return Passes([np.frombuffer(w) for w in weights], dtype)


def _run_planned(x: Array, out: Array, passes: Sequence[Pass], cval: float) -> bool:
    """Filter by a planned filter if it is faster and the same function; return whether it is."""
    longest = max(np.count_nonzero(p.weights) for p in passes)
    least_taps = PLANNED_TAPS if x.size < PLANNED_VOLUME else 1
    if x.size < PLANNED_SAMPLES or not least_taps <= longest <= LONGEST_ON_VOLUMES:
        return False
    if len({p.border for p in passes}) > 1 or len({p.axis for p in passes}) < 3:
        return False
    if any(len(p.weights) > x.shape[p.axis] for p in passes):
        return False
    if passes[0].border == "constant" and cval:  # a planned filter responds to the border of x
        sums = [(abs(float(p.weights.sum()) - 1), len(p.weights)) for p in passes[:-1]]
        if any(error > EPS * taps for error, taps in sums):
            return False
    in_order = sorted(passes, key=lambda p: p.axis)
    kernel = filters.OuterProduct([p.weights for p in in_order])
    origin = [p.before - len(p.weights) // 2 for p in in_order]
    mode = passes[0].mode
    axes = [p.axis for p in in_order]
    filters.correlate(x, kernel, mode=mode, cval=cval, origin=origin, axes=axes, out=out)
    divisor = math.prod(p.divisor for p in passes)
    if divisor != 1:
        out /= divisor
    return True


def _are_windows(passes: Sequence[Pass]) -> bool:
    """Return whether passes are the means of windows, along different axes, that sums are for."""
    is_wide = sum(p.size for p in passes) >= boxes.LEAST_TAPS
    return is_wide and all(p.size for p in passes) and len({p.axis for p in passes}) == len(passes)


def _sum_windows(x: Array, out: Array, passes: Sequence[Pass], cval: float) -> None:
    """Store the means of windows in `out`: passes along different axes."""
    before = math.prod(float(p.weights[0]) for p in passes)
    windows, fill = [], cval
    for p in sorted(passes, key=lambda p: p.axis):
        windows.append(boxes.Window(p.axis, p.size, p.before, p.border, fill))
        fill = cval * before * math.prod(w.size for w in windows)
    divisor = math.prod(p.divisor for p in passes)
    boxes.sum_windows(x, out, windows, boxes.Scale(before, 1.0, divisor))


def _run_truncated(x: Array, p: Pass, cval: float, dtype: np.dtype[Any]) -> Array:
    """Return one pass in float64, truncated to integers as SciPy truncates it.

    A sum within rounding of an integer is truncated to that one or to the one before, by the order
    of the additions: SciPy filters the lines that have one.
    """
    total = 1.0 if p.size else float(np.abs(p.weights).sum())
    largest = max(bound_samples(x), abs(cval))
    is_whole = x.dtype.kind != "f" and cval.is_integer()
    is_whole = is_whole and bool(p.size or (p.weights == np.rint(p.weights)).all())
    is_single = is_whole and not p.size and largest * total < EXACT_SINGLE
    work = np.dtype(np.float32 if is_single else np.float64)
    y = np.empty(x.shape, work)
    run = _compile((p.key,), work.name)
    x_type = x.dtype.newbyteorder("=")
    is_read = x_type in INTEGERS and not _are_windows([p])
    if not (is_read and run.takes_integers(x.shape, (p.axis,))):
        x_type = work
    _run_float(np.require(x, x_type, ["C", "A"]), y, [p], cval)
    if is_whole and largest * (p.size or total) < EXACT:
        return truncate(y, dtype)
    # Both sums err by at most half of this; running sums err once per sample of the line as well.
    roundings = len(p.weights) + 2 + (x.shape[p.axis] if p.size else 0)
    nearest = np.rint(y)
    is_close = (np.abs(y - nearest) <= roundings * EPS * total * largest) & (nearest != 0)
    result = truncate(y, dtype)
    lines = is_close.any(axis=p.axis)
    if lines.any():
        source, target = np.moveaxis(x, p.axis, -1), np.moveaxis(result, p.axis, -1)
        target[lines] = p.run_scipy(source[lines], dtype, cval)
    return result


def bound_samples(x: Array) -> float:
    """Return a bound on the magnitudes of samples."""
    if x.dtype.kind in "iu" and x.dtype.itemsize <= 4:
        return float(np.iinfo(x.dtype).max) + 1
    return max(abs(float(x.min())), abs(float(x.max())))


def truncate(y: Array, dtype: np.dtype[Any]) -> Array:
    """Truncate; values outside the range of the dtype wrap around."""
    with np.errstate(invalid="ignore"):
        if dtype == np.uint32:  # NumPy's own cast saturates, C's wraps
            return y.astype(np.int64).astype(dtype)
        return y.astype(dtype)
