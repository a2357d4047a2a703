"""What chains are, as linear algebra: composition, norms, spectra of matricisations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import linalg

from lowrank._typing import Array, Ints, trailing
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage


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
    >>> from lowrank.core.chain_algebra import compose
    >>> g = Geometry.of(1)
    >>> compose([Stage(np.array([[[1.0, 1.0]]]), g), Stage(np.array([[[1.0, 1.0]]]), g)])
    array([[[1., 2., 1.]]])
    """
    stages = as_plain_chain(stages)
    kernel = _identity(
        stages[0].in_channels,
        groups,
        stages[0].geometry.ndim,
        np.result_type(*(s.weight for s in stages)),
    )
    stride: Ints = (1,) * stages[0].geometry.ndim
    for stage in stages:
        kernel = _apply(stage, kernel, stride)
        stride = tuple(a * b for a, b in zip(stride, stage.geometry.stride))
    return kernel


def as_plain_chain(stages: Sequence[Stage]) -> Sequence[Stage]:
    """The plain chain with this kernel: that of a transposed one is its adjoint's."""
    if len({s.transposed for s in stages}) > 1:
        raise ValueError("a chain that mixes plain and transposed stages has no single kernel")
    return [s.adjoint() for s in reversed(stages)] if stages[0].transposed else stages


