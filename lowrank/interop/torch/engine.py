"""A PyTorch module that runs chains on lowrank's engine, or on its GPU kernels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowrank.core.stage import Activation
from lowrank.engine import Algorithm, Runner
from lowrank.factorization import Factorization, compile_chains

Links = tuple[tuple[Factorization, Activation], ...]
MAX_PLANS = 32  # input shapes for which one module keeps plans
_CPU_DTYPES = (torch.float32, torch.float64)
_GPU_DTYPES = (*_CPU_DTYPES, torch.float16, torch.bfloat16)


class EngineModule(nn.Module):  # type: ignore[misc]
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
        self.threads, self.algorithm = threads, algorithm
        # Two caches: one look-up by the whole shape is the fastest, and a runner serves every
        # batch size.  Values are (runner, output shape).
        self._plans: dict[Any, tuple[Runner, tuple[int, ...]]] = {}
        self._runners: dict[Any, tuple[Runner, tuple[int, ...]]] = {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run the chains on (batch, channels, *spatial), or on one example without a batch axis.

        Parameters
        ----------
        input : torch.Tensor
            Input (named as in PyTorch's layers); copied only if it is not contiguous.

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
                "x must be float32 or float64 on the CPU (half precision runs on CUDA only), got "
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}, "_runners": {}}  # plans cannot be pickled

    def extra_repr(self) -> str:
        """Return the chains and activations that PyTorch prints for this module."""
        words = [w for f, a in self.links for w in (repr(f), *([a] if a != "none" else []))]
        return " -> ".join(words)


def evict_oldest(plans: dict[Any, Any]) -> None:
    """Delete the oldest of more than MAX_PLANS entries."""
    if len(plans) > MAX_PLANS:
        plans.pop(next(iter(plans)), None)


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that needs no gradient; raise ValueError if gradients are enabled."""
    if torch.is_grad_enabled():
        raise ValueError(
            "lowrank's engine computes no gradients: use torch.inference_mode() or "
            "x.detach(), and train the PyTorch model"
        )
    return x.detach()


def _run_on_gpu(run: Runner, x: torch.Tensor, y: torch.Tensor) -> None:
    """Run a CuPy plan on PyTorch's memory and in PyTorch's current stream."""
    cupy = importlib.import_module("cupy")
    stream = torch.cuda.current_stream(x.device)

    def as_cupy(t: torch.Tensor) -> Any:
        if t.dtype == torch.bfloat16:  # DLPack import in CuPy does not support it
            importlib.import_module("ml_dtypes")
            return cupy.from_dlpack(t.view(torch.int16)).view("bfloat16")
        return cupy.from_dlpack(t)

    with cupy.cuda.Device(x.device.index):
        from_external = getattr(cupy.cuda.Stream, "from_external", None)
        if from_external is not None and hasattr(stream, "__cuda_stream__"):
            cupy_stream = from_external(stream)
        else:
            cupy_stream = cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)
        with cupy_stream:
            run(as_cupy(x), as_cupy(y))
