"""Certificates: what was reached, what nothing can reach, and what it means at the output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints, trailing
from lowrank.certify.norms import Norm, operator_norm, resolution_free
from lowrank.core import chain_algebra, reference
from lowrank.core.geometry import Geometry
from lowrank.core.tables import columns
from lowrank.factorization import Factorization, as_input
from lowrank.families import FAMILIES
from lowrank.families.family import as_kernel

CHUNK = 2**22  # numbers of patches held at a time: 32 MB

#: Families whose chains are sums of outer products.
SUMS = ("cp", "cp3", "jaderberg", "separable_sum", "tucker_cp")


@dataclass(frozen=True, slots=True)
class Certificate:
    r"""How far a chain is from its kernel, how far any like it must be, and how firmly it stands.

    Attributes
    ----------
    error : float
        Relative Frobenius error that the chain has.
    bound : float
        A lower bound on the error of every chain of that family, form and rank.
    sensitivity : float
        Expected squared relative error of the kernel for noise on every weight of the chain as
        large as the weights of its stage, in the root mean square: 1 for the dense kernel, at
        most the number of stages where nothing cancels, and more where large terms do.
    terms : float or None
        For sums of outer products (cp, cp3, jaderberg, filter, tucker_cp) the root of the sum
        of their squared norms over :math:`\|W\|`.  About 1 where terms do not cancel; at 100
        two digits are lost to cancellation.

    Examples
    --------
    >>> from lowrank import Certificate
    >>> print(Certificate(error=0.5, bound=0.375, sensitivity=20.0))
    error        0.5000
    bound        0.3750  no chain of this family, form and rank has less
    gap          0.1250
    sensitivity      20  of the kernel to noise on every weight, of the weights' own size
    """

    error: float
    bound: float
    sensitivity: float
    terms: float | None = None

    @property
    def gap(self) -> float:
        """What a perfect fit could still gain, at the most."""
        return self.error - self.bound

    def __str__(self) -> str:
        rows = [
            ("error", f"{self.error:.4f}", ""),
            ("bound", f"{self.bound:.4f}", "no chain of this family, form and rank has less"),
            ("gap", f"{self.gap:.4f}", ""),
            (
                "sensitivity",
                f"{self.sensitivity:.4g}",
                "of the kernel to noise on every weight, of the weights' own size",
            ),
        ]
        if self.terms is not None:
            rows.append(
                (
                    "terms",
                    f"{self.terms:.4g}",
                    "times the kernel's norm: far above 1 where they cancel",
                )
            )
        return _table(rows)


@dataclass(frozen=True, slots=True)
class Rounding:
    r"""What storing and running a chain in half precision costs.

    Attributes
    ----------
    dtype : str
        ``"float16"`` or ``"bfloat16"``.
    weights : float
        Expected relative error (root of the mean square) of the kernel if weights are rounded.
    output : float
        The same of the output for white noise, if the input and the results of all stages are
        rounded as well, and sums are kept in float32.
    worst : float
        No weights rounded to nearest make a larger relative error, unless one overflows.
    largest, smallest : float
        Magnitudes of the weights, zeros left out.
    overflows, subnormal : int
        How many weights are too large for the type, and how many so small that it has fewer
        digits for them, or none.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import rounding
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 8, 3, 3)))
    >>> print(rounding(conv, "float16"))
    weights  2.1e-04  relative error of the kernel, float16 weights
    output   3.6e-04  of the output, all stages in float16
    worst    3.6e-04  of the kernel at the most
    """

    dtype: str
    weights: float
    output: float
    worst: float
    largest: float
    smallest: float
    overflows: int
    subnormal: int

    def __str__(self) -> str:
        rows = [
            (
                "weights",
                f"{self.weights:.1e}",
                f"relative error of the kernel, {self.dtype} weights",
            ),
            ("output", f"{self.output:.1e}", f"of the output, all stages in {self.dtype}"),
            ("worst", f"{self.worst:.1e}", "of the kernel at the most"),
        ]
        for name, count in (("overflows", self.overflows), ("subnormal", self.subnormal)):
            if count:
                rows.append((name, f"{count}", "weights"))
        return _table(rows)


@dataclass(frozen=True, slots=True)
class OutputBound:
    r"""How far the output of a chain is from that of its convolution, at most and on average.

    All are about E, the kernel less that of the chain, which is applied to the input with the
    border of the convolution.

    Attributes
    ----------
    l2 : Norm
        :math:`\|e\|_2 \le` ``l2.value`` :math:`\|x\|_2` for the error e of the output, for
        inputs of the size that was asked for.
    l2_free : Norm
        The same for every size.
    relative : float
        ``l2`` over the operator norm of the kernel, or of the bounds on both.
    linf : float
        :math:`\max|e| \le` ``linf`` :math:`\max|x|`, a constant border being part of x.
    grey : float
        Largest error for samples between 0 and `levels`, in grey levels.
    rms : float
        Root of the mean square of an output sample's error, over all channels: for white input
        of variance 1 away from the border, or for the inputs of a second moment.
    rms_relative : float
        The same over that of the output.

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
    l2_free: Norm
    relative: float
    linf: float
    grey: float
    rms: float
    rms_relative: float

    def __str__(self) -> str:
        rows = [
            ("l2", f"{self.l2.value:.4g}", f"times the input's norm at the most: {self.l2.how}"),
            ("l2, relative", f"{self.relative:.4g}", "times that of the convolution"),
            ("l2, any size", f"{self.l2_free.value:.4g}", self.l2_free.how),
            ("linf", f"{self.linf:.4g}", "times the largest input sample at the most"),
            ("grey", f"{self.grey:.4g}", "at the most, for samples from 0 to `levels`"),
            ("rms", f"{self.rms:.4g}", "an output sample on average"),
            ("rms, relative", f"{self.rms_relative:.4g}", "times that of the output"),
        ]
        if self.l2.offset:
            rows.insert(1, ("offset", f"{self.l2.offset:.4g}", "more, from the constant border"))
        return _table(rows)


