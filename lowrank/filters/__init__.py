"""Filters for images, volumes, cubes and series, with the conventions of scipy.ndimage."""

from difflib import get_close_matches
from typing import NoReturn

from lowrank.filters.apply import convolve as convolve
from lowrank.filters.apply import correlate as correlate
from lowrank.filters.apply import filter_image as filter_image
from lowrank.filters.apply import separable_correlate as separable_correlate
from lowrank.filters.arguments import MODES as MODES
from lowrank.filters.bank import correlate_bank as correlate_bank
from lowrank.filters.choose import FilterMethod as FilterMethod
from lowrank.filters.choose import FilterPlan as FilterPlan
from lowrank.filters.derivatives import gaussian_derivatives as gaussian_derivatives
from lowrank.filters.derivatives import gaussian_laplace as gaussian_laplace
from lowrank.filters.derivatives import gradient as gradient
from lowrank.filters.derivatives import gradient_magnitude as gradient_magnitude
from lowrank.filters.derivatives import hessian as hessian
from lowrank.filters.kernels import ball as ball
from lowrank.filters.kernels import box as box
from lowrank.filters.kernels import disk as disk
from lowrank.filters.kernels import dog as dog
from lowrank.filters.kernels import gabor as gabor
from lowrank.filters.kernels import gauss as gauss
from lowrank.filters.kernels import laplacian as laplacian
from lowrank.filters.kernels import log as log
from lowrank.filters.kernels import motion as motion
from lowrank.filters.kernels import prewitt as prewitt
from lowrank.filters.kernels import scharr as scharr
from lowrank.filters.kernels import sobel as sobel
from lowrank.filters.kernels import unsharp as unsharp
from lowrank.filters.normalised import normalised_correlate as normalised_correlate
from lowrank.filters.outer import OuterProduct as OuterProduct
from lowrank.filters.planning import plan_filter as plan_filter
from lowrank.filters.separability import rank as rank
from lowrank.filters.separability import separate as separate
from lowrank.filters.tensors import structure_tensor as structure_tensor
from lowrank.filters.tensors import symmetric_eigenvalues as symmetric_eigenvalues

#: Functions of :mod:`lowrank.ndimage` that are not here under the same name.
SCIPY_NAMES = {
    "correlate1d", "convolve1d", "gaussian_filter", "gaussian_filter1d",
    "gaussian_gradient_magnitude", "laplace", "uniform_filter", "uniform_filter1d",
}  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    known = [n for n in globals() if not n.startswith("_")]
    near = [n for n in known if n in name] or get_close_matches(name, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    if name in SCIPY_NAMES:
        hint = f": did you mean lowrank.ndimage.{name}?"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
