"""The record of a family: its variants, its sweep over ranks, its fit and its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowrank._typing import Array, Ints
from lowrank.core.blas import one_blas_thread
from lowrank.factorization import Factorization
from lowrank.families import weighted
from lowrank.families.rank_choice import (
    check_error,
    check_max_error,
    is_share,
    parameters,
    within_error,
    within_share,
)
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
            return _on_one_blas_thread(self.sweep_white(conv, variant))
        return _on_one_blas_thread(weighted.sweep(self.sweep_white, conv, variant, metric))

    def fit(
        self,
        conv: Factorization,
        rank: int | float | Sequence[int] | None = None,
        variant: str | None = None,
        metric: Metric | None = None,
        refine: bool = True,
        *,
        max_error: float | None = None,
    ) -> Factorization:
        """Fit the chain of one rank.

        Parameters
        ----------
        conv : Factorization
            One dense stage, from :func:`lowrank.dense`.
        rank : int, float or sequence of int, optional
            Rank, or ranks in the order that the family documents.  A number between 0 and 1 is a
            share of the parameters: the most accurate rank within it.  If not given, the rank of
            fewest parameters within `max_error`.
        variant : str, optional
            One of ``variants(conv)``; the first if not given.
        metric : Metric, optional
            Second moments that weight the error; the Frobenius norm if not given.
        refine : bool
            Whether the closed-form fit in the metric is refined by alternating least squares.
        max_error : float, optional
            Largest relative error; required if `rank` is not given.

        Returns
        -------
        Factorization

        Raises
        ------
        NotApplicable
            If the family has no variant for `conv`.
        ValueError, TypeError
            If `rank`, `variant` or `max_error` is not possible, or neither `rank` nor `max_error`
            is given.

        Notes
        -----
        BLAS runs on one thread meanwhile: results do not depend on the number of threads.

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
        with one_blas_thread():
            return self._fit(conv, rank, variant, metric, refine, max_error)

    def _fit(
        self,
        conv: Factorization,
        rank: int | float | Sequence[int] | None,
        variant: str | None,
        metric: Metric | None,
        refine: bool,
        max_error: float | None,
    ) -> Factorization:
        if rank is None or is_share(rank):
            share = None if rank is None else float(rank)
            point = self.choose(conv, share, variant, metric, max_error=max_error)[0]
            found = self.resolve_variant(conv, variant)
            build = point.build if refine or point.start is None else point.start
            f = replace(conv, stages=build(), family=self.name, variant=found, rank=point.rank)
        elif metric is None:
            f = self.fit_white(conv, rank, variant)  # type: ignore[arg-type]
        else:
            f = weighted.fit(self.fit_white, conv, rank, variant, metric, refine)  # type: ignore[arg-type]
        if max_error is not None and rank is not None:
            check_max_error(max_error)
            if metric is None:
                error = f.error(conv.to_dense())
            else:
                error = weighted.MetricFit(conv, metric).error(f.stages)
            check_error(f, error, max_error)
        return f

    def choose(
        self,
        conv: Factorization,
        rank: float | None,
        variant: str | None = None,
        metric: Metric | None = None,
        *,
        max_error: float | None = None,
    ) -> list[SweepPoint]:
        """Return the points of a sweep within a share of the parameters, or an error.

        Parameters
        ----------
        conv : Factorization
            One dense stage, from :func:`lowrank.dense`.
        rank : float or None
            Share of the parameters, between 0 and 1; None to choose by the error.
        variant : str, optional
            One of ``variants(conv)``; the first if not given.
        metric : Metric, optional
            Second moments that weight the error; the Frobenius norm if not given.
        max_error : float, optional
            Largest relative error.

        Returns
        -------
        list of SweepPoint
            The most accurate within the share; or all within the error, those of fewest
            parameters first.

        Raises
        ------
        TypeError
            If neither `rank` nor `max_error` is given.
        ValueError
            If no point is within the limit; the message gives the smallest possible.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 4, 3, 3)))
        >>> [p.rank for p in lowrank.FAMILIES["tucker"].choose(conv, 0.5)]
        [(3, 3)]
        """
        if rank is None and max_error is None:
            raise TypeError(f"{self.name} needs a rank or max_error=")
        points = self.sweep(conv, self.resolve_variant(conv, variant), metric)
        if rank is not None:
            return [within_share(self.name, conv, points, rank, parameters(conv))]
        return within_error(self.name, conv, points, max_error)  # type: ignore[arg-type]

    def resolve_variant(self, conv: Factorization, variant: str | None) -> str:
        """Return a variant after a check, or the first that applies.

        Parameters
        ----------
        conv : Factorization
            One dense stage, from :func:`lowrank.dense`.
        variant : str or None
            Variant to check.

        Returns
        -------
        str

        Raises
        ------
        ValueError
            If the variant is not possible.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 4, 3, 3)))
        >>> lowrank.FAMILIES["spatial_svd"].resolve_variant(conv, None)
        'h-w'
        """
        variants = self.variants(conv)
        if variant is None or variant in variants:
            return variants[0] if variant is None else variant
        # A fit may accept variants that a sweep does not try (Kronecker splits); it refuses others.
        return self.fit_white(conv, (1,), variant).variant


def _on_one_blas_thread(points: Iterable[SweepPoint]) -> Iterator[SweepPoint]:
    """Yield the points of a sweep, each computed with BLAS on one thread."""
    remaining = iter(points)
    while True:
        with one_blas_thread():
            point = next(remaining, None)
        if point is None:
            return
        yield point