def certificate(conv: Factorization, f: Factorization) -> Certificate:
    r"""Compare a chain with its kernel, and with the best that its rank allows.

    Parameters
    ----------
    conv : Factorization
        The dense convolution.
    f : Factorization
        An approximation of it by one of :data:`lowrank.FAMILIES`, or `conv` itself.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        If `f` is a chain of the caller's own, which no family bounds, or does not fit `conv`.

    Notes
    -----
    Every matricisation of a tensor of CP rank R has rank at most R, and those of a Tucker
    tensor or tensor train the ranks that these name; so by Eckart and Young the tail
    :math:`\sqrt{\sum_{r > R} \sigma_r^2}` of each is a lower bound [1]_, of which the largest
    is taken.  For the families that are one SVD it is reached.

    The sensitivity is

    .. math:: \frac{1}{\|W\|^2} \sum_k \overline{w_k^2}
       \sum_i \Bigl\|\frac{\partial \hat W}{\partial w_{k i}}\Bigr\|^2

    over the stages k and their weights, whose mean square makes it free of units; for factors of
    a CP sum with equal mean squares it is that of [2]_ times this.  Large terms that cancel, as
    fits of CP come to have, make it large, and half precision useless.

    References
    ----------
    .. [1] G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th ed., 2013, theorem 2.4.8.
    .. [2] A.-H. Phan et al., "Stable low-rank tensor decomposition for compression of
       convolutional neural network", ECCV 2020. :arxiv:`2008.05441`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> c = lowrank.certificate(conv, lowrank.tucker(conv, rank=(4, 3)))
    >>> 0 < c.bound < c.error < 1
    True
    """
    as_kernel(conv)
    conv, f = conv.to("cpu"), f.to("cpu")
    error = f.error(conv.to_dense())
    if f.family != "dense" and f.family not in FAMILIES:
        raise ValueError(f"no family bounds the error of {f!r}")
    bound = 0.0 if f.family == "dense" else FAMILIES[f.family].bound(conv, f.rank, f.variant)
    # Every stage divided by its largest weight, and the kernel by all of them: nothing overflows.
    scales = [chain_algebra.magnitude(s.weight) or 1.0 for s in f.stages]
    stages = [replace(s, weight=s.weight.astype(np.float64) / k) for s, k in zip(f.stages, scales)]
    w = conv.to_dense().astype(np.float64)
    for k in scales:
        w = w / k
    before, after = chain_algebra.halves(stages, f.groups)
    whole = _energy(w)
    noise = chain_algebra.jacobian(stages, before, after, f.groups)
    gain = sum(
        float(np.square(s.weight).mean() * j.sum()) * math.prod(s.kernel)
        for j, s in zip(noise, stages)
    )
    terms = None
    if f.family in SUMS:
        terms = math.sqrt(_ratio(_energies(before, after)[_joint_of_terms(f)], whole))
    return Certificate(error, min(bound, error), _ratio(gain, whole), terms)


