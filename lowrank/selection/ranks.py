"""Rules that pick a rank: by error, by cost, by energy, and by variational Bayes.

Each takes a convolution and a family and gives a rank for that family's fit.  None of them looks
at data or at a network: what they promise is about the weights, and each says what.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.cost import chain_cost
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, svd, tensor_train
from lowrank.families.kernel import as_kernel

GRID = 128  # noise variances tried before the best is refined: free energies have local minima


class RankWarning(UserWarning):
    """A rule found nothing to go by; the rank that it gives is a stand-in.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> from lowrank import dense
    >>> from lowrank.selection import ranks
    >>> noise = dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", ranks.RankWarning)
    ...     ranks.evbmf(noise)
    (1, 1)
    """


@dataclass(frozen=True, slots=True)
class Estimate:
    """What EVBMF makes of a matrix.

    Attributes
    ----------
    rank : int
        Singular values above `threshold`: 0 where all is taken for noise.
    noise : float
        Estimated standard deviation of the noise, in units of the matrix's entries.
    threshold : float
        Largest singular value that is still taken for noise.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.selection import ranks
    >>> ranks.evbmf_of(np.zeros((4, 9)))
    Estimate(rank=0, noise=0.0, threshold=0.0)
    """

    rank: int
    noise: float
    threshold: float


class _Spectrum(NamedTuple):
    """One unfolding: its name, its shape, and the singular values of every group."""

    name: str
    rows: int
    columns: int
    values: Array  # (batch, min(rows, columns)), of weights divided by their largest magnitude


def for_error(
    conv: Factorization, family: str, max_error: float, variant: str | None = None
) -> Ints:
    r"""Smallest rank whose relative error is within a limit.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        A name from :data:`lowrank.FAMILIES`.
    max_error : float
        Largest relative Frobenius error, up to rounding.
    variant : str, optional
        A form of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        For ``FAMILIES[family].fit``.  Where a family has several ranks, of all combinations in
        its sweep the one with the fewest parameters.

    Raises
    ------
    ValueError
        If `family`, `variant` or `max_error` is not possible, the family does not apply to `conv`,
        or no rank of its sweep is within `max_error`; the message says what is reached.

    See Also
    --------
    lowrank.approximate : all families at once, and never dearer than the dense kernel.

    Notes
    -----
    For a family of one SVD the promise is exact: this rank is within

    .. math:: \sqrt{\sum_{r > R} \sigma_r^2 / \sum_r \sigma_r^2} \le \text{max\_error},

    and one less is not.  For the others it holds for the sweep's start, which refinement does
    not make worse, and smaller ranks may do: ranks between the points of the sweep (at most
    2,500 of Tucker, a dozen of CP and tensor trains) are not looked at, and sweeps of Tucker and
    tensor trains do not tell errors below 1e-7 from rounding.  A sweep of CP is many runs of
    ALS, seconds to minutes, and a fit anew may end a little off it.  The rule promises nothing
    about cost: at small errors the rank may cost more than the dense kernel.  Nor is the error
    of the weights that of a network's output, except for inputs of white noise.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import dense, spatial_svd
    >>> from lowrank.selection import ranks
    >>> conv = dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)))
    >>> ranks.for_error(conv, "spatial_svd", 0.3)
    (25,)
    >>> errors = [spatial_svd(conv, r).error(conv.to_dense()) for r in (24, 25)]
    >>> errors[0] > 0.3 >= errors[1]
    True
    """
    variant = _variant(conv, family, variant)
    if not isinstance(max_error, int | float | np.number) or not max_error >= 0:
        raise ValueError(f"max_error must be a number, at least 0, got {max_error!r}")
    points = list(FAMILIES[family].sweep(conv, variant))
    within = [p for p in points if p.error <= max_error + _rounding(conv)]
    if not within:
        least = min(points, key=lambda p: p.error)
        raise ValueError(
            f"no rank in the sweep of {family} has an error of at most {max_error:.6g}; the "
            f"smallest is {least.error:.6g}, of rank {least.rank}: allow more, or try another "
            "family"
        )
    return min(within, key=lambda p: (_weights(p.stages), p.error)).rank


def for_ratio(
    conv: Factorization,
    family: str,
    *,
    params: float | None = None,
    macs: float | None = None,
    input_shape: Sequence[int] | None = None,
    variant: str | None = None,
) -> Ints:
    """Most accurate rank that costs at most a share of the dense kernel.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        A name from :data:`lowrank.FAMILIES`.
    params, macs : float, optional
        Share in (0, 1] of the dense parameters, the bias included on both sides, or of the
        dense multiply-adds.  Give one of them.
    input_shape : sequence of int, optional
        (channels, \\*spatial), or the spatial size alone.  Multiply-adds depend on it where
        the stride or the border does not divide evenly; `macs` needs it.
    variant : str, optional
        A form of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        For ``FAMILIES[family].fit``.

    Raises
    ------
    TypeError
        If not exactly one of `params` and `macs` is given, or `macs` without `input_shape`.
    ValueError
        If a name, a share or the shape is not possible, or no rank is so cheap; the message
        says what the cheapest takes.

    See Also
    --------
    lowrank.approximate : the same over all families and forms at once.

    Notes
    -----
    For a family of one SVD this is the largest rank within the share, or the smallest that loses
    nothing, and no chain of that form within the share has a smaller error.  For the others it is
    the point of the sweep with the smallest error, of those within the share; see
    :func:`for_error` for what a sweep leaves out.  One share for every layer is the simplest
    budget, not a good one: layers differ in what they lose.  The rule promises nothing about
    the error.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import FAMILIES, dense
    >>> from lowrank.selection import ranks
    >>> conv = dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)))
    >>> ranks.for_ratio(conv, "spatial_svd", params=0.5)
    (12,)
    >>> rank = ranks.for_ratio(conv, "tucker", macs=0.25, input_shape=(32, 32))
    >>> f = FAMILIES["tucker"].fit(conv, rank, "")
    >>> f.cost((32, 32)).macs <= 0.25 * conv.cost((32, 32)).macs
    True
    """
    variant = _variant(conv, family, variant)
    given = {k: v for k, v in {"params": params, "macs": macs}.items() if v is not None}
    if len(given) != 1:
        raise TypeError(f"give exactly one of params and macs, got {' and '.join(given) or 'none'}")
    [(axis, share)] = given.items()
    _check_share(axis, share)
    price = _price(conv, axis, input_shape)
    whole = price(conv.stages)
    points = [(price(p.stages), p) for p in FAMILIES[family].sweep(conv, variant)]
    affordable = [(cost, p) for cost, p in points if cost <= share * whole]
    if not affordable:
        least, cheapest = min(points, key=lambda x: x[0])
        raise ValueError(
            f"no rank of {family} takes at most {share:.6g} of the dense {axis}; the cheapest, "
            f"{cheapest.rank}, takes {least / whole:.6g}"
        )
    exact = _rounding(conv)  # rounding must not decide between ranks that lose nothing
    return min(affordable, key=lambda x: (x[1].error if x[1].error > exact else 0.0, x[0]))[1].rank


def energy(conv: Factorization, family: str, share: float, variant: str | None = None) -> Ints:
    r"""Smallest rank that keeps a share of the squared norm, unfolding by unfolding.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        A family of one SVD (``"channel_svd"``, ``"channel_svd"``, ``"spatial_svd"``, ``"filter_basis"``,
        ``"network_decoupling"``, ``"kronecker"``), ``"tucker"``, ``"tucker_full"`` or
        ``"tensor_train"``.
    share : float
        Of the squared Frobenius norm, in (0, 1], up to rounding.
    variant : str, optional
        A form of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        For ``FAMILIES[family].fit``.

    Raises
    ------
    ValueError
        If `family`, `variant` or `share` is not possible, or the family has no spectrum, as those
        of CP have none.

    Notes
    -----
    The smallest R with

    .. math:: \sum_{r \le R} \sigma_r^2 \ge \text{share} \sum_r \sigma_r^2

    for the singular values of each matrix that the family cuts.  With one SVD that is the error
    :math:`\sqrt{1 - \text{share}}`, exactly.  Tucker and tensor trains cut one matrix a rank,
    and the usual rule, which this is, keeps `share` of each; then the truncated HOSVD or TT-SVD
    keeps at least :math:`1 - \sum (1 - \text{share})` of the whole, a term for each rank, and
    no fit of these ranks need keep `share` [1]_.  Use :func:`for_error` to hold the whole to a
    limit.  A share near 1 is a large error: 0.9 of the energy is an error of 0.316, 0.99 of 0.1.
    Some tools sum the singular values themselves, not their squares; that is another rule, with
    larger ranks.

    References
    ----------
    .. [1] L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
       decomposition", SIAM J. Matrix Anal. Appl. 21, 2000.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import dense
    >>> from lowrank.selection import ranks
    >>> conv = dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)))
    >>> ranks.energy(conv, "channel_svd", 0.9), ranks.energy(conv, "tucker", 0.9)
    ((14,), (14, 14))
    """
    variant = _variant(conv, family, variant)
    _check_share("share", share)
    spectra = _spectra("energy", conv, family, variant)
    limit = math.sqrt(1 - share) + _rounding(conv)
    return tuple(
        max(1, int(np.argmax(chain_algebra.tail_norms(s.values) <= limit))) for s in spectra
    )


def evbmf(conv: Factorization, family: str = "tucker", variant: str | None = None) -> Ints:
    r"""Rank that empirical variational Bayes finds above white noise.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        As for :func:`energy`.  ``"tucker"``, on its unfoldings by channels out and in, is what
        most tools do [3]_.
    variant : str, optional
        A form of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        For ``FAMILIES[family].fit``; at least 1.  Where there are several matrices for a rank
        (groups, or channels of ``"network_decoupling"``), the largest of their ranks.

    Raises
    ------
    ValueError
        As for :func:`energy`.

    Warns
    -----
    RankWarning
        If all of an unfolding is taken for noise.  By the model the kernel has no low-rank part
        there; rank 1 stands in for 0, with an error near 1.

    See Also
    --------
    evbmf_of : the same for any matrix, with the noise that it finds.
    weakened : less compression at a time, with training in between.

    Notes
    -----
    A matrix of L rows and M columns, transposed if need be so that :math:`L \le M`, is taken for
    a product of Gaussian factors plus white noise.  With :math:`\alpha = L / M` and
    :math:`x_h = \gamma_h^2 / (M \sigma^2)` for the singular values :math:`\gamma_h`, the
    variational free energy, minimised in closed form over all else, is up to constants
    :math:`M / 2` times [1]_ [2]_

    .. math::

        L \log \sigma^2 + \sum_h x_h + \sum_{x_h > \bar x}
        \bigl(\log(1 + \tau_h) + \alpha \log(1 + \tau_h / \alpha) - \tau_h\bigr), \quad
        x_h = (1 + \tau_h)(1 + \alpha / \tau_h).

    Terms of the last sum are negative above :math:`\bar x = (1 + \bar\tau)(1 + \alpha / \bar\tau)`,
    where one is zero.  :math:`\bar\tau` is solved for here; the usual
    :math:`2.5129 \sqrt\alpha` puts the threshold up to 1 % lower.  The noise variance is the
    minimiser between the bounds

    .. math::

        \max\Bigl(\frac{\gamma_{\bar H + 1}^2}{M \bar x},
        \frac{\sum_{h > \bar H} \gamma_h^2}{M (L - \bar H)}\Bigr) \le \sigma^2 \le
        \frac{\sum_h \gamma_h^2}{L M}, \quad
        \bar H = \Bigl\lceil \frac{L}{1 + \alpha} \Bigr\rceil - 1,

    and the rank the number of :math:`\gamma_h > \sigma \sqrt{M \bar x}`.  The minimum is searched
    for over the whole interval, as there may be several; a search that goes down from one place,
    which other tools do, can end in another rank.

    What it does not promise:

    - It ignores cost and error: the rank may enlarge the layer, or lose most of it.
    - It looks for a gap between signal and *white* noise.  Trained weights have decaying spectra
      without one, and their small singular values are not noise to a network.  Noise of unequal
      size passes for signal: a rank-1 matrix of 20 × 50, rounded to float32, gave 5.
    - It is conservative: few false components, at the price of true ones that are missed [2]_.
      In 50 draws of a 64 × 576 matrix pure noise gave 0 every time, and a true rank of 8 at a
      signal-to-noise ratio (of squared norms) of 0.3 gave 7 or 8; but at a ratio of 0.1 it gave
      1 to 3, and a true rank of 32 at a ratio of 1 gave 14 to 18.
    - It cannot give more than :math:`\bar H`, less than half of a square matrix and 0 of a single
      row, and beyond that falls far below it: a true rank of 31 of a 64 × 64 matrix almost without
      noise gave 31, of 32 it gave 10 to 19.

    References
    ----------
    .. [1] S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, "Global analytic solution of
       fully-observed variational Bayesian matrix factorization", JMLR 14, 2013.
    .. [2] S. Nakajima, R. Tomioka, M. Sugiyama, S. D. Babacan, "Condition for perfect
       dimensionality recovery by variational Bayesian PCA", JMLR 16, 2015.
    .. [3] Y.-D. Kim, E. Park, S. Yoo, T. Choi, L. Yang, D. Shin, "Compression of deep
       convolutional neural networks for fast and low power mobile applications", ICLR 2016.
       :arxiv:`1511.06530`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import dense
    >>> from lowrank.selection import ranks
    >>> rng = np.random.default_rng(0)
    >>> signal = np.einsum("or,is,rshw->oihw", *map(rng.standard_normal, [(32, 4), (24, 3),
    ...                    (4, 3, 3, 3)]))
    >>> ranks.evbmf(dense(signal + rng.standard_normal(signal.shape)))
    (4, 3)
    """
    found, _ = _found(conv, family, variant)
    return found


def weakened(
    conv: Factorization,
    family: str = "tucker",
    weakening: float = 0.8,
    variant: str | None = None,
) -> Ints:
    r"""Rank part of the way from the full one to that of EVBMF.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        As for :func:`energy`.
    weakening : float
        How far to go, in (0, 1]: 1 is :func:`evbmf`, and near 0 the full rank.
    variant : str, optional
        A form of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        For ``FAMILIES[family].fit``; between the rank of :func:`evbmf` and the full one.

    Raises
    ------
    ValueError
        As for :func:`energy`, and if `weakening` is not in (0, 1].

    Warns
    -----
    RankWarning
        As :func:`evbmf`, whose rank 1 then is what the formula has for :math:`R_{vbmf}`.

    Notes
    -----
    For each unfolding, with its full rank :math:`R_{init}`,

    .. math:: R_{weak} = R_{init} - k (R_{init} - R_{vbmf}), \quad 0 < k \le 1,

    rounded down; k is `weakening` [1]_.  It is one step of several: compress, train, compress the
    smaller layer again.  The rule promises only that less is taken away at once.  What is said of
    :func:`evbmf` holds for it too, and at the full rank a chain costs more than the dense kernel,
    so a small k saves nothing.  The authors' tool makes exceptions that are not made here: it does
    not go below a rank of about 20 (8 in a later version), nor below the full one where EVBMF
    finds nothing.

    References
    ----------
    .. [1] J. Gusak et al., "Automated multi-stage compression of neural networks", ICCV Workshops
       2019. :arxiv:`1903.09973`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import dense
    >>> from lowrank.selection import ranks
    >>> rng = np.random.default_rng(0)
    >>> signal = np.einsum("or,is,rshw->oihw", *map(rng.standard_normal, [(32, 4), (24, 3),
    ...                    (4, 3, 3, 3)]))
    >>> conv = dense(signal + rng.standard_normal(signal.shape))
    >>> [ranks.weakened(conv, weakening=k) for k in (0.5, 0.8, 1.0)]
    [(18, 13), (9, 7), (4, 3)]
    """
    _check_share("weakening", weakening)
    found, full = _found(conv, family, variant)
    # 64 - 0.7 * (64 - 14) is 29.000000000000004 in binary, others are a hair below.
    return tuple(math.floor(n - weakening * (n - r) + 1e-9) for r, n in zip(found, full))


def evbmf_of(matrix: Array) -> Estimate:
    """Rank and noise of a matrix by empirical variational Bayes.

    Parameters
    ----------
    matrix : array_like, shape (rows, columns)
        Real and finite.

    Returns
    -------
    Estimate
        The rank may be 0.  The same for a matrix and its transpose; the rank is that of any
        multiple of it.

    Raises
    ------
    ValueError
        If `matrix` has no two axes, is empty, or holds anything but finite real numbers.

    See Also
    --------
    evbmf : the equations, and what they do not promise.

    Notes
    -----
    Singular values below the rounding of the largest, those that ``numpy.linalg.matrix_rank``
    does not count, are taken for that rounding, so a matrix without noise gets its rank if that
    is at most the largest rank possible, that of the notes of :func:`evbmf`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.selection import ranks
    >>> rng = np.random.default_rng(0)
    >>> signal = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 200))
    >>> found = ranks.evbmf_of(signal + 0.5 * rng.standard_normal((40, 200)))
    >>> found.rank, round(found.noise, 2)
    (5, 0.5)
    """
    m = np.asarray(matrix)
    if m.ndim != 2 or not m.size or m.dtype.kind not in "fiu" or not np.isfinite(m).all():
        raise ValueError(
            "matrix must have two axes and hold finite real numbers, "
            f"got shape {m.shape} and type {m.dtype}"
        )
    m = m.astype(np.float64)
    scale = chain_algebra.max_abs(m) or 1.0
    found = _estimate(np.linalg.svd(m / scale, compute_uv=False), *m.shape)
    return Estimate(found.rank, found.noise * scale, found.threshold * scale)


def _variant(conv: Factorization, family: str, variant: str | None) -> str:
    """The form asked for, checked, or the first that applies."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    variants = FAMILIES[family].variants(conv)
    if variant is None or variant in variants:
        return variants[0] if variant is None else variant
    # A Kronecker split of the caller's own is as good as those of a sweep; all else is refused.
    return FAMILIES[family].fit(conv, (1,), variant).variant


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, int | float | np.number) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")


