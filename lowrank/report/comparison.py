"""Comparison of a network before and after compression: costs, errors, times and spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank import perfmodel
from lowrank._typing import Array
from lowrank.certify import certificate
from lowrank.compress import CompressedLayers, CompressibleModel, CompressionPlan, Latency, Layer
from lowrank.compress.plan import known
from lowrank.core import chain_algebra
from lowrank.core.cost import speed_up_efficiency
from lowrank.factorization import Factorization
from lowrank.perfmodel.measurement import Measurements
from lowrank.perfmodel.timing import CallTime
from lowrank.selection.candidates import Candidate, Pricing

MAX_PREDICTED_SECONDS = 20.0  # layers predicted to be slower are not timed
MAX_BYTES = 1 << 31  # layers with more bytes of inputs and outputs are not timed

Progress = Callable[[str, float], object]


@dataclass(frozen=True, slots=True, eq=False)
class LayerComparison:
    """One layer before and after compression.

    Attributes
    ----------
    name : str
        Name in the network.
    dense, chain : str
        Weight shapes before and after.
    becomes : str
        Family and variant; ``"dense"`` for an unchanged layer, ``"dense, new weights"`` for one
        refitted to compensate the errors of others.
    rank : tuple of int
        Rank of the chain; empty for dense layers.
    planned : float or None
        Planned relative output error, in the layer's metric, on inputs of the original network.
    fitted : float or None
        Relative output error of the fitted layer, on inputs that the compressed network gives it.
    kernel_error, kernel_bound : float or None
        Relative error of the kernel, and its lower bound for that family, variant and rank.
    before, after : dict of str to float
        Predicted ``"seconds"`` per call in the network, and costs per example: ``"macs"``,
        ``"params"`` and ``"bytes"`` of weights.
    measured : tuple of float or None
        Measured seconds per call in the network, before and after.
    front : tuple of Candidate
        Options that the plan chose from.
    spectra : dict of str to ndarray
        Singular values of unfoldings of the kernel, divided by the largest.
    samples : tuple of tuple of float
        Repeated measurements before and after, in alternation; empty if not measured.
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
    samples: tuple[tuple[float, ...], ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the layer has a chain or new weights."""
        return self.fitted is not None

    @property
    def is_slower(self) -> bool:
        """Whether the layer takes longer than before, measured if possible, else predicted."""
        before, after = self.measured or (self.before["seconds"], self.after["seconds"])
        return self.changed and after > before

    @property
    def efficiency(self) -> float:
        """Measured speed-up efficiency; NaN if unknown or if no MACs are saved."""
        if self.measured is None:
            return math.nan
        return _efficiency(*self.measured, self.before["macs"], self.after["macs"])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Returns
        -------
        dict
        """
        names = (
            "name", "becomes", "dense", "chain", "planned", "fitted", "kernel_error",
            "kernel_bound", "before", "after", "measured",
        )  # fmt: skip
        lists = {"rank": list(self.rank), "samples": [list(s) for s in self.samples]}
        return {n: getattr(self, n) for n in names} | lists


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A network before and after compression.

    Attributes
    ----------
    name : str
        Name of the network.
    plan : CompressionPlan
        Candidate of every layer.
    layers : tuple of LayerComparison
        Layers of the plan, in the order in which they run.
    examples, batches : int
        Number of calibration examples and batches; 0 without data.
    batch, threads, runtime : int, int or None, str
        Examples per call, number of threads and runtime of all times.
    model_error : float
        Median relative error of predicted seconds; NaN if the machine is not calibrated.
    scores : tuple of float or None
        Results of the user's evaluation before and after.
    notes : tuple of str
        Additional notes.
    """

    name: str
    plan: CompressionPlan
    layers: tuple[LayerComparison, ...]
    examples: int
    batches: int
    batch: int
    threads: int | None
    runtime: str
    model_error: float
    scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=())

    def total(self, axis: str) -> tuple[float, float]:
        """Return the total cost before and after.

        Parameters
        ----------
        axis : str
            ``"macs"``, ``"params"``, ``"bytes"`` or ``"seconds"`` (predicted).

        Returns
        -------
        tuple of float
        """
        return (
            math.fsum(x.before[axis] for x in self.layers),
            math.fsum(x.after[axis] for x in self.layers),
        )

    def measured(self) -> tuple[float, float, float, float] | None:
        """Return seconds before and after and MACs before and after, over measured layers.

        Returns
        -------
        tuple of float or None
            None if no changed layer was measured.
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
        """Text such as " of 3 of 10 layers", or nothing if all were measured."""
        n = sum(x.measured is not None for x in self.layers)
        return "" if n == len(self.layers) else f" of {n} of {len(self.layers)} layers"

    @property
    def latency(self) -> Latency:
        """Latency of the network, or what is predicted for its layers if it is unknown."""
        if self.plan.latency is not None:
            return self.plan.latency
        before, after = self.total("seconds")
        threads = self.threads or perfmodel.current().threads
        return Latency(before, after, self.runtime, self.batch, threads, math.nan, False)

    @property
    def efficiency(self) -> float:
        """Measured speed-up efficiency over the measured layers; NaN if unknown."""
        measured = self.measured()
        return math.nan if measured is None else _efficiency(*measured)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Returns
        -------
        dict
        """
        measured = self.measured()
        return {
            "model": self.name,
            "limits": self.plan.limits,
            "loss": known(self.plan.loss),
            "gap": known(self.plan.gap),
            "examples": self.examples,
            "batch": self.batch,
            "threads": self.threads,
            "runtime": self.runtime,
            "latency": {
                **self.latency._asdict(),
                "spread": self.latency.spread if self.latency.is_measured else None,
            },
            **{axis: list(self.total(axis)) for axis in ("macs", "params", "bytes", "seconds")},
            "measured": None if measured is None else list(measured[:2]),
            "efficiency": None if math.isnan(self.efficiency) else self.efficiency,
            "scores": None if self.scores is None else list(self.scores),
            "notes": list(self.notes),
            "layers": [x.as_dict() for x in self.layers],
        }


def compare(
    net: CompressibleModel,
    result: CompressedLayers,
    name: str = "network",
    *,
    batch: int | None = None,
    threads: int | None = None,
    measure: bool = True,
    scores: tuple[float, float] | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Compare a network with its compressed layers; layers are timed unless they are too large.

    Parameters
    ----------
    net : CompressibleModel
        Original network.
    result : CompressedLayers
        Result of :func:`lowrank.compress.compress_model`.
    name : str
        Name of the network.
    batch, threads : int, optional
        Examples per call and number of threads of all times; those of the plan if not given.
    measure : bool
        Whether layers are timed on the runtime of the plan; see
        :class:`lowrank.perfmodel.measurement.Measurements`.
    scores : tuple of float, optional
        Results of the caller's evaluation before and after.
    notes : sequence of str
        Additional notes.
    progress : callable, optional
        Called with the name of the step and the share of it that is done.

    Returns
    -------
    Comparison

    Raises
    ------
    ImportError
        If layers are timed and the runtime is not installed.

    Examples
    --------
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> result = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> comparison = report.compare(net, result, measure=False)
    >>> before, after = comparison.total("macs")
    >>> after <= before / 2
    True
    """
    about = result.plan.about
    batch = about.get("batch", 1) if batch is None else batch
    threads = about.get("threads") if threads is None else threads
    runtime = about.get("runtime", "lowrank")
    measurements = Measurements(runtime, batch, threads, in_network=True) if measure else None
    layers = [x for x in net.layers if x.name in result.plan.layers]
    rows = []
    for i, layer in enumerate(layers):
        if progress is not None:
            progress("measuring layers", i / len(layers))
        rows.append(_compare_layer(layer, result, (batch, threads, runtime), measurements))
    if progress is not None:
        progress("measuring layers", 1.0)
    machine = perfmodel.current()
    is_calibrated = machine.calibrated and runtime in machine.coefficients
    return Comparison(
        name=name,
        plan=result.plan,
        layers=tuple(rows),
        examples=_count_examples(net),
        batches=net.batches,
        batch=batch,
        threads=threads,
        runtime=runtime,
        model_error=machine.coefficients[runtime].error if is_calibrated else math.nan,
        scores=scores,
        notes=tuple(notes),
    )


def _compare_layer(
    layer: Layer,
    result: CompressedLayers,
    call: tuple[int, int | None, str],
    measurements: Measurements | None,
) -> LayerComparison:
    """Compare a layer with its chain; it is timed if `measurements` are given."""
    conv, chosen = layer.conv, result.plan.layers[layer.name]
    chain = result.chains.get(layer.name)
    before, after = (_costs(layer, f, call) for f in (conv, chain or conv))
    kernel_error = bound = None
    becomes = chosen.name
    if chain is not None and chain.family == "dense":
        becomes = "dense, new weights"
        kernel_error = chain.error(conv.to_dense())
    elif chain is not None:
        c = certificate(conv, chain)
        kernel_error, bound = c.error, c.bound
    n_values = math.prod(conv.input_shape(layer.input_size))
    n_values += math.prod(conv.output_shape(layer.input_size))
    is_small = call[0] * conv.dtype.itemsize * n_values <= MAX_BYTES
    is_fast = before["seconds"] <= MAX_PREDICTED_SECONDS * layer.passes
    times: list[CallTime] = []
    if measurements is not None and is_fast and is_small:
        times = _measure(layer, chain, measurements)
    errors = {row.name: row.error for row in result.rows}
    return LayerComparison(
        name=layer.name,
        dense=_shapes(conv),
        chain=_shapes(chain or conv),
        becomes=becomes,
        rank=() if chain is None else chain.rank,
        planned=None if chosen.is_dense else chosen.error,
        fitted=None if chain is None else errors.get(layer.name),
        kernel_error=kernel_error,
        kernel_bound=bound,
        before=before,
        after=after,
        measured=(times[0].seconds, times[-1].seconds) if times else None,
        front=result.plan.alternatives.get(layer.name, ()),
        spectra=spectra(conv),
        samples=tuple(t.samples for t in times),
    )


def _costs(layer: Layer, f: Factorization, call: tuple[int, int | None, str]) -> dict[str, float]:
    """Return the predicted seconds of a layer per call, and its costs per example."""
    pricing = Pricing(f, layer.input_size, *call, times=layer.passes, in_network=True)
    c = pricing.time(pricing.dense)
    return {axis: c.amount(axis) for axis in ("macs", "params", "bytes", "seconds")}


def _measure(
    layer: Layer, chain: Factorization | None, measurements: Measurements
) -> list[CallTime]:
    """Return the times before and after, in one alternation; none if an operator is missing."""
    shape = layer.conv.input_shape(layer.input_size)
    versions = [layer.conv.stages, *([] if chain is None else [chain.stages])]
    try:
        times = measurements.measure(versions, shape)
    except NotImplementedError:
        return []
    n = layer.passes
    return [CallTime(n * t.seconds, t.spread, tuple(n * s for s in t.samples)) for t in times]


def _efficiency(
    seconds_before: float, seconds_after: float, macs_before: float, macs_after: float
) -> float:
    if not (seconds_after and macs_after):
        return math.nan
    return speed_up_efficiency(seconds_before / seconds_after, macs_before / macs_after)


def _count_examples(net: CompressibleModel) -> int:
    """Return the number of calibration examples, by the inputs of the first layer."""
    if not net.batches or not net.layers:
        return 0
    first = net.layers[0].name
    return sum(len(batch[first][0]) for batch in net.inputs([first], {}) if batch[first])


def _shapes(f: Factorization) -> str:
    return " → ".join("×".join(map(str, s.weight.shape)) for s in f.stages)


def spectra(conv: Factorization) -> dict[str, Array]:
    """Return singular values of the unfoldings that families truncate.

    Parameters
    ----------
    conv : Factorization
        A dense convolution.

    Returns
    -------
    dict of str to ndarray
        Values divided by the largest, by the modes that form the rows of the unfolding.  Groups
        share a rank: their values are combined as the root of the sum of squares.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.report.comparison import spectra
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> {rows: len(values) for rows, values in spectra(conv).items()}
    {'outputs': 8, 'inputs': 6, 'inputs and height': 18, 'taps': 9}
    """
    w = conv.to_dense().astype(np.float64)
    w = w.reshape(conv.groups, -1, *w.shape[1:]) / (chain_algebra.max_abs(w) or 1.0)
    names = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}[conv.ndim]
    rows: dict[str, tuple[int, ...]] = {"outputs": (1,)}
    long = [axis for axis in range(3, w.ndim) if w.shape[axis] > 1]
    if long:  # otherwise the unfolding is the transpose of the first
        rows["inputs"] = (2,)
    many = w.shape[2] > 1
    if len(long) > 1:
        name = names[long[0] - 3]
        rows[f"inputs and {name}" if many else name] = (2, long[0])
    if long and many and w.shape[1] > 1:  # otherwise it equals another unfolding
        rows["taps"] = tuple(long)
    curves = {}
    for name, axes in rows.items():
        values = _singular_values(w, axes)
        if len(values) > 1:
            curves[name] = values / (values[0] or 1.0)
    return curves


def _singular_values(w: Array, rows: Sequence[int]) -> Array:
    """Return singular values by the smaller Gram matrix: half the digits suffice for a chart."""
    columns = [a for a in range(1, w.ndim) if a not in rows]
    m = w.transpose(0, *rows, *columns).reshape(len(w), math.prod(w.shape[a] for a in rows), -1)
    if m.shape[1] > m.shape[2]:
        m = m.swapaxes(1, 2)
    squares = np.linalg.eigvalsh(m @ m.swapaxes(1, 2))[:, ::-1]
    return np.asarray(np.sqrt(np.maximum(squares, 0.0).sum(axis=0)))