def _joint_of_terms(f: Factorization) -> int:
    """The joint of a sum of outer products where each of its channels is one of them."""
    stages = f.stages[::-1] if f.transposed else f.stages
    lone = (s.weight.shape[1] == 1 and math.prod(s.kernel) > 1 for s in stages)
    return 1 + list(lone).index(True)


def _energies(before: Sequence[Array], after: Sequence[Array]) -> list[float]:
    """Squared norms of what goes through each channel of a joint alone, added up."""
    flat = ((b.reshape(len(b), -1), a.reshape(len(a), -1)) for b, a in zip(before, after))
    return [float(np.square(b).sum(axis=1) @ np.square(a).sum(axis=1)) for b, a in flat]


def _energy(weight: Array) -> float:
    return float(np.square(weight, dtype=np.float64).sum())


def _ratio(a: float, b: float) -> float:
    """``a / b``, 0 for nothing of nothing."""
    return a / b if b else (math.inf if a else 0.0)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Name, number, and what it is about."""
    lines = columns([row[:2] for row in rows])
    width = max(map(len, lines))
    return "\n".join(f"{x:<{width}}  {row[2]}".rstrip() for x, row in zip(lines, rows))


class _Format(NamedTuple):
    """Digits of a binary type, smallest exponent of its normal numbers, and largest number."""

    digits: int
    least: int
    largest: float


_FORMATS = {
    "float16": _Format(11, -14, 65504.0),
    "bfloat16": _Format(8, -126, (2 - 2.0**-7) * 2.0**127),
}


def rounding(f: Factorization, dtype: Any) -> Rounding:
    r"""Predict what half precision does to a chain, without rounding anything.

    Parameters
    ----------
    f : Factorization
        A chain that stands for one kernel; it is compared with itself.
    dtype : dtype
        ``"float16"`` or ``"bfloat16"``, as a name or a dtype.

    Returns
    -------
    Rounding

    Raises
    ------
    ValueError
        If `dtype` is another, or plain and transposed stages are mixed.

    Notes
    -----
    A type of p digits rounds numbers of :math:`[2^e, 2^{e+1})` to multiples of
    :math:`2^{e+1} u`, :math:`u = 2^{-p}`, and subnormal ones as if e were the least exponent;
    taken for uniform, the error has variance :math:`4^e u^2 / 3`.  That is known of every weight,
    and

    .. math:: E\|\Delta \hat W\|^2 = \sum_w \operatorname{var}(w)
       \Bigl\|\frac{\partial \hat W}{\partial w}\Bigr\|^2 .

    Of the results of stages only the power is known: that of channel c for white input is
    :math:`\|B_c\|^2`, the kernel up to there.  A number whose mantissa m is spread evenly over the
    logarithms has the mean relative variance :math:`u^2/3 \; E[m^{-2}] = u^2 / (8 \ln 2)`, about
    :math:`0.18\,u^2`, and Gaussian ones come within a hundredth of it.  Through the kernel
    :math:`A_c` from there on it adds :math:`0.18\,u^2 \|B_c\|^2 \|A_c\|^2`, at each joint; at the
    input and the output that is :math:`0.18\,u^2 \|\hat W\|^2`.

    At the worst each weight is off by half its spacing, :math:`2^e u`, and no signs differ: what
    that adds to the kernel of the weights' magnitudes bounds the error, entry by entry.

    References
    ----------
    .. [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002, ch. 2.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import rounding
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> r = rounding(lowrank.spatial_svd(conv, 4), "bfloat16")
    >>> 2**-12 < r.weights < r.output < 2**-8 < r.worst
    True
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(_FORMATS)}, got {dtype!r}")
    form = _FORMATS[name]
    unit = 2.0**-form.digits
    before, after = chain_algebra.halves(f.stages, f.groups)
    whole = _energy(before[-1])
    noise = 0.0
    for stage, square in zip(f.stages, chain_algebra.jacobian(f.stages, before, after, f.groups)):
        spacing = _spacing(stage.weight, form).reshape(*square.shape, -1)
        noise += float((np.square(spacing).sum(axis=2) * square).sum()) / 12
    joints = unit**2 / (8 * math.log(2)) * sum(_energies(before, after))
    sizes = [np.abs(s.weight, dtype=np.float64) for s in f.stages]
    bare, more = (
        chain_algebra.compose([replace(s, weight=w) for s, w in zip(f.stages, weights)], f.groups)
        for weights in (sizes, [w + _spacing(w, form) / 2 for w in sizes])
    )
    flat = np.concatenate([w.ravel() for w in sizes])
    flat = flat[flat > 0]
    # A number is rounded beyond the largest half a spacing above it.
    most = form.largest + 2.0 ** (math.floor(math.log2(form.largest)) - form.digits)
    return Rounding(
        name,
        math.sqrt(_ratio(noise, whole)),
        math.sqrt(_ratio(noise + joints, whole)),
        math.sqrt(_ratio(_energy(more - bare), whole)),
        float(flat.max(initial=0.0)),
        float(flat.min(initial=math.inf)),
        int((flat >= most).sum()),
        int((flat < 2.0**form.least).sum()),
    )


