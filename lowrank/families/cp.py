"""CP: a kernel as a sum of outer products, all stages but the outer ones depthwise.

Four families differ in which modes the outer products have: `cp` one for every axis (CP-4 of
a 2-D kernel, CP-5 of a 3-D one), `cp3` one for all axes together, `jaderberg` a decomposition
for every input channel on its own, `filter` no channels at all.

Every chain that is returned has gone through the error-preserving correction of
`_als.corrected`: of the sums near the best one found, it is among the least sensitive.
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
from lowrank.families.sweep_point import SweepPoint

SWEEPS = 30  # of ALS for a point of a sweep, from the point before
REFINE = 300  # of ALS for a chain that is returned
FALLING = 1e-4  # of its error: what a sweep that has converged may still take off


class ConvergenceWarning(UserWarning):
    """Alternating least squares ended while its error was still falling.

    Given by :func:`lowrank.cp`, :func:`lowrank.cp3`, :func:`lowrank.jaderberg` and
    :func:`lowrank.separable_sum` where the last sweep still took more than 0.01 % off the error: more
    sweeps find a better chain, or there is no best one and the terms of the sum grow for ever.
    """


class Effort(NamedTuple):
    """How a fit is looked for, as the keywords of the public functions say."""

    iterations: int = REFINE
    ridge: float = 0.0
    restarts: int = 0
    seed: int = 0


class Modes(NamedTuple):
    """Which tensors are decomposed: (batch, \\*modes), and what the modes are."""

    tensors: Array
    channels: str  # "ts", "t", "s" or "": channel modes ahead of the spatial ones
    axes: tuple[str, ...]  # spatial modes
    joined: bool = False  # whether the last axis's stage adds the terms up: none pointwise follows


def _cp_modes(kernel: Kernel) -> Modes:
    if kernel.outs == 1 and kernel.ins > 1 and len(kernel.axes) > 1:
        return Modes(_merged(kernel, kernel.axes)[:, 0], "s", kernel.axes, joined=True)
    if kernel.is_pointwise or min(kernel.outs, kernel.ins) < 2:
        raise NotApplicable(
            "cp needs a spatial kernel and two channels in a group, and two out or two axes with "
            "more than one tap"
        )
    return Modes(_merged(kernel, kernel.axes), "ts", kernel.axes)


def _cp3_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 2 or min(kernel.outs, kernel.ins) < 2:
        raise NotApplicable(
            "cp3 needs two axes with more than one tap (else it is cp) "
            "and two channels in and out of a group"
        )
    return Modes(_merged(kernel, (kernel.letters,)), "ts", (kernel.letters,))


def _jaderberg_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 2 or kernel.outs < 2:
        raise NotApplicable(
            "jaderberg needs two axes with more than one tap and two output channels a group"
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
    """The tensor with one mode for each string of `axes`."""
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
    """The chain at `rank`: blank, or from `factors`, one (batch, size, rank) a mode."""
    g, b, ndim = kernel.groups, len(modes.tensors), conv.geometry.ndim
    each = kernel.scale ** (1 / len(modes.tensors.shape[1:]))
    factor = {m: f * each for m, f in zip((*modes.channels, *modes.axes), factors or ())}
    one, still = (1,) * ndim, conv.geometry.only(())

    def weight(shape: Ints, make: Callable[[], Array]) -> Array:
        return abstract_weight(shape) if factors is None else make().reshape(shape)

    def taps(axes: str) -> Ints:
        return tuple(k if a in axes else 1 for a, k in zip(kernel.letters, kernel.tensor.shape[3:]))

    stages = []
    if "s" in modes.channels:
        w = weight((b * rank, kernel.ins, *one), lambda: factor["s"].swapaxes(1, 2))
        stages.append(Stage(w, still, g))
    for axes in modes.axes[:-1] if modes.joined else modes.axes:
        w = weight((b * rank, 1, *taps(axes)), lambda: factor[axes].swapaxes(1, 2))  # noqa: B023
        # Without a pointwise stage ahead, the first depthwise one spreads each channel out.
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
        # jaderberg has a batch of s as well, which the last stage adds up.
        w = weight(
            (g * kernel.outs, b // g * rank, *one),
            lambda: factor["t"].reshape(g, -1, kernel.outs, rank).swapaxes(1, 2),
        )
        stages.append(Stage(w, still, g))
    return orient(conv, stages)


def _variants(family: str, conv: Factorization) -> tuple[str, ...]:
    MODES[family](as_kernel(conv))
    return ("",)


def _largest(tensors: Array) -> int:
    """A CP rank that any tensor of this size has: the product of all modes but the largest."""
    sizes = sorted(tensors.shape[1:])
    return math.prod(sizes[:-1])


def _sweep(family: str, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """At most a dozen ranks, each started from the one before."""
    kernel = as_kernel(conv)
    modes = MODES[family](kernel)
    tensors = modes.tensors
    bounds = als.bound(tensors)
    # Above three quarters of the dense parameters there is little left to save.
    most = 3 * tensors[0].size // (4 * sum(tensors.shape[1:]))
    fit = None
    for rank in als.ranks(min(max(most, 1), _largest(tensors))):
        fit = _climbed(tensors, rank, fit, Effort())
        bound = float(bounds[rank]) if rank < len(bounds) else 0.0
        yield SweepPoint(
            (rank,),
            fit.error,
            min(bound, fit.error),
            _stages(conv, kernel, modes, rank, None),
            partial(_build, conv, kernel, modes, rank, fit),
        )


def _climbed(tensors: Array, rank: int, fit: als.Fit | None, effort: Effort) -> als.Fit:
    """A few sweeps of ALS at `rank`, from the fit of a lower one if there is one."""
    if fit is None:
        first = _starts(tensors, rank, effort.seed)
    else:
        first = als.grown(fit.factors, rank, effort.seed)
    return _improved(tensors, first, SWEEPS, effort.ridge)


def _starts(tensors: Array, rank: int, seed: int) -> list[Array]:
    return [np.stack(f) for f in zip(*(als.start(t, rank, seed) for t in tensors))]


def _improved(tensors: Array, factors: Sequence[Array], iterations: int, ridge: float) -> als.Fit:
    """ALS on each tensor: TensorLy's for a few large ones, our own for many small ones.

    A ridge in the metric of the terms is our own, too.
    """
    if len(tensors) > 8 or ridge:
        return als.batched_cp(tensors, factors, iterations, ridge)
    fits = [als.cp(t, [f[i] for f in factors], iterations) for i, t in enumerate(tensors)]
    found = [np.stack(f) for f in zip(*(fit.factors for fit in fits))]
    missed = [(fit.error * float(np.linalg.norm(t))) ** 2 for fit, t in zip(fits, tensors)]
    falling = sum(m * fit.falling for m, fit in zip(missed, fits)) / (sum(missed) or 1.0)
    return als.Fit(found, als.batched_error(tensors, found), falling)


def _refined(tensors: Array, rank: int, fit: als.Fit | None, effort: Effort) -> als.Fit:
    """More ALS from `fit`, from a fresh start, and from random ones: the best of them."""
    starts = [_starts(tensors, rank, effort.seed)]
    if fit is not None:
        starts.insert(0, als.grown(fit.factors, rank, effort.seed))
    nothing = [np.empty((len(tensors), n, 0)) for n in tensors.shape[1:]]
    seeds = range(effort.seed + 1, effort.seed + 1 + effort.restarts)
    starts += [als.grown(nothing, rank, seed) for seed in seeds]
    tried = (_improved(tensors, f, effort.iterations, effort.ridge) for f in starts)
    return min(tried, key=lambda fit: fit.error)


def _spared(fit: als.Fit) -> float:
    """The error up to which a fit is made less sensitive by default."""
    if fit.factors[0].shape[-1] == 1:
        return fit.error  # one term has nothing that it could cancel
    return als.spared(fit.error)


def _build(
    conv: Factorization, kernel: Kernel, modes: Modes, rank: int, swept: als.Fit
) -> tuple[Stage, ...]:
    """The stages of a sweep's point, refined and corrected; never worse than the sweep said."""
    fit = _refined(modes.tensors, rank, swept, Effort())
    limit = max(fit.error, min(_spared(fit), swept.error))
    factors = als.corrected(modes.tensors, fit.factors, limit)
    return _stages(conv, kernel, modes, rank, factors)


