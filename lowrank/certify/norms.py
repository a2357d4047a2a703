"""Operator norms of convolutions, exact or as upper bounds.

A circular convolution is one small matrix per frequency, and its norm is the largest singular
value of all of them.  A convolution with any other border is a padding, a circular convolution
and a crop, and the norms of the padding and the crop are easy to bound.
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

# Limits on (number of frequencies) * (smaller channel count)^2, a few seconds of work: up to them
# every frequency of the circle is evaluated, above them (and for any size) a coarser grid.
MAX_WORK, MAX_WORK_ANY_SIZE = 2**28, 2**26
MAX_POINTS = 2**19
CHUNK = 2**23  # numbers in memory at a time: about 100 MB
CHOLESKY_BATCH = 2**18  # numbers of the matrices that one call factorizes
TOLERANCE = 1e-12  # relative excess over the bound that goes undetected: above rounding


@dataclass(frozen=True, slots=True)
class Norm:
    r"""An operator norm, or an upper bound on one.

    Attributes
    ----------
    value : float
        Upper bound on the Euclidean norm of the output over that of the input, without the bias.
    exact : bool
        Whether an input attains the bound.
    method : str
        Computation that the value comes from, in a few words.
    offset : float
        Largest contribution of a constant border to an output sample; `value` bounds the
        linear part of the convolution.

    Examples
    --------
    >>> from lowrank.certify.norms import Norm
    >>> print(Norm(1.5, exact=False, method="DFT on a circle of 9x9"))
    at most 1.5 (DFT on a circle of 9x9)
    """

    value: float
    exact: bool
    method: str
    offset: float = 0.0

    def __str__(self) -> str:
        offset = f" and an offset of {self.offset:.4g}" if self.offset else ""
        return f"{'' if self.exact else 'at most '}{self.value:.4g}{offset} ({self.method})"


class CircularAxis(NamedTuple):
    """One axis of a convolution, embedded in a circular convolution.

    `circle` is the number of samples of the circle (0 for any size), `copies` the largest number
    of times that the border repeats a sample, and `exact` tells that the crop removes nothing.
    """

    circle: int
    stride: int
    copies: int = 1
    exact: bool = False


def operator_norm(conv: Factorization, input_shape: Sequence[int]) -> Norm:
    r"""Compute the operator norm of a convolution, or an upper bound on it.

    Parameters
    ----------
    conv : Factorization
        Convolution or chain; only the kernel counts.
    input_shape : sequence of int
        (channels, \*spatial), or the spatial size alone.

    Returns
    -------
    Norm
        Exact to a relative 1e-12 for pointwise kernels and for circular borders that keep the
        size (with a stride that divides it); else an upper bound.

    Raises
    ------
    ValueError
        If the kernel does not fit, or `conv` mixes plain and transposed stages.

    Notes
    -----
    On a circle of n samples per axis the singular values are those of all

    .. math:: \hat W(\omega) = \sum_q W_q e^{i \langle \omega, q \rangle},
       \quad \omega \in \tfrac{2\pi}{n} \mathbb Z^N,

    matrices of out by in channels [1]_.  A stride s turns each of the :math:`s^N` phases of the
    input into a channel: :math:`\hat W` has :math:`s^N` times as many columns, on a circle of
    n / s.  With zero padding an input of n samples and its border fit on a circle of
    n + max(before, after), and the convolution keeps a part of the circle.  Any other border is
    a matrix P of copies, followed by a convolution without padding: :math:`P^\top P` is diagonal
    and counts the copies of a sample, so :math:`\|P\|` is the root of the largest count.

    Most frequencies need no eigenvalue decomposition.  If the Cholesky factorization of
    :math:`\mu^2 - \hat W \hat W^*` succeeds, no singular value of :math:`\hat W(\omega)` exceeds
    the largest value :math:`\mu` found so far, at a fifth of the work or less.  The Gram matrices
    of all frequencies are one trigonometric polynomial, whose coefficients are products of the
    taps.  Circles with too many frequencies are bounded from a coarser grid, as in
    :func:`resolution_free`.

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
    size = conv.input_shape(input_shape)[1:]
    if conv.transposed:
        # The adjoint maps this output to an output that contains this input.
        conv, size = conv.adjoint(), conv.output_shape(input_shape)[1:]
    conv.output_shape(size)  # raises if the kernel does not fit
    weight = conv.to_dense()
    axes = [_axis(conv.geometry, weight.shape[2:], a, n) for a, n in enumerate(size)]
    return _norm(conv, weight, axes, MAX_WORK)


