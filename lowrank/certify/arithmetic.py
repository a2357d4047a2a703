"""Bounds on the rounding errors of stages and chains, by direct sums and by fast algorithms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np

from lowrank._kernels.toom_cook import Matrix, matrices
from lowrank._typing import Array, trailing
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage
from lowrank.engine import Runner
from lowrank.engine.cpu import CpuPlan
from lowrank.factorization import Factorization

BLOCK = 1 << 22  # transformed weights in memory at a time


def rounding_bound(
    stage: Stage,
    dtype: Any = "float32",
    outputs: Sequence[int] | None = None,
    inputs: Array | None = None,
) -> Array:
    r"""Bound the rounding error of a stage per output channel, relative to the largest input.

    Parameters
    ----------
    stage : Stage
        Stage whose weights are exact.
    dtype : dtype
        Precision of the computation: float32 or float64.
    outputs : sequence of int, optional
        Outputs m of the Toom-Cook algorithm F(m, taps) along each axis, such as ``(4, 4)``;
        ignored along axes of one tap.  Default: direct sums.
    inputs : ndarray, shape (channels,), optional
        Bound on the magnitude of each input channel.  Default: ones.

    Returns
    -------
    ndarray, shape (channels,)
        Bound on the error of each output channel, without the bias.

    Raises
    ------
    ValueError
        If `outputs` has not one number per axis, or there is no such algorithm.

    Notes
    -----
    Let u be half of the precision's epsilon and :math:`\gamma_n = n u / (1 - n u)`.  A sum in which
    every term passes at most n roundings has an error of at most :math:`\gamma_n` times the sum of
    the terms' magnitudes [1]_, unless numbers over- or underflow.

    A direct sum of n products passes n roundings, one more where weights are rounded.
    A fast algorithm computes :math:`A^\top [U \odot (B^\top d)]` summed over C channels.  A term
    at position i passes :math:`b_i` roundings in the row i of :math:`B^\top`, C in the sum, and
    :math:`a_j` in the row j of :math:`A^\top`.  Rows count one addition less than they have
    nonzero entries, and one product unless all entries are powers of two; counts of several axes
    add, and matrices are Kronecker products.  With the rounded weights :math:`\hat U` and
    :math:`|x_c| \le X_c`, the error of an output at place j of a tile is at most

    .. math:: \sum_i |A^\top_{ji}| \sum_k |B^\top_{ik}| \sum_c X_c
       \bigl( \gamma_{b_i + C + a_j} |\hat U_{ci}| + |\hat U_{ci} - U_{ci}| \bigr),

    and the result is the largest over j.  U is computed in float64 and rounded once:
    :math:`|\hat U - U| \le u |U| + \gamma'_{t} |G| |g|` with :math:`\gamma'` of float64, and t the
    sum of the taps plus one over the axes.

    References
    ----------
    .. [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002,
       sections 3.1 and 3.4.
    .. [2] B. Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution
       for deep neural networks", ACM TOMS 46 (2020). :arxiv:`1803.10986`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.certify import rounding_bound
    >>> stage = Stage(np.ones((1, 1, 3)), Geometry.of(1))
    >>> u = 2.0**-24
    >>> [round(float(rounding_bound(stage, outputs=m)[0] / u)) for m in (None, [2], [4])]
    [9, 30, 330]
    """
    sizes = np.ones(stage.in_channels) if inputs is None else np.asarray(inputs, np.float64)
    if outputs is None:
        found = [_direct_bound(w, dtype, _split(stage, sizes)) for w in _phases(stage)]
    else:
        if len(outputs) != len(stage.kernel):
            axes = len(stage.kernel)
            raise ValueError(f"outputs must be one number per axis, {axes}, got {outputs!r}")
        found = [_fast_bound(w, outputs, dtype, _split(stage, sizes)) for w in _phases(stage)]
    return _join(stage, found)


def chain_rounding(f: Factorization, run: Runner) -> tuple[float, float]:
    r"""Bound the rounding errors of a planned chain, relative to the largest input.

    Parameters
    ----------
    f : Factorization
        Chain that is one convolution, with a border that its first stage along an axis pads.
    run : callable
        Plan of `f`, from :meth:`lowrank.Factorization.compile`.

    Returns
    -------
    direct, fast : float
        Bounds for the stages that run by direct sums, and for those that run by fast algorithms.
        The sum bounds the rounding error of an output sample over :math:`\max|x|`.

    Raises
    ------
    TypeError, ValueError
        If `run` is not a plan of `f` on the CPU.

    Notes
    -----
    The local error :math:`e_k` of each stage, :func:`rounding_bound` of its computed inputs, passes
    through the remaining stages, so its share of an output is at most
    :math:`\sum_c \|A_c\|_1 |e_{kc}|`, with the kernel :math:`A_c` from channel c to that output.
    """
    plan = _planned_on_cpu(f, run)
    before, after = chain_algebra.partial_kernels(f.stages, f.groups)
    if f.transposed:  # kernels of the adjoint, whose input is the output of the chain
        before, after = after[::-1], before[::-1]
    error = np.zeros(f.in_channels)
    totals = [np.zeros(f.out_channels), np.zeros(f.out_channels)]
    for number, stage in enumerate(f.stages):
        inputs = _magnitudes(before[number]).sum(axis=1) + error
        algorithms = plan.fast_algorithms(number)
        choices = [None, *{outputs[-f.ndim :] for outputs, _ in algorithms}]
        local = np.max([rounding_bound(stage, plan.dtype, m, inputs) for m in choices], axis=0)
        error = _passed_on(stage, error) + local
        reach = _magnitudes(after[number + 1]).reshape(f.groups, -1, f.out_channels // f.groups)
        share = np.einsum("gct,gc->gt", reach, local.reshape(f.groups, -1))
        totals[bool(algorithms)] += share.reshape(-1)
    direct, fast = (float(total.max()) for total in totals)
    return direct, fast


def stage_errors(f: Factorization, run: Runner) -> list[float]:
    """Return the predicted relative error of each stage of a plan of `f`, 0 for direct sums."""
    plan = _planned_on_cpu(f, run)
    numbers = range(len(f.stages))
    return [max((e for _, e in plan.fast_algorithms(n)), default=0.0) for n in numbers]


def _planned_on_cpu(f: Factorization, run: Runner) -> CpuPlan:
    """Return `run`; raise unless it is a plan of `f` on the CPU."""
    if not isinstance(run, CpuPlan):
        raise TypeError(f"run must be a plan on the CPU, got {type(run).__qualname__}")
    shapes = tuple(s.weight.shape for s in f.stages)
    if run.weight_shapes != shapes:
        raise ValueError(
            f"run must be a plan of f, whose stages have weights {shapes}, got one of "
            f"{run.weight_shapes}"
        )
    return run


def _phases(stage: Stage) -> Iterator[Array]:
    """Yield kernels (groups, out, in, *taps): the stage's, or those of each phase of its output."""
    weight = stage.weight.astype(np.float64)
    o, c = weight.shape[:2]
    weight = weight.reshape(stage.groups, o // stage.groups, c, *stage.kernel)
    if not stage.transposed:
        yield weight
        return
    g = stage.geometry
    for phase in itertools.product(*map(range, g.stride)):
        taps = [
            [t for t in reversed(range(k)) if (t * d - p) % s == 0]
            for k, d, s, p in zip(stage.kernel, g.dilation, g.stride, phase)
        ]
        if all(taps):
            yield weight.swapaxes(1, 2)[trailing(*np.ix_(*taps))]


def _split(stage: Stage, channels: Array) -> Array:
    """Return values of input channels as (outer, groups, in, inner)."""
    if not stage.transposed:
        channels = channels[stage.channel_permutation()]
    return channels.reshape(stage.outer, stage.groups, -1, stage.inner)


def _join(stage: Stage, phases: Sequence[Array]) -> Array:
    """Return the largest values over the phases, by output channel."""
    channels: Array = np.max(phases, axis=0).reshape(-1)
    return channels[np.argsort(stage.channel_permutation())] if stage.transposed else channels


def _summed(weight: Array, sizes: Array) -> Array:
    """Sum magnitudes (groups, out, in, n) times sizes: (outer, groups, out, inner, n)."""
    return np.einsum("gtcn,lgcr->lgtrn", weight, sizes, optimize=True)  # type: ignore[no-any-return]


def _passed_on(stage: Stage, errors: Array) -> Array:
    """Return the largest errors of the output for errors of the input channels."""
    sizes = _split(stage, errors)
    return _join(stage, [_summed(_flat(w), sizes) for w in _phases(stage)])


def _flat(weight: Array) -> Array:
    """Return the sums of magnitudes over the taps: (groups, out, in, 1)."""
    return np.asarray(np.abs(weight).reshape(*weight.shape[:3], -1).sum(axis=3, keepdims=True))


def _magnitudes(kernel: Array) -> Array:
    """Return the sums of magnitudes over the taps: (channels, columns)."""
    return np.abs(kernel).reshape(*kernel.shape[:2], -1).sum(axis=2)  # type: ignore[no-any-return]


def _direct_bound(weight: Array, dtype: Any, sizes: Array) -> Array:
    """Bound the error of direct sums: (outer, groups, out, inner)."""
    is_rounded = bool((weight.astype(dtype) != weight).any())
    roundings = np.array(math.prod(weight.shape[2:]) + is_rounded)
    return _gamma(roundings, _unit(dtype)) * _summed(_flat(weight), sizes)[..., 0]


def _fast_bound(weight: Array, outputs: Sequence[int], dtype: Any, sizes: Array) -> Array:
    """Bound the error of a fast algorithm: (outer, groups, out, inner)."""
    taps = weight.shape[3:]
    algorithms = [matrices(m if r > 1 else 1, r) for m, r in zip(outputs, taps)]
    per_output = weight[:, :1].size * math.prod(len(t.b) / r for t, r in zip(algorithms, taps))
    step = max(1, int(BLOCK / per_output))
    if weight.shape[1] > step:
        blocks = [weight[:, i : i + step] for i in range(0, weight.shape[1], step)]
        return np.concatenate([_fast_bound(w, outputs, dtype, sizes) for w in blocks], axis=2)
    exact, spread = weight, np.abs(weight)  # U, and |G| |g|
    for axis, t in enumerate(algorithms, start=3):
        g = np.array(t.g, np.float64)
        exact = np.moveaxis(np.tensordot(exact, g, (axis, 1)), -1, axis)
        spread = np.moveaxis(np.tensordot(spread, np.abs(g), (axis, 1)), -1, axis)
    exact, spread = (x.reshape(*weight.shape[:3], -1) for x in (exact, spread))
    rounded = np.abs(exact.astype(dtype)).astype(np.float64)
    steps = np.array(sum(taps) + len(taps))
    changed = _unit(dtype) * np.abs(exact) + _gamma(steps, _unit("float64")) * spread
    a, b = (
        reduce(np.kron, (np.abs(np.array(matrix, np.float64)) for matrix in nested))
        for nested in ([t.a for t in algorithms], [t.b for t in algorithms])
    )
    in_a, in_b = (
        reduce(lambda x, y: np.add.outer(x, y).reshape(-1), map(_roundings, nested))
        for nested in ([t.a for t in algorithms], [t.b for t in algorithms])
    )
    gain = a * b.sum(axis=1)  # (places in a tile, positions)
    gamma = _gamma(np.add.outer(in_a, in_b) + weight.shape[2], _unit(dtype))
    errors = _summed(rounded, sizes) @ (gain * gamma).T + _summed(changed, sizes) @ gain.T
    return errors.max(axis=-1)  # type: ignore[no-any-return]


def _roundings(matrix: Matrix) -> Array:
    """Return the number of roundings that a term passes in each row of a product."""
    counts = []
    for row in matrix:
        entries = [x for x in row if x]
        counts.append(len(entries) - 1 + (not all(map(_is_power_of_two, entries))))
    return np.array(counts)


def _is_power_of_two(x: Fraction) -> bool:
    n, d = abs(x.numerator), x.denominator
    return n & (n - 1) == 0 and d & (d - 1) == 0


def _unit(dtype: Any) -> float:
    """Return the largest relative error of a rounding to nearest."""
    return float(np.finfo(dtype).eps) / 2


def _gamma(n: Array, unit: float) -> Array:
    """Return n u / (1 - n u), infinity where that has no meaning."""
    return np.where(n * unit < 1, n * unit / np.maximum(1 - n * unit, unit), np.inf)
