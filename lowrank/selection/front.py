"""The frontier of one convolution: its Pareto-optimal candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final, overload

import numpy as np

from lowrank import engine
from lowrank._typing import Ints
from lowrank.factorization import Factorization
from lowrank.families.kernel import as_kernel
from lowrank.metric import Metric
from lowrank.perfmodel.measurement import Measurements
from lowrank.selection import tables
from lowrank.selection.budget import infeasible
from lowrank.selection.candidates import COSTS, Candidate, Pricing, candidates, check_families
from lowrank.selection.measured import (
    Key,
    candidate_key,
    sample_variants,
    with_measurements,
)
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
        Examples per call and number of threads of the seconds.
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
    family           rank   error   bound   macs   fewer ...
    spatial_svd h-w     1  0.0000  0.0000  10.1k  11.20x ...
    dense               -  0.0000  0.0000   113k   1.00x ...
    ~ predicted...
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
            If `error` is not at least 0 and below 1.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16))
        >>> front.within(0.1).cost.macs < front.dense.cost.macs
        True
        """
        check_error(error, "error")
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
    measure: bool = False,
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
        Cost to compare: ``"seconds"`` on this machine, or one that is the same on every machine:
        ``"macs"``, ``"params"``, ``"bytes"``, ``"traffic"``, ``"fused"`` or ``"peak"``.
    batch : int
        Number of examples per call, for seconds.
    threads : int, optional
        Number of threads, for seconds; all that OpenMP offers if not given.
    runtime : str
        Library that runs the chains: ``"lowrank"``, ``"onnxruntime"``, ``"torch"`` or
        ``"torch-channels-last"``; see :func:`lowrank.perfmodel.predict`.
    metric : Metric, optional
        Second moments that weight the error, from :class:`lowrank.metric.Moments`; the Frobenius
        norm if not given.
    measure : bool
        Whether the seconds of the front are measured on the runtime, not predicted.
    progress : callable, optional
        Called with the name of each family before its sweep, and before measurements.

    Returns
    -------
    Frontier
        Candidates, cheapest first, ending with the dense kernel; none costs more than it on the
        axis.

    Raises
    ------
    ValueError
        If a family, axis or runtime is unknown, or the input shape does not fit.

    Notes
    -----
    Exact over the candidates generated: every rank of the families that are one SVD, truncated
    HOSVD and TT ranks, and at most a dozen ranks of those fitted by alternating least squares.
    Weights are built only for what :meth:`Candidate.build` is called on.

    Variants are swept on as many threads as OpenMP offers, each with BLAS on one; candidates do not
    depend on the number.  After Ctrl-C, ranks that are being fitted are the last ones.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> g = np.exp(-np.linspace(-2, 2, 7) ** 2)
    >>> blur = lowrank.dense(np.outer(g, g)[None, None])
    >>> [(c.name, c.rank, c.cost.macs) for c in lowrank.frontier(blur, (32, 32), axis="macs")]
    [('spatial_svd h-w', (1,), 10556), ('dense', (), 33124)]
    """
    pool = collect(
        conv, input_shape, families, axis=axis, batch=batch, threads=threads, runtime=runtime,
        metric=metric, progress=progress,
    )  # fmt: skip
    if measure:
        pool.measure_variants()
    front = pool.front()
    while measure and (predicted := [c for c in front if not c.is_measured]):
        pool.measure(predicted)
        front = pool.front()
    return front


def collect(
    conv: Factorization,
    input_shape: Sequence[int],
    families: Iterable[str] | None,
    *,
    axis: str,
    batch: int,
    threads: int | None,
    runtime: str,
    metric: Metric | None,
    progress: Callable[[str], object] | None,
) -> CandidatePool:
    """Return all candidates that may be on a frontier, with predicted seconds.

    Parameters
    ----------
    conv, input_shape, families, axis, batch, threads, runtime, metric, progress
        Arguments of :func:`frontier`.

    Returns
    -------
    CandidatePool
    """
    names = check_families(families)
    if axis not in COSTS:
        raise ValueError(f"axis must be one of {', '.join(COSTS)}, got {axis!r}")
    as_kernel(conv)
    pricing = Pricing(conv, input_shape, batch, threads, runtime)
    dense = pricing.time(pricing.dense)
    # Skip candidates that need more MACs than the dense kernel, whatever their predicted time.
    limited = "macs" if axis == "seconds" else axis
    left_out: dict[str, str] = {}
    # Sweeps run BLAS on one thread each: several at once use the others.
    workers = 1 if engine.is_on_gpu(conv.stages[0].weight) else engine.max_threads()
    groups = candidates(
        pricing, names, metric, left_out=left_out, progress=progress, workers=workers
    )
    found: list[Candidate] = []
    for group in groups:
        cheaper = [c for c in group if c.amount(limited) < dense.amount(limited)]
        if axis == "seconds":  # predicted while the next sweeps run
            found += [pricing.time(c) for c in drop_dominated(cheaper)]
        else:
            found += cheaper
    if axis != "seconds":
        # Seconds do not decide what is on the front: only its candidates need them.
        found = [pricing.time(c) for c in _pareto_optimal(found, axis, conv)]
    empty = Frontier(
        [dense], axis, pricing.shape, left_out, batch, threads, runtime, pricing.prediction.error
    )
    return CandidatePool(found, empty, conv, progress)


class CandidatePool:
    """Candidates of one convolution with predicted seconds, of which some are measured.

    Measurements correct the predictions of the others; see
    :func:`lowrank.selection.measured.with_measurements`.

    Parameters
    ----------
    found : sequence of Candidate
        Candidates with predicted seconds, without the dense kernel.
    empty : Frontier
        Frontier of the dense kernel alone.
    conv : Factorization
        Dense kernel.
    progress : callable, optional
        Called before measurements.
    """

    def __init__(
        self,
        found: Sequence[Candidate],
        empty: Frontier,
        conv: Factorization,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        self._found, self._empty, self._conv = list(found), empty, conv
        self._progress = progress
        self._measured: dict[Key, float] = {}

    def front(self) -> Frontier:
        """Return the Pareto front, by measured seconds where they are known.

        Returns
        -------
        Frontier
        """
        f = self._empty
        dense, *found = self._timed()
        longest = dense.seconds if f.axis == "seconds" else math.inf
        found = [c for c in found if c.seconds < longest]
        return Frontier(
            [*_pareto_optimal(found, f.axis, self._conv), dense],
            f.axis, f.input_shape, f.left_out, f.batch, f.threads, f.runtime, f.error,
        )  # fmt: skip

    def fastest(self, count: int) -> list[Candidate]:
        """Return the candidates with the least seconds, on the front or not.

        Parameters
        ----------
        count : int
            Number of candidates.

        Returns
        -------
        list of Candidate
        """
        return sorted(self._timed()[1:], key=lambda c: c.seconds)[:count]

    def _timed(self) -> list[Candidate]:
        """Return the dense kernel and all candidates with the best known seconds."""
        return with_measurements([self._empty.dense, *self._found], self._measured)

    def measure_variants(self) -> None:
        """Measure some candidates of every variant.

        Predictions may be off, for other libraries by half: they alone must not decide which
        variants are measured.
        """
        f = self._empty
        if f.axis == "seconds":
            self.measure(sample_variants(self._found, f.dense))

    def measure(self, some: Sequence[Candidate]) -> None:
        """Measure candidates and the dense kernel on the runtime.

        Parameters
        ----------
        some : sequence of Candidate
            Candidates of this pool; those that the runtime cannot run are dropped.

        Raises
        ------
        NotImplementedError
            If the runtime has no operator for the dense kernel.
        """
        if self._progress is not None:
            self._progress("measuring")
        dense, chains = self._empty.dense, [c for c in some if not c.is_dense]
        try:
            seconds = self._seconds(chains)
        except NotImplementedError:  # the runtime has no operator for some stage
            seconds = [*self._seconds([]), *map(self._seconds_of_one, chains)]
        self._measured.update(zip(map(candidate_key, (dense, *chains)), seconds))

    def _seconds(self, chains: Sequence[Candidate]) -> list[float]:
        """Return the measured seconds of the dense kernel and of chains."""
        f = self._empty
        measurements = Measurements(f.runtime, f.batch, f.threads, in_network=False)
        stages = [c.stages for c in chains]
        dense, others = measurements.seconds(f.dense.stages, stages, f.input_shape)
        return [dense, *others]

    def _seconds_of_one(self, c: Candidate) -> float:
        try:
            return self._seconds([c])[1]
        except NotImplementedError:
            return math.inf


def _pareto_optimal(found: Sequence[Candidate], axis: str, conv: Factorization) -> list[Candidate]:
    """Return the Pareto front in error and one cost, cheapest first."""
    # Errors below rounding are equal: an error of 1e-16 must not beat one of 3e-17.
    rounding = float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)
    found = sorted(found, key=lambda c: len(c.shapes))
    front = pareto_front(
        [[c.amount(axis)] for c in found], [c.error if c.error > rounding else 0.0 for c in found]
    )
    return [found[i] for i in front]


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


def check_error(value: float, name: str = "max_error") -> None:
    """Raise ValueError unless `value` is an error limit: at least 0 and below 1.

    Parameters
    ----------
    value : float
        Largest relative error.  At 1, a chain of zeros would do.
    name : str
        Name of the argument or option in the message.
    """
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ValueError(f"{name} must be a relative error, at least 0 and below 1, got {value!r}")
