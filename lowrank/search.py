"""The choice: every candidate of every family, and the ones that nothing beats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final, overload

import numpy as np

from lowrank import report
from lowrank._typing import Ints
from lowrank.cost import AXES, Cost, chain_cost
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable, Point
from lowrank.families.family import kernel_of

NEAR = 1.25  # a short fit within this factor of the limit may be within it once refined
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to write a convolution: what it costs and how far off it is, before it is built.

    Attributes
    ----------
    family, form, rank : str, str, tuple of int
        What it is; ``FAMILIES[family].fit(conv, rank, form)`` fits the same anew.
    error : float
        Relative Frobenius error.  For the families fitted by iteration (`exact` is False) that
        of the sweep's short fit; what :meth:`build` returns is refined and not worse.
    bound : float
        No chain of this family, form and rank has a smaller error.
    cost : Cost
        For one example of the frontier's input shape.
    exact : bool
        Whether error equals bound by theory: one SVD, or the dense kernel itself.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial"])
    >>> front[0].name, front[0].rank, front[0].shapes
    ('spatial h-w', (1,), ((1, 8, 3, 1), (8, 1, 1, 3)))
    """

    family: str
    form: str
    rank: Ints
    error: float
    bound: float
    cost: Cost
    exact: bool
    _conv: Factorization
    _point: Point | None

    def build(self) -> Factorization:
        """Make the weights; what was fitted by a short iteration is refined.

        Returns
        -------
        Factorization

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial"])
        >>> front[0].build()
        <Factorization spatial h-w rank 1: 1x8x3x1 -> 8x1x1x3, 48 params>
        """
        if self._point is None:
            return self._conv
        return replace(
            self._conv,
            stages=self._point.build(),
            family=self.family,
            form=self.form,
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

    @property
    def name(self) -> str:
        """Family and form."""
        return " ".join(filter(None, (self.family, self.form)))

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
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial"])
        >>> front[0].as_dict()["stages"]
        [[1, 8, 3, 1], [8, 1, 1, 3]]
        """
        return {
            "family": self.family,
            "form": self.form,
            "rank": list(self.rank),
            "error": self.error,
            "bound": self.bound,
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
        The cost that was compared, a field of :class:`lowrank.Cost`.
    input_shape : tuple of int
        (channels, \\*spatial) that the costs are for.
    left_out : dict
        Families that do not apply to the convolution, and why.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial"])
    >>> print(front)
    2 candidates, by macs, input of 8 channels x 16x16
    family       rank   error   bound   macs   fewer  params  traffic  fused
    spatial h-w     1  0.0000  0.0000  10.1k  11.20x      48    4.11k  3.66k
    dense           -  0.0000  0.0000   113k   1.00x     576    4.19k  4.19k
    """

    __slots__ = ("_candidates", "axis", "input_shape", "left_out")

    def __init__(
        self,
        candidates: Iterable[Candidate],
        axis: str,
        input_shape: Ints,
        left_out: dict[str, str],
    ) -> None:
        self._candidates = tuple(candidates)
        self.axis, self.input_shape, self.left_out = axis, input_shape, dict(left_out)

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
            In the units of the axis: multiply-adds, parameters, or elements.

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
        >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16))
        >>> front.affordable(50_000).cost.macs <= 50_000
        True
        """
        found = [c for c in self if getattr(c.cost, self.axis) <= amount]
        if not found:
            least = getattr(self[0].cost, self.axis)
            whole = getattr(self.dense.cost, self.axis)
            raise ValueError(
                f"nothing costs at most {amount:.6g} {self.axis}; the cheapest is {least} "
                f"({least / whole:.3g} of the dense kernel), {self[0].name} rank "
                f"{self[0].rank}"
            )
        return found[-1]

    def __repr__(self) -> str:
        return report.table(self)


def frontier(
    conv: Factorization,
    input_shape: Sequence[int],
    families: Iterable[str] | None = None,
    *,
    axis: str = "macs",
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
        What is compared: ``"macs"``, ``"params"``, ``"traffic"``, ``"fused"`` or ``"peak"``.
    progress : callable, optional
        Called with each family's name before its turn.

    Returns
    -------
    Frontier
        Candidates, cheapest first, ending with the dense kernel; none costs more than it.

    Raises
    ------
    ValueError
        If a family or axis is unknown, or the input shape does not fit.

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
    >>> [(c.name, c.rank, c.cost.macs) for c in lowrank.frontier(blur, (32, 32))]
    [('spatial h-w', (1,), 10556), ('dense', (), 33124)]
    """
    names = _names(families)
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
    kernel_of(conv)
    shape = conv.shape(input_shape)
    whole = conv.cost(shape)
    bias = conv.bias is not None
    found = [Candidate("dense", "", (), 0.0, 0.0, whole, True, conv, None)]
    left_out = {}
    for name in names:
        family = FAMILIES[name]
        if progress is not None:
            progress(name)
        try:
            forms = family.forms(conv)
        except NotApplicable as why:
            left_out[name] = str(why)
            continue
        for form in forms:
            for point in family.sweep(conv, form):
                cost = chain_cost(point.stages, shape, bias)
                if getattr(cost, axis) < getattr(whole, axis):
                    found.append(
                        Candidate(
                            name,
                            form,
                            point.rank,
                            point.error,
                            point.bound,
                            cost,
                            family.exact,
                            conv,
                            point,
                        )
                    )
    # Rounding must not decide: an error of 1e-16 and one of 3e-17 are both nothing.
    exact = float(np.finfo(float).eps) * math.sqrt(conv.stages[0].weight.size)

    def error(c: Candidate) -> float:
        return c.error if c.error > exact else 0.0

    found.sort(key=lambda c: (getattr(c.cost, axis), error(c), len(c.shapes)))
    kept: list[Candidate] = []
    for c in found:
        if not kept or error(c) < error(kept[-1]) or c.family == "dense":
            kept.append(c)
    return Frontier(kept, axis, shape, left_out)


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
    macs: float | int | str | None = None,
    params: float | int | str | None = None,
    families: Iterable[str] | None = None,
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
    macs, params : float or str, optional
        Budget.  A number in (0, 1] is a share of the dense cost; an amount has a unit:
        ``"20M"`` or ``"300k"``; a whole number above 1 is an amount too.
    families : iterable of str, optional
        Names from :data:`lowrank.FAMILIES`; all of them if not given.

    Returns
    -------
    Factorization
        The pick, built; those found by iteration are refined, and those whose short fit is near
        `max_error` tried.  The dense kernel itself if nothing cheaper is within `max_error`.

    Raises
    ------
    TypeError
        If not exactly one of `max_error`, `rank`, `macs` and `params` is given.
    ValueError
        If it is impossible; the message says what is possible.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)), padding=1)
    >>> f = lowrank.approximate(conv, (16, 16), macs=0.5, families=["spatial"])
    >>> f.rank, f.cost((16, 16)).macs / conv.cost((16, 16)).macs
    ((12,), 0.5)
    """
    if rank is not None and (max_error, macs, params) == (None, None, None):
        return _at_rank(conv, input_shape, rank, _names(families)).build()
    return choose(
        conv,
        input_shape,
        max_error=max_error,
        rank=rank,
        macs=macs,
        params=params,
        families=families,
    )[1].build()


def choose(
    conv: Factorization,
    input_shape: Sequence[int],
    *,
    max_error: float | None = None,
    rank: int | Sequence[int] | None = None,
    macs: float | int | str | None = None,
    params: float | int | str | None = None,
    families: Iterable[str] | None = None,
    axis: str | None = None,
    progress: Callable[[str], object] | None = None,
) -> tuple[Frontier, Candidate]:
    """The frontier and the pick of :func:`approximate`, not yet built."""
    kernel_of(conv)
    wanted = {"max_error": max_error, "rank": rank, "macs": macs, "params": params}
    given = [k for k, v in wanted.items() if v is not None]
    if len(given) != 1:
        raise TypeError(
            "give exactly one of max_error, rank, macs and params, got "
            + (", ".join(given) or "none")
        )
    if max_error is not None:
        _check_error(max_error)
    if axis is None:
        axis = "params" if params is not None else "macs"
    elif (macs is not None and axis != "macs") or (params is not None and axis != "params"):
        raise ValueError(f"a budget is compared on its own axis, {given[0]}, not on {axis!r}")
    budget = macs if macs is not None else params
    # Before the work: a wrong amount should not take a minute to refuse.
    amount = None
    if budget is not None:
        amount = _amount(axis, budget, getattr(conv.cost(input_shape), axis))
    names = _names(families)
    found = frontier(conv, input_shape, names, axis=axis, progress=progress)
    if max_error is not None:
        return found, _refined_within(found, max_error)
    if amount is not None:
        return found, found.affordable(amount)
    return found, _at_rank(conv, input_shape, rank, names, axis)


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
    conv: Factorization, input_shape: Sequence[int], rank: Any, names: list[str], axis: str = "macs"
) -> Candidate:
    """The best candidate of exactly this rank, fitted directly, whether on the front or not."""
    kernel_of(conv)
    shape = conv.shape(input_shape)
    tried, why = [], []
    for name in names:
        try:
            forms = FAMILIES[name].forms(conv)
        except NotApplicable as reason:
            why.append(str(reason))
            continue
        for form in forms:
            try:
                f = FAMILIES[name].fit(conv, rank, form)
            except (ValueError, TypeError) as reason:
                why.append(f"{name}: {reason}")
                continue
            exact, stages = FAMILIES[name].exact, f.stages
            error, bound = f.error(conv.to_dense()), FAMILIES[name].bound(conv, f.rank, form)
            point = Point(f.rank, error, min(bound, error), stages, lambda s=stages: s)  # type: ignore[misc]
            tried.append(
                Candidate(name, form, f.rank, error, point.bound, f.cost(shape), exact, conv, point)
            )
    if not tried:
        raise ValueError(f"no family takes rank {rank!r}: " + "; ".join(dict.fromkeys(why)))
    whole = getattr(conv.cost(shape), axis)
    cheaper = [c for c in tried if getattr(c.cost, axis) < whole]
    if not cheaper:
        least = min(tried, key=lambda c: float(getattr(c.cost, axis)))
        raise ValueError(
            f"nothing of rank {rank!r} saves {axis}: {least.name} takes "
            f"{getattr(least.cost, axis)}, the dense kernel {whole}; ask for a lower rank"
        )
    return min(cheaper, key=lambda c: (c.error, c.cost.macs))


def _check_error(value: float) -> None:
    if not isinstance(value, int | float | np.number) or not value >= 0:
        raise ValueError(f"max_error must be a number, at least 0, got {value!r}")


def _amount(axis: str, budget: float | int | str, whole: int) -> float:
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
