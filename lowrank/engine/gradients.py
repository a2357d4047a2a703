"""Gradients of the weights of dense convolutions, on the C engine."""

from __future__ import annotations

from lowrank._kernels import _core
from lowrank._typing import Array
from lowrank.core.stage import Stage
from lowrank.engine.costs import COST_SECONDS
from lowrank.engine.machine import fork_join_seconds
from lowrank.engine.stages import on_three_axes

#: Elements of a weight, at most: the sums of each range of samples should stay in L2.
MAX_WEIGHTS = 1 << 18
#: Samples of the output, at least: all sums are read and written once per range of samples, and
#: those of all slices are added up at the end.
MIN_SAMPLES = 512


def has_gradient_kernel(stage: Stage, samples: int) -> bool:
    """Return whether :func:`weight_gradient` suits a stage, for this many samples of its output.

    Parameters
    ----------
    stage : Stage
        Stage that is not transposed.
    samples : int
        Samples of its output, of the whole batch.

    Returns
    -------
    bool
        Whether the stage is dense, without replication or shuffle, and its weight is small beside
        the samples.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.engine.gradients import has_gradient_kernel
    >>> (stage,) = lowrank.dense(np.ones((64, 32, 3, 3)), padding=1).stages
    >>> has_gradient_kernel(stage, 8 * 56 * 56), has_gradient_kernel(stage, 7 * 7)
    (True, False)
    """
    is_dense = stage.groups == stage.outer == stage.inner == 1 and min(stage.shuffle) == 1
    is_padded = min(min(pair) for pair in stage.geometry.padding) >= 0
    is_small = stage.weight.size <= MAX_WEIGHTS
    return is_dense and is_padded and is_small and samples >= MIN_SAMPLES


def weight_gradient(
    stage: Stage, x: Array, grad: Array, weight: Array, bias: Array | None, threads: int
) -> None:
    """Compute the gradients of the weight and of the bias of a dense stage.

    Parameters
    ----------
    stage : Stage
        Stage that is not transposed, with zero padding.
    x : ndarray, shape (batch, in_channels, \\*spatial)
        Its input, float32 or float64, of any strides.
    grad : ndarray, shape (batch, out_channels, \\*spatial)
        Gradient of its output.
    weight : ndarray, shape of the stage's weight
        Receives the gradient of the weight; C-contiguous.
    bias : ndarray, shape (out_channels,), or None
        Receives the sums of `grad`.
    threads : int
        Number of threads, at most.  Results do not depend on it.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.engine.gradients import weight_gradient
    >>> stage = Stage(np.ones((1, 1, 3), np.float32), Geometry.of(1))
    >>> x, grad = np.arange(4, dtype=np.float32), np.ones(2, np.float32)
    >>> weight, bias = np.empty((1, 1, 3), np.float32), np.empty(1, np.float32)
    >>> weight_gradient(stage, x[None, None], grad[None, None], weight, bias, threads=1)
    >>> weight.ravel(), bias
    (array([1., 3., 5.], dtype=float32), array([2.], dtype=float32))
    """
    g = stage.geometry
    macs = weight.size * grad.size // grad.shape[1]
    lanes = _core.block_limits(x.dtype.name).lanes
    _core.weight_gradient(
        _on_five_axes(x), _on_five_axes(grad), weight, bias, on_three_axes(stage.kernel, 1),
        on_three_axes(g.stride, 1), on_three_axes(g.dilation, 1),
        on_three_axes([before for before, _ in g.padding], 0), threads=threads,
        seconds=macs / lanes * COST_SECONDS, fork_join=fork_join_seconds(),
    )  # fmt: skip


def _on_five_axes(x: Array) -> Array:
    """Return a view of (batch, channels, *spatial) as (batch, channels, d, h, w)."""
    return x[(slice(None), slice(None), *(None,) * (5 - x.ndim))]
