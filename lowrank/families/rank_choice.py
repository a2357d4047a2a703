"""Choice of a point of a sweep over ranks: by error, or by a share of the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np

from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.families.sweep_point import SweepPoint


def check_max_error(max_error: Any) -> None:
    """Check that a limit of the relative error is a number of at least 0."""
    is_number = isinstance(max_error, int | float | np.number) and not isinstance(max_error, bool)
    if not is_number or not max_error >= 0:
        raise ValueError(f"max_error must be a number of at least 0, got {max_error!r}")


def is_share(rank: Any) -> TypeGuard[float]:
    """Return whether a rank is a share of the parameters: a number between 0 and 1."""
    return isinstance(rank, float | np.floating) and bool(0 < rank < 1)


def within_error(
    name: str, conv: Factorization, points: Iterable[SweepPoint], max_error: float
) -> list[SweepPoint]:
    """Return the points within an error, those of fewest parameters first.

    Parameters
    ----------
    name : str
        Name of the family, for messages.
    conv : Factorization
        One dense stage.
    points : iterable of SweepPoint
        Sweep of the family.
    max_error : float
        Largest relative error, up to rounding.

    Returns
    -------
    list of SweepPoint

    Raises
    ------
    ValueError
        If no point is within the error; the message gives the smallest.
    """
    check_max_error(max_error)
    found = list(points)
    within = [p for p in found if p.error <= max_error + rounding(conv)]
    if not within:
        best = min(found, key=lambda p: p.error)
        raise ValueError(
            f"max_error must be at least {best.error:.6g} for {name} (its smallest, at rank "
            f"{best.rank}), got {max_error:.6g}; allow a larger error, or try another family"
        )
    return sorted(within, key=lambda p: (weight_count(p.stages), p.error))


def within_share(
    name: str,
    conv: Factorization,
    points: Iterable[SweepPoint],
    share: float,
    price: Callable[[Sequence[Stage]], int],
    argument: str = "rank",
) -> SweepPoint:
    """Return the most accurate point that costs at most a share of the dense kernel.

    Parameters
    ----------
    name : str
        Name of the family, for messages.
    conv : Factorization
        One dense stage.
    points : iterable of SweepPoint
        Sweep of the family.
    share : float
        Share of the cost of the dense kernel.
    price : callable
        Returns the cost of stages.
    argument : str
        Name of the argument that the share was given as, for messages.

    Returns
    -------
    SweepPoint

    Raises
    ------
    ValueError
        If no point is within the share; the message gives the share of the cheapest.
    """
    dense_cost = price(conv.stages)
    costs = [(price(p.stages), p) for p in points]
    affordable = [(cost, p) for cost, p in costs if cost <= share * dense_cost]
    if not affordable:
        least, cheapest = min(costs, key=lambda x: x[0])
        raise ValueError(
            f"{argument} must be at least {least / dense_cost:.6g} for {name} (the cheapest rank, "
            f"{cheapest.rank}), got {share:.6g}"
        )
    exact = rounding(conv)  # rounding must not decide between ranks without error
    return min(affordable, key=lambda x: (x[1].error if x[1].error > exact else 0.0, x[0]))[1]


def check_error(f: Factorization, error: float, max_error: float) -> None:
    """Check that the fit of a rank that was given is within an error."""
    if error > max_error + rounding(f):
        rank = ", ".join(map(str, f.rank))
        raise ValueError(
            f"max_error must be at least {error:.4g} at rank {rank}, got {max_error:.4g}: raise "
            "the rank or max_error"
        )


def parameters(conv: Factorization) -> Callable[[Sequence[Stage]], int]:
    """Return a function from stages to their number of weights, with the biases of `conv`."""
    biases = 0 if conv.bias is None else conv.bias.size
    return lambda stages: weight_count(stages) + biases


def rounding(conv: Factorization) -> float:
    """Return the error that rounding alone may cause."""
    return float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)


def weight_count(stages: Sequence[Stage]) -> int:
    """Return the number of weights of stages."""
    return sum(s.weight.size for s in stages)
