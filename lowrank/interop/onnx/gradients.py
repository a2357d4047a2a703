"""Gradients of ONNX networks, computed by PyTorch: onnxruntime does not differentiate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine.network import Primitive, value_shape
from lowrank.engine.program import Unsupported
from lowrank.interop.batches import Feed
from lowrank.interop.onnx.graph import Constants, reads
from lowrank.interop.onnx.primitives import read
from lowrank.interop.onnx.runtime import infer_tensors, simplify

Shapes = tuple[tuple[str, Ints], ...]

# Functions of PyTorch for nodes that are no primitives, in all opsets with numpy's broadcasting.
_FUNCTIONS = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "true_divide", "MatMul": "matmul",
    "Pow": "pow", "Sqrt": "sqrt", "Exp": "exp", "Log": "log", "Neg": "neg", "Abs": "abs",
    "Reciprocal": "reciprocal",
}  # fmt: skip
_FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)")


class _Step(NamedTuple):
    """One operation: the tensors that it writes and reads, and its function."""

    output: str
    inputs: tuple[str, ...]
    run: Callable[..., Any]


def differentiable(
    model: Any, folder: Path | None, feeds: Iterable[Feed]
) -> dict[Shapes, Differentiable] | None:
    """Return a network as operations of PyTorch, for the shapes of all feeds.

    Parameters
    ----------
    model : onnx.ModelProto
        Valid model; it is not changed.
    folder : path or None
        Folder of the model's external data.
    feeds : iterable of dict of str to ndarray
        Inputs of the network.

    Returns
    -------
    dict of tuple to Differentiable, or None
        By the shapes of a feed, see :func:`shapes_of`; None if PyTorch is not installed, or an
        output depends on a node that it does not differentiate.
    """
    try:
        simple = simplify(model, folder)
        found: dict[Shapes, Differentiable] = {}
        for feed in feeds:
            if (shapes := shapes_of(feed)) not in found:
                found[shapes] = Differentiable(simple, folder, dict(shapes))
    except (ImportError, Unsupported, ValueError):  # the last of onnxruntime
        return None
    return found


def shapes_of(feed: Feed) -> Shapes:
    """Return the names and shapes of the inputs in a feed."""
    return tuple((name, x.shape) for name, x in feed.items())


class Differentiable:
    """An ONNX network as operations of PyTorch, for one shape of its inputs.

    Parameters
    ----------
    model : onnx.ModelProto
        Model from :func:`lowrank.interop.onnx.runtime.simplify`.
    folder : path or None
        Folder of the model's external data.
    shapes : mapping of str to tuple of int
        Shapes of the inputs.

    Raises
    ------
    Unsupported
        If an output depends on a node that is no primitive.
    ImportError
        If PyTorch is not installed.
    """

    def __init__(self, model: Any, folder: Path | None, shapes: Mapping[str, Ints]) -> None:
        import torch

        self._torch = torch
        constant, tensors = Constants(model, folder), infer_tensors(model, folder, shapes)
        # Integer outputs, such as the index of a largest value, have no gradient.
        names = [o.name for o in model.graph.output]
        self._outputs = [n for n in names if tensors[n].kind in _FLOATS]
        nodes = list(model.graph.node)
        used = {name for node in nodes for name in reads(node)}.union(self._outputs)
        needed, found = set(self._outputs), list[_Step]()
        for i in range(len(nodes) - 1, -1, -1):  # nodes that compute shapes are not needed
            if needed.isdisjoint(nodes[i].output):
                continue
            steps = [self._step(p) for p in read(nodes[i], i, constant, tensors, used)]
            steps = steps or [self._elementwise(nodes[i], constant)]
            if not needed.intersection(nodes[i].output) <= {step.output for step in steps}:
                raise Unsupported(f"{nodes[i].op_type} is not differentiated")
            found += steps
            needed.update(name for step in steps for name in step.inputs)
        self._steps = found[::-1]

    def gradients(self, outputs: Sequence[str], feed: Feed, random: Any) -> dict[str, Array]:
        """Return the gradients of random combinations of the network's outputs.

        Parameters
        ----------
        outputs : sequence of str
            Tensors at which gradients are computed: outputs of layers.
        feed : dict of str to ndarray
            Inputs of the network.
        random : torch.Generator
            Generator of the combinations.

        Returns
        -------
        dict of str to ndarray
            Gradient of the sum over examples, by tensor; without those that no output reads.
        """
        torch = self._torch
        values = {name: torch.tensor(x) for name, x in feed.items()}
        with torch.enable_grad():
            for step in self._steps:
                y = step.run(*(values[name] for name in step.inputs))
                if step.output in outputs and not y.requires_grad:
                    y.requires_grad_()
                values[step.output] = y
            loss = sum(
                (values[n] * torch.randn(values[n].shape, generator=random)).sum()
                for n in self._outputs
            )
            reached = [name for name in outputs if name in values]  # not behind a dead end
            targets = [values[name] for name in reached]
            found = torch.autograd.grad(loss, targets, allow_unused=True)
        return {
            name: np.zeros(y.shape, np.float32) if g is None else g.float().numpy()
            for name, y, g in zip(reached, targets, found)
        }

    def _step(self, p: Primitive) -> _Step:
        make = getattr(self, f"_{p.kind}", None)
        if make is None:
            raise Unsupported(p.kind)
        operation = make(p)
        return _Step(p.output, p.inputs, lambda *x: operation(*x).reshape(-1, *p.shape))

    def _elementwise(self, node: Any, constant: Constants) -> _Step:
        """Return a node that is no primitive, but a function of PyTorch."""
        function = getattr(self._torch, _FUNCTIONS.get(node.op_type, ""), None)
        if function is None or node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"{node.op_type} is not differentiated")
        fixed = {n: self._torch.tensor(constant(n)) for n in node.input if constant.holds(n)}
        inputs = tuple(n for n in node.input if n not in fixed)

        def run(*values: Any) -> Any:
            known = fixed | dict(zip(inputs, values))
            return function(*(known[n] for n in node.input))

        return _Step(node.output[0], inputs, run)

    def _tensor(self, values: Any, like: Any) -> Any:
        """Return values per channel as a tensor that spreads over the samples of another."""
        t = self._torch.tensor(np.asarray(values), dtype=like.dtype)
        return t.reshape(-1, *(1,) * (like.ndim - 2))

    def _convolve(self, p: Primitive) -> Callable[..., Any]:
        ((stage, epilogue),) = p.links
        return lambda x: self._stage(x, stage, epilogue)

    def _stage(self, x: Any, s: Stage, epilogue: Epilogue) -> Any:
        functional, g = self._torch.nn.functional, s.geometry
        x = x.unsqueeze(-1) if x.ndim == 2 else x  # a linear layer
        weight = self._torch.tensor(s.weight, dtype=x.dtype)
        pads = [n for pair in reversed(g.padding) for n in pair]
        extra = [n for more in reversed(g.output_padding) for n in (0, more)]
        stride, dilation = list(g.stride), list(g.dilation)
        name = f"conv{'_transpose' if s.transposed else ''}{g.ndim}d"
        convolve = getattr(functional, name)
        if s.transposed:  # padding crops the output
            y = convolve(x, weight, None, stride, 0, 0, s.groups, dilation)
            y = functional.pad(y, [more - n for more, n in zip(extra, pads)])
        else:
            y = convolve(functional.pad(x, pads), weight, None, stride, 0, dilation, s.groups)
        return y if epilogue.bias is None else y + self._tensor(epilogue.bias, y)

    def _affine(self, p: Primitive) -> Callable[..., Any]:
        return lambda x: x * self._tensor(p.scale, x) + self._tensor(p.shift, x)

    def _normalize(self, p: Primitive) -> Callable[..., Any]:
        def normalize(x: Any) -> Any:
            variance, mean = self._torch.var_mean(
                x, tuple(range(2, x.ndim)), correction=0, keepdim=True
            )
            z = (x - mean) * self._torch.rsqrt(variance + p.options["epsilon"])
            return z * self._tensor(p.scale, x) + self._tensor(p.shift, x)

        return normalize

    def _softmax(self, p: Primitive) -> Callable[..., Any]:
        return lambda x: x.softmax(1)

    def _activate(self, p: Primitive) -> Callable[..., Any]:
        functional, a = self._torch.nn.functional, p.alpha
        functions: dict[str, Callable[..., Any]] = {
            "relu": functional.relu, "relu6": functional.relu6, "silu": functional.silu,
            "hard_swish": functional.hardswish, "hard_sigmoid": functional.hardsigmoid,
            "sigmoid": self._torch.sigmoid, "tanh": self._torch.tanh, "gelu": functional.gelu,
            "erf": self._torch.erf, "leaky_relu": lambda x: functional.leaky_relu(x, a),
            "elu": lambda x: functional.elu(x, a), "clip": lambda x: x.clamp(0, a),
        }  # fmt: skip
        return functions[p.activation]

    def _add(self, p: Primitive) -> Callable[..., Any]:
        return lambda x, y: x + y

    def _multiply(self, p: Primitive) -> Callable[..., Any]:
        return lambda x, y: x * y

    def _concatenate(self, p: Primitive) -> Callable[..., Any]:
        return lambda *values: self._torch.cat(values, 1)

    def _view(self, p: Primitive) -> Callable[..., Any]:
        return lambda x: x  # every result takes the shape of its primitive

    def _transpose(self, p: Primitive) -> Callable[..., Any]:
        return lambda x: x.permute(0, *(1 + axis for axis in p.options["order"]))

    def _select(self, p: Primitive) -> Callable[..., Any]:
        return lambda x: x[:, list(p.options["channels"])]

    def _pool(self, p: Primitive) -> Callable[..., Any]:
        functional, o = self._torch.nn.functional, p.options
        taps, stride = o["taps"], o["stride"]
        dilation = o.get("dilation", (1, 1, 1))
        is_max = o["kind"] == "max pool"
        if not is_max and dilation != (1, 1, 1):
            raise Unsupported("a dilated mean")

        def pads(size: Ints, inner: Ints) -> list[int]:
            """Return how far the windows reach beyond samples that start at `inner`."""
            sides: list[int] = []
            for i in (2, 1, 0):
                reach = (o["size"][i] - 1) * stride[i] + (taps[i] - 1) * dilation[i] + 1
                sides += [inner[i], reach - size[i] - inner[i]]
            return sides

        def pool(x: Any) -> Any:
            x = _with_three_axes(x)
            size, before = tuple(x.shape[2:]), o["before"]
            if is_max:
                padded = functional.pad(x, pads(size, before), value=-math.inf)
                return functional.max_pool3d(padded, taps, stride, 0, dilation)
            ones, start = x.new_ones((1, 1, *size)), before
            if o.get("count_padding"):
                size = tuple(n + 2 * b for n, b in zip(size, before))
                ones, start = x.new_ones((1, 1, *size)), (0, 0, 0)
            counts = functional.avg_pool3d(functional.pad(ones, pads(size, start)), taps, stride)
            padded = functional.pad(x, pads(tuple(x.shape[2:]), before))
            return functional.avg_pool3d(padded, taps, stride) / counts

        return pool

    def _pad(self, p: Primitive) -> Callable[..., Any]:
        o = p.options
        sides = [n for i in (2, 1, 0) for n in (o["before"][i], o["after"][i])]
        value = {"value": o["value"]} if o["mode"] == "constant" else {}
        return lambda x: self._torch.nn.functional.pad(
            _with_three_axes(x), sides, mode=o["mode"], **value
        )

    def _resample(self, p: Primitive) -> Callable[..., Any]:
        def resample(x: Any) -> Any:
            x = _with_three_axes(x)
            for axis, index in enumerate(p.options["index"], start=2):
                if index is not None:
                    x = x.index_select(axis, self._torch.tensor(index))
            return x

        return resample

    def _spread(self, p: Primitive) -> Callable[..., Any]:
        channels = p.options["channels"]
        block = (*(1,) * (4 - channels.ndim), *channels.shape)

        def spread(x: Any) -> Any:
            x = _with_three_axes(x)
            rows = x[:, channels.reshape(-1).tolist()].reshape(len(x), *block, *x.shape[2:])
            return rows.permute(0, 4, 5, 1, 6, 2, 7, 3)

        return spread


def _with_three_axes(x: Any) -> Any:
    """Return a tensor (batch, channels, \\*spatial) with three spatial axes."""
    return x.reshape(len(x), *value_shape(tuple(x.shape[1:])))
