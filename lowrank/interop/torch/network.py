"""Programs from traced PyTorch modules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import fx, nn

from lowrank._typing import Ints
from lowrank.blocks import fold_batch_norm
from lowrank.core.stage import Stage
from lowrank.engine.program import (
    Algorithm,
    Link,
    Program,
    ProgramBuilder,
    Unsupported,
    Value,
)
from lowrank.factorization import Factorization, chain, dense
from lowrank.interop.torch.chains import Bias, TiedLayer
from lowrank.interop.torch.engine import EngineModule
from lowrank.interop.torch.fusion import BATCH_NORMS, batch_norm
from lowrank.interop.torch.modules import from_layer, is_layer, to_numpy
from lowrank.interop.torch.operations import (
    BATCH,
    Tensor,
    add,
    as_links,
    find_activation,
    find_operation,
    has_order,
    in_order,
)

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


class UnsupportedNodeError(Exception):
    """A node that a program cannot compute, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


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
    """

    program: Program
    input_shapes: tuple[Ints, ...]
    output_shapes: tuple[Ints, ...]
    shapes: tuple[Ints, ...]


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
    UnsupportedNodeError
        If a node is not supported for these shapes.
    """
    builder = ProgramBuilder(dtype, algorithm)
    return _Builder(traced, builder).build(shapes)


class _Builder:
    """Builds a program from the nodes of a graph, in order.

    Parameters
    ----------
    traced : fx.GraphModule
        Module with the graph.
    builder : ProgramBuilder
        Builder of the program.
    """

    def __init__(self, traced: fx.GraphModule, builder: ProgramBuilder) -> None:
        self.graph, self.builder = traced.graph, builder
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.found: dict[fx.Node, Any] = {}

    def build(self, shapes: Sequence[Ints]) -> TensorProgram:
        """Return the program for inputs of these shapes."""
        inputs = iter(shapes)
        arrays: list[Ints] = []
        outputs: list[Tensor] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                shape = next(inputs)
                channels, *size = shape
                arrays.append((channels, *(1,) * (3 - len(size)), *size))
                self.found[node] = Tensor(self.builder.input(arrays[-1]), shape)
            elif node.op == "output":
                leaves = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
                outputs = [self.found[leaf] for leaf in leaves]
            elif node not in self.found:
                try:
                    self._emit(node)
                except ValueError as error:  # Unsupported, or a shape that fits no layer
                    raise UnsupportedNodeError(node, str(error)) from error
        for tensor in outputs:
            self.builder.output(tensor.value)
        return TensorProgram(
            self.builder.build(), tuple(arrays), tuple(t.value.shape for t in outputs),
            tuple(t.shape for t in outputs),
        )  # fmt: skip

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _emit(self, node: fx.Node) -> None:
        module = self._module(node)
        if is_shape(node):
            self.found[node] = self._compute_shape(node)
        elif _is_linear(node, module):
            self._emit_linear(node, module)
        elif (activation := find_activation(node, module)) is not None:
            x = self.found[node.args[0]]
            name, alpha = activation
            value = self.builder.combine(x.value, activation=name, alpha=alpha, name=name)
            self.found[node] = Tensor(value, x.shape)
        else:
            operation = find_operation(node, module)
            assert operation is not None
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.found.__getitem__)
            try:
                self.found[node] = operation(self.builder, *args, **kwargs)
            except TypeError as error:  # arguments that the operation does not have
                raise Unsupported(str(error)) from error

    def _compute_shape(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self.found.__getitem__)
        x = args[0]
        if not isinstance(x, Tensor):
            return cast(Any, node.target)(*args, **node.kwargs)
        if node.target in ("dim", "ndimension") or "ndim" in args:
            return x.ndim
        shape = (BATCH, *x.shape)
        return shape[args[1]] if node.op == "call_method" and len(args) > 1 else shape

    def _emit_linear(self, node: fx.Node, module: nn.Module | None) -> None:
        """Convolve, with the addition and the activation that alone read the result."""
        x = self.found[next(a for a in node.args if isinstance(a, fx.Node))]
        assert isinstance(x, Tensor)
        links, shape = _linear_links(node, module, x, self.builder)
        residual, alpha, nodes = None, 0.0, [node]
        stage, epilogue = links[-1]
        value = x.value
        for i, link in enumerate(links[:-1]):
            value = self.builder.chain(value, [link], name=f"{node.name}.{i}")
        if epilogue.activation == "none":
            found = self._residual(node, shape)
            if found is not None and _keeps_order(stage, value):
                addition, other = found
                residual = in_order(self.builder, other)
                nodes.append(addition)
            user = _only_user(nodes[-1])
            activation = None if user is None else find_activation(user, self._module(user))
            if user is not None and activation is not None:
                name, alpha = activation
                epilogue = epilogue._replace(activation=cast(Any, name))
                nodes.append(user)
        result = self.builder.chain(
            value, [(stage, epilogue)], residual, alpha,
            name=node.name if len(links) == 1 else f"{node.name}.{len(links) - 1}",
        )  # fmt: skip
        self.found.update(dict.fromkeys(nodes, Tensor(result, shape)))

    def _residual(self, node: fx.Node, shape: Ints) -> tuple[fx.Node, Value] | None:
        """Return the addition that alone reads a node, and its other operand if that exists."""
        user = _only_user(node)
        if user is None or find_operation(user, self._module(user)) is not add or user.kwargs:
            return None
        others = [a for a in user.args if a is not node]
        other = self.found.get(others[0]) if len(others) == 1 else None
        if isinstance(other, Tensor) and other.shape == shape and other.is_map:
            return user, other.value
        return None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _keeps_order(stage: Stage, value: Value) -> bool:
    """Return whether the channels of a stage's result follow each other in memory."""
    groups = stage.outer * stage.groups * stage.inner
    return stage.inner == 1 and (
        stage.in_channels > groups or (has_order(value) and stage.out_channels == groups)
    )


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


