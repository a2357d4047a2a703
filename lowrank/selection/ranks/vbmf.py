"""Rank rules by empirical variational Bayesian matrix factorization (EVBMF)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.factorization import Factorization
from lowrank.selection.ranks.rules import check_share, family_spectra, resolve_variant

GRID = 128  # noise variances tried before refinement: the free energy has local minima


class RankWarning(UserWarning):
    """EVBMF took a whole unfolding for noise; rank 1 is returned in place of 0.

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
    """Rank and noise of a matrix, estimated by EVBMF.

    Attributes
    ----------
    rank : int
        Number of singular values above `threshold`; 0 if all are taken for noise.
    noise : float
        Estimated standard deviation of the noise, in units of the matrix's entries.
    threshold : float
        Largest singular value that is taken for noise.

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


def evbmf(conv: Factorization, family: str = "tucker", variant: str | None = None) -> Ints:
    r"""Return the rank that empirical variational Bayes separates from white noise.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        Family with spectra, as for :func:`energy`.  Most tools use ``"tucker"``, with its
        unfoldings by output and input channels [3]_.
    variant : str, optional
        Variant of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        Rank for ``FAMILIES[family].fit``; at least 1.  Where several matrices share a rank
        (groups, or channels of ``"network_decoupling"``), the largest of their ranks.

    Raises
    ------
    ValueError
        As for :func:`energy`.

    Warns
    -----
    RankWarning
        If all of an unfolding is taken for noise.  Under the model the kernel then has no low-rank
        part; rank 1 is returned in place of 0, with an error near 1.

    See Also
    --------
    evbmf_of : rank and noise of any matrix.
    relaxed_evbmf : milder compression, for several rounds with training in between.

    Notes
    -----
    A matrix of L rows and M columns, transposed if necessary so that :math:`L \le M`, is modelled
    as a product of Gaussian factors plus white noise.  With :math:`\alpha = L / M` and
    :math:`x_h = \gamma_h^2 / (M \sigma^2)` for the singular values :math:`\gamma_h`, the
    variational free energy, minimised in closed form over all other parameters, is up to constants
    :math:`M / 2` times [1]_ [2]_

    .. math::

        L \log \sigma^2 + \sum_h x_h + \sum_{x_h > \bar x}
        \bigl(\log(1 + \tau_h) + \alpha \log(1 + \tau_h / \alpha) - \tau_h\bigr), \quad
        x_h = (1 + \tau_h)(1 + \alpha / \tau_h).

    Terms of the last sum are negative above :math:`\bar x = (1 + \bar\tau)(1 + \alpha / \bar\tau)`,
    where one is zero.  :math:`\bar\tau` is computed numerically; the usual approximation
    :math:`2.5129 \sqrt\alpha` gives a threshold up to 1 % lower.  The noise variance is the
    minimiser between the bounds

    .. math::

        \max\Bigl(\frac{\gamma_{\bar H + 1}^2}{M \bar x},
        \frac{\sum_{h > \bar H} \gamma_h^2}{M (L - \bar H)}\Bigr) \le \sigma^2 \le
        \frac{\sum_h \gamma_h^2}{L M}, \quad
        \bar H = \Bigl\lceil \frac{L}{1 + \alpha} \Bigr\rceil - 1,

    and the rank is the number of :math:`\gamma_h > \sigma \sqrt{M \bar x}`.  The whole interval is
    searched, because there may be several minima; a descent from a single start, as in other
    tools, can end at another rank.

    Limitations:

    - The rule ignores cost and error: the chain may be larger than the layer, or lose most of it.
    - It looks for a gap between signal and *white* noise.  Trained weights have decaying spectra
      without a gap, and a network may need their small singular values.  Noise of unequal variance
      counts as signal: a rank-1 matrix of 20 × 50, rounded to float32, gave rank 5.
    - It is conservative: few false components, at the price of missing true ones [2]_.
      In 50 draws of a 64 × 576 matrix pure noise gave 0 every time, and a true rank of 8 at a
      signal-to-noise ratio (of squared norms) of 0.3 gave 7 or 8; but at a ratio of 0.1 it gave
      1 to 3, and a true rank of 32 at a ratio of 1 gave 14 to 18.
    - The largest possible rank is :math:`\bar H`, less than half of a square matrix and 0 for a
      single row; kernels of a higher rank get a far lower one: for 64 × 64 matrices almost without
      noise a true rank of 31 gave 31, and 32 gave 10 to 19.

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
    return _evbmf_ranks(conv, family, variant)[0]