def _spacing(weight: Array, form: _Format) -> Array:
    """Distance of the neighbours of each weight in a type; 0 for those that are 0."""
    exponent = np.frexp(np.abs(weight, dtype=np.float64))[1] - 1
    spacing = np.ldexp(1.0, np.maximum(exponent, form.least) + 1 - form.digits)
    return np.where(weight != 0, spacing, 0.0)


def output_bound(
    conv: Factorization,
    f: Factorization,
    input_shape: Sequence[int],
    *,
    levels: float = 255.0,
    second_moment: Array | None = None,
) -> OutputBound:
    r"""Say what the error of a chain's kernel means at the output.

    Parameters
    ----------
    conv : Factorization
        The dense convolution.
    f : Factorization
        A chain that stands for a kernel of the same shape, with the same geometry.
    input_shape : sequence of int
        (channels, \*spatial), or the spatial size alone.
    levels : float
        Largest sample of an image, for ``grey``; the smallest is 0.
    second_moment : ndarray, shape (groups, in \* taps, in \* taps), optional
        Mean products of the samples that an output sample sees, from :func:`second_moment`;
        for one group also without the first axis.  White input of variance 1 if not given.

    Returns
    -------
    OutputBound
        Biases are left out: both have the same.

    Raises
    ------
    ValueError
        If `f` is not one convolution of the same shape and geometry as `conv`, the input does
        not fit, or `second_moment` does not.

    Notes
    -----
    With :math:`E = W - \hat W`, rows t for output channels, and C the second moment of a patch,

    .. math:: \|e\|_2 \le \|E\|_{op} \|x\|_2, \quad
       \max|e| \le \max_t \sum_j |E_{tj}| \, \max|x|, \quad
       \mathbb E\,|e|^2 = \operatorname{tr}(E C E^\top),

    the last summed over channels; ``rms`` is the root of its mean over them.  For samples from
    0 to L an error is between :math:`-L \sum_j E^-_{tj}` and :math:`L \sum_j E^+_{tj}`.  Both are
    attained by an input at least as large as the kernel.  Of a transposed convolution with a stride
    the output samples of each phase see taps of their own: rows are (t, phase).

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
    """
    as_kernel(conv)
    _check_alike(conv, f, input_shape)
    if not 0 < levels < math.inf:
        raise ValueError(f"levels must be above 0, got {levels!r}")
    whole = conv.to_dense().astype(np.float64)
    rest = whole - f.to_dense()
    missed = _with_kernel(conv, rest)
    l2, own = operator_norm(missed, input_shape), operator_norm(conv, input_shape)
    e = _output_rows(conv, rest)
    plus, minus = np.maximum(e, 0).sum(axis=1), np.maximum(-e, 0).sum(axis=1)
    low, high = 0.0, float(levels)
    if conv.geometry.padding_mode == "constant":
        low, high = min(low, conv.geometry.value), max(high, conv.geometry.value)
    grey = max((high * plus - low * minus).max(), (high * minus - low * plus).max())
    if second_moment is None:
        power, all_power = _energy(rest), _energy(whole)
    else:
        c = _checked_moment(conv, second_moment)
        power, all_power = _power(conv, rest, c), _power(conv, whole, c)
    return OutputBound(
        l2,
        resolution_free(missed),
        _ratio(l2.value, own.value),
        float((plus + minus).max()),
        float(grey),
        math.sqrt(power / len(e)),
        math.sqrt(_ratio(power, all_power)),
    )


