"""The choice: every candidate of every family, and the ones that nothing beats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final, overload

import numpy as np

from lowrank import perfmodel
from lowrank._typing import Ints
from lowrank.core import tables
from lowrank.core.cost import AXES, Cost, chain_cost
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable, SweepPoint
from lowrank.families.kernel import as_kernel

NEAR = 1.25  # a short fit within this factor of the limit may be within it once refined
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

#: What candidates can be compared on: predicted seconds, and the fields of :class:`Cost`.
COSTS = ("seconds", *AXES)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to write a convolution: what it costs and how far off it is, before it is built.

    Attributes
    ----------
    family, variant, rank : str, str, tuple of int
        What it is; ``FAMILIES[family].fit(conv, rank, variant)`` fits the same anew.
    error : float
        Relative Frobenius error.  For the families fitted by iteration (`exact` is False) that
        of the sweep's short fit; what :meth:`build` returns is refined and not worse.
    bound : float
        No chain of this family, variant and rank has a smaller error.
    cost : Cost
        For one example of the frontier's input shape.
    exact : bool
        Whether error equals bound by theory: one SVD, or the dense kernel itself.
    seconds : float
        Predicted for the frontier's batch and threads; see :mod:`lowrank.perfmodel`.
    realised : float
        Share of the saving in multiply-adds that the predicted time realises: 1 where half the
        multiply-adds take half the time, less where they do not.

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
    exact: bool
    seconds: float
    realised: float
    _conv: Factorization = field(repr=False)
    _point: SweepPoint | None = field(repr=False)

    def build(self) -> Factorization:
        """Make the weights; what was fitted by a short iteration is refined.

        Returns
        -------
        Factorization

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
        >>> front[0].build()
        <Factorization spatial_svd h-w rank 1: 1x8x3x1 -> 8x1x1x3, 48 params>
        """
        if self._point is None:
            return self._conv
        return replace(
            self._conv,
            stages=self._point.build(),
            family=self.family,
            variant=self.variant,
            rank=self.rank,
        )

    def built(self, f: Factorization) -> Candidate:
        """This candidate with the rank and the error of what :meth:`build` made of it.

        Parameters
        ----------
        f : Factorization
            What :meth:`build` returned.

        Returns
        -------
        Candidate

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["tucker"])
        >>> c = front[0]
        >>> c.built(c.build()).error <= c.error + 1e-9
        True
        """
        if self._point is None:
            return self
        error = f.error(self._conv.to_dense())
        return replace(self, rank=f.rank, error=error, bound=min(self.bound, error))

    def amount(self, axis: str) -> float:
        """What it costs on one axis.

        Parameters
        ----------
        axis : str
            ``"seconds"``, or a field of :class:`lowrank.Cost`.

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial_svd"])
        >>> front[-1].amount("params")
        576.0
        """
        return float(self.seconds if axis == "seconds" else getattr(self.cost, axis))

    @property
    def name(self) -> str:
        """Family and variant."""
        return " ".join(filter(None, (self.family, self.variant)))

    @property
    def shapes(self) -> tuple[Ints, ...]:
        """Weight shapes of the stages."""
        stages = self._conv.stages if self._point is None else self._point.stages
        return tuple(s.weight.shape for s in stages)

    def as_dict(self) -> dict[str, Any]:
        """What the command line prints as JSON.

        Returns
        -------
        dict
            Plain numbers, strings and lists.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
        >>> front[0].as_dict()["stages"]
        [[1, 8, 3, 1], [8, 1, 1, 3]]
        """
        return {
            "family": self.family,
            "variant": self.variant,
            "rank": list(self.rank),
            "error": self.error,
            "bound": self.bound,
            "seconds": self.seconds,
            "realised": self.realised,
            "macs": self.cost.macs,
            "params": self.cost.params,
            "traffic": self.cost.traffic,
            "fused": self.cost.fused,
            "peak": self.cost.peak,
            "stages": [list(s) for s in self.shapes],
        }


@final
class Frontier(Sequence[Candidate]):
    """Candidates that no other beats on both error and cost, cheapest first.

    An immutable sequence that prints itself as a table.  The dense kernel is its last entry.

    Attributes
    ----------
    axis : str
        The cost that was compared: ``"seconds"``, or a field of :class:`lowrank.Cost`.
    input_shape : tuple of int
        (channels, \\*spatial) that the costs are for.
    batch, threads : int, int or None
        Examples at a time and threads that the seconds are for.
    runtime : str
        What runs the chains, as for :func:`lowrank.perfmodel.predict`.
    left_out : dict
        Families that do not apply to the convolution, and why.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
    >>> print(lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs"))  # doctest: +ELLIPSIS
    2 candidates, by macs, input of 8 channels x 16x16...
    family       rank   error   bound   macs   fewer  params ...
    spatial_svd h-w     1  0.0000  0.0000  10.1k  11.20x      48 ...
    dense           -  0.0000  0.0000   113k   1.00x     576 ...
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
        """The convolution as it came."""
        return self._candidates[-1]

    def within(self, error: float) -> Candidate:
        """The cheapest candidate with at most this error; the dense kernel always is one.

        Parameters
        ----------
        error : float
            Largest relative Frobenius error.

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
        _check_error(error)
        return next(c for c in self if c.error <= error)

    def affordable(self, amount: float) -> Candidate:
        """The best candidate that costs at most an amount on this frontier's axis.

        Parameters
        ----------
        amount : float
            In the units of the axis: seconds, multiply-adds, parameters, or elements.

        Returns
        -------
        Candidate

        Raises
        ------
        ValueError
            If nothing is so cheap; the message says what is possible.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3)))
        >>> lowrank.frontier(conv, (16, 16), axis="macs").affordable(50_000).cost.macs <= 50_000
        True
        """
        found = [c for c in self if c.amount(self.axis) <= amount]
        if not found:
            least, whole = (c.amount(self.axis) for c in (self[0], self.dense))
            raise ValueError(
                f"nothing costs at most {amount:.6g} {self.axis}; the cheapest is {least:.6g} "
                f"({least / whole:.3g} of the dense kernel), {self[0].name} rank "
                f"{self[0].rank}"
            )
        return found[-1]

    def __repr__(self) -> str:
        return tables.table(self)

    def _repr_html_(self) -> str:
        return tables.html(self)


def frontier(
    conv: Factorization,
    input_shape: Sequence[int],
    families: Iterable[str] | None = None,
    *,
    axis: str = "seconds",
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    progress: Callable[[str], object] | None = None,
) -> Frontier:
    """Every candidate that no other beats on both error and cost.

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
        What is compared: ``"seconds"``, predicted for this machine, or the same on every one:
        ``"macs"``, ``"params"``, ``"traffic"``, ``"fused"`` or ``"peak"``.
    batch : int
        Examples at a time, which seconds are predicted for.
    threads : int, optional
        Threads that seconds are predicted for; all that OpenMP offers if not given.
    runtime : str
        What is to run the chains: ``"lowrank"``, ``"torch"`` or ``"torch channels-last"``; see
        :func:`lowrank.perfmodel.predict`.
    progress : callable, optional
        Called with each family's name before its turn.

    Returns
    -------
    Frontier
        Candidates, cheapest first, ending with the dense kernel; none costs more than it.

    Raises
    ------
    ValueError
        If a family, axis or engine is unknown, or the input shape does not fit.

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
    names = _names(families)
    if axis not in COSTS:
        raise ValueError(f"axis must be one of {', '.join(COSTS)}, got {axis!r}")
    as_kernel(conv)
    shape = conv.input_shape(input_shape)
    whole, bias = conv.cost(shape), conv.bias is not None
    predicted, timed = _timing(conv, shape, batch, threads, runtime)

    none, measure = math.nan, "macs" if axis == "seconds" else axis
    first = Candidate("dense", "", (), 0.0, 0.0, whole, True, none, none, conv, None)
    found, left_out = [first], {}
    for name in names:
        family = FAMILIES[name]
        if progress is not None:
            progress(name)
        try:
            variants = family.variants(conv)
        except NotApplicable as why:
            left_out[name] = str(why)
            continue
        for variant in variants:
            for p in family.sweep(conv, variant):
                cost = chain_cost(p.stages, shape, bias)
                c = Candidate(
                    name, variant, p.rank, p.error, p.bound, cost, family.exact, none, none, conv, p
                )
                # What takes more multiply-adds than the dense kernel is not what anybody is after.
                if c.amount(measure) < first.amount(measure):
                    found.append(c)
    if axis == "seconds":
        found = [timed(c) for c in found]
        found = [c for c in found if c.seconds < predicted.seconds or c._point is None]
    kept = _unbeaten(found, axis, conv)
    return Frontier(
        kept if axis == "seconds" else map(timed, kept),
        axis, shape, left_out, batch, threads, runtime, predicted.error,
    )  # fmt: skip


