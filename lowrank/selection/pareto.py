"""The Pareto filter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank._typing import Array


def pareto_front(
    costs: Sequence[Sequence[float]], errors: Sequence[float], slack: float = 1.0
) -> list[int]:
    """Return the indices of the items that no other item dominates.

    Parameters
    ----------
    costs : sequence of sequence of float, shape (items, axes)
        Costs of each item.
    errors : sequence of float
        Error of each item.
    slack : float
        Factor by which the error of the other item has to be smaller: above 1, items survive
        whose error is only an estimate.

    Returns
    -------
    list of int
        Indices by increasing costs, then error.  An item is dominated by another that costs no
        more on any axis and whose error, times `slack`, is smaller; of items with the same error
        the cheapest is kept, and the first of those with the same costs.

    Examples
    --------
    >>> from lowrank.selection.pareto import pareto_front
    >>> pareto_front([[3.0], [1.0], [2.0]], [0.0, 0.5, 0.6])
    [1, 0]
    >>> pareto_front([[3.0], [1.0], [2.0]], [0.0, 0.5, 0.6], slack=1.25)
    [1, 2, 0]
    """
    table, error = np.asarray(costs, np.float64), np.asarray(errors, np.float64)
    order = sorted(range(len(error)), key=lambda i: (*table[i], error[i], i))
    kept: list[int] = []
    if table.shape[-1:] == (1,):
        # Sorted by its only cost, an item is dominated exactly if the least error so far is less,
        # or equal to one before.
        least, seen = np.inf, set()
        for i in order:
            if error[i] not in seen and (error[i] < least or slack * least >= error[i]):
                kept.append(i)
            least = min(least, error[i])
            seen.add(error[i])
        return kept
    for at, i in enumerate(order):
        others = np.array(order[:at], np.intp)  # an item later in the order costs more
        if not others.size or not _dominates(
            table[others], error[others], table[i], error[i], slack
        ):
            kept.append(i)
    return kept


def _dominates(costs: Array, errors: Array, cost: Array, error: float, slack: float) -> bool:
    """Return whether one of several items dominates an item."""
    better = (slack * errors < error) | (errors == error)
    return bool(((costs <= cost).all(axis=1) & better).any())
