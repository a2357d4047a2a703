"""A network within a budget: measured, planned, and fitted layer by layer."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from lowrank import io, selection
from lowrank._kernels import _core
from lowrank.compress import reconstruct
from lowrank.compress.model import Layer, Net
from lowrank.compress.optimise import spend
from lowrank.compress.options import QUICK, Option, options, timing
from lowrank.compress.plan import Alternative, Entry, Plan
from lowrank.compress.statistics import Measured, Progress, white_metric
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES
from lowrank.metric import Metric

MEMORY = 1 << 29  # bytes of the original's inputs that are held, in place of further passes
SWEEPS = 30  # of a final fit


class Reconstructed(NamedTuple):
    """How one layer came out.

    Attributes
    ----------
    name : str
        Of the layer.
    error : float
        Relative, of its output for the inputs that the compressed network gives it, against what
        the original gave; with the bias made up for.
    """

    name: str
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A compressed network.

    Attributes
    ----------
    plan : Plan
        What every layer became.
    chains : dict of str to Factorization
        What stands in for the layers that changed, with their weights and biases.
    rows : tuple of Reconstructed
        How each came out, in the order in which they were fitted.
    """

    plan: Plan
    chains: dict[str, Factorization]
    rows: tuple[Reconstructed, ...]


def make_plan(
    net: Net,
    *,
    macs: float | str | None = None,
    params: float | str | None = None,
    seconds: float | str | None = None,
    bytes: float | str | None = None,
    families: Iterable[str] = QUICK,
    pinned: Sequence[str] = (),
    left_out: Sequence[str] = (),
    capped: Mapping[str, float] | None = None,
    gradients: bool = True,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    seed: int = 0,
    measured: Measured | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose a family, variant and rank for every layer of a network within a budget.

    Parameters
    ----------
    net : Net
        With calibration data, or without: then kernels are approximated as for white noise.
    macs, params, seconds, bytes : float or str, optional
        Budgets of one example through all layers: a share in (0, 1], or an amount with a unit such
        as ``"20M"`` or ``"3ms"``.  At least one; all are kept to.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES` that may be chosen.
    pinned : sequence of str
        Layers, or patterns such as ``"layer1.*"``, that stay dense; they count in the budget.
    left_out : sequence of str
        Layers that stay and do not count.
    capped : mapping of str to float, optional
        Layers or patterns, and the share of their own multiply-adds that they may take.
    gradients : bool
        Whether errors count by what they do to the network's outputs, where it can be
        differentiated; else each layer's relative error counts alike.
    batch, threads, runtime : int, int, str
        That seconds are predicted for; see :func:`lowrank.perfmodel.predict`.
    seed : int
        For every random choice.
    measured : Measured, optional
        Of the same network, which plans of several budgets can share.  It has its own seed and
        gradients.
    progress : callable, optional
        Called with what is being done and the share of it that is.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If no budget is given, or nothing is within it; the message says what is possible.

    Examples
    --------
    >>> from lowrank import demo, compress
    >>> from lowrank.interop.weights import WeightsModel
    >>> plan = compress.make_plan(WeightsModel(demo.WEIGHTS), macs=0.5)
    >>> now, before = plan.total("macs")
    >>> now <= 0.5 * before
    True
    """
    budgets = {"macs": macs, "params": params, "seconds": seconds, "bytes": bytes}
    asked = {a: b for a, b in budgets.items() if b is not None}
    if not asked:
        raise TypeError("give a budget: macs=, params=, seconds= or bytes=")
    for axis, budget in asked.items():
        _limit(axis, budget, 1.0)  # what is no budget at all is refused before the work
    names = _families(families)
    layers = [x for x in net.layers if not _matches(x.name, left_out)]
    if not layers:
        raise ValueError("the network has no convolution or linear layer that may change")
    for pattern in (*pinned, *left_out, *(capped or {})):
        if not any(fnmatchcase(x.name, pattern) for x in net.layers):
            known = ", ".join(x.name for x in net.layers[:20])
            raise ValueError(f"no layer is called {pattern!r}; layers are {known}")
    free = [x for x in layers if not _matches(x.name, pinned)]
    for pattern, share in (capped or {}).items():
        if not 0 < share <= 1:
            raise ValueError(f"{pattern} must be capped at a share in (0, 1], got {share!r}")
        if not any(fnmatchcase(x.name, pattern) for x in free):
            raise ValueError(f"{pattern} is capped, but pinned or left out, too: it stays dense")
    if measured is None:
        measured = Measured(net, gradients=gradients, seed=seed)
    elif measured.net is not net:
        raise ValueError("measured must be of the same network")
    timed = "seconds" in asked
    found: dict[str, list[Option]] = {}
    metrics, absolute = measured.of(free, progress)

    def tried(layer: Layer) -> list[Option]:
        clock = timing(layer, batch, threads, runtime) if timed else None
        fixed = layer.name not in metrics
        metric = white_metric(layer) if fixed else metrics[layer.name]
        some = options(
            layer, metric, () if fixed else names, absolute=absolute, biased=bool(net.batches),
            axes=list(asked), timed=clock,
        )  # fmt: skip
        return some if fixed else _capped(layer.name, some, capped or {})

    # Fits are many small products: a layer a thread is faster than more threads a product.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_core.max_threads()) as pool:
        for i, (layer, some) in enumerate(zip(layers, pool.map(tried, layers)), start=1):
            found[layer.name] = some
            if progress is not None:
                progress("options", i / len(layers))
    if free and all(len(some) == 1 for some in found.values()):
        raise Nothing(
            "nothing can be won: no family writes any of these layers with less "
            + " and ".join(asked)
        )
    limits = {}
    for axis, budget in asked.items():
        whole = math.fsum(some[0].costs[axis] for some in found.values())
        limits[axis] = _limit(axis, budget, whole)
        least = math.fsum(min(o.costs[axis] for o in some) for some in found.values())
        if least > limits[axis]:
            raise ValueError(
                f"{axis}={budget!r}: nothing is so cheap; the cheapest options take "
                f"{least / whole:.1%} of the network"
            )
    choice = spend(found, limits)
    entries = {}
    for name, some in found.items():
        o = choice.options[name]
        entries[name] = Entry(o.family, o.variant, o.rank, o.error, o.loss, o.costs, some[0].costs)
    about = {
        "families": list(names), "seed": measured.seed, "gradients": absolute, "batch": batch,
        "threads": threads, "runtime": runtime, "calibrated": bool(net.batches),
        "factored": {k: round(m.distance, 4) for k, m in metrics.items() if m.distance > 0},
        "wide": [k for k, m in metrics.items() if math.isnan(m.distance)],
    }  # fmt: skip
    fronts = {
        name: tuple(Alternative(o.name, o.rank, o.error, o.costs["macs"]) for o in some)
        for name, some in found.items()
    }
    return Plan(entries, limits, choice.loss, choice.gap, about, fronts)


class Nothing(ValueError):
    """No layer of a network has a cheaper form."""


def compress_model(
    net: Net,
    plan: Plan | None = None,
    *,
    passes: int = 1,
    sweeps: int = SWEEPS,
    refit: bool = False,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **budget: Any,
) -> Compressed:
    """Fit the layers of a plan one after another, each on what the layers before it now give.

    Parameters
    ----------
    net : Net
        With calibration data; without, every chain is the best one for its kernel alone.
    plan : Plan, optional
        From :func:`make_plan`, which is called with `budget` if it is not given.
    passes : int
        Over all layers; a second one fits the first layers to what became of the later ones.
    sweeps : int
        Of alternation, a fit at the most.
    refit : bool
        Whether layers that stay dense make up for the errors ahead of them, too: new weights of
        the same shape.
    folder : path, optional
        Where finished layers are kept; a run that was interrupted goes on from there.
    progress : callable, optional
        Called with what is being done and the share of it that is.
    **budget
        As for :func:`make_plan`.

    Returns
    -------
    Compressed

    Raises
    ------
    ValueError
        If the plan does not fit the network.

    Examples
    --------
    >>> from lowrank import demo, compress
    >>> from lowrank.interop.weights import WeightsModel
    >>> small = compress.compress_model(WeightsModel(demo.WEIGHTS), macs=0.5)
    >>> sorted(small.chains) == sorted(small.plan.changed)
    True
    """
    if plan is None:
        known = {k: budget[k] for k in ("gradients", "seed") if k in budget}
        measured = budget.setdefault("measured", Measured(net, **known))
        plan = make_plan(net, progress=progress, **budget)
    elif budget:
        raise TypeError(f"a plan has its budget: {', '.join(budget)} cannot be given with it")
    else:
        about = plan.about
        measured = Measured(
            net, gradients=bool(about.get("gradients")), seed=int(about.get("seed", 0))
        )
    layers = {x.name: x for x in net.layers}
    for name in plan.layers:
        if name not in layers:
            raise ValueError(f"the plan is of another network: this one has no layer {name!r}")
    order = [x for x in net.layers if x.name in plan.layers]
    changed = [x for x in order if plan.layers[x.name].family != "dense"]
    metrics, _ = measured.of(changed, progress)
    originals = None
    if net.batches:
        wanted = order if refit else changed
        originals = reconstruct.Originals(net, [x.name for x in wanted], MEMORY)
    store = None
    if folder is not None:
        store = _Store(Path(folder), plan, order, metrics, (sweeps, refit, passes))
    chains: dict[str, Factorization] = {}
    rows: list[Reconstructed] = []
    work = [(p, x) for p in range(passes) for x in order]
    for i, (p, layer) in enumerate(work):
        name, entry = layer.name, plan.layers[layer.name]
        if progress is not None:
            progress("layers", i / len(work))
        if entry.family == "dense" and not (refit and chains and net.batches):
            continue
        kept = None if store is None else store.read(name, p)
        if kept is not None:
            chains[name] = kept[0]
            rows.append(Reconstructed(name, kept[1]))
            continue
        option = _option(layer, entry, metrics.get(name))
        if name in chains and entry.family != "dense":
            option = replace(option, stages=chains[name].stages)
        metric = metrics.get(name)
        if net.batches:
            others = {k: v for k, v in chains.items() if k != name}
            if others or metric is None:
                outputs = None if metric is None else metric.gradient_moment
                seen = reconstruct.moments(
                    net, [name], others, originals=originals, seed=measured.seed
                )
                metric = seen[name].metric().with_gradient_moment(outputs)
        f = reconstruct.fitted(layer, option, metric or white_metric(layer), sweeps=sweeps)
        error = reconstruct.output_error(layer, f, metric or white_metric(layer))
        chains[name] = f
        rows.append(Reconstructed(name, error))
        if store is not None:
            store.write(name, p, f, error)
    if progress is not None:
        progress("layers", 1.0)
    return Compressed(_counted(plan, layers, chains), chains, tuple(rows))


def _counted(plan: Plan, layers: Mapping[str, Layer], chains: Mapping[str, Factorization]) -> Plan:
    """The plan with the costs of the chains themselves: a file may have been edited by hand."""
    entries = {}
    for name, entry in plan.layers.items():
        layer = layers[name]
        f = layer.conv if entry.family == "dense" else chains[name]
        cost = f.cost(layer.input_size)
        counted = {
            "macs": float(cost.macs * layer.times),
            "params": float(cost.params),
            "bytes": float(cost.params * f.dtype.itemsize),
        }
        if entry.family == "dense":
            entry = replace(entry, variant="", rank=(), error=0.0, loss=0.0)
        entries[name] = replace(entry, costs=entry.costs | counted)
    return replace(plan, layers=entries)


def _option(layer: Layer, entry: Entry, metric: Metric | None) -> Option:
    """The entry with weights to start from: fitted in the metric of the original inputs."""
    conv = layer.conv
    if entry.family == "dense":
        stages = conv.stages
    else:
        if entry.family not in FAMILIES:
            raise ValueError(f"the plan asks for the unknown family {entry.family!r}")
        family = FAMILIES[entry.family]
        stages = family.fit(conv, entry.rank, entry.variant, metric or white_metric(layer)).stages
    return Option(
        entry.family, entry.variant, entry.rank, entry.loss, entry.error, entry.costs, stages
    )


def _capped(name: str, some: list[Option], capped: Mapping[str, float]) -> list[Option]:
    for pattern, share in capped.items():
        if fnmatchcase(name, pattern):
            kept = [o for o in some if o.costs["macs"] <= share * some[0].costs["macs"]]
            if not kept:
                least = min(o.costs["macs"] for o in some) / some[0].costs["macs"]
                raise ValueError(
                    f"{name} is capped at {share:.1%} of its multiply-adds; the least possible is "
                    f"{least:.1%}"
                )
            # The first of the options is what shares are of.
            return [replace(some[0], loss=math.inf), *kept] if some[0] not in kept else kept
    return some


def _limit(axis: str, budget: float | str, whole: float) -> float:
    if isinstance(budget, str) and budget.strip().endswith("%"):
        try:
            budget = float(budget.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"{axis} must be a share such as '50%', got {budget!r}") from None
    if isinstance(budget, int | float | np.number):
        if isinstance(budget, bool) or not 0 < budget <= 1:
            unit = "3ms" if axis == "seconds" else "20M"
            raise ValueError(
                f"{axis} must be a share in (0, 1] or an amount with a unit such as {unit!r}, got "
                f"{budget!r}"
            )
        return float(budget) * whole
    if axis == "seconds":
        return selection.time_of(budget, whole)
    return selection.amount_of(axis, budget, int(whole))


def _families(names: Iterable[str]) -> list[str]:
    found = [names] if isinstance(names, str) else list(names)
    for name in found:
        if name not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


class _Store:
    """Finished layers of one plan in a folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        layers: Sequence[Layer],
        metrics: Mapping[str, Metric],
        settings: object,
    ) -> None:
        key = hashlib.sha256(plan.to_json().encode())
        key.update(repr(settings).encode())
        for layer in layers:  # other weights or other data are another run
            key.update(layer.conv.to_dense().tobytes())
            metric = metrics.get(layer.name)
            if metric is not None:
                seen = metric.channel_factor if metric.input_moment is None else metric.input_moment
                key.update(seen.tobytes())
        self.folder = folder / key.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, number: int) -> Path:
        plain = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.folder / f"{plain}-{number}.safetensors"

    def read(self, name: str, number: int) -> tuple[Factorization, float] | None:
        path = self._path(name, number)
        try:
            return io.load(path)["layer"], float(path.with_suffix(".error").read_text())
        except (OSError, ValueError):  # not there, or cut off while it was written
            return None

    def write(self, name: str, number: int, f: Factorization, error: float) -> None:
        path = self._path(name, number)
        path.with_suffix(".error").write_text(repr(error))
        part = path.with_suffix(".part.safetensors")
        io.save(part, {"layer": f})
        os.replace(part, path)
