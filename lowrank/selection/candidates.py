"""Candidates: every family, variant and rank for a convolution, priced before it is built."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lowrank import perfmodel
from lowrank._typing import Ints
from lowrank.core.blas import one_blas_thread
from lowrank.core.cost import AXES, Cost, chain_cost, speed_up_efficiency
from lowrank.core.stage import Stage, is_abstract
from lowrank.core.threads import impatient_pool
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable, SweepPoint
from lowrank.families.weighted import MetricFit
from lowrank.metric import Metric

#: Axes on which candidates are compared: seconds, weight bytes, fields of `Cost`.
COSTS = ("seconds", "bytes", *AXES)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to write a convolution, with its error and its cost, before it is built.

    Attributes
    ----------
    family, variant, rank : str, str, tuple of int
        Identity; ``FAMILIES[family].fit(conv, rank, variant)`` fits the same chain anew.
    error : float
        Relative error, in the Frobenius norm or in the metric.  Of families fitted by iteration
        (`exact` is False) it is that of the sweep's short fit; :meth:`build` refines it.
    bound : float
        Lower bound on the error of any chain of this family, variant and rank.
    cost : Cost
        Cost per example.
    exact : bool
        Whether error equals bound in theory: one SVD, or the dense kernel itself.  In a metric
        also: whether whitening expresses the metric; if not, `error` is an estimate.
    itemsize : int
        Bytes per weight.
    seconds : float
        Time per call for the given batch, threads and runtime; NaN if not predicted.
    is_measured : bool
        Whether `seconds` were measured, not predicted.
    loss : float
        Increase of the loss of the network; NaN outside of networks.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
    >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
    >>> front[0].name, front[0].rank, front[0].shapes
    ('spatial_svd h-w', (1,), ((1, 8, 3, 1), (8, 1, 1, 3)))
    """

    family: str
    variant: str
    rank: Ints
    error: float
    bound: float
    cost: Cost
    exact: bool = True
    itemsize: int = 4
    seconds: float = math.nan
    is_measured: bool = False
    loss: float = math.nan
    _conv: Factorization | None = field(default=None, repr=False)
    _metric: Metric | None = field(default=None, repr=False)
    _point: SweepPoint | None = field(default=None, repr=False)

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense kernel itself."""
        return self.family == "dense"

    @property
    def name(self) -> str:
        """Family and variant."""
        return " ".join(filter(None, (self.family, self.variant)))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of the chain; their weights may be abstract.  Empty if read from a file."""
        if self._point is not None:
            return self._point.stages
        return () if self._conv is None else self._conv.stages

    @property
    def shapes(self) -> tuple[Ints, ...]:
        """Weight shapes of the stages."""
        return tuple(s.weight.shape for s in self.stages)

    @property
    def is_estimate(self) -> bool:
        """Whether the chain that :meth:`build` returns may have a larger error than `error`."""
        return self._metric is not None and not self.exact and not self.is_fitted

    @property
    def point(self) -> SweepPoint:
        """Point of the family's sweep; ValueError for the dense kernel."""
        if self._point is None:
            raise ValueError(f"{self.name} is not a point of a sweep")
        return self._point

    def build(self) -> Factorization:
        """Build the chain; fits that are iterative are refined.

        Returns
        -------
        Factorization

        Raises
        ------
        ValueError
            If the candidate was read from a file, which holds no weights.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
        >>> front[0].build()
        <Factorization spatial_svd h-w rank 1: 1x8x3x1 -> 8x1x1x3, 48 params>
        """
        if self._conv is None:
            raise ValueError(f"{self.name} was read from a file without its convolution")
        if self._point is None:
            return self._conv
        with one_blas_thread():
            stages = self._point.build()
        return replace(
            self._conv,
            stages=stages,
            family=self.family,
            variant=self.variant,
            rank=self.rank,
        )

    def with_stages(
        self, stages: Sequence[Stage], rank: Ints | None = None, error: float | None = None
    ) -> Candidate:
        """Return the candidate with fitted weights and the error that they have.

        Parameters
        ----------
        stages : sequence of Stage
            Chain that :meth:`build` shall return from now on.
        rank : tuple of int, optional
            Rank of that chain; the candidate's own if not given.
        error : float, optional
            Error of that chain; computed if not given.

        Returns
        -------
        Candidate

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["tucker"])
        >>> c = front[0]
        >>> f = c.build()
        >>> c.with_stages(f.stages, f.rank).error <= c.error + 1e-9
        True
        """
        if self._conv is None or self._point is None:
            return self
        fixed = tuple(stages)
        if error is None and self._metric is not None:
            error = MetricFit(self._conv, self._metric).error(fixed)
        elif error is None:
            error = replace(self._conv, stages=fixed).error(self._conv.to_dense())
        rank = self.rank if rank is None else rank
        point = SweepPoint(rank, error, min(self.bound, error), fixed, lambda: fixed)
        return replace(self, rank=rank, error=error, bound=point.bound, _point=point)

    def summary(self) -> Candidate:
        """Return the candidate without its convolution and weights.

        Returns
        -------
        Candidate

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
        >>> front[0].summary().stages
        ()
        """
        return replace(self, _conv=None, _metric=None, _point=None)

    @property
    def is_fitted(self) -> bool:
        """Whether the stages have their weights."""
        return bool(self.stages) and not is_abstract(self.stages[0].weight)

    def amount(self, axis: str) -> float:
        """Return the cost on one axis.

        Parameters
        ----------
        axis : str
            ``"seconds"``, ``"bytes"`` of weights, or a field of :class:`lowrank.Cost`.

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"])
        >>> front[-1].amount("params"), front[-1].amount("bytes")
        (576.0, 4608.0)
        """
        if axis == "seconds":
            return self.seconds
        if axis == "bytes":
            return float(self.cost.params * self.itemsize)
        return float(getattr(self.cost, axis))

    def is_slower(self, dense: Candidate) -> bool:
        """Return whether the candidate takes longer than the dense kernel.

        Parameters
        ----------
        dense : Candidate
            Dense kernel; its seconds are those of the same call.

        Returns
        -------
        bool
            False if either time is unknown.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"])
        >>> any(c.is_slower(front.dense) for c in front)
        False
        """
        return self.seconds > dense.seconds

    def efficiency(self, dense: Candidate) -> float:
        """Return the speed-up efficiency, log(speed-up) / log(MAC ratio).

        Parameters
        ----------
        dense : Candidate
            Dense kernel; its seconds are those of the same call.

        Returns
        -------
        float
            1 if time falls as much as MACs, 0 if it does not fall, negative for candidates slower
            than the dense kernel; NaN if no MACs are saved.  1 for the dense kernel itself.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"])
        >>> front.dense.efficiency(front.dense), front[0].efficiency(front.dense) > 0
        (1.0, True)
        """
        if not (self.seconds and self.cost.macs):
            return math.nan
        return speed_up_efficiency(dense.seconds / self.seconds, dense.cost.macs / self.cost.macs)

    def as_dict(self, dense: Candidate | None = None) -> dict[str, Any]:
        """Return the candidate as plain numbers, strings and lists, for JSON.

        Parameters
        ----------
        dense : Candidate, optional
            Dense kernel, to add the speed-up efficiency.

        Returns
        -------
        dict
            None stands for NaN.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
        >>> front[0].as_dict()["stages"]
        [[1, 8, 3, 1], [8, 1, 1, 3]]
        """
        efficiency = {} if dense is None else {"efficiency": _finite(self.efficiency(dense))}
        return {
            "family": self.family,
            "variant": self.variant,
            "rank": list(self.rank),
            "error": self.error,
            "bound": self.bound,
            "seconds": _finite(self.seconds),
            "is_measured": self.is_measured,
            **efficiency,
            **{axis: getattr(self.cost, axis) for axis in AXES},
            "stages": [list(s) for s in self.shapes],
        }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


