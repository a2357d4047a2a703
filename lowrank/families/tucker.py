"""Tucker: pointwise stages to fewer channels and back around a smaller core.

`tucker` compresses the two channel modes (Tucker-2), `tucker_full` every mode; `tucker_cp`
compresses the channel modes and decomposes the core by CP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage, abstract_weight
from lowrank.factorization import Factorization
from lowrank.families import als
from lowrank.families.family import Family, Spectrum
from lowrank.families.kernel import (
    Kernel,
    NotApplicable,
    as_kernel,
    axis_indices,
    balance_norms,
    checked_rank,
    checked_variant,
    on_weight_device,
    orient,
)
from lowrank.families.sweep_point import SweepPoint

POINTS = 2500  # largest number of rank combinations in a sweep
ITERATIONS = 100  # largest number of HOOI iterations, as in TensorLy
TOLERANCE = 1e-5  # a tenth of TensorLy's: from the same start, never worse
CP_SHARES = (0.25, 0.5, 0.75)  # shares of the channels in sweeps of tucker_cp
CP_SWEEPS = 15  # ALS sweeps per point of a rank sweep; a returned chain takes 20 times as many


class Parts(NamedTuple):
    """HOSVD, from which every combination of ranks is truncated.

    Modes are (out, in, \\*axes); `tensor` has one axis per mode, after that of the groups.
    """

    conv: Factorization
    kernel: Kernel
    axes: tuple[str, ...]  # spatial modes that are compressed
    tensor: Array  # (g, out, in, *modes)
    factors: tuple[Array, ...]  # (g, size, size), orthonormal, per compressed mode
    core: Array  # (g, ranks..., rest); this and the fields below serve sweeps
    energy: Array  # (ranks + 1...): squared norm of the truncated core
    tails: tuple[Array, ...]  # truncation errors per unfolding, that of the rest last

    def largest(self) -> Ints:
        """Return the full ranks."""
        return tuple(self.tensor.shape[1 : 1 + len(self.factors)])

    def error(self, rank: Ints) -> float:
        """Return the exact relative error of the truncated HOSVD."""
        if rank == self.largest():
            return 0.0
        total = float(self.energy[self.largest()])
        return math.sqrt(max(0.0, 1 - float(self.energy[rank]) / total)) if total else 0.0

    def bound(self, rank: Ints) -> float:
        """Return a lower bound on the error of any Tucker tensor of these ranks.

        The unfolding of the other modes has at most the product of the ranks as its rank.
        """
        *modes, rest = self.tails
        least = rest[min(math.prod(rank), len(rest) - 1)]
        return float(max(least, *(t[r] for t, r in zip(modes, rank))))


def decompose(kernel: Kernel, conv: Factorization, axes: tuple[str, ...]) -> Parts:
    """Return the HOSVD along out, in and `axes`, with all eigenvectors of the Gram matrices."""
    tensor = _unfoldable(kernel, axes)
    core, factors, tails = tensor, [], []
    for mode in range(1, 3 + len(axes)):
        values, vectors = chain_algebra.eigh(_grams(tensor, mode))
        values, vectors = values[:, ::-1].clip(min=0), vectors[:, :, ::-1]
        tails.append(chain_algebra.tail_norms(np.sqrt(values)))
        factors.append(vectors)
        core = _projected(core, vectors, mode)
    energy = np.square(core).sum((0, -1))
    for mode in range(energy.ndim):
        energy = energy.cumsum(mode)
    energy = np.pad(energy, [(1, 0)] * energy.ndim)
    tails.append(chain_algebra.truncation_errors(tensor, (tensor.ndim - 1,), (0,)))
    return Parts(conv, kernel, axes, tensor, tuple(factors), core, energy, tuple(tails))


def truncated(kernel: Kernel, conv: Factorization, axes: tuple[str, ...], rank: Ints) -> Parts:
    """Return the HOSVD truncated to one rank, which takes half the time of `decompose`."""
    tensor = _unfoldable(kernel, axes)
    factors = []
    for mode, r in enumerate(rank, start=1):
        leading = [chain_algebra.leading_eigenpairs(g, r)[1] for g in _grams(tensor, mode)]
        factors.append(np.stack(leading)[:, :, ::-1])
    none = np.empty(0)
    return Parts(conv, kernel, axes, tensor, tuple(factors), none, none, ())


def _unfoldable(kernel: Kernel, axes: tuple[str, ...]) -> Array:
    """Return the kernel with one mode per out, in and item of `axes`, and one for the rest."""
    w = kernel.tensor
    order = [3 + kernel.letters.index(a) for mode in axes for a in mode]
    rest = [3 + i for i, a in enumerate(kernel.letters) if a not in "".join(axes)]
    sizes = [math.prod(w.shape[3 + kernel.letters.index(a)] for a in mode) for mode in axes]
    w = w.transpose(0, 1, 2, *order, *rest)
    return w.reshape(*w.shape[:3], *sizes, -1)


def _grams(tensor: Array, mode: int) -> Array:
    """Return the Gram matrices of the unfoldings along `mode`, per group."""
    unfolded = np.moveaxis(tensor, mode, 1).reshape(len(tensor), tensor.shape[mode], -1)
    return cast(Array, unfolded @ unfolded.swapaxes(1, 2))


def _projected(tensor: Array, factor: Array, mode: int) -> Array:
    """Multiply `tensor` by the transpose of `factor` along `mode`, per group."""
    moved = np.moveaxis(tensor, mode, 1)
    flat = factor.swapaxes(1, 2) @ moved.reshape(*moved.shape[:2], -1)
    return np.moveaxis(flat.reshape(len(flat), flat.shape[1], *moved.shape[2:]), 1, mode)


def refined(parts: Parts, rank: Ints) -> tuple[list[Array], Array]:
    """Return factors (g, size, rank) and core after HOOI from the truncated HOSVD, per group."""
    factors = []
    for i, tensor in enumerate(parts.tensor):
        start = [f[i, :, :r] for f, r in zip(parts.factors, rank)]
        full = rank == parts.largest() or not tensor.any()
        factors.append(start if full else hooi(tensor, start))
    stacked = [np.stack(f) for f in zip(*factors)]
    core = parts.tensor
    for mode, factor in enumerate(stacked, start=1):
        core = _projected(core, factor, mode)
    return _shared(stacked, core)


def hooi(tensor: Array, factors: Sequence[Array]) -> list[Array]:
    """Return orthonormal Tucker factors of the first modes by HOOI from orthonormal `factors`.

    Each factor has the leading eigenvectors of the Gram matrix of the tensor projected on the
    others: an SVD of the unfolding takes many times as long.  In float64, squaring loses half of
    the digits of the small singular values only.
    """
    factors = list(factors)
    whole, before = float(np.square(tensor).sum()), math.inf
    for _ in range(ITERATIONS):
        for mode, factor in enumerate(factors):
            part = tensor[None]
            # The mode that shrinks the tensor most comes first.
            others = [m for m in range(len(factors)) if m != mode]
            for m in sorted(others, key=lambda m: factors[m].shape[1] / len(factors[m])):
                part = _projected(part, factors[m][None], m + 1)
            size, rank = factor.shape
            unfolded = np.moveaxis(part[0], mode, 0).reshape(size, -1)
            values, factors[mode] = chain_algebra.leading_eigenpairs(unfolded @ unfolded.T, rank)
        error = math.sqrt(max(0.0, 1 - float(values.sum()) / whole))
        if before - error < TOLERANCE:
            break
        before = error
    return factors


def _shared(factors: list[Array], core: Array) -> tuple[list[Array], Array]:
    """Move the square root of the core's norm along each mode to the factors.

    A diagonal core then shares its singular values as a truncated SVD does.  The factor of a mode
    of one channel has no stage and is multiplied into the core.
    """
    norms = []
    for mode in range(1, len(factors) + 1):
        others = tuple(a for a in range(1, core.ndim) if a != mode)
        norms.append(np.sqrt(np.sqrt(np.square(core).sum(others))))
    for mode, (factor, norm) in enumerate(zip(list(factors), norms), start=1):
        along = (slice(None), *(None,) * (mode - 1), slice(None), *(None,) * (core.ndim - 1 - mode))
        if factor.shape[1] == 1:
            core, factors[mode - 1] = core * factor[:, :1, 0][along], np.ones_like(factor)
        else:
            safe = np.where(norm > 0, norm, 1)
            core, factors[mode - 1] = core / safe[along], factor * safe[:, None]
    return factors, core


def _grid(largest: Ints) -> Iterator[Ints]:
    """Yield at most POINTS combinations of ranks; the longest modes are thinned first."""
    counts = list(largest)
    while math.prod(counts) > POINTS:
        longest = counts.index(max(counts))
        counts[longest] = counts[longest] * 9 // 10
    steps = [
        sorted({round(r) for r in np.linspace(1, m, n)}) if n > 1 else [m]
        for m, n in zip(largest, counts)
    ]
    return itertools.product(*steps)


def _chain(
    parts: Parts, rank: Ints, factors: Sequence[Array] | None, core: Array | None
) -> tuple[Stage, ...]:
    """Return the chain of `factors` (g, size, rank) and `core` (g, ranks..., rest).

    Without factors its weights are abstract.
    """
    conv, kernel, g = parts.conv, parts.kernel, parts.kernel.groups
    ndim = conv.geometry.ndim
    one, pointwise_geometry = (1,) * ndim, conv.geometry.only(())
    each = kernel.scale ** (
        1 / (1 + sum(n > 1 for n in (kernel.outs, kernel.ins)) + len(parts.axes))
    )

    def weight(shape: Ints, make: Callable[[], Array]) -> Array:
        return abstract_weight(shape) if factors is None else make().reshape(shape) * each

    def taps(axes: str) -> Ints:
        return tuple(k if a in axes else 1 for a, k in zip(kernel.letters, kernel.tensor.shape[3:]))

    outs, ins, *within = rank
    stages = []
    if kernel.ins > 1:
        w = weight((g * ins, kernel.ins, *one), lambda: factors[1].swapaxes(1, 2))  # type: ignore[index]
        stages.append(Stage(w, pointwise_geometry, g))
    spread = ins
    for i, (axes, q) in enumerate(zip(parts.axes, within)):
        geometry = conv.geometry.only(axis_indices(axes, ndim))
        shape = (q, 1, *taps(axes))
        if g == 1:  # the same filters for every channel
            w = weight(shape, lambda: factors[2 + i].swapaxes(1, 2))  # type: ignore[index]  # noqa: B023
            stages.append(Stage(w, geometry, outer=spread))
        else:
            w = weight(
                (g * spread * q, *shape[1:]),
                lambda: np.repeat(factors[2 + i].swapaxes(1, 2)[:, None], spread, 1),  # type: ignore[index]  # noqa: B023
            )
            stages.append(Stage(w, geometry, g * spread))
        spread *= q
    left = "".join(a for a in kernel.letters if a not in "".join(parts.axes))
    w = weight((g * outs, spread, *taps(left)), lambda: core)  # type: ignore[arg-type,return-value]
    stages.append(Stage(w, conv.geometry.only(axis_indices(left, ndim)), g))
    if kernel.outs > 1:
        w = weight((g * kernel.outs, outs, *one), lambda: factors[0])  # type: ignore[index]
        stages.append(Stage(w, pointwise_geometry, g))
    return orient(conv, stages if factors is None else balance_norms(stages))


def _axes(family: str, kernel: Kernel) -> tuple[str, ...]:
    channels = sorted((kernel.outs, kernel.ins))
    if family == "tucker_full":
        if kernel.is_pointwise or channels[1] < 2 or (channels[0] < 2 and len(kernel.axes) < 2):
            raise NotApplicable(
                "tucker_full needs a spatial kernel and two input and output channels per group, "
                "or two of either and two axes with more than one tap"
            )
        return kernel.axes
    if kernel.is_pointwise or channels[0] < 2:
        raise NotApplicable(
            f"{family} needs a spatial kernel and two input and output channels per group"
        )
    return ()


def _variants(family: str, conv: Factorization) -> tuple[str, ...]:
    _axes(family, as_kernel(conv))
    return ("",)


def _parts(family: str, conv: Factorization) -> Parts:
    kernel = as_kernel(conv)
    return decompose(kernel, conv, _axes(family, kernel))


def _build(parts: Parts, rank: Ints) -> tuple[Stage, ...]:
    return _chain(parts, rank, *refined(parts, rank))


def _sweep(family: str, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """Yield the truncated HOSVD at combinations of ranks; `build` refines it by HOOI."""
    parts = _parts(family, conv)
    for rank in _grid(parts.largest()):
        error = parts.error(rank)
        bound = min(parts.bound(rank), error)
        stages = _chain(parts, rank, None, None)
        yield SweepPoint(rank, error, bound, stages, partial(_build, parts, rank))


@on_weight_device
def _fit(
    family: str, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    kernel = as_kernel(conv)
    axes = _axes(family, kernel)
    variant = checked_variant(variant, ("",))
    names = "out, in" + "".join(f", {a}" for a in axes)
    sizes = _unfoldable(kernel, axes).shape[1:-1]
    ranks = checked_rank(rank, sizes, names)
    parts = truncated(kernel, conv, axes, ranks)
    return replace(conv, stages=_build(parts, ranks), family=family, variant=variant, rank=ranks)


def _cp_chain(
    parts: Parts, rank: Ints, factors: Sequence[Array] | None, terms: Sequence[Array] | None
) -> tuple[Stage, ...]:
    """Return the chain of Tucker-2 with a CP core: five stages, fewer if pointwise ones merge."""
    conv, kernel, g = parts.conv, parts.kernel, parts.kernel.groups
    outs, ins, r = rank
    ndim = conv.geometry.ndim
    one, pointwise_geometry = (1,) * ndim, conv.geometry.only(())
    each = kernel.scale ** (1 / 3)

    def pointwise(shapes: Sequence[Ints], makes: Callable[[], Sequence[Array]]) -> list[Stage]:
        (a, b), (_, c) = shapes  # (b, c) runs first, then (a, b): merged if (a, c) is smaller
        merged = a * c <= a * b + b * c
        if factors is None:
            kept = (
                [abstract_weight((g * a, c))]
                if merged
                else [abstract_weight((g * b, c)), abstract_weight((g * a, b))]
            )
        else:
            last, first = makes()
            kept = [last @ first] if merged else [first, last]
        kept = [w.reshape(-1, w.shape[-1], *one) for w in kept]
        return [Stage(w, pointwise_geometry, g) for w in kept]

    taps = (g * r, 1, *kernel.tensor.shape[3:])
    stages = [
        *pointwise(
            [(r, ins), (ins, kernel.ins)],
            lambda: (terms[1].swapaxes(1, 2) * each, factors[1].swapaxes(1, 2)),  # type: ignore[index]
        ),
        Stage(
            abstract_weight(taps)
            if terms is None
            else (terms[2].swapaxes(1, 2) * each).reshape(taps),
            conv.geometry,
            g * r,
        ),
        *pointwise(
            [(kernel.outs, outs), (outs, r)],
            lambda: (factors[0], terms[0] * each),  # type: ignore[index]
        ),
    ]
    return orient(conv, stages if factors is None else balance_norms(stages))


def _cp_terms(core: Array, r: int, start: Sequence[Array] | None, sweeps: int) -> list[Array]:
    """Fit CP-3 to the core of every group, (g, out, in, taps)."""
    if start is None:
        first = [np.stack(f) for f in zip(*(als.start(c, r) for c in core))]
    else:
        first = als.grown(start, r)
    return als.batched_cp(core, first, sweeps).factors


def _cp_build(parts: Parts, rank: Ints, terms: Sequence[Array] | None = None) -> tuple[Stage, ...]:
    """Return the better chain of the HOOI core and, if given, of a sweep's core and `terms`."""
    t, s, r = rank
    cores: list[tuple[list[Array], Array, Sequence[Array] | None]] = [
        (*refined(parts, rank[:2]), None)
    ]
    if terms is not None:
        cut = [f[:, :, :n] for f, n in zip(parts.factors, (t, s))]
        cores.append((cut, parts.core[:, :t, :s], terms))
    tried, most = [], math.inf
    for factors, core, start in cores:
        if start is not None:
            most = _missed(core, start)
        found = _cp_terms(core, r, start, 20 * CP_SWEEPS)
        tried.append((_missed(core, found), factors, core, found))
    _, factors, core, found = min(tried, key=lambda candidate: candidate[0])
    # The correction may increase the error a little, but not above that of the sweep point.
    error, norm = als.batched_error(core, found), float(np.linalg.norm(core))
    if norm > 0 and r > 1:
        allowed = math.sqrt(max(most / norm**2 + 1, 0.0)) if most < math.inf else math.inf
        found = als.corrected(core, found, max(error, min(als.spared(error), allowed)))
    return _cp_chain(parts, rank, factors, found)


