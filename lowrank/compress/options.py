"""What each layer could become: families, variants and ranks, with their error in the metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lowrank import perfmodel
from lowrank._typing import Ints
from lowrank.compress.model import Layer
from lowrank.core.cost import chain_cost
from lowrank.core.stage import Stage
from lowrank.families import FAMILIES, NotApplicable, SweepPoint
from lowrank.families.weighted import MetricFit, Prepared
from lowrank.metric import Metric

#: Families that are tried unless others are named: those that sweeps make quickly.
QUICK = (
    "channel_svd",
    "channel_svd",
    "spatial_svd",
    "filter_basis",
    "network_decoupling",
    "tucker",
    "tensor_train",
)
#: What a budget can be in.
AXES = ("macs", "params", "seconds", "bytes")
POINTS = 16  # of a form, that are looked at more closely
KEPT = 16  # of a layer, that are fitted in the full metric
SLACK = 1.25  # the error that roots say may be so far off
SWEEPS = 3  # of a fit for comparison
HEAVY = 1e8  # multiply-adds of a step, from which on half as many are fitted, for one sweep


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to write a layer.

    Attributes
    ----------
    family, variant, rank : str, str, tuple of int
        What it is; ``"dense"`` for the layer as it came.
    loss : float
        What it does to the network, in the units of the whole plan; see :func:`options`.
    error : float
        Relative, in the layer's metric.
    costs : dict of str to float
        Of one example through the network: ``"macs"``, ``"params"``, ``"bytes"`` of weights, and
        ``"seconds"`` where times were asked for.
    stages : tuple of Stage
        Fitted; of the dense option the layer's own.
    """

    family: str
    variant: str
    rank: Ints
    loss: float
    error: float
    costs: dict[str, float]
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """Family and variant."""
        return " ".join(filter(None, (self.family, self.variant)))


