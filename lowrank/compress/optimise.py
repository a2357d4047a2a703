"""A budget spent over layers: one exact optimisation, not layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lowrank.compress.options import Option

PROVEN = 1e-5  # relative: the solver's tolerance, ten times


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """An option for every layer.

    Attributes
    ----------
    options : dict of str to Option
        By layer.
    loss : float
        Of all of them: the least within the limits.
    gap : float
        How far below it, relatively, the solver could not exclude a better one: 0 is a proof, to
        the solver's tolerance of 1e-6.

    Examples
    --------
    >>> from lowrank.compress import Choice
    >>> Choice({}, 0.0, 0.0).gap
    0.0
    """

    options: dict[str, Option]
    loss: float
    gap: float


def spend(options: Mapping[str, Sequence[Option]], limits: Mapping[str, float]) -> Choice:
    r"""Choose an option a layer, of the least loss together, within limits on costs.

    Parameters
    ----------
    options : mapping of str to sequence of Option
        By layer.
    limits : mapping of str to float
        The most that all layers may cost together, by axis.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        If the cheapest options are over a limit; the message says what is possible.

    Notes
    -----
    The multiple-choice knapsack: minimise :math:`\sum_l \ell_{l,o_l}` with
    :math:`\sum_l c_{l,o_l} \le B` for every cost, solved by branch and bound (HiGHS) to proven
    optimality over the options given, as far as its tolerance of 1e-6 goes.  Options that another
    of the same layer beats on all counts are dropped first.

    References
    ----------
    .. [1] H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack problems", Springer, 2004, chapter 11.
    .. [2] Q. Huangfu, J. A. J. Hall, "Parallelizing the dual revised simplex method", Mathematical
       Programming Computation 10, 2018.

    Examples
    --------
    >>> from lowrank.compress import Option, spend
    >>> dense = Option("dense", "", (), 0.0, 0.0, {"macs": 10.0}, ())
    >>> thin = Option("channel_svd", "", (1,), 0.3, 0.5, {"macs": 4.0}, ())
    >>> thinner = Option("channel_svd", "", (1,), 0.1, 0.3, {"macs": 6.0}, ())
    >>> found = spend({"a": [dense, thin], "b": [dense, thinner]}, {"macs": 16.0})
    >>> [o.family for o in found.options.values()], found.loss, found.gap
    (['dense', 'channel_svd'], 0.1, 0.0)
    """
    axes = list(limits)
    kept = {name: _undominated(some, axes) for name, some in options.items()}
    for axis, limit in limits.items():
        least = math.fsum(min(o.costs[axis] for o in some) for some in kept.values())
        if least > limit * (1 + 1e-12):
            raise ValueError(
                f"{axis}: no more than {limit:.6g} is asked for, and the cheapest options take "
                f"{least:.6g} together"
            )
    if not kept:
        return Choice({}, 0.0, 0.0)
    picks, bound = _solved(kept, limits, 1.0)
    if any(math.fsum(o.costs[a] for o in picks.values()) > limits[a] for a in axes):
        # The solver keeps limits to a millionth: just inside of them it keeps these.
        picks, bound = _solved(kept, limits, 1.0 - 2e-6)
    loss = math.fsum(o.loss for o in picks.values())
    gap = max(0.0, (loss - bound) / loss) if loss else 0.0
    return Choice({name: picks[name] for name in options}, loss, gap if gap > PROVEN else 0.0)


def _solved(
    kept: Mapping[str, Sequence[Option]], limits: Mapping[str, float], share: float
) -> tuple[dict[str, Option], float]:
    """The best choice within a share of the limits, and a bound that none is below."""
    best = math.inf
    while True:
        # What alone loses more than a whole choice is in none that is better; without it the
        # largest loss is near to the best one, which the solver's absolute tolerance is of.
        flat = [(name, o) for name, some in kept.items() for o in some if o.loss <= best]
        loss = np.array([o.loss for _, o in flat])
        place = {name: i for i, name in enumerate(kept)}
        rows = np.array([place[name] for name, _ in flat])
        one = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))))
        constraints = [LinearConstraint(one, 1, 1)]
        for axis, limit in limits.items():
            # In units of the limit, so that the solver's tolerance is one of the budget.
            cost = np.array([[o.costs[axis] / limit for _, o in flat]])
            constraints.append(LinearConstraint(csr_array(cost), -np.inf, share))
        scale = float(loss.max()) or 1.0
        found = milp(
            loss / scale, integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        )  # fmt: skip
        if found.x is None:
            raise ValueError(f"no choice within {dict(limits)} was found: {found.message}")
        picks = {name: o for (name, o), x in zip(flat, found.x) if x > 0.5}
        total = math.fsum(o.loss for o in picks.values())
        if not total < 0.5 * best or scale <= total:
            return picks, float(found.mip_dual_bound) * scale
        best = total


def _undominated(some: Sequence[Option], axes: Sequence[str]) -> list[Option]:
    kept: list[Option] = []
    some = [o for o in some if o.loss < math.inf]
    for o in sorted(some, key=lambda o: (o.loss, *(o.costs[a] for a in axes))):
        if not any(all(k.costs[a] <= o.costs[a] for a in axes) for k in kept):
            kept.append(o)
    return kept