def resolution_free(conv: Factorization) -> Norm:
    r"""Bound the operator norm of a convolution for inputs of any size.

    Parameters
    ----------
    conv : Factorization
        Convolution or chain; only the kernel counts.

    Returns
    -------
    Norm
        Bound for all inputs if the border is zero, constant, or circular and narrower than the
        kernel; for other borders, for inputs that exceed the total padding by at least two
        samples per axis.

    Raises
    ------
    ValueError
        If `conv` mixes plain and transposed stages.

    Notes
    -----
    The smaller of two bounds.  One is :math:`\sqrt K` times the smallest spectral norm of the
    kernel of K taps as a matrix, over all :math:`2^N` assignments of the spatial axes to its rows
    or columns [1]_ (for images, the four of the paper).

    The other uses the frequencies of a grid.  For fixed unit vectors u and v and k taps along an
    axis, :math:`|u^* \hat W(\omega) v|^2` is a real trigonometric polynomial of degree k - 1 along
    that axis.  At a distance :math:`\delta` from its maximum M it is at least
    :math:`M \cos((k - 1) \delta)` (M. Riesz), and one of N frequencies is within
    :math:`\pi / N` [2]_.  Applied to one axis after the other, with the u and v of the largest
    singular value of all,

    .. math:: \sup_\omega \sigma_1(\hat W(\omega))^2 \le
       \frac{\max_{\text{grid}} \sigma_1(\hat W)^2}{\prod_a \cos(\pi (k_a - 1) / N_a)},
       \quad N_a > 2 (k_a - 1).

    With strides and zero padding the phases of the input are channels, as in
    :func:`operator_norm`.  On a circle whose size the stride need not divide, the bound for
    stride 1 holds, since subsampling does not increase a norm.

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
    at most 1 (any size: the matricised kernel)
    """
    if conv.transposed:
        conv = conv.adjoint()
    weight = conv.to_dense()
    axes = [_axis(conv.geometry, weight.shape[2:], a, None) for a in range(conv.ndim)]
    from_grid = _norm(conv, weight, axes, MAX_WORK_ANY_SIZE)
    unit = (chain_algebra.max_abs(weight) or 1.0) * math.sqrt(math.prod(a.copies for a in axes))
    value = unit * max(_matricised(w, from_grid.value / unit) for w in _groups(conv, weight))
    if from_grid.exact or value >= from_grid.value:
        return from_grid
    return replace(from_grid, value=value, method="any size: the matricised kernel")


