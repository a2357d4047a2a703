"""Families: each is a function from a dense convolution to a chain of cheaper stages."""

from __future__ import annotations

from lowrank.families import cp as _cp
from lowrank.families import svd as _svd
from lowrank.families import tt as _tt
from lowrank.families import tucker as _tucker
from lowrank.families.family import Family, NotApplicable, Point

__all__ = ["FAMILIES", "Family", "NotApplicable", "Point"]

#: Every family by name, in the order in which tables show them.
FAMILIES: dict[str, Family] = {
    **_svd.FAMILIES,
    **_cp.FAMILIES,
    **_tucker.FAMILIES,
    **_tt.FAMILIES,
}