def _timing(
    conv: Factorization, shape: Ints, batch: int, threads: int | None, runtime: str
) -> tuple[perfmodel.Prediction, Callable[[Candidate], Candidate]]:
    """The dense kernel's time, and what gives a candidate its own and its realised share."""
    here = perfmodel.current()
    whole = here.predict(conv, shape, batch=batch, threads=threads, runtime=runtime)
    macs = conv.cost(shape).macs

    def timed(c: Candidate) -> Candidate:
        stages = conv.stages if c._point is None else c._point.stages
        seconds = here.of_stages(stages, shape, batch, threads, runtime).seconds
        realised = whole.seconds / seconds / (macs / c.cost.macs)
        return replace(c, seconds=seconds, realised=realised)

    return whole, timed


def _unbeaten(found: list[Candidate], axis: str, conv: Factorization) -> list[Candidate]:
    """Those that no other beats on both error and cost, cheapest first; the dense one is last."""
    # Rounding must not decide: an error of 1e-16 and one of 3e-17 are both nothing.
    exact = float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)

    def error(c: Candidate) -> float:
        return c.error if c.error > exact else 0.0

    found = sorted(found, key=lambda c: (c.amount(axis), error(c), len(c.shapes)))
    kept: list[Candidate] = []
    for c in found:
        if not kept or error(c) < error(kept[-1]) or c.family == "dense":
            kept.append(c)
    return kept


