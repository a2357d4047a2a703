"""Rank rules by error, by a share of the cost, and by a share of the energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lowrank._typing import Ints
from lowrank.core import chain_algebra
from lowrank.core.cost import chain_cost
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, Spectrum


def for_error(
    conv: Factorization, family: str, max_error: float, variant: str | None = None
) -> Ints:
    r"""Return the smallest rank whose relative error is within a limit.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        Name from :data:`lowrank.FAMILIES`.
    max_error : float
        Largest relative Frobenius error, up to rounding.
    variant : str, optional
        Variant of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        Rank for ``FAMILIES[family].fit``.  For a family with several ranks, the combination with
        the fewest parameters among those of its sweep.

    Raises
    ------
    ValueError
        If `family`, `variant` or `max_error` is invalid, the family does not apply to `conv`, or
        no rank of its sweep is within `max_error`; the message gives the smallest error.

    See Also
    --------
    lowrank.approximate : considers all families, and never costs more than the dense kernel.

    Notes
    -----
    For a family of one SVD the rule is exact: this rank satisfies

    .. math:: \sqrt{\sum_{r > R} \sigma_r^2 / \sum_r \sigma_r^2} \le \text{max\_error},

    and one less does not.  For the others it holds for the start of the fit, which refinement
    does not make worse, and a smaller rank may suffice: ranks between the points of the sweep (at
    most 2,500 for Tucker, a dozen for CP and tensor trains) are not tried, and sweeps of Tucker
    and tensor trains cannot resolve errors below 1e-7.  A sweep of CP runs ALS a dozen times,
    which takes seconds to minutes, and a new fit may end at a slightly different error.  The rule
    guarantees nothing about cost: at small errors the chain may cost more than the dense kernel.
    The error of the weights is that of a layer's output only for white-noise inputs.

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
    variant = resolve_variant(conv, family, variant)
    if not isinstance(max_error, int | float | np.number) or not max_error >= 0:
        raise ValueError(f"max_error must be a number of at least 0, got {max_error!r}")
    points = list(FAMILIES[family].sweep(conv, variant))
    within = [p for p in points if p.error <= max_error + _rounding(conv)]
    if not within:
        best = min(points, key=lambda p: p.error)
        raise ValueError(
            f"max_error must be at least {best.error:.6g} for {family} (its smallest, at rank "
            f"{best.rank}), got {max_error:.6g}; allow a larger error, or try another family"
        )
    return min(within, key=lambda p: (_weight_count(p.stages), p.error)).rank


