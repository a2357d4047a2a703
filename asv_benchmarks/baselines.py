"""Compression methods of others, without training, as baselines by name and reference.

All get the calibration images of ours, and chains that take more MACs than the dense layer are left
out.  The first convolution stays dense, and so do layers that a family does not apply to; BALF,
like its authors' code, may change every layer.
"""

from __future__ import annotations

import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lowrank.compress import Layer, LayerStatistics, compress_model, make_plan
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable
from lowrank.families.weighted import MetricFit
from lowrank.metric import Metric, Moments
from lowrank.selection import ranks
from lowrank.selection.budget import infeasible
from lowrank.selection.candidates import Pricing, candidates

BISECTIONS = 100  # halves of the interval of multipliers; 53 exhaust float64
TUCKER_SWEEPS = 100  # largest number, as in the code of arXiv 2511.04494
TUCKER_TOLERANCE = 1e-5  # relative decrease of the squared error; theirs is 1e-6 of the error

Chains = Mapping[str, Factorization]


class Setting:
    """A network with calibration images, and the statistics that several methods share.

    Parameters
    ----------
    net : CompressibleModel
        Trained network with calibration batches.
    seed : int
        Seed of every random choice.
    """

    def __init__(self, net: Any, seed: int) -> None:
        self.net, self.seed = net, seed

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Statistics that our own methods use."""
        return LayerStatistics(self.net, seed=self.seed)

    @cached_property
    def input_metrics(self) -> dict[str, Metric]:
        """Second moments of the original inputs by layer: not centred, outputs of equal weight."""
        moments = {
            x.name: Moments(x.conv, seed=zlib.crc32(x.name.encode()) ^ self.seed)
            for x in self.net.layers
        }
        for batch in self.net.inputs(list(moments), {}):
            for name, found in moments.items():
                for x in batch[name]:
                    found.add(x)
        return {name: found.metric() for name, found in moments.items()}


class Method(NamedTuple):
    """A way to compress a network, with the values of its parameter to try.

    Attributes
    ----------
    name : str
        Name in tables.
    reference : str
        Publication.
    parameter : str
        Name of the parameter.
    values : tuple of float
        Values of the parameter.
    fit : callable
        ``fit(setting, value)`` returns the chains by layer; ValueError if it cannot.
    uses_data : bool
        Whether chains depend on the calibration images.
    """

    name: str
    reference: str
    parameter: str
    values: tuple[float, ...]
    fit: Callable[[Setting, float], Chains]
    uses_data: bool = True


def baselines(shares: Sequence[float], relaxations: Sequence[float]) -> list[Method]:
    """Return the baselines, at shares of the MACs and relaxations of EVBMF's ranks.

    Parameters
    ----------
    shares : sequence of float
        Shares of the MACs: per layer for uniform methods, in total for BALF.
    relaxations : sequence of float
        See :func:`lowrank.selection.ranks.relaxed_evbmf`; 1 is EVBMF itself.

    Returns
    -------
    list of Method
    """
    share = tuple(shares)
    return [
        Method(
            UNIFORM, "Jaderberg et al. 2014, Tai et al. 2016; fitted on data", "share",
            share, uniform_spatial_svd,
        ),
        Method("BALF", "arXiv 2509.25136", "share", share, balf),
        Method(
            "Tucker-2, second moment", "arXiv 2511.04494", "share", share, second_moment_tucker
        ),
        Method(
            "EVBMF Tucker", "Kim et al. 2016", "relaxation", tuple(relaxations), evbmf_tucker,
            False,
        ),
    ]  # fmt: skip


UNIFORM = "uniform spatial SVD"


def uniform_spatial_svd(setting: Setting, share: float) -> Chains:
    """Return spatial SVDs at one share of each layer's MACs, fitted layer by layer on data.

    Fits are those of this project: in the second moments of the inputs that the compressed network
    gives, outputs weighted by gradients, with a corrected bias.
    """
    net = setting.net
    plan = make_plan(net, macs=1.0, pinned=["*"], seed=setting.seed)
    chosen = {}
    for layer, rank in _uniform_ranks(net.layers, "spatial_svd", share):
        variant = FAMILIES["spatial_svd"].variants(layer.conv)[0]
        dense = plan.dense[layer.name]
        chosen[layer.name] = replace(
            dense, family="spatial_svd", variant=variant, rank=rank, loss=0.0
        )
    return compress_model(net, replace(plan, layers=plan.layers | chosen)).chains


def balf(setting: Setting, share: float) -> Chains:
    """Return whitened channel SVDs with ranks by Lagrangian relaxation, within a share of the MACs.

    The closed form in the second moment of the original inputs, for all layers at once.  The energy
    of a rank is the share of the squared singular values that it keeps, the same weight for every
    layer; the allocation maximises their sum.  The authors' whitening drops directions without
    samples, this one damps them.
    """
    layers, options = setting.net.layers, []
    for layer in layers:
        pricing = Pricing(layer.conv, layer.input_size, times=layer.times)
        metric, dense = setting.input_metrics[layer.name], pricing.dense
        variants = candidates(pricing, ["channel_svd"], metric)
        swept = next((some for some in variants if some[0].variant == "output"), [])
        cheaper = [c for c in swept if c.cost.macs < dense.cost.macs]
        options.append([*sorted(cheaper, key=lambda c: c.cost.macs), dense])
    costs = [np.array([float(c.cost.macs) for c in some]) for some in options]
    energies = [np.array([1 - c.error**2 for c in some]) for some in options]
    limit = share * sum(float(c[-1]) for c in costs)
    chains = {}
    for layer, some, i in zip(layers, options, lagrangian(energies, costs, limit)):
        if not some[i].is_dense:
            chains[layer.name] = FAMILIES["channel_svd"].fit(
                layer.conv, some[i].rank, "output", setting.input_metrics[layer.name], refine=False
            )
    return chains


def lagrangian(
    values: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float
) -> list[int]:
    """Choose one option per group by Lagrangian relaxation: most value within a total cost.

    Every group takes the option with the largest ``value - multiplier * cost``, the cheapest of
    equals; the multiplier is the least one, by bisection, at which the total cost is within
    `limit`.  The choice may stay below the optimum, by one option's value at most.

    Parameters
    ----------
    values, costs : sequence of ndarray
        Values and costs of the options per group, by ascending cost.
    limit : float
        Largest total cost.

    Returns
    -------
    list of int
        Index of the option per group.

    Raises
    ------
    InfeasibleBudgetError
        If the cheapest options exceed the limit.
    """
    least, most = (sum(float(c[i]) for c in costs) for i in (0, -1))
    if least > limit:
        raise infeasible("macs", limit, least, most)

    def choose(multiplier: float) -> tuple[list[int], float]:
        picks = [int(np.argmax(v - multiplier * c / most)) for v, c in zip(values, costs)]
        return picks, sum(float(c[i]) for c, i in zip(costs, picks))

    picks, cost = choose(0.0)
    if cost <= limit:
        return picks
    low, high = 0.0, 1.0
    while choose(high)[1] > limit:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if choose(middle)[1] > limit else (low, middle)
    return choose(high)[0]


def second_moment_tucker(setting: Setting, share: float) -> Chains:
    """Return Tucker-2 chains at one share of each layer's MACs, in the full second moment.

    Alternating least squares from the whitened closed form, in the second moment of the original
    inputs; in its Kronecker factors where a patch has more than 4,608 values.  The paper's code
    takes the ranks as given; here both channel ranks of all layers are one share of the full ranks
    that takes the share of the MACs.
    """
    chains = {}
    for layer, rank in _uniform_ranks(setting.net.layers, "tucker", share):
        metric = setting.input_metrics[layer.name]
        f = FAMILIES["tucker"].fit(layer.conv, rank, None, metric, refine=False)
        stages, _ = MetricFit(layer.conv, metric).refine(f.stages, TUCKER_SWEEPS, TUCKER_TOLERANCE)
        chains[layer.name] = replace(f, stages=stages)
    return chains


def evbmf_tucker(setting: Setting, relaxation: float) -> Chains:
    """Return Tucker-2 chains with ranks by EVBMF, fitted to the weights.

    HOSVD, refined by HOOI, which is never worse.
    """
    chains = {}
    for layer in _inner(setting.net.layers, "tucker"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ranks.RankWarning)  # the layer then gets rank 1
            rank = ranks.relaxed_evbmf(layer.conv, relaxation=relaxation)
        if _macs(layer, "tucker", rank) < layer.cost.macs:
            chains[layer.name] = FAMILIES["tucker"].fit(layer.conv, rank)
    return chains


def _inner(layers: Sequence[Layer], family: str) -> list[Layer]:
    """Return the layers that a family applies to, without the first one."""
    return [x for x in layers[1:] if _variants(family, x)]


def _variants(family: str, layer: Layer) -> tuple[str, ...]:
    try:
        return FAMILIES[family].variants(layer.conv)
    except NotApplicable:
        return ()


def _uniform_ranks(
    layers: Sequence[Layer], family: str, share: float
) -> list[tuple[Layer, tuple[int, ...]]]:
    """Return the layers that change, with the largest ranks within a share of their MACs."""
    found = []
    for layer in _inner(layers, family):
        choices = _ranks(layer, family)
        at = bisect_right(
            choices, share * layer.cost.macs, key=lambda r, x=layer: _macs(x, family, r)
        )
        if at:
            found.append((layer, choices[at - 1]))
    return found


def _ranks(layer: Layer, family: str) -> list[tuple[int, ...]]:
    """Return ranks in ascending order: of Tucker, equal shares of both full ranks."""
    weight, groups = layer.conv.stages[0].weight, layer.conv.groups
    outs, ins, *taps = len(weight) // groups, *weight.shape[1:]
    if family == "tucker":
        most = max(outs, ins)
        shares = [i / most for i in range(1, most + 1)]
        both = [(max(1, int(s * outs + 0.5)), max(1, int(s * ins + 0.5))) for s in shares]
        return list(dict.fromkeys(both))
    # Passes along the first axis and along the others: the smaller matrix side is the full rank.
    first = next(k for k in taps if k > 1)
    rest = int(np.prod(taps)) // first
    return [(r,) for r in range(1, min(ins * first, outs * rest) + 1)]


def _macs(layer: Layer, family: str, rank: Sequence[int]) -> int:
    """Return the MACs of a chain, from a zero kernel, whose fit takes no time."""
    stage = layer.conv.stages[0]
    zero = replace(stage, weight=np.zeros(stage.weight.shape, stage.weight.dtype))
    conv = replace(layer.conv, stages=(zero,))
    return FAMILIES[family].fit(conv, tuple(rank)).cost(layer.input_size).macs
