"""Layer statistics: the metric of every layer on the calibration data, computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lowrank._typing import Array
from lowrank.compress import reconstruct
from lowrank.compress.model import CompressibleModel, Layer
from lowrank.metric import Metric, Moments, white
from lowrank.metric.moments import WIDEST

MEMORY = 1 << 30  # bytes of second moments per pass over the data
SAMPLES = 1 << 26  # bytes of inputs, or of outputs, of one batch per pass
# Weight of a patch without a gradient, in units of the mean weight.  With 0.1, few patches decide
# where gradients differ much: the squared error of CREPE's outputs grows by 25 %, with 1 by 3 %.
FLOOR = 1.0

#: Weights of a layer's output positions: one array per call, batch by batch.
Weights = Sequence[tuple[Array, ...]]

Progress = Callable[[str, float], object]


class LayerStatistics:
    """Metrics of the layers of a model on its calibration data, each computed once.

    Plans of several budgets for one model can share them.

    Parameters
    ----------
    model : CompressibleModel
        Trained model; without calibration data, metrics are those of white noise.
    gradients : bool
        Whether outputs are weighted by the gradient of the loss, where the model can be
        differentiated.
    seed : int
        Seed of every random choice.

    Notes
    -----
    A pass over the data serves as many layers as have inputs, or outputs, of 64 MiB in one batch,
    one at least.  Memory besides the model, its data and a run of it stays below

    - 320 MiB, or five times the inputs or outputs of the largest layer in one batch,
    - 24 bytes per entry of all second moments, (in channels * taps)^2 per group of a layer, and
    - 8 bytes per calibration example and output position of all layers.

    Examples
    --------
    >>> from lowrank import compress, demo
    >>> from lowrank.interop.weights import WeightsModel
    >>> model = WeightsModel(demo.WEIGHTS)
    >>> statistics = compress.LayerStatistics(model)
    >>> half, third = (
    ...     compress.make_plan(model, macs=m, statistics=statistics) for m in (1 / 2, 1 / 3)
    ... )
    >>> half.loss <= third.loss
    True
    """

    def __init__(self, model: CompressibleModel, *, gradients: bool = True, seed: int = 0) -> None:
        self.model, self.gradients, self.seed = model, gradients, seed
        self._metrics: dict[str, Metric] = {}
        self._weights: dict[str, Weights] = {}

    @property
    def without_gradient(self) -> list[str]:
        """Names of the layers that no gradient reaches, if it reaches others."""
        missing = [k for k, m in self._metrics.items() if m.gradient_moment is None]
        return missing if len(missing) < len(self._metrics) else []

    def weights(self, name: str) -> Weights | None:
        """Return the weights of the output positions of a layer whose metric was computed.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        sequence of tuple of ndarray, or None
            Squared norms of the gradients per position, in units of their mean, with a floor; None
            without gradients.
        """
        return self._weights.get(name)

    def metrics(
        self, layers: Sequence[Layer], progress: Progress | None = None
    ) -> tuple[dict[str, Metric], bool]:
        """Return the metrics of some layers.

        Parameters
        ----------
        layers : sequence of Layer
            Layers of the model.
        progress : callable, optional
            Called with ``"moments"`` and the share of layers that is done.

        Returns
        -------
        metrics : dict of str to Metric
            By layer.
        absolute : bool
            Whether all layers so far weight outputs by gradients of one loss, so that their losses
            are in one unit.  If one layer cannot, batch-norm gains weight the outputs of all.

        Raises
        ------
        ValueError
            If an input or output of a layer is not finite.
        """
        if not self.model.batches:
            return {x.name: white_metric(x) for x in layers}, False
        missing = [x for x in layers if x.name not in self._metrics]
        done = 0
        batch = int(getattr(self.model, "batch_size", 1))
        for part in _split_by_memory(missing, batch):

            def report(share: float, done: int = done, many: int = len(part)) -> None:
                if progress is not None:
                    progress("moments", (done + share * many) / len(missing))

            moments = {x.name: reconstruct.new_moments(x, seed=self.seed) for x in part}
            self._add_gradients(moments)
            reconstruct.add_inputs(moments, self.model, weights=self._weights, progress=report)
            self._metrics |= {name: m.metric() for name, m in moments.items()}
            done += len(part)
        metrics = {x.name: self._metrics[x.name] for x in layers}
        # Ignore gradients unless every layer has them: the losses would not be comparable.
        absolute = all(m.gradient_moment is not None for m in self._metrics.values())
        if not absolute:
            metrics = {
                x.name: metrics[x.name].with_gradient_moment(reconstruct.gain_moment(x))
                for x in layers
            }
        return metrics, absolute

    def _add_gradients(self, moments: Mapping[str, Moments]) -> None:
        """Add the gradients of layers to their moments, and keep the weights of positions."""
        found: dict[str, list[tuple[Array, ...]]] = {name: [] for name in moments}
        batches = self.model.gradients(list(moments), self.seed) if self.gradients else None
        for sample in batches or ():
            for name, m in moments.items():
                for g in sample.get(name, ()):
                    with reconstruct.naming(name):
                        m.add_gradients(g)
                squares = (np.square(g, dtype=np.float64) for g in sample.get(name, ()))
                found[name].append(tuple(s.sum(axis=1) for s in squares))
        for name, kept in found.items():
            if kept and all(kept):
                total, count = (sum(f(w) for ws in kept for w in ws) for f in (np.sum, np.size))
                mean = total / count or 1.0  # divided by it, so that single precision holds them
                self._weights[name] = [
                    tuple((w / mean + FLOOR).astype(np.float32) for w in ws) for ws in kept
                ]


def white_metric(layer: Layer) -> Metric:
    """Return the metric of white-noise inputs, outputs weighted by the gains of a batch norm.

    Parameters
    ----------
    layer : Layer
        Layer of a model.

    Returns
    -------
    Metric

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.compress import Layer
    >>> from lowrank.compress.statistics import white_metric
    >>> layer = Layer("conv", lowrank.dense(np.ones((8, 4, 3, 3))), (16, 16))
    >>> white_metric(layer).channel_factor.shape
    (1, 4, 4)
    """
    weight, conv = layer.conv.stages[0].weight, layer.conv
    ins = len(weight) // conv.groups if conv.transposed else weight.shape[1]
    metric = white(conv.groups, (ins, *weight.shape[2:]))
    return metric.with_gradient_moment(reconstruct.gain_moment(layer))


def _split_by_memory(layers: Sequence[Layer], batch: int) -> list[list[Layer]]:
    """Split layers into runs whose moments and samples of a batch fit into memory together."""
    parts: list[list[Layer]] = []
    moments = samples = math.inf
    for layer in layers:
        conv = layer.conv
        weight = conv.stages[0].weight
        ins = len(weight) // conv.groups if conv.transposed else weight.shape[1]
        n = ins * math.prod(weight.shape[2:])
        size = 8 * conv.groups * (n * n if n <= WIDEST else ins**2)
        shapes = (conv.in_channels, *layer.input_size), conv.output_shape(layer.input_size)
        largest = 4 * batch * layer.times * max(map(math.prod, shapes))
        if moments + size > MEMORY or samples + largest > SAMPLES:
            parts.append([])
            moments = samples = 0.0
        parts[-1].append(layer)
        moments, samples = moments + size, samples + largest
    return parts
