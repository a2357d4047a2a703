"""CP: a kernel as a sum of outer products, all stages but the outer ones depthwise.

Four families differ in the modes of the outer products: `cp` has one per spatial axis (CP-4 of
a 2-D kernel, CP-5 of a 3-D one), `cp3` one for all axes together, `jaderberg` decomposes the
slice of each input channel, and `separable_sum` has no input channels.

Every fit ends with the error-preserving correction `als.corrected`: among the sums close to the
best one found, it returns one of the least sensitive.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.stage import Stage, abstract_weight
from lowrank.factorization import Factorization
from lowrank.families import als
from lowrank.families.family import Family
from lowrank.families.kernel import (
    Kernel,
    NotApplicable,
    as_kernel,
    axis_indices,
    checked_rank,
    checked_variant,
    on_weight_device,
    orient,
)
from lowrank.families.rank_choice import is_share
from lowrank.families.sweep_point import SweepPoint

SWEEPS = 30  # ALS sweeps per point of a rank sweep, started from the previous point
REFINE = 300  # ALS sweeps per returned chain
FALLING = 1e-4  # relative decrease of the error per sweep below which a fit has converged


class ConvergenceWarning(UserWarning):
    """Alternating least squares stopped before its error converged.

    Issued by :func:`lowrank.cp`, :func:`lowrank.cp3`, :func:`lowrank.jaderberg` and
    :func:`lowrank.separable_sum` if the last sweep lowered the error by more than 0.01 %.  Either
    more sweeps find a better chain, or none is best and the terms of the sum grow without limit.
    """


class Effort(NamedTuple):
    """Settings of a fit, as the keywords of the public functions."""

    iterations: int = REFINE
    damping: float = 0.0
    restarts: int = 0
    seed: int = 0


class Modes(NamedTuple):
    """Tensors to decompose, (batch, *modes), and the meaning of their modes."""

    tensors: Array
    channels: str  # "ts", "t", "s" or "": channel modes ahead of the spatial ones
    axes: tuple[str, ...]  # spatial modes
    joined: bool = False  # whether the stage of the last axis sums the terms, not a pointwise one


def _cp_modes(kernel: Kernel) -> Modes:
    if kernel.outs == 1 and kernel.ins > 1 and len(kernel.axes) > 1:
        return Modes(_merged(kernel, kernel.axes)[:, 0], "s", kernel.axes, joined=True)
    if kernel.is_pointwise or min(kernel.outs, kernel.ins) < 2:
        raise NotApplicable(
            "cp needs a spatial kernel and two input channels per group, and two output channels "
            "per group or two axes with more than one tap"
        )
    return Modes(_merged(kernel, kernel.axes), "ts", kernel.axes)


def _cp3_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 2 or min(kernel.outs, kernel.ins) < 2:
        raise NotApplicable(
            "cp3 needs two axes with more than one tap (else it is cp) "
            "and two input and output channels per group"
        )
    return Modes(_merged(kernel, (kernel.letters,)), "ts", (kernel.letters,))


def _jaderberg_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 2 or kernel.outs < 2:
        raise NotApplicable(
            "jaderberg needs two axes with more than one tap and two output channels per group"
        )
    merged = _merged(kernel, kernel.axes).swapaxes(1, 2)
    return Modes(merged.reshape(-1, *merged.shape[2:]), "t", kernel.axes)


def _separable_sum_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 3 or kernel.ins > 1:
        raise NotApplicable(
            "separable_sum needs one input channel per group and three axes with more than one tap "
            "(with two, spatial_svd is optimal)"
        )
    merged = _merged(kernel, kernel.axes)[:, :, 0]
    if kernel.outs == 1:
        return Modes(merged[:, 0], "", kernel.axes, joined=True)
    return Modes(merged, "t", kernel.axes, joined=True)


def _merged(kernel: Kernel, axes: Sequence[str]) -> Array:
    """Return the tensor with one mode per string of `axes`."""
    w = kernel.tensor
    order = [3 + kernel.letters.index(a) for mode in axes for a in mode]
    sizes = [math.prod(w.shape[3 + kernel.letters.index(a)] for a in mode) for mode in axes]
    return w.transpose(0, 1, 2, *order).reshape(*w.shape[:3], *sizes)


MODES: dict[str, Callable[[Kernel], Modes]] = {
    "cp": _cp_modes,
    "cp3": _cp3_modes,
    "jaderberg": _jaderberg_modes,
    "separable_sum": _separable_sum_modes,
}


def _stages(
    conv: Factorization,
    kernel: Kernel,
    modes: Modes,
    rank: int,
    factors: Sequence[Array] | None,
) -> tuple[Stage, ...]:
    """Return the chain from `factors`, (batch, size, rank) per mode; abstract without them."""
    g, b, ndim = kernel.groups, len(modes.tensors), conv.geometry.ndim
    each = kernel.scale ** (1 / len(modes.tensors.shape[1:]))
    factor = {m: f * each for m, f in zip((*modes.channels, *modes.axes), factors or ())}
    one, pointwise = (1,) * ndim, conv.geometry.only(())

    def weight(shape: Ints, make: Callable[[], Array]) -> Array:
        return abstract_weight(shape) if factors is None else make().reshape(shape)

    def taps(axes: str) -> Ints:
        return tuple(k if a in axes else 1 for a, k in zip(kernel.letters, kernel.tensor.shape[3:]))

    stages = []
    if "s" in modes.channels:
        w = weight((b * rank, kernel.ins, *one), lambda: factor["s"].swapaxes(1, 2))
        stages.append(Stage(w, pointwise, g))
    for axes in modes.axes[:-1] if modes.joined else modes.axes:
        w = weight((b * rank, 1, *taps(axes)), lambda: factor[axes].swapaxes(1, 2))  # noqa: B023
        # Without a pointwise stage before it, the first depthwise one has several filters per
        # channel.
        groups = b * rank if stages else b
        stages.append(Stage(w, conv.geometry.only(axis_indices(axes, ndim)), groups))
    if modes.joined:
        axes = modes.axes[-1]
        out = factor.get("t", np.ones((b, 1, rank)))
        w = weight(
            (g * kernel.outs, rank, *taps(axes)),
            lambda: np.einsum("btr,bnr->btrn", out, factor[axes]),
        )
        stages.append(Stage(w, conv.geometry.only(axis_indices(axes, ndim)), g))
    else:
        # The batch of jaderberg includes s, over which the last stage sums.
        w = weight(
            (g * kernel.outs, b // g * rank, *one),
            lambda: factor["t"].reshape(g, -1, kernel.outs, rank).swapaxes(1, 2),
        )
        stages.append(Stage(w, pointwise, g))
    return orient(conv, stages)


def _variants(family: str, conv: Factorization) -> tuple[str, ...]:
    MODES[family](as_kernel(conv))
    return ("",)


def _largest(tensors: Array) -> int:
    """Return a CP rank that suffices for any tensor: the product of all modes but the largest."""
    sizes = sorted(tensors.shape[1:])
    return math.prod(sizes[:-1])


def _sweep(family: str, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """Yield at most a dozen ranks, each started from the previous fit."""
    kernel = as_kernel(conv)
    modes = MODES[family](kernel)
    tensors = modes.tensors
    bounds = als.bound(tensors)
    # Chains above three quarters of the dense parameters save little.
    most = 3 * tensors[0].size // (4 * sum(tensors.shape[1:]))
    fit = None
    for rank in als.ranks(min(max(most, 1), _largest(tensors))):
        fit = _warm_started(tensors, rank, fit, Effort())
        bound = float(bounds[rank]) if rank < len(bounds) else 0.0
        yield SweepPoint(
            (rank,),
            fit.error,
            min(bound, fit.error),
            _stages(conv, kernel, modes, rank, None),
            partial(_build, conv, kernel, modes, rank, fit),
        )


def _warm_started(tensors: Array, rank: int, fit: als.Fit | None, effort: Effort) -> als.Fit:
    """Run a few ALS sweeps at `rank`, from the fit of a lower rank if there is one."""
    if fit is None:
        first = _starts(tensors, rank, effort.seed)
    else:
        first = als.grown(fit.factors, rank, effort.seed)
    return als.batched_cp(tensors, first, SWEEPS, effort.damping)


def _starts(tensors: Array, rank: int, seed: int) -> list[Array]:
    return [np.stack(f) for f in zip(*(als.start(t, rank, seed) for t in tensors))]


def _best_of_starts(tensors: Array, rank: int, fit: als.Fit | None, effort: Effort) -> als.Fit:
    """Return the best fit from `fit`, from singular vectors and from random starts."""
    starts = [_starts(tensors, rank, effort.seed)]
    if fit is not None:
        starts.insert(0, als.grown(fit.factors, rank, effort.seed))
    empty = [np.empty((len(tensors), n, 0)) for n in tensors.shape[1:]]
    seeds = range(effort.seed + 1, effort.seed + 1 + effort.restarts)
    starts += [als.grown(empty, rank, seed) for seed in seeds]
    fits = (als.batched_cp(tensors, f, effort.iterations, effort.damping) for f in starts)
    return min(fits, key=lambda fit: fit.error)


def _allowed_error(fit: als.Fit) -> float:
    """Return the default error limit of the correction."""
    if fit.factors[0].shape[-1] == 1:
        return fit.error  # a single term cannot cancel
    return als.spared(fit.error)


def _build(
    conv: Factorization, kernel: Kernel, modes: Modes, rank: int, swept: als.Fit
) -> tuple[Stage, ...]:
    """Return the refined, corrected stages of a sweep point; their error is at most the point's."""
    fit = _best_of_starts(modes.tensors, rank, swept, Effort())
    limit = max(fit.error, min(_allowed_error(fit), swept.error))
    factors = als.corrected(modes.tensors, fit.factors, limit)
    return _stages(conv, kernel, modes, rank, factors)


