"""Checked filter calls, planned and compiled once per kernel, size and border."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import as_integers
from lowrank.core.threads import as_threads
from lowrank.factorization import Factorization
from lowrank.filters import arguments, choose
from lowrank.filters.outer import OuterProduct, as_outer_product
from lowrank.filters.window import Window, as_convolution, as_window

CACHED_FILTERS = 256
OUTER_METHODS = ("auto", "separable", "multirate")  # of outer products, by their factors
SMALL = 1 << 14  # samples
PLAIN = {str, int, float, complex}  # types of arguments whose checks are kept


class Call(NamedTuple):
    """Checked arguments of a call, but for the arrays."""

    window: Window
    cval: float
    work: np.dtype[Any]  # of the computation
    rank: int | None
    tolerance: float | None
    method: choose.MethodName
    threads: int | None

    @property
    def is_native(self) -> bool:
        """Whether plans read the border samples themselves: along all axes alike, finite."""
        w = self.window
        is_finite = w.border != "constant" or math.isfinite(self.cval)
        return w.is_same and w.has_one_border and is_finite

    @property
    def inner(self) -> Call:
        """The call for an image with its border samples; the first outputs are the results."""
        return self._replace(window=self.window.inside(), cval=0.0)

    def as_outer_product(self, kernel: Array | OuterProduct) -> OuterProduct | None:
        """Return a kernel that is an outer product as one, if its factors may run."""
        if self.rank not in (None, 1) or self.method not in OUTER_METHODS:
            return None
        if isinstance(kernel, OuterProduct):
            return kernel
        return as_outer_product(kernel, arguments.round_off(kernel, self.work))

    def request(self, kernel: Array, shape: Ints, interleaved: bool) -> FilterRequest:
        """Return what the choice of a method for images of a shape depends on."""
        w = self.window
        k = np.ascontiguousarray(kernel, self.work)
        spatial = tuple(shape[a] for a in w.along)
        return FilterRequest(
            k.tobytes(), k.shape, k.dtype.str, spatial, math.prod(shape) // math.prod(spatial),
            interleaved and w.along == tuple(range(k.ndim)), self.rank, self.tolerance,
            arguments.round_off(kernel, self.work), self.method, w.before, w.border,
            self.cval, self.threads,
        )  # fmt: skip


def as_call(
    kernel: Array | OuterProduct,
    ndim: int,
    dtype: np.dtype[Any],
    result: np.dtype[Any],
    flip: bool,
    *options: Any,
) -> tuple[Call, float]:
    """Check the arguments of a call; return them, and the imaginary part of the border value.

    The image has `ndim` axes; `options` are rank, tolerance, method, mode, cval, origin, axes,
    padding and threads of :func:`lowrank.filters.correlate`.  The latest calls are kept: checks
    would take longer than the filter of a small image.
    """
    key = (kernel.shape, arguments.fits_single(kernel), ndim, dtype, result, flip, *options)
    if not all(o is None or type(o) in PLAIN for o in options):
        return _as_call.__wrapped__(*key)  # equal sequences may have items of other types
    return _as_call(*key)


@functools.lru_cache(CACHED_FILTERS, typed=True)
def _as_call(
    taps: Ints, fits_single: bool, ndim: int, dtype: np.dtype[Any], result: np.dtype[Any],
    flip: bool, rank: Any, tolerance: Any, method: Any, mode: Any, cval: Any, origin: Any,
    axes: Any, padding: Any, threads: Any,
) -> tuple[Call, float]:  # fmt: skip
    window = as_window(taps, ndim, axes, origin, mode, padding, flip)
    fill = arguments.as_number("cval", cval, dtype.kind == "c")
    if "constant" not in window.borders:
        fill = 0.0  # not used, and need not be finite
    if rank is not None:
        (rank,) = as_integers("rank", rank, 1)
    work = arguments.work_dtype(dtype, fits_single, result)
    tolerance = arguments.as_tolerance(tolerance, rank)
    method = choose.as_method(method)
    call = Call(window, fill.real, work, rank, tolerance, method, as_threads(threads))
    return call, fill.imag


class FilterRequest(NamedTuple):
    """Checked arguments of a call: all that the choice of a method depends on."""

    kernel: bytes
    taps: Ints
    dtype: str
    spatial: Ints
    channels: int
    interleaved: bool  # the filtered axes come first: samples of several channels are adjacent
    rank: int | None
    tolerance: float | None
    round_off: float  # relative error of the kernel as it was given: less than this is not rank
    method: choose.MethodName
    before: Ints
    border: PaddingMode
    cval: float
    threads: int | None

    def convolution(self) -> Factorization:
        """Return the kernel as a dense stage."""
        k = np.frombuffer(self.kernel, self.dtype).reshape(self.taps)
        borders = (self.border,) * k.ndim
        window = Window.of(tuple(range(k.ndim)), k.shape, self.before, borders)
        return as_convolution(k, window, self.cval)

    def plan(self, is_rough: bool | None = None) -> choose.FilterPlan:
        """Plan the filter for images of this size, roughly for small ones by default."""
        conv = self.convolution()
        if is_rough is None:
            is_rough = self.is_small
        tolerance = self.round_off if self.tolerance is None else self.tolerance
        return choose.choose_method(
            conv, self.spatial, tolerance, round_off=self.round_off, rank=self.rank,
            method=self.method, channels=self.channels, interleaved=self.interleaved,
            itemsize=conv.dtype.itemsize, threads=self.threads, is_rough=is_rough,
        )  # fmt: skip

    def exact_method(self, plan: choose.FilterPlan) -> choose.FilterMethod:
        """Return the fastest method that sums as the kernel does, if it may be chosen.

        Transforms and sums of several terms spread NaN, infinities and the rounding of large
        samples to outputs that do not depend on them.  Whoever gives a tolerance admits sums of
        terms; whoever gives a rank or a method gets it.
        """
        if self.method != "auto" or self.rank is not None or not plan.choice.spread:
            return plan.choice
        return next(
            m for m in plan.methods
            if m.error <= plan.tolerance
            and (not m.spread if self.is_strict else m.block is None)
        )  # fmt: skip

    @property
    def is_small(self) -> bool:
        """Whether predictions of several methods would take longer than the filter."""
        return self.channels * math.prod(self.spatial) <= SMALL

    @property
    def is_strict(self) -> bool:
        """Whether every output has to be as accurate as by direct sums."""
        return (self.rank, self.tolerance, self.method) == (None, None, "auto")


class CompiledFilter(NamedTuple):
    """A compiled method, with the spatial shape of the arrays that it takes."""

    run: Any
    shape: Ints
    interleaved: bool


@functools.lru_cache(CACHED_FILTERS)
def plan_request(request: FilterRequest) -> tuple[choose.FilterMethod, choose.FilterMethod]:
    """Return the chosen method, and the one for images on which it would spread errors."""
    plan = request.plan()
    return plan.choice, request.exact_method(plan)


@functools.lru_cache(CACHED_FILTERS)
def compile_request(request: FilterRequest, is_exact: bool = False) -> CompiledFilter:
    """Compile one of the two methods of a request."""
    return _compile(plan_request(request)[is_exact], request)


def _compile(method: choose.FilterMethod, request: FilterRequest) -> CompiledFilter:
    spatial, channels = request.spatial, request.channels
    run = choose.compile_method(method, spatial, np.dtype(request.dtype), request.threads, channels)
    shape = choose.runner_shape(method, spatial, channels)
    return CompiledFilter(run, shape, method.interleaved)


@functools.lru_cache(CACHED_FILTERS)
def chunk_chain(request: FilterRequest) -> Factorization:
    """Return the chain of the fastest method that gives the same bits in chunks."""
    method = request.exact_method(request.plan())
    if method.block is not None:
        raise ValueError(
            "method must be auto, direct or separable for a Dask array, got 'fft': the rounding of "
            "a transform depends on where blocks are cut"
        )
    return method.chain


@functools.lru_cache(CACHED_FILTERS)
def smallest_chain(request: FilterRequest) -> Factorization:
    """Return the chain with the fewest MACs within the tolerance, for a GPU."""
    if request.method == "fft":
        raise ValueError("method must be auto, direct or separable on a GPU, got 'fft'")
    plan = request.plan()
    methods = [m for m in plan.methods if m.block is None]
    if request.rank is None:
        methods = [m for m in methods if m.error <= plan.tolerance]
    if request.method != "auto":
        methods = [m for m in methods if m.method == request.method]
    return min((m.chain for m in methods), key=lambda f: f.cost(request.spatial).macs)
