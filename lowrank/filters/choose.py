"""Methods for a filter, and the choice of the one predicted to be fastest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lowrank import engine, perfmodel, selection
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra, tables
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable
from lowrank.filters import arguments
from lowrank.filters.factors import outer_factors
from lowrank.filters.window import as_convolution, as_window

MethodName = Literal["auto", "direct", "separable", "fft", "multirate"]
METHODS: tuple[str, ...] = get_args(MethodName)

GREY_LEVELS = 255.0  # largest sample, for the bounds in grey levels
MIN_CHANNEL_AXIS = 64  # interleaved channels that run as a spatial axis of their own
DEINTERLEAVE_SECONDS = 6e-9  # measured time to copy a sample to its plane and back
KEPT_KERNELS = 64  # whose factors are kept
AXIS_LETTERS = "dhw"
ROUGH_MAC, ROUGH_STAGE = 5e-11, 2e-6  # seconds, of the order of one thread's
MAX_BLOCK_ASPECT = 8.0  # longest over shortest side of a block of transforms


@dataclass(frozen=True, slots=True, eq=False)
class FilterMethod:
    """A method to run a filter, with its error and predicted time.

    Attributes
    ----------
    method : str
        ``"direct"``, ``"separable"`` or ``"fft"``.
    rank : tuple of int
        Rank of a separable form, as its family documents; else empty.
    error : float
        Relative Frobenius error of the kernel that runs.
    grey : float
        Upper bound on the error of the result for values from 0 to 255, without round-off.
    seconds : float
        Predicted time on this machine.
    chain : Factorization
        Chain that runs.
    block : tuple of int or None
        For ``"fft"``, points of a transform along each axis.
    interleaved : bool
        Whether interleaved channels, such as colours, are filtered in one pass without
        deinterleaving.
    spread : float
        Bound on the rounding error of an output over that of direct sums, for samples that are
        all of one size: it grows by the quotient of the largest to the smallest sample.  0 for
        direct sums and outer products, whose error is small where the samples are.

    Examples
    --------
    >>> from lowrank import filters
    >>> plan = filters.plan_filter(filters.gauss(2.0), (64, 64))
    >>> plan.choice.name
    'separable h-w'
    """

    method: str
    rank: Ints
    error: float
    grey: float
    seconds: float
    chain: Factorization
    block: Ints | None = None
    interleaved: bool = False
    spread: float = 0.0

    @property
    def multiplies_zeros(self) -> bool:
        """Whether taps of zero are not skipped: NaN and infinities under them spread."""
        return any(not s.weight.all() for s in self.chain.stages)

    @property
    def name(self) -> str:
        """Method with its variant or block."""
        if self.block is not None:
            return f"fft, blocks of {'x'.join(map(str, self.block))}"
        return " ".join(filter(None, (self.method, self.chain.variant)))


@dataclass(frozen=True, slots=True, eq=False)
class FilterPlan:
    """Methods for a filter on images of one size; prints as a table.

    Attributes
    ----------
    methods : tuple of FilterMethod
        Methods by predicted time.  Those beyond the tolerance are listed, but never chosen.
    tolerance : float
        Largest relative Frobenius error of the kernel.
    kernel : ndarray
        Filter, in the precision of the computation.
    shape : tuple of int
        Size of the images along the filter's axes.
    choice : FilterMethod
        Method that runs: the fastest within the tolerance, the factors of an outer product, or the
        fastest form of a given method.

    Examples
    --------
    >>> from lowrank import filters
    >>> plan = filters.plan_filter(filters.gauss(3.0), (512, 512))
    >>> plan.choice.method, plan.choice.rank
    ('separable', (1,))
    """

    methods: tuple[FilterMethod, ...]
    tolerance: float
    kernel: Array
    shape: Ints
    choice: FilterMethod

    def __repr__(self) -> str:
        return "\n".join([self._title(), *tables.align_columns(self._rows())])

    def _repr_html_(self) -> str:
        return tables.html_table(self._rows(), [self._title()])

    def _title(self) -> str:
        taps, size = ("x".join(map(str, s)) for s in (self.kernel.shape, self.shape))
        return f"{taps} taps on {size}, tolerance {self.tolerance:.3g}; > marks the choice"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("  method", "rank", "error", "grey levels", "predicted", "relative time")
        ]
        chosen_seconds = self.choice.seconds
        for m in self.methods:
            mark = "> " if m is self.choice else "  "
            rows.append(
                (
                    mark + m.name + ("" if m.error <= self.tolerance else " (beyond tolerance)"),
                    ",".join(map(str, m.rank)) or "-",
                    f"{m.error:.2g}",
                    f"{m.grey:.2g}",
                    tables.format_seconds(m.seconds),
                    f"{m.seconds / chosen_seconds:.2f}x",
                )
            )
        return rows


def as_method(method: Any) -> MethodName:
    """Return the name of a method; raise for others."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    name: MethodName = method
    return name


