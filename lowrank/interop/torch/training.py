"""Convolutions and chains of PyTorch models, run and differentiated by lowrank's engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from lowrank.core.stage import Epilogue
from lowrank.engine.program import Algorithm
from lowrank.factorization import Factorization
from lowrank.interop.torch.chains import Bias
from lowrank.interop.torch.engine import StandIn
from lowrank.interop.torch.modules import is_conv
from lowrank.interop.torch.operator import run_chain
from lowrank.interop.torch.plans import describe_stages
from lowrank.interop.torch.tracing import swap_modules


class EngineLayer(StandIn):
    """A convolution or a chain of them, with its own parameters, on lowrank's engine.

    Names of parameters and all other attributes are those of the layer, and so is the state dict.
    On a GPU, with hooks in the layer and in TorchScript, PyTorch runs it.

    Parameters
    ----------
    layer : nn.Module
        Convolution, tied layer or sequence of these; the parameters are shared with it.
    f : Factorization
        The layer as a chain.
    threads : int, optional
        Number of threads; PyTorch's number at each call if not given.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.
    """

    def __init__(
        self,
        layer: nn.Module,
        f: Factorization,
        threads: int | None = None,
        algorithm: Algorithm = "auto",
    ) -> None:
        super().__init__()
        # The same dictionaries: whatever changes or moves parameters here does so in the layer.
        self._parameters, self._modules = layer._parameters, layer._modules
        self.stand_in_for(layer)
        self.ndim, self.threads, self.algorithm = f.ndim, threads, algorithm
        self.chain = describe_stages(
            f.stages, [*[Epilogue()] * (len(f.stages) - 1), Epilogue(f.bias)]
        )
        self.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run the layer on (batch, channels, *spatial), or on one example without a batch axis."""
        if not input.is_cpu or self._has_hooks():
            return self.layer(input)
        if input.ndim == self.ndim + 1:
            return self.forward(input[None])[0]
        return run_chain(input, list(self._weights()), self.chain, self.threads, self.algorithm)

    def _has_hooks(self) -> bool:
        return any(m._forward_hooks or m._forward_pre_hooks for m in self._modules.values())

    def _weights(self) -> Iterator[torch.Tensor]:
        """Yield the weight of every stage, and the bias after the last one."""
        for module in self.layer.modules():
            if is_conv(module):
                yield module.weight
            if (is_conv(module) or isinstance(module, Bias)) and module.bias is not None:
                yield module.bias

    def __prepare_scriptable__(self) -> nn.Module:
        return self.layer

    def extra_repr(self) -> str:
        """Return the layer that PyTorch prints for this module."""
        return f"{self.layer._get_name()}, algorithm={self.algorithm}"


def swap_for_training(model: nn.Module, threads: int | None, algorithm: Algorithm) -> nn.Module:
    """Replace convolutions and chains of a model by modules with the same parameters, in place.

    Parameters
    ----------
    model : nn.Module
        Model to change.
    threads : int or None
        Number of threads; PyTorch's number at each call if not given.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.

    Returns
    -------
    nn.Module
        `model`, or its replacement if it is a convolution itself.
    """
    return cast(
        nn.Module, swap_modules(model, lambda layer, f: EngineLayer(layer, f, threads, algorithm))
    )