def _linear_links(
    node: fx.Node, module: nn.Module | None, x: Tensor, builder: ProgramBuilder
) -> tuple[list[Link], Ints]:
    """Return the stages of a linear operation on x, and the shape of its result."""
    channels = x.value.shape[0]
    if isinstance(module, EngineModule):
        shape = x.shape
        x.as_map(module.links[0][0].ndim)
        for f, _ in module.links:
            shape = f.output_shape(shape)
        return [link for f, a in module.links for link in as_links(f, a)], shape
    if _is_linear_layer(module):
        f = _linear_chain(module)
        if len(x.shape) != 1 or x.shape[0] != f.in_channels:
            raise Unsupported(f"a linear layer of {f.in_channels} features on {x.shape}")
        if not x.is_map:  # flattened: its kernel is the whole plane
            (stage,) = f.stages
            if stage.outer * stage.inner > 1:
                raise Unsupported("a linear layer with tied weights on a flattened tensor")
            f = dense(stage.weight.reshape(-1, *x.value.shape), bias=f.bias)
        return as_links(f), (f.out_channels,)
    one = np.ones((channels, 1, 1), builder.dtype)
    if isinstance(module, BATCH_NORMS):
        x.as_map()
        return as_links(fold_batch_norm(dense(one, groups=channels), batch_norm(module))), x.shape
    if isinstance(module, Bias):
        x.as_map(module.ndim)
        return as_links(dense(one, bias=to_numpy(module.bias), groups=channels)), x.shape
    affine = _affine(node)
    assert affine is not None
    scale, shift = affine
    return as_links(dense(scale * one, bias=shift * one[:, 0, 0], groups=channels)), x.shape


def _linear_chain(module: Any) -> Factorization:
    if not isinstance(module, TiedLayer):
        return from_layer(module)
    (stage,) = from_layer(module.block).stages
    tied = replace(stage, outer=module.outer, inner=module.inner, shuffle=module.shuffle)
    return chain([tied])
