"""CP: a kernel as a sum of outer products, all stages but the outer ones depthwise.

Four families differ in which modes the outer products have: `cp` one for every axis (CP-4 of
a 2-D kernel, CP-5 of a 3-D one), `cp3` one for all axes together, `jaderberg` a decomposition
for every input channel on its own, `filter` no channels at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization
from lowrank.families import _als
from lowrank.families.family import (
    Family,
    Kernel,
    NotApplicable,
    Point,
    checked_form,
    checked_rank,
    index,
    kernel_of,
    oriented,
)
from lowrank.stage import Stage, blank

SWEEPS = 30  # of ALS for a point of a sweep, from the point before
REFINE = 300  # of ALS for a chain that is returned


class Modes(NamedTuple):
    """Which tensors are decomposed: (batch, \\*modes), and what the modes are."""

    tensors: Array
    channels: str  # "ts", "t", "s" or "": channel modes ahead of the spatial ones
    axes: tuple[str, ...]  # spatial modes
    joined: bool = False  # whether the last axis's stage adds the terms up: none pointwise follows


def _cp_modes(kernel: Kernel) -> Modes:
    if kernel.outs == 1 and kernel.ins > 1 and len(kernel.axes) > 1:
        return Modes(_merged(kernel, kernel.axes)[:, 0], "s", kernel.axes, joined=True)
    if kernel.pointwise or min(kernel.outs, kernel.ins) < 2:
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


def _filter_modes(kernel: Kernel) -> Modes:
    if len(kernel.axes) < 3 or kernel.ins > 1:
        raise NotApplicable(
            "filter needs one input channel a group and three axes with more than one tap "
            "(with two, spatial is optimal)"
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
    "filter": _filter_modes,
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
        return blank(shape) if factors is None else make().reshape(shape)

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
        stages.append(Stage(w, conv.geometry.only(index(axes, ndim)), groups))
    if modes.joined:
        axes = modes.axes[-1]
        out = factor.get("t", np.ones((b, 1, rank)))
        w = weight(
            (g * kernel.outs, rank, *taps(axes)),
            lambda: np.einsum("btr,bnr->btrn", out, factor[axes]),
        )
        stages.append(Stage(w, conv.geometry.only(index(axes, ndim)), g))
    else:
        # jaderberg has a batch of s as well, which the last stage adds up.
        w = weight(
            (g * kernel.outs, b // g * rank, *one),
            lambda: factor["t"].reshape(g, -1, kernel.outs, rank).swapaxes(1, 2),
        )
        stages.append(Stage(w, still, g))
    return oriented(conv, stages)


def _forms(family: str, conv: Factorization) -> tuple[str, ...]:
    MODES[family](kernel_of(conv))
    return ("",)


def _largest(tensors: Array) -> int:
    """A CP rank that any tensor of this size has: the product of all modes but the largest."""
    sizes = sorted(tensors.shape[1:])
    return math.prod(sizes[:-1])


def _sweep(family: str, conv: Factorization, form: str) -> Iterator[Point]:
    """At most a dozen ranks, each started from the one before."""
    kernel = kernel_of(conv)
    modes = MODES[family](kernel)
    tensors = modes.tensors
    bounds = _als.bound(tensors)
    # Above three quarters of the dense parameters there is little left to save.
    most = 3 * tensors[0].size // (4 * sum(tensors.shape[1:]))
    factors = None
    for rank in _als.ranks(min(max(most, 1), _largest(tensors))):
        factors = _improve(tensors, rank, factors, SWEEPS)
        error = _als.batched_error(tensors, factors)
        bound = float(bounds[rank]) if rank < len(bounds) else 0.0
        yield Point(
            (rank,),
            error,
            min(bound, error),
            _stages(conv, kernel, modes, rank, None),
            partial(_refined, conv, kernel, modes, rank, factors),
        )


def _improve(
    tensors: Array, rank: int, factors: Sequence[Array] | None, iterations: int
) -> list[Array]:
    """ALS on each tensor: TensorLy's for a few large ones, our own for many small ones."""
    if tensors[0].ndim == 1:
        return [tensors[:, :, None] * (np.arange(rank) == 0)]
    if len(tensors) > 8:
        if factors is not None:
            wide = [_als.grown(list(some), rank) for some in zip(*factors)]
            factors = [np.stack(f) for f in zip(*wide)]
        return _als.batched_cp(tensors, rank, iterations, factors)
    found = []
    for i, tensor in enumerate(tensors):
        first = (
            _als.start(tensor, rank)
            if factors is None
            else _als.grown([f[i] for f in factors], rank)
        )
        found.append(_als.cp(tensor, first, iterations)[0])
    return [np.stack(f) for f in zip(*found)]


def _refined(
    conv: Factorization,
    kernel: Kernel,
    modes: Modes,
    rank: int,
    factors: Sequence[Array] | None,
) -> tuple[Stage, ...]:
    """The stages, after more ALS from `factors` and from a fresh start: the better of the two."""
    starts = [None] if factors is None else [factors, None]
    tried = [_improve(modes.tensors, rank, f, REFINE) for f in starts]
    best = min(tried, key=lambda f: _als.batched_error(modes.tensors, f))
    return _stages(conv, kernel, modes, rank, best)