class Pricing:
    """Prices of chains in the place of a convolution: costs, and predicted time.

    Parameters
    ----------
    conv : Factorization
        One dense stage.
    input_shape : sequence of int
        (channels, \\*spatial), or the spatial size alone.
    batch : int
        Number of examples per call.
    threads : int, optional
        Number of threads; all that OpenMP offers if not given.
    runtime : str
        Library that runs the chains; see :func:`lowrank.perfmodel.predict`.
    times : float
        Number of times that an example passes the layer, in passes at `input_shape`.
    has_bias : bool, optional
        Whether chains have a bias; whether `conv` has one if not given.
    per_example : bool
        Whether seconds are per example, times `times`, and not per call.
    in_network : bool
        Whether seconds are those inside a network of the runtime, which keeps its own layout
        between layers.
    """

    def __init__(
        self,
        conv: Factorization,
        input_shape: Sequence[int],
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
        times: float = 1,
        has_bias: bool | None = None,
        per_example: bool = False,
        in_network: bool = False,
    ) -> None:
        self.conv, self.shape, self.times = conv, conv.input_shape(input_shape), times
        self.has_bias = conv.bias is not None if has_bias is None else has_bias
        self._call, self._in_network = (batch, threads, runtime), in_network
        self._calls = times / batch if per_example else times
        self.dense = Candidate(
            "dense", "", (), 0.0, 0.0, self._cost(conv.stages, conv.bias is not None), True,
            conv.dtype.itemsize, _conv=conv,
        )  # fmt: skip

    @cached_property
    def prediction(self) -> perfmodel.Prediction:
        """Predicted time of the dense kernel."""
        return self._predict(self.conv.stages)

    def _predict(self, stages: Sequence[Stage]) -> perfmodel.Prediction:
        return perfmodel.current().predict_stages(
            stages, self.shape, *self._call, in_network=self._in_network
        )

    def price(self, c: Candidate) -> Candidate:
        """Return the candidate with its cost, without its time.

        Parameters
        ----------
        c : Candidate
            Candidate for this convolution.

        Returns
        -------
        Candidate
        """
        return c if c.is_dense else replace(c, cost=self._cost(c.stages, self.has_bias))

    def time(self, c: Candidate) -> Candidate:
        """Return the candidate with its predicted seconds.

        Parameters
        ----------
        c : Candidate
            Priced candidate.

        Returns
        -------
        Candidate
        """
        predicted = self.prediction if c.is_dense else self._predict(c.stages)
        return replace(c, seconds=predicted.seconds * self._calls)

    def _cost(self, stages: Sequence[Stage], has_bias: bool) -> Cost:
        cost = chain_cost(stages, self.shape, has_bias)
        return cost if self.times == 1 else replace(cost, macs=round(cost.macs * self.times))


