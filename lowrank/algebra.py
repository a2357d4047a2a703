"""What chains are, as linear algebra: composition, norms, spectra of matricisations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lowrank._typing import Array, Ints, trailing
from lowrank.geometry import Geometry
from lowrank.stage import Stage


def compose(stages: Sequence[Stage], groups: int = 1) -> Array:
    r"""Multiply a chain of stages out into the one dense kernel that it stands for.

    Tap ``q`` of the second of two stages sits at ``stride_1 * dilation_2 * q``, so the
    kernel of a chain is a sum over its stages' taps and never needs a block-diagonal matrix.

    Parameters
    ----------
    stages : sequence of Stage
        All of them plain or all of them transposed.
    groups : int
        Groups of the whole chain; only the blocks on its diagonal are returned.

    Returns
    -------
    ndarray, shape (out, in // groups, \*taps)
        Taps one input sample apart.  For transposed stages (in, out // groups, \*taps).

    Raises
    ------
    ValueError
        If plain and transposed stages are mixed: no single kernel does that.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.algebra import compose
    >>> g = Geometry.of(1)
    >>> compose([Stage(np.array([[[1.0, 1.0]]]), g), Stage(np.array([[[1.0, 1.0]]]), g)])
    array([[[1., 2., 1.]]])
    """
    if len({s.transposed for s in stages}) > 1:
        raise ValueError("a chain that mixes plain and transposed stages has no single kernel")
    if stages[0].transposed:
        stages = [s.adjoint() for s in reversed(stages)]
    first = stages[0]
    per_group = first.in_channels // groups
    ndim = first.geometry.ndim
    dtype = np.result_type(*(s.weight for s in stages))
    kernel = np.tile(np.eye(per_group, dtype=dtype), (groups, 1)).reshape(
        first.in_channels, per_group, *(1,) * ndim
    )
    stride: Ints = (1,) * ndim
    for stage in stages:
        kernel = _apply(stage, kernel, stride)
        stride = tuple(a * b for a, b in zip(stride, stage.geometry.stride))
    return kernel


def _apply(stage: Stage, kernel: Array, stride: Ints) -> Array:
    """Apply `stage` to the output channels of `kernel`, which has been strided so far."""
    g, (o, c) = stage.groups, stage.weight.shape[:2]
    inner, taps = kernel.shape[1], kernel.shape[2:]
    step = tuple(s * d for s, d in zip(stride, stage.geometry.dilation))
    grown = tuple(t + s * (k - 1) for t, s, k in zip(taps, step, stage.kernel))
    # One matrix product a tap: (o, c) times (c, everything else).
    x = kernel[stage.source()].reshape(stage.left, g, c, stage.right, inner * math.prod(taps))
    x = x.transpose(1, 2, 0, 3, 4).reshape(g, c, -1)
    w = stage.weight.reshape(g, o // g, c, *stage.kernel)
    out = np.zeros((g, o // g, stage.left, stage.right, inner, *grown), kernel.dtype)
    for tap in itertools.product(*map(range, stage.kernel)):
        at = [slice(i * s, i * s + t) for i, s, t in zip(tap, step, taps)]
        y = w[trailing(*tap)] @ x
        out[trailing(*at)] += y.reshape(g, o // g, stage.left, stage.right, inner, *taps)
    out = np.moveaxis(out, 2, 0)
    return out.reshape(stage.out_channels, inner, *grown)


def block_diagonal(stages: Sequence[Stage], groups: int) -> bool:
    """Whether a chain keeps `groups` equal blocks of channels apart, in order."""
    if stages[0].transposed:
        stages = [s.adjoint() for s in reversed(stages)]
    block: Array = np.repeat(np.arange(groups), stages[0].inner[1] // groups)
    for s in stages:
        if s.transposed:
            return False  # a chain that goes both ways is no one kernel
        block = block[s.source()].reshape(s.left, s.groups, -1, s.right)
        if (block != block[:, :, :1]).any():
            return False
        block = np.repeat(block[:, :, :1], s.weight.shape[0] // s.groups, 2).reshape(-1)
    return bool((block == np.repeat(np.arange(groups), len(block) // groups)).all())


def chain_geometry(stages: Sequence[Stage]) -> Geometry:
    """Geometry of the one convolution that a plain chain stands for.

    Strides multiply, paddings add in samples of the chain's input.  A dilation survives on
    an axis where exactly one stage has taps; elsewhere the composed taps are one sample apart.
    """
    geometries = [s.geometry for s in stages]
    ndim = geometries[0].ndim
    modes = {g.padding_mode for g in geometries if any(map(any, g.padding))}
    stride, dilation, pads = [1] * ndim, [1] * ndim, [(0, 0)] * ndim
    for axis in range(ndim):
        alone = sum(s.kernel[axis] > 1 for s in stages) == 1
        for stage, g in zip(stages, geometries):
            if alone and stage.kernel[axis] > 1:
                dilation[axis] = stride[axis] * g.dilation[axis]
            (a, b), (before, after) = pads[axis], g.padding[axis]
            pads[axis] = (a + stride[axis] * before, b + stride[axis] * after)
            stride[axis] *= g.stride[axis]
    return Geometry(
        tuple(stride),
        tuple(pads),
        tuple(dilation),
        modes.pop() if len(modes) == 1 else "zeros",
        geometries[0].value,
        tuple(map(max, zip(*(g.output_padding for g in geometries)))),
    )


def relative_error(actual: Array, expected: Array) -> float:
    r"""Relative Frobenius distance ``||actual - expected|| / ||expected||``.

    Both are divided by ``max|expected|`` before anything is squared, so kernels of size
    1e-30 and 1e30 are ordinary.  A zero kernel is approximated exactly (0.0) or not (inf).
    """
    if actual.shape != expected.shape:
        raise ValueError(f"weights of shape {actual.shape} and {expected.shape} do not compare")
    scale = magnitude(expected)
    if scale == 0:
        return math.inf if np.any(actual) else 0.0
    a, b = actual.astype(np.float64) / scale, expected.astype(np.float64) / scale
    return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))


def magnitude(weight: Array) -> float:
    """``max|weight|``: the scale that everything is divided by before it is squared."""
    return float(np.abs(weight).max(initial=0.0))


def tails(weight: Array, rows: Sequence[int], batch: Sequence[int] = ()) -> Array:
    r"""Distance of `weight` from the tensors whose matricisation has each rank.

    Parameters
    ----------
    weight : ndarray
        Any tensor.
    rows : sequence of int
        Axes that make the rows of the matricisation; the others make its columns.
    batch : sequence of int
        Axes that enumerate separate matrices, all cut at the same rank.

    Returns
    -------
    ndarray, shape (min(rows, columns) + 1,)
        ``tails[R]`` is ``sqrt(sum_{i > R} sigma_i^2)``, relative to ``||weight||``: by
        Eckart and Young no tensor whose matricisation has rank R is nearer.  Zeros for a
        zero tensor.
    """
    columns = [a for a in range(weight.ndim) if a not in rows and a not in batch]
    b, m, n = (math.prod(weight.shape[a] for a in axes) for axes in (batch, rows, columns))
    matrices = weight.transpose(*batch, *rows, *columns).reshape(b, m, n).astype(np.float64)
    matrices /= magnitude(weight) or 1.0
    return tails_of(np.linalg.svd(matrices, compute_uv=False))


def tails_of(singular_values: Array) -> Array:
    """Relative tail norms of singular values, (..., n), cut at one rank in every batch."""
    energy = np.square(singular_values).reshape(-1, singular_values.shape[-1]).sum(axis=0)
    tail: Array = np.sqrt(np.append(np.cumsum(energy[::-1])[::-1], 0.0))
    return tail / (tail[0] or 1.0)