def _fit(
    family: str, conv: Factorization, rank: int | Sequence[int], form: str | None = None
) -> Factorization:
    kernel = kernel_of(conv)
    modes = MODES[family](kernel)
    form = checked_form(form, ("",))
    ranks = checked_rank(rank, (_largest(modes.tensors),), "one number")
    factors = None
    for r in _als.ranks(ranks[0], 6)[:-1]:  # a ladder of warm starts, as in a sweep
        factors = _improve(modes.tensors, r, factors, SWEEPS)
    stages = _refined(conv, kernel, modes, ranks[0], factors)
    return replace(conv, stages=stages, family=family, form=form, rank=ranks)


def _bound(family: str, conv: Factorization, rank: Ints, form: str) -> float:
    bounds = _als.bound(MODES[family](kernel_of(conv)).tensors)
    return float(bounds[rank[0]]) if rank[0] < len(bounds) else 0.0


FAMILIES = {
    name: Family(
        partial(_forms, name),
        partial(_sweep, name),
        partial(_fit, name),
        partial(_bound, name),
        exact=False,
    )
    for name in MODES
}


def cp(conv: Factorization, rank: int) -> Factorization:
    r"""Approximate by a sum of outer products, one factor for every mode.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int
        Terms: channels of every stage in between, a group.

    Returns
    -------
    Factorization
        2-D: (rank, in, 1, 1), depthwise (rank, 1, height, 1) and (rank, 1, 1, width), then
        (out, rank, 1, 1): CP-4.  3-D has one depthwise stage more.  Each depthwise stage has
        the stride, padding and dilation of its axis.

    Raises
    ------
    ValueError
        If `rank` is out of range or `conv` is not one dense stage; NotApplicable, which is
        one, if there is nothing to factor.

    Notes
    -----
    Alternating least squares from the leading singular vectors of the unfoldings: no promise
    of the best approximation, which need not even exist for three modes and more [2]_.  A
    lower bound on the error of any chain of this rank comes with :func:`lowrank.frontier`.

    References
    ----------
    .. [1] V. Lebedev, Y. Ganin, M. Rakhuba, I. Oseledets, V. Lempitsky, "Speeding-up
       convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015.
       :arxiv:`1412.6553`.
    .. [2] V. de Silva, L.-H. Lim, "Tensor rank and the ill-posedness of the best low-rank
       approximation problem", SIAM J. Matrix Anal. Appl. 30, 2008. :arxiv:`math/0607647`.

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
    """
    return _fit("cp", conv, rank)


def cp3(conv: Factorization, rank: int) -> Factorization:
    r"""Approximate by a sum of outer products of channels, channels, and whole spatial filters.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int
        Terms: channels of the depthwise stage, a group.

    Returns
    -------
    Factorization
        (rank, in, 1, 1), depthwise (rank, 1, \*kernel), (out, rank, 1, 1).

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.

    Notes
    -----
    As :func:`lowrank.cp`, with the spatial factors merged [1]_: fewer stages, and never a
    larger error at the same rank, for more taps.

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
    return _fit("cp3", conv, rank)


def jaderberg(conv: Factorization, rank: int) -> Factorization:
    r"""Approximate with separable filters of every input channel's own, then mix them.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with at least two axes of several taps.
    rank : int
        Separable filters an input channel.

    Returns
    -------
    Factorization
        2-D: depthwise (in * rank, 1, height, 1) and (in * rank, 1, 1, width), then pointwise
        (out, in * rank, 1, 1), for each group.

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.

    Notes
    -----
    Scheme 1 of [1]_: a CP decomposition of rank `rank` of each slice W[:, s], by alternating
    least squares on all slices at once.

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
    return _fit("jaderberg", conv, rank)


def filter(conv: Factorization, rank: int) -> Factorization:
    r"""Approximate a filter over three axes by a sum of products of one-dimensional ones.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, one input channel a group, three axes.
    rank : int
        Terms.

    Returns
    -------
    Factorization
        (rank, 1, depth, 1, 1), depthwise (rank, 1, 1, height, 1), (out, rank, 1, 1, width),
        for each group; the last stage adds the terms up.

    Raises
    ------
    ValueError
        As for :func:`lowrank.cp`.  For two axes use :func:`lowrank.spatial`, which is optimal.

    Notes
    -----
    CP of the filter, by alternating least squares; for a spatial-spectral filter, one axis
    against the other two, use :func:`lowrank.spatial` with form ``"d-hw"``.

    References
    ----------
    .. [1] S. Treitel, J. L. Shanks, "The design of multistage separable planar filters", IEEE
       Trans. Geosci. Electron. 9, 1971.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> box = lowrank.dense(np.ones((1, 1, 3, 3, 3)) / 27, padding=1)
    >>> [s.weight.shape for s in lowrank.filter(box, rank=1).stages]
    [(1, 1, 3, 1, 1), (1, 1, 1, 3, 1), (1, 1, 1, 1, 3)]
    """
    return _fit("filter", conv, rank)
