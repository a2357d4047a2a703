"""Tables of what a converted PyTorch model runs, with times."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from lowrank.engine.description import OperationRow, operation_table
from lowrank.engine.network import describe_operation
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.inference import EngineModel
from lowrank.interop.torch.network import TensorProgram, label
from lowrank.interop.torch.program import ProgramModule

_RUNS = 5  # whose medians are the times


class _Row(NamedTuple):
    name: str
    algorithm: str
    error: str
    macs: str
    seconds: float


def describe(model: nn.Module, example: torch.Tensor) -> str:
    """Return a table of the operations of a converted model, with their times on an example.

    Parameters
    ----------
    model : nn.Module
        Model that :func:`on_engine` returned.
    example : torch.Tensor
        Batch of inputs.

    Returns
    -------
    str
        Table of the programs' operations with algorithm, predicted relative error, MACs per
        example, time and share of the time, and of the operations that stay in PyTorch.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import describe, on_engine
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Softplus()).eval()
    >>> table = describe(on_engine(model), torch.ones(1, 16, 8, 8))
    >>> [line.split()[0] for line in table.splitlines()]
    ['operation', 'pack', '0', 'unpack', '1', 'total']
    """
    with torch.no_grad():
        model(example)
        runs = [list(_rows(model, example)) for _ in range(_RUNS)]
    medians = [float(np.median([row.seconds for row in rows])) for rows in zip(*runs)]
    return operation_table([OperationRow(*row[:4]) for row in runs[0]], medians)


def _rows(model: nn.Module, example: torch.Tensor) -> Iterator[_Row]:
    if isinstance(model, EngineModel):
        model = model.converted
    if isinstance(model, fx.GraphModule):
        timer = _Timer(model)
        timer.run(example)
        yield from timer.rows
        return
    rows: list[_Row] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, EngineModule | ProgramModule):
            handles += _time_calls(name, module, rows)
    start = time.perf_counter()
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    rest = time.perf_counter() - start - sum(row.seconds for row in rows)
    yield from rows
    yield _Row("rest", "PyTorch", "", "", rest)


def _time_calls(name: str, module: nn.Module, rows: list[_Row]) -> list[Any]:
    """Add a row for each call of a module, from now on; return what removes that again."""
    starts: list[float] = []

    def before(*call: Any) -> None:
        starts.append(time.perf_counter())

    def after(*call: Any) -> None:
        rows.append(_Row(name, "chain", "", "", time.perf_counter() - starts.pop()))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


class _Timer(fx.Interpreter):  # type: ignore[misc]
    """Runs a traced module node by node, with clocks."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.rows: list[_Row] = []

    def run_node(self, n: fx.Node) -> Any:
        module = self.submodules.get(n.target) if n.op == "call_module" else None
        if isinstance(module, ProgramModule):
            return self._run_program(module, *self.fetch_args_kwargs_from_env(n)[0])
        start = time.perf_counter()
        result = super().run_node(n)
        seconds = time.perf_counter() - start
        if n.op.startswith("call") and n.target is not operator.getitem:
            kind = "chain" if isinstance(module, EngineModule) else "PyTorch"
            self.rows.append(_Row(label(n), kind, "", "", seconds))
        return result

    def _run_program(self, module: ProgramModule, *inputs: torch.Tensor) -> Any:
        plan = module.plan(inputs)
        if isinstance(plan, fx.GraphModule):
            timer = _Timer(plan)
            result = timer.run(*inputs)
            self.rows += timer.rows
            return result
        assert isinstance(plan, TensorProgram)
        arrays, tensors = module.arrays(plan, inputs)
        threads = module.threads or torch.get_num_threads()
        seconds = plan.program.core.profile(arrays, threads)
        for op, t in zip(plan.program.operations, seconds):
            name, algorithm, error, macs = describe_operation(op)
            if name in plan.labels:
                name = plan.labels[name]
            else:  # a stage of a chain
                value, _, stage = name.rpartition(".")
                name = f"{plan.labels[value]} ({stage})" if value in plan.labels else name
            self.rows.append(_Row(name, algorithm, error, macs, t))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