def _identity(channels: int, groups: int, ndim: int, dtype: np.dtype[Any]) -> Array:
    """The kernel that changes nothing, one block a group."""
    block = np.eye(channels // groups, dtype=dtype)
    return np.tile(block, (groups, 1)).reshape(channels, -1, *(1,) * ndim)


def _apply(stage: Stage, kernel: Array, stride: Ints) -> Array:
    """Apply `stage` to the output channels of `kernel`, which has been strided so far."""
    g, (o, c) = stage.groups, stage.weight.shape[:2]
    inner, taps = kernel.shape[1], kernel.shape[2:]
    step = tuple(s * d for s, d in zip(stride, stage.geometry.dilation))
    grown = tuple(t + s * (k - 1) for t, s, k in zip(taps, step, stage.kernel))
    # One matrix product a tap: (o, c) times (c, everything else).
    x = kernel[stage.channel_permutation()].reshape(stage.outer, g, c, stage.inner, inner * math.prod(taps))
    x = x.transpose(1, 2, 0, 3, 4).reshape(g, c, -1)
    w = stage.weight.reshape(g, o // g, c, *stage.kernel)
    if all(k == 1 or (t == 1 and s == 1) for k, t, s in zip(stage.kernel, taps, step)):
        # Along axes of its own, as in every family but some Kronecker products: one product.
        y = w.reshape(g, o // g, c, -1).swapaxes(2, 3).reshape(g, -1, c) @ x
        y = y.reshape(g, o // g, *stage.kernel, stage.outer, stage.inner, inner, *taps)
        n = len(taps)
        pairs = [axis for a in range(n) for axis in (2 + a, 5 + n + a)]
        y = y.transpose(2 + n, 0, 1, 3 + n, 4 + n, *pairs)
        return y.reshape(stage.out_channels, inner, *grown)
    out = np.zeros((g, o // g, stage.outer, stage.inner, inner, *grown), kernel.dtype)
    for tap in itertools.product(*map(range, stage.kernel)):
        at = [slice(i * s, i * s + t) for i, s, t in zip(tap, step, taps)]
        y = w[trailing(*tap)] @ x
        out[trailing(*at)] += y.reshape(g, o // g, stage.outer, stage.inner, inner, *taps)
    out = np.moveaxis(out, 2, 0)
    return out.reshape(stage.out_channels, inner, *grown)


def partial_kernels(stages: Sequence[Stage], groups: int = 1) -> tuple[list[Array], list[Array]]:
    r"""Split a chain at every joint: its kernels up to there, and from there on.

    Parameters
    ----------
    stages : sequence of Stage
        All of them plain or all of them transposed.  Of a transposed chain the kernel is
        that of its adjoint, and so is the order of the joints.
    groups : int
        Groups of the whole chain.

    Returns
    -------
    before, after : list of ndarray of float64
        One a joint, the chain's input the first and its output the last:
        (channels, in // groups, \*taps) and (channels, out // groups, \*taps), taps one
        input sample apart.  The channels are those of the joint.

    Raises
    ------
    ValueError
        If plain and transposed stages are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.chain_algebra import partial_kernels
    >>> g = Geometry.of(1)
    >>> before, after = partial_kernels([Stage(np.ones((4, 2, 3)), g), Stage(np.ones((5, 4, 1)), g)])
    >>> [k.shape for k in before], [k.shape for k in after]
    ([(2, 2, 1), (4, 2, 3), (5, 2, 3)], [(2, 5, 3), (4, 5, 1), (5, 5, 1)])
    """
    stages = as_plain_chain(stages)
    ndim = stages[0].geometry.ndim
    strides = [(1,) * ndim]
    for stage in stages:
        strides.append(tuple(a * b for a, b in zip(strides[-1], stage.geometry.stride)))
    before = [_identity(stages[0].in_channels, groups, ndim, np.dtype(np.float64))]
    for stage, stride in zip(stages, strides):
        before.append(_apply(stage, before[-1], stride))
    after = [_identity(stages[-1].out_channels, groups, ndim, np.dtype(np.float64))]
    for stage, stride in list(zip(stages, strides))[::-1]:
        after.append(_apply_back(stage, after[-1], stride))
    return before, after[::-1]


def _apply_back(stage: Stage, kernel: Array, stride: Ints) -> Array:
    """What :func:`_apply` does, from the outputs of `stage` to its inputs."""
    g, (o, c) = stage.groups, stage.weight.shape[:2]
    w = stage.weight.reshape(g, o // g, c, *stage.kernel).swapaxes(1, 2)
    turned = replace(stage, weight=w.reshape(g * c, o // g, *stage.kernel), shuffle=(1, 1))
    return np.asarray(_apply(turned, kernel, stride)[np.argsort(stage.channel_permutation())])


def jacobian_norms(
    stages: Sequence[Stage], before: Sequence[Array], after: Sequence[Array], groups: int = 1
) -> list[Array]:
    r"""Squared norm of the kernel's derivative with respect to each weight of a chain.

    Parameters
    ----------
    stages : sequence of Stage
        A chain that is all plain or all transposed.
    before, after : sequence of ndarray
        Its :func:`partial_kernels`.
    groups : int
        Groups of the whole chain.

    Returns
    -------
    list of ndarray, shape (groups \* out, in)
        One a stage, in the order of `stages`; the same for all taps of a kernel, which only
        move the derivative.

    Notes
    -----
    A chain is linear in the weights of each stage.  With respect to the weight from channel
    c to channel o the derivative is the kernel up to c times the kernel from o on, summed
    over the tied copies i of the stage, so that its squared norm is

    .. math:: \sum_{i j} \sum_q \langle A_{io}(\cdot + q), A_{jo} \rangle
       \langle B_{ic}, B_{jc}(\cdot + q) \rangle .

    Where the taps before and after lie along different axes, as in every family, q = 0 is
    the only shift; in a stack of spatial stages there are others.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.chain_algebra import partial_kernels, jacobian_norms
    >>> g = Geometry.of(1)
    >>> stages = [Stage(np.ones((4, 2, 3)), g), Stage(np.ones((5, 4, 1)), g)]
    >>> [j[0, 0] for j in jacobian_norms(stages, *partial_kernels(stages))]
    [np.float64(5.0), np.float64(6.0)]
    """
    found = []
    block: Array = np.repeat(np.arange(groups), len(before[0]) // groups)
    for stage, b, a in zip(as_plain_chain(stages), before, after[1:]):
        g, (o, c) = stage.groups, stage.weight.shape[:2]
        kept = _copies(stage, block[stage.channel_permutation()], c)[:, :1]
        # Copies in different groups of the chain have blocks of their own: they never meet.
        meet = (kept[..., None] == kept[..., None, :]).reshape(g, 1, -1)
        block = _spread(stage, block)
        b, a = _copies(stage, b[stage.channel_permutation()], c), _copies(stage, a, o // g)
        shared = tuple(map(min, zip(b.shape[4:], a.shape[4:])))
        square = np.zeros((g, o // g, c))
        for shift in itertools.product(*(range(1 - n, n) for n in shared)):
            ahead, back = _gram(a, shift), _gram(b, tuple(-q for q in shift))
            square += (ahead * meet) @ back.swapaxes(1, 2)
        found.append(square.reshape(o, c))
    return found[::-1] if stages[0].transposed else found


def _copies(stage: Stage, kernel: Array, each: int) -> Array:
    """`kernel` with its channels as (groups, `each` a group, tied copies), for its stage."""
    x = kernel.reshape(stage.outer, stage.groups, each, stage.inner, *kernel.shape[1:])
    x = np.moveaxis(x, 0, 2)
    return x.reshape(stage.groups, each, stage.outer * stage.inner, *kernel.shape[1:])


def _gram(x: Array, shift: Ints) -> Array:
    """Products of each pair of copies, the first of them moved: (groups, each, copies**2)."""
    at = [slice(max(q, 0), n + min(q, 0)) for q, n in zip(shift, x.shape[4:])]
    to = [slice(max(-q, 0), n + min(-q, 0)) for q, n in zip(shift, x.shape[4:])]
    moved = x[trailing(*at)].reshape(*x.shape[:3], -1)
    fixed = x[trailing(*to)].reshape(*x.shape[:3], -1)
    return np.asarray(moved @ fixed.swapaxes(2, 3)).reshape(*x.shape[:2], -1)


def is_block_diagonal(stages: Sequence[Stage], groups: int) -> bool:
    """Whether a chain keeps `groups` equal blocks of channels apart, in order."""
    if stages[0].transposed:
        stages = [s.adjoint() for s in reversed(stages)]
    block: Array = np.repeat(np.arange(groups), stages[0].matrix_shape[1] // groups)
    for s in stages:
        if s.transposed:
            return False  # a chain that goes both ways is no one kernel
        each = block[s.channel_permutation()].reshape(s.outer, s.groups, -1, s.inner)
        if (each != each[:, :, :1]).any():
            return False
        block = _spread(s, block)
    return bool((block == np.repeat(np.arange(groups), len(block) // groups)).all())


def _spread(stage: Stage, block: Array) -> Array:
    """The group of each output channel of a stage that keeps them apart, from the inputs'."""
    each = block[stage.channel_permutation()].reshape(stage.outer, stage.groups, -1, stage.inner)[:, :, :1]
    return np.asarray(np.repeat(each, stage.weight.shape[0] // stage.groups, 2).reshape(-1))


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
    scale = max_abs(expected)
    if scale == 0:
        return math.inf if np.any(actual) else 0.0
    a, b = actual.astype(np.float64) / scale, expected.astype(np.float64) / scale
    return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))


def max_abs(weight: Array) -> float:
    """``max|weight|``: the scale that everything is divided by before it is squared."""
    return float(np.abs(weight).max()) if weight.size else 0.0


def truncation_errors(weight: Array, rows: Sequence[int], batch: Sequence[int] = ()) -> Array:
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
        ``result[R]`` is ``sqrt(sum_{i > R} sigma_i^2)``, relative to ``||weight||``: by
        Eckart and Young no tensor whose matricisation has rank R is nearer.  Zeros for a
        zero tensor.
    """
    columns = [a for a in range(weight.ndim) if a not in rows and a not in batch]
    b, m, n = (math.prod(weight.shape[a] for a in axes) for axes in (batch, rows, columns))
    matrices = weight.transpose(*batch, *rows, *columns).reshape(b, m, n).astype(np.float64)
    matrices /= max_abs(weight) or 1.0
    return tail_norms(np.linalg.svd(matrices, compute_uv=False))


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and vectors of symmetric matrices (batch, n, n)."""
    if isinstance(matrices, np.ndarray) or matrices.shape[-1] <= 32:
        values, vectors = np.linalg.eigh(matrices)
        return values, vectors
    # A GPU's batched decomposition is Jacobi's, for small matrices: large ones go one by one.
    found = [np.linalg.eigh(m) for m in matrices]
    return np.stack([v for v, _ in found]), np.stack([q for _, q in found])


def leading_eigenpairs(matrix: Array, count: int) -> tuple[Array, Array]:
    """The largest eigenvalues of a symmetric matrix, in ascending order, and their vectors."""
    if isinstance(matrix, np.ndarray):
        n = len(matrix)
        values, vectors = linalg.eigh(matrix, subset_by_index=[n - count, n - 1])
    else:  # a GPU's libraries have no part of a decomposition
        values, vectors = (a[..., -count:] for a in np.linalg.eigh(matrix))
    return values, vectors


def tail_norms(singular_values: Array) -> Array:
    """Relative tail norms of singular values, (..., n), cut at one rank in every batch."""
    energy = np.square(singular_values).reshape(-1, singular_values.shape[-1]).sum(axis=0)
    tail: Array = np.sqrt(np.append(np.cumsum(energy[::-1])[::-1], 0.0))
    return tail / (tail[0] or 1.0)