def _axis(geometry: Geometry, taps: Ints, axis: int, n: int | None) -> CircularAxis:
    """Embed the convolution of `n` samples along an axis (None: any number) in a circle."""
    s, d, mode = geometry.stride[axis], geometry.dilation[axis], geometry.padding_mode
    before, after = geometry.padding[axis]
    extent, pads = d * (taps[axis] - 1) + 1, before + after
    if extent <= s and pads == 0:
        return CircularAxis(
            extent, extent, exact=True
        )  # disjoint windows: one block represents all
    if mode == "circular" and pads < extent:
        if n is None or n % s:
            return CircularAxis(n or 0, 1)
        return CircularAxis(n, s, exact=pads >= extent - s)
    zeros = mode in ("zeros", "constant")
    size = pads + 2 if n is None else n
    outs = max(size + pads - extent, 0) // s + 1
    seen = size + pads if n is None else (outs - 1) * s + extent
    copies = 1
    if not zeros:
        at = reference.pad(np.arange(size)[None, None], ((before, after),), mode, None)
        copies = int(np.bincount(at[0, 0, :seen]).max())
    if n is None:
        return CircularAxis(0, s, copies)
    # The zeros before and after the input may be the same samples of the circle.
    least = max(n + before, seen - before, outs * s) if zeros else seen
    step = s if s > 1 else d  # a multiple of the step has fewer distinct frequencies
    return CircularAxis(-(-least // step) * step, s, copies)


def _norm(conv: Factorization, weight: Array, axes: Sequence[CircularAxis], work: int) -> Norm:
    """Compute the norm on the circles of `axes`, on a grid of at most `work`."""
    geometry, scale = conv.geometry, chain_algebra.max_abs(weight) or 1.0
    strides = tuple(a.stride for a in axes)
    kernels = [_polyphase(w, strides, geometry.dilation) for w in _groups(conv, weight)]
    taps = kernels[0].shape[2:]
    circles, steps = zip(*map(_frequencies, axes, geometry.dilation, taps))
    grid = _grid(circles, taps, min(MAX_POINTS, work // min(kernels[0].shape[:2]) ** 2))
    grid_factor, grid_steps = 1.0, []
    for n, full, step, k in zip(grid, circles, steps, taps):
        grid_factor *= 1.0 if n == full else math.cos(math.pi * (k - 1) / n)
        grid_steps.append(step if n == full else 1)
    largest = 0.0
    for kernel in kernels:
        largest = _largest(kernel, grid, grid_steps, largest)
    copies = math.prod(a.copies for a in axes)
    exact = all(a.exact for a in axes) and grid == circles
    return Norm(
        scale * math.sqrt(largest * copies / grid_factor),
        exact,
        _describe(axes, grid, circles, exact, copies),
        _offset(geometry, weight),
    )


def _describe(
    axes: Sequence[CircularAxis], grid: Ints, circles: Ints, exact: bool, copies: int
) -> str:
    """Name the computation behind a norm, for `Norm.method`."""
    around = "x".join(str(a.circle) for a in axes)
    points = "x".join(map(str, grid))
    times = f", times {math.sqrt(copies):.4g} for the border's copies" if copies > 1 else ""
    if math.prod(circles) == 1:
        return f"one matrix{times}"
    if not all(circles):
        return f"any size: interpolated between {points} frequencies{times}"
    if grid != circles:
        return f"interpolated between {points} frequencies of a circle of {around}{times}"
    if exact:
        return f"DFT on the circle of {around}"
    return f"DFT on a circle of {around} for input and border{times}"


def _offset(geometry: Geometry, weight: Array) -> float:
    """Bound the contribution of a constant border: all taps of one sign lie in the border."""
    if geometry.padding_mode != "constant" or not any(map(any, geometry.padding)):
        return 0.0
    taps = weight.astype(np.float64).sum(axis=1).reshape(len(weight), -1)
    signs = np.maximum(taps, 0).sum(axis=1), np.maximum(-taps, 0).sum(axis=1)
    return abs(geometry.value) * float(np.max(signs))


def _groups(conv: Factorization, weight: Array) -> Array:
    """Return the kernel of each group, (groups, out, in, *taps), scaled to magnitude 1."""
    scaled = weight.astype(np.float64) / (chain_algebra.max_abs(weight) or 1.0)
    return scaled.reshape(conv.groups, -1, *weight.shape[1:])


def _polyphase(weight: Array, stride: Ints, dilation: Ints) -> Array:
    """Return the equivalent kernel of stride 1 whose input channels are phases of the input."""
    if max(stride) == 1:
        return weight
    along = [
        [divmod(t * d, s) if s > 1 else (t, 0) for t in range(k)]
        for k, s, d in zip(weight.shape[2:], stride, dilation)
    ]
    lengths = [positions[-1][0] + 1 for positions in along]
    out = np.zeros((*weight.shape[:2], *stride, *lengths))
    for tap in itertools.product(*map(range, weight.shape[2:])):
        positions, phases = zip(*(along[axis][t] for axis, t in enumerate(tap)))
        out[trailing(*phases, *positions)] = weight[trailing(*tap)]
    return out.reshape(len(weight), -1, *lengths)


def _frequencies(axis: CircularAxis, dilation: int, taps: int) -> tuple[int, int]:
    """Return the number of distinct frequencies (0 for any circle) and the step between taps."""
    if taps == 1:
        return 1, 1
    if not axis.circle:
        return 0, 1
    step, around = (dilation, axis.circle) if axis.stride == 1 else (1, axis.circle // axis.stride)
    shared = math.gcd(step, around)
    return around // shared, step // shared


def _grid(circles: Ints, taps: Ints, points: int) -> Ints:
    """Return the frequencies per axis: all of the circle's if at most `points`, else fewer."""
    if all(circles) and math.prod(circles) <= points:
        return circles
    # The bound between frequencies needs more than 2 (k - 1); with 32 (k - 1) it is within 0.5 %.
    fine = [max(32 * (k - 1), 1) for k in taps]
    sizes = [min(n or m, m) for n, m in zip(circles, fine)]
    least = [min(n or m, max(m // 8, 1)) for n, m in zip(circles, fine)]
    while math.prod(sizes) > points and sizes != least:
        a = max(range(len(sizes)), key=lambda a: sizes[a] / least[a])
        sizes[a] = max(sizes[a] * 9 // 10, least[a])
    return tuple(sizes)


def _largest(kernel: Array, grid: Ints, steps: Sequence[int], known: float) -> float:
    """Return the largest squared singular value at the frequencies of `grid`, at least `known`."""
    lags, products = _correlations(kernel)
    n, flat = products.shape[-1], products.reshape(math.prod(map(len, lags)), -1)
    frequencies = _half_spectrum(grid)
    parts = -(-len(frequencies) * (3 * n * n + 3 * len(flat)) // CHUNK)
    parts = min(parts, len(frequencies))
    for i in range(parts):
        # Strided parts: the maximum of the first is close to that of all, so the rest is cheap.
        part = frequencies[i::parts]
        phase = np.ones((len(part), 1), complex)
        for k, lag, step, m in zip(part.T, lags, steps, grid):
            along = np.exp(2j * math.pi / m * (np.outer(k, lag * step) % m))
            phase = (phase[:, :, None] * along[:, None]).reshape(len(part), -1)
        half = (phase.real @ flat + 1j * (phase.imag @ flat)).reshape(-1, n, n)
        known = _peak(half + half.conj().swapaxes(1, 2), known)
    return known


def _correlations(kernel: Array) -> tuple[list[Array], Array]:
    """Return one half of the Gram matrix as a trigonometric polynomial: lags and coefficients.

    The other half is its conjugate transpose.  Lags are per axis, coefficients (*lags, n, n) on
    the side with fewer channels.  The first axis has no negative lags, and its lag 0, which both
    halves contain, is halved.
    """
    if len(kernel) > kernel.shape[1]:
        kernel = kernel.swapaxes(0, 1)
    taps = kernel.shape[2:]
    lags = [np.arange(taps[0]), *(np.arange(1 - k, k) for k in taps[1:])]
    products = np.empty((*map(len, lags), len(kernel), len(kernel)))
    for at in np.ndindex(products.shape[:-2]):
        lag = [q[i] for q, i in zip(lags, at)]
        shifted = kernel[trailing(*(slice(max(q, 0), k + min(q, 0)) for q, k in zip(lag, taps)))]
        fixed = kernel[trailing(*(slice(max(-q, 0), k - max(q, 0)) for q, k in zip(lag, taps)))]
        products[at] = shifted.reshape(len(kernel), -1) @ fixed.reshape(len(kernel), -1).T
    products[0] /= 2
    return lags, products


def _half_spectrum(grid: Ints) -> Array:
    """Return frequencies (F, axes), one of each conjugate pair: the kernel is real."""
    k = np.indices(grid).reshape(len(grid), -1)
    opposite = np.ravel_multi_index(tuple(-k % np.array(grid)[:, None]), grid)
    return k[:, np.arange(k.shape[1]) <= opposite].T


def _peak(grams: Array, known: float) -> float:
    """Return the largest eigenvalue of Hermitian matrices (F, n, n), at least `known`."""
    size = np.abs(grams)
    bound = np.minimum(size.sum(axis=2).max(axis=1), np.sqrt(np.square(size).sum(axis=(1, 2))))
    # Order by a few steps of the power method: a large `known` at the start settles most others.
    v = np.random.default_rng(0).standard_normal((1, grams.shape[1], 1))
    for _ in range(6):
        v = grams @ v
        length = np.linalg.norm(v, axis=1, keepdims=True)
        v = v / np.where(length > 0, length, 1)
    order = np.argsort(-length[:, 0, 0])
    order, batch = order[bound[order] > known * (1 + TOLERANCE)], 1
    while len(order):
        if _has_no_eigenvalue_above(grams[order[:batch]], known):
            order, batch = order[batch:], max(1, min(2 * batch, CHOLESKY_BATCH // grams[0].size))
        elif batch > 1:
            batch = 1
        else:
            known = max(known, float(np.linalg.eigvalsh(grams[order[0]])[-1]))
            order = order[1:][bound[order[1:]] > known * (1 + TOLERANCE)]
    return known


def _has_no_eigenvalue_above(grams: Array, limit: float) -> bool:
    """Return whether no eigenvalue exceeds `limit` by more than a relative `TOLERANCE`."""
    try:
        np.linalg.cholesky(limit * (1 + TOLERANCE) * np.eye(grams.shape[-1]) - grams)
    except np.linalg.LinAlgError:
        return False
    return True


def _matricised(kernel: Array, known: float) -> float:
    """Return the root of the taps times the smallest norm as a matrix, at most `known`."""
    axes, root = range(2, kernel.ndim), math.sqrt(math.prod(kernel.shape[2:]))
    for choice in itertools.product((False, True), repeat=len(axes)):
        rows = [a for a, up in zip(axes, choice) if up]
        columns = [a for a, up in zip(axes, choice) if not up]
        matrix = kernel.transpose(0, *rows, 1, *columns)
        matrix = matrix.reshape(math.prod(matrix.shape[: 1 + len(rows)]), -1)
        if len(matrix) > matrix.shape[1]:
            matrix = matrix.T
        lower = root * float(np.linalg.norm(matrix)) / math.sqrt(len(matrix))
        if lower >= known:
            continue
        gram = matrix @ matrix.T
        if _has_no_eigenvalue_above(gram, (known / root) ** 2):
            known = min(known, root * math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))
    return known
