"""Families: each is a function from a dense convolution to a chain of cheaper stages."""

from __future__ import annotations

from lowrank.factorization import Factorization
from lowrank.families import cp as _cp
from lowrank.families import kronecker as _kronecker
from lowrank.families import svd as _svd
from lowrank.families import tensor_train as _tt
from lowrank.families import tucker as _tucker
from lowrank.families.family import Family, Spectrum
from lowrank.families.kernel import NotApplicable
from lowrank.families.sweep_point import SweepPoint

__all__ = ["FAMILIES", "Family", "NotApplicable", "Spectrum", "SweepPoint", "applicable"]

#: Every family by name, in the order in which tables show them.
FAMILIES: dict[str, Family] = {
    **_svd.FAMILIES,
    **_kronecker.FAMILIES,
    **_cp.FAMILIES,
    **_tucker.FAMILIES,
    **_tt.FAMILIES,
}


def applicable(conv: Factorization) -> dict[str, tuple[str, ...]]:
    """Return the families that apply to a convolution, with their variants.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.

    Returns
    -------
    dict of str to tuple of str
        Variants by name of the family, in the order of :data:`FAMILIES`.

    Raises
    ------
    ValueError, TypeError
        If `conv` is not one dense stage.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.families import applicable
    >>> applicable(lowrank.dense(np.ones((8, 1, 3, 3)), groups=8))
    {'spatial_svd': ('h-w', 'w-h')}
    """
    found = {}
    for name, family in FAMILIES.items():
        try:
            found[name] = family.variants(conv)
        except NotApplicable:
            continue
    return found