def for_ratio(
    conv: Factorization,
    family: str,
    *,
    params: float | None = None,
    macs: float | None = None,
    input_shape: Sequence[int] | None = None,
    variant: str | None = None,
) -> Ints:
    """Return the most accurate rank that costs at most a share of the dense kernel.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        Name from :data:`lowrank.FAMILIES`.
    params, macs : float, optional
        Share in (0, 1] of the dense parameters (the bias included on both sides), or of the
        dense MACs.  Give one of them.
    input_shape : sequence of int, optional
        (channels, \\*spatial), or the spatial size alone; required with `macs`, whose share
        depends on it where strides or borders do not divide evenly.
    variant : str, optional
        Variant of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        Rank for ``FAMILIES[family].fit``.

    Raises
    ------
    TypeError
        If not exactly one of `params` and `macs` is given, or `macs` without `input_shape`.
    ValueError
        If an argument is invalid, or no rank is within the share; the message gives the share of
        the cheapest.

    See Also
    --------
    lowrank.approximate : chooses over all families and variants.

    Notes
    -----
    For a family of one SVD this is the largest rank within the share, or the smallest without
    error, and no chain of that variant within the share has a smaller error.  For the others it
    is the point of the sweep with the smallest error within the share; see :func:`for_error` for
    the ranks that a sweep skips.  The same share for every layer is the simplest budget, not a
    good one, since layers differ in sensitivity.  The rule guarantees nothing about the error.

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
    variant = resolve_variant(conv, family, variant)
    given = {k: v for k, v in {"params": params, "macs": macs}.items() if v is not None}
    if len(given) != 1:
        raise TypeError(f"give exactly one of params and macs, got {' and '.join(given) or 'none'}")
    [(axis, share)] = given.items()
    check_share(axis, share)
    price = _pricing(conv, axis, input_shape)
    dense_cost = price(conv.stages)
    points = [(price(p.stages), p) for p in FAMILIES[family].sweep(conv, variant)]
    affordable = [(cost, p) for cost, p in points if cost <= share * dense_cost]
    if not affordable:
        least, cheapest = min(points, key=lambda x: x[0])
        raise ValueError(
            f"{axis} must be at least {least / dense_cost:.6g} for {family} (the cheapest rank, "
            f"{cheapest.rank}), got {share:.6g}"
        )
    exact = _rounding(conv)  # rounding must not decide between ranks without error
    return min(affordable, key=lambda x: (x[1].error if x[1].error > exact else 0.0, x[0]))[1].rank


def energy(conv: Factorization, family: str, share: float, variant: str | None = None) -> Ints:
    r"""Return the smallest rank that keeps a share of the energy of each unfolding.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    family : str
        Name from :data:`lowrank.FAMILIES` of a family with spectra: those of one SVD, such as
        ``"channel_svd"``, and ``"tucker"``, ``"tucker_full"`` and ``"tensor_train"``.
    share : float
        Share of the squared Frobenius norm, in (0, 1], up to rounding.
    variant : str, optional
        Variant of the family; the first that applies if not given.

    Returns
    -------
    tuple of int
        Rank for ``FAMILIES[family].fit``.

    Raises
    ------
    ValueError
        If `family`, `variant` or `share` is invalid, or the family has no spectra (the CP
        families).

    Notes
    -----
    The smallest R with

    .. math:: \sum_{r \le R} \sigma_r^2 \ge \text{share} \sum_r \sigma_r^2

    for the singular values of each matrix that the family truncates.  With one SVD the error is
    exactly :math:`\sqrt{1 - \text{share}}`.  Tucker and tensor trains truncate one matrix per
    rank.  The usual rule, implemented here, keeps `share` of each; the truncated HOSVD or TT-SVD
    then keeps at least :math:`1 - \sum (1 - \text{share})` of the total, with one summand per
    rank [1]_, and no fit of these ranks is certain to keep `share`.  Use :func:`for_error` to
    limit the total error.  A share near 1 is a large error: 0.9 of the energy is an error of
    0.316, 0.99 one of 0.1.  Some tools sum singular values instead of their squares, which is
    another rule, with larger ranks.

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
    variant = resolve_variant(conv, family, variant)
    check_share("share", share)
    limit = math.sqrt(1 - share) + _rounding(conv)
    return tuple(
        max(1, int(np.argmax(chain_algebra.tail_norms(s.values) <= limit)))
        for s in family_spectra("energy", conv, family, variant)
    )


def resolve_variant(conv: Factorization, family: str, variant: str | None) -> str:
    """Return `variant` after a check, or the first variant that applies."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    variants = FAMILIES[family].variants(conv)
    if variant is None or variant in variants:
        return variants[0] if variant is None else variant
    # A fit may accept variants that a sweep does not try (Kronecker splits), and refuses others.
    return FAMILIES[family].fit(conv, (1,), variant).variant


def check_share(name: str, value: float) -> None:
    """Check that an argument is a number in (0, 1]."""
    if not isinstance(value, int | float | np.number) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")


def family_spectra(rule: str, conv: Factorization, family: str, variant: str) -> Sequence[Spectrum]:
    """Return the spectra that a family truncates, one per rank, for a rule that needs them."""
    spectra = FAMILIES[family].spectra
    if spectra is None:
        names = [name for name, f in FAMILIES.items() if f.spectra is not None]
        raise ValueError(
            f"family must have singular values for {rule} ({', '.join(names)}), got {family}; for "
            f"{family} use for_error or for_ratio"
        )
    return spectra(conv, variant)


def _rounding(conv: Factorization) -> float:
    """Return the error that rounding alone may cause."""
    return float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)


def _weight_count(stages: Sequence[Stage]) -> int:
    return sum(s.weight.size for s in stages)


def _pricing(
    conv: Factorization, axis: str, input_shape: Sequence[int] | None
) -> Callable[[Sequence[Stage]], int]:
    """Return a function from the stages of a chain in place of `conv` to their cost."""
    if axis == "params":
        biases = 0 if conv.bias is None else conv.bias.size
        return lambda stages: _weight_count(stages) + biases
    if input_shape is None:
        raise TypeError("macs needs input_shape, (channels, *spatial) or the spatial size alone")
    shape = conv.input_shape(input_shape)
    return lambda stages: chain_cost(stages, shape).macs
