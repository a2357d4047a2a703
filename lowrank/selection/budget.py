"""Budgets: a share of the dense cost, or an amount, parsed the same way everywhere."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from lowrank.core.tables import format_count, format_seconds

_NUMBER = r"([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)"
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


class InfeasibleBudgetError(ValueError):
    """No choice is within a budget; the message states the minimum."""


class Budget(NamedTuple):
    """Largest cost on one axis.

    Attributes
    ----------
    axis : str
        Cost that is limited: ``"seconds"``, ``"macs"``, ``"params"``, ``"bytes"``, ...
    value : float
        Share of the dense cost, or amount in the units of the axis.
    is_share : bool
        Whether `value` is a share.
    """

    axis: str
    value: float
    is_share: bool

    def amount(self, dense: float) -> float:
        """Return the budget in the units of its axis.

        Parameters
        ----------
        dense : float
            Cost of the dense kernel or network.

        Returns
        -------
        float

        Examples
        --------
        >>> from lowrank.selection import parse_budget
        >>> parse_budget("macs", "50%").amount(1000.0)
        500.0
        """
        return self.value * dense if self.is_share else self.value


def parse_budget(axis: str, budget: float | str, name: str | None = None) -> Budget:
    """Parse a budget.

    Parameters
    ----------
    axis : str
        Cost that is limited.
    budget : float or str
        A number in (0, 1] or a percentage such as ``"50%"`` is a share of the dense cost.
        Counts above 1 and counts with a unit, such as ``"20M"`` or ``"300k"``, are amounts.
        Amounts of time have a unit: ``"0.6ms"``, ``"300us"`` or ``"2s"``.
    name : str, optional
        Name of the argument or option in error messages; `axis` if not given.

    Returns
    -------
    Budget

    Raises
    ------
    TypeError
        If `budget` is neither a number nor a string.
    ValueError
        If `budget` is no positive share or amount.

    Examples
    --------
    >>> from lowrank.selection import parse_budget
    >>> parse_budget("macs", 0.5)
    Budget(axis='macs', value=0.5, is_share=True)
    >>> parse_budget("macs", "20M")
    Budget(axis='macs', value=20000000.0, is_share=False)
    >>> parse_budget("seconds", "0.6ms")
    Budget(axis='seconds', value=0.0006, is_share=False)
    """
    name = axis if name is None else name
    is_time = axis == "seconds"
    example = "'0.6ms'" if is_time else "'20M'"
    if isinstance(budget, bool) or not isinstance(budget, int | float | str | np.number):
        raise TypeError(f"{name} must be a number or a string such as {example}, got {budget!r}")
    match = re.fullmatch(rf"\s*{_NUMBER}\s*(%|[a-zA-Zµ]*)\s*", str(budget))
    number, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    parsed = None
    if unit == "%":
        parsed = Budget(axis, number / 100, True)
    elif not unit and number <= 1:
        parsed = Budget(axis, number, True)
    elif unit in (_TIMES if is_time else _COUNTS):
        parsed = Budget(axis, number * (_TIMES if is_time else _COUNTS)[unit], False)
    if parsed is None or not 0 < parsed.value < math.inf or (parsed.is_share and parsed.value > 1):
        raise ValueError(
            f"{name} must be a share in (0, 1], such as 0.5 or '50%', or an amount "
            f"{'with a unit, ' if is_time else ''}such as {example}, got {budget!r}"
        )
    return parsed


def infeasible(axis: str, limit: float, minimum: float, dense: float) -> InfeasibleBudgetError:
    """Return the error for a budget below the cheapest choice.

    Parameters
    ----------
    axis : str
        Cost that is limited.
    limit, minimum, dense : float
        Budget, cost of the cheapest choice, and cost of the dense kernel or network.

    Returns
    -------
    InfeasibleBudgetError
    """
    shown = format_seconds if axis == "seconds" else format_count
    return InfeasibleBudgetError(
        f"{axis} budget of {shown(limit)} is infeasible: the minimum is {shown(minimum)} "
        f"({minimum / dense if dense else 1.0:.1%} of the dense cost)"
    )


def format_budget(axis: str, amount: float) -> float | str:
    """Return an amount as :func:`parse_budget` reads it, without loss of digits.

    Parameters
    ----------
    axis : str
        Cost that is limited.
    amount : float
        Amount in the units of the axis.

    Returns
    -------
    float or str
        A string with a unit for times, and for counts of at most 1, which would be shares.

    Examples
    --------
    >>> from lowrank.selection import format_budget, parse_budget
    >>> format_budget("seconds", 0.0006), format_budget("macs", 500.0)
    ('0.0006s', 500.0)
    >>> parse_budget("seconds", format_budget("seconds", 0.0006)).amount(1.0)
    0.0006
    """
    if axis == "seconds":
        return f"{float(amount)!r}s"
    return amount if amount > 1 else f"{float(amount) / 1000!r}k"
