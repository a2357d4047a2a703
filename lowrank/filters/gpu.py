"""Filters of images on a GPU: CuPy arrays in, CuPy arrays out."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank import engine
from lowrank._typing import Ints
from lowrank.core import reference

if TYPE_CHECKING:
    from lowrank.filters.request import FilterRequest

CACHED_FILTERS = 64


def correlate(image: Any, along: Ints, request: FilterRequest, work: Any, out: Any) -> Any:
    """Filter a CuPy array; :func:`lowrank.filters.correlate` checks the arguments.

    The method is the one with the fewest MACs within the tolerance: a sum of separable terms, or
    the kernel itself.
    """
    xp = importlib.import_module("cupy")
    if out is None:
        out = xp.empty(image.shape, image.dtype)
    if image.size == 0:
        return out
    k = len(along)
    last = tuple(range(image.ndim - k, image.ndim))
    x = xp.ascontiguousarray(xp.moveaxis(image, along, last))
    # Channels become a batch.
    batch = x.reshape(-1, 1, *x.shape[-k:]).astype(work, copy=False)
    run = _compile(request, engine.device_of(image))
    y = xp.moveaxis(run(batch).reshape(x.shape), last, along)
    out[...] = reference.saturate(y, image.dtype) if image.dtype.kind in "iu" else y
    return out


@functools.lru_cache(CACHED_FILTERS)
def _compile(request: FilterRequest, device: str) -> engine.Runner:
    if request.method == "fft":
        raise ValueError("method must be auto, direct or separable on a GPU, got 'fft'")
    plan = request.plan()
    methods = [m for m in plan.methods if m.block is None]
    if request.rank is None:
        methods = [m for m in methods if m.error <= plan.tolerance]
    if request.method != "auto":
        methods = [m for m in methods if m.method == request.method]
    fewest = min(methods, key=lambda m: m.chain.cost(request.spatial).macs)
    f = fewest.chain.astype(np.dtype(request.dtype)).to(device)
    return f.compile(request.spatial)