def _names(families: Iterable[str] | None) -> list[str]:
    """The families asked for, checked."""
    names = list(FAMILIES if families is None else families)
    for name in names:
        if isinstance(families, str) or name not in FAMILIES:
            raise ValueError(
                f"families must be some of {', '.join(FAMILIES)}, in a list, "
                f"got {families if isinstance(families, str) else name!r}"
            )
    return names


def approximate(
    conv: Factorization,
    input_shape: Sequence[int],
    *,
    max_error: float | None = None,
    rank: int | Sequence[int] | None = None,
    seconds: float | str | None = None,
    macs: float | int | str | None = None,
    params: float | int | str | None = None,
    families: Iterable[str] | None = None,
    axis: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
) -> Factorization:
    """The cheapest chain within an error, or the best one within a budget.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    input_shape : sequence of int
        (channels, \\*spatial), or the spatial size alone.
    max_error : float, optional
        Largest relative Frobenius error.
    rank : int or sequence of int, optional
        This rank, of the one family named in `families`, or of the best of those that take it.
    seconds : float or str, optional
        Budget of predicted time for a whole batch: seconds, an amount with a unit such as
        ``"2ms"`` or ``"300us"``, or a share of the dense kernel's time such as ``"50%"``.
    macs, params : float or str, optional
        Budget.  A number in (0, 1] is a share of the dense cost; an amount has a unit:
        ``"20M"`` or ``"300k"``; a whole number above 1 is an amount too.
    families : iterable of str, optional
        Names from :data:`lowrank.FAMILIES`; all of them if not given.
    axis : str, optional
        With `max_error`, what is to be cheap: ``"seconds"`` if not given.  With `rank`, what is
        to be saved: ``"macs"`` if not given.  For this and the next three see :func:`frontier`.
    batch : int
        Examples at a time.
    threads : int, optional
        Threads to use.
    runtime : str
        What is to run the chain.

    Returns
    -------
    Factorization
        The pick, built; those found by iteration are refined, and those whose short fit is near
        `max_error` tried.

    Raises
    ------
    TypeError
        If not exactly one of `max_error`, `rank`, `seconds`, `macs` and `params` is given.
    ValueError
        If it is impossible, or nothing within `max_error` is cheaper than the dense kernel; the
        message says what is possible.  (:meth:`Frontier.within` returns the dense kernel then.)

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)), padding=1)
    >>> f = lowrank.approximate(conv, (16, 16), macs=0.5, families=["spatial_svd"])
    >>> f.rank, f.cost((16, 16)).macs / conv.cost((16, 16)).macs
    ((12,), 0.5)
    """
    if rank is not None and (max_error, seconds, macs, params) == (None,) * 4:
        names = _names(families)
        given = axis or "macs", batch, threads, runtime
        return _at_rank(conv, input_shape, rank, names, *given).build()
    front, pick = choose(
        conv,
        input_shape,
        max_error=max_error,
        rank=rank,
        seconds=seconds,
        macs=macs,
        params=params,
        families=families,
        axis=axis,
        batch=batch,
        threads=threads,
        runtime=runtime,
    )
    if max_error is not None and pick is front.dense:
        raise ValueError(nothing_within(front, max_error))
    return pick.build()


