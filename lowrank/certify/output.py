"""Bounds on the output error of a chain: worst case, largest sample and mean square."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowrank._typing import Array, trailing
from lowrank.certify.arithmetic import chain_rounding
from lowrank.certify.common import energy, ratio, table
from lowrank.certify.norms import Norm, operator_norm, resolution_free
from lowrank.engine import Runner
from lowrank.factorization import Factorization
from lowrank.families.kernel import as_kernel


@dataclass(frozen=True, slots=True)
class OutputBound:
    r"""Errors of the output of a chain, as bounds and on average.

    All describe the convolution with E, the kernel of the convolution minus that of the chain,
    with the border of the convolution.

    Attributes
    ----------
    l2 : Norm
        :math:`\|e\|_2 \le` ``l2.value`` :math:`\|x\|_2` for the error e of the output, for
        inputs of the given size.
    l2_any_size : Norm
        Bound of the same kind for inputs of any size.
    relative : float
        ``l2`` over the operator norm of the kernel (or the quotient of two upper bounds).
    linf : float
        :math:`\max|e| \le` ``linf`` :math:`\max|x|`, where x includes a constant border.
    grey : float
        Largest error in grey levels, for samples between 0 and `levels`.
    rms : float
        RMS error of an output sample over all channels, for white input of variance 1 away from
        the border, or for inputs with a given second moment.
    rms_relative : float
        ``rms`` over the RMS of the output.
    direct, fast : float or None
        Bounds like ``linf`` on the rounding errors of a given plan of the chain: in stages that
        run by direct sums, and in those that run by fast algorithms.  The outputs of the plan
        differ from the exact convolution by at most ``linf + direct + fast``, times
        :math:`\max|x|`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import output_bound
    >>> conv = lowrank.dense(np.array([[[1.0, 2.0, 1.0]]]) / 4, padding=1)
    >>> f = lowrank.dense(np.array([[[1.0, 1.0, 1.0]]]) / 3, padding=1)
    >>> bound = output_bound(conv, f, (63,))
    >>> round(bound.l2.value, 4), round(bound.linf, 4), round(bound.grey, 1)
    (0.3333, 0.3333, 42.5)
    """

    l2: Norm
    l2_any_size: Norm
    relative: float
    linf: float
    grey: float
    rms: float
    rms_relative: float
    direct: float | None = None
    fast: float | None = None

    def __str__(self) -> str:
        rows = [
            ("l2", f"{self.l2.value:.4g}", f"times the norm of the input: {self.l2.method}"),
            ("l2, relative", f"{self.relative:.4g}", "over the norm of the convolution"),
            ("l2, any size", f"{self.l2_any_size.value:.4g}", self.l2_any_size.method),
            ("linf", f"{self.linf:.4g}", "times the largest input sample"),
            ("grey", f"{self.grey:.4g}", "largest error, for samples from 0 to `levels`"),
            ("rms", f"{self.rms:.4g}", "RMS error of an output sample"),
            ("rms, relative", f"{self.rms_relative:.4g}", "over the RMS of the output"),
        ]
        shares = ("direct", self.direct, "direct sums"), ("fast", self.fast, "fast algorithms")
        rows += [
            (f"linf, {name}", f"{bound:.2g}", f"rounding of stages by {how}, times the same")
            for name, bound, how in shares
            if bound is not None
        ]
        if self.l2.offset:
            rows.insert(1, ("offset", f"{self.l2.offset:.4g}", "added by the constant border"))
        return table(rows)


def output_bound(
    conv: Factorization,
    f: Factorization,
    input_shape: Sequence[int],
    *,
    levels: float = 255.0,
    second_moment: Array | None = None,
    run: Runner | None = None,
) -> OutputBound:
    r"""Bound the error of a chain at its output.

    Parameters
    ----------
    conv : Factorization
        Dense convolution.
    f : Factorization
        Chain whose kernel has the shape and geometry of `conv`.
    input_shape : sequence of int
        (channels, \*spatial), or the spatial size alone.
    levels : float
        Largest sample of an image, for ``grey``; the smallest is 0.
    second_moment : ndarray, shape (groups, in \* taps, in \* taps), optional
        Uncentred second moment of the input patches, such as ``input_moment`` of
        ``lowrank.metric.Moments(conv).metric(damping=0.0)``; for one group also without the first
        axis.  Default: white input of variance 1.
    run : callable, optional
        Plan of `f` on the CPU, from :meth:`lowrank.Factorization.compile`, whose rounding errors
        are bounded, too: see :func:`rounding_bound`.

    Returns
    -------
    OutputBound
        Errors without the bias, which `conv` and `f` share.

    Raises
    ------
    ValueError
        If `f` is not one convolution of the shape and geometry of `conv`, or the input,
        `second_moment` or `run` does not fit.
    TypeError
        If `run` is not a plan on the CPU.

    Notes
    -----
    With :math:`E = W - \hat W`, rows t for output channels, and C the second moment of a patch,

    .. math:: \|e\|_2 \le \|E\|_{op} \|x\|_2, \quad
       \max|e| \le \max_t \sum_j |E_{tj}| \, \max|x|, \quad
       \mathbb E\,|e|^2 = \operatorname{tr}(E C E^\top),

    the last summed over channels; ``rms`` is the root of its mean over them.  For samples from
    0 to L an error is between :math:`-L \sum_j E^-_{tj}` and :math:`L \sum_j E^+_{tj}`.  Both are
    attained by an input at least as large as the kernel.  For a transposed convolution with a
    stride each phase of the output sees different taps, and rows are (t, phase).

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import output_bound
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)), padding=1)
    >>> f = lowrank.spatial_svd(conv, rank=6)
    >>> bound = output_bound(conv, f, (32, 32))
    >>> bool(np.isclose(bound.rms_relative, f.error(conv.to_dense())))
    True
    >>> bound.rms_relative < bound.relative
    True
    >>> bound = output_bound(conv, f, (32, 32), run=f.compile((32, 32), "float32"))
    >>> bound.direct + bound.fast < 1e-3 * bound.linf
    True
    """
    as_kernel(conv)
    _check_alike(conv, f, input_shape)
    if not 0 < levels < math.inf:
        raise ValueError(f"levels must be above 0, got {levels!r}")
    kernel = conv.to_dense().astype(np.float64)
    error = kernel - f.to_dense()
    error_conv = replace(conv, stages=(replace(conv.stages[0], weight=error),), bias=None)
    l2, kernel_norm = operator_norm(error_conv, input_shape), operator_norm(conv, input_shape)
    rows = _output_rows(conv, error)
    plus, minus = np.maximum(rows, 0).sum(axis=1), np.maximum(-rows, 0).sum(axis=1)
    low, high = 0.0, float(levels)
    if conv.geometry.padding_mode == "constant":
        low, high = min(low, conv.geometry.value), max(high, conv.geometry.value)
    grey = max((high * plus - low * minus).max(), (high * minus - low * plus).max())
    if second_moment is None:
        error_power, kernel_power = energy(error), energy(kernel)
    else:
        c = _checked_moment(conv, second_moment)
        error_power, kernel_power = _power(conv, error, c), _power(conv, kernel, c)
    direct, fast = (None, None) if run is None else chain_rounding(f, run)
    return OutputBound(
        l2,
        resolution_free(error_conv),
        ratio(l2.value, kernel_norm.value),
        float((plus + minus).max()),
        float(grey),
        math.sqrt(error_power / len(rows)),
        math.sqrt(ratio(error_power, kernel_power)),
        direct,
        fast,
    )


def _check_alike(conv: Factorization, f: Factorization, input_shape: Sequence[int]) -> None:
    """Raise unless `f` is a convolution with the geometry of `conv`, borders included."""
    if f.geometry != conv.geometry or f.groups != conv.groups or f.transposed != conv.transposed:
        raise ValueError(f"f must have the geometry and groups of {conv!r}, got {f!r}")
    shape = conv.to_dense().shape
    if f.to_dense().shape != shape or f.output_shape(input_shape) != conv.output_shape(input_shape):
        raise ValueError(f"f must have a kernel of shape {shape} and the same output, got {f!r}")
    for axis in range(f.ndim):
        has_taps = False
        for s in f.stages[::-1] if f.transposed else f.stages:
            g = s.geometry
            if any(g.padding[axis]) and (has_taps or g.padding_mode != f.geometry.padding_mode):
                raise ValueError(
                    f"f must pad axis {axis} once, as {f.geometry.padding_mode}, before all taps "
                    f"along it (else it is not one convolution), got {f!r}"
                )
            has_taps |= s.kernel[axis] > 1 or g.stride[axis] > 1


def _output_rows(conv: Factorization, weight: Array) -> Array:
    """Return the taps of each output sample: (channels * phases, products per sample)."""
    if not conv.transposed:
        return weight.reshape(len(weight), -1)
    geometry, taps = conv.geometry, weight.shape[2:]
    grouped = weight.reshape(conv.groups, -1, *weight.shape[1:])
    rows = []
    for phase in itertools.product(*map(range, geometry.stride)):
        phase_taps = [
            [t for t in range(k) if t * d % s == p]
            for k, d, s, p in zip(taps, geometry.dilation, geometry.stride, phase)
        ]
        part = grouped[trailing(*np.ix_(*phase_taps))]
        rows.append(part.swapaxes(1, 2).reshape(conv.groups * grouped.shape[2], -1))
    widest = max(r.shape[1] for r in rows)
    return np.vstack([np.pad(r, ((0, 0), (0, widest - r.shape[1]))) for r in rows])


def _checked_moment(conv: Factorization, moment: Array) -> Array:
    """Return `moment` as (groups, in * taps, in * taps)."""
    if conv.transposed:
        raise ValueError("second_moment must be None for a transposed convolution")
    n = math.prod(conv.stages[0].weight.shape[1:])
    shape, moment = (conv.groups, n, n), np.asarray(moment)
    if moment.shape != shape and not (conv.groups == 1 and moment.shape == shape[1:]):
        raise ValueError(f"second_moment must have shape {shape}, got {moment.shape}")
    return moment.reshape(shape)


def _power(conv: Factorization, weight: Array, moment: Array) -> float:
    """Return ``tr(W C W')``, summed over groups."""
    rows = weight.reshape(conv.groups, -1, moment.shape[-1])
    return max(float(np.einsum("gti,gti->", rows @ moment, rows)), 0.0)
