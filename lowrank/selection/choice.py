"""The choice of one chain: within an error, within a budget, or of a given rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable, SweepPoint
from lowrank.families.kernel import as_kernel
from lowrank.metric import Metric
from lowrank.selection.budget import Budget, InfeasibleBudgetError, parse_budget
from lowrank.selection.candidates import COSTS, Candidate, Pricing, check_families
from lowrank.selection.front import CandidatePool, Frontier, check_error, collect

REFINABLE = 1.25  # a short fit within this factor of the limit may be within it once refined
AT_ONCE = 4  # candidates that are measured together: the pick and its neighbours on the front


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
    metric: Metric | None = None,
    measure: bool = True,
) -> Factorization:
    """Return the cheapest chain within an error, or the most accurate one within a budget.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    input_shape : sequence of int
        (channels, \\*spatial), or the spatial size alone.
    max_error : float, optional
        Largest relative error, at least 0 and below 1.
    rank : int or sequence of int, optional
        Rank; the most accurate candidate of that rank is returned.
    seconds, macs, params : float or str, optional
        Budget of time per call, of MACs or of parameters.  A number in (0, 1] or ``"50%"`` is a
        share of the dense kernel's; counts above 1 and ``"20M"`` are amounts; amounts of time have
        a unit: ``"0.6ms"``.  See :func:`lowrank.selection.parse_budget`.
    families : iterable of str, optional
        Names from :data:`lowrank.FAMILIES`; all of them if not given.
    axis : str, optional
        Cost that `max_error` minimises, ``"seconds"`` if not given, or that `rank` has to save,
        ``"macs"`` if not given.
    batch, threads, runtime : int, int, str
        Examples per call, number of threads and library of the seconds; see :func:`frontier`.
    metric : Metric, optional
        Second moments that weight the error, from :class:`lowrank.metric.Moments`; the Frobenius
        norm if not given.
    measure : bool
        Whether the choice within a budget of time is measured on the runtime: the dense kernel,
        some candidates of every variant, and those near the budget until the pick is one that was
        measured.  Measurements are kept on disk, so that the same call returns the same chain.
        Times of the runtime ``"cuda"`` are always predicted.

    Returns
    -------
    Factorization
        The chosen chain, with its weights; fits by iteration are refined, and candidates whose
        short fit is close to `max_error` are tried.

    Raises
    ------
    TypeError
        If not exactly one of `max_error`, `rank`, `seconds`, `macs` and `params` is given.
    ValueError
        If an argument is not possible, a budget is infeasible, or nothing within `max_error` is
        cheaper than the dense kernel; the message states what is possible.
        (:meth:`Frontier.within` returns the dense kernel then.)

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
        names = check_families(families)
        as_kernel(conv)
        pricing = Pricing(conv, input_shape, batch, threads, runtime)
        return _best_of_rank(pricing, rank, names, axis or "macs", metric).build()
    front, pick = choose(
        conv, input_shape, max_error=max_error, rank=rank, seconds=seconds, macs=macs,
        params=params, families=families, axis=axis, batch=batch, threads=threads,
        runtime=runtime, metric=metric, measure=measure,
    )  # fmt: skip
    if max_error is not None and pick.is_dense:
        raise ValueError(explain_dense_pick(front, max_error))
    return pick.build()


def choose(
    conv: Factorization,
    input_shape: Sequence[int],
    *,
    max_error: float | None = None,
    rank: int | Sequence[int] | None = None,
    seconds: float | str | None = None,
    macs: float | str | None = None,
    params: float | str | None = None,
    families: Iterable[str] | None = None,
    axis: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    metric: Metric | None = None,
    measure: bool = True,
    progress: Callable[[str], object] | None = None,
) -> tuple[Frontier, Candidate]:
    """Return the frontier and the candidate that :func:`approximate` builds.

    Parameters
    ----------
    conv, input_shape, max_error, rank, seconds, macs, params, families, axis, batch, threads, \
runtime, metric, measure
        Arguments of :func:`approximate`.
    progress : callable, optional
        Called with the name of each family before its sweep, and before measurements.

    Returns
    -------
    front : Frontier
    pick : Candidate
    """
    as_kernel(conv)
    budgets = {"seconds": seconds, "macs": macs, "params": params}
    goals = {"max_error": max_error, "rank": rank, **budgets}
    given = [k for k, v in goals.items() if v is not None]
    if len(given) != 1:
        raise TypeError(
            "give exactly one of max_error, rank, seconds, macs and params, got "
            + (", ".join(given) or "none")
        )
    [goal] = given
    if max_error is not None:
        check_error(max_error)
    # Parsed before the sweeps: a wrong amount must not take a minute to be refused.
    amount = budgets.get(goal)
    budget = None if amount is None else parse_budget(goal, amount)
    if axis is None:
        axis = goal if budget is not None else "seconds" if rank is None else "macs"
    elif budget is not None and axis != goal:
        raise ValueError(f"axis must be {goal!r}, that of the budget, got {axis!r}")
    names = check_families(families)
    pool = collect(
        conv, input_shape, names, axis=axis, batch=batch, threads=threads, runtime=runtime,
        metric=metric, progress=progress,
    )  # fmt: skip
    if rank is not None:
        pricing = Pricing(conv, input_shape, batch, threads, runtime)
        return pool.front(), _best_of_rank(pricing, rank, names, axis, metric)
    if budget is None:
        assert max_error is not None
        front = pool.front()
        return front, _refine_within(front, max_error)
    return _spend(pool, budget, measure and axis == "seconds" and runtime != "cuda")