@on_weight_device
def _fit(
    family: str, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    checked_variant(variant, ("",))
    return _fit_with_record(family, conv, rank, None, Effort())[0]


def _fit_with_record(
    family: str,
    conv: Factorization,
    rank: int | Sequence[int],
    max_error: float | None,
    effort: Effort,
) -> tuple[Factorization, als.Fit]:
    """Return the chain, and its fit before the correction."""
    kernel = as_kernel(conv)
    modes = MODES[family](kernel)
    ranks = checked_rank(rank, (_largest(modes.tensors),), "one number")
    fit = None
    for r in als.ranks(ranks[0], 6)[:-1]:  # warm starts, as in a sweep
        fit = _warm_started(modes.tensors, r, fit, effort)
    fit = _best_of_starts(modes.tensors, ranks[0], fit, effort)
    if max_error is not None and fit.error > max_error:
        more = "the rank, iterations" if fit.falling > FALLING else "the rank"
        raise ValueError(
            f"max_error must be at least {fit.error:.4g} at rank {ranks[0]}, got {max_error:.4g}: "
            f"raise {more} or max_error"
        )
    limit = _allowed_error(fit) if max_error is None else max_error
    factors = als.corrected(modes.tensors, fit.factors, limit)
    stages = _stages(conv, kernel, modes, ranks[0], factors)
    return replace(conv, stages=stages, family=family, variant="", rank=ranks), fit


def _checked_fit(
    family: str,
    conv: Factorization,
    rank: int | float | None,
    max_error: float | None,
    effort: Effort,
) -> Factorization:
    """Check the arguments of a public function, fit, and warn if the fit has not converged."""
    counts = (("iterations", effort.iterations, 1), ("restarts", effort.restarts, 0))
    for name, count, least in (*counts, ("seed", effort.seed, 0)):
        try:
            fits = operator.index(count) >= least
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {count!r}") from None
        if not fits:
            raise ValueError(f"{name} must be at least {least}, got {count!r}")
    if (
        not isinstance(effort.damping, int | float | np.number)
        or not 0 <= effort.damping < math.inf
    ):
        raise ValueError(f"damping must be a finite number of at least 0, got {effort.damping!r}")
    if max_error is not None and (
        not isinstance(max_error, int | float | np.number) or not 0 <= max_error < 1
    ):
        raise ValueError(f"max_error must be a number from 0 to below 1, got {max_error!r}")
    f, fit = _fit_within(family, conv, rank, max_error, effort)
    # No warning if the requested error is reached, or if the error is near rounding.
    if fit.falling > FALLING and fit.error > 10 * als.NOTHING and max_error is None:
        bound = _bound(family, conv, f.rank, "")
        lower = f" (lower bound {bound:.3g})" if bound > als.NOTHING else ""
        warnings.warn(
            f"{family} of rank {f.rank[0]} has not converged: error {fit.error:.4g}{lower} after "
            f"{effort.iterations} sweeps, falling by {100 * fit.falling:.2g} % per sweep; increase "
            "iterations= or set max_error=",
            ConvergenceWarning,
            stacklevel=3,
        )
    return f


def _fit_within(
    family: str,
    conv: Factorization,
    rank: int | float | None,
    max_error: float | None,
    effort: Effort,
) -> tuple[Factorization, als.Fit]:
    """Fit a rank, or the first chosen by a share or by the error whose fit is within the error."""
    if rank is not None and not is_share(rank):
        return _fit_with_record(family, conv, rank, max_error, effort)  # type: ignore[arg-type]
    *points, last = FAMILIES[family].choose(conv, rank, max_error=max_error)
    for point in points:
        try:
            return _fit_with_record(family, conv, point.rank, max_error, effort)
        except ValueError:  # other starts than those of the sweep: try the next rank
            continue
    return _fit_with_record(family, conv, last.rank, max_error, effort)


def _bound(family: str, conv: Factorization, rank: Ints, variant: str) -> float:
    bounds = als.bound(MODES[family](as_kernel(conv)).tensors)
    return float(bounds[rank[0]]) if rank[0] < len(bounds) else 0.0


def _family(name: str, label: str, marker: str) -> Family:
    return Family(
        name,
        partial(_variants, name),
        partial(_sweep, name),
        partial(_fit, name),
        partial(_bound, name),
        exact=False,
        label=label,
        color="#cc79a7",
        marker=marker,
        is_outer_product_sum=True,
    )


FAMILIES = {
    family.name: family
    for family in (
        _family("cp", "CP", "o"),
        _family("cp3", "CP-3", "s"),
        _family("jaderberg", "Jaderberg", "^"),
        _family("separable_sum", "separable sum", "D"),
    )
}


def cp(
    conv: Factorization,
    rank: int | float | None = None,
    *,
    max_error: float | None = None,
    damping: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate by a sum of outer products with one factor per mode.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int or float, optional
        Number of terms: channels of each inner stage, per group.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error : float, optional
        Relative error, below 1, that the correction may use to lower the sensitivity; 1.01 times
        the smallest error found if not given.
    damping : float
        Weight of a penalty on the squared norms of the terms: with 0.01 no term is larger than
        ten times the kernel.  0 is plain least squares.
    restarts : int
        Number of random starts besides those from singular vectors and from lower ranks.
    seed : int
        Seed of all random numbers; equal seeds give equal results.
    iterations : int
        Largest number of ALS sweeps per start.

    Returns
    -------
    Factorization
        2-D: (rank, in, 1, 1), depthwise (rank, 1, height, 1) and (rank, 1, 1, width), then
        (out, rank, 1, 1): CP-4.  3-D has another depthwise stage.  Each depthwise stage has the
        stride, padding and dilation of its axis.

    Raises
    ------
    ValueError
        If an argument is out of range, `conv` is not one dense stage, or no sum within
        `max_error` is found; NotApplicable if the kernel has too few modes.

    Warns
    -----
    ConvergenceWarning
        If the last sweep lowered the error by more than 0.01 %.

    Notes
    -----
    Alternating least squares on
    :math:`\|W - \sum_r T_r\|^2 + \text{damping} \sum_r \|T_r\|^2`, from the leading singular
    vectors of the unfoldings and from the fit of a lower rank.  The result need not be the best
    approximation, which may not even exist for three or more modes [2]_.
    :func:`lowrank.frontier` gives a lower bound on the error of any chain of this rank.

    If no best approximation exists, and near such kernels, terms grow and cancel: the error is
    small, but any rounding of the factors, of sizes :math:`n_m` and columns :math:`u_r^m`, is
    magnified.  The expected squared change of the kernel for noise of variance 1 on every entry
    is their sensitivity

    .. math:: \sum_m n_m \sum_r \prod_{k \ne m} \|u_r^k\|^2.

    The error-preserving correction [3]_ returns a sum of small sensitivity within the allowed
    error: it minimises the sensitivity over one factor at a time subject to that error, which is
    damped least squares with a multiplier that solves a scalar equation.  A single term is not
    corrected unless `max_error` is given.

    References
    ----------
    .. [1] V. Lebedev, Y. Ganin, M. Rakhuba, I. Oseledets, V. Lempitsky, "Speeding-up
       convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015.
       :arxiv:`1412.6553`.
    .. [2] V. de Silva, L.-H. Lim, "Tensor rank and the ill-posedness of the best low-rank
       approximation problem", SIAM J. Matrix Anal. Appl. 30, 2008. :arxiv:`math/0607647`.
    .. [3] A.-H. Phan et al., "Stable low-rank tensor decomposition for compression of
       convolutional neural network", ECCV 2020. :arxiv:`2008.05441`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 4, 3, 3)), padding=1)
    >>> f = lowrank.cp(conv, rank=1)
    >>> [s.weight.shape for s in f.stages]
    [(1, 4, 1, 1), (1, 1, 3, 1), (1, 1, 1, 3), (8, 1, 1, 1)]
    >>> bool(f.error(conv.to_dense()) < 1e-9)
    True

    A larger allowed error gives smaller terms:

    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> near = lowrank.cp(conv, rank=8)
    >>> calm = lowrank.cp(conv, rank=8, max_error=0.7)
    >>> bool(near.error(conv.to_dense()) < calm.error(conv.to_dense()) <= 0.7)
    True
    >>> bool(np.linalg.norm(calm.stages[0].weight) < np.linalg.norm(near.stages[0].weight))
    True
    """
    return _checked_fit("cp", conv, rank, max_error, Effort(iterations, damping, restarts, seed))


def cp3(
    conv: Factorization,
    rank: int | float | None = None,
    *,
    max_error: float | None = None,
    damping: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate by a sum of outer products of output channels, input channels and filters.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int or float, optional
        Number of terms: channels of the depthwise stage, per group.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error, damping, restarts, seed, iterations : float or int, optional
        As for :func:`lowrank.cp`.

    Returns
    -------
    Factorization
        (rank, in, 1, 1), depthwise (rank, 1, \*kernel), (out, rank, 1, 1).

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.

    Warns
    -----
    ConvergenceWarning
        As for :func:`lowrank.cp`.

    Notes
    -----
    As :func:`lowrank.cp`, with the spatial factors merged [1]_: fewer stages with more taps, and
    the best sum of the same rank has at most the error of that of `cp`.

    References
    ----------
    .. [1] A.-H. Phan et al., "Stable low-rank tensor decomposition for compression of
       convolutional neural network", ECCV 2020. :arxiv:`2008.05441`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> f = lowrank.cp3(lowrank.dense(np.ones((8, 4, 3, 3)), padding=1), rank=1)
    >>> [s.weight.shape for s in f.stages]
    [(1, 4, 1, 1), (1, 1, 3, 3), (8, 1, 1, 1)]
    """
    return _checked_fit("cp3", conv, rank, max_error, Effort(iterations, damping, restarts, seed))


def jaderberg(
    conv: Factorization,
    rank: int | float | None = None,
    *,
    max_error: float | None = None,
    damping: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate by separable filters per input channel, followed by a pointwise stage.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int or float, optional
        Number of separable filters per input channel.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error, damping, restarts, seed, iterations : float or int, optional
        As for :func:`lowrank.cp`.

    Returns
    -------
    Factorization
        2-D: depthwise (in * rank, 1, height, 1) and (in * rank, 1, 1, width), then pointwise
        (out, in * rank, 1, 1), per group.

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.

    Warns
    -----
    ConvergenceWarning
        As for :func:`lowrank.cp`.

    Notes
    -----
    Scheme 1 of [1]_: a CP decomposition of rank `rank` of each slice W[:, s], by alternating
    least squares on all slices at once, which share the allowed error.

    References
    ----------
    .. [1] M. Jaderberg, A. Vedaldi, A. Zisserman, "Speeding up convolutional neural networks
       with low rank expansions", BMVC 2014. :arxiv:`1405.3866`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> f = lowrank.jaderberg(lowrank.dense(np.ones((8, 4, 3, 3)), padding=1), rank=2)
    >>> [s.weight.shape for s in f.stages]
    [(8, 1, 3, 1), (8, 1, 1, 3), (8, 8, 1, 1)]
    """
    return _checked_fit(
        "jaderberg", conv, rank, max_error, Effort(iterations, damping, restarts, seed)
    )


def separable_sum(
    conv: Factorization,
    rank: int | float | None = None,
    *,
    max_error: float | None = None,
    damping: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate a filter over three axes by a sum of products of 1-D filters.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with one input channel per group and three
        axes.
    rank : int or float, optional
        Number of terms.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error, damping, restarts, seed, iterations : float or int, optional
        As for :func:`lowrank.cp`.

    Returns
    -------
    Factorization
        (rank, 1, depth, 1, 1), depthwise (rank, 1, 1, height, 1), (out, rank, 1, 1, width),
        per group; the last stage sums the terms.

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.  For two axes use :func:`lowrank.spatial_svd`, which is optimal.

    Warns
    -----
    ConvergenceWarning
        As for :func:`lowrank.cp`.

    Notes
    -----
    CP of the filter, by alternating least squares; for a spatial-spectral filter, one axis
    against the other two, use :func:`lowrank.spatial_svd` with variant ``"d-hw"``.

    References
    ----------
    .. [1] S. Treitel, J. L. Shanks, "The design of multistage separable planar filters", IEEE
       Trans. Geosci. Electron. 9, 1971.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> box = lowrank.dense(np.ones((1, 1, 3, 3, 3)) / 27, padding=1)
    >>> [s.weight.shape for s in lowrank.separable_sum(box, rank=1).stages]
    [(1, 1, 3, 1, 1), (1, 1, 1, 3, 1), (1, 1, 1, 1, 3)]
    """
    return _checked_fit(
        "separable_sum", conv, rank, max_error, Effort(iterations, damping, restarts, seed)
    )
