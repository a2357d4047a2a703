"""Measured chains that correct the predicted times of a network's layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank.compress.latency import Timing
from lowrank.compress.model import Layer
from lowrank.compress.statistics import Progress
from lowrank.core.blas import one_blas_thread
from lowrank.families import FAMILIES
from lowrank.perfmodel.measurement import Measurements
from lowrank.selection.candidates import Candidate, Pricing, candidates
from lowrank.selection.measured import Reference, candidate_key, references_of, sample_variants


def reference_key(layer: Layer) -> Any:
    """Return what the times of a layer's chains depend on."""
    (stage,) = layer.conv.stages
    return (
        stage.weight.shape, stage.geometry, stage.groups, stage.transposed, layer.input_size,
    )  # fmt: skip


def measure_references(
    layers: Sequence[Layer],
    families: Iterable[str],
    timing: Timing,
    progress: Progress | None = None,
) -> dict[Any, list[Reference]]:
    """Measure some chains of every variant for layers of each shape.

    Parameters
    ----------
    layers : sequence of Layer
        Layers of a network.
    families : iterable of str
        Names from :data:`lowrank.FAMILIES`; those with slow sweeps are left out.
    timing : Timing
        Call that seconds are for.
    progress : callable, optional
        Called with ``"measuring variants"`` and the share that is done.

    Returns
    -------
    dict
        References by :func:`reference_key`.

    Notes
    -----
    Predictions may be off, for small layers in other libraries by half, and options are fitted
    only where they are predicted to be fast: without these measurements whole families would be
    left out.  Constraints of single layers do not count, since layers of a shape share the
    references.
    """
    fast = [name for name in families if FAMILIES[name].has_fast_sweep]
    measurements = Measurements(*timing.on, in_network=True)
    shapes = {reference_key(layer): layer for layer in layers}
    found = {}
    for i, (key, layer) in enumerate(shapes.items(), start=1):
        found[key] = _measure(layer, fast, timing, measurements)
        if progress is not None:
            progress("measuring variants", i / len(shapes))
    return found


def _measure(
    layer: Layer, families: Sequence[str], timing: Timing, measurements: Measurements
) -> list[Reference]:
    pricing = Pricing(layer.conv, layer.input_size, *timing, in_network=True)
    dense = pricing.time(pricing.dense)
    cheaper: list[Candidate] = []
    with one_blas_thread():
        for group in candidates(pricing, families):
            cheaper += [c for c in group if c.cost.macs < dense.cost.macs]
    some = [pricing.time(c) for c in sample_variants(cheaper, dense)]

    def seconds(chains: Sequence[Candidate]) -> list[float]:
        stages = [c.stages for c in chains]
        first, others = measurements.seconds(dense.stages, stages, pricing.shape)
        return [first, *others]

    def seconds_of_one(c: Candidate) -> float:
        try:
            return seconds([c])[1]
        except NotImplementedError:
            return math.inf

    try:
        times = seconds(some)
    except NotImplementedError:  # the runtime has no operator for a stage
        times = [*seconds([]), *map(seconds_of_one, some)]
    timed = [dense, *some]
    found = references_of(timed, dict(zip(map(candidate_key, timed), times)))
    # Without the arrays of this layer: others of its shape are corrected by them.
    return [Reference(r.candidate.summary(), r.quotient) for r in found]
