"""Reconstruction of a plan, layer by layer."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank import io
from lowrank.compress import reconstruct
from lowrank.compress.latency import NetworkClock, Timing, layer_latency
from lowrank.compress.model import CompressibleModel, Layer
from lowrank.compress.options import fit_option
from lowrank.compress.plan import CompressionPlan
from lowrank.compress.planning import make_plan
from lowrank.compress.statistics import LayerStatistics, Progress, white_metric
from lowrank.core.files import atomic_write, set_aside
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.metric import Metric
from lowrank.selection.candidates import Candidate, Pricing

SWEEPS = 30  # alternating sweeps of a final fit


class LayerError(NamedTuple):
    """Error of one layer after its fit.

    Attributes
    ----------
    name : str
        Name of the layer.
    error : float
        Relative error of its output on the inputs that the compressed model gives it, against
        the original output, with the bias corrected.
    """

    name: str
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class CompressedLayers:
    """Chains that replace the layers of a model.

    Attributes
    ----------
    plan : CompressionPlan
        Candidate of every layer.
    chains : dict of str to Factorization
        Chains of the layers that changed, with their weights and biases.
    rows : tuple of LayerError
        Error of each, in the order in which they were fitted.
    output_error : float
        Relative RMS error of the outputs of the model on the first calibration batch; NaN without
        data, or if no output is a floating-point array.
    """

    plan: CompressionPlan
    chains: dict[str, Factorization]
    rows: tuple[LayerError, ...]
    output_error: float = math.nan


def compress_model(
    model: CompressibleModel,
    plan: CompressionPlan | None = None,
    *,
    passes: int = 1,
    sweeps: int = SWEEPS,
    refit: bool = False,
    folder: str | os.PathLike[str] | None = None,
    timed: bool = False,
    progress: Progress | None = None,
    **budget: Any,
) -> CompressedLayers:
    """Fit the layers of a plan one after another, each on its inputs in the compressed model.

    Parameters
    ----------
    model : CompressibleModel
        Trained model; without calibration data, every chain is fitted to its kernel alone.
    plan : CompressionPlan, optional
        From :func:`make_plan`, which is called with `budget` if it is not given.
    passes : int
        Number of passes over all layers; a second one fits the first layers to the later ones.
    sweeps : int
        Largest number of alternating sweeps per fit.
    refit : bool
        Whether layers that stay dense get new weights, too, which make up for earlier errors.
    folder : path, optional
        Folder for finished layers, from which an interrupted run continues.
    timed : bool
        Whether the finished network is timed beside the original on the plan's runtime, if the
        plan did not measure it: see :attr:`CompressionPlan.latency`.
    progress : callable, optional
        Called with the name of the step and the share of it that is done.
    **budget
        Arguments of :func:`make_plan`.

    Returns
    -------
    CompressedLayers

    Raises
    ------
    ValueError
        If the plan does not fit the model, or the compressed model has outputs on the first batch
        that are not finite where those of the original are.

    Notes
    -----
    Memory is that of :class:`LayerStatistics`, the fits of the options of a plan, and the inputs
    of one layer in one batch, of the original and of the compressed model.

    Examples
    --------
    >>> from lowrank import compress, demo
    >>> from lowrank.interop.weights import WeightsModel
    >>> layers = compress.compress_model(WeightsModel(demo.WEIGHTS), macs=0.5)
    >>> sorted(layers.chains) == sorted(layers.plan.changed)
    True
    """
    if plan is None:
        settings = {k: budget[k] for k in ("gradients", "seed") if k in budget}
        statistics = budget.setdefault("statistics", LayerStatistics(model, **settings))
        plan = make_plan(model, folder=folder, progress=progress, **budget)
    elif budget:
        raise TypeError(f"a plan has its budget: {', '.join(budget)} cannot be given with it")
    else:
        about = plan.about
        statistics = LayerStatistics(
            model, gradients=bool(about.get("gradients")), seed=int(about.get("seed", 0))
        )
    layers = {x.name: x for x in model.layers}
    for name in plan.layers:
        if name not in layers:
            raise ValueError(f"plan must be of this model, which has no layer {name!r}")
    order = [x for x in model.layers if x.name in plan.layers]
    changed = [x for x in order if not plan.layers[x.name].is_dense]
    metrics, _ = statistics.metrics(order if refit else changed, progress)
    store = None
    if folder is not None:
        store = _Store(Path(folder), plan, order, metrics, (sweeps, refit, passes))
    chains: dict[str, Factorization] = {}
    rows: list[LayerError] = []
    work = [(p, x) for p in range(passes) for x in order]
    for i, (p, layer) in enumerate(work):
        name, candidate = layer.name, plan.layers[layer.name]
        if progress is not None:
            progress("layers", i / len(work))
        if candidate.is_dense and not (refit and chains and model.batches):
            continue
        stored = None if store is None else store.read(name, p)
        if stored is not None:
            chains[name] = stored[0]
            rows.append(LayerError(name, stored[1]))
            continue
        metric = metrics.get(name)
        if name in chains and not candidate.is_dense:
            start: Sequence[Stage] = chains[name].stages
        else:
            start = _start(layer, candidate, metric)
        others = {k: v for k, v in chains.items() if k != name}
        if model.batches and (others or metric is None):
            gradient_moment = None if metric is None else metric.gradient_moment
            paired = reconstruct.new_moments(layer, paired=True, seed=statistics.seed)
            weights = statistics.weights(name)
            reconstruct.add_inputs(
                {name: paired}, model, others, weights=None if weights is None else {name: weights}
            )
            metric = paired.metric().with_gradient_moment(gradient_moment)
        metric = metric or white_metric(layer)
        f = reconstruct.fit(layer, candidate, start, metric, sweeps=sweeps)
        error = reconstruct.output_error(layer, f, metric)
        chains[name] = f
        rows.append(LayerError(name, error))
        if store is not None:
            store.write(name, p, f, error)
    if progress is not None:
        progress("layers", 1.0)
    plan = _recount(plan, layers, chains, rows)
    if timed and chains and not (plan.latency is not None and plan.latency.is_measured):
        try:
            latency = NetworkClock(model, _timing(plan)).measure(chains)
        except ValueError as why:  # the fits are done: they are not lost to a time
            warnings.warn(f"the network was not timed: {why}", stacklevel=2)
            latency = None
        plan = replace(plan, latency=latency or plan.latency)
    return CompressedLayers(plan, chains, tuple(rows), _output_error(model, chains))


def _output_error(model: CompressibleModel, chains: Mapping[str, Factorization]) -> float:
    """Run the compressed model on the first batch, and return the relative error of its outputs."""
    missed = whole = 0.0
    for a, b in zip(next(model.outputs({}), ()), next(model.outputs(chains), ())):
        if a.shape != b.shape or a.dtype.kind != "f":
            continue
        known = np.isfinite(a)
        x, y = a[known].astype(np.float64), b[known].astype(np.float64)
        if not np.isfinite(y).all():
            raise ValueError(
                "outputs of the compressed model must be finite where those of the original are, "
                "got NaN or infinity: allow a larger budget"
            )
        missed += float(np.square(y - x).sum())
        whole += float(np.square(x).sum())
    return math.sqrt(missed / whole) if whole else math.nan


def _timing(plan: CompressionPlan) -> Timing:
    """Return the call that the seconds of a plan are for."""
    about = plan.about
    return Timing(int(about["batch"]), about["threads"], str(about["runtime"]))


def _start(layer: Layer, candidate: Candidate, metric: Metric | None) -> Sequence[Stage]:
    """Return the stages to start a fit from: those of the plan, or the same fit anew."""
    if candidate.is_dense:
        return layer.conv.stages
    if candidate.is_fitted:
        return candidate.build().stages
    return fit_option(layer, metric or white_metric(layer), candidate)


def _recount(
    plan: CompressionPlan,
    layers: Mapping[str, Layer],
    chains: Mapping[str, Factorization],
    rows: Sequence[LayerError],
) -> CompressionPlan:
    """Return the plan with the costs of the chains: a file may have been edited by hand.

    The time of an edited layer is predicted, its error that of the fit, and the loss unknown.
    """
    recounted, edited = {}, []
    errors = {row.name: row.error for row in rows}
    for name, candidate in plan.layers.items():
        layer = layers[name]
        if candidate.is_dense:
            candidate = replace(candidate, variant="", rank=(), error=0.0, loss=0.0)
            f = layer.conv
        else:
            f = chains[name]
        pricing = Pricing(f, layer.input_size, *_timing(plan), times=layer.passes, in_network=True)
        priced = pricing.dense
        new = replace(candidate.summary(), cost=priced.cost, itemsize=f.dtype.itemsize)
        if priced.cost.macs != candidate.cost.macs:
            edited.append(name)
            seconds = pricing.time(priced).seconds
            error = errors.get(name, math.nan)
            new = replace(new, seconds=seconds, is_measured=False, error=error, loss=math.nan)
        recounted[name] = new
    if not edited:
        return replace(plan, layers=recounted)
    return replace(
        plan, layers=recounted, latency=layer_latency(recounted, plan.dense, _timing(plan)),
        loss=math.nan, gap=math.nan, about=plan.about | {"edited": edited},
    )  # fmt: skip


class _Store:
    """Finished layers of one plan, kept in a folder."""

    def __init__(
        self,
        folder: Path,
        plan: CompressionPlan,
        layers: Sequence[Layer],
        metrics: Mapping[str, Metric],
        settings: object,
    ) -> None:
        key = hashlib.sha256(plan.to_json().encode())
        key.update(repr(settings).encode())
        for layer in layers:  # other weights or other data make another run
            key.update(layer.conv.to_dense().tobytes())
            metric = metrics.get(layer.name)
            if metric is not None:
                moment = (
                    metric.channel_factor if metric.input_moment is None else metric.input_moment
                )
                key.update(moment.tobytes())
        self.folder = folder / key.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, number: int) -> Path:
        plain = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.folder / f"{plain}-{number}.safetensors"

    def read(self, name: str, number: int) -> tuple[Factorization, float] | None:
        path = self._path(name, number)
        try:
            return io.load(path)["layer"], float(path.with_suffix(".error").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError) as why:
            for file in (path, path.with_suffix(".error")):
                if file.exists():
                    aside = set_aside(file)
            warnings.warn(f"{path}: damaged ({why}): renamed to {aside.name}", stacklevel=2)
            return None

    def write(self, name: str, number: int, f: Factorization, error: float) -> None:
        path = self._path(name, number)
        with atomic_write(path.with_suffix(".error")) as part:
            part.write_text(repr(error), "utf-8")
        io.save(path, {"layer": f})
