"""Cost of a chain: MACs, parameters, memory traffic and peak memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank._typing import Ints
from lowrank.core.stage import Stage


@dataclass(frozen=True, slots=True)
class Cost:
    """Work and memory of one forward pass over one example.

    Attributes
    ----------
    macs : int
        Multiply-accumulate operations, including those on padding, as usual.
    params : int
        Stored weights and biases; replicated weights count once.
    traffic : int
        Array elements read and written if the stages run one after another.
    fused : int
        Array elements read and written if the stages are fused: input, weights and output, once.
    peak : int
        Largest sum of the input and output elements of one stage.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((128, 3, 3, 3)))
    >>> conv.cost((3, 7, 7)).macs
    86400
    """

    macs: int
    params: int
    traffic: int
    fused: int
    peak: int

    def share_of(self, dense: Cost) -> float:
        """Return the MACs as a share of another cost's.

        Parameters
        ----------
        dense : Cost
            Cost to compare with, such as that of the dense kernel.

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((64, 64, 3, 3)))
        >>> f = lowrank.channel_svd(conv, rank=16)
        >>> round(f.cost((56, 56)).share_of(conv.cost((56, 56))), 3)
        0.278
        """
        return self.macs / dense.macs


#: Fields of :class:`Cost`, along which candidates can be compared.
AXES = ("macs", "params", "traffic", "fused", "peak")


def chain_shapes(stages: Sequence[Stage], shape: Ints) -> tuple[Ints, ...]:
    """Return (channels, *spatial) of the input and of the output of each stage."""
    shapes = [shape]
    for stage in stages:
        shapes.append(stage.output_shape(shapes[-1]))
    return tuple(shapes)


def chain_cost(stages: Sequence[Stage], shape: Ints, bias: bool = False) -> Cost:
    """Return the cost of a chain on one example of `shape` = (channels, *spatial)."""
    costs = stage_costs(stages, shape)
    sizes = [math.prod(s) for s in chain_shapes(stages, shape)]
    biases = stages[-1].out_channels if bias else 0
    params = sum(c.params for c in costs) + biases
    return Cost(
        macs=sum(c.macs for c in costs),
        params=params,
        traffic=sum(c.traffic for c in costs) + biases,
        fused=sizes[0] + params + sizes[-1],
        peak=max(c.peak for c in costs),
    )


def stage_costs(stages: Sequence[Stage], shape: Ints) -> tuple[Cost, ...]:
    """Return the cost of each stage for a chain input of `shape` = (channels, *spatial)."""
    sizes = [math.prod(s) for s in chain_shapes(stages, shape)]
    costs = []
    for stage, size_in, size_out in zip(stages, sizes, sizes[1:]):
        # A transposed stage has the MACs of its adjoint: every tap at each input sample.
        samples = size_in if stage.transposed else size_out
        macs = samples * math.prod(stage.weight.shape[1:])
        traffic = size_in + stage.weight.size + size_out
        costs.append(Cost(macs, stage.weight.size, traffic, traffic, size_in + size_out))
    return tuple(costs)


def speed_up_efficiency(speed_up: float, mac_ratio: float) -> float:
    """Return log(speed-up) / log(MAC ratio): 1 where time falls as much as MACs.

    Parameters
    ----------
    speed_up : float
        Time of the dense kernel or network over that of the compressed one.
    mac_ratio : float
        MACs of the dense kernel or network over those of the compressed one.

    Returns
    -------
    float
        0 where nothing was gained, negative where the compressed one is slower.  1 if both ratios
        are 1, as for the dense kernel itself; NaN if no MACs were saved otherwise.

    Examples
    --------
    >>> from lowrank.core.cost import speed_up_efficiency
    >>> speed_up_efficiency(2.0, 4.0), speed_up_efficiency(1.0, 4.0), speed_up_efficiency(1.0, 1.0)
    (0.5, 0.0, 1.0)
    """
    if speed_up == mac_ratio == 1:
        return 1.0
    if not (speed_up > 0 and mac_ratio > 1):
        return math.nan
    return math.log(speed_up) / math.log(mac_ratio)