def choose_method(
    conv: Factorization,
    spatial: Sequence[int],
    tolerance: float,
    *,
    round_off: float = 0.0,
    rank: int | None = None,
    method: MethodName = "auto",
    channels: int = 1,
    interleaved: bool = False,
    itemsize: int = 4,
    threads: int | None = None,
    is_rough: bool = False,
) -> FilterPlan:
    """Price the methods for a dense one-channel stage on `channels` images, and choose one.

    `round_off` is the relative error of the kernel as it was given; `interleaved` tells that the
    samples of the channels are adjacent in memory.  `is_rough` is for small images: times are those
    of the MACs alone, and transforms are left out.  An outer product runs by its factors unless
    another `method` is asked for.
    """
    if as_method(method) == "multirate":
        raise ValueError(f"method must be auto, direct, separable or fft in a plan, got {method!r}")
    if rank is not None and method not in ("auto", "separable"):
        raise ValueError(f"method must be auto or separable if rank is given, got {method!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number, at least 0, got {tolerance!r}")
    weight = conv.to_dense()
    spatial = tuple(spatial)
    factors = None
    if rank in (None, 1):  # the best sum of one term, if it is the kernel
        factors = kernel_factors(weight[0, 0], max(round_off, arguments.round_off(weight)))
    images = _Images(spatial, channels, interleaved and channels > 1, itemsize, threads, is_rough)

    def candidate(
        name: str, chain: Factorization, accuracy: Accuracy | None = None
    ) -> FilterMethod:
        error, grey, spread = accuracy or _accuracy(chain, weight)
        seconds, in_one_pass = _predict(chain, images)
        return FilterMethod(
            name, chain.rank, error, grey, seconds, chain, None, in_one_pass, spread
        )

    if rank is None:
        methods = [candidate("direct", conv, Accuracy(0.0, 0.0, 0.0))]
        if factors is not None:
            methods.append(candidate("separable", factored_chain(conv, factors)))
        elif method in ("auto", "separable"):
            found = separable_chains(conv, tolerance)
            methods += [candidate("separable", *each) for each in found]
        if method == "fft" or (method == "auto" and weight.size > 1 and not is_rough):
            methods.append(_fastest_fft(conv, weight.shape[2:], images))
    else:
        chain = fit_rank(conv, rank) if factors is None else factored_chain(conv, factors)
        methods = [candidate("separable", chain)]
    methods.sort(key=lambda m: m.seconds)
    of_name = [m for m in methods if method in ("auto", m.method)]
    allowed = [m for m in of_name if rank is not None or m.error <= tolerance]
    if not allowed:
        nearest = min(of_name, key=lambda m: m.error, default=None)
        raise ValueError(
            f"no {method} form within tolerance {tolerance:.3g} has fewer MACs than the kernel"
            + ("" if nearest is None else f"; rank {nearest.rank} has error {nearest.error:.3g}")
            + ": give rank= for a form of any rank"
        )
    choice = allowed[0]
    if factors is not None and method == "auto" and sum(n > 1 for n in weight.shape) > 1:
        choice = next(m for m in allowed if m.method == "separable")
    return FilterPlan(tuple(methods), tolerance, weight[0, 0], spatial, choice)


class _Images(NamedTuple):
    """Images that a method is priced for."""

    spatial: Ints
    channels: int
    interleaved: bool
    itemsize: int
    threads: int | None
    is_rough: bool = False

    @property
    def deinterleave_seconds(self) -> float:
        """Time to copy interleaved channels to planes and back."""
        return DEINTERLEAVE_SECONDS * self.interleaved * self.channels * math.prod(self.spatial)


def _predict(chain: Factorization, images: _Images) -> tuple[float, bool]:
    """Predict the seconds of a chain, and whether it runs on interleaved channels."""
    if images.is_rough:
        taps = sum(math.prod(s.weight.shape) for s in chain.stages)
        samples = images.channels * math.prod(images.spatial)
        return ROUGH_MAC * taps * samples + ROUGH_STAGE * len(chain.stages), images.interleaved
    model, itemsize, threads = perfmodel.current(), images.itemsize, images.threads
    planar = model.predict_stages(
        chain.stages, (1, *images.spatial), images.channels, threads, itemsize=itemsize
    ).seconds
    if not images.interleaved:
        return planar, False
    stages, shape, per_sample = interleave(chain, images.spatial, images.channels)
    in_one_pass = model.predict_stages(
        stages, (1, *shape), 1, threads, itemsize=itemsize, interleaved=per_sample
    ).seconds
    planar += images.deinterleave_seconds
    return min(in_one_pass, planar), in_one_pass <= planar


