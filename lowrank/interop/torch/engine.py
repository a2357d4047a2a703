"""A PyTorch module that runs chains on lowrank's engine, or on its GPU kernels."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.core.stage import Activation, Epilogue
from lowrank.core.threads import as_threads
from lowrank.engine import Algorithm, Runner
from lowrank.factorization import Factorization, compile_chains
from lowrank.interop.torch.operator import run_chain
from lowrank.interop.torch.plans import describe_stages

Links = tuple[tuple[Factorization, Activation], ...]
MAX_PLANS = 32  # input shapes for which one module keeps plans
HALVES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.float64)
_GPU_DTYPES = (*_CPU_DTYPES, *HALVES)


class StandIn(nn.Module):  # type: ignore[misc]
    """A module in the place of a layer, with all attributes of the layer.

    Attributes
    ----------
    layer : nn.Module
        The layer, if there is one; no submodule.
    """

    def stand_in_for(self, layer: nn.Module) -> None:
        """Set the layer."""
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__:  # of no layer, or a copy that is being made
                raise
            return getattr(self.__dict__["layer"], name)


class EngineModule(StandIn):
    """Consecutive convolutions, each with an optional activation, run by lowrank as one plan.

    Parameters
    ----------
    links : sequence of (Factorization, str)
        Chains with their biases, and the activation after each: ``"none"``, ``"relu"`` or
        ``"relu6"``.
    threads : int, optional
        Number of threads; PyTorch's number at the time of planning if not given.
    algorithm : str
        ``"auto"`` or ``"direct"``; see :meth:`lowrank.Factorization.compile`.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import lowrank
    >>> from lowrank.interop.torch import EngineModule
    >>> f = lowrank.dense(np.ones((4, 2, 3), np.float32), bias=np.full(4, -10, np.float32))
    >>> EngineModule([(f, "relu")])(torch.ones(1, 2, 5)).max()
    tensor(0.)
    """

    def __init__(
        self,
        links: Sequence[tuple[Factorization, Activation]],
        threads: int | None = None,
        algorithm: Algorithm = "auto",
    ) -> None:
        super().__init__()
        self.links: Links = tuple(links)
        self.threads, self.algorithm = as_threads(threads), algorithm
        self._register_weights()
        # Two caches: one look-up by the whole shape is the fastest, and a runner serves every
        # batch size.  Values are (runner, output shape).
        self._plans: dict[Any, tuple[Runner, tuple[int, ...]]] = {}
        self._runners: dict[Any, tuple[Runner, tuple[int, ...]]] = {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run the chains on (batch, channels, *spatial), or on one example without a batch axis.

        Parameters
        ----------
        input : torch.Tensor
            Input (named as in PyTorch's layers); copied only if it is not contiguous.  Half
            precisions are computed in float32 on the CPU.

        Returns
        -------
        torch.Tensor
            A new tensor.

        Raises
        ------
        TypeError
            If the precision is not supported on the device of the input.
        ValueError
            If gradients are required, or the shape does not fit.
        """
        x = input
        if is_captured():
            return self._run_operator(x)
        if x.dtype in HALVES and x.is_cpu:
            return self.forward(x.float()).to(x.dtype)
        if x.requires_grad:
            x = without_gradient(x)
        dtype = x.dtype
        key = x.shape, dtype, x.device
        planned = self._plans.get(key)
        if planned is None:
            if x.ndim == self.links[0][0].ndim + 1:
                return self.forward(x[None])[0]
            planned = self._plan(x)
        if not x.is_contiguous():
            x = x.contiguous()
        run, shape = planned
        y = torch.empty(shape, dtype=dtype, device=x.device)
        if x.is_cuda:
            _run_on_gpu(run, x, y)
        else:
            run(x.numpy(), y.numpy())
        return y

    def _plan(self, x: torch.Tensor) -> tuple[Runner, tuple[int, ...]]:
        if x.device.type not in ("cpu", "cuda") or x.dtype not in (
            _GPU_DTYPES if x.is_cuda else _CPU_DTYPES
        ):
            raise TypeError(
                "x must be of a floating-point precision, on the CPU or a GPU, got "
                f"{x.dtype} on {x.device}: convert with .to('cpu', torch.float32)"
            )
        first = self.links[0][0]
        if x.ndim != first.ndim + 2 or x.shape[1] != first.in_channels:
            raise ValueError(
                f"x must be (batch, {first.in_channels} channels, and {first.ndim} spatial axes), "
                f"got {tuple(x.shape)}"
            )
        shape: tuple[int, ...] = tuple(x.shape[1:])
        key = shape, x.dtype, x.device
        planned = self._runners.get(key)
        if planned is None:
            threads = self.threads or torch.get_num_threads()
            links = self.links
            if x.is_cuda:
                links = tuple((f.to(f"cuda:{x.device.index}"), a) for f, a in links)
            dtype = str(x.dtype).removeprefix("torch.")
            run = compile_chains(links, shape, dtype, threads, self.algorithm)
            for f, _ in self.links:
                shape = f.output_shape(shape)
            planned = self._runners[key] = run, shape
            evict_oldest(self._runners)
        run, output_shape = planned
        planned = self._plans[x.shape, x.dtype, x.device] = run, (len(x), *output_shape)
        evict_oldest(self._plans)
        return planned

    def _register_weights(self) -> None:
        """Describe the chains for ``lowrank::chain``, with their arrays as buffers."""
        stages = [s for f, _ in self.links for s in f.stages]
        epilogues = [
            Epilogue(f.bias, activation) if s is f.stages[-1] else Epilogue()
            for f, activation in self.links
            for s in f.stages
        ]
        self.chain = describe_stages(stages, epilogues)
        arrays = []
        for stage, epilogue in zip(stages, epilogues):
            arrays += [stage.weight] if epilogue.bias is None else [stage.weight, epilogue.bias]
        for number, array in enumerate(arrays):
            self.register_buffer(f"weight_{number}", _as_tensor(array), persistent=False)

    def _run_operator(self, x: torch.Tensor) -> torch.Tensor:
        """Run the chains by the operator, which graphs of PyTorch hold."""
        if x.ndim == self.links[0][0].ndim + 1:
            return self._run_operator(x[None])[0]
        weights = list(self.buffers())
        return run_chain(x, weights, self.chain, self.threads, self.algorithm)

    def __getstate__(self) -> dict[str, Any]:  # without plans and views of the weights
        return self.__dict__ | {"_plans": {}, "_runners": {}, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register_weights()

    def __prepare_scriptable__(self) -> None:
        refuse_script()

    def extra_repr(self) -> str:
        """Return the chains and activations that PyTorch prints for this module."""
        words = [w for f, a in self.links for w in (repr(f), *([a] if a != "none" else []))]
        return " -> ".join(words)


def is_captured() -> bool:
    """Return whether PyTorch records or transforms operators, so that plans must not run."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def _as_tensor(array: Any) -> torch.Tensor:
    """Return an array as a tensor of the same memory, or a copy of one on a GPU."""
    if not isinstance(array, np.ndarray):
        return torch.from_dlpack(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only: the operator does not write
        return torch.from_numpy(np.ascontiguousarray(array))


def refuse_script() -> None:
    """Raise TypeError: TorchScript compiles no plans."""
    raise TypeError(
        "a model for inference on lowrank's engine cannot be scripted: script the PyTorch model, "
        "or export this one with torch.export"
    )


def evict_oldest(plans: dict[Any, Any]) -> None:
    """Delete the oldest of more than MAX_PLANS entries."""
    if len(plans) > MAX_PLANS:
        plans.pop(next(iter(plans)), None)


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that needs no gradient; raise ValueError if gradients are enabled."""
    if torch.is_grad_enabled():
        raise ValueError(
            "models for inference compute no gradients on lowrank's engine: use "
            "torch.inference_mode() or x.detach(), and train the PyTorch model, or "
            "on_engine(model, trainable=True)"
        )
    return x.detach()


class _CurrentStream:
    """PyTorch's current stream, by the protocol that PyTorch has since 2.9 only."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


def _run_on_gpu(run: Runner, x: torch.Tensor, y: torch.Tensor) -> None:
    """Run a CuPy plan on PyTorch's memory and in PyTorch's current stream."""
    cupy = importlib.import_module("cupy")

    def as_cupy(t: torch.Tensor) -> Any:
        if t.dtype == torch.bfloat16:  # CuPy takes it only where ml_dtypes was imported before
            importlib.import_module("ml_dtypes")
            return cupy.from_dlpack(t.view(torch.int16)).view("bfloat16")
        return cupy.from_dlpack(t)

    stream = _CurrentStream(x.device)
    with cupy.cuda.Device(x.device.index), cupy.cuda.Stream.from_external(stream):
        run(as_cupy(x), as_cupy(y))
