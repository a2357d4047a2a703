"""Planning: a family, variant and rank for every layer of a model, within budgets."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from numbers import Real
from typing import Any

from lowrank import perfmodel
from lowrank._kernels import _core
from lowrank.compress.by_time import allocate_by_prediction, allocate_by_time
from lowrank.compress.kept_options import KeptOptions
from lowrank.compress.latency import NetworkClock, Timing, layer_latency
from lowrank.compress.model import (
    CompressibleModel,
    Layer,
    OmittedLayer,
    describe_reasons,
    omitted_layers,
)
from lowrank.compress.optimise import allocate
from lowrank.compress.options import FAST_FAMILIES, FITTED, layer_options
from lowrank.compress.plan import CompressionPlan
from lowrank.compress.references import measure_references, reference_key
from lowrank.compress.requests import check_request, read_requests, requested_options
from lowrank.compress.statistics import LayerStatistics, Progress, white_metric
from lowrank.core.blas import one_blas_thread
from lowrank.core.threads import impatient_pool
from lowrank.metric import Metric
from lowrank.selection.budget import infeasible, parse_budget
from lowrank.selection.candidates import Candidate, check_families
from lowrank.selection.measured import Reference

FITTED_IN_ALL = 128  # candidates of all layers: those of few layers decide in finer steps


class NothingToCompressError(ValueError):
    """No layer of a model has a cheaper candidate."""


def make_plan(
    model: CompressibleModel,
    *,
    macs: float | str | None = None,
    params: float | str | None = None,
    seconds: float | str | None = None,
    bytes: float | str | None = None,
    families: Iterable[str] = FAST_FAMILIES,
    pinned: Sequence[str] = (),
    left_out: Sequence[str] = (),
    capped: Mapping[str, float] | None = None,
    layers: Mapping[str, Any] | None = None,
    gradients: bool = True,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    measure: bool = True,
    seed: int = 0,
    statistics: LayerStatistics | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CompressionPlan:
    """Choose a family, variant and rank for every layer of a model within budgets.

    Parameters
    ----------
    model : CompressibleModel
        Trained model; without calibration data, kernels are approximated as for white noise.
    macs, params, seconds, bytes : float or str, optional
        Budgets; at least one, unless `layers` is given; all must hold.  Seconds are those of a call
        of the network with `batch` examples; the others are per example, over all layers.  A number
        in (0, 1] or ``"50%"`` is a share of the dense cost of the layers in the plan; counts above
        1 and ``"20M"`` are amounts; amounts of time have a unit: ``"3ms"``.  See
        :func:`lowrank.selection.parse_budget`.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES` that may be chosen.
    pinned : sequence of str
        Layers, or patterns such as ``"layer1.*"``, that stay dense; they count in the budget.
    left_out : sequence of str
        Layers that stay dense and do not count in the budget.
    capped : mapping of str to float, optional
        Largest share of their own MACs that layers, or patterns, may take.
    layers : mapping of str to str or tuple, optional
        Families of layers, or patterns: ``"tucker"``, whose rank the budget chooses,
        ``("tucker", (16, 8))``, ``("channel_svd", 0.5)`` with a share of the parameters as the
        rank, ``("channel_svd", 12, "input")`` with a variant, or ``"dense"``.  Without a budget
        all other layers stay dense.
    gradients : bool
        Whether errors are weighted by the gradient of the loss, where the model can be
        differentiated; otherwise the relative error of every layer has equal weight.
    batch, threads, runtime : int, int, str
        Examples per call, number of threads and library that seconds are for: ``"lowrank"``,
        ``"onnxruntime"``, ``"torch"`` or ``"torch-channels-last"``.
    measure : bool
        Whether a budget of seconds is met by the clock: chains of every variant and
        the options that decide are measured on the runtime, and so is the network, beside the
        original; see
        :func:`lowrank.compress.by_time.allocate_by_time`.  Otherwise seconds are predicted, over
        the layers alone.
    seed : int
        Seed of every random choice.
    statistics : LayerStatistics, optional
        Statistics of the same model, shared by plans of several budgets; with a seed and
        gradients of their own.
    folder : path, optional
        Folder for the options of finished layers, from which interrupted planning continues.
    progress : callable, optional
        Called with the name of the step and the share of it that is done.

    Returns
    -------
    CompressionPlan
        With the fits of the chosen candidates, which :func:`compress_model` starts from.

    Raises
    ------
    TypeError
        If neither a budget nor `layers` is given, or one of `layers` has another form.
    ValueError
        If an argument is not possible, such as a rank of `layers`; the message names the layer.
    InfeasibleBudgetError
        If a budget is below the cheapest choice; the message states the minimum.
    ImportError
        If seconds are measured and the runtime is not installed.
    NothingToCompressError
        If no layer has a cheaper candidate.

    Examples
    --------
    >>> from lowrank import compress, demo
    >>> from lowrank.interop.weights import WeightsModel
    >>> plan = compress.make_plan(WeightsModel(demo.WEIGHTS), macs=0.5)
    >>> compressed, dense = plan.total("macs")
    >>> compressed <= 0.5 * dense
    True
    """
    given = {"macs": macs, "params": params, "seconds": seconds, "bytes": bytes}
    budgets = [parse_budget(axis, b) for axis, b in given.items() if b is not None]
    if not budgets and not layers:
        raise TypeError("give a budget: macs=, params=, seconds= or bytes=, or layers=")
    axes = [b.axis for b in budgets] or ["macs"]
    names, timing = check_families(families), Timing(batch, threads, runtime)
    counted, free = _select_layers(model, pinned, left_out, capped or {})
    requests = read_requests(layers, free, omitted_layers(model))
    if not budgets:
        free = [x for x in free if x.name in requests]
        for name, request in requests.items():
            if request.rank is None and request.family != "dense":
                raise ValueError(f"rank must be given if no budget is, got None (layer {name})")
    # Before the fits: what cannot be timed is refused at once.
    clock = NetworkClock(model, timing) if measure and "seconds" in axes else None
    if statistics is None:
        statistics = LayerStatistics(model, gradients=gradients, seed=seed)
    elif statistics.model is not model:
        raise ValueError("statistics must be those of the model that is planned")
    metrics, absolute = statistics.metrics(free, progress)
    references: dict[Any, list[Reference]] = {}
    if clock is not None:
        references = measure_references(free, names, timing, progress)

    kept = None
    if folder is not None:
        settings = (
            version("lowrank"), perfmodel.current().to_json(), names, axes, timing,
            _core.max_threads(), absolute, bool(model.batches), len(free),
            sorted((capped or {}).items()), clock is not None,
        )  # fmt: skip
        kept = KeptOptions(folder, settings)

    def options_of(layer: Layer) -> list[Candidate]:
        is_free = layer.name in metrics
        metric = metrics[layer.name] if is_free else white_metric(layer)
        # Layers with requests are fitted again: few candidates, which take no time.
        store = kept if is_free and layer.name not in requests else None
        found = None if store is None else store.read(layer, metric)
        if found is None:
            found = fitted_options(layer, metric, is_free)
            if store is not None:
                store.write(layer, metric, found)
        return found

    def fitted_options(layer: Layer, metric: Metric, is_free: bool) -> list[Candidate]:
        request = requests.get(layer.name)
        if request is not None and (request.rank is not None or request.family == "dense"):
            return requested_options(
                layer, metric, request,
                absolute=absolute, biased=bool(model.batches), timing=timing,
            )  # fmt: skip
        wanted = names if request is None else check_request(layer, request)
        options = layer_options(
            layer, metric, wanted if is_free else (), absolute=absolute,
            biased=bool(model.batches), axes=axes, timing=timing,
            references=references.get(reference_key(layer), ()),
            fitted=max(FITTED, FITTED_IN_ALL // max(len(free), 1)),
        )  # fmt: skip
        return _cap(layer.name, options, capped or {}) if is_free else options

    options: dict[str, list[Candidate]] = {}
    # Fits are many small products: one layer per thread is faster than several threads per product.
    with one_blas_thread(), impatient_pool(_core.max_threads()) as pool:
        for i, (layer, found) in enumerate(zip(counted, pool.map(options_of, counted)), start=1):
            options[layer.name] = found
            if progress is not None:
                progress("options", i / len(counted))
    if free and all(len(found) == 1 for found in options.values()):
        raise NothingToCompressError(
            f"nothing to compress: no family writes any layer with fewer {' and '.join(axes)}"
        )
    dense = {name: found[0] for name, found in options.items()}
    limits, by_seconds = {}, None
    for budget in budgets:
        axis = budget.axis
        if axis == "seconds":
            by_seconds = budget
            continue
        limits[axis] = budget.amount(math.fsum(c.amount(axis) for c in dense.values()))
        least = math.fsum(
            min(c.amount(axis) for c in found if c.loss < math.inf) for found in options.values()
        )
        if least > limits[axis]:
            total = math.fsum(c.amount(axis) for c in dense.values())
            raise infeasible(axis, limits[axis], least, total)
    if by_seconds is None:
        allocation = allocate(options, limits)
        latency = layer_latency(allocation.candidates, dense, timing)
    else:
        if clock is not None:
            chosen = allocate_by_time(
                model, {x.name: x for x in counted}, options, limits, by_seconds, clock, progress
            )
        else:
            chosen = allocate_by_prediction(options, limits, by_seconds, timing)
        allocation, options, latency, limits["seconds"] = chosen
        dense = {name: found[0] for name, found in options.items()}
    omitted = {
        x.name: OmittedLayer("left_out names it", round(x.cost.macs * x.passes))
        for x in model.layers
        if x not in counted
    } | omitted_layers(model)
    about = {
        "families": names, "seed": statistics.seed, "gradients": absolute, "batch": batch,
        "threads": threads, "runtime": runtime, "calibrated": bool(model.batches),
        "own_coefficients": perfmodel.current().calibrated,
        "factored": {k: round(m.distance, 4) for k, m in metrics.items() if m.distance > 0},
        "wide": [k for k, m in metrics.items() if math.isnan(m.distance)],
        "without_gradient": statistics.without_gradient,
    }  # fmt: skip
    return CompressionPlan(
        allocation.candidates,
        {name: c.summary() for name, c in dense.items()},
        limits,
        allocation.loss,
        allocation.gap,
        about,
        {name: tuple(c.summary() for c in found) for name, found in options.items()},
        latency,
        omitted,
    )


def _select_layers(
    model: CompressibleModel,
    pinned: Sequence[str],
    left_out: Sequence[str],
    capped: Mapping[str, float],
) -> tuple[list[Layer], list[Layer]]:
    """Return the layers that count in the budget, and those of them that may change."""
    for name, patterns in (("pinned", pinned), ("left_out", left_out)):
        # A string is a sequence of characters, which may be names in nn.Sequential.
        is_list = isinstance(patterns, Collection) and not isinstance(patterns, str)
        if not is_list or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"{name} must be a list of names or patterns, got {patterns!r}")
    if not isinstance(capped, Mapping) or not all(isinstance(p, str) for p in capped):
        raise TypeError(f"capped must map names or patterns to shares, got {capped!r}")
    layers = [x for x in model.layers if not _matches(x.name, left_out)]
    if not layers:
        reasons = describe_reasons(getattr(model, "left_out", {}))
        raise ValueError(
            "model and left_out must leave at least one convolution or linear layer, got none"
            f"{f' ({reasons})' if reasons else ''}"
        )
    for pattern in (*pinned, *left_out, *capped):
        if not any(fnmatchcase(x.name, pattern) for x in model.layers):
            known = ", ".join(x.name for x in model.layers[:20])
            raise ValueError(f"no layer is called {pattern!r}; layers are {known}")
    free = [x for x in layers if not _matches(x.name, pinned)]
    for pattern, share in capped.items():
        if not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"cap of {pattern} must be a share in (0, 1], got {share!r}")
        if not any(fnmatchcase(x.name, pattern) for x in free):
            raise ValueError(f"{pattern} is capped, but pinned or left out, too: it stays dense")
    return layers, free


def _cap(name: str, options: list[Candidate], capped: Mapping[str, float]) -> list[Candidate]:
    """Drop the options above the share of MACs that a layer may take."""
    dense = options[0]
    for pattern, share in capped.items():
        if fnmatchcase(name, pattern):
            kept = [c for c in options if c.amount("macs") <= share * dense.amount("macs")]
            if not kept:
                least = min(c.amount("macs") for c in options) / dense.amount("macs")
                raise ValueError(
                    f"cap of {name} must be at least {least:.1%} of its MACs, got {share:.1%}"
                )
            # The first option is what shares refer to; its infinite loss excludes it.
            return kept if dense in kept else [replace(dense, loss=math.inf), *kept]
    return options


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)