def _chain_spread(chain: Factorization, weight: Array) -> float:
    """Return the rounding error of a sum of terms over that of direct sums.

    Both for samples of 1: of n terms, at most n roundings of the sum of their magnitudes.
    """
    magnitudes = replace(
        chain, stages=tuple(replace(s, weight=np.abs(s.weight)) for s in chain.stages)
    )
    roundings = sum(math.prod(s.weight.shape[1:]) for s in chain.stages)
    total = float(magnitudes.to_dense().sum()) * roundings
    return float(total / (float(np.abs(weight).sum()) * weight.size or 1.0))


def predict(
    chain: Factorization,
    spatial: Ints,
    channels: int,
    interleaved: bool,
    itemsize: int,
    threads: int | None,
) -> tuple[float, bool]:
    """Predict the seconds of a chain, and whether it runs on interleaved channels."""
    return _predict(chain, _Images(spatial, channels, interleaved, itemsize, threads))


def runner_shape(method: FilterMethod, spatial: Ints, channels: int) -> Ints:
    """Return the spatial shape of the arrays that a compiled method takes."""
    if not method.interleaved:
        return spatial
    if has_channel_axis(spatial, channels):
        return (*spatial, channels)
    return (*spatial[:-1], spatial[-1] * channels)


def has_channel_axis(spatial: Ints, channels: int) -> bool:
    """Return whether interleaved channels run as a spatial axis of their own."""
    return channels >= MIN_CHANNEL_AXIS and len(spatial) < 3


def interleave(
    chain: Factorization, spatial: Ints, channels: int
) -> tuple[tuple[Stage, ...], Ints, int]:
    """Return the stages, spatial shape and channels per sample that filter interleaved channels.

    Many channels become a spatial axis without taps if there are fewer than three.
    """
    if has_channel_axis(spatial, channels):
        return tuple(map(_append_axis, chain.stages)), (*spatial, channels), 1
    return chain.stages, spatial, channels


def _append_axis(stage: Stage) -> Stage:
    """Return the stage with one more axis, along which it has a single tap."""
    g = stage.geometry
    geometry = replace(
        g,
        stride=(*g.stride, 1),
        padding=(*g.padding, (0, 0)),
        dilation=(*g.dilation, 1),
        output_padding=(*g.output_padding, 0),
    )
    return replace(stage, weight=stage.weight[..., None], geometry=geometry)


class Accuracy(NamedTuple):
    """Errors of a chain in the place of a kernel, as in :class:`FilterMethod`."""

    error: float
    grey: float
    spread: float


def _accuracy(chain: Factorization, weight: Array) -> Accuracy:
    kernel = chain.to_dense()
    return Accuracy(
        chain_algebra.relative_error(kernel, weight),
        _grey_bound(kernel[0, 0].astype(np.float64) - weight[0, 0]),
        0.0 if chain.rank == (1,) else _chain_spread(chain, weight),
    )


def separable_chains(conv: Factorization, tolerance: float) -> list[tuple[Factorization, Accuracy]]:
    """Return the cheapest chain of each variant within the tolerance, and its accuracy.

    The list starts with two Pareto-optimal chains beyond the tolerance, to show what a larger one
    would save.  Costs are compared on images of twice the kernel's size, so that the chains of the
    latest kernels serve images of all sizes.
    """
    kernel = conv.to_dense()[0, 0]
    kept = _kept_chains(kernel.tobytes(), kernel.shape, kernel.dtype.str, tolerance)
    return [(_with_geometry(chain, conv), accuracy) for chain, accuracy in kept]


@functools.lru_cache(KEPT_KERNELS)
def _kept_chains(
    kernel: bytes, taps: Ints, dtype: str, tolerance: float
) -> tuple[tuple[Factorization, Accuracy], ...]:
    k = np.frombuffer(kernel, dtype).reshape(taps)
    window = as_window(taps, k.ndim, tuple(range(k.ndim)), 0, "constant", "same")
    conv = as_convolution(k, window, 0.0)
    front = selection.frontier(conv, [2 * n for n in taps], filter_families(), axis="macs")
    separable = [c for c in front if c.family != "dense"]
    within: dict[str, selection.Candidate] = {}
    for c in separable:
        if c.error <= tolerance:
            within.setdefault(c.name, c)
    beyond = [c for c in separable if c.error > tolerance][-2:]
    chains = [c.build() for c in (*beyond, *within.values())]
    return tuple((chain, _accuracy(chain, conv.to_dense())) for chain in chains)


