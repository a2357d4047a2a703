"""Programs from traced PyTorch modules."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import fx, nn

from lowrank._kernels._core import MAX_ARRAYS
from lowrank._typing import Ints
from lowrank.core.stage import Epilogue
from lowrank.engine.network import emit, fuse, value_shape
from lowrank.engine.program import Algorithm, Program, ProgramBuilder, Unsupported
from lowrank.factorization import Factorization, chain, dense
from lowrank.interop.torch.chains import Bias, TiedLayer
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.fusion import BATCH_NORMS, batch_norm
from lowrank.interop.torch.modules import from_layer, is_layer, to_numpy
from lowrank.interop.torch.nodes import find_activation, find_operation
from lowrank.interop.torch.operations import BATCH, Recorder, Tensor

_SHAPES = ("size", "dim", "ndimension")
_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem, operator.truediv,
    operator.mod, operator.neg, int, getattr,
)  # fmt: skip
_SCALINGS = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", "mul": "mul", "mul_": "mul",
    operator.sub: "sub", operator.isub: "sub", torch.sub: "sub", "sub": "sub", "sub_": "sub",
    operator.truediv: "div", operator.itruediv: "div", torch.div: "div", "div": "div",
    "div_": "div",
}  # fmt: skip


class UnsupportedNodesError(Exception):
    """Nodes that a program cannot compute."""

    def __init__(self, nodes: Iterable[fx.Node], reason: str) -> None:
        super().__init__(reason)
        self.nodes = frozenset(nodes)


class TensorProgram(NamedTuple):
    """A program of a traced module for one shape of its inputs.

    Attributes
    ----------
    program : Program
        The program.
    input_shapes, output_shapes : tuple of tuple of int
        Shapes of its arrays, without the batch axis.
    shapes : tuple of tuple of int
        Shapes of the output tensors, without the batch axis.
    labels : mapping of str to str
        Where the operations of each name come from.
    """

    program: Program
    input_shapes: tuple[Ints, ...]
    output_shapes: tuple[Ints, ...]
    shapes: tuple[Ints, ...]
    labels: dict[str, str]


def label(node: fx.Node) -> str:
    """Return the name of the module that a node calls, or of the function."""
    return str(node.meta.get("label") or (node.target if node.op == "call_module" else node.name))


def is_shape(node: fx.Node) -> bool:
    """Return whether a node computes sizes of tensors, not tensors."""
    if node.op == "call_method":
        return node.target in _SHAPES
    if node.op != "call_function" or node.target not in _ARITHMETIC:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return bool(node.all_input_nodes) and all(map(is_shape, node.all_input_nodes))


def is_supported(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a program can compute a node, if shapes allow it.

    Parameters
    ----------
    node : fx.Node
        Node of a traced graph.
    module : nn.Module or None
        Module that the node calls, if it calls one.

    Returns
    -------
    bool
    """
    if node.op not in ("call_module", "call_function", "call_method") or not node.args:
        return False
    if any(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    return (
        _is_linear(node, module)
        or find_activation(node, module) is not None
        or find_operation(node, module) is not None
    )


def is_layer_node(module: nn.Module | None) -> bool:
    """Return whether a module multiplies matrices: the work that is worth a program."""
    return isinstance(module, EngineModule) or _is_linear_layer(module)


def build_program(
    traced: fx.GraphModule, shapes: Sequence[Ints], dtype: Any, algorithm: Algorithm
) -> TensorProgram:
    """Return a program that computes what a traced module does.

    Parameters
    ----------
    traced : fx.GraphModule
        Module of supported nodes only.
    shapes : sequence of tuple of int
        Shapes of its inputs, without the batch axis.
    dtype : dtype
        float32 or float64.
    algorithm : str
        ``"auto"`` or ``"direct"``.

    Returns
    -------
    TensorProgram

    Raises
    ------
    UnsupportedNodesError
        If nodes are not supported for these shapes.
    """
    reader = _Reader(traced)
    inputs, outputs = reader.read(shapes)
    if len(inputs) + len(outputs) > MAX_ARRAYS:
        raise UnsupportedNodesError(traced.graph.nodes, f"more than {MAX_ARRAYS} tensors")
    uses = Counter(name for p in reader.net.primitives for name in p.inputs)
    uses.update(t.name for t in outputs)
    builder = ProgramBuilder(dtype, algorithm)
    values = {t.name: builder.input(t.value) for t in inputs}
    known = {t.name: t.shape for t in inputs}
    labels = {}
    for p in fuse(reader.net.primitives, uses):
        labels[p.name] = label(next((n for n in p.sources if "label" in n.meta), p.sources[0]))
        try:
            values[p.output] = emit(builder, p, values, known)
        except ValueError as error:
            raise UnsupportedNodesError(p.sources, str(error)) from error
    for t in outputs:
        builder.output(values[t.name])
    return TensorProgram(
        builder.build(), tuple(t.value for t in inputs), tuple(t.value for t in outputs),
        tuple(t.shape for t in outputs), labels,
    )  # fmt: skip


class _Reader:
    """Reads the nodes of a graph as primitives, in order.

    Parameters
    ----------
    traced : fx.GraphModule
        Module with the graph.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.graph, self.net = traced.graph, Recorder()
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.found: dict[fx.Node, Any] = {}

    def read(self, shapes: Sequence[Ints]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors of the inputs, of these shapes, and of the outputs."""
        given = iter(shapes)
        inputs: list[Tensor] = []
        for node in self.graph.nodes:
            self.net.node = node
            if node.op == "placeholder":
                shape = next(given)
                inputs.append(Tensor(node.name, shape, value_shape(shape)))
                self.found[node] = inputs[-1]
            elif node.op == "output":
                break
            else:
                try:
                    self.found[node] = self._read(node)
                except ValueError as error:  # Unsupported, or a shape that fits no layer
                    blamed = getattr(error, "node", node)
                    raise UnsupportedNodesError([blamed], str(error)) from error
        results = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
        for result in results:
            found = self.found[result]
            if not isinstance(found, Tensor) or found.layout is not None:
                raise UnsupportedNodesError([result], "several or transposed tensors")
        return inputs, [self.found[result] for result in results]

    def _read(self, node: fx.Node) -> Any:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if is_shape(node):
            return self._compute_shape(node)
        if _is_linear(node, module):
            x = self.found[next(a for a in node.args if isinstance(a, fx.Node))]
            if not isinstance(x, Tensor):
                raise Unsupported("arithmetic of sizes")
            return _read_linear(self.net, node, module, x)
        activation = find_activation(node, module)
        if activation is not None:
            x = self.found[node.args[0]]
            name, alpha = activation
            return self.net.add("activate", (x,), x.shape, x.value, activation=name, alpha=alpha)
        operation = find_operation(node, module)
        assert operation is not None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.found.__getitem__)
        try:
            inspect.signature(operation).bind(self.net, *args, **kwargs)
        except TypeError as error:  # arguments that the operation does not have
            raise Unsupported(str(error)) from error
        return operation(self.net, *args, **kwargs)

    def _compute_shape(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self.found.__getitem__)
        x = args[0]
        if not isinstance(x, Tensor):
            return cast(Any, node.target)(*args, **node.kwargs)
        if node.target in ("dim", "ndimension") or "ndim" in args:
            return x.ndim
        shape = (BATCH, *x.shape)
        return shape[args[1]] if node.op == "call_method" and len(args) > 1 else shape


