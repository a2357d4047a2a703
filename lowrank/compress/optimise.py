"""Allocation of a budget over layers, as one exact optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank.core.streams import discard_c_stdout
from lowrank.selection.budget import infeasible
from lowrank.selection.candidates import Candidate
from lowrank.selection.pareto import pareto_front

PROVEN = 1e-5  # relative gap that counts as a proof: ten times the tolerance of the solver


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """One candidate per layer.

    Attributes
    ----------
    candidates : dict of str to Candidate
        By layer.
    loss : float
        Sum of their losses: the least within the limits.
    gap : float
        Relative optimality gap; 0 is a proof, up to the solver's tolerance of 1e-6.

    Examples
    --------
    >>> from lowrank.compress import Allocation
    >>> Allocation({}, 0.0, 0.0).gap
    0.0
    """

    candidates: dict[str, Candidate]
    loss: float
    gap: float


def allocate(options: Mapping[str, Sequence[Candidate]], limits: Mapping[str, float]) -> Allocation:
    r"""Choose one candidate per layer with the least total loss, within limits on total costs.

    Parameters
    ----------
    options : mapping of str to sequence of Candidate
        Candidates by layer, with their losses.
    limits : mapping of str to float
        Largest total cost by axis.

    Returns
    -------
    Allocation

    Raises
    ------
    InfeasibleBudgetError
        If the cheapest candidates exceed a limit; the message states the minimum.

    Notes
    -----
    The multiple-choice knapsack problem: minimise :math:`\sum_l \ell_{l,o_l}` subject to
    :math:`\sum_l c_{l,o_l} \le B` for every cost [1]_, solved by branch and bound (HiGHS [2]_) to
    proven optimality within the solver's tolerance of 1e-6.  Dominated candidates are dropped
    first.

    References
    ----------
    .. [1] H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack problems", Springer, 2004, chapter 11.
    .. [2] Q. Huangfu, J. A. J. Hall, "Parallelizing the dual revised simplex method", Mathematical
       Programming Computation 10, 2018.

    Examples
    --------
    >>> from lowrank import Cost
    >>> from lowrank.compress import allocate
    >>> from lowrank.selection import Candidate
    >>> def option(family, macs, loss):
    ...     return Candidate(family, "", (), 0.0, 0.0, Cost(macs, 0, 0, 0, 0), loss=loss)
    >>> dense, half = option("dense", 10, 0.0), option("cp", 6, 0.1)
    >>> chosen = allocate({"a": [dense, option("cp", 4, 0.3)], "b": [dense, half]}, {"macs": 16.0})
    >>> [c.family for c in chosen.candidates.values()], chosen.loss, chosen.gap
    (['dense', 'cp'], 0.1, 0.0)
    """
    axes = list(limits)
    kept = {name: _front(some, axes) for name, some in options.items()}
    for axis, limit in limits.items():
        least = math.fsum(min(c.amount(axis) for c in some) for some in kept.values())
        if least > limit * (1 + 1e-12):
            dense = math.fsum(max(c.amount(axis) for c in some) for some in options.values())
            raise infeasible(axis, limit, least, dense)
    if not kept:
        return Allocation({}, 0.0, 0.0)
    picks, bound = _solve(kept, limits, 1.0)
    if any(math.fsum(c.amount(a) for c in picks.values()) > limits[a] for a in axes):
        # The solver keeps limits to a millionth; just inside of them it keeps these.
        picks, bound = _solve(kept, limits, 1.0 - 2e-6)
    loss = math.fsum(c.loss for c in picks.values())
    gap = max(0.0, (loss - bound) / loss) if loss else 0.0
    picks = {name: picks[name] for name in options}
    return Allocation(picks, loss, gap if gap > PROVEN else 0.0)


def _front(some: Sequence[Candidate], axes: Sequence[str]) -> list[Candidate]:
    """Return the Pareto front in the losses and the limited costs."""
    some = [c for c in some if c.loss < math.inf]
    kept = pareto_front([[c.amount(a) for a in axes] for c in some], [c.loss for c in some])
    return [some[i] for i in kept]


def _solve(
    kept: Mapping[str, Sequence[Candidate]], limits: Mapping[str, float], share: float
) -> tuple[dict[str, Candidate], float]:
    """Return the optimum within a share of the limits, and a lower bound on its loss."""
    # scipy.optimize and scipy.sparse take 80 ms to import.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    best = math.inf
    while True:
        # Drop options whose loss alone exceeds the incumbent's.  The largest loss is then near the
        # optimum, and so is the unit of the solver's absolute tolerance.
        flat = [(name, c) for name, some in kept.items() for c in some if c.loss <= best]
        loss = np.array([c.loss for _, c in flat])
        row_of = {name: i for i, name in enumerate(kept)}
        rows = np.array([row_of[name] for name, _ in flat])
        one = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))))
        constraints = [LinearConstraint(one, 1, 1)]
        for axis, limit in limits.items():
            # In units of the limit, so that the solver's tolerance is relative to the budget.
            cost = np.array([[c.amount(axis) / limit for _, c in flat]])
            constraints.append(LinearConstraint(csr_array(cost), -np.inf, share))
        scale = float(loss.max()) or 1.0
        with discard_c_stdout():  # HiGHS prints debugging messages
            found = milp(
                loss / scale, integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
                constraints=constraints, options={"mip_rel_gap": 0.0, "time_limit": 60.0},
            )  # fmt: skip
        if found.x is None:
            raise ValueError(f"no allocation within {dict(limits)} was found: {found.message}")
        picks = {name: c for (name, c), x in zip(flat, found.x) if x > 0.5}
        total = math.fsum(c.loss for c in picks.values())
        if not total < 0.5 * best or scale <= total:
            return picks, float(found.mip_dual_bound) * scale
        best = total
