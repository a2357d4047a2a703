"""What a chain costs: multiply-adds, parameters, memory traffic and peak memory."""

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
        Multiply-adds.  Taps that fall on the padding are counted, as is usual.
    params : int
        Numbers that are stored; tied copies count once.
    traffic : int
        Array elements read and written when every stage runs on its own.
    fused : int
        The same when the chain runs band by band: input, weights and output, once each.
    peak : int
        Largest input plus output of any one stage, in elements.

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
        """Multiply-adds as a share of those of another cost.

        Parameters
        ----------
        dense : Cost
            Such as that of the dense kernel.

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


#: Axes that a choice can be made along: fields of :class:`Cost`.
AXES = ("macs", "params", "traffic", "fused", "peak")


def chain_shapes(stages: Sequence[Stage], shape: Ints) -> tuple[Ints, ...]:
    """(channels, *spatial) of the input and of what each stage gives, in order."""
    shapes = [shape]
    for stage in stages:
        shapes.append(stage.output_shape(shapes[-1]))
    return tuple(shapes)


def chain_cost(stages: Sequence[Stage], shape: Ints, bias: bool = False) -> Cost:
    """Cost of running `stages` one after another on an input of `shape` = (channels, *spatial)."""
    each = stage_costs(stages, shape)
    sizes = [math.prod(s) for s in chain_shapes(stages, shape)]
    biases = stages[-1].out_channels if bias else 0
    params = sum(c.params for c in each) + biases
    return Cost(
        macs=sum(c.macs for c in each),
        params=params,
        traffic=sum(c.traffic for c in each) + biases,
        fused=sizes[0] + params + sizes[-1],
        peak=max(c.peak for c in each),
    )


def stage_costs(stages: Sequence[Stage], shape: Ints) -> tuple[Cost, ...]:
    """Cost of each stage alone, in order; `shape` is the (channels, *spatial) of the input."""
    sizes = [math.prod(s) for s in chain_shapes(stages, shape)]
    found = []
    for stage, size_in, size_out in zip(stages, sizes, sizes[1:]):
        # A transposed stage does the work of its adjoint: every tap of each input sample.
        worked = size_in if stage.transposed else size_out
        macs = worked * math.prod(stage.weight.shape[1:])
        traffic = size_in + stage.weight.size + size_out
        found.append(Cost(macs, stage.weight.size, traffic, traffic, size_in + size_out))
    return tuple(found)
