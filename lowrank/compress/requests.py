"""Families and ranks that a caller requests for single layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lowrank.compress.latency import Timing
from lowrank.compress.model import Layer, OmittedLayer
from lowrank.families import FAMILIES, SweepPoint
from lowrank.families.weighted import MetricFit
from lowrank.metric import Metric
from lowrank.selection.candidates import Candidate, Pricing

FORM = "a family, (family, rank) or (family, rank, variant)"


class Request(NamedTuple):
    """Family of one layer, and its rank.

    Attributes
    ----------
    family : str
        Name from :data:`lowrank.FAMILIES`, or ``"dense"``.
    rank : int, float, sequence of int, or None
        Rank, or a share of the parameters; None to choose it by the budget.
    variant : str or None
        Variant of the family; None for the first that applies.
    """

    family: str
    rank: Any = None
    variant: str | None = None


def read_requests(
    requested: Mapping[str, Any] | None,
    layers: Sequence[Layer],
    left_out: Mapping[str, OmittedLayer],
) -> dict[str, Request]:
    """Return the requests of the argument `layers` by the name of the layer.

    Parameters
    ----------
    requested : mapping of str to str or tuple, or None
        Requests by name or pattern of layers; later ones replace earlier ones.
    layers : sequence of Layer
        Layers of the model that may change.
    left_out : mapping of str to OmittedLayer
        Layers that cannot, with the reasons.

    Returns
    -------
    dict of str to Request

    Raises
    ------
    TypeError, ValueError
        If a request has another form or an unknown family, or matches no layer.
    """
    if not isinstance(requested, Mapping | None):
        raise TypeError(f"layers must map names or patterns to requests, got {requested!r}")
    found: dict[str, Request] = {}
    for pattern, value in (requested or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"layers must name layers by strings, got {pattern!r}")
        entries = (value,) if isinstance(value, str) else value
        if not isinstance(entries, tuple | list) or not 1 <= len(entries) <= 3:
            raise TypeError(f"layers[{pattern!r}] must be {FORM}, got {value!r}")
        request = Request(*entries)
        if request.family not in (*FAMILIES, "dense"):
            raise ValueError(
                f"family must be one of dense, {', '.join(FAMILIES)}, got {request.family!r} "
                f"(layer {pattern})"
            )
        names = [x.name for x in layers if fnmatchcase(x.name, pattern)]
        if not names and pattern in left_out:
            raise ValueError(
                f"layers must name layers that can be replaced, got {pattern!r}: "
                f"{left_out[pattern].reason}"
            )
        if not names:
            known = ", ".join(x.name for x in layers[:20])
            raise ValueError(f"layers must name layers that may change ({known}), got {pattern!r}")
        found |= dict.fromkeys(names, request)
    return found


def check_request(layer: Layer, request: Request) -> tuple[str, ...]:
    """Return the family of a request without a rank, after a check that it applies.

    Parameters
    ----------
    layer : Layer
        Layer of a network.
    request : Request
        Family.

    Returns
    -------
    tuple of str

    Raises
    ------
    ValueError
        If the family does not apply to the layer, or a variant is given; the message names it.
    """
    if request.variant is not None:
        raise ValueError(
            f"a variant needs a rank, got {request.variant!r} alone (layer {layer.name})"
        )
    try:
        FAMILIES[request.family].variants(layer.conv)
    except ValueError as why:
        raise ValueError(f"{why} (layer {layer.name})") from why
    return (request.family,)


def requested_options(
    layer: Layer,
    metric: Metric,
    request: Request,
    *,
    absolute: bool,
    biased: bool,
    timing: Timing,
) -> list[Candidate]:
    """Return the dense layer, which cannot be chosen, and the chain that was requested.

    Parameters
    ----------
    layer : Layer
        Layer of a network.
    metric : Metric
        Second moments of its inputs and, where they are known, of its output gradients.
    request : Request
        Family and rank.
    absolute, biased, timing : bool, bool, Timing
        As for :func:`lowrank.compress.layer_options`.

    Returns
    -------
    list of Candidate
        The dense layer alone if that was requested.

    Raises
    ------
    TypeError, ValueError
        If the request is impossible; the message names the layer.
    """
    conv = layer.conv
    pricing = Pricing(
        conv, layer.input_size, *timing, times=layer.passes,
        has_bias=conv.bias is not None or biased, in_network=True,
    )  # fmt: skip
    dense = pricing.time(replace(pricing.dense, loss=0.0))
    if request.family == "dense":
        return [dense]
    try:
        f = FAMILIES[request.family].fit(conv, request.rank, request.variant, metric)
    except (TypeError, ValueError) as why:
        kind = TypeError if isinstance(why, TypeError) else ValueError
        raise kind(f"{why} (layer {layer.name})") from why
    if layer.accepts is not None and not layer.accepts(f.stages):
        raise ValueError(
            f"the model cannot hold a chain of {f.family} with rank {f.rank} (layer {layer.name})"
        )
    fit = MetricFit(conv, metric)
    error = fit.error(f.stages)
    scale = fit.energy / 2 * layer.times * metric.unit if absolute else 1.0
    point = SweepPoint(f.rank, error, 0.0, f.stages, lambda: f.stages)
    chain = replace(
        dense, family=f.family, variant=f.variant, rank=f.rank, error=error, bound=0.0,
        exact=False, loss=scale * error**2, _metric=metric, _point=point,
    )  # fmt: skip
    return [replace(dense, loss=math.inf), pricing.time(pricing.price(chain))]