def _with_kernel(conv: Factorization, weight: Array) -> Factorization:
    return replace(conv, stages=(replace(conv.stages[0], weight=weight),), bias=None)


def _check_alike(conv: Factorization, f: Factorization, input_shape: Sequence[int]) -> None:
    """That `f` stands for a convolution like `conv`, at the border as well."""
    if f.geometry != conv.geometry or f.groups != conv.groups or f.transposed != conv.transposed:
        raise ValueError(f"f must have the geometry and groups of {conv!r}, got {f!r}")
    shape = conv.to_dense().shape
    if f.to_dense().shape != shape or f.output_shape(input_shape) != conv.output_shape(input_shape):
        raise ValueError(f"f must have a kernel of shape {shape} and the same output, got {f!r}")
    for axis in range(f.ndim):
        started = False
        for s in f.stages[::-1] if f.transposed else f.stages:
            g = s.geometry
            if any(g.padding[axis]) and (started or g.padding_mode != f.geometry.padding_mode):
                raise ValueError(
                    f"f must pad axis {axis} once, as {f.geometry.padding_mode}, ahead of all taps "
                    f"along it: else it is not the convolution with its kernel, got {f!r}"
                )
            started |= s.kernel[axis] > 1 or g.stride[axis] > 1


def _output_rows(conv: Factorization, weight: Array) -> Array:
    """What an output sample is made of: (channels and phases, terms of the sum)."""
    if not conv.transposed:
        return weight.reshape(len(weight), -1)
    geometry, taps = conv.geometry, weight.shape[2:]
    each = weight.reshape(conv.groups, -1, *weight.shape[1:])
    rows = []
    for phase in itertools.product(*map(range, geometry.stride)):
        kept = [
            [t for t in range(k) if t * d % s == p]
            for k, d, s, p in zip(taps, geometry.dilation, geometry.stride, phase)
        ]
        part = each[trailing(*np.ix_(*kept))]
        rows.append(part.swapaxes(1, 2).reshape(conv.groups * each.shape[2], -1))
    widest = max(r.shape[1] for r in rows)
    return np.vstack([np.pad(r, ((0, 0), (0, widest - r.shape[1]))) for r in rows])


