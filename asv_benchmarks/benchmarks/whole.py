"""Whole networks, dense and compressed: lowrank's engine beside PyTorch and onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from .compat import resolve
from .libraries import onnxruntime, onnxruntime_call
from .net_onnx import onnx_model
from .timing import measure_seconds

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

SECONDS = 4.0  # measurement time
#: Spatial sizes that differ from the data's.
SIZES = {"faststyle_udnie": (256, 256)}


def inputs(case: Any, batch: int) -> Any:
    """Return a batch of inputs, repeated where the data are too few."""
    if case.name in SIZES:
        random = torch.Generator().manual_seed(0)
        return 255 * torch.rand(batch, 3, *SIZES[case.name], generator=random)
    x = case.calibration(0)[0]
    return x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch].contiguous()


def calls(models: Mapping[str, Any], x: Any, threads: int) -> dict[str, Callable[[], object]]:
    """Return calls of networks on `x`: in PyTorch's two layouts, onnxruntime and the engine."""
    on_engine = resolve("interop.torch:on_engine", "interop.torch_engine:on_engine")
    found: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        folded = folded_copy(model)
        for layout, call in torch_calls(folded, x).items():
            found[f"torch {name} {layout}"] = call
        if onnxruntime is not None:
            run = onnxruntime_call(onnx_model(folded, x), x.numpy(), threads)
            found[f"onnxruntime {name}"] = run
        runtime = on_engine(model, x, threads)
        found[f"engine {name}"] = lambda m=runtime: m(x)
    return found


def folded_copy(model: Any) -> Any:
    """Return a copy with folded batch norms, which shares the weights of linear layers."""
    from torch.fx.experimental.optimization import fuse  # warns of what PyTorch deprecates

    # Those of VGG-16 take half a gigabyte.
    shared = {id(p): p for p in model.parameters() if p.ndim == 2}
    return fuse(copy.deepcopy(model, shared).eval(), inplace=True)


def torch_calls(folded: Any, x: Any) -> dict[str, Callable[[], object]]:
    """Return calls of a folded network in PyTorch, by layout."""
    found: dict[str, Callable[[], object]] = {"NCHW": lambda: folded(x)}
    if x.ndim in (4, 5):
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        shared = {id(p): p for p in folded.parameters() if p.ndim == 2}
        other = copy.deepcopy(folded, shared).to(memory_format=layout)
        given = x.contiguous(memory_format=layout)
        found["NHWC"] = lambda: other(given)
    return found


def timings(
    models: Mapping[str, Any], x: Any, threads: int, seconds: float = SECONDS
) -> dict[str, float]:
    """Return seconds per batch of networks by runtime and network.

    Medians of interleaved calls with folded batch norms.  The environment variable
    OMP_WAIT_POLICY should be "passive", since the libraries' threads share the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            some = calls(models, x, threads)
            return dict(zip(some, measure_seconds(list(some.values()), seconds), strict=True))
    finally:
        torch.set_num_threads(before)
