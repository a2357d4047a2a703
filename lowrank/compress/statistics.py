"""What the layers of a network get, and what their outputs do: measured once, for any budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowrank.compress import reconstruct
from lowrank.compress.model import Layer, Net
from lowrank.metric import Metric, Moments, white

MEMORY = 1 << 30  # bytes of second moments that are held at a time, before a further pass

Progress = Callable[[str, float], object]


class Measured:
    """Metrics of the layers of a network on its calibration data, each measured once.

    Plans of several budgets for one network can share it.

    Parameters
    ----------
    net : Net
        With calibration data, or without: then metrics are those of white noise.
    gradients : bool
        Whether outputs are weighed by what they do to those of the network, where it can be
        differentiated.
    seed : int
        For every random choice.

    Examples
    --------
    >>> from lowrank import demo, compress
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> measured = compress.Measured(net)
    >>> half, third = (compress.make_plan(net, macs=m, measured=measured) for m in (1 / 2, 1 / 3))
    >>> half.loss <= third.loss
    True
    """

    def __init__(self, net: Net, *, gradients: bool = True, seed: int = 0) -> None:
        self.net, self.gradients, self.seed = net, gradients, seed
        self._found: dict[str, Metric] = {}

    def of(
        self, layers: Sequence[Layer], progress: Progress | None = None
    ) -> tuple[dict[str, Metric], bool]:
        """Metrics of these layers.

        Parameters
        ----------
        layers : sequence of Layer
            Of the network.
        progress : callable, optional
            Called with ``"moments"`` and the share of layers that is done.

        Returns
        -------
        metrics : dict of str to Metric
            By layer.
        absolute : bool
            Whether all layers so far weigh outputs by gradients of one loss, so that their errors
            are in one unit.  Where one cannot, gains of batch norms weigh those of all.

        Raises
        ------
        ValueError
            If a layer gets or gives what is not finite.
        """
        if not self.net.batches:
            return {x.name: white_metric(x) for x in layers}, False
        missing = [x for x in layers if x.name not in self._found]
        done = 0
        for part in _parts(missing):
            names = [x.name for x in part]

            def said(share: float, done: int = done, many: int = len(part)) -> None:
                if progress is not None:
                    progress("moments", (done + share * many) / len(missing))

            moments = reconstruct.moments(self.net, names, seed=self.seed, progress=said)
            if self.gradients:
                for sample in self.net.gradients(names, self.seed) or ():
                    for name in names:
                        for g in sample.get(name, ()):
                            with reconstruct.named(name):
                                moments[name].add_gradients(g)
            self._found |= {name: moments[name].metric() for name in names}
            done += len(part)
        found = {x.name: self._found[x.name] for x in layers}
        # Where a layer has no gradient, losses would not be in one unit: then nobody's count.
        absolute = all(m.gradient_moment is not None for m in self._found.values())
        if not absolute:
            found = {x.name: found[x.name].with_gradient_moment(reconstruct.gains(x)) for x in layers}
        return found, absolute


def white_metric(layer: Layer) -> Metric:
    """Nothing is known of the inputs; of the outputs, the gain of a batch norm.

    Parameters
    ----------
    layer : Layer

    Returns
    -------
    Metric

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.compress import Layer
    >>> from lowrank.compress.statistics import white_metric
    >>> white_metric(Layer("conv", lowrank.dense(np.ones((8, 4, 3, 3))), (16, 16))).channels.shape
    (1, 4, 4)
    """
    weight, conv = layer.conv.stages[0].weight, layer.conv
    ins = len(weight) // conv.groups if conv.transposed else weight.shape[1]
    metric = white(conv.groups, (ins, *weight.shape[2:]))
    return metric.with_gradient_moment(reconstruct.gains(layer))


def _parts(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers whose second moments fit into memory together."""
    parts: list[list[Layer]] = []
    used = math.inf
    for layer in layers:
        m = Moments(layer.conv)
        n = m.ins * math.prod(m.kernel)
        size = 8 * layer.conv.groups * (n * n if m.full else m.ins**2)
        if used + size > MEMORY:
            parts.append([])
            used = 0.0
        parts[-1].append(layer)
        used += size
    return parts
