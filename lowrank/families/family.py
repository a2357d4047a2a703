"""The record of a family: its variants, its sweep over ranks, its fit and its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization
from lowrank.families import weighted
from lowrank.families.sweep_point import SweepPoint
from lowrank.metric import Metric


class Spectrum(NamedTuple):
    """Singular values of one matricisation that a family truncates.

    Attributes
    ----------
    name : str
        Name of the matricisation, for messages.
    rows, columns : int
        Shape of the matrices.
    values : ndarray, shape (batch, min(rows, columns))
        Singular values in descending order, of weights divided by their largest magnitude.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> family = lowrank.FAMILIES["tucker"]
    >>> conv = lowrank.dense(np.ones((8, 4, 3, 3)))
    >>> [(s.name, s.rows, s.columns) for s in family.spectra(conv, "")]
    [('out', 8, 36), ('in', 4, 72)]
    """

    name: str
    rows: int
    columns: int
    values: Array


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A family of chains that approximate a dense convolution.

    Attributes
    ----------
    name : str
        Key in :data:`lowrank.FAMILIES`.
    variants : callable
        ``variants(conv)`` returns the variants that apply; raises NotApplicable if none does.
    sweep_white : callable
        ``sweep_white(conv, variant)`` yields one :class:`SweepPoint` per rank from a single
        decomposition, in the Frobenius norm of the kernel (white-noise inputs).
    fit_white : callable
        ``fit_white(conv, rank, variant)`` returns the chain of one rank.
    bound : callable
        ``bound(conv, rank, variant)`` returns a lower bound on the relative Frobenius error of
        any chain of that variant and rank.
    exact : bool
        Whether the sweep holds every rank, each with the smallest error possible.
    label : str
        Name in figures.
    color, marker : str
        Colour and marker in figures (matplotlib).
    has_fast_sweep : bool
        Whether a sweep takes well under a second per layer; such families are the default for
        whole networks.
    is_outer_product_sum : bool
        Whether chains are sums of outer products, whose terms may cancel.
    spectra : callable, optional
        ``spectra(conv, variant)`` returns one :class:`Spectrum` per rank, in the order of the
        ranks; None for families whose rank is not that of a matrix.
    """

    name: str
    variants: Callable[[Factorization], tuple[str, ...]]
    sweep_white: Callable[[Factorization, str], Iterator[SweepPoint]]
    fit_white: Callable[[Factorization, Ints, str | None], Factorization]
    bound: Callable[[Factorization, Ints, str], float]
    exact: bool
    label: str
    color: str
    marker: str
    has_fast_sweep: bool = False
    is_outer_product_sum: bool = False
    spectra: Callable[[Factorization, str], Sequence[Spectrum]] | None = None

    def sweep(
        self, conv: Factorization, variant: str, metric: Metric | None = None
    ) -> Iterator[SweepPoint]:
        """Sweep the ranks of a variant.

        Parameters
        ----------
        conv : Factorization
            One dense stage, from :func:`lowrank.dense`.
        variant : str
            One of ``variants(conv)``.
        metric : Metric, optional
            Second moments that weight the error; the Frobenius norm if not given.

        Returns
        -------
        iterator of SweepPoint
            One point per rank.  Errors are relative in the metric.  Where whitening does not
            express the metric exactly, the error of a point is that of its closed-form start,
            the bound is 0, and `build` refines the start by alternating least squares in the
            full metric.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 4, 3, 3)))
        >>> point = next(lowrank.FAMILIES["spatial_svd"].sweep(conv, "h-w"))
        >>> point.rank, round(point.error, 6)
        ((1,), 0.0)
        """
        if metric is None:
            return self.sweep_white(conv, variant)
        return weighted.sweep(self.sweep_white, conv, variant, metric)

    def fit(
        self,
        conv: Factorization,
        rank: int | Sequence[int],
        variant: str | None = None,
        metric: Metric | None = None,
        refine: bool = True,
    ) -> Factorization:
        """Fit the chain of one rank.

        Parameters
        ----------
        conv : Factorization
            One dense stage, from :func:`lowrank.dense`.
        rank : int or sequence of int
            Rank, or ranks in the order that the family documents.
        variant : str, optional
            One of ``variants(conv)``; the first if not given.
        metric : Metric, optional
            Second moments that weight the error; the Frobenius norm if not given.
        refine : bool
            Whether the closed-form fit in the metric is refined by alternating least squares.

        Returns
        -------
        Factorization

        Raises
        ------
        NotApplicable
            If the family has no variant for `conv`.
        ValueError, TypeError
            If `rank` or `variant` is not possible.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> from lowrank.metric import Moments
        >>> rng = np.random.default_rng(0)
        >>> conv = lowrank.dense(rng.standard_normal((8, 4, 3, 3)), padding=1)
        >>> moments = Moments(conv)
        >>> moments.add(rng.standard_normal((16, 4, 8, 8)).cumsum(axis=-1))
        >>> metric = moments.metric()
        >>> family = lowrank.FAMILIES["spatial_svd"]
        >>> plain, fitted = family.fit(conv, 4), family.fit(conv, 4, metric=metric)
        >>> from lowrank.families.weighted import MetricFit
        >>> fit = MetricFit(conv, metric)
        >>> fit.error(fitted.stages) < fit.error(plain.stages)
        True
        """
        if metric is None:
            return self.fit_white(conv, rank, variant)  # type: ignore[arg-type]
        return weighted.fit(self.fit_white, conv, rank, variant, metric, refine)
