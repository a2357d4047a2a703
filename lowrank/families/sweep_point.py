"""One rank of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lowrank._typing import Ints
from lowrank.core.stage import Stage


class SweepPoint(NamedTuple):
    """One rank of a sweep, with its error and its shapes but without its weights.

    Attributes
    ----------
    rank : tuple of int
        Rank, or ranks in the order that the family documents.
    error : float
        Relative error of the weights that `build` makes; for a family that is not exact, of a
        start that `build` refines.
    bound : float
        Lower bound on the error of any chain of this family, variant and rank.
    stages : tuple of Stage
        The chain with abstract weights (shapes only), from which it is priced.
    build : callable
        Makes the stages with their weights.
    start : callable, optional
        Makes the stages before any refinement in a metric; None if that is what `build` does.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 4, 3, 3)))
    >>> point = next(lowrank.FAMILIES["spatial_svd"].sweep(conv, "h-w"))
    >>> [s.weight.shape for s in point.build()]
    [(1, 4, 3, 1), (8, 1, 1, 3)]
    """

    rank: Ints
    error: float
    bound: float
    stages: tuple[Stage, ...]
    build: Callable[[], tuple[Stage, ...]]
    start: Callable[[], tuple[Stage, ...]] | None = None
