"""Filters of images on a GPU: CuPy arrays in, CuPy arrays out."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue
from lowrank.engine.cuda import steps
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
    window, work = call.window, call.work
    if isinstance(kernel, OuterProduct):
        chain = outer_chain(kernel.key, window, work.str, call.cval)
    else:
        chain = smallest_chain(call.request(kernel, image.shape, True))
    k = len(window.along)
    # The colours of a pixel stay neighbours; other channels become a batch of planes.
    has_colours = (
        image.ndim == k + 1
        and window.along == tuple(range(k))
        and steps.is_interleavable(chain.stages, image.shape[-1])
    )
    colours = image.shape[-1] if has_colours else 1
    last = window.along if has_colours else tuple(range(image.ndim - k, image.ndim))
    x = xp.ascontiguousarray(xp.moveaxis(image, window.along, last))
    spatial = x.shape[:k] if has_colours else x.shape[-k:]
    if x.dtype == bool:
        x = x.view(np.uint8)
    if x.dtype not in (work, *engine.INTEGERS):
        x = x.astype(work)
    given = x.reshape(-1, 1, *spatial[:-1], spatial[-1] * colours)
    run = _compile(chain, spatial, colours, work.name, engine.device_of(image), xp)
    result = run(given, xp.empty(given.shape, conversion.result_dtype(dtype, work)))
    out[...] = conversion.as_image(xp.moveaxis(result.reshape(x.shape), last, window.along), dtype)
    return out


@functools.lru_cache(CACHED_FILTERS)
def _compile(
    chain: Factorization, spatial: Ints, colours: int, dtype: str, device: str, xp: ModuleType
) -> engine.Runner:
    """Return a plan for a device of `xp`: the module of the arrays, which tests replace."""
    stages = chain.astype(np.dtype(dtype)).to(device).stages
    epilogues = [Epilogue()] * len(stages)
    return engine.plan(stages, (1, *spatial), np.dtype(dtype), epilogues, None, colours)
