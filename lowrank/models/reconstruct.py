"""Layer by layer: each fitted on what the compressed network gives it, against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lowrank._typing import Array
from lowrank.factorization import Factorization
from lowrank.metric import Metric, Moments, unrolled
from lowrank.models.net import Layer, Net
from lowrank.models.options import Option
from lowrank.weighted import Weighted


def moments(
    net: Net,
    names: list[str],
    chains: Mapping[str, Factorization] | None = None,
    *,
    centred: bool = True,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Moments]:
    """Second moments of what layers get, of all in one pass.

    Parameters
    ----------
    net : Net
        With calibration data.
    names : list of str
        Layers.
    chains : mapping of str to Factorization, optional
        What stands in for layers already; moments are then paired with those of the original.
    centred : bool
        Whether a bias is free to make up for means.
    seed : int
        For the choice of outputs in large batches.
    progress : callable, optional
        Called with the share that is done.

    Returns
    -------
    dict of str to Moments
    """
    layers = {layer.name: layer for layer in net.layers}
    found = {
        name: Moments(layers[name].conv, paired=chains is not None, centred=centred, seed=seed + i)
        for i, name in enumerate(names)
    }
    original = net.inputs(names, {})
    now = original if chains is None else net.inputs(names, chains)
    pairs = ((b, None) for b in now) if chains is None else zip(now, original, strict=True)
    for i, (batch, before) in enumerate(pairs):
        for name in names:
            first = batch[name] if before is None else before[name]
            for x, x0 in zip(batch[name], first, strict=True):
                found[name].add(x, None if before is None else x0)
        if progress is not None:
            progress((i + 1) / max(net.batches, 1))
    return found


def weight_of_outputs(layer: Layer, gradients: Array | None) -> Array | None:
    """G of a layer: of its gradients, else of the gains that its outputs are multiplied by."""
    if gradients is not None or layer.scale is None:
        return gradients
    squares = np.square(layer.scale.astype(np.float64)).reshape(layer.conv.groups, -1)
    squares = np.maximum(squares, 1e-6 * squares.max(initial=1e-30))
    return np.asarray(squares[:, :, None] * np.eye(squares.shape[1]))


def fitted(
    layer: Layer, option: Option, metric: Metric, *, sweeps: int = 30, bias: bool = True
) -> Factorization:
    """An option with its weights, and a bias, fitted in a metric.

    Parameters
    ----------
    layer : Layer
        That is replaced.
    option : Option
        Its form; its weights are the start.
    metric : Metric
        With a target, if inputs are not those of the original.
    sweeps : int
        Of alternation, at the most.
    bias : bool
        Whether means are made up for.

    Returns
    -------
    Factorization
    """
    conv = layer.conv
    if option.family == "dense":
        target = metric.target
        stages = option.stages
        if target is not None:
            weight = target.swapaxes(1, 2) if conv.transposed else target
            weight = np.ascontiguousarray(weight).reshape(conv.stages[0].weight.shape)
            stages = (replace(conv.stages[0], weight=weight.astype(conv.dtype)),)
    else:
        weighted = Weighted(conv, metric, option.family, option.form)
        stages, _ = weighted.refined(option.stages, sweeps)
    f = replace(conv, stages=stages, family=option.family, form=option.form, rank=option.rank)
    if bias and metric.shift is not None and metric.reference is not None:
        f = replace(f, bias=corrected_bias(conv, f, metric))
    return f


def corrected_bias(conv: Factorization, f: Factorization, metric: Metric) -> Array:
    """The bias with which mean outputs are those of the original."""
    w, v = unrolled(conv), unrolled(conv, f.to_dense())
    assert metric.shift is not None
    assert metric.reference is not None
    wanted = np.einsum("gon,gn->go", w.reshape(*w.shape[:2], -1), metric.reference)
    given = np.einsum("gon,gn->go", v.reshape(*v.shape[:2], -1), metric.shift)
    own = 0.0 if conv.bias is None else conv.bias.astype(np.float64)
    return np.asarray(own + (wanted - given).ravel()).astype(conv.dtype)