def check_families(families: str | Iterable[str] | None) -> list[str]:
    """Return the names of families; ValueError for unknown ones.

    Parameters
    ----------
    families : iterable of str, optional
        Names from :data:`lowrank.FAMILIES`; all of them if not given.

    Returns
    -------
    list of str
    """
    names = list(FAMILIES if families is None else families)
    for name in names:
        if isinstance(families, str) or name not in FAMILIES:
            raise ValueError(
                f"families must be a list of names out of {', '.join(FAMILIES)}, got "
                f"{families if isinstance(families, str) else name!r}"
            )
    return names


def candidates(
    pricing: Pricing,
    families: Iterable[str],
    metric: Metric | None = None,
    *,
    left_out: dict[str, str] | None = None,
    progress: Callable[[str], object] | None = None,
    workers: int = 1,
) -> Iterator[list[Candidate]]:
    """Yield the candidates of every family and variant, priced but without their times.

    Parameters
    ----------
    pricing : Pricing
        Prices for the convolution that is approximated.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES`.
    metric : Metric, optional
        Second moments that weight the error; the Frobenius norm if not given.
    left_out : dict, optional
        Receives the families that do not apply, and why.
    progress : callable, optional
        Called with the name of each family before its candidates are awaited.
    workers : int
        Number of threads that sweep, each another variant.  Candidates do not depend on it.

    Yields
    ------
    list of Candidate
        One list per family and variant, one candidate per rank of its sweep.
    """
    names = list(families)
    work: list[tuple[str, str]] = []
    for name in names:
        try:
            work += [(name, variant) for variant in FAMILIES[name].variants(pricing.conv)]
        except NotApplicable as why:
            if left_out is not None:
                left_out[name] = str(why)
    is_cancelled = threading.Event()

    def sweep(item: tuple[str, str]) -> list[Candidate]:
        return _sweep(pricing, *item, metric, is_cancelled)

    with impatient_pool(workers) as pool:
        # One thread needs no pool: without it, sweeps are not computed ahead of their use.
        groups = map(sweep, work) if workers == 1 else pool.map(sweep, work)
        try:
            for name in names:
                if progress is not None:
                    progress(name)
                yield from itertools.islice(groups, sum(n == name for n, _ in work))
        finally:
            is_cancelled.set()


def _sweep(
    pricing: Pricing, name: str, variant: str, metric: Metric | None, is_cancelled: threading.Event
) -> list[Candidate]:
    """Return the priced candidates of one variant; some of them if sweeps are cancelled."""
    family, conv = FAMILIES[name], pricing.conv
    unpriced = Candidate(
        name, variant, (), 0.0, 0.0, pricing.dense.cost, itemsize=conv.dtype.itemsize,
        _conv=conv, _metric=metric,
    )  # fmt: skip
    group = []
    for p in family.sweep(conv, variant, metric):
        exact = family.exact and p.bound == p.error
        c = replace(unpriced, rank=p.rank, error=p.error, bound=p.bound, exact=exact, _point=p)
        group.append(pricing.price(c))
        if is_cancelled.is_set():
            break
    return group
