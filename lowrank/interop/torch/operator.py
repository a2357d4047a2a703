"""The PyTorch operator ``lowrank::chain``: a chain on lowrank's engine, with gradients.

The operator takes tensors and a JSON description of the stages, so that graphs that
``torch.compile`` and ``torch.export`` capture hold no Python object.  Plans are kept per
description, shape and weights.  Gradients of inputs are adjoint chains on the engine, gradients of
weights are PyTorch's convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lowrank import engine
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine.padding import padded_indices
from lowrank.interop.torch.chains import split_blocks
from lowrank.interop.torch.plans import (
    Description,
    compute_dtype,
    describe_stages,
    has_constant_border,
    read_stages,
    split_description,
    use_plan,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SIX = 6.0  # upper bound of ReLU6


def run_chain(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    chain: Description,
    threads: int | None = None,
    algorithm: engine.Algorithm = "auto",
) -> torch.Tensor:
    """Run a chain on lowrank's engine.

    Parameters
    ----------
    x : torch.Tensor, shape (batch, channels, \\*spatial)
        Input in any precision that PyTorch computes in; half precisions are computed in float32.
    parameters : sequence of torch.Tensor
        Weight of each stage, followed by its bias if it has one.
    chain : Description
        Description of the chain.
    threads : int, optional
        Number of threads; PyTorch's number at each call if not given.
    algorithm : str
        ``"auto"`` or ``"direct"``, which never uses a fast algorithm.

    Returns
    -------
    torch.Tensor
        Contiguous tensor of the precision of `x`.

    Raises
    ------
    TypeError
        If `x` is of no floating-point precision.
    ValueError
        If its shape does not fit.
    NotImplementedError
        If a transform of ``torch.func`` differentiates it.

    Examples
    --------
    >>> import torch
    >>> import lowrank
    >>> from lowrank.core.stage import Epilogue
    >>> from lowrank.interop.torch.operator import run_chain
    >>> from lowrank.interop.torch.plans import describe_stages
    >>> weight = torch.ones(4, 2, 3, requires_grad=True)
    >>> chain = describe_stages(lowrank.dense(weight.detach().numpy()).stages, [Epilogue()])
    >>> run_chain(torch.ones(1, 2, 5), [weight], chain).sum().backward()
    >>> weight.grad[0, 0]
    tensor([3., 3., 3.])
    """
    options = (), threads or 0, algorithm
    tensors = [x, *parameters]
    is_recorded = torch.compiler.is_compiling()
    if not is_recorded and any(map(torch._C._functorch.is_gradtrackingtensor, tensors)):
        raise NotImplementedError(
            "torch.func does not differentiate lowrank::chain: use torch.autograd, or the PyTorch "
            "model"
        )
    is_trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (is_trained and chain.can_split):
        return cast(torch.Tensor, chain_operator(x, list(parameters), chain.text, *options))
    # One call per stage: autograd keeps what it would otherwise have to compute again.
    start = 0
    for stage, count in zip(chain.stages, chain.counts):
        x = chain_operator(x, list(parameters[start : start + count]), stage, *options)
        start += count
    return x


@functools.lru_cache(4096)
def _adjoint_description(stages: str) -> str:
    """Return the description of the adjoint of one stage, which pads and adds nothing else."""
    ((stage, _, _),) = read_stages(stages)
    g = stage.geometry
    if stage.transposed:
        g = replace(g, output_padding=())
    elif g.padding_mode != "zeros":
        g = Geometry(g.stride, ((0, 0),) * g.ndim, g.dilation)
    return describe_stages([replace(stage, geometry=g).adjoint()], [Epilogue()]).text


def _run(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    stages: str,
    size: Sequence[int],
    threads: int,
    algorithm: engine.Algorithm,
) -> torch.Tensor:
    """Run the chain: the operator on the CPU."""
    shape = _output_shape(x, stages, size)
    dtype = compute_dtype(x)
    threads = threads or torch.get_num_threads()
    y = torch.empty(shape, dtype=dtype)
    with use_plan(x, parameters, stages, tuple(size), threads, algorithm) as run:
        run(x.detach().to(dtype).numpy(), y.numpy())
    return y.to(x.dtype)


chain_operator = torch.library.custom_op(
    "lowrank::chain", _run, mutates_args=(), device_types="cpu",
    schema="(Tensor x, Tensor[] parameters, str stages, SymInt[] size, int threads, "
    "str algorithm) -> Tensor",
)  # fmt: skip
"""Operator of a chain; `size` is the spatial size of the output of a last, transposed stage."""


@chain_operator.register_fake  # type: ignore[untyped-decorator]
def _run_abstractly(
    x: torch.Tensor, parameters: Any, stages: str, size: Any, threads: int, algorithm: str
) -> torch.Tensor:
    return x.new_empty(_output_shape(x, stages, size))


def _output_shape(x: torch.Tensor, stages: str, size: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the output; sizes may be symbols."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"x must be one of {names}, got {x.dtype}")
    links = read_stages(stages)
    first = links[0].stage
    if x.ndim != first.geometry.ndim + 2 or x.shape[1] != first.in_channels:
        raise ValueError(
            f"x must be (batch, {first.in_channels} channels, and {first.geometry.ndim} spatial "
            f"axes), got {tuple(x.shape)}"
        )
    shape: tuple[int, ...] = tuple(x.shape[1:])
    for stage, _, _ in links:
        shape = stage.output_shape(shape)
    return (x.shape[0], shape[0], *(size or shape[1:]))


# Gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, parameters, *ctx.options = inputs
    ctx.save_for_backward(x, *parameters, output)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, *parameters, output = ctx.saved_tensors
    stages, size, threads, algorithm = ctx.options
    links = read_stages(stages)
    for number, (stage, _, _) in enumerate(links):
        if number and has_constant_border(stage.geometry):
            raise ValueError(
                "gradients need a constant border to be zero after the first stage, got "
                f"{stage.geometry.value} in stage {number}"
            )
    needs_input, needs_parameters = ctx.needs_input_grad[:2]
    given = iter(zip(parameters, needs_parameters))
    steps = [
        (link, one, [next(given) for _ in range(1 + link.has_bias)])
        for link, one in zip(links, split_description(stages))
    ]
    inputs = [x]
    for _, one, own in steps[:-1]:
        inputs.append(chain_operator(inputs[-1], [p for p, _ in own], one, (), threads, algorithm))
    found: list[torch.Tensor | None] = []
    for number, (link, one, ((weight, needs_weight), *bias)) in reversed(list(enumerate(steps))):
        y = output if number == len(steps) - 1 else inputs[number + 1]
        if link.activation != "none":
            passes = (y > 0) & (y < _SIX) if link.activation == "relu6" else y > 0
            grad = grad * passes
        own_grads: list[torch.Tensor | None] = [None] * (1 + len(bias))
        if bias and bias[0][1]:
            axes = [0, *range(2, grad.ndim)]
            own_grads[1] = grad.to(compute_dtype(x)).sum(axes).to(bias[0][0].dtype)
        if needs_weight:
            own_grads[0] = _weight_gradient(link.stage, weight, inputs[number], grad)
        found = own_grads + found
        if number or needs_input:
            grad = _input_gradient(
                link.stage, one, weight, inputs[number], grad, threads, algorithm
            )
    # PyTorch takes an empty list for one of tensors.
    return grad if needs_input else None, found, None, None if size else [], None, None


def _input_gradient(
    stage: Stage, description: str, weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor,
    threads: int, algorithm: str,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of the input of a stage: the adjoint stage of that of its output."""
    g = stage.geometry
    size: list[int] = []
    if stage.transposed:
        grad = _reached(stage, grad)
    elif g.padding_mode == "zeros":
        size = list(x.shape[2:])
    else:
        size = [n + a + b for n, (a, b) in zip(x.shape[2:], g.padding)]
    adjoint = _adjoint_description(description)
    result = chain_operator(grad, [weight], adjoint, size, threads, algorithm)
    return cast(torch.Tensor, result if g.padding_mode == "zeros" else _unpad(result, g, x.shape))


