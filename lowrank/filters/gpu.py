"""Filters of images on a GPU: CuPy arrays in, CuPy arrays out."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization
from lowrank.filters import conversion
from lowrank.filters.outer import OuterProduct, outer_chain
from lowrank.filters.request import Call, smallest_chain

CACHED_FILTERS = 64


def correlate(
    image: Any, kernel: Array | OuterProduct, call: Call, dtype: np.dtype[Any], out: Any
) -> Any:
    """Filter a CuPy array; :func:`lowrank.filters.correlate` checks the arguments.

    The method is the one with the fewest MACs within the tolerance: a sum of separable terms, or
    the kernel itself.
    """
    xp = importlib.import_module("cupy")
    if out is None:
        out = xp.empty(image.shape, dtype)
    window = call.window
    if isinstance(kernel, OuterProduct):
        chain = outer_chain(kernel.key, window, call.work.str, call.cval)
    else:
        chain = smallest_chain(call.request(kernel, image.shape, True))
    k = len(window.along)
    last = tuple(range(image.ndim - k, image.ndim))
    x = xp.ascontiguousarray(xp.moveaxis(image, window.along, last))
    # Channels become a batch.
    batch = x.reshape(-1, 1, *x.shape[-k:]).astype(call.work, copy=False)
    run = _compile(chain, x.shape[-k:], call.work.name, engine.device_of(image), xp)
    out[...] = conversion.as_image(
        xp.moveaxis(run(batch).reshape(x.shape), last, window.along), dtype
    )
    return out


@functools.lru_cache(CACHED_FILTERS)
def _compile(
    chain: Factorization, spatial: Ints, dtype: str, device: str, xp: ModuleType
) -> engine.Runner:
    """Return a plan for a device of `xp`: the module of the arrays, which tests replace."""
    return chain.astype(np.dtype(dtype)).to(device).compile(spatial)
