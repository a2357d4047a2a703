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
    from lowrank.filters.run import Request

PLANS = 64  # that are kept


def correlate(image: Any, along: Ints, request: Request, work: Any, out: Any) -> Any:
    """See :func:`lowrank.filters.correlate`, which has checked what is asked for.

    The way is the one with the fewest multiply-adds within the tolerance: a sum of separable terms,
    or the kernel as it is.
    """
    xp = importlib.import_module("cupy")
    if out is None:
        out = xp.empty(image.shape, image.dtype)
    if image.size == 0:
        return out
    k = len(along)
    last = tuple(range(image.ndim - k, image.ndim))
    x = xp.ascontiguousarray(xp.moveaxis(image, along, last))
    # Colours are images of their own.
    given = x.reshape(-1, 1, *x.shape[-k:]).astype(work, copy=False)
    run = _planned(request, engine.device_of(image))
    y = xp.moveaxis(run(given).reshape(x.shape), last, along)
    out[...] = reference.saturate(y, image.dtype) if image.dtype.kind in "iu" else y
    return out


@functools.lru_cache(PLANS)
def _planned(request: Request, device: str) -> engine.Runner:
    if request.method == "fft":
        raise ValueError("method 'fft' does not run on a GPU: 'auto', 'direct' or 'separable'")
    plan = request.plan()
    ways = [o for o in plan.options if o.block is None]
    if request.rank is None:
        ways = [o for o in ways if o.error <= plan.tolerance]
    if request.method != "auto":
        ways = [o for o in ways if o.method == request.method]
    fewest = min(ways, key=lambda o: o.chain.cost(request.spatial).macs)
    f = fewest.chain.astype(np.dtype(request.dtype)).to(device)
    return f.compile(request.spatial)
