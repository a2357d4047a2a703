"""How much a convolution can enlarge a signal: its operator norm, exactly or from above.

A circular convolution is one small matrix a frequency, and its norm is the largest singular
value of them all.  Every other border is a circular convolution between a padding and a crop,
neither of which is hard to bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints, trailing
from lowrank.core import chain_algebra, reference
from lowrank.core.geometry import Geometry

if TYPE_CHECKING:
    from lowrank.factorization import Factorization

# Frequencies are taken one by one up to WORK of their number times the square of the smaller
# channel count, some seconds; beyond that, and for every input size, from a coarser grid.
WORK, FREE_WORK, POINTS = 2**28, 2**26, 2**19
CHUNK = 2**23  # numbers held at a time: about 100 MB
TOGETHER = 2**18  # numbers of the matrices that are tested at once, to save calls
SLACK = 1e-12  # relative, by which a value may be passed unseen: above the rounding of a sum


@dataclass(frozen=True, slots=True)
class Norm:
    r"""An operator norm, or an upper bound on one.

    Attributes
    ----------
    value : float
        No output is longer than `value` times its input, in Euclidean norm; bias left out.
    exact : bool
        Whether an input exists for which it is as long.
    how : str
        Where the value comes from, in a few words.
    offset : float
        For a constant border: at most this much is added to an output sample by what stands
        outside; the rest of the convolution has the norm above.

    Examples
    --------
    >>> from lowrank.certify.norms import Norm
    >>> print(Norm(1.5, exact=False, how="DFT on a circle of 9x9"))
    at most 1.5 (DFT on a circle of 9x9)
    """

    value: float
    exact: bool
    how: str
    offset: float = 0.0

    def __str__(self) -> str:
        offset = f" and an offset of {self.offset:.4g}" if self.offset else ""
        return f"{'' if self.exact else 'at most '}{self.value:.4g}{offset} ({self.how})"


class Axis(NamedTuple):
    """A convolution along one axis, as a part of a circular one.

    `circle` is the number of samples around, 0 for any; `copies` how often the border copies
    a sample, at most; `exact` whether nothing is cropped off the circle.
    """

    circle: int
    stride: int
    copies: int = 1
    exact: bool = False


def operator_norm(conv: Factorization, input_shape: Sequence[int]) -> Norm:
    r"""Bound how much longer than its input an output can be.

    Parameters
    ----------
    conv : Factorization
        A convolution, or a chain that stands for one; its kernel is all that counts.
    input_shape : sequence of int
        (channels, \*spatial), or the spatial size alone.

    Returns
    -------
    Norm
        Exact, to a part in 10\ :sup:`12`, for circular borders that keep the size (or, with a
        stride that divides it, every stride-th sample), and for pointwise kernels.

    Raises
    ------
    ValueError
        If the kernel does not fit, or `conv` mixes plain and transposed stages.

    Notes
    -----
    On a circle of n samples an axis the singular values are those of all

    .. math:: \hat W(\omega) = \sum_q W_q e^{i \langle \omega, q \rangle},
       \quad \omega \in \tfrac{2\pi}{n} \mathbb Z^N,

    matrices of out by in channels [1]_.  A stride s makes a channel of each of the
    :math:`s^N` phases of the input, so that :math:`\hat W` has as many times the columns, on a
    circle of n / s.  With zeros around it an input of n samples and its border fit on a circle
    of n + max(before, after), of which the convolution keeps a part.  Any other border is a
    matrix P of copies ahead of a convolution without border: :math:`P^\top P` is diagonal and
    counts the copies of a sample, so that :math:`\|P\|` is the root of the largest count.

    Frequencies are not decomposed one by one.  That no singular value of
    :math:`\hat W(\omega)` exceeds the largest one so far, :math:`\mu`, is what a Cholesky
    factorization of :math:`\mu^2 - \hat W \hat W^*` says by succeeding, at a fifth of the work or
    less; and all these Gram matrices are one trigonometric polynomial, whose coefficients are
    products of the taps.  On grids that are too fine for that, see :func:`resolution_free`.

    References
    ----------
    .. [1] H. Sedghi, V. Gupta, P. M. Long, "The singular values of convolutional layers",
       ICLR 2019. :arxiv:`1805.10408`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify.norms import operator_norm
    >>> blur = np.full((1, 1, 3, 3), 1 / 9)
    >>> print(operator_norm(lowrank.dense(blur, padding=1, padding_mode="circular"), (8, 8)))
    1 (DFT on the circle of 8x8)
    >>> print(operator_norm(lowrank.dense(blur, padding=1, padding_mode="reflect"), (8, 8)))
    at most 2 (DFT on a circle of 10x10 for input and border, times 2 for the border's copies)
    """
    size = conv.shape(input_shape)[1:]
    if conv.transposed:
        # The plain convolution of this output has at least this input for its output.
        conv, size = conv.adjoint(), conv.output_shape(input_shape)[1:]
    conv.output_shape(size)  # refuses a kernel that does not fit
    weight = conv.to_dense()
    axes = [_axis(conv.geometry, weight.shape[2:], a, n) for a, n in enumerate(size)]
    return _norm(conv, weight, axes, WORK)


def resolution_free(conv: Factorization) -> Norm:
    r"""Bound how much longer than its input an output can be, whatever the input's size.

    Parameters
    ----------
    conv : Factorization
        A convolution, or a chain that stands for one; its kernel is all that counts.

    Returns
    -------
    Norm
        For all inputs, if the border is zeros, a constant, or circular and narrower than the
        kernel; else for those that are at least two samples larger than the padding on both
        sides together.

    Raises
    ------
    ValueError
        If `conv` mixes plain and transposed stages.

    Notes
    -----
    The smaller of two bounds.  One is :math:`\sqrt K` times the spectral norm of the kernel of
    K taps as a matrix, for the best choice of the spatial axes that go with the output channels
    [1]_: of all :math:`2^N`, which for images are the four of the paper.

    The other needs the frequencies of a grid only.  For fixed unit vectors u and v,
    :math:`|u^* \hat W(\omega) v|^2` is along each axis a real trigonometric polynomial of degree
    k - 1, for k taps.  Near its largest value M such a p stays above
    :math:`M \cos((k - 1) \delta)` at a distance :math:`\delta` (M. Riesz), and of N frequencies
    one is within :math:`\pi / N` [2]_.  An axis at a time, with the u and v of the largest
    singular value of all,

    .. math:: \sup_\omega \sigma_1(\hat W(\omega))^2 \le
       \frac{\max_{\text{grid}} \sigma_1(\hat W)^2}{\prod_a \cos(\pi (k_a - 1) / N_a)},
       \quad N_a > 2 (k_a - 1).

    With strides and a border of zeros the phases of the input are channels, as in
    :func:`operator_norm`; on a circle whose size the stride need not divide, leaving samples
    out makes no output longer.

    References
    ----------
    .. [1] S. Singla, S. Feizi, "Fantastic four: differentiable bounds on singular values of
       convolution layers", ICLR 2021. :arxiv:`1911.10258`.
    .. [2] H. Ehlich, K. Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86,
       1964.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify.norms import resolution_free
    >>> print(resolution_free(lowrank.dense(np.full((1, 1, 3, 3), 1 / 9), padding=1)))
    at most 1 (every size: the matricised kernel)
    """
    if conv.transposed:
        conv = conv.adjoint()
    weight = conv.to_dense()
    axes = [_axis(conv.geometry, weight.shape[2:], a, None) for a in range(conv.ndim)]
    free = _norm(conv, weight, axes, FREE_WORK)
    unit = (chain_algebra.magnitude(weight) or 1.0) * math.sqrt(math.prod(a.copies for a in axes))
    value = unit * max(_matricised(w, free.value / unit) for w in _groups(conv, weight))
    if free.exact or value >= free.value:
        return free
    return replace(free, value=value, how="every size: the matricised kernel")


def _axis(geometry: Geometry, taps: Ints, axis: int, n: int | None) -> Axis:
    """How the convolution of `n` samples along an axis, or of any number, fits on a circle."""
    s, d, mode = geometry.stride[axis], geometry.dilation[axis], geometry.padding_mode
    before, after = geometry.padding[axis]
    extent, pads = d * (taps[axis] - 1) + 1, before + after
    if extent <= s and pads == 0:
        return Axis(extent, extent, exact=True)  # no sample is seen twice: one block is as all
    if mode == "circular" and pads < extent:
        if n is None or n % s:
            return Axis(n or 0, 1)
        return Axis(n, s, exact=pads >= extent - s)
    zeros = mode in ("zeros", "constant")
    size = pads + 2 if n is None else n
    outs = max(size + pads - extent, 0) // s + 1
    seen = size + pads if n is None else (outs - 1) * s + extent
    copies = 1
    if not zeros:
        at = reference.pad(np.arange(size)[None, None], ((before, after),), mode, None)
        copies = int(np.bincount(at[0, 0, :seen]).max())
    if n is None:
        return Axis(0, s, copies)
    # The zeros ahead of the input may be those behind it.
    least = max(n + before, seen - before, outs * s) if zeros else seen
    step = s if s > 1 else d  # a circle of whole steps has fewer frequencies that differ
    return Axis(-(-least // step) * step, s, copies)


def _norm(conv: Factorization, weight: Array, axes: Sequence[Axis], work: int) -> Norm:
    """The norm on the circles of `axes`, with what it says about itself."""
    geometry, scale = conv.geometry, chain_algebra.magnitude(weight) or 1.0
    strides = tuple(a.stride for a in axes)
    kernels = [_polyphase(w, strides, geometry.dilation) for w in _groups(conv, weight)]
    taps = kernels[0].shape[2:]
    circles, steps = zip(*map(_frequencies, axes, geometry.dilation, taps))
    grid = _grid(circles, taps, min(POINTS, work // min(kernels[0].shape[:2]) ** 2))
    between, turns = 1.0, []
    for have, full, step, k in zip(grid, circles, steps, taps):
        between *= 1.0 if have == full else math.cos(math.pi * (k - 1) / have)
        turns.append(step if have == full else 1)
    found = 0.0
    for kernel in kernels:
        found = _largest(kernel, grid, turns, found)
    copies = math.prod(a.copies for a in axes)
    exact = all(a.exact for a in axes) and grid == circles
    return Norm(
        scale * math.sqrt(found * copies / between),
        exact,
        _how(axes, grid, circles, exact, copies),
        _offset(geometry, weight),
    )


def _how(axes: Sequence[Axis], grid: Ints, circles: Ints, exact: bool, copies: int) -> str:
    """A norm's few words about itself."""
    around = "x".join(str(a.circle) for a in axes)
    points = "x".join(map(str, grid))
    times = f", times {math.sqrt(copies):.4g} for the border's copies" if copies > 1 else ""
    if math.prod(circles) == 1:
        return f"one matrix{times}"
    if not all(circles):
        return f"every size: between {points} frequencies{times}"
    if grid != circles:
        return f"between {points} frequencies of a circle of {around}{times}"
    if exact:
        return f"DFT on the circle of {around}"
    return f"DFT on a circle of {around} for input and border{times}"


def _offset(geometry: Geometry, weight: Array) -> float:
    """What a constant border can add to an output: all taps of one sign outside, at the most."""
    if geometry.padding_mode != "constant" or not any(map(any, geometry.padding)):
        return 0.0
    taps = weight.astype(np.float64).sum(axis=1).reshape(len(weight), -1)
    signs = np.maximum(taps, 0).sum(axis=1), np.maximum(-taps, 0).sum(axis=1)
    return abs(geometry.value) * float(np.max(signs))


def _groups(conv: Factorization, weight: Array) -> Array:
    """The kernel of each group, (groups, out, in, *taps), of magnitude 1."""
    scaled = weight.astype(np.float64) / (chain_algebra.magnitude(weight) or 1.0)
    return scaled.reshape(conv.groups, -1, *weight.shape[1:])


def _polyphase(weight: Array, stride: Ints, dilation: Ints) -> Array:
    """The kernel of stride 1 that sees each phase of its input as a channel."""
    if max(stride) == 1:
        return weight
    along = [
        [divmod(t * d, s) if s > 1 else (t, 0) for t in range(k)]
        for k, s, d in zip(weight.shape[2:], stride, dilation)
    ]
    lengths = [places[-1][0] + 1 for places in along]
    out = np.zeros((*weight.shape[:2], *stride, *lengths))
    for tap in itertools.product(*map(range, weight.shape[2:])):
        places, phases = zip(*(along[axis][t] for axis, t in enumerate(tap)))
        out[trailing(*phases, *places)] = weight[trailing(*tap)]
    return out.reshape(len(weight), -1, *lengths)


def _frequencies(axis: Axis, dilation: int, taps: int) -> tuple[int, int]:
    """How many frequencies of a circle differ, 0 if it is any, and the step between taps."""
    if taps == 1:
        return 1, 1
    if not axis.circle:
        return 0, 1
    step, around = (dilation, axis.circle) if axis.stride == 1 else (1, axis.circle // axis.stride)
    shared = math.gcd(step, around)
    return around // shared, step // shared


def _grid(circles: Ints, taps: Ints, points: int) -> Ints:
    """As many frequencies an axis as can be paid for; all of the circle's, if they can be."""
    if all(circles) and math.prod(circles) <= points:
        return circles
    # Far more than 2 (k - 1) of them, the bound between them is tight.
    fine = [max(32 * (k - 1), 1) for k in taps]
    sizes = [min(n or m, m) for n, m in zip(circles, fine)]
    least = [min(n or m, max(m // 8, 1)) for n, m in zip(circles, fine)]
    while math.prod(sizes) > points and sizes != least:
        a = max(range(len(sizes)), key=lambda a: sizes[a] / least[a])
        sizes[a] = max(sizes[a] * 9 // 10, least[a])
    return tuple(sizes)


def _largest(kernel: Array, grid: Ints, steps: Sequence[int], known: float) -> float:
    """Largest squared singular value at the frequencies of `grid`, or `known` if none is."""
    lags, products = _correlations(kernel)
    n, flat = products.shape[-1], products.reshape(math.prod(map(len, lags)), -1)
    frequencies = _half(grid)
    parts = -(-len(frequencies) * (3 * n * n + 3 * len(flat)) // CHUNK)
    parts = min(parts, len(frequencies))
    for i in range(parts):
        # Every so many of them: what is largest among the first is nearly so among all.
        some = frequencies[i::parts]
        turn = np.ones((len(some), 1), complex)
        for k, lag, step, m in zip(some.T, lags, steps, grid):
            along = np.exp(2j * math.pi / m * (np.outer(k, lag * step) % m))
            turn = (turn[:, :, None] * along[:, None]).reshape(len(some), -1)
        half = (turn.real @ flat + 1j * (turn.imag @ flat)).reshape(-1, n, n)
        known = _peak(half + half.conj().swapaxes(1, 2), known)
    return known


def _correlations(kernel: Array) -> tuple[list[Array], Array]:
    """Coefficients of the Gram matrix as a trigonometric polynomial, less their transposes.

    Lags an axis, and for each (*lags, n, n) on the side of fewer channels.  Along the first
    axis the negative ones are left out, and lag 0, of which both are there, is halved.
    """
    if len(kernel) > kernel.shape[1]:
        kernel = kernel.swapaxes(0, 1)
    taps = kernel.shape[2:]
    lags = [np.arange(taps[0]), *(np.arange(1 - k, k) for k in taps[1:])]
    products = np.empty((*map(len, lags), len(kernel), len(kernel)))
    for at in np.ndindex(products.shape[:-2]):
        lag = [q[i] for q, i in zip(lags, at)]
        moved = kernel[trailing(*(slice(max(q, 0), k + min(q, 0)) for q, k in zip(lag, taps)))]
        fixed = kernel[trailing(*(slice(max(-q, 0), k - max(q, 0)) for q, k in zip(lag, taps)))]
        products[at] = moved.reshape(len(kernel), -1) @ fixed.reshape(len(kernel), -1).T
    products[0] /= 2
    return lags, products


def _half(grid: Ints) -> Array:
    """Frequencies (F, axes), one of each pair of opposite ones: a real kernel has the other."""
    k = np.indices(grid).reshape(len(grid), -1)
    opposite = np.ravel_multi_index(tuple(-k % np.array(grid)[:, None]), grid)
    return k[:, np.arange(k.shape[1]) <= opposite].T


def _peak(grams: Array, known: float) -> float:
    """Largest eigenvalue of Hermitian matrices (F, n, n), or `known` if none is larger."""
    size = np.abs(grams)
    bound = np.minimum(size.sum(axis=2).max(axis=1), np.sqrt(np.square(size).sum(axis=(1, 2))))
    # Those that a few steps of the power method say are large come first.
    v = np.random.default_rng(0).standard_normal((1, grams.shape[1], 1))
    for _ in range(6):
        v = grams @ v
        length = np.linalg.norm(v, axis=1, keepdims=True)
        v = v / np.where(length > 0, length, 1)
    order = np.argsort(-length[:, 0, 0])
    order, most = order[bound[order] > known * (1 + SLACK)], 1
    while len(order):
        if _within(grams[order[:most]], known):
            order, most = order[most:], max(1, min(2 * most, TOGETHER // grams[0].size))
        elif most > 1:
            most = 1
        else:
            known = max(known, float(np.linalg.eigvalsh(grams[order[0]])[-1]))
            order = order[1:][bound[order[1:]] > known * (1 + SLACK)]
    return known


def _within(grams: Array, limit: float) -> bool:
    """Whether no eigenvalue exceeds `limit`, but for its last digits."""
    try:
        np.linalg.cholesky(limit * (1 + SLACK) * np.eye(grams.shape[-1]) - grams)
    except np.linalg.LinAlgError:
        return False
    return True


def _matricised(kernel: Array, known: float) -> float:
    """Root of the taps times the kernel's smallest norm as a matrix, or `known` if less."""
    axes, root = range(2, kernel.ndim), math.sqrt(math.prod(kernel.shape[2:]))
    for choice in itertools.product((False, True), repeat=len(axes)):
        rows = [a for a, up in zip(axes, choice) if up]
        columns = [a for a, up in zip(axes, choice) if not up]
        matrix = kernel.transpose(0, *rows, 1, *columns)
        matrix = matrix.reshape(math.prod(matrix.shape[: 1 + len(rows)]), -1)
        if len(matrix) > matrix.shape[1]:
            matrix = matrix.T
        least = root * float(np.linalg.norm(matrix)) / math.sqrt(len(matrix))
        if least < known and _within(gram := matrix @ matrix.T, (known / root) ** 2):
            known = min(known, root * math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))
    return known