def _rounding(conv: Factorization) -> float:
    """An error that is rounding: below it nothing is lost."""
    return float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)


def _weights(stages: Sequence[Stage]) -> int:
    return sum(s.weight.size for s in stages)


def _price(
    conv: Factorization, axis: str, input_shape: Sequence[int] | None
) -> Callable[[Sequence[Stage]], int]:
    """What a chain in the place of `conv` costs."""
    if axis == "params":
        biases = 0 if conv.bias is None else conv.bias.size
        return lambda stages: _weights(stages) + biases
    if input_shape is None:
        raise TypeError("macs needs input_shape, (channels, *spatial) or the spatial size alone")
    shape = conv.input_shape(input_shape)
    return lambda stages: chain_cost(stages, shape).macs


def _spectra(rule: str, conv: Factorization, family: str, variant: str) -> list[_Spectrum]:
    """Singular values of each matrix whose rank the family cuts, in the order of its ranks."""
    if family in svd.ROWS:
        parts = svd.decompose(conv, family, variant)
        return [_Spectrum(family, parts.u.shape[1], parts.vt.shape[2], parts.s)]
    if family == "tensor_train":
        cars = tensor_train.train(conv, variant).tensor
        sizes = [math.prod(cars.shape[1:k]) for k in range(2, cars.ndim)]
        return [
            _spectrum(f"joint {i}", cars.reshape(len(cars), rows, -1))
            for i, rows in enumerate(sizes, start=1)
        ]
    if family not in ("tucker", "tucker_full"):
        raise ValueError(
            f"{rule} needs singular values, and {family} has none: a CP sum is no matrix's SVD. "
            "Use for_error or for_ratio"
            + (", or the ranks of tucker for its first two" if family == "tucker_cp" else "")
        )
    kernel = as_kernel(conv)
    modes = {"out": [1], "in": [2]}
    if family == "tucker_full":
        modes |= {axes: [3 + kernel.letters.index(a) for a in axes] for axes in kernel.axes}
    found = []
    for name, axes in modes.items():
        rows = math.prod(kernel.tensor.shape[a] for a in axes)
        unfolded = np.moveaxis(kernel.tensor, axes, range(1, 1 + len(axes)))
        found.append(_spectrum(name, unfolded.reshape(kernel.groups, rows, -1)))
    return found


