"""Conversion of chains to nodes of an ONNX graph."""

from __future__ import annotations

import numpy as np

from lowrank._typing import Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine.onnx import Writer as Writer
from lowrank.engine.onnx import write_stages
from lowrank.factorization import Factorization


def conv_chain(w: Writer, f: Factorization, x: str, size: Ints | None) -> None:
    """Write a chain that replaces a Conv or ConvTranspose.

    `size` is the spatial size of `x`, None if the graph does not fix it.
    """
    epilogues = [*(Epilogue() for _ in f.stages[1:]), Epilogue(f.bias)]
    write_stages(w, f.stages, epilogues, x, size)


def linear_chain(w: Writer, f: Factorization, x: str, rank: int, gemm: bool) -> None:
    """Write a chain that replaces a MatMul or Gemm; `x` has `rank` axes."""
    for i, s in enumerate(f.stages):
        w.prefix = f"{w.layer}.{i}"
        g = s.geometry
        if s.transposed or s.kernel != (1,) or g.stride != (1,) or any(map(any, g.padding)):
            raise ValueError(f"layer {w.layer!r} is linear: its chain must be pointwise")
        bias = f.bias if i == len(f.stages) - 1 else None
        source = s.channel_permutation()
        if not np.array_equal(source, np.arange(len(source))):
            x = w.node("Gather", [x, w.integers("order", source)], "shuffle", axis=rank - 1)
        plain = s.groups * s.outer * s.inner == 1
        # Until opset 11, the bias of a Gemm is required.
        if gemm and plain and (bias is not None or w.opset >= 11):
            inputs = [x, w.weight("weight", s.weight[..., 0])]
            if bias is not None:
                inputs.append(w.weight("bias", bias))
            x = w.node("Gemm", inputs, transB=1)
            continue
        if plain:
            x = w.node("MatMul", [x, w.weight("weight", s.weight[..., 0].T)])
        else:
            x = _tied_product(w, s, x, [0] * (rank - 1))
        if bias is not None:
            x = w.node("Add", [x, w.weight("bias", bias)], "add")


def _tied_product(w: Writer, s: Stage, x: str, lead: list[int]) -> str:
    """Write a linear stage with groups or copies as a product over additional axes."""
    outs, ins = s.weight.shape[0] // s.groups, s.weight.shape[1]
    weight = s.weight.reshape(s.groups, outs, ins)
    x = w.reshape(x, (*lead, s.outer, s.groups, ins, s.inner))
    x = w.node("MatMul", [w.weight("weight", weight), x])
    return w.reshape(x, (*lead, -1))
