"""Linear algebra of chains: composition, norms, spectra of matricisations."""

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

ROUNDING = 1e-6  # of gains that are 1


def compose(stages: Sequence[Stage], groups: int = 1) -> Array:
    r"""Compute the dense kernel of a chain.

    Tap ``q`` of the second of two stages lies at ``stride_1 * dilation_2 * q``: the kernel of a
    chain is a sum over the taps of its stages, and no block-diagonal matrix is formed.

    Parameters
    ----------
    stages : sequence of Stage
        Chain of plain stages, or of transposed ones.
    groups : int
        Groups of the whole chain; only its diagonal blocks are returned.

    Returns
    -------
    ndarray, shape (out, in // groups, \*taps)
        Kernel with a distance of one input sample between taps; (in, out // groups, \*taps) for
        transposed stages.

    Raises
    ------
    ValueError
        If plain and transposed stages are mixed: such a chain has no single kernel.

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
    """Return the chain itself if it is plain, or its adjoint, whose kernel is the same."""
    if len({s.transposed for s in stages}) > 1:
        raise ValueError("stages must be all plain or all transposed: a mix has no single kernel")
    return [s.adjoint() for s in reversed(stages)] if stages[0].transposed else stages


def _identity(channels: int, groups: int, ndim: int, dtype: np.dtype[Any]) -> Array:
    """Return the kernel of the identity, one block per group."""
    block = np.eye(channels // groups, dtype=dtype)
    return np.tile(block, (groups, 1)).reshape(channels, -1, *(1,) * ndim)


def _apply(stage: Stage, kernel: Array, stride: Ints) -> Array:
    """Apply `stage` to the output channels of the kernel of a chain of this stride."""
    g, (o, c) = stage.groups, stage.weight.shape[:2]
    columns, taps = kernel.shape[1], kernel.shape[2:]
    step = tuple(s * d for s, d in zip(stride, stage.geometry.dilation))
    new_taps = tuple(t + s * (k - 1) for t, s, k in zip(taps, step, stage.kernel))
    # One matrix product per tap: (o, c) times (c, all other axes).
    x = kernel[stage.channel_permutation()]
    x = x.reshape(stage.outer, g, c, stage.inner, columns * math.prod(taps))
    x = x.transpose(1, 2, 0, 3, 4).reshape(g, c, -1)
    w = stage.weight.reshape(g, o // g, c, *stage.kernel)
    if all(k == 1 or (t == 1 and s == 1) for k, t, s in zip(stage.kernel, taps, step)):
        # No axis has taps of both, as in all families but some Kronecker products: one product.
        y = w.reshape(g, o // g, c, -1).swapaxes(2, 3).reshape(g, -1, c) @ x
        y = y.reshape(g, o // g, *stage.kernel, stage.outer, stage.inner, columns, *taps)
        n = len(taps)
        pairs = [axis for a in range(n) for axis in (2 + a, 5 + n + a)]
        y = y.transpose(2 + n, 0, 1, 3 + n, 4 + n, *pairs)
        return y.reshape(stage.out_channels, columns, *new_taps)
    out = np.zeros((g, o // g, stage.outer, stage.inner, columns, *new_taps), kernel.dtype)
    for tap in itertools.product(*map(range, stage.kernel)):
        window = [slice(i * s, i * s + t) for i, s, t in zip(tap, step, taps)]
        y = w[trailing(*tap)] @ x
        out[trailing(*window)] += y.reshape(g, o // g, stage.outer, stage.inner, columns, *taps)
    out = np.moveaxis(out, 2, 0)
    return out.reshape(stage.out_channels, columns, *new_taps)


def partial_kernels(stages: Sequence[Stage], groups: int = 1) -> tuple[list[Array], list[Array]]:
    r"""Compute the kernels before and after each joint of a chain.

    A joint lies between two stages, before the first or after the last.

    Parameters
    ----------
    stages : sequence of Stage
        Chain of plain stages, or of transposed ones, which is replaced by its adjoint.
    groups : int
        Groups of the whole chain.

    Returns
    -------
    before, after : list of ndarray of float64
        One kernel per joint, from the input of the chain to its output:
        (channels, in // groups, \*taps) and (channels, out // groups, \*taps), with the channels
        of the joint and a distance of one input sample between taps.

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
    >>> stages = [Stage(np.ones((4, 2, 3)), g), Stage(np.ones((5, 4, 1)), g)]
    >>> before, after = partial_kernels(stages)
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
    """Apply `stage` backwards, from its output channels to its input channels."""
    g, (o, c) = stage.groups, stage.weight.shape[:2]
    w = stage.weight.reshape(g, o // g, c, *stage.kernel).swapaxes(1, 2)
    backward = replace(stage, weight=w.reshape(g * c, o // g, *stage.kernel), shuffle=(1, 1))
    return np.asarray(_apply(backward, kernel, stride)[np.argsort(stage.channel_permutation())])


def jacobian_norms(
    stages: Sequence[Stage], before: Sequence[Array], after: Sequence[Array], groups: int = 1
) -> list[Array]:
    r"""Compute the squared norm of the kernel's derivative with respect to each weight.

    Parameters
    ----------
    stages : sequence of Stage
        Chain of plain stages, or of transposed ones.
    before, after : sequence of ndarray
        :func:`partial_kernels` of the chain.
    groups : int
        Groups of the whole chain.

    Returns
    -------
    list of ndarray, shape (groups \* out, in)
        One array per stage.  All taps of a kernel have the same norm, since they only shift the
        derivative.

    Notes
    -----
    A chain is linear in the weights of each stage.  The derivative with respect to the weight
    from channel c to channel o is the product of the kernel B before c and the kernel A after o,
    summed over the replicas i of the stage.  Its squared norm is

    .. math:: \sum_{i j} \sum_q \langle A_{io}(\cdot + q), A_{jo} \rangle
       \langle B_{ic}, B_{jc}(\cdot + q) \rangle .

    The only shift is q = 0 if no axis has taps both before and after, as in every family.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.chain_algebra import jacobian_norms, partial_kernels
    >>> g = Geometry.of(1)
    >>> stages = [Stage(np.ones((4, 2, 3)), g), Stage(np.ones((5, 4, 1)), g)]
    >>> [j[0, 0] for j in jacobian_norms(stages, *partial_kernels(stages))]
    [np.float64(5.0), np.float64(6.0)]
    """
    norms = []
    block: Array = np.repeat(np.arange(groups), len(before[0]) // groups)
    for stage, b, a in zip(as_plain_chain(stages), before, after[1:]):
        g, (o, c) = stage.groups, stage.weight.shape[:2]
        block_of = _replicas(stage, block[stage.channel_permutation()], c)[:, :1]
        # Replicas in different groups of the chain belong to different blocks of the kernel.
        same_block = (block_of[..., None] == block_of[..., None, :]).reshape(g, 1, -1)
        block = _output_blocks(stage, block)
        b, a = _replicas(stage, b[stage.channel_permutation()], c), _replicas(stage, a, o // g)
        overlap = tuple(map(min, zip(b.shape[4:], a.shape[4:])))
        square = np.zeros((g, o // g, c))
        for shift in itertools.product(*(range(1 - n, n) for n in overlap)):
            gram_a, gram_b = _gram(a, shift), _gram(b, tuple(-q for q in shift))
            square += (gram_a * same_block) @ gram_b.swapaxes(1, 2)
        norms.append(square.reshape(o, c))
    return norms[::-1] if stages[0].transposed else norms


def _replicas(stage: Stage, kernel: Array, per_group: int) -> Array:
    """Split the channels of `kernel` into (groups, `per_group`, replicas)."""
    x = kernel.reshape(stage.outer, stage.groups, per_group, stage.inner, *kernel.shape[1:])
    x = np.moveaxis(x, 0, 2)
    return x.reshape(stage.groups, per_group, stage.outer * stage.inner, *kernel.shape[1:])


def _gram(x: Array, shift: Ints) -> Array:
    """Multiply each pair of replicas, the first one shifted: (groups, per group, replicas**2)."""
    first = [slice(max(q, 0), n + min(q, 0)) for q, n in zip(shift, x.shape[4:])]
    second = [slice(max(-q, 0), n + min(-q, 0)) for q, n in zip(shift, x.shape[4:])]
    shifted = x[trailing(*first)].reshape(*x.shape[:3], -1)
    fixed = x[trailing(*second)].reshape(*x.shape[:3], -1)
    return np.asarray(shifted @ fixed.swapaxes(2, 3)).reshape(*x.shape[:2], -1)


def is_block_diagonal(stages: Sequence[Stage], groups: int) -> bool:
    """Return whether a chain maps each of `groups` blocks of channels to the same block."""
    if len({s.transposed for s in stages}) > 1:
        return False
    stages = as_plain_chain(stages)
    block: Array = np.repeat(np.arange(groups), stages[0].matrix_shape[1] // groups)
    for s in stages:
        inputs = block[s.channel_permutation()].reshape(s.outer, s.groups, -1, s.inner)
        if (inputs != inputs[:, :, :1]).any():
            return False
        block = _output_blocks(s, block)
    return bool((block == np.repeat(np.arange(groups), len(block) // groups)).all())


def _output_blocks(stage: Stage, block: Array) -> Array:
    """Return the block of each output channel, given those of the input channels."""
    inputs = block[stage.channel_permutation()]
    inputs = inputs.reshape(stage.outer, stage.groups, -1, stage.inner)[:, :, :1]
    return np.asarray(np.repeat(inputs, stage.weight.shape[0] // stage.groups, 2).reshape(-1))


def chain_geometry(stages: Sequence[Stage]) -> Geometry:
    """Return the geometry of the convolution that a plain chain represents.

    Strides multiply, and paddings add up in samples of the chain's input.  An axis along which
    exactly one stage has taps keeps its dilation; the others get dilation 1.
    """
    geometries = [s.geometry for s in stages]
    ndim = geometries[0].ndim
    modes = {g.padding_mode for g in geometries if any(map(any, g.padding))}
    stride, dilation, pads = [1] * ndim, [1] * ndim, [(0, 0)] * ndim
    for axis in range(ndim):
        has_one_owner = sum(s.kernel[axis] > 1 for s in stages) == 1
        for stage, g in zip(stages, geometries):
            if has_one_owner and stage.kernel[axis] > 1:
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
    r"""Return the relative Frobenius distance ``||actual - expected|| / ||expected||``.

    Both are divided by ``max|expected|`` first, so that no square of a weight from 1e-30 to 1e30
    under- or overflows.  The error of a zero kernel is 0 or infinity.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"weight must have shape {actual.shape}, got {expected.shape}")
    scale = max_abs(expected)
    if scale == 0:
        return math.inf if np.any(actual) else 0.0
    a, b = actual.astype(np.float64) / scale, expected.astype(np.float64) / scale
    return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))


def max_abs(weight: Array) -> float:
    """Return ``max|weight|``, by which weights are divided before they are squared."""
    return float(np.abs(weight).max()) if weight.size else 0.0


def truncation_errors(weight: Array, rows: Sequence[int], batch: Sequence[int] = ()) -> Array:
    r"""Compute the distance of a tensor from the tensors whose matricisation has each rank.

    Parameters
    ----------
    weight : ndarray
        Any tensor.
    rows : sequence of int
        Axes of the rows of the matricisation; all others are columns.
    batch : sequence of int
        Axes that enumerate separate matrices, truncated at the same rank.

    Returns
    -------
    ndarray, shape (min(rows, columns) + 1,)
        ``sqrt(sum_{i > R} sigma_i^2)`` relative to ``||weight||`` for each rank R: the smallest
        error of rank R by the Eckart-Young theorem.  Zeros for a zero tensor.
    """
    columns = [a for a in range(weight.ndim) if a not in rows and a not in batch]
    b, m, n = (math.prod(weight.shape[a] for a in axes) for axes in (batch, rows, columns))
    matrices = weight.transpose(*batch, *rows, *columns).reshape(b, m, n).astype(np.float64)
    matrices /= max_abs(weight) or 1.0
    return tail_norms(singular_values(matrices))


def singular_values(matrices: Array) -> Array:
    """Return the descending singular values of matrices (batch, rows, columns).

    Those of a long matrix are those of its triangular factor, which takes less than half the time.
    """
    rows, columns = matrices.shape[-2:]
    is_long = max(rows, columns) >= 2 * min(rows, columns) >= 32
    if is_long and isinstance(matrices, np.ndarray):
        tall = matrices if rows >= columns else matrices.swapaxes(-1, -2)
        matrices = np.asarray(np.linalg.qr(tall, mode="r"))
    values: Array = np.linalg.svd(matrices, compute_uv=False)
    return values


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Return the ascending eigenvalues and the eigenvectors of symmetric matrices (batch, n, n)."""
    if isinstance(matrices, np.ndarray) or matrices.shape[-1] <= 32:
        values, vectors = np.linalg.eigh(matrices)
        return values, vectors
    # The batched decomposition on a GPU is Jacobi's, for small matrices: loop over large ones.
    pairs = [np.linalg.eigh(m) for m in matrices]
    return np.stack([v for v, _ in pairs]), np.stack([q for _, q in pairs])


def leading_eigenpairs(matrix: Array, count: int) -> tuple[Array, Array]:
    """Return the largest eigenvalues, ascending, and the eigenvectors of a symmetric matrix."""
    if isinstance(matrix, np.ndarray):
        n = len(matrix)
        values, vectors = linalg.eigh(matrix, subset_by_index=[n - count, n - 1])
    else:  # GPU libraries have no partial decomposition
        values, vectors = (a[..., -count:] for a in np.linalg.eigh(matrix))
    return values, vectors


def tail_norms(singular_values: Array) -> Array:
    """Return the truncation error at each rank from singular values, (..., n), of all batches."""
    energy = np.square(singular_values).reshape(-1, singular_values.shape[-1]).sum(axis=0)
    tail: Array = np.sqrt(np.append(np.cumsum(energy[::-1])[::-1], 0.0))
    return tail / (tail[0] or 1.0)


def levelled(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return stages of the same chain, none but the last of which raises the largest sample.

    Weights are multiplied by powers of two, so that results are those of `stages` but where these
    overflow or underflow between two stages.  Stages of a GPU, and those whose last weight would
    leave the range of its type, are returned as they are.
    """
    if len(stages) < 2 or not all(isinstance(s.weight, np.ndarray) for s in stages):
        return tuple(stages)
    exponents = [level_exponent(_gain(s)) for s in stages[:-1]]
    if not any(exponents):
        return tuple(stages)
    shifts = [*(-e for e in exponents), sum(exponents)]
    with np.errstate(over="ignore", under="ignore"):
        weights = [np.ldexp(s.weight, n) for s, n in zip(stages, shifts)]
        back = [np.ldexp(w, -n) for w, n in zip(weights, shifts)]
    if not all(np.array_equal(w, s.weight) for w, s in zip(back, stages)):
        return tuple(stages)
    return tuple(replace(s, weight=w) for s, w in zip(stages, weights))


def level_exponent(gain: float) -> int:
    """Return the power of two by which a gain is divided to be at most 1, and at least 1/4."""
    if gain == 0 or not math.isfinite(gain) or 0.25 <= gain <= 1 + ROUNDING:
        return 0
    return math.frexp(gain)[1]


def _gain(stage: Stage) -> float:
    """Return the largest absolute sum of the weights that an output of a stage adds up."""
    w = np.abs(stage.weight)
    if stage.transposed:  # (in, out per group, ...): outputs add up the inputs of a group
        w = w.reshape(stage.groups, -1, *w.shape[1:]).sum(1)
        return float(w.reshape(*w.shape[:2], -1).sum(-1).max(initial=0))
    return float(w.reshape(len(w), -1).sum(-1).max(initial=0))