def options(
    layer: Layer,
    metric: Metric,
    families: Iterable[str] = QUICK,
    *,
    absolute: bool = False,
    biased: bool = False,
    axes: Sequence[str] = ("macs",),
    timed: Callable[[Sequence[Stage]], float] | None = None,
) -> list[Option]:
    """The layer as it came, and what beats it and one another on error and costs.

    Parameters
    ----------
    layer : Layer
        Of a network.
    metric : Metric
        Of its inputs; of its outputs, where gradients are known.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES`.
    absolute : bool
        Whether the metric weighs outputs by gradients of one loss, so that errors of layers are in
        one unit.
    biased : bool
        Whether a chain gets a bias where the layer has none.
    axes : sequence of str
        Costs that count.
    timed : callable, optional
        Predicted seconds of stages; needed where seconds count.

    Returns
    -------
    list of Option
        The dense one first, then by the first of the costs.

    Notes
    -----
    Where it is absolute the loss is half of :math:`\\operatorname{tr}(G E C E^\\top)`: an estimate
    of what the network's own loss, in its units, rises by, so that layers add up.  Else it is the
    squared relative error of the layer's output.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import white
    >>> from lowrank.compress import Layer, options
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 8, 3, 3)))
    >>> found = options(Layer("conv", conv, (16, 16)), white(1, (8, 3, 3)), ["spatial_svd"])
    >>> found[0].name, found[0].loss, found[-1].costs["macs"] < found[0].costs["macs"]
    ('dense', 0.0, True)
    """
    conv = layer.conv
    shape = conv.input_shape(layer.input_size)

    def costs(stages: Sequence[Stage]) -> dict[str, float]:
        # Chains that are fitted to data get a bias that makes up for means.
        cost = chain_cost(stages, shape, conv.bias is not None or (biased and len(stages) > 1))
        size = conv.dtype.itemsize
        return {
            "macs": float(cost.macs * layer.times),
            "params": float(cost.params),
            "bytes": float(cost.params * size),
        }

    dense = Option("dense", "", (), 0.0, 0.0, costs(conv.stages), conv.stages)
    found: list[Found] = []
    fit = MetricFit(conv, metric)
    first = next((a for a in axes if a != "seconds"), "macs")
    for name in families:
        try:
            variants = FAMILIES[name].variants(conv)
        except NotApplicable:
            continue
        for variant in variants:
            sweep = FAMILIES[name].sweep(conv, variant, metric)
            points = [((name, variant), p, costs(p.stages)) for p in sweep]
            points = [p for p in points if p[2][first] < dense.costs[first]]
            found += _thinned(_front(points, [first]), first, POINTS)
    if timed is not None:
        dense.costs["seconds"] = timed(conv.stages) * layer.times
        for _, point, price in found:
            price["seconds"] = timed(point.stages) * layer.times
    found = [f for f in found if any(f[2][a] < dense.costs[a] for a in axes)]
    n = metric.channel_factor.shape[1] * math.prod(len(t) for t in metric.tap_factors)
    heavy = conv.stages[0].weight.size * n > HEAVY
    found = _thinned(_front(found, axes, SLACK), axes[0], KEPT // 2 if heavy else KEPT)
    whole = fit.energy
    scale = whole / 2 * layer.times * metric.unit if absolute else 1.0
    fitted = [dense]
    shared: dict[str, Prepared] = {}
    for (name, variant), point, price in found:
        assert point.start is not None
        start = point.start()
        key = f"{name} {variant}"
        if key not in shared:
            shared = {key: fit.prepare(start)}  # of one form at a time: they are large
        stages, error = fit.refine(
            start, 1 if heavy else SWEEPS, dtype=np.float32, prepared=shared[key]
        )
        fitted.append(
            Option(
                name,
                variant,
                point.rank,
                scale * error**2,
                error,
                price,
                stages,
            )
        )
    return fitted


Found = tuple[tuple[str, str], SweepPoint, dict[str, float]]


def _front(found: Sequence[Found], axes: Sequence[str], slack: float = 1.0) -> list[Found]:
    """What nothing beats on all costs and, by more than the slack, on the error."""
    if not found:
        return []
    price = np.array([[f[2][a] for a in axes] for f in found])
    error = np.array([f[1].error for f in found])
    kept = []
    for i, f in enumerate(found):
        cheaper = (price <= price[i]).all(axis=1)
        better = error * slack < error[i]
        same = (price == price[i]).all(axis=1) & (error == error[i])
        same[i:] = False
        if not (cheaper & better).any() and not same.any():
            kept.append(f)
    return sorted(kept, key=lambda f: (f[2][axes[0]], f[1].error))


def _thinned(found: Sequence[Found], axis: str, most: int) -> list[Found]:
    """About so many, evenly spread in the logarithm of a cost; of those near one another the ones
    with the least error, and the cheapest of all: budgets have to reach it."""
    if len(found) <= most:
        return list(found)
    logs = np.log([f[2][axis] for f in found])
    place = np.minimum(
        ((logs - logs[0]) / (logs[-1] - logs[0] or 1.0) * most).astype(int), most - 1
    )
    best: dict[int, Found] = {}
    for at, f in zip(place, found):
        if at not in best or f[1].error < best[at][1].error:
            best[int(at)] = f
    kept = list(best.values())
    return kept if kept[0] is found[0] else [found[0], *kept]


def timing(
    layer: Layer, batch: int = 1, threads: int | None = None, runtime: str = "lowrank"
) -> Callable[[Sequence[Stage]], float]:
    """Predicted seconds of stages in the place of a layer, an example.

    Parameters
    ----------
    layer : Layer
        Whose input they get.
    batch : int
        Examples at a time.
    threads : int, optional
        All that OpenMP offers if not given.
    runtime : str
        As for :func:`lowrank.perfmodel.predict`.

    Returns
    -------
    callable

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.compress import Layer
    >>> from lowrank.compress.options import timing
    >>> layer = Layer("conv", lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16))
    >>> timing(layer)(layer.conv.stages) > 0
    True
    """
    here = perfmodel.current()
    shape = layer.conv.input_shape(layer.input_size)

    def timed(stages: Sequence[Stage]) -> float:
        return here.of_stages(stages, shape, batch, threads, runtime).seconds / batch

    return partial(timed)


def total(options: Iterable[Option], axis: str) -> float:
    """What options cost together.

    Parameters
    ----------
    options : iterable of Option
    axis : str
        One of :data:`AXES`.

    Returns
    -------
    float
    """
    return math.fsum(o.costs[axis] for o in options)
