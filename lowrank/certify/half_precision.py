"""Errors of a chain in half precision, predicted without rounding anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array
from lowrank.certify.common import energy, joint_energies, ratio, table
from lowrank.core import chain_algebra
from lowrank.factorization import Factorization


@dataclass(frozen=True, slots=True)
class Rounding:
    r"""Predicted errors of a chain that is stored or run in half precision.

    Attributes
    ----------
    dtype : str
        ``"float16"`` or ``"bfloat16"``.
    weights : float
        Expected (RMS) relative error of the kernel when the weights are rounded.
    output : float
        Expected (RMS) relative error of the output for white noise when weights, input and the
        results of all stages are rounded, with accumulation in float32.
    worst : float
        Upper bound on the relative error of the kernel for weights rounded to nearest, unless
        one overflows.
    largest, smallest : float
        Largest and smallest magnitude of the nonzero weights.
    overflows : int
        Number of weights that overflow.
    subnormal : int
        Number of nonzero weights that become subnormal or zero, and lose digits.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.certify import rounding
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 8, 3, 3)))
    >>> print(rounding(conv, "float16"))
    weights  2.1e-04  relative error of the kernel, float16 weights
    output   3.6e-04  relative error of the output, all stages in float16
    worst    3.6e-04  upper bound on the error of the kernel
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
            (
                "output",
                f"{self.output:.1e}",
                f"relative error of the output, all stages in {self.dtype}",
            ),
            ("worst", f"{self.worst:.1e}", "upper bound on the error of the kernel"),
        ]
        for name, count in (("overflows", self.overflows), ("subnormal", self.subnormal)):
            if count:
                rows.append((name, f"{count}", "weights"))
        return table(rows)


class _Format(NamedTuple):
    """Significant binary digits, smallest normal exponent and largest number of a type."""

    digits: int
    min_exponent: int
    largest: float


_FORMATS = {
    "float16": _Format(11, -14, 65504.0),
    "bfloat16": _Format(8, -126, (2 - 2.0**-7) * 2.0**127),
}


def rounding(f: Factorization, dtype: Any) -> Rounding:
    r"""Predict the errors of a chain in half precision.

    Parameters
    ----------
    f : Factorization
        Chain that represents one kernel; it is compared with itself in exact arithmetic.
    dtype : dtype
        ``"float16"`` or ``"bfloat16"``, as a name or a dtype.

    Returns
    -------
    Rounding

    Raises
    ------
    ValueError
        If `dtype` is not one of these, or plain and transposed stages are mixed.

    Notes
    -----
    A type of p digits rounds numbers of :math:`[2^e, 2^{e+1})` to multiples of
    :math:`2^{e+1} u`, :math:`u = 2^{-p}`, and subnormal ones as if e were the least exponent.
    With a uniform distribution the error has variance :math:`4^e u^2 / 3`.  The exponents of the
    weights are known, so

    .. math:: E\|\Delta \hat W\|^2 = \sum_w \operatorname{var}(w)
       \Bigl\|\frac{\partial \hat W}{\partial w}\Bigr\|^2 .

    Of the results of stages only the power is known: for white input that of channel c is
    :math:`\|B_c\|^2`, with the kernel :math:`B_c` of the chain up to c.  A number whose mantissa m
    is log-uniform has the mean relative variance :math:`u^2/3 \; E[m^{-2}] = u^2 / (8 \ln 2)`,
    about :math:`0.18\,u^2`; for Gaussian numbers this holds within 1 %.  Propagated through the
    kernel :math:`A_c` of the remaining chain it adds :math:`0.18\,u^2 \|B_c\|^2 \|A_c\|^2` at each
    joint, and :math:`0.18\,u^2 \|\hat W\|^2` at the input and at the output.

    In the worst case each weight is off by half its spacing, :math:`2^e u`, and all errors have
    one sign: their effect on the kernel of the weights' magnitudes bounds the error of each
    entry.

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
    number_format = _FORMATS[name]
    unit = 2.0**-number_format.digits
    before, after = chain_algebra.partial_kernels(f.stages, f.groups)
    kernel_energy = energy(before[-1])
    noise = 0.0
    for stage, square in zip(
        f.stages, chain_algebra.jacobian_norms(f.stages, before, after, f.groups)
    ):
        spacing = _spacing(stage.weight, number_format).reshape(*square.shape, -1)
        noise += float((np.square(spacing).sum(axis=2) * square).sum()) / 12
    joints = unit**2 / (8 * math.log(2)) * sum(joint_energies(before, after))
    magnitudes = [np.abs(s.weight, dtype=np.float64) for s in f.stages]
    exact, perturbed = (
        chain_algebra.compose([replace(s, weight=w) for s, w in zip(f.stages, weights)], f.groups)
        for weights in (magnitudes, [w + _spacing(w, number_format) / 2 for w in magnitudes])
    )
    nonzero = np.concatenate([w.ravel() for w in magnitudes])
    nonzero = nonzero[nonzero > 0]
    # Numbers overflow from half a spacing above the largest one.
    largest = number_format.largest
    limit = largest + 2.0 ** (math.floor(math.log2(largest)) - number_format.digits)
    return Rounding(
        name,
        math.sqrt(ratio(noise, kernel_energy)),
        math.sqrt(ratio(noise + joints, kernel_energy)),
        math.sqrt(ratio(energy(perturbed - exact), kernel_energy)),
        float(nonzero.max(initial=0.0)),
        float(nonzero.min(initial=math.inf)),
        int((nonzero >= limit).sum()),
        int((nonzero < 2.0**number_format.min_exponent).sum()),
    )


def _spacing(weight: Array, number_format: _Format) -> Array:
    """Return the distance between representable numbers at each weight; 0 at zeros."""
    exponent = np.frexp(np.abs(weight, dtype=np.float64))[1] - 1
    exponent = np.maximum(exponent, number_format.min_exponent)
    spacing = np.ldexp(1.0, exponent + 1 - number_format.digits)
    return np.where(weight != 0, spacing, 0.0)