def relaxed_evbmf(
    conv: Factorization,
    family: str = "tucker",
    relaxation: float = 0.8,
    variant: str | None = None,
) -> Ints:
    r"""Return a rank between the full rank and that of EVBMF.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        Family with spectra, as for :func:`energy`.
    relaxation : float
        Position in (0, 1] between the full rank (near 0) and that of :func:`evbmf` (1).
    variant : str, optional
        Variant of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        Rank for ``FAMILIES[family].fit``, between that of :func:`evbmf` and the full rank.

    Raises
    ------
    ValueError
        As for :func:`energy`, and if `relaxation` is not in (0, 1].

    Warns
    -----
    RankWarning
        As for :func:`evbmf`; :math:`R_{vbmf}` is then 1.

    Notes
    -----
    For each unfolding, with its full rank :math:`R_{init}`,

    .. math:: R_{weak} = R_{init} - k (R_{init} - R_{vbmf}), \quad 0 < k \le 1,

    rounded down; k is `relaxation`, the weakening factor of [1]_.  It is meant for several rounds:
    compress, train, compress the smaller layer again.  The limitations of :func:`evbmf` apply, and
    at the full rank a chain costs more than the dense kernel, so a small k saves nothing.  Unlike
    here, the authors' tool does not go below a rank of about 20 (8 in a later version), nor below
    the full rank where EVBMF finds only noise.

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
    >>> [ranks.relaxed_evbmf(conv, relaxation=k) for k in (0.5, 0.8, 1.0)]
    [(18, 13), (9, 7), (4, 3)]
    """
    check_share("relaxation", relaxation)
    lowest, full = _evbmf_ranks(conv, family, variant)
    # Rounding must not lower the result: 64 - 0.7 * (64 - 14) is 29.000000000000004 in binary,
    # and other products are slightly below an integer.
    return tuple(math.floor(n - relaxation * (n - r) + 1e-9) for r, n in zip(lowest, full))


def evbmf_of(matrix: Array) -> Estimate:
    """Estimate the rank and noise of a matrix by empirical variational Bayes.

    Parameters
    ----------
    matrix : array_like, shape (rows, columns)
        Matrix of finite real numbers.

    Returns
    -------
    Estimate
        Estimate, whose rank may be 0.  A matrix and its transpose have the same estimate, and a
        multiple of a matrix has the same rank.

    Raises
    ------
    ValueError
        If `matrix` does not have two axes, is empty, or contains other than finite real numbers.

    See Also
    --------
    evbmf : equations and limitations.

    Notes
    -----
    Singular values that ``numpy.linalg.matrix_rank`` does not count are raised to the rounding
    error of the largest, so that a matrix without noise gets its rank, up to the limit
    :math:`\\bar H` in the notes of :func:`evbmf`.

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


def _evbmf_ranks(conv: Factorization, family: str, variant: str | None) -> tuple[Ints, Ints]:
    """Return EVBMF's rank of each unfolding, at least 1, and the full ranks."""
    spectra = family_spectra("EVBMF", conv, family, resolve_variant(conv, family, variant))
    full = tuple(s.values.shape[-1] for s in spectra)
    ranks = [max(_estimate(v, s.rows, s.columns).rank for v in s.values) for s in spectra]
    noise = [s.name for s, r, n in zip(spectra, ranks, full) if r == 0 and n > 1]
    if noise:
        warnings.warn(
            f"EVBMF takes all of the kernel for noise ({', '.join(noise)}); rank 1 is returned in "
            "place of 0, and is not an approximation: choose a rank by for_error, for_ratio or "
            "energy",
            RankWarning,
            stacklevel=3,
        )
    return tuple(max(1, r) for r in ranks), full


def _estimate(values: Array, rows: int, columns: int) -> Estimate:
    """Return the estimate with the least free energy for singular values in descending order."""
    from scipy import optimize  # slow to import

    if not values[0]:
        return Estimate(0, 0.0, 0.0)
    short, long = sorted((rows, columns))
    alpha = short / long
    # The gain is positive at sqrt(alpha) and negative at 3 for every alpha <= 1: log 4 < 3 / 2.
    tau = optimize.brentq(_gain, math.sqrt(alpha), 3.0, (alpha,))
    edge = (1 + tau) * (1 + alpha / tau)
    floor = np.finfo(float).eps * long
    squares = np.square(np.maximum(values / values[0], floor)) / long
    max_rank = math.ceil(short / (1 + alpha)) - 1
    # Without rounding the lower bound is below the upper: edge > 1 + alpha, and the mean of the
    # tail is below the mean of all.
    upper = float(squares.mean())
    lower = min(upper, max(squares[max_rank] / edge, float(squares[max_rank:].mean())))
    grid = np.linspace(math.log(lower), math.log(upper), GRID)
    best = int(np.argmin([_free_energy(v, squares, alpha, edge) for v in grid]))
    bracket = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    refined = optimize.minimize_scalar(
        _free_energy, bounds=bracket, args=(squares, alpha, edge), method="bounded"
    )
    variance = math.exp(refined.x)
    rank = int((squares > edge * variance).sum())
    noise = math.sqrt(variance) * float(values[0])
    return Estimate(rank, noise, noise * math.sqrt(long * edge))


def _free_energy(log_variance: float, squares: Array, alpha: float, edge: float) -> float:
    """Return 2 / M times the least free energy at a noise variance, up to constants."""
    x = squares / math.exp(log_variance)
    b = x[x > edge] - (1 + alpha)
    tau = (b + np.sqrt(b * b - 4 * alpha)) / 2
    # x plus the gain of the signal, written without the difference x - tau, which may be 1e28.
    signal = 1 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(len(x) * log_variance + x[x <= edge].sum() + signal.sum())


def _gain(tau: float, alpha: float) -> float:
    """Return 2 / M times the change of the free energy by keeping a component."""
    return math.log1p(tau) + alpha * math.log1p(tau / alpha) - tau
