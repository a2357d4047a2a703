"""Certificates of a chain: achieved error, lower bound, and sensitivity to weight noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lowrank.certify.arithmetic import stage_errors
from lowrank.certify.common import energy, joint_energies, ratio, table
from lowrank.core import chain_algebra
from lowrank.engine import Runner
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES
from lowrank.families.kernel import as_kernel


@dataclass(frozen=True, slots=True)
class Certificate:
    r"""Error of a chain, a lower bound on it, and the chain's numerical stability.

    Attributes
    ----------
    error : float
        Relative Frobenius error of the chain's kernel.
    bound : float
        Lower bound on the error of every chain of this family, variant and rank.
    sensitivity : float
        Expected squared relative error of the kernel when every weight gets independent noise
        whose variance is the mean square of its stage's weights.  It is 1 for the dense kernel,
        at most the number of stages without cancellation, and larger where large terms cancel.
    cancellation : float or None
        For sums of outer products (cp, cp3, jaderberg, separable_sum, tucker_cp) the root of the
        sum of the terms' squared norms over :math:`\|W\|`.  About 1 without cancellation; 100
        means that two digits are lost.
    algorithm : float or None
        Predicted relative RMS error of the output, for white inputs, from the fast (Winograd,
        Toom-Cook) algorithms of a given plan of the chain; 0 if all stages run by direct sums.
        For such inputs `error` is the same quotient for the approximation of the kernel.

    Examples
    --------
    >>> from lowrank import Certificate
    >>> print(Certificate(error=0.5, bound=0.375, sensitivity=20.0))
    error        0.5000
    bound        0.3750  no chain of this family, variant and rank has less
    gap          0.1250
    sensitivity      20  squared error of the kernel over that of its weights
    """

    error: float
    bound: float
    sensitivity: float
    cancellation: float | None = None
    algorithm: float | None = None

    @property
    def gap(self) -> float:
        """Largest reduction of the error that a better fit could reach."""
        return self.error - self.bound

    def __str__(self) -> str:
        rows = [
            ("error", f"{self.error:.4f}", ""),
            ("bound", f"{self.bound:.4f}", "no chain of this family, variant and rank has less"),
            ("gap", f"{self.gap:.4f}", ""),
            (
                "sensitivity",
                f"{self.sensitivity:.4g}",
                "squared error of the kernel over that of its weights",
            ),
        ]
        if self.cancellation is not None:
            rows.append(
                (
                    "cancellation",
                    f"{self.cancellation:.4g}",
                    "norm of the terms over that of the kernel; digits are lost far above 1",
                )
            )
        if self.algorithm is not None:
            explanation = "predicted share of the fast algorithms in the error of the output"
            rows.append(("algorithm", f"{self.algorithm:.1e}", explanation))
        return table(rows)


def certificate(conv: Factorization, f: Factorization, *, run: Runner | None = None) -> Certificate:
    r"""Compare a chain with its kernel, and with the best that its rank allows.

    Parameters
    ----------
    conv : Factorization
        Dense convolution.
    f : Factorization
        Approximation of `conv` by one of :data:`lowrank.FAMILIES`, or `conv` itself.
    run : callable, optional
        Plan of `f` on the CPU, from :meth:`lowrank.Factorization.compile`, for the share of its
        algorithms.  :func:`output_bound` bounds that share, too.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        If `f` belongs to no family (a custom chain has no bound), or does not fit `conv`, or `run`
        is not a plan of `f`.
    TypeError
        If `run` is not a plan on the CPU.

    Notes
    -----
    Every matricisation of a tensor of CP rank R has rank at most R.  Those of a Tucker tensor or
    a tensor train have at most the ranks of the decomposition.  By Eckart and Young the
    truncation error :math:`\sqrt{\sum_{r > R} \sigma_r^2}` of each matricisation is a lower bound
    [1]_; `bound` is the largest of these.  Families that are a single SVD attain it.

    The sensitivity is

    .. math:: \frac{1}{\|W\|^2} \sum_k \overline{w_k^2}
       \sum_i \Bigl\|\frac{\partial \hat W}{\partial w_{k i}}\Bigr\|^2

    over the stages k and their weights.  The mean square :math:`\overline{w_k^2}` makes it
    independent of how scale is distributed over stages; for CP factors of equal mean square it
    is the sensitivity of [2]_ times that mean square.  Large terms that cancel make it large,
    and then half precision is useless.

    A plan predicts the relative error :math:`\epsilon_k` of each stage that a fast algorithm
    computes.  With the kernels :math:`B_c` up to channel c behind the stage and :math:`A_c` from
    there on,

    .. math:: \text{algorithm}^2 = \frac{1}{\|W\|^2}
       \sum_k \epsilon_k^2 \sum_c \|B_c\|^2 \|A_c\|^2 .

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
    family = FAMILIES.get(f.family)  # None for the dense kernel
    bound = 0.0 if family is None else family.bound(conv, f.rank, f.variant)
    # Divide each stage by its largest weight, and the kernel by all of them, against overflow.
    scales = [chain_algebra.max_abs(s.weight) or 1.0 for s in f.stages]
    stages = [replace(s, weight=s.weight.astype(np.float64) / k) for s, k in zip(f.stages, scales)]
    kernel = conv.to_dense().astype(np.float64)
    for k in scales:
        kernel = kernel / k
    before, after = chain_algebra.partial_kernels(stages, f.groups)
    kernel_energy = energy(kernel)
    jacobians = chain_algebra.jacobian_norms(stages, before, after, f.groups)
    gain = sum(
        float(np.square(s.weight).mean() * j.sum()) * math.prod(s.kernel)
        for j, s in zip(jacobians, stages)
    )
    joints = joint_energies(before, after)
    cancellation = algorithm = None
    if family is not None and family.is_outer_product_sum:
        cancellation = math.sqrt(ratio(joints[_joint_of_terms(f)], kernel_energy))
    if run is not None:
        behind = joints[-2::-1] if f.transposed else joints[1:]
        noise = math.fsum(e**2 * j for e, j in zip(stage_errors(f, run), behind))
        algorithm = math.sqrt(ratio(noise, kernel_energy))
    return Certificate(
        error, min(bound, error), ratio(gain, kernel_energy), cancellation, algorithm
    )


def _joint_of_terms(f: Factorization) -> int:
    """Return the joint of a sum of outer products at which each channel is one term."""
    stages = f.stages[::-1] if f.transposed else f.stages
    is_depthwise = [s.weight.shape[1] == 1 and math.prod(s.kernel) > 1 for s in stages]
    return 1 + is_depthwise.index(True)
