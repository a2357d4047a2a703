"""Layer by layer: each fitted on what the compressed network gives it, against the original."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lowrank._typing import Array
from lowrank.compress.model import Layer, Net, Samples
from lowrank.compress.options import Option
from lowrank.factorization import Factorization
from lowrank.families.weighted import MetricFit
from lowrank.metric import Metric, Moments, unroll

COARSE = 0.01  # relative error above which single precision tells fits apart
POLISH = 2  # sweeps in double precision behind it


class Originals:
    """What layers get in the original network: kept, as far as memory is given for it.

    Parameters
    ----------
    net : Net
        With calibration data.
    names : sequence of str
        Layers.
    memory : int
        Bytes that may be held; layers whose inputs take the most are run for again.
    """

    def __init__(self, net: Net, names: Sequence[str], memory: int = 1 << 29) -> None:
        self.net = net
        self._kept: dict[str, list[tuple[Array, ...]]] = {name: [] for name in names}
        for batch in net.inputs(names, {}) if names else ():
            for name, kept in self._kept.items():
                kept.append(batch[name])
            while (held := {k: _bytes(v) for k, v in self._kept.items()}) and (
                sum(held.values()) > memory
            ):
                del self._kept[max(held, key=held.__getitem__)]

    def of(self, name: str) -> Iterator[Samples]:
        """A layer's inputs, a batch at a time.

        Parameters
        ----------
        name : str

        Yields
        ------
        dict of str to tuple of ndarray
        """
        if name in self._kept:
            return ({name: arrays} for arrays in self._kept[name])
        return self.net.inputs([name], {})


def _bytes(kept: list[tuple[Array, ...]]) -> int:
    return sum(a.nbytes for arrays in kept for a in arrays)


def moments(
    net: Net,
    names: list[str],
    chains: Mapping[str, Factorization] | None = None,
    *,
    originals: Originals | None = None,
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
    originals : Originals, optional
        Where those of a single layer come from, if not from a run.
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
        name: Moments(
            layers[name].conv,
            paired=chains is not None,
            centred=centred,
            seed=zlib.crc32(name.encode()) ^ seed,
        )
        for name in names
    }
    pairs: Iterator[tuple[Samples, Samples | None]]
    if chains is None:
        pairs = ((batch, None) for batch in net.inputs(names, {}))
    else:
        original = net.inputs(names, {}) if originals is None else originals.of(*names)
        pairs = zip(net.inputs(names, chains), original, strict=True)
    for i, (batch, before) in enumerate(pairs):
        for name in names:
            first = batch[name] if before is None else before[name]
            for x, x0 in zip(batch[name], first, strict=True):
                with named(name):
                    found[name].add(x, None if before is None else x0)
        if progress is not None:
            progress((i + 1) / max(net.batches, 1))
    return found


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Errors in here say which layer they are about."""
    try:
        yield
    except ValueError as why:
        raise ValueError(f"layer {layer!r}: {why}") from why


def gains(layer: Layer) -> Array | None:
    """Weights of a layer's outputs: the squared gains of the norm behind it, if there is one.

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
        fit = MetricFit(conv, metric)
        # Single precision takes half the time, and is not what limits a fit of such an error.
        stages, error = fit.refine(option.stages, sweeps, dtype=np.float32)
        stages, _ = fit.refine(stages, min(sweeps, POLISH) if error > COARSE else sweeps)
    f = replace(conv, stages=stages, family=option.family, variant=option.variant, rank=option.rank)
    if bias and metric.mean is not None and metric.original_mean is not None:
        f = replace(f, bias=corrected_bias(conv, f, metric))
    return f


def output_error(layer: Layer, f: Factorization, metric: Metric) -> float:
    """Relative error of a layer's outputs against those of the original, means made up for.

    Parameters
    ----------
    layer : Layer
    f : Factorization
        What stands in for it.
    metric : Metric
        Of what it gets; with a target, against what the original got.

    Returns
    -------
    float
    """
    v, w = unroll(layer.conv, f.to_dense()), unroll(layer.conv)
    if metric.target is None or metric.output_power is None:
        missed, whole = metric.energy(v - w), metric.energy(w)
    else:
        # What no kernel can make of these inputs comes on top.
        g = np.eye(v.shape[1])[None] if metric.gradient_moment is None else metric.gradient_moment
        whole = float((g * metric.output_power).sum())
        least = max(whole - metric.energy(metric.target), 0.0)
        missed = metric.energy(v - metric.target) + least
    return math.sqrt(missed / whole) if whole > 0 else 0.0


def corrected_bias(conv: Factorization, f: Factorization, metric: Metric) -> Array:
    """The bias with which mean outputs are those of the original."""
    w, v = unroll(conv), unroll(conv, f.to_dense())
    assert metric.mean is not None
    assert metric.original_mean is not None
    wanted = np.einsum("gon,gn->go", w.reshape(*w.shape[:2], -1), metric.original_mean)
    given = np.einsum("gon,gn->go", v.reshape(*v.shape[:2], -1), metric.mean)
    own = 0.0 if conv.bias is None else conv.bias.astype(np.float64)
    return np.asarray(own + (wanted - given).ravel()).astype(conv.dtype)
