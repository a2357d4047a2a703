"""Certificates: what was reached, and what nothing of that form and rank can reach."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.factorization import Factorization
from lowrank.families import FAMILIES
from lowrank.families.family import kernel_of


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far a chain is from its kernel, and how far any chain like it must be.

    Attributes
    ----------
    error : float
        Relative Frobenius error that the chain has.
    bound : float
        A lower bound on the error of every chain of that family, form and rank.

    Examples
    --------
    >>> from lowrank import Certificate
    >>> Certificate(error=0.5, bound=0.375).gap
    0.125
    """

    error: float
    bound: float

    @property
    def gap(self) -> float:
        """What a perfect fit could still gain, at the most."""
        return self.error - self.bound


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

    References
    ----------
    .. [1] G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th ed., 2013, theorem 2.4.8.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> c = lowrank.certificate(conv, lowrank.tucker(conv, rank=(4, 3)))
    >>> 0 < c.bound < c.error < 1
    True
    """
    kernel_of(conv)
    error = f.error(conv.to_dense())
    if f.family == "dense":
        return Certificate(error, 0.0)
    if f.family not in FAMILIES:
        raise ValueError(f"no family bounds the error of {f!r}")
    bound = FAMILIES[f.family].bound(conv, f.rank, f.form)
    return Certificate(error, min(bound, error))