def _missed(core: Array, terms: Sequence[Array]) -> float:
    """Return the squared error of a CP core minus the squared norm of the core.

    Errors on different cores differ in this and a constant.
    """
    norm = float(np.linalg.norm(core))
    return (als.batched_error(core, terms) * norm) ** 2 - norm**2


def _cp_sweep(family: str, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """Yield a few sizes of the core, each with a few CP ranks and warm starts."""
    parts = _parts(family, conv)
    outs, ins = parts.largest()
    total = float(np.linalg.norm(parts.core)) or 1.0
    bounds = als.bound(parts.tensor)
    shares = {(max(1, round(outs * p)), max(1, round(ins * p))) for p in CP_SHARES}
    for t, s in sorted(shares):
        core, terms = parts.core[:, :t, :s], None
        cut = parts.error((t, s))
        # CP sums above half of the parameters of the core save little.
        largest = min(core[0].size // (2 * sum(core.shape[1:])), _terms(core))
        for r in als.ranks(largest, 6):
            terms = _cp_terms(core, r, terms, CP_SWEEPS)
            # The truncation error and the CP error are orthogonal.
            error = math.hypot(cut, als.batched_error(core, terms) * np.linalg.norm(core) / total)
            bound = max(parts.bound((t, s)), bounds[r] if r < len(bounds) else 0.0)
            yield SweepPoint(
                (t, s, r),
                error,
                min(float(bound), error),
                _cp_chain(parts, (t, s, r), None, None),
                partial(_cp_build, parts, (t, s, r), terms),
            )


def _terms(core: Array) -> int:
    """Return a CP rank that suffices for any core of this size."""
    return math.prod(sorted(core.shape[1:])[:-1])


@on_weight_device
def _cp_fit(
    family: str, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    parts = _parts(family, conv)
    variant = checked_variant(variant, ("",))
    taps = parts.tensor.shape[-1]
    largest = (*parts.largest(), parts.largest()[0] * parts.largest()[1] * taps)
    ranks = checked_rank(rank, largest, "out, in, terms")
    return replace(conv, stages=_cp_build(parts, ranks), family=family, variant=variant, rank=ranks)


def _bound(family: str, conv: Factorization, rank: Ints, variant: str) -> float:
    return _parts(family, conv).bound(rank)


def _cp_bound(family: str, conv: Factorization, rank: Ints, variant: str) -> float:
    parts = _parts(family, conv)
    bounds = als.bound(parts.tensor)
    return max(parts.bound(rank[:2]), float(bounds[rank[2]]) if rank[2] < len(bounds) else 0.0)


def _spectra(family: str, conv: Factorization, variant: str) -> list[Spectrum]:
    """Return the spectrum of every unfolding: out, in, and each axis of `tucker_full`."""
    kernel = as_kernel(conv)
    modes = {"out": [1], "in": [2]}
    modes |= {axes: [3 + kernel.letters.index(a) for a in axes] for axes in _axes(family, kernel)}
    spectra = []
    for name, axes in modes.items():
        rows = math.prod(kernel.tensor.shape[a] for a in axes)
        unfolded = np.moveaxis(kernel.tensor, axes, range(1, 1 + len(axes)))
        matrices = unfolded.reshape(kernel.groups, rows, -1)
        values = np.linalg.svd(matrices, compute_uv=False)
        spectra.append(Spectrum(name, rows, matrices.shape[2], values))
    return spectra


FAMILIES = {
    "tucker": Family(
        "tucker",
        partial(_variants, "tucker"),
        partial(_sweep, "tucker"),
        partial(_fit, "tucker"),
        partial(_bound, "tucker"),
        exact=False,
        label="Tucker-2",
        color="#56b4e9",
        marker="o",
        has_fast_sweep=True,
        spectra=partial(_spectra, "tucker"),
    ),
    "tucker_full": Family(
        "tucker_full",
        partial(_variants, "tucker_full"),
        partial(_sweep, "tucker_full"),
        partial(_fit, "tucker_full"),
        partial(_bound, "tucker_full"),
        exact=False,
        label="Tucker",
        color="#56b4e9",
        marker="s",
        spectra=partial(_spectra, "tucker_full"),
    ),
    "tucker_cp": Family(
        "tucker_cp",
        partial(_variants, "tucker_cp"),
        partial(_cp_sweep, "tucker_cp"),
        partial(_cp_fit, "tucker_cp"),
        partial(_cp_bound, "tucker_cp"),
        exact=False,
        label="Tucker-CP",
        color="#56b4e9",
        marker="^",
        is_outer_product_sum=True,
    ),
}


def tucker(
    conv: Factorization,
    rank: tuple[int, int] | float | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a smaller convolution between two pointwise ones (Tucker-2).

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : (int, int) or float, optional
        Channels (out, in) of the core, per group.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        (rank_in, in, 1, 1), (rank_out, rank_in, \*kernel), (out, rank_out, 1, 1).

    Raises
    ------
    ValueError
        If `rank` is out of range or `conv` is not one dense stage; NotApplicable if the kernel
        has too few modes.

    Notes
    -----
    Truncated HOSVD, whose error is at most :math:`\sqrt 2` times the smallest [2]_, refined by
    HOOI to a stationary point.

    References
    ----------
    .. [1] Y.-D. Kim, E. Park, S. Yoo, T. Choi, L. Yang, D. Shin, "Compression of deep
       convolutional neural networks for fast and low power mobile applications", ICLR 2016.
       :arxiv:`1511.06530`.
    .. [2] L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
       decomposition", SIAM J. Matrix Anal. Appl. 21, 2000.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.tucker(conv, rank=(4, 3)).stages]
    [(3, 6, 1, 1), (4, 3, 3, 3), (8, 4, 1, 1)]
    """
    return FAMILIES["tucker"].fit(conv, rank, max_error=max_error)


def tucker_full(
    conv: Factorization,
    rank: tuple[int, ...] | float | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by Tucker with all modes compressed: channels and each spatial axis.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : tuple of int or float, optional
        (out, in, \*axes): channels of the core, and filters along each axis.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        Pointwise, one stage per axis with filters shared by all channels, pointwise core,
        pointwise.

    Raises
    ------
    ValueError
        As for :func:`lowrank.tucker`.

    Notes
    -----
    As :func:`lowrank.tucker`, with quasi-optimality factor :math:`\sqrt{2 + axes}`.  With
    groups the filters of each group are stored for each of its channels.

    References
    ----------
    .. [1] L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
       decomposition", SIAM J. Matrix Anal. Appl. 21, 2000.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.tucker_full(conv, rank=(4, 3, 2, 1)).stages]
    [(3, 6, 1, 1), (2, 1, 3, 1), (1, 1, 1, 3), (4, 6, 1, 1), (8, 4, 1, 1)]
    """
    return FAMILIES["tucker_full"].fit(conv, rank, max_error=max_error)


def tucker_cp(
    conv: Factorization,
    rank: tuple[int, int, int] | float | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by Tucker-2 whose core is a CP sum.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : (int, int, int) or float, optional
        Channels (out, in) of the Tucker core, and number of terms of the CP sum, per group.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        Pointwise, pointwise, depthwise, pointwise, pointwise; two pointwise stages in a row
        are merged if that does not cost more.

    Raises
    ------
    ValueError
        As for :func:`lowrank.tucker`.

    Notes
    -----
    The errors of the truncation and of the CP sum are orthogonal: their squares add up.

    References
    ----------
    .. [1] A.-H. Phan et al., "Stable low-rank tensor decomposition for compression of
       convolutional neural network", ECCV 2020. :arxiv:`2008.05441`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.tucker_cp(conv, rank=(4, 4, 6)).stages]
    [(4, 16, 1, 1), (6, 4, 1, 1), (6, 1, 3, 3), (4, 6, 1, 1), (16, 4, 1, 1)]
    """
    return FAMILIES["tucker_cp"].fit(conv, rank, max_error=max_error)
