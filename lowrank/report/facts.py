"""What there is to say of a compressed network: costs, errors, times, fronts and spectra."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank import perfmodel
from lowrank._typing import Array
from lowrank.certify import certificate
from lowrank.compress import CompressedLayers, CompressibleModel, CompressionPlan, Layer
from lowrank.core import chain_algebra
from lowrank.factorization import Factorization
from lowrank.selection.candidates import Candidate, Pricing

ROUNDS = 15  # of runs that take turns, at the most
SECONDS = 0.3  # for the runs of a layer, beyond the first of each
LONGEST = 20.0  # predicted seconds of a layer, above which it is not measured
LARGEST = 1 << 31  # bytes of what a layer takes and gives, above which it is not

Progress = Callable[[str, float], object]


@dataclass(frozen=True, slots=True, eq=False)
class LayerFacts:
    """One layer, before and after.

    Attributes
    ----------
    name : str
        As the network calls it.
    dense, chain : str
        What it was and what it is, as shapes of kernels.
    becomes : str
        Family and variant; ``"dense"`` for a layer that stays, ``"dense, new weights"`` for one that
        makes up for the errors of others.
    rank : tuple of int
    planned : float or None
        Relative error that the plan foresaw, in the layer's metric, for the inputs of the original
        network.
    fitted : float or None
        That of the fitted layer, for the inputs that the compressed network gives it.
    kernel_error, kernel_bound : float or None
        Relative error of the kernel, whatever its inputs; and what no chain of that family, variant
        and rank can go below.
    before, after : dict of str to float
        Of one example: ``"macs"``, ``"params"``, ``"bytes"`` of weights, predicted ``"seconds"``.
    measured : tuple of float or None
        Seconds of one example before and after, on lowrank's engine.
    front : tuple of Candidate
        What it could have become.
    spectra : dict of str to ndarray
        Singular values of unfoldings of its kernel, over the largest; groups together.
    """

    name: str
    dense: str
    chain: str
    becomes: str
    rank: tuple[int, ...]
    planned: float | None
    fitted: float | None
    kernel_error: float | None
    kernel_bound: float | None
    before: dict[str, float]
    after: dict[str, float]
    measured: tuple[float, float] | None
    front: tuple[Candidate, ...]
    spectra: dict[str, Array]

    @property
    def changed(self) -> bool:
        """Whether anything stands in for it."""
        return self.fitted is not None

    def as_dict(self) -> dict[str, Any]:
        """Numbers and names, for JSON.

        Returns
        -------
        dict
        """
        names = (
            "name", "becomes", "dense", "chain", "planned", "fitted", "kernel_error",
            "kernel_bound", "before", "after", "measured",
        )  # fmt: skip
        return {n: getattr(self, n) for n in names} | {"rank": list(self.rank)}


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """A network, before and after.

    Attributes
    ----------
    name : str
        Of the network.
    plan : CompressionPlan
    layers : tuple of LayerFacts
        Those that count in the plan, in the order in which they run.
    examples, batches : int
        Calibration data; 0 for none.
    batch, threads : int, int or None
        That times are of.
    model_error : float
        Median relative error of predicted seconds; NaN where the machine was never measured.
    scores : tuple of float or None
        What the user's own evaluation gave before and after.
    notes : tuple of str
        Warnings.
    """

    name: str
    plan: CompressionPlan
    layers: tuple[LayerFacts, ...]
    examples: int
    batches: int
    batch: int
    threads: int | None
    model_error: float
    scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=())

    def total(self, axis: str) -> tuple[float, float]:
        """Cost of all layers before and after.

        Parameters
        ----------
        axis : str
            ``"macs"``, ``"params"``, ``"bytes"`` or ``"seconds"``, as predicted.

        Returns
        -------
        tuple of float
        """
        return (
            math.fsum(x.before[axis] for x in self.layers),
            math.fsum(x.after[axis] for x in self.layers),
        )

    def timed(self) -> tuple[float, float, float, float] | None:
        """Of the layers that were measured: seconds and multiply-adds, each before and after.

        Returns
        -------
        tuple of float or None
            None if no layer that changed was measured.
        """
        some = [(x, x.measured) for x in self.layers if x.measured is not None]
        if not any(x.changed for x, _ in some):
            return None
        return (
            math.fsum(m[0] for _, m in some),
            math.fsum(m[1] for _, m in some),
            math.fsum(x.before["macs"] for x, _ in some),
            math.fsum(x.after["macs"] for x, _ in some),
        )

    @property
    def measured_layers(self) -> str:
        """How many layers were measured, where it is not all: " of 3 of 10 layers"."""
        n = sum(x.measured is not None for x in self.layers)
        return "" if n == len(self.layers) else f" of {n} of {len(self.layers)} layers"

    @property
    def realised(self) -> float | None:
        """How much of the saving in multiply-adds is one of time: 1 where they fall alike."""
        found = self.timed()
        if found is None or not all(found):
            return None
        seconds, now, macs, left = found
        return (seconds / now) / (macs / left)

    def as_dict(self) -> dict[str, Any]:
        """Numbers and names, for JSON.

        Returns
        -------
        dict
        """
        timed = self.timed()
        return {
            "model": self.name,
            "limits": self.plan.limits,
            "loss": self.plan.loss,
            "gap": self.plan.gap,
            "examples": self.examples,
            "batch": self.batch,
            "threads": self.threads,
            **{axis: list(self.total(axis)) for axis in ("macs", "params", "bytes", "seconds")},
            "measured": None if timed is None else list(timed[:2]),
            "realised": self.realised,
            "scores": None if self.scores is None else list(self.scores),
            "notes": list(self.notes),
            "layers": [x.as_dict() for x in self.layers],
        }


def gather(
    net: CompressibleModel,
    small: CompressedLayers,
    name: str = "network",
    *,
    batch: int = 1,
    threads: int | None = None,
    measured: bool = True,
    scores: tuple[float, float] | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Facts:
    """Look at a network and what it became; layers are run, unless they take too long.

    Parameters
    ----------
    net : CompressibleModel
        The original.
    small : CompressedLayers
        From :func:`lowrank.compress.pipeline`.
    name : str
        Of the network.
    batch, threads : int, int or None
        That times are of; times are of one example all the same.
    measured : bool
        Whether layers are run at all.
    scores : tuple of float, optional
        Of the caller's own evaluation, before and after.
    notes : sequence of str
        What is to be said besides.
    progress : callable, optional
        Called with what is being done and the share of it that is.

    Returns
    -------
    Facts

    Examples
    --------
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> small = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> facts = report.gather(net, small, measured=False)
    >>> before, after = facts.total("macs")
    >>> after <= before / 2
    True
    """
    plan = small.plan
    layers = [x for x in net.layers if x.name in plan.layers]
    errors = {row.name: row.error for row in small.rows}
    found = []
    for i, layer in enumerate(layers):
        if progress is not None:
            progress("measuring", i / len(layers))
        f = small.chains.get(layer.name)
        found.append(_layer(layer, f, plan, errors, batch, threads, measured))
    if progress is not None:
        progress("measuring", 1.0)
    here = perfmodel.current()
    return Facts(
        name, plan, tuple(found), _examples(net), net.batches, batch, threads,
        here.coefficients["lowrank"].error if here.calibrated else math.nan, scores, tuple(notes),
    )  # fmt: skip


def _layer(
    layer: Layer, f: Factorization | None, plan: CompressionPlan, errors: Mapping[str, float], batch: int,
    threads: int | None, measured: bool,
) -> LayerFacts:  # fmt: skip
    conv, entry = layer.conv, plan.layers[layer.name]
    before, after = (_costs(layer, g, batch, threads) for g in (conv, f or conv))
    kernel_error = bound = None
    becomes = entry.name
    if f is not None and f.family == "dense":
        becomes = "dense, new weights"
        kernel_error = f.error(conv.to_dense())
    elif f is not None:
        c = certificate(conv, f)
        kernel_error, bound = c.error, c.bound
    times = None
    size = conv.dtype.itemsize * batch
    held = size * math.prod(conv.input_shape(layer.input_size))
    held += size * math.prod(conv.output_shape(layer.input_size))
    if measured and before["seconds"] <= LONGEST * layer.times and held <= LARGEST:
        times = _measured(layer, f, batch, threads)
    return LayerFacts(
        name=layer.name,
        dense=_shapes(conv),
        chain=_shapes(f or conv),
        becomes=becomes,
        rank=() if f is None else f.rank,
        planned=None if entry.is_dense else entry.error,
        fitted=None if f is None else errors.get(layer.name),
        kernel_error=kernel_error,
        kernel_bound=bound,
        before=before,
        after=after,
        measured=times,
        front=plan.alternatives.get(layer.name, ()),
        spectra=spectra(conv),
    )


def _costs(layer: Layer, f: Factorization, batch: int, threads: int | None) -> dict[str, float]:
    """Return the costs of a chain in the place of a layer, per example."""
    pricing = Pricing(f, layer.input_size, batch, threads, times=layer.times, per_example=True)
    c = pricing.time(pricing.dense)
    return {axis: c.amount(axis) for axis in ("macs", "params", "bytes", "seconds")}


def _measured(
    layer: Layer, f: Factorization | None, batch: int, threads: int | None
) -> tuple[float, float]:
    """Medians of runs that take turns; one of a layer that stays as it is counts for both."""
    shape = layer.conv.input_shape(layer.input_size)
    x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    runs = [g.compile(shape, np.float32, threads) for g in (layer.conv, f) if g is not None]
    outs = [run(x) for run in runs]  # warm, and memory that is there
    times: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    while not times[0] or (
        len(times[0]) < ROUNDS and time.perf_counter() - begun < SECONDS * len(runs)
    ):
        for run, out, taken in zip(runs, outs, times):
            start = time.perf_counter()
            run(x, out=out)
            taken.append(time.perf_counter() - start)
    medians = [statistics.median(taken) / batch * layer.times for taken in times]
    return medians[0], medians[-1]


def _examples(net: CompressibleModel) -> int:
    """How many examples the calibration data hold; a layer of linear ones may be run per vector."""
    if not net.batches or not net.layers:
        return 0
    first = net.layers[0].name
    return sum(len(batch[first][0]) for batch in net.inputs([first], {}) if batch[first])


def _shapes(f: Factorization) -> str:
    return " → ".join("×".join(map(str, s.weight.shape)) for s in f.stages)


def spectra(conv: Factorization) -> dict[str, Array]:
    """Singular values of the unfoldings that families cut, over the largest of each.

    Parameters
    ----------
    conv : Factorization
        A dense convolution.

    Returns
    -------
    dict of str to ndarray
        By what makes the rows of the unfolding.  Groups are cut at one rank together: the value
        of a rank is the root of the sum of their squares.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.report.facts import spectra
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> {rows: len(values) for rows, values in spectra(conv).items()}
    {'outputs': 8, 'inputs': 6, 'inputs and height': 18, 'taps': 9}
    """
    w = conv.to_dense().astype(np.float64)
    w = w.reshape(conv.groups, -1, *w.shape[1:]) / (chain_algebra.max_abs(w) or 1.0)
    names = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}[conv.ndim]
    rows: dict[str, tuple[int, ...]] = {"outputs": (1,)}
    long = [axis for axis in range(3, w.ndim) if w.shape[axis] > 1]
    if long:  # else it is the same matrix, turned
        rows["inputs"] = (2,)
    many = w.shape[2] > 1
    if len(long) > 1:
        name = names[long[0] - 3]
        rows[f"inputs and {name}" if many else name] = (2, long[0])
    if long and many and w.shape[1] > 1:  # else it is one of the others
        rows["taps"] = tuple(long)
    found = {}
    for name, axes in rows.items():
        values = _singular(w, axes)
        if len(values) > 1:
            found[name] = values / (values[0] or 1.0)
    return found


def _singular(w: Array, rows: Sequence[int]) -> Array:
    """By the smaller Gram matrix: what is lost of digits is below what a picture shows."""
    columns = [a for a in range(1, w.ndim) if a not in rows]
    m = w.transpose(0, *rows, *columns).reshape(len(w), math.prod(w.shape[a] for a in rows), -1)
    if m.shape[1] > m.shape[2]:
        m = m.swapaxes(1, 2)
    squares = np.linalg.eigvalsh(m @ m.swapaxes(1, 2))[:, ::-1]
    return np.asarray(np.sqrt(np.maximum(squares, 0.0).sum(axis=0)))