def _weight_gradient(
    stage: Stage, weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the weight of a stage, by PyTorch's convolutions."""
    g, source = stage.geometry, x
    if stage.transposed:  # the adjoint of a plain stage, which reads `grad` and writes `x`
        source, grad = _reached(stage, grad), x
    dtype = compute_dtype(x)
    source, grad = source.to(dtype), grad.to(dtype)
    pads = [a for a, _ in g.padding]
    if g.padding_mode != "zeros" or any(a != b for a, b in g.padding):
        source, pads = _pad(source, g), [0] * g.ndim
    source = split_blocks(source, g.ndim, stage.outer, stage.inner, stage.shuffle)
    grad = split_blocks(grad, g.ndim, stage.outer, stage.inner, (1, 1))
    _, found, _ = torch.ops.aten.convolution_backward(
        grad, source, weight.to(dtype), None, g.stride, pads, g.dilation, False, [0] * g.ndim,
        stage.groups, [False, True, False],
    )  # fmt: skip
    return cast(torch.Tensor, found.to(weight.dtype))


def _reached(stage: Stage, grad: torch.Tensor) -> torch.Tensor:
    """Return the part of a transposed stage's output gradient that depends on its input."""
    g = stage.geometry
    for axis, (added, step) in enumerate(zip(g.output_padding, g.stride), 2):
        if added >= step:
            grad = grad.narrow(axis, 0, grad.shape[axis] - added + step - 1)
    return grad


def _pad(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Return an input with the padding of a geometry."""
    if g.padding_mode in ("zeros", "constant"):
        pads = [n for pair in reversed(g.padding) for n in pair]
        return torch.nn.functional.pad(x, pads, value=g.value if has_constant_border(g) else 0.0)
    for axis, index in _tables(g, x.shape):
        x = x.index_select(axis, index)
    return x


def _unpad(grad: torch.Tensor, g: Geometry, shape: Sequence[int]) -> torch.Tensor:
    """Return the gradient of an input from that of its padded copy."""
    if g.padding_mode == "constant":
        pads = [-n for pair in reversed(g.padding) for n in pair]
        return torch.nn.functional.pad(grad, pads)
    for axis, index in _tables(g, shape):
        size = [*grad.shape]
        size[axis] = shape[axis]
        grad = grad.new_zeros(size).index_add(axis, index, grad)
    return grad


def _tables(g: Geometry, shape: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the padded axes, and the input sample at each padded position."""
    for axis, (before, after) in enumerate(g.padding, 2):
        if before or after:
            index = padded_indices(int(shape[axis]), before, after, g.padding_mode, 1)
            yield axis, torch.tensor(index.tolist())


chain_operator.register_autograd(_backward, setup_context=_save)


@chain_operator.register_vmap  # type: ignore[untyped-decorator]
def _run_batched(
    info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, parameters: Any, *options: Any
) -> tuple[torch.Tensor, int]:
    """Run the chain on batches of inputs at once, or with each of several weights."""
    x_dim, parameter_dims = in_dims[:2]
    if all(dim is None for dim in parameter_dims):
        x = x.movedim(x_dim, 0)
        y = chain_operator(x.flatten(0, 1), parameters, *options)
        return y.unflatten(0, x.shape[:2]), 0
    results = []
    for i in range(info.batch_size):
        one, *own = (
            t if dim is None else t.select(dim, i)
            for t, dim in zip([x, *parameters], [x_dim, *parameter_dims])
        )
        results.append(chain_operator(one, own, *options))
    return torch.stack(results), 0