def _checked_moment(conv: Factorization, moment: Array) -> Array:
    """`moment` as (groups, in * taps, in * taps)."""
    if conv.transposed:
        raise ValueError("second_moment is of plain convolutions, conv is transposed")
    n = math.prod(conv.stages[0].weight.shape[1:])
    shape, moment = (conv.groups, n, n), np.asarray(moment)
    if moment.shape != shape and not (conv.groups == 1 and moment.shape == shape[1:]):
        raise ValueError(f"second_moment must have shape {shape}, got {moment.shape}")
    return moment.reshape(shape)


def _power(conv: Factorization, weight: Array, moment: Array) -> float:
    """``tr(W C W')``, added up over groups."""
    rows = weight.reshape(conv.groups, -1, moment.shape[-1])
    return max(float(np.einsum("gti,gti->", rows @ moment, rows)), 0.0)


def second_moment(conv: Factorization, x: Array) -> Array:
    r"""Average the products of the samples that an output sample sees, over inputs.

    Parameters
    ----------
    conv : Factorization
        A dense convolution; plain, not transposed.
    x : ndarray, shape (batch, channels, \*spatial)
        Inputs, such as a few hundred of those that a layer gets.

    Returns
    -------
    ndarray of float64, shape (groups, in \* taps, in \* taps)
        For each group :math:`C = E[p p^\top]` for its patches p, flat in the order of the
        weight's (in, \*taps): with the border, stride and dilation of `conv`, all output samples
        of all inputs counting alike.

    Raises
    ------
    ValueError
        If `conv` is no plain dense convolution, or `x` does not fit it or is empty.
    TypeError
        If `x` is not a floating-point array.

    Notes
    -----
    With it, :math:`\operatorname{tr}(E C E^\top)` is exactly the mean of the squared errors of
    the outputs for `x`, added up over channels.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import second_moment
    >>> conv = lowrank.dense(np.ones((1, 1, 2)))
    >>> second_moment(conv, np.array([[[1.0, 2.0, 3.0]]]))
    array([[[2.5, 4. ],
            [4. , 6.5]]])
    """
    as_kernel(conv)
    if conv.transposed:
        raise ValueError(f"conv must be a plain convolution, not a transposed one, got {conv!r}")
    x = as_input(conv, x)
    weight, geometry = conv.stages[0].weight, conv.geometry
    n, outs = math.prod(weight.shape[1:]), conv.output_shape(x.shape[1:])[1:]
    if not len(x):
        raise ValueError(f"x must hold at least one input, got shape {x.shape}")
    total = np.zeros((conv.groups, n, n))
    outside = np.full(conv.in_channels, geometry.value)
    rows = max(1, CHUNK // (n * conv.groups * math.prod(outs[1:])))
    for example in x:
        one = example[None].astype(np.float64)
        one = reference.pad(one, geometry.padding, geometry.padding_mode, outside)[0]
        for first in range(0, outs[0], rows):
            patches = _patches(one, weight.shape[2:], geometry, first, rows)
            patches = patches.reshape(conv.groups, n, -1)
            total += patches @ patches.swapaxes(1, 2)
    return total / (len(x) * math.prod(outs))


def _patches(x: Array, kernel: Ints, geometry: Geometry, first: int, rows: int) -> Array:
    """What `rows` rows of outputs from the `first` on see of a padded input: (in, *taps, *outs)."""
    axes = tuple(range(1, x.ndim))
    every = np.lib.stride_tricks.sliding_window_view(x, geometry.extent(kernel), axes)
    at = [slice(None, None, s) for s in (*geometry.stride, *geometry.dilation)]
    seen = every[:, *at][:, first : first + rows]
    return np.moveaxis(seen, axes, tuple(a - x.ndim for a in axes))