def _is_linear_layer(module: nn.Module | None) -> bool:
    inner = module.block if isinstance(module, TiedLayer) else module
    return isinstance(inner, nn.Linear) and is_layer(inner)


def _is_linear(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node is a convolution, a linear layer or an affine map per channel."""
    if isinstance(module, EngineModule | Bias) or _is_linear_layer(module):
        return True
    if isinstance(module, BATCH_NORMS):
        return module.running_var is not None
    return _affine(node) is not None


def _affine(node: fx.Node) -> tuple[float, float] | None:
    """Return the factor and the summand of arithmetic of a tensor with a number."""
    kind = _SCALINGS.get(node.target)
    numbers = [a for a in node.args if isinstance(a, int | float)]
    if kind is None or len(node.args) != 2 or len(numbers) != 1 or node.kwargs:
        return None
    number, is_first = float(numbers[0]), node.args[0] is numbers[0]
    if kind == "add":
        return 1.0, number
    if kind == "sub":
        return (-1.0, number) if is_first else (1.0, -number)
    if kind == "div":
        return None if is_first or not number else (1 / number, 0.0)
    return number, 0.0


def _read_linear(net: Recorder, node: fx.Node, module: nn.Module | None, x: Tensor) -> Tensor:
    """Add a convolution, a linear layer or an affine map per channel."""
    if isinstance(module, EngineModule):
        x.sizes(module.links[0][0].ndim)
        for f, activation in module.links:
            x = _convolve(net, x, f, f.output_shape(x.shape), activation)
        return x
    if _is_linear_layer(module):
        f = _linear_chain(module)
        if x.shape != (f.in_channels,):
            x.check_order()
            raise Unsupported(f"a linear layer of {f.in_channels} features on {x.shape}")
        if x.layout is not None:
            (stage,) = f.stages
            if stage.outer * stage.inner > 1 or stage.shuffle != (1, 1):
                x.check_order()
            f = dense(stage.weight[:, np.argsort(x.layout)], bias=f.bias)
            x = net.add("view", (x,), x.shape, x.value)
        return _convolve(net, x, f, (f.out_channels,))
    scale: Any
    shift: Any
    if isinstance(module, BATCH_NORMS):
        norm = batch_norm(module)
        scale = norm.scale / np.sqrt(norm.variance.astype(np.float64) + norm.eps)
        shift = norm.shift - norm.mean * scale
    elif isinstance(module, Bias):
        scale, shift = 1.0, to_numpy(module.bias)
    else:
        affine = _affine(node)
        assert affine is not None
        scale, shift = affine
    ndim = module.ndim if isinstance(module, Bias) else None
    x.sizes(ndim)
    scale, shift = (np.broadcast_to(np.float64(a), x.shape[:1]) for a in (scale, shift))
    return net.add("affine", (x,), x.shape, scale=scale, shift=shift)


def _convolve(
    net: Recorder, x: Tensor, f: Factorization, shape: Ints, activation: str = "none"
) -> Tensor:
    links = [*((s, Epilogue()) for s in f.stages[:-1]), (f.stages[-1], Epilogue(f.bias))]
    return net.add("convolve", (x,), shape, links=tuple(links), activation=activation)


def _linear_chain(module: Any) -> Factorization:
    if not isinstance(module, TiedLayer):
        return from_layer(module)
    (stage,) = from_layer(module.block).stages
    tied = replace(stage, outer=module.outer, inner=module.inner, shuffle=module.shuffle)
    return chain([tied])
