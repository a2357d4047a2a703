"""Separable and low-rank convolution: the error, the cost, and an engine that runs the chain."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank import blocks as blocks
    from lowrank import filters as filters
    from lowrank import ndimage as ndimage
    from lowrank import perfmodel as perfmodel
    from lowrank.certify import Certificate as Certificate
    from lowrank.certify import OutputBound as OutputBound
    from lowrank.certify import Rounding as Rounding
    from lowrank.certify import certificate as certificate
    from lowrank.certify import output_bound as output_bound
    from lowrank.certify import rounding as rounding
    from lowrank.certify import rounding_bound as rounding_bound
    from lowrank.certify.norms import Norm as Norm
    from lowrank.certify.norms import operator_norm as operator_norm
    from lowrank.certify.norms import resolution_free as resolution_free
    from lowrank.core.cost import Cost as Cost
    from lowrank.core.geometry import Geometry as Geometry
    from lowrank.core.stage import Stage as Stage
    from lowrank.factorization import Factorization as Factorization
    from lowrank.factorization import chain as chain
    from lowrank.factorization import dense as dense
    from lowrank.families import FAMILIES as FAMILIES
    from lowrank.families.cp import ConvergenceWarning as ConvergenceWarning
    from lowrank.families.cp import cp as cp
    from lowrank.families.cp import cp3 as cp3
    from lowrank.families.cp import jaderberg as jaderberg
    from lowrank.families.cp import separable_sum as separable_sum
    from lowrank.families.kronecker import kronecker as kronecker
    from lowrank.families.svd import channel_svd as channel_svd
    from lowrank.families.svd import filter_basis as filter_basis
    from lowrank.families.svd import network_decoupling as network_decoupling
    from lowrank.families.svd import spatial_svd as spatial_svd
    from lowrank.families.tensor_train import tensor_train as tensor_train
    from lowrank.families.tucker import tucker as tucker
    from lowrank.families.tucker import tucker_cp as tucker_cp
    from lowrank.families.tucker import tucker_full as tucker_full
    from lowrank.filters import filter_image as filter_image
    from lowrank.filters import plan_filter as plan_filter
    from lowrank.interop import weights as weights
    from lowrank.io import load as load
    from lowrank.io import save as save
    from lowrank.selection import Candidate as Candidate
    from lowrank.selection import Frontier as Frontier
    from lowrank.selection import approximate as approximate
    from lowrank.selection import frontier as frontier
    from lowrank.selection import ranks as ranks

# Public names are imported at their first use: `import lowrank` takes a few milliseconds.
_MODULES = {
    "blocks": "lowrank.blocks",
    "filters": "lowrank.filters",
    "ndimage": "lowrank.ndimage",
    "perfmodel": "lowrank.perfmodel",
    "ranks": "lowrank.selection.ranks",
    "weights": "lowrank.interop.weights",
}
_NAMES = {
    "Certificate": "lowrank.certify",
    "OutputBound": "lowrank.certify",
    "Rounding": "lowrank.certify",
    "certificate": "lowrank.certify",
    "output_bound": "lowrank.certify",
    "rounding": "lowrank.certify",
    "rounding_bound": "lowrank.certify",
    "Norm": "lowrank.certify.norms",
    "operator_norm": "lowrank.certify.norms",
    "resolution_free": "lowrank.certify.norms",
    "Cost": "lowrank.core.cost",
    "Geometry": "lowrank.core.geometry",
    "Stage": "lowrank.core.stage",
    "Factorization": "lowrank.factorization",
    "chain": "lowrank.factorization",
    "dense": "lowrank.factorization",
    "FAMILIES": "lowrank.families",
    "ConvergenceWarning": "lowrank.families.cp",
    "cp": "lowrank.families.cp",
    "cp3": "lowrank.families.cp",
    "jaderberg": "lowrank.families.cp",
    "separable_sum": "lowrank.families.cp",
    "kronecker": "lowrank.families.kronecker",
    "channel_svd": "lowrank.families.svd",
    "filter_basis": "lowrank.families.svd",
    "network_decoupling": "lowrank.families.svd",
    "spatial_svd": "lowrank.families.svd",
    "tensor_train": "lowrank.families.tensor_train",
    "tucker": "lowrank.families.tucker",
    "tucker_cp": "lowrank.families.tucker",
    "tucker_full": "lowrank.families.tucker",
    "filter_image": "lowrank.filters",
    "plan_filter": "lowrank.filters",
    "load": "lowrank.io",
    "save": "lowrank.io",
    "Candidate": "lowrank.selection",
    "Frontier": "lowrank.selection",
    "approximate": "lowrank.selection",
    "frontier": "lowrank.selection",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