def nothing_within(front: Frontier, limit: float) -> str:
    """Why the dense kernel was picked, and what a larger error would buy."""
    said = f"nothing within {limit:g} is cheaper than the dense kernel, by {front.axis}"
    if len(front) == 1:
        return said + "; nor is anything at any error"
    nearest = front[-2]
    # The next of 1, 2, 5, 10, ...: what somebody would try.
    scale = 10.0 ** math.floor(math.log10(nearest.error)) if nearest.error > 0 else 1.0
    more = next((m * scale for m in (1, 2, 5, 10) if m * scale >= nearest.error), nearest.error)
    c = front.within(more)
    share = c.amount(front.axis) / front.dense.amount(front.axis)
    rank = ",".join(map(str, c.rank))
    return (
        f"{said}; the cheapest within {more:.3g} is {c.name} of rank {rank}, error {c.error:.3g}, "
        f"at {share:.3g} of its {front.axis}"
    )


def choose(
    conv: Factorization,
    input_shape: Sequence[int],
    *,
    max_error: float | None = None,
    rank: int | Sequence[int] | None = None,
    seconds: float | str | None = None,
    macs: float | int | str | None = None,
    params: float | int | str | None = None,
    families: Iterable[str] | None = None,
    axis: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    progress: Callable[[str], object] | None = None,
) -> tuple[Frontier, Candidate]:
    """The frontier and the pick of :func:`approximate`, not yet built."""
    as_kernel(conv)
    budgets = {"seconds": seconds, "macs": macs, "params": params}
    wanted = {"max_error": max_error, "rank": rank, **budgets}
    given = [k for k, v in wanted.items() if v is not None]
    if len(given) != 1:
        raise TypeError(
            "give exactly one of max_error, rank, seconds, macs and params, got "
            + (", ".join(given) or "none")
        )
    if max_error is not None:
        _check_error(max_error)
    budget = budgets.get(given[0])
    if axis is None:
        axis = given[0] if budget is not None else "seconds" if rank is None else "macs"
    elif budget is not None and axis != given[0]:
        raise ValueError(f"a budget is compared on its own axis, {given[0]}, not on {axis!r}")
    # Before the work: a wrong amount should not take a minute to refuse.
    amount = None
    if budget is not None:
        if axis == "seconds":
            here = perfmodel.current()
            whole = here.predict(conv, input_shape, batch=batch, threads=threads, runtime=runtime)
            amount = time_of(budget, whole.seconds)
        else:
            amount = amount_of(axis, budget, getattr(conv.cost(input_shape), axis))
    names = _names(families)
    found = frontier(
        conv, input_shape, names, axis=axis, batch=batch, threads=threads, runtime=runtime,
        progress=progress,
    )  # fmt: skip
    if max_error is not None:
        return found, _refined_within(found, max_error)
    if amount is not None:
        return found, found.affordable(amount)
    return found, _at_rank(conv, input_shape, rank, names, axis, batch, threads, runtime)