def _spend(pool: CandidatePool, budget: Budget, measure: bool) -> tuple[Frontier, Candidate]:
    """Return the front and its most accurate candidate within a budget.

    Measurements correct predictions, and thereby the choice: it is repeated until it is measured.
    A budget is infeasible only if it is for the candidates that are predicted to be fastest, too.
    """
    if measure:
        pool.measure_variants()
    fastest = pool.fastest(AT_ONCE)
    while True:
        front = pool.front()
        infeasible: InfeasibleBudgetError | None = None
        try:
            pick = front.affordable(budget.amount(front.dense.amount(front.axis)))
        except InfeasibleBudgetError as error:
            pick, infeasible = front[0], error
        if not measure or pick.is_measured:
            if infeasible is None:
                return front, pick
            if not measure or not fastest:
                raise infeasible
            pool.measure(fastest)
            fastest = []
            continue
        at = list(front).index(pick)
        near = sorted(range(len(front)), key=lambda i: abs(i - at))
        pool.measure([front[i] for i in near if not front[i].is_measured][:AT_ONCE])


def _refine_within(front: Frontier, limit: float) -> Candidate:
    """Return the cheapest candidate within `limit`, refining those whose short fit is near it."""
    for c in front:
        if c.error <= limit and not c.is_estimate:
            return c
        if not c.exact and c.bound <= limit and c.error <= REFINABLE * limit:
            f = c.build()
            refined = c.with_stages(f.stages, f.rank)
            if refined.error <= limit:
                return refined
    return front.dense


def _best_of_rank(
    pricing: Pricing, rank: Any, names: list[str], axis: str, metric: Metric | None
) -> Candidate:
    """Return the most accurate candidate of exactly this rank, on the front or not."""
    if axis not in COSTS:
        raise ValueError(f"axis must be one of {', '.join(COSTS)}, got {axis!r}")
    conv, dense = pricing.conv, pricing.time(pricing.dense)
    fitted, reasons = [], []
    for name in names:
        family = FAMILIES[name]
        try:
            variants = family.variants(conv)
        except NotApplicable as reason:
            reasons.append(str(reason))
            continue
        for variant in variants:
            try:
                f = family.fit(conv, rank, variant, metric)
            except (ValueError, TypeError) as reason:
                reasons.append(f"{name}: {reason}")
                continue
            bound = 0.0 if metric is not None else family.bound(conv, f.rank, variant)
            point = SweepPoint(f.rank, math.nan, bound, f.stages, lambda: ())
            c = Candidate(
                name, variant, f.rank, math.nan, bound, dense.cost, family.exact,
                dense.itemsize, _conv=conv, _metric=metric, _point=point,
            )  # fmt: skip
            fitted.append(pricing.time(pricing.price(c.with_stages(f.stages))))
    if not fitted:
        raise ValueError(f"no family takes rank {rank!r}: " + "; ".join(dict.fromkeys(reasons)))
    cheaper = [c for c in fitted if c.amount(axis) < dense.amount(axis)]
    if not cheaper:
        least = min(fitted, key=lambda c: c.amount(axis))
        raise ValueError(
            f"rank must be lower to save {axis}, got {rank!r}: {least.name} needs "
            f"{least.amount(axis):.6g}, the dense kernel {dense.amount(axis):.6g}"
        )
    return min(cheaper, key=lambda c: (c.error, c.cost.macs))


def explain_dense_pick(front: Frontier, limit: float) -> str:
    """Explain why the dense kernel was picked, and what a larger error would buy.

    Parameters
    ----------
    front : Frontier
        Front whose pick is the dense kernel.
    limit : float
        Largest error that was allowed.

    Returns
    -------
    str
    """
    reason = f"nothing within error {limit:g} is cheaper than the dense kernel in {front.axis}"
    if len(front) == 1:
        return reason + ", nor is anything at any error"
    nearest = front[-2]
    # The next of 1, 2, 5, 10, ...: a round limit to try next.
    scale = 10.0 ** math.floor(math.log10(nearest.error)) if nearest.error > 0 else 1.0
    more = next((m * scale for m in (1, 2, 5, 10) if m * scale >= nearest.error), nearest.error)
    c = next(c for c in front if c.error <= more)
    share = c.amount(front.axis) / front.dense.amount(front.axis)
    rank = ",".join(map(str, c.rank))
    return (
        f"{reason}; the cheapest within {more:.3g} is {c.name} of rank {rank}, error "
        f"{c.error:.3g}, at {share:.3g} of the {front.axis}"
    )
