"""Fits in a metric, for every family.

A family fits the whitened kernel in closed form.  Alternating least squares in the full metric,
one stage at a time, then corrects what whitening cannot express: moments that are no Kronecker
product, and modes that several stages have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array
from lowrank.core.arrays import power_of_two
from lowrank.core.chain_algebra import as_plain_chain
from lowrank.core.stage import Stage
from lowrank.core.tensor_network import contract, tensor_network
from lowrank.factorization import Factorization
from lowrank.families.contraction import Contraction
from lowrank.families.kernel import balance_norms
from lowrank.families.sweep_point import SweepPoint
from lowrank.families.weighted_als import alternate
from lowrank.metric import Metric, unroll
from lowrank.metric.whitening import Roles, Whitening, unwhiten, whiten

SWEEPS = 30  # largest number of alternating sweeps
TOLERANCE = 1e-3  # relative decrease of the squared error below which the sweeps stop
COARSE = 0.01  # relative error above which float32 tells fits apart
POLISH = 2  # float64 sweeps after a float32 fit

Sweep = Callable[[Factorization, str], Iterator[SweepPoint]]
Fit = Callable[[Factorization, Any, str | None], Factorization]


def sweep(
    sweep_white: Sweep, conv: Factorization, variant: str, metric: Metric
) -> Iterator[SweepPoint]:
    """Sweep a family over its ranks in a metric; see :meth:`Family.sweep`."""
    # The modes of the stages are the same for every rank: taken from the first point's shapes.
    sample = next(iter(sweep_white(_zero_kernel(conv), variant)), None)
    if sample is None:
        return
    metric_fit = MetricFit(conv, metric)
    whitening = whiten(tensor_network(sample.stages), conv, metric)
    is_exact = whitening.residual_metric(metric).is_white
    for point in sweep_white(metric_fit.whitened(whitening), variant):
        start = partial(metric_fit.unwhiten, point.build, whitening)
        yield point._replace(
            bound=point.bound if is_exact else 0.0,
            build=partial(metric_fit.refine_start, start),
            start=start,
        )


def fit(
    fit_white: Fit,
    conv: Factorization,
    rank: int | Sequence[int],
    variant: str | None,
    metric: Metric,
    refine: bool = True,
) -> Factorization:
    """Fit one rank of a family in a metric; see :meth:`Family.fit`."""
    metric_fit = MetricFit(conv, metric)
    thin = fit_white(_zero_kernel(conv), rank, variant)
    whitening = whiten(tensor_network(thin.stages), conv, metric)
    start = fit_white(metric_fit.whitened(whitening), rank, variant)
    closed_form = partial(metric_fit.unwhiten, lambda: start.stages, whitening)
    stages = metric_fit.refine_start(closed_form) if refine else closed_form()
    return replace(conv, stages=stages, family=start.family, variant=start.variant, rank=start.rank)


class Prepared(NamedTuple):
    """Quantities that all fits of one family and variant share.

    Attributes
    ----------
    whitening : Whitening
        Cholesky factors of modes.
    metric : Metric
        Residual metric of whitened kernels.
    target : ndarray
        Whitened kernel.
    """

    whitening: Whitening
    metric: Metric
    target: Array


class MetricFit:
    """Fits of a convolution in a metric, for chains of any family.

    Parameters
    ----------
    conv : Factorization
        One dense stage.
    metric : Metric
        Second moments of its inputs and output gradients.
    """

    def __init__(self, conv: Factorization, metric: Metric) -> None:
        self.conv, self.metric = conv, metric

    @property
    def target(self) -> Array:
        """Kernel that is approximated, (groups, out, in, \\*taps)."""
        return unroll(self.conv) if self.metric.target is None else self.metric.target

    @property
    def energy(self) -> float:
        """Energy of the target: that of the error of a zero kernel."""
        return self.metric.energy(self.target)

    def error(self, stages: Sequence[Stage]) -> float:
        """Return the relative error of a chain in the metric.

        Parameters
        ----------
        stages : sequence of Stage
            A chain in the place of the convolution.

        Returns
        -------
        float
        """
        n = tensor_network(stages)
        kernel = contract(n, [t.astype(np.float64) for t in n.tensors(stages)])
        missed, whole = self.metric.energy(self._unroll(kernel) - self.target), self.energy
        return math.sqrt(missed / whole) if whole else 0.0

    def prepare(self, stages: Sequence[Stage]) -> Prepared:
        """Prepare the quantities that the fits of one family and variant share.

        Parameters
        ----------
        stages : sequence of Stage
            A chain of the variant, of any rank.

        Returns
        -------
        Prepared
        """
        whitening = whiten(tensor_network(stages), self.conv, self.metric)
        residual = whitening.residual_metric(self.metric).normalized()
        return Prepared(whitening, residual, whitening.apply(self.target))

    def refine(
        self,
        stages: Sequence[Stage],
        sweeps: int = SWEEPS,
        tolerance: float = TOLERANCE,
        dtype: Any = np.float64,
        prepared: Prepared | None = None,
    ) -> tuple[tuple[Stage, ...], float]:
        """Fit the weights of a chain by alternating least squares in the full metric.

        Parameters
        ----------
        stages : sequence of Stage
            Any chain for the convolution; its weights are the start.
        sweeps : int
            Largest number of sweeps over the stages.
        tolerance : float
            Relative decrease of the squared error below which the sweeps stop.
        dtype : dtype
            Precision of the iteration; float32 takes half the time and tells errors above about
            0.003 apart.
        prepared : Prepared, optional
            From :meth:`prepare`, for several fits of one variant.

        Returns
        -------
        stages : tuple of Stage
            The chain with the fitted weights.
        error : float
            Its relative error; never larger than that of the start.
        """
        n = tensor_network(stages)
        whitening, metric, target = prepared or self.prepare(stages)
        roles = Roles.of(n, self.conv.transposed)
        tensors = [t.astype(np.float64) for t in n.tensors(stages)]
        tensors = unwhiten(n, roles, whitening, tensors, inverse=True)
        # Divided by the largest entries, so that squares are in the range of float32.
        unit = float(np.abs(target).max()) or 1.0
        scales = [power_of_two(float(np.abs(t).max())) for t in tensors]
        tensors = [t / scale for t, scale in zip(tensors, scales)]
        rest = unit / math.prod(scales)
        tensors[0] = tensors[0] / rest
        tensors, energy, whole = alternate(
            Contraction(n, self._unroll, self.conv.transposed),
            metric.astype(dtype),
            (target / unit).astype(dtype),
            [t.astype(dtype) for t in tensors],
            sweeps,
            tolerance,
        )
        tensors = [t.astype(np.float64) * scale for t, scale in zip(tensors, scales)]
        tensors[0] = tensors[0] * rest
        error = math.sqrt(max(energy, 0.0) / whole) if whole else 0.0
        return self._with_weights(stages, unwhiten(n, roles, whitening, tensors)), error

    def refine_start(self, start: Callable[[], tuple[Stage, ...]]) -> tuple[Stage, ...]:
        """Refine a closed-form start: in float32, then in float64 as far as that can improve it.

        Parameters
        ----------
        start : callable
            Makes the stages to start from.

        Returns
        -------
        tuple of Stage
        """
        stages, error = self.refine(start(), dtype=np.float32)
        return self.refine(stages, POLISH if error > COARSE else SWEEPS)[0]

    def whitened(self, whitening: Whitening) -> Factorization:
        """Return the convolution with the whitened target as its kernel.

        Parameters
        ----------
        whitening : Whitening
            Cholesky factors of modes.

        Returns
        -------
        Factorization
        """
        kernel = whitening.apply(self.target)
        if self.conv.transposed:
            kernel = kernel.swapaxes(1, 2)
        weight = np.ascontiguousarray(kernel).reshape(self.conv.stages[0].weight.shape)
        stage = replace(self.conv.stages[0], weight=weight)
        return replace(self.conv, stages=(stage,), bias=None)

    def unwhiten(
        self, build: Callable[[], tuple[Stage, ...]], whitening: Whitening
    ) -> tuple[Stage, ...]:
        """Return the chain for the original kernel from one that fits the whitened kernel.

        Parameters
        ----------
        build : callable
            Makes the stages that fit the whitened kernel.
        whitening : Whitening
            Cholesky factors of modes.

        Returns
        -------
        tuple of Stage
        """
        stages = build()
        n = tensor_network(stages)
        roles = Roles.of(n, self.conv.transposed)
        return self._with_weights(stages, unwhiten(n, roles, whitening, n.tensors(stages)))

    def _with_weights(self, stages: Sequence[Stage], tensors: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the stages with other weights, norm-balanced, in the dtype of the convolution."""
        chain = [
            replace(s, weight=t.reshape(s.weight.shape))
            for s, t in zip(as_plain_chain(stages), tensors)
        ]
        dtype = self.conv.dtype
        chain = [
            replace(s, weight=s.weight.astype(dtype, copy=False)) for s in balance_norms(chain)
        ]
        return tuple(s.adjoint() for s in reversed(chain)) if self.conv.transposed else tuple(chain)

    def _unroll(self, kernel: Array) -> Array:
        """Return a kernel with one axis per mode as (groups, out, in, \\*taps)."""
        shape, groups = self.conv.stages[0].weight.shape, self.conv.groups
        w = kernel.reshape(groups, shape[0] // groups, *shape[1:])
        return w.swapaxes(1, 2) if self.conv.transposed else w


def _zero_kernel(conv: Factorization) -> Factorization:
    """Return a convolution of the same shape with a zero weight, whose fits take no time."""
    stage = conv.stages[0]
    weight = np.zeros(stage.weight.shape, stage.weight.dtype)
    return replace(conv, stages=(replace(stage, weight=weight),))
