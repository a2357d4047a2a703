"""Whole networks, dense and compressed: PyTorch beside lowrank's engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from .timing import measure_seconds

try:
    import torch
    from torch.fx.experimental.optimization import fuse
except ImportError:  # asv imports every module of this folder
    torch = None

SECONDS = 4.0  # measurement time
SIZES = {"faststyle_udnie": (256, 256)}  # spatial sizes that differ from the data's


def inputs(case: Any, batch: int) -> Any:
    """Return a batch of inputs, repeated where the data are too few."""
    if case.name in SIZES:
        random = torch.Generator().manual_seed(0)
        return 255 * torch.rand(batch, 3, *SIZES[case.name], generator=random)
    x = case.calibration(0)[0]
    return x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch].contiguous()


def calls(case: Any, small: Any, x: Any, threads: int) -> dict[str, Callable[[], object]]:
    """Return calls of both networks on `x`, in PyTorch's two layouts and on the engine."""
    from lowrank.interop.torch import on_engine

    found = {}
    for name, model in (("dense", case.model), ("compressed", small)):
        folded = fuse(copy.deepcopy(model).eval()).requires_grad_(False)
        found[f"torch {name} NCHW"] = lambda m=folded: m(x)
        if x.ndim == 4:
            other = copy.deepcopy(folded).to(memory_format=torch.channels_last)
            given = x.contiguous(memory_format=torch.channels_last)
            found[f"torch {name} channels_last"] = lambda m=other, x=given: m(x)
        runtime = on_engine(model, threads=threads)
        found[f"engine {name}"] = lambda m=runtime: m(x)
    return found


def timings(case: Any, small: Any, batch: int, threads: int) -> dict[str, float]:
    """Return seconds per batch of a network and its compressed copy, by runtime.

    Medians of interleaved calls with folded batch norms.  The environment variable
    OMP_WAIT_POLICY should be "passive", since two libraries' threads share the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            some = calls(case, small, inputs(case, batch), threads)
            return dict(zip(some, measure_seconds(list(some.values()), SECONDS), strict=True))
    finally:
        torch.set_num_threads(before)