def _with_geometry(chain: Factorization, conv: Factorization) -> Factorization:
    """Return a chain with the borders of a kernel: each stage pads the axes of its taps."""
    stages = []
    for stage in chain.stages:
        axes = [a for a, n in enumerate(stage.kernel) if n > 1]
        stages.append(replace(stage, geometry=conv.geometry.only(axes)))
    return replace(chain, stages=tuple(stages), geometry=conv.geometry)


@functools.lru_cache(KEPT_KERNELS)
def _kept_factors(
    kernel: bytes, taps: Ints, dtype: str, tolerance: float
) -> tuple[Array, ...] | None:
    return outer_factors(np.frombuffer(kernel, dtype).reshape(taps), tolerance)


def kernel_factors(kernel: Array, tolerance: float) -> tuple[Array, ...] | None:
    """Return one vector per axis whose outer product is a kernel; see :func:`outer_factors`.

    Parameters
    ----------
    kernel : ndarray
        Kernel.
    tolerance : float
        Largest relative Frobenius error.

    Returns
    -------
    tuple of ndarray or None
        Kept for the latest kernels.
    """
    return _kept_factors(kernel.tobytes(), kernel.shape, kernel.dtype.str, tolerance)


def factored_chain(conv: Factorization, factors: Sequence[Array]) -> Factorization:
    """Return the chain of passes along single axes, in the place of a kernel."""
    stages = factored_stages(conv.geometry, factors, conv.dtype)
    letters = AXIS_LETTERS[-conv.ndim :]
    variant = "-".join(a for a, f in zip(letters, factors) if len(f) > 1)
    return replace(conv, stages=stages, family="separable_sum", variant=variant, rank=(1,))


def factored_stages(
    geometry: Geometry, factors: Sequence[Array], dtype: np.dtype[Any]
) -> tuple[Stage, ...]:
    """Return one stage per axis with more than one tap; one at least."""
    axes = [a for a, f in enumerate(factors) if len(f) > 1 or f[0] != 1]
    stages = []
    for axis in axes or [len(factors) - 1]:
        shape = [1] * (2 + len(factors))
        shape[2 + axis] = len(factors[axis])
        weight = factors[axis].astype(dtype).reshape(shape)
        stages.append(Stage(weight, geometry.only([axis])))
    return tuple(stages)


def filter_families() -> list[str]:
    """Return the families to try for a filter: sweeps of the others take too long."""
    return [name for name, f in FAMILIES.items() if f.has_fast_sweep or f.is_outer_product_sum]


def fit_rank(conv: Factorization, rank: int) -> Factorization:
    """Fit the best sum of `rank` separable terms."""
    for family in ("spatial_svd", "separable_sum"):
        try:
            FAMILIES[family].variants(conv)
        except NotApplicable:
            continue
        n_axes = sum(n > 1 for n in conv.stages[0].kernel)
        if family == "separable_sum" or n_axes == 2:
            return FAMILIES[family].fit(conv, rank, None)
    if rank != 1:
        raise ValueError(f"rank must be 1 for a filter along one axis, got {rank}")
    return conv


def _fastest_fft(conv: Factorization, taps: Ints, images: _Images) -> FilterMethod:
    """Return the transform with the block predicted to be fastest."""
    model, spatial = perfmodel.current(), images.spatial
    blocks = fourier.blocks(taps, spatial)
    candidates = []
    for block in blocks:
        if block is blocks[0] or max(block) <= MAX_BLOCK_ASPECT * min(block):
            cost = model.predict_fft(taps, spatial, block, images.threads, images.itemsize)
            candidates.append((cost.seconds * images.channels, block))
    seconds, block = min(candidates)
    seconds += images.deinterleave_seconds
    spread = math.log2(math.prod(block)) / math.prod(taps)
    return FilterMethod("fft", (), 0.0, 0.0, seconds, conv, block, spread=spread)


def compile_method(
    method: FilterMethod, spatial: Ints, dtype: Any, threads: int | None, channels: int = 1
) -> engine.Runner | fourier.FourierPlan:
    """Compile a method for images of (n, 1, \\*spatial), or of `channels` interleaved ones."""
    if method.block is not None:
        g = method.chain.geometry
        before = [b for b, _ in g.padding]
        kernel = method.chain.to_dense()[0, 0]
        return fourier.plan(
            kernel, spatial, dtype, before, g.padding_mode, g.value, threads, method.block
        )
    stages, per_sample = method.chain.stages, 1
    if method.interleaved:
        stages, spatial, per_sample = interleave(method.chain, spatial, channels)
    epilogues = [Epilogue()] * len(stages)
    return engine.plan(stages, (1, *spatial), np.dtype(dtype), epilogues, threads, per_sample)


def _grey_bound(error: Array) -> float:
    """Bound the error on values from 0 to GREY_LEVELS: all taps of one sign meet the largest."""
    return GREY_LEVELS * max(float(error[error > 0].sum()), -float(error[error < 0].sum()))
