"""Fits of single layers on their inputs in the compressed model, against the original outputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lowrank._typing import Array
from lowrank.compress.model import CompressibleModel, Layer, Samples
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.families.weighted import COARSE, POLISH, MetricFit
from lowrank.metric import Metric, Moments, unroll
from lowrank.selection.candidates import Candidate


def new_moments(layer: Layer, *, paired: bool = False, seed: int = 0) -> Moments:
    """Return empty second moments of the inputs of a layer.

    Parameters
    ----------
    layer : Layer
        Layer of a network.
    paired : bool
        Whether inputs come with those of the original layer.
    seed : int
        Seed of the choice of output positions in large batches.

    Returns
    -------
    Moments
    """
    seed ^= zlib.crc32(layer.name.encode())
    return Moments(layer.conv, paired=paired, centred=True, seed=seed)  # a bias compensates means


def add_inputs(
    moments: Mapping[str, Moments],
    model: CompressibleModel,
    chains: Mapping[str, Factorization] | None = None,
    *,
    weights: Mapping[str, Sequence[tuple[Array, ...]]] | None = None,
    progress: Callable[[float], object] | None = None,
) -> None:
    """Add the inputs of layers to their second moments, of all in one pass.

    Parameters
    ----------
    moments : mapping of str to Moments
        Second moments by the name of the layer; paired if there are chains.
    model : CompressibleModel
        Trained model with calibration data.
    chains : mapping of str to Factorization, optional
        Chains that already replace layers.
    weights : mapping of str to sequence of tuple of ndarray, optional
        Weights of output positions by layer, see :meth:`LayerStatistics.weights`.
    progress : callable, optional
        Called with the share that is done.
    """
    names, weights = list(moments), weights or {}
    pairs: Iterator[tuple[Samples, Samples | None]]
    if chains is None:
        pairs = ((batch, None) for batch in model.inputs(names, {}))
    else:
        pairs = zip(model.inputs(names, chains), model.inputs(names, {}), strict=True)
    for i, (batch, before) in enumerate(pairs):
        for name, found in moments.items():
            calls = batch[name]
            originals = [None] * len(calls) if before is None else before[name]
            shares = weights[name][i] if name in weights else [None] * len(calls)
            for x, x0, w in zip(calls, originals, shares, strict=True):
                with naming(name):
                    found.add(x, x0, w)
        if progress is not None:
            progress((i + 1) / max(model.batches, 1))


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Name the layer in the message of a ValueError."""
    try:
        yield
    except ValueError as why:
        raise ValueError(f"layer {layer!r}: {why}") from why


def gain_moment(layer: Layer) -> Array | None:
    """Return the weights of a layer's outputs: the squared gains of the batch norm behind it.

    Parameters
    ----------
    layer : Layer

    Returns
    -------
    ndarray, shape (groups, out, out), or None
    """
    if layer.scale is None:
        return None
    squares = np.square(layer.scale.astype(np.float64)).reshape(layer.conv.groups, -1)
    squares = np.maximum(squares, 1e-6 * squares.max(initial=1e-30))
    return np.asarray(squares[:, :, None] * np.eye(squares.shape[1]))


def fit(
    layer: Layer,
    candidate: Candidate,
    start: Sequence[Stage],
    metric: Metric,
    *,
    sweeps: int = 30,
    bias: bool = True,
) -> Factorization:
    """Fit the weights of a candidate, and a bias, in a metric.

    Parameters
    ----------
    layer : Layer
        Layer that is replaced.
    candidate : Candidate
        Family, variant and rank of the chain.
    start : sequence of Stage
        Chain to start from.
    metric : Metric
        Metric of the inputs; with a target if they are not those of the original.
    sweeps : int
        Largest number of alternating sweeps.
    bias : bool
        Whether a bias makes up for the error of the mean output.

    Returns
    -------
    Factorization
    """
    conv = layer.conv
    stages = tuple(start)
    if not candidate.is_dense:
        metric_fit = MetricFit(conv, metric)
        # float32 takes half the time and is accurate enough for an error above COARSE.
        stages, error = metric_fit.refine(stages, sweeps, dtype=np.float32)
        stages, _ = metric_fit.refine(stages, min(sweeps, POLISH) if error > COARSE else sweeps)
    elif metric.target is not None:
        target = metric.target.swapaxes(1, 2) if conv.transposed else metric.target
        weight = np.ascontiguousarray(target).reshape(conv.stages[0].weight.shape)
        stages = (replace(conv.stages[0], weight=weight.astype(conv.dtype)),)
    f = replace(
        conv, stages=stages, family=candidate.family, variant=candidate.variant,
        rank=candidate.rank,
    )  # fmt: skip
    if bias and metric.mean is not None and metric.original_mean is not None:
        f = replace(f, bias=corrected_bias(conv, f, metric))
    return f


def output_error(layer: Layer, f: Factorization, metric: Metric) -> float:
    """Return the relative error of a layer's outputs against the original ones, without means.

    Parameters
    ----------
    layer : Layer
        Layer that is replaced.
    f : Factorization
        Chain in its place.
    metric : Metric
        Metric of its inputs; with a target if they are not those of the original.

    Returns
    -------
    float
    """
    v, w = unroll(layer.conv, f.to_dense()), unroll(layer.conv)
    if metric.target is None or metric.output_power is None:
        missed, whole = metric.energy(v - w), metric.energy(w)
    else:
        # Add what no kernel can reach from these inputs.
        g = np.eye(v.shape[1])[None] if metric.gradient_moment is None else metric.gradient_moment
        whole = float((g * metric.output_power).sum())
        least = max(whole - metric.energy(metric.target), 0.0)
        missed = metric.energy(v - metric.target) + least
    return math.sqrt(missed / whole) if whole > 0 else 0.0


def corrected_bias(conv: Factorization, f: Factorization, metric: Metric) -> Array:
    """Return the bias for which mean outputs equal the original ones."""
    w, v = unroll(conv), unroll(conv, f.to_dense())
    assert metric.mean is not None
    assert metric.original_mean is not None
    wanted = np.einsum("gon,gn->go", w.reshape(*w.shape[:2], -1), metric.original_mean)
    given = np.einsum("gon,gn->go", v.reshape(*v.shape[:2], -1), metric.mean)
    own = 0.0 if conv.bias is None else conv.bias.astype(np.float64)
    return np.asarray(own + (wanted - given).ravel()).astype(conv.dtype)
