"""Calls of PyTorch networks on each runtime, as they would be deployed."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.interop.onnx.runtime import session_call
from lowrank.interop.torch.batches import Run, map_tensors, run_model, tensors_in
from lowrank.interop.torch.inference import on_engine

Call = Callable[[], object]
# A forked child has none of PyTorch's threads, and its first parallel operation would wait for them
# for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


def inference_call(module: Callable[[Any], Any], x: Any, threads: int) -> Call:
    """Return a call of a module on an input, without gradients, on a number of threads."""

    def call() -> object:
        before = torch.get_num_threads()  # of all modules
        if before != threads:
            torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                return module(x)
        finally:
            if before != threads:
                torch.set_num_threads(before)

    return call


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy with batch norms folded into the convolutions before, where it is traceable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own import uses what it deprecates
        from torch.fx.experimental.optimization import fuse
    module = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        folded: nn.Module = fuse(module)
    except Exception:  # control flow that depends on tensors, or anything else in a model
        return module
    return folded


def in_channels_last(module: nn.Module, x: Any) -> tuple[nn.Module, Any] | None:
    """Return a copy of a module and an input in channels-last memory format; None without one."""
    layouts = {LAYOUTS[t.ndim] for t in tensors_in(x) if t.ndim in LAYOUTS}
    if len(layouts) != 1:
        return None
    [layout] = layouts

    def turn(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous(memory_format=layout) if t.ndim in LAYOUTS else t

    return copy.deepcopy(module).to(memory_format=layout), map_tensors(turn, x)


def export_onnx(module: nn.Module, x: torch.Tensor) -> bytes:
    """Return a module as an ONNX model with the input ``"x"``.

    Raises
    ------
    ValueError
        If PyTorch cannot export it.
    """
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter that needs no other package is old
            torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=False)
    except Exception as why:  # the exporter's errors have no common base
        first = str(why).strip().split("\n", 1)[0]
        raise ValueError(f"PyTorch does not export the network to ONNX: {first}") from None
    return file.getvalue()


def network_call(module: nn.Module, x: Any, runtime: str, threads: int, run: Run) -> Call | None:
    """Return a call of a network on a runtime; None if it cannot run there as a whole.

    Parameters
    ----------
    module : nn.Module
        Network; it is not changed.
    x : tensor, or any nesting of tensors
        Input.
    runtime : str
        ``"lowrank"``, ``"onnxruntime"``, ``"torch"`` or ``"torch-channels-last"``.
    threads : int
        Number of threads.
    run : callable
        Function that calls the network with an input.

    Returns
    -------
    callable or None
    """
    if runtime == "lowrank":
        return inference_call(partial(run, on_engine(module, threads=threads)), x, threads)
    module = fold_batch_norms(module)
    if runtime == "torch":
        return inference_call(partial(run, module), x, threads)
    if runtime == "torch-channels-last":
        module, x = in_channels_last(module, x) or (module, x)
        return inference_call(partial(run, module), x, threads)
    if runtime == "onnxruntime" and isinstance(x, torch.Tensor) and run is run_model:
        try:
            exported = export_onnx(module, x)
        except ValueError as why:
            warnings.warn(f"{why}: its layers are timed alone", stacklevel=2)
            return None
        return session_call(exported, {"x": x.numpy()}, threads)
    return None
