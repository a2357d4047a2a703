"""The frontier of one convolution: its Pareto-optimal candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final, overload

import numpy as np

from lowrank._typing import Ints
from lowrank.factorization import Factorization
from lowrank.families.kernel import as_kernel
from lowrank.metric import Metric
from lowrank.selection import tables
from lowrank.selection.budget import infeasible
from lowrank.selection.candidates import COSTS, Candidate, Pricing, candidates, check_families
from lowrank.selection.pareto import pareto_front

# MACs over the fewest of a more accurate candidate of the same variant, at most: times follow MACs
# within this factor (6 layers: no front changed at 1.5, one by 10 % at 1.3).
MAX_MACS = 1.5


@final
class Frontier(Sequence[Candidate]):
    """Pareto-optimal candidates in error and cost, cheapest first.

    An immutable sequence that prints itself as a table.  The dense kernel is its last entry.

    Attributes
    ----------
    axis : str
        Cost that was compared: ``"seconds"``, ``"bytes"`` of weights, or a field of
        :class:`lowrank.Cost`.
    input_shape : tuple of int
        Input size (channels, \\*spatial) of the costs.
    batch, threads : int, int or None
        Examples per call and number of threads of the predicted seconds.
    runtime : str
        Library that runs the chains; see :func:`lowrank.perfmodel.predict`.
    left_out : dict
        Families that do not apply to the convolution, with the reason.
    error : float
        Median relative error of the predicted seconds; NaN for another machine's coefficients.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
    >>> print(lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs"))  # doctest: +ELLIPSIS
    2 candidates, by macs, input of 8 channels x 16x16...
    family           rank   error   bound   macs   fewer  params ...
    spatial_svd h-w     1  0.0000  0.0000  10.1k  11.20x      48 ...
    dense               -  0.0000  0.0000   113k   1.00x     576 ...
    """

    __slots__ = (
        "_candidates",
        "axis",
        "batch",
        "error",
        "input_shape",
        "left_out",
        "runtime",
        "threads",
    )  # fmt: skip

    def __init__(
        self,
        candidates: Iterable[Candidate],
        axis: str,
        input_shape: Ints,
        left_out: dict[str, str],
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
        error: float = math.nan,
    ) -> None:
        self._candidates = tuple(candidates)
        self.axis, self.input_shape, self.left_out = axis, input_shape, dict(left_out)
        self.batch, self.threads, self.runtime, self.error = batch, threads, runtime, error

    @overload
    def __getitem__(self, at: int) -> Candidate: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, at: int | slice) -> Candidate | tuple[Candidate, ...]:
        return self._candidates[at]

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    @property
    def dense(self) -> Candidate:
        """The dense kernel."""
        return self._candidates[-1]

    def within(self, error: float) -> Candidate:
        """Return the cheapest candidate with at most this error; at worst the dense kernel.

        Parameters
        ----------
        error : float
            Largest relative error.

        Returns
        -------
        Candidate

        Raises
        ------
        ValueError
            If `error` is negative or NaN.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16))
        >>> front.within(0.1).cost.macs < front.dense.cost.macs
        True
        """
        check_error(error)
        return next(c for c in self if c.error <= error)

    def affordable(self, amount: float) -> Candidate:
        """Return the most accurate candidate that costs at most an amount on this axis.

        Parameters
        ----------
        amount : float
            Amount in the units of the axis: seconds, MACs, parameters, bytes or elements.

        Returns
        -------
        Candidate

        Raises
        ------
        InfeasibleBudgetError
            If nothing is that cheap; the message states the minimum.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> lowrank.frontier(conv, (16, 16), axis="macs").affordable(50_000).cost.macs <= 50_000
        True
        """
        affordable = [c for c in self if c.amount(self.axis) <= amount]
        if not affordable:
            least, dense = (c.amount(self.axis) for c in (self[0], self.dense))
            raise infeasible(self.axis, amount, least, dense)
        return affordable[-1]

    def __repr__(self) -> str:
        return tables.text_table(self)

    def _repr_html_(self) -> str:
        return tables.html_table(self)


def frontier(
    conv: Factorization,
    input_shape: Sequence[int],
    families: Iterable[str] | None = None,
    *,
    axis: str = "seconds",
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    metric: Metric | None = None,
    progress: Callable[[str], object] | None = None,
) -> Frontier:
    """Return the Pareto front of all candidates in error and cost.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    input_shape : sequence of int
        (channels, \\*spatial), or the spatial size alone.
    families : iterable of str, optional
        Names from :data:`lowrank.FAMILIES`; all of them if not given.  Those that do not apply
        to the convolution are left out.
    axis : str
        Cost to compare: ``"seconds"``, predicted for this machine, or one that is the same on
        every machine: ``"macs"``, ``"params"``, ``"bytes"``, ``"traffic"``, ``"fused"`` or
        ``"peak"``.
    batch : int
        Number of examples per call, for predicted seconds.
    threads : int, optional
        Number of threads, for predicted seconds; all that OpenMP offers if not given.
    runtime : str
        Library that runs the chains: ``"lowrank"``, ``"torch"`` or ``"torch channels-last"``; see
        :func:`lowrank.perfmodel.predict`.
    metric : Metric, optional
        Second moments that weight the error, from :class:`lowrank.metric.Moments`; the Frobenius
        norm if not given.
    progress : callable, optional
        Called with the name of each family before its sweep.

    Returns
    -------
    Frontier
        Candidates, cheapest first, ending with the dense kernel; none costs more than it.

    Raises
    ------
    ValueError
        If a family, axis or runtime is unknown, or the input shape does not fit.

    Notes
    -----
    Exact over the candidates generated: every rank of the families that are one SVD, truncated
    HOSVD and TT ranks, and at most a dozen ranks of those fitted by alternating least squares.
    Weights are built only for what :meth:`Candidate.build` is called on.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> g = np.exp(-np.linspace(-2, 2, 7) ** 2)
    >>> blur = lowrank.dense(np.outer(g, g)[None, None])
    >>> [(c.name, c.rank, c.cost.macs) for c in lowrank.frontier(blur, (32, 32), axis="macs")]
    [('spatial_svd h-w', (1,), 10556), ('dense', (), 33124)]
    """
    names = check_families(families)
    if axis not in COSTS:
        raise ValueError(f"axis must be one of {', '.join(COSTS)}, got {axis!r}")
    as_kernel(conv)
    pricing = Pricing(conv, input_shape, batch, threads, runtime)
    dense = pricing.time(pricing.dense)
    # Skip candidates that need more MACs than the dense kernel, whatever their predicted time.
    measure = "macs" if axis == "seconds" else axis
    left_out: dict[str, str] = {}
    groups = candidates(pricing, names, metric, left_out=left_out, progress=progress)
    found: list[Candidate] = []
    for group in groups:
        cheaper = [c for c in group if c.amount(measure) < dense.amount(measure)]
        found += drop_dominated(cheaper) if axis == "seconds" else cheaper
    if axis == "seconds":
        found = [c for c in map(pricing.time, found) if c.seconds < dense.seconds]
    # Errors below rounding are equal: an error of 1e-16 must not beat one of 3e-17.
    rounding = float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)
    found = sorted(found, key=lambda c: len(c.shapes))
    front = pareto_front(
        [[c.amount(axis)] for c in found], [c.error if c.error > rounding else 0.0 for c in found]
    )
    kept = [found[i] for i in front]
    return Frontier(
        [*(kept if axis == "seconds" else map(pricing.time, kept)), dense],
        axis, pricing.shape, left_out, batch, threads, runtime, pricing.prediction.error,
    )  # fmt: skip


def drop_dominated(group: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of a variant whose time is worth predicting.

    Others are less accurate than one of the same stages with a fraction of their MACs.

    Parameters
    ----------
    group : sequence of Candidate
        Candidates of one family and variant.

    Returns
    -------
    list of Candidate
    """
    least, kept = math.inf, []
    for c in sorted(group, key=lambda c: (c.error, c.cost.macs)):
        if c.cost.macs <= MAX_MACS * least:
            kept.append(c)
        least = min(least, c.cost.macs)
    return kept


def check_error(value: float) -> None:
    """Raise ValueError unless `value` is an error limit, a number of at least 0.

    Parameters
    ----------
    value : float
        Value of the argument ``max_error``.
    """
    if not isinstance(value, int | float | np.number) or not value >= 0:
        raise ValueError(f"max_error must be a number, at least 0, got {value!r}")
