"""A PyTorch module that runs a part of a network as one program on lowrank's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lowrank.engine.program import Algorithm
from lowrank.interop.torch.engine import (
    HALVES,
    evict_oldest,
    is_captured,
    refuse_script,
    without_gradient,
)
from lowrank.interop.torch.network import TensorProgram, UnsupportedNodesError, build_program
from lowrank.interop.torch.partition import partition

_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class ProgramModule(nn.Module):  # type: ignore[misc]
    """Part of a traced network, run by lowrank as one program per input shape.

    Parameters
    ----------
    traced : fx.GraphModule
        The part, of supported nodes.  It runs itself where there is no program: on a GPU.
    threads : int, optional
        Number of threads; PyTorch's number at each call if not given.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.
    """

    def __init__(
        self, traced: fx.GraphModule, threads: int | None = None, algorithm: Algorithm = "auto"
    ) -> None:
        super().__init__()
        self.traced, self.threads, self.algorithm = traced, threads, algorithm
        # Programs, or what runs instead for shapes that a program does not support.
        self._plans: dict[Any, TensorProgram | nn.Module] = {}

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Run the part of the network; see :class:`ProgramModule`.

        Parameters
        ----------
        inputs : torch.Tensor
            Inputs of any strides, read in place.  Half precisions are computed in float32.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            New tensors.

        Raises
        ------
        TypeError
            If the precision is not supported.
        ValueError
            If gradients are required, or the shape does not fit.
        """
        if is_captured():
            return self.traced(*inputs)
        given, dtype = inputs, getattr(inputs[0], "dtype", None)
        if dtype in HALVES and all(getattr(x, "dtype", None) == dtype for x in inputs):
            inputs = tuple(x.float() for x in inputs)
        plan = self.plan(inputs)
        if not isinstance(plan, TensorProgram):
            return plan(*given)
        arrays, tensors = self.arrays(plan, inputs)
        plan.program.core(arrays, self.threads or torch.get_num_threads())
        if inputs is not given:
            tensors = [t.to(dtype) for t in tensors]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def plan(self, inputs: Sequence[Any]) -> TensorProgram | nn.Module:
        """Return the program for these inputs, or the module that runs in its place."""
        key = []
        for x in inputs:
            if not (isinstance(x, torch.Tensor) and x.is_cpu):
                return self.traced
            if x.requires_grad and torch.is_grad_enabled():
                without_gradient(x)
            key.append((x.dtype, x.shape[1:]))
        if len(inputs) > 1 and len({x.shape[:1] for x in inputs}) > 1:
            return self.traced  # the batches are broadcast
        plan = self._plans.get(tuple(key))
        if plan is None:
            plan = self._plans[tuple(key)] = self._build(inputs)
            evict_oldest(self._plans)
        return plan

    def arrays(
        self, plan: TensorProgram, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[Any], list[torch.Tensor]]:
        """Return the arrays of a call, in the memory of its inputs and of new tensors."""
        batch, dtype = inputs[0].shape[0], _DTYPES[inputs[0].dtype]
        arrays, tensors = [], []
        for x, shape in zip(inputs, plan.input_shapes):
            array = x.detach().numpy() if x.requires_grad else x.numpy()
            arrays.append(array.reshape(batch, *shape))
        for value, shape in zip(plan.output_shapes, plan.shapes):
            # NumPy allocates and wraps in 1.3 us, PyTorch in 6.
            array = np.empty((batch, *value), dtype)
            arrays.append(array)
            tensors.append(torch.from_numpy(array.reshape(batch, *shape)))
        return arrays, tensors

    def _build(self, inputs: Sequence[torch.Tensor]) -> TensorProgram | nn.Module:
        dtype = _DTYPES.get(inputs[0].dtype)
        same = all(x.dtype == inputs[0].dtype and 2 <= x.ndim <= 5 for x in inputs)
        if dtype is None or not same:
            return self.traced
        try:
            return build_program(
                self.traced, [tuple(x.shape[1:]) for x in inputs], dtype, self.algorithm
            )
        except UnsupportedNodesError as error:
            return partition(self.traced, self.replace_part, error.nodes)

    def replace_part(self, part: fx.GraphModule) -> ProgramModule:
        """Return the module that runs a part of this one."""
        return ProgramModule(part, self.threads, self.algorithm)

    def __prepare_scriptable__(self) -> None:
        refuse_script()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}}  # programs cannot be pickled