@on_weight_device
def _fit(
    family: str, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    checked_variant(variant, ("",))
    return _fitted(family, conv, rank, None, Effort())[0]


def _fitted(
    family: str,
    conv: Factorization,
    rank: int | Sequence[int],
    max_error: float | None,
    effort: Effort,
) -> tuple[Factorization, als.Fit]:
    """The chain, and the fit that it was before it was corrected."""
    kernel = as_kernel(conv)
    modes = MODES[family](kernel)
    ranks = checked_rank(rank, (_largest(modes.tensors),), "one number")
    fit = None
    for r in als.ranks(ranks[0], 6)[:-1]:  # a ladder of warm starts, as in a sweep
        fit = _climbed(modes.tensors, r, fit, effort)
    fit = _refined(modes.tensors, ranks[0], fit, effort)
    if max_error is not None and fit.error > max_error:
        more = "the rank, iterations" if fit.falling > FALLING else "the rank"
        raise ValueError(
            f"rank {ranks[0]} reaches {fit.error:.4g}, not {max_error:.4g}: "
            f"raise {more} or max_error"
        )
    limit = _spared(fit) if max_error is None else max_error
    factors = als.corrected(modes.tensors, fit.factors, limit)
    stages = _stages(conv, kernel, modes, ranks[0], factors)
    return replace(conv, stages=stages, family=family, variant="", rank=ranks), fit


def _asked(
    family: str, conv: Factorization, rank: int, max_error: float | None, effort: Effort
) -> Factorization:
    """What the public functions do: arguments checked, a fit, and a word if it is not ready."""
    counts = (("iterations", effort.iterations, 1), ("restarts", effort.restarts, 0))
    for name, count, least in (*counts, ("seed", effort.seed, 0)):
        try:
            fits = operator.index(count) >= least
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {count!r}") from None
        if not fits:
            raise ValueError(f"{name} must be at least {least}, got {count!r}")
    if not isinstance(effort.ridge, int | float | np.number) or not 0 <= effort.ridge < math.inf:
        raise ValueError(f"ridge must be a number, at least 0, got {effort.ridge!r}")
    if max_error is not None and (
        not isinstance(max_error, int | float | np.number) or not 0 <= max_error < 1
    ):
        raise ValueError(f"max_error must be a number from 0 to below 1, got {max_error!r}")
    f, fit = _fitted(family, conv, rank, max_error, effort)
    # An error that was asked for, and is reached, need not settle; nor what is rounding next.
    if fit.falling > FALLING and fit.error > 10 * als.NOTHING and max_error is None:
        bound = _bound(family, conv, f.rank, "")
        under = f"no chain of this rank is under {bound:.3g}; " if bound > als.NOTHING else ""
        warnings.warn(
            f"{family} of rank {f.rank[0]} has not converged: error {fit.error:.4g} after "
            f"{effort.iterations} sweeps, still falling by {100 * fit.falling:.2g} % a sweep; "
            f"{under}give more sweeps with iterations=, or an error to keep to with max_error=",
            ConvergenceWarning,
            stacklevel=3,
        )
    return f


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
    rank: int,
    *,
    max_error: float | None = None,
    ridge: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate by a sum of outer products, one factor for every mode.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int
        Terms: channels of every stage in between, a group.
    max_error : float, optional
        Relative error, below 1, up to which the chain may be made less sensitive; 1.01 times
        the smallest error found if not given.
    ridge : float
        Penalty on the squared norms of the terms, relative to that of the kernel: with 0.01 no
        term is larger than ten times the kernel.  0 is plain least squares.
    restarts : int
        Starts at random beside those from singular vectors and from lower ranks.
    seed : int
        Of all that is random; the result is the same for the same seed.
    iterations : int
        Sweeps from each start, at the most.

    Returns
    -------
    Factorization
        2-D: (rank, in, 1, 1), depthwise (rank, 1, height, 1) and (rank, 1, 1, width), then
        (out, rank, 1, 1): CP-4.  3-D has one depthwise stage more.  Each depthwise stage has
        the stride, padding and dilation of its axis.

    Raises
    ------
    ValueError
        If `rank` is out of range or `conv` is not one dense stage, if another argument is, or if
        no sum within `max_error` is found; NotApplicable, which is one, if there is nothing to
        factor.

    Warns
    -----
    ConvergenceWarning
        If the error was still falling at the end, by more than 0.01 % in a sweep.

    Notes
    -----
    Alternating least squares on
    :math:`\|W - \sum_r T_r\|^2 + \text{ridge} \sum_r \|T_r\|^2`, from the leading singular
    vectors of the unfoldings and from the fit of a lower rank: no promise of the best
    approximation, which need not even exist for three modes and more [2]_.  A lower bound on the
    error of any chain of this rank comes with :func:`lowrank.frontier`.

    Where there is no best one, and near such kernels, terms grow and cancel: the error is small,
    but any rounding of the factors, of sizes :math:`n_m` and columns :math:`u_r^m`, is
    magnified.  The expected squared change of the kernel for noise of variance 1 on every entry
    is their sensitivity

    .. math:: \sum_m n_m \sum_r \prod_{k \ne m} \|u_r^k\|^2.

    By error-preserving correction [3]_ what is returned is, among the sums up to the error
    allowed, one of the least sensitivity: over one factor after another it is minimised subject
    to that error, which is least squares with a weighted ridge whose multiplier solves a scalar
    equation.  A single term is not corrected unless `max_error` is given.

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

    What error there is to spare makes the terms smaller:

    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> near = lowrank.cp(conv, rank=8)
    >>> calm = lowrank.cp(conv, rank=8, max_error=0.7)
    >>> bool(near.error(conv.to_dense()) < calm.error(conv.to_dense()) <= 0.7)
    True
    >>> bool(np.linalg.norm(calm.stages[0].weight) < np.linalg.norm(near.stages[0].weight))
    True
    """
    return _asked("cp", conv, rank, max_error, Effort(iterations, ridge, restarts, seed))


def cp3(
    conv: Factorization,
    rank: int,
    *,
    max_error: float | None = None,
    ridge: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate by a sum of outer products of channels, channels, and whole spatial filters.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int
        Terms: channels of the depthwise stage, a group.
    max_error, ridge, restarts, seed, iterations : float or int, optional
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
    As :func:`lowrank.cp`, with the spatial factors merged [1]_: fewer stages, and never a
    larger error of the best sum at the same rank, for more taps.

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
    return _asked("cp3", conv, rank, max_error, Effort(iterations, ridge, restarts, seed))


def jaderberg(
    conv: Factorization,
    rank: int,
    *,
    max_error: float | None = None,
    ridge: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate with separable filters of every input channel's own, then mix them.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int
        Separable filters an input channel.
    max_error, ridge, restarts, seed, iterations : float or int, optional
        As for :func:`lowrank.cp`.

    Returns
    -------
    Factorization
        2-D: depthwise (in * rank, 1, height, 1) and (in * rank, 1, 1, width), then pointwise
        (out, in * rank, 1, 1), for each group.

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
    least squares on all slices at once, which share what error there is to spare.

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
    return _asked("jaderberg", conv, rank, max_error, Effort(iterations, ridge, restarts, seed))


def separable_sum(
    conv: Factorization,
    rank: int,
    *,
    max_error: float | None = None,
    ridge: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    iterations: int = REFINE,
) -> Factorization:
    r"""Approximate a filter over three axes by a sum of products of one-dimensional ones.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, one input channel a group, three axes.
    rank : int
        Terms.
    max_error, ridge, restarts, seed, iterations : float or int, optional
        As for :func:`lowrank.cp`.

    Returns
    -------
    Factorization
        (rank, 1, depth, 1, 1), depthwise (rank, 1, 1, height, 1), (out, rank, 1, 1, width),
        for each group; the last stage adds the terms up.

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
    against the other two, use :func:`lowrank.spatial_svd` with form ``"d-hw"``.

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
    return _asked("separable_sum", conv, rank, max_error, Effort(iterations, ridge, restarts, seed))
