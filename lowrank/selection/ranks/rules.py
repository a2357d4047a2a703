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
from lowrank.families.rank_choice import parameters, rounding, within_error, within_share


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
    points = FAMILIES[family].sweep(conv, variant)
    return within_error(family, conv, points, max_error)[0].rank


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
    points = FAMILIES[family].sweep(conv, variant)
    return within_share(family, conv, points, share, price, axis).rank


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
    limit = math.sqrt(1 - share) + rounding(conv)
    return tuple(
        max(1, int(np.argmax(chain_algebra.tail_norms(s.values) <= limit)))
        for s in family_spectra("energy", conv, family, variant)
    )


def resolve_variant(conv: Factorization, family: str, variant: str | None) -> str:
    """Return `variant` after a check, or the first variant that applies."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family].resolve_variant(conv, variant)


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


def _pricing(
    conv: Factorization, axis: str, input_shape: Sequence[int] | None
) -> Callable[[Sequence[Stage]], int]:
    """Return a function from the stages of a chain in place of `conv` to their cost."""
    if axis == "params":
        return parameters(conv)
    if input_shape is None:
        raise TypeError("macs needs input_shape, (channels, *spatial) or the spatial size alone")
    shape = conv.input_shape(input_shape)
    return lambda stages: chain_cost(stages, shape).macs
