"""Checked filter calls, planned and compiled once per kernel, size and border."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from lowrank._kernels._core import Passes
from lowrank._typing import Array, Ints
from lowrank.core.geometry import as_integers
from lowrank.factorization import Factorization
from lowrank.filters import arguments, choose

CACHED_FILTERS = 256
SMALL = 1 << 14  # samples


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
    mode: str
    cval: float
    origins: Ints
    threads: int | None

    @property
    def nonempty_spatial(self) -> Ints:
        """Spatial size of the plan, which an empty image needs as well."""
        return tuple(max(n, 1) for n in self.spatial)

    def convolution(self) -> Factorization:
        """Return the kernel as a dense stage."""
        k = np.frombuffer(self.kernel, self.dtype).reshape(self.taps)
        return arguments.as_convolution(k, self.mode, self.cval, self.origins)

    def factors(self) -> tuple[Array, ...] | None:
        """Return the vectors of a kernel that is an outer product, if they may run."""
        if self.rank not in (None, 1) or self.method not in ("auto", "separable"):
            return None
        k = np.frombuffer(self.kernel, self.dtype).reshape(self.taps)
        return choose.kernel_factors(k, self.round_off)

    def plan(self) -> choose.FilterPlan:
        """Plan the filter for images of this size."""
        conv = self.convolution()
        tolerance = self.round_off if self.tolerance is None else self.tolerance
        return choose.choose_method(
            conv, self.nonempty_spatial, tolerance, round_off=self.round_off, rank=self.rank,
            method=self.method, channels=max(self.channels, 1), interleaved=self.interleaved,
            itemsize=conv.dtype.itemsize, threads=self.threads, is_rough=self.is_small,
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
        return max(self.channels, 1) * math.prod(self.nonempty_spatial) <= SMALL

    @property
    def is_strict(self) -> bool:
        """Whether every output has to be as accurate as by direct sums."""
        return (self.rank, self.tolerance, self.method) == (None, None, "auto")

    def passes(self) -> tuple[Passes, list[int]] | None:
        """Return the passes of an outer product, which runs without a plan, and their axes."""
        if self.rank not in (None, 1) or self.method not in ("auto", "separable"):
            return None
        return _passes(self.kernel, self.taps, self.dtype, self.round_off)


@functools.lru_cache(CACHED_FILTERS)
def _passes(
    kernel: bytes, taps: Ints, dtype: str, tolerance: float
) -> tuple[Passes, list[int]] | None:
    factors = choose.kernel_factors(np.frombuffer(kernel, dtype).reshape(taps), tolerance)
    if factors is None:
        return None
    axes = [a for a, n in enumerate(taps) if n > 1] or [len(taps) - 1]
    return Passes([factors[a] for a in axes], np.dtype(dtype).name), axes


class CompiledFilter(NamedTuple):
    """A compiled method, with the spatial shape of the arrays that it takes."""

    run: Any
    shape: Ints
    interleaved: bool


def check_request(
    image: Array,
    kernel: Any,
    work: np.dtype[Any],
    *,
    rank: int | None,
    tolerance: float | None,
    method: choose.MethodName,
    mode: str,
    cval: float,
    origin: Any,
    axes: Any,
    flip: bool,
    out: Array | None,
    threads: int | None,
) -> tuple[FilterRequest, Ints]:
    """Check the arguments of :func:`lowrank.filters.correlate`; return the filtered axes, too."""
    k = arguments.as_kernel(kernel)
    round_off = arguments.round_off(k)
    origins = arguments.as_origins(origin, k.shape)
    if flip:
        k = np.flip(k)
        origins = arguments.flipped_origins(origins, k.shape)
    along = arguments.as_axes(axes, image.ndim, k.ndim)
    if out is not None:
        arguments.as_out(image, out)
    interleaved = along == tuple(range(k.ndim)) and (out is None or out.flags.c_contiguous)
    k = np.ascontiguousarray(k, work)
    round_off = max(round_off, arguments.round_off(k))
    arguments.as_padding_mode(mode)
    if rank is not None:
        (rank,) = as_integers("rank", rank, 1)
    cval = arguments.as_real("cval", cval)
    tolerance = arguments.as_tolerance(tolerance, rank)
    threads = threads if threads is None else as_integers("threads", threads, 1)[0]
    spatial = tuple(image.shape[a] for a in along)
    channels = image.size // max(math.prod(spatial), 1)
    request = FilterRequest(
        k.tobytes(), k.shape, k.dtype.str, spatial, channels, interleaved, rank, tolerance,
        round_off, method, mode, cval, origins, threads,
    )  # fmt: skip
    return request, along


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
    spatial, channels = request.nonempty_spatial, max(request.channels, 1)
    run = choose.compile_method(method, spatial, np.dtype(request.dtype), request.threads, channels)
    shape = choose.runner_shape(method, spatial, channels)
    return CompiledFilter(run, shape, method.interleaved)
