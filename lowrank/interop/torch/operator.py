"""The PyTorch operator ``lowrank::chain``: a chain on lowrank's engine, with gradients.

The operator takes tensors and a JSON description of the stages, so that graphs that
``torch.compile`` and ``torch.export`` capture hold no Python object.  Plans are kept per
description, shape and weights.  Gradients of inputs are adjoint chains on the engine, gradients of
weights the operator ``lowrank::weight_gradient``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lowrank import engine
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.threads import as_threads
from lowrank.interop.torch.plans import (
    Description,
    compute_dtype,
    describe_stages,
    has_constant_border,
    read_stages,
    split_description,
    use_plan,
)
from lowrank.interop.torch.weight_gradients import reached, unpad, weight_gradient

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
    options = (), as_threads(threads) or 0, algorithm
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
        if needs_weight:
            both = gradient_operator(inputs[number], grad, one, threads)
            own_grads = [g.to(p.dtype) for g, (p, _) in zip(both, [(weight, True), *bias])]
        elif bias:
            axes = [0, *range(2, grad.ndim)]
            own_grads[1] = grad.to(compute_dtype(x)).sum(axes).to(bias[0][0].dtype)
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
        grad = reached(stage, grad)
    elif g.padding_mode == "zeros":
        size = list(x.shape[2:])
    else:
        size = [n + a + b for n, (a, b) in zip(x.shape[2:], g.padding)]
    adjoint = _adjoint_description(description)
    result = chain_operator(grad, [weight], adjoint, size, threads, algorithm)
    return cast(torch.Tensor, result if g.padding_mode == "zeros" else unpad(result, g, x.shape))


def _gradient(
    x: torch.Tensor, grad: torch.Tensor, stages: str, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ((stage, _, _),) = read_stages(stages)
    return weight_gradient(stage, x, grad, threads or torch.get_num_threads())


gradient_operator = torch.library.custom_op(
    "lowrank::weight_gradient", _gradient, mutates_args=(), device_types="cpu",
    schema="(Tensor x, Tensor grad, str stages, int threads) -> (Tensor, Tensor)",
)  # fmt: skip
"""Operator of the gradients of a stage's weight and bias, from its input and output's gradient."""


@gradient_operator.register_fake  # type: ignore[untyped-decorator]
def _gradient_abstractly(
    x: torch.Tensor, grad: torch.Tensor, stages: str, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ((stage, _, _),) = read_stages(stages)
    dtype = compute_dtype(x)
    return (
        x.new_empty(stage.weight.shape, dtype=dtype), x.new_empty(grad.shape[1], dtype=dtype)
    )  # fmt: skip


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, grad, ctx.stages, ctx.threads = inputs
    ctx.save_for_backward(x, grad)


def _differentiate_gradient(
    ctx: Any, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The gradient is bilinear: its own gradients are the stage, and the adjoint, with `weight`."""
    x, grad = ctx.saved_tensors
    ((stage, _, _),) = read_stages(ctx.stages)
    one = describe_stages([stage], [Epilogue()]).text
    by_x = by_grad = None
    if ctx.needs_input_grad[0]:
        by_x = _input_gradient(stage, one, weight, x, grad, ctx.threads, "auto")
    if ctx.needs_input_grad[1]:
        size = grad.shape[2:] if stage.transposed else ()
        y = chain_operator(x, [weight], one, size, ctx.threads, "auto")
        by_grad = (y + bias.reshape(-1, *[1] * stage.geometry.ndim)).to(grad.dtype)
    return by_x, by_grad, None, None


gradient_operator.register_autograd(_differentiate_gradient, setup_context=_save_gradient)


@gradient_operator.register_vmap  # type: ignore[untyped-decorator]
def _gradient_batched(
    info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, grad: torch.Tensor, *options: Any
) -> tuple[Any, tuple[int, int]]:
    """Compute the gradients one by one."""
    results = [
        gradient_operator(
            *(t if d is None else t.select(d, i) for t, d in zip((x, grad), in_dims)), *options
        )
        for i in range(info.batch_size)
    ]
    weights, biases = zip(*results)
    return (torch.stack(weights), torch.stack(biases)), (0, 0)


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
