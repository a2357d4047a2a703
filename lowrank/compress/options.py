"""Options of one layer: its candidates, fitted in the layer's metric, with their loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lowrank.compress.latency import Timing
from lowrank.compress.model import Layer
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, SweepPoint
from lowrank.families.weighted import MetricFit, Prepared
from lowrank.metric import Metric
from lowrank.selection.candidates import Candidate, Pricing, candidates
from lowrank.selection.front import drop_dominated
from lowrank.selection.measured import Reference, corrected
from lowrank.selection.pareto import pareto_front

#: Families that are tried by default: those whose sweeps are fast.
FAST_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.has_fast_sweep)
#: Axes of a budget for a network.
AXES = ("macs", "params", "seconds", "bytes")
TIMED = 64  # candidates per variant whose time is predicted
LANES = 8  # of the vectors that ranks fill: those of AVX2; half of those of AVX-512
FITTED = 16  # candidates per layer that are fitted in the full metric, and swept per variant
SLACK = 1.25  # factor by which the error of a closed-form start may be off
SWEEPS = 3  # alternating sweeps of a fit for comparison
HEAVY = 1e8  # MACs per conjugate-gradient step from which half as many are fitted, for one sweep


def layer_options(
    layer: Layer,
    metric: Metric,
    families: Iterable[str] = FAST_FAMILIES,
    *,
    absolute: bool = False,
    biased: bool = False,
    axes: Sequence[str] = ("macs",),
    timing: Timing = Timing(),  # noqa: B008 - immutable
    references: Sequence[Reference] = (),
    fitted: int = FITTED,
) -> list[Candidate]:
    """Return the Pareto-optimal candidates for a layer of a network.

    Parameters
    ----------
    layer : Layer
        Layer of a network.
    metric : Metric
        Second moments of its inputs and, where they are known, of its output gradients.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES`.
    absolute : bool
        Whether the metric weights outputs by gradients of one loss, so that the losses of layers
        are in one unit.
    biased : bool
        Whether a chain gets a bias where the layer has none.
    axes : sequence of str
        Costs that count, of :data:`AXES`.
    timing : Timing
        Call that seconds are predicted for.
    references : sequence of Reference
        Measured candidates for a layer of this shape, which correct predicted seconds.
    fitted : int
        Number of candidates that are fitted in the full metric, about.

    Returns
    -------
    list of Candidate
        The dense layer first, then by the first of the costs.  Costs are per example of the
        network, seconds per call; errors are relative in the metric; :meth:`Candidate.build`
        returns the fit.

    Notes
    -----
    If `absolute`, the loss is half of :math:`\\operatorname{tr}(G E C E^\\top)`, an estimate of the
    increase of the network's own loss, in its units, so that layers add up.  Otherwise it is the
    squared relative error of the layer's output.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.compress import Layer, layer_options
    >>> from lowrank.metric import white
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 8, 3, 3)))
    >>> layer = Layer("conv", conv, (16, 16))
    >>> options = layer_options(layer, white(1, (8, 3, 3)), ["spatial_svd"])
    >>> options[0].name, options[0].loss, options[-1].cost.macs < options[0].cost.macs
    ('dense', 0.0, True)
    """
    conv = layer.conv
    # Chains fitted to data get a bias, which makes up for means.
    pricing = Pricing(
        conv, layer.input_size, *timing, times=layer.passes,
        has_bias=conv.bias is not None or biased, in_network=True,
    )  # fmt: skip

    def timed(c: Candidate) -> Candidate:
        return corrected(pricing.time(c), references)

    dense = timed(replace(pricing.dense, loss=0.0))
    by_time = "seconds" in axes
    first = "macs" if by_time else axes[0]
    swept: list[Candidate] = []
    for group in candidates(pricing, families, metric):
        cheaper = [c for c in group if c.amount(first) < dense.amount(first)]
        if layer.accepts is not None:
            cheaper = [c for c in cheaper if layer.accepts(c.stages)]
        if by_time:  # ranks that fill vectors are on the front of seconds only
            priced = [timed(c) for c in _worth_timing(cheaper)]
            faster = _front([c for c in priced if not c.is_slower(dense)], axes)
            swept += _thin(faster, "seconds", fitted)
        else:
            swept += _thin(_front(cheaper, [first]), first, fitted)
    if not by_time:
        swept = [timed(c) for c in swept]
    heavy = _is_heavy(conv, metric)
    swept = _thin(_front(swept, axes, SLACK), axes[0], fitted // 2 if heavy else fitted)
    fit = MetricFit(conv, metric)
    scale = fit.energy / 2 * layer.times * metric.unit if absolute else 1.0
    options = [dense]
    shared: dict[str, Prepared] = {}
    for c in swept:
        start = _start(c.point)
        if c.name not in shared:
            shared = {c.name: fit.prepare(start)}  # one variant at a time: they are large
        stages, error = _fit_briefly(fit, start, shared[c.name])
        options.append(replace(c.with_stages(stages, error=error), loss=scale * error**2))
    return options


def fit_option(layer: Layer, metric: Metric, candidate: Candidate) -> Sequence[Stage]:
    """Repeat the fit of an option: for a plan from a file, which holds no weights.

    Parameters
    ----------
    layer : Layer
        Layer of a network.
    metric : Metric
        Metric that the options were fitted in.
    candidate : Candidate
        Family, variant and rank.

    Returns
    -------
    tuple of Stage
        The same bits as the option had; a closed-form fit for a rank that no sweep has.

    Raises
    ------
    ValueError
        If the family, variant or rank is not possible for the layer.
    """
    conv, variant, rank = layer.conv, candidate.variant, candidate.rank
    if candidate.family not in FAMILIES:
        raise ValueError(
            f"family of {layer.name} must be one of {', '.join(FAMILIES)}, got {candidate.family!r}"
        )
    family = FAMILIES[candidate.family]
    if variant in family.variants(conv):
        for point in family.sweep(conv, variant, metric):
            if point.rank == rank:
                fit, start = MetricFit(conv, metric), _start(point)
                return _fit_briefly(fit, start, fit.prepare(start))[0]
    return family.fit(conv, rank, variant, metric, refine=False).stages


def _start(point: SweepPoint) -> tuple[Stage, ...]:
    """Return the closed-form start of a point of a sweep in a metric."""
    assert point.start is not None
    return point.start()


def _fit_briefly(
    fit: MetricFit, start: tuple[Stage, ...], prepared: Prepared
) -> tuple[tuple[Stage, ...], float]:
    """Fit a chain well enough to compare it, and return its relative error."""
    sweeps = 1 if _is_heavy(fit.conv, fit.metric) else SWEEPS
    return fit.refine(start, sweeps, dtype=np.float32, prepared=prepared)


def _is_heavy(conv: Factorization, metric: Metric) -> bool:
    """Return whether a step of a fit takes so long that fewer options are fitted."""
    n = metric.channel_factor.shape[1] * math.prod(len(t) for t in metric.tap_factors)
    return bool(conv.stages[0].weight.size * n > HEAVY)


def _worth_timing(group: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of a variant whose time is worth predicting.

    Of many, those spread over the MACs: the most accurate ones, and the most accurate ones whose
    ranks fill vectors, which cost the same time as the ranks below them.
    """
    kept = drop_dominated(group)
    if len(kept) <= TIMED:
        return kept
    kept.sort(key=lambda c: c.cost.macs)
    full = [c for c in kept if all(r % LANES == 0 for r in c.rank)]
    spread = [*_thin(kept, "macs", TIMED // 2), *_thin(full, "macs", TIMED // 2)]
    return list({c.rank: c for c in spread}.values())


def _front(found: Sequence[Candidate], axes: Sequence[str], slack: float = 1.0) -> list[Candidate]:
    """Return the Pareto front on all costs and the error, by the first cost, then the error."""
    if not found:
        return []
    costs = [[c.amount(a) for a in axes] for c in found]
    kept = [found[i] for i in pareto_front(costs, [c.error for c in found], slack)]
    return sorted(kept, key=lambda c: (c.amount(axes[0]), c.error))


def _thin(found: Sequence[Candidate], axis: str, most: int) -> list[Candidate]:
    """Return about `most` candidates, evenly spread in the logarithm of a cost.

    Of candidates close to one another the most accurate is kept, and the cheapest of all: budgets
    have to reach it.
    """
    if len(found) <= most:
        return list(found)
    logs = np.log([c.amount(axis) for c in found])
    bins = np.minimum(((logs - logs[0]) / (logs[-1] - logs[0] or 1.0) * most).astype(int), most - 1)
    best: dict[int, Candidate] = {}
    for at, c in zip(bins, found):
        if at not in best or c.error < best[at].error:
            best[int(at)] = c
    kept = list(best.values())
    return kept if kept[0] is found[0] else [found[0], *kept]