def _refined_within(found: Frontier, limit: float) -> Candidate:
    """The cheapest candidate within `limit` once it is built, where a short fit is near it."""
    for c in found:
        if c.error <= limit:
            return c
        if not c.exact and c.bound <= limit and c.error <= NEAR * limit:
            f = c.build()
            refined = c.built(f)
            if refined.error <= limit and c._point is not None:
                point = c._point._replace(build=partial(tuple, f.stages))
                return replace(refined, _point=point)
    return found.dense


def _at_rank(
    conv: Factorization,
    input_shape: Sequence[int],
    rank: Any,
    names: list[str],
    axis: str,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
) -> Candidate:
    """The best candidate of exactly this rank, fitted directly, whether on the front or not."""
    if axis not in COSTS:
        raise ValueError(f"axis must be one of {', '.join(COSTS)}, got {axis!r}")
    as_kernel(conv)
    shape = conv.input_shape(input_shape)
    whole, timed = _timing(conv, shape, batch, threads, runtime)
    tried, why = [], []
    for name in names:
        try:
            variants = FAMILIES[name].variants(conv)
        except NotApplicable as reason:
            why.append(str(reason))
            continue
        for variant in variants:
            try:
                f = FAMILIES[name].fit(conv, rank, variant)
            except (ValueError, TypeError) as reason:
                why.append(f"{name}: {reason}")
                continue
            exact, stages = FAMILIES[name].exact, f.stages
            error, bound = f.error(conv.to_dense()), FAMILIES[name].bound(conv, f.rank, variant)
            point = SweepPoint(f.rank, error, min(bound, error), stages, lambda s=stages: s)  # type: ignore[misc]
            c = Candidate(
                name, variant, f.rank, error, point.bound, f.cost(shape), exact, math.nan, math.nan,
                conv, point,
            )  # fmt: skip
            tried.append(timed(c))
    if not tried:
        raise ValueError(f"no family takes rank {rank!r}: " + "; ".join(dict.fromkeys(why)))
    most = whole.seconds if axis == "seconds" else float(getattr(conv.cost(shape), axis))
    cheaper = [c for c in tried if c.amount(axis) < most]
    if not cheaper:
        least = min(tried, key=lambda c: c.amount(axis))
        raise ValueError(
            f"nothing of rank {rank!r} saves {axis}: {least.name} takes "
            f"{least.amount(axis):.6g}, the dense kernel {most:.6g}; ask for a lower rank"
        )
    return min(cheaper, key=lambda c: (c.error, c.cost.macs))


def _check_error(value: float) -> None:
    if not isinstance(value, int | float | np.number) or not value >= 0:
        raise ValueError(f"max_error must be a number, at least 0, got {value!r}")


def amount_of(axis: str, budget: float | int | str, whole: int) -> float:
    """A budget as an amount: a share of `whole`, or a number with a unit."""
    if isinstance(budget, str):
        number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
        match = re.fullmatch(rf"\s*({number})\s*([kKMGT]?)\s*", budget)
        if not match:
            raise ValueError(
                f"{axis} must be a share in (0, 1] or an amount such as '20M', got {budget!r}"
            )
        given = float(match[1])
        amount = given * (whole if given <= 1 and not match[2] else _UNITS[match[2]])
    elif isinstance(budget, int | float | np.number):
        amount = float(budget * whole if budget <= 1 else budget)
    else:
        raise TypeError(f"{axis} must be a number or a string such as '20M', got {budget!r}")
    if not amount > 0:
        raise ValueError(f"{axis} must be above 0, got {budget!r}")
    return amount


def time_of(budget: float | int | str, whole: float) -> float:
    """A budget of time in seconds: a number of them, one with a unit, or a share of `whole`."""
    amount = math.nan
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*(s|ms|us|%)\s*", budget)
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            number = math.nan
        if match:
            amount = number * (whole / 100 if match[2] == "%" else _TIMES[match[2]])
    elif isinstance(budget, int | float | np.number):
        amount = float(budget)
    else:
        raise TypeError(f"seconds must be a number or a string such as '2ms', got {budget!r}")
    if not 0 < amount < math.inf:
        raise ValueError(
            f"seconds must be above 0: a number, or as '2ms', '300us', '50%', got {budget!r}"
        )
    return amount