def _spectrum(name: str, matrices: Array) -> _Spectrum:
    _, rows, columns = matrices.shape
    return _Spectrum(name, rows, columns, np.linalg.svd(matrices, compute_uv=False))


def _found(conv: Factorization, family: str, variant: str | None) -> tuple[Ints, Ints]:
    """EVBMF's rank of each unfolding, never 0, and the full one; for the two rules to return."""
    spectra = _spectra("EVBMF", conv, family, _variant(conv, family, variant))
    full = tuple(s.values.shape[-1] for s in spectra)
    found = [max(_estimate(v, s.rows, s.columns).rank for v in s.values) for s in spectra]
    lost = [s.name for s, r, n in zip(spectra, found, full) if r == 0 and n > 1]
    if lost:
        warnings.warn(
            f"EVBMF takes all of the kernel for noise ({', '.join(lost)}): no part of it stands "
            "out as low rank. Rank 1 stands in for 0 and is no approximation; choose a rank by "
            "for_error, for_ratio or energy",
            RankWarning,
            stacklevel=3,
        )
    return tuple(max(1, r) for r in found), full


def _estimate(values: Array, rows: int, columns: int) -> Estimate:
    """EVBMF from singular values, largest first, with the noise variance that fits best."""
    if not values[0]:
        return Estimate(0, 0.0, 0.0)
    short, long = sorted((rows, columns))
    alpha = short / long
    # The gain is above 0 at the one and below 0 at the other, whatever alpha: log 4 < 3 / 2.
    tau = optimize.brentq(_gain, math.sqrt(alpha), 3.0, (alpha,))
    edge = (1 + tau) * (1 + alpha / tau)
    floor = np.finfo(float).eps * long
    squares = np.square(np.maximum(values / values[0], floor)) / long
    most = math.ceil(short / (1 + alpha)) - 1
    # In exact arithmetic the lower bound is the lower: edge > 1 + alpha, and tails are below means.
    upper = float(squares.mean())
    lower = min(upper, max(squares[most] / edge, float(squares[most:].mean())))
    grid = np.linspace(math.log(lower), math.log(upper), GRID)
    best = int(np.argmin([_free_energy(v, squares, alpha, edge) for v in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    refined = optimize.minimize_scalar(
        _free_energy, bounds=around, args=(squares, alpha, edge), method="bounded"
    )
    variance = math.exp(refined.x)
    rank = int((squares > edge * variance).sum())
    noise = math.sqrt(variance) * float(values[0])
    return Estimate(rank, noise, noise * math.sqrt(long * edge))


def _free_energy(log_variance: float, squares: Array, alpha: float, edge: float) -> float:
    """2 / M times the least free energy at a noise variance, up to constants."""
    x = squares / math.exp(log_variance)
    b = x[x > edge] - (1 + alpha)
    tau = (b + np.sqrt(b * b - 4 * alpha)) / 2
    # x plus the gain of what is kept, without the difference of x and tau, which may be 1e28.
    kept = 1 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(len(x) * log_variance + x[x <= edge].sum() + kept.sum())


def _gain(tau: float, alpha: float) -> float:
    """What keeping a component adds to the free energy, 2 / M times: below 0 where it pays."""
    return math.log1p(tau) + alpha * math.log1p(tau / alpha) - tau
