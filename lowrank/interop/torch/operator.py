"""The PyTorch operator ``lowrank::chain``: a chain on lowrank's engine, with gradients.

The operator takes tensors and a JSON description of the stages, so that graphs that
``torch.compile`` and ``torch.export`` capture hold no Python object.  Plans are kept per
description, shape and weights.  Gradients of inputs are adjoint chains on the engine, gradients of
weights are PyTorch's convolutions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank import engine
from lowrank._typing import Ints
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Activation, Epilogue, Stage, abstract_weight
from lowrank.engine.padding import padded_indices
from lowrank.interop.torch.chains import split_blocks

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_PLANS = 4096  # of all chains
_SIX = 6.0  # upper bound of ReLU6


class Link(NamedTuple):
    """One stage of a description.

    Attributes
    ----------
    stage : Stage
        Stage with an abstract weight.
    has_bias : bool
        Whether a bias follows the weight in the parameters.
    activation : str
        Activation after the bias.
    """

    stage: Stage
    has_bias: bool
    activation: Activation


def describe_stages(stages: Sequence[Stage], epilogues: Sequence[Epilogue]) -> str:
    """Return the description of a chain that ``lowrank::chain`` takes, without its weights.

    Parameters
    ----------
    stages : sequence of Stage
        Stages.
    epilogues : sequence of Epilogue
        Bias and activation after each of them.

    Returns
    -------
    str
        JSON.

    Raises
    ------
    ValueError
        If a later stage has a constant border other than zero.

    Examples
    --------
    >>>     >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.stage import Epilogue
    >>> from lowrank.interop.torch.operator import describe_stages
    >>> stage = Stage(np.ones((8, 4, 3)), Geometry.of(1))
    >>> describe_stages([stage], [Epilogue()])[:24]
    '[{"weight": [8, 4, 3], "'
    """
    for number, stage in enumerate(stages):
        if number and _has_constant_border(stage.geometry):
            raise ValueError(
                f"padding_mode must not be constant after the first stage, got value "
                f"{stage.geometry.value} in stage {number}"
            )
    return json.dumps(
        [
            {
                "weight": stage.weight.shape, "geometry": asdict(stage.geometry),
                "groups": stage.groups, "outer": stage.outer, "inner": stage.inner,
                "shuffle": stage.shuffle, "transposed": stage.transposed,
                "bias": epilogue.bias is not None, "activation": epilogue.activation,
            }
            for stage, epilogue in zip(stages, epilogues)
        ]
    )  # fmt: skip


@functools.lru_cache(4096)
def read_stages(stages: str) -> tuple[Link, ...]:
    """Return the links that :func:`describe_stages` has described."""
    return tuple(_read_link(**entry) for entry in json.loads(stages))


def _read_link(
    weight: list[int], geometry: dict[str, Any], bias: bool, activation: Activation, **rest: Any
) -> Link:
    g = Geometry(**{k: _as_tuple(v) for k, v in geometry.items()})
    rest = {k: _as_tuple(v) for k, v in rest.items()}
    return Link(Stage(abstract_weight(tuple(weight)), g, **rest), bias, activation)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def run_chain(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    stages: str,
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
    stages : str
        What :func:`describe_stages` returned.
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

    Examples
    --------
    >>> import torch
    >>> import lowrank
    >>> from lowrank.core.stage import Epilogue
    >>> from lowrank.interop.torch.operator import describe_stages, run_chain
    >>> weight = torch.ones(4, 2, 3, requires_grad=True)
    >>> stages = describe_stages(lowrank.dense(weight.detach().numpy()).stages, [Epilogue()])
    >>> run_chain(torch.ones(1, 2, 5), [weight], stages).sum().backward()
    >>> weight.grad[0, 0]
    tensor([3., 3., 3.])
    """
    run = functools.partial(chain_operator, size=(), threads=threads or 0, algorithm=algorithm)
    links = read_stages(stages)
    tensors = [x, *parameters]
    if len(links) > 1 and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        # One call per stage: autograd keeps what it would otherwise have to compute again.
        given = iter(parameters)
        for one in _split_description(stages):
            (link,) = read_stages(one)
            x = run(x, [next(given) for _ in range(1 + link.has_bias)], one)
        return x
    return cast(torch.Tensor, run(x, list(parameters), stages))


@functools.lru_cache(4096)
def _split_description(stages: str) -> tuple[str, ...]:
    return tuple(json.dumps([entry]) for entry in json.loads(stages))


@functools.lru_cache(4096)
def _adjoint_description(stages: str) -> str:
    """Return the description of the adjoint of one stage, which pads and adds nothing else."""
    ((stage, _, _),) = read_stages(stages)
    g = stage.geometry
    if stage.transposed:
        g = replace(g, output_padding=())
    elif g.padding_mode != "zeros":
        g = Geometry(g.stride, ((0, 0),) * g.ndim, g.dilation)
    return describe_stages([replace(stage, geometry=g).adjoint()], [Epilogue()])


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
    dtype = _compute_dtype(x)
    run = _plan(x, parameters, stages, tuple(size), threads or torch.get_num_threads(), algorithm)
    y = torch.empty(shape, dtype=dtype)
    run(x.detach().to(dtype).numpy(), y.numpy())
    return y.to(x.dtype)


chain_operator = torch.library.custom_op(
    "lowrank::chain", _run, mutates_args=(), device_types="cpu",
    schema="(Tensor x, Tensor[] parameters, str stages, SymInt[] size, int threads, "
    "str algorithm) -> Tensor",
)  # fmt: skip
"""Operator of a chain; `size` is the spatial size of the output of a last, transposed stage."""


@chain_operator.register_fake
def _run_abstractly(
    x: torch.Tensor, parameters: Any, stages: str, size: Any, threads: int, algorithm: str
) -> torch.Tensor:
    return x.new_empty(_output_shape(x, stages, size))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


class _Kept(NamedTuple):
    """A plan with copies of the weights that it holds, and their storages."""

    run: engine.Runner
    weights: list[torch.Tensor]
    storages: list[StorageWeakRef]


_plans: dict[Any, _Kept] = {}


def _plan(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    stages: str,
    size: Ints,
    threads: int,
    algorithm: engine.Algorithm,
) -> engine.Runner:
    """Return the plan for an input and weights: one that is kept, unless the weights changed.

    Weights are compared, since PyTorch does not count all changes, such as those of `.data`.
    """
    places = tuple(p.data_ptr() for p in parameters)
    key = stages, size, tuple(x.shape[1:]), _compute_dtype(x), threads, algorithm, places
    kept = _plans.get(key)
    if kept is not None and all(map(_is_same, parameters, kept.weights)):
        return kept.run
    if kept is None:
        _drop_unused_plans()
    weights = [p.detach().clone(memory_format=torch.contiguous_format) for p in parameters]
    run = _make_plan(x, weights, stages, size, threads, algorithm)
    _plans[key] = _Kept(run, weights, [StorageWeakRef(p.untyped_storage()) for p in parameters])
    return run


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach(), b)


def _drop_unused_plans() -> None:
    """Forget plans whose weights are gone, and the oldest ones of too many."""
    for key, kept in list(_plans.items()):
        if any(storage.expired() for storage in kept.storages):
            _plans.pop(key, None)
    if len(_plans) >= MAX_PLANS:
        _plans.pop(next(iter(_plans)), None)


def _make_plan(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    stages: str,
    size: Ints,
    threads: int,
    algorithm: engine.Algorithm,
) -> engine.Runner:
    dtype = _compute_dtype(x)
    arrays = iter([w.to(dtype).numpy() for w in weights])
    links, epilogues = [], []
    for stage, has_bias, activation in read_stages(stages):
        links.append(replace(stage, weight=next(arrays)))
        epilogues.append(Epilogue(next(arrays) if has_bias else None, activation))
    shape = tuple(x.shape[1:])
    if size:
        links[-1] = _with_output_size(links[-1], shape[1:], size)
    name = str(dtype).removeprefix("torch.")
    return engine.plan(links, shape, name, epilogues, threads, algorithm=algorithm)


def _with_output_size(stage: Stage, input_size: Ints, size: Ints) -> Stage:
    """Return a transposed stage whose output has this size."""
    g = replace(stage.geometry, output_padding=())
    added = tuple(n - m for n, m in zip(size, g.transposed_size(input_size, stage.kernel)))
    return replace(stage, geometry=replace(g, output_padding=added))


# Gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, parameters, *ctx.options = inputs
    ctx.save_for_backward(x, *parameters, output)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, *parameters, output = ctx.saved_tensors
    stages, size, threads, algorithm = ctx.options
    needs_input, needs_parameters = ctx.needs_input_grad[:2]
    given = iter(zip(parameters, needs_parameters))
    steps = [
        (link, one, [next(given) for _ in range(1 + link.has_bias)])
        for link, one in zip(read_stages(stages), _split_description(stages))
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
            own_grads[1] = grad.to(_compute_dtype(x)).sum(axes).to(bias[0][0].dtype)
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
    dtype = _compute_dtype(x)
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
        return torch.nn.functional.pad(x, pads, value=g.value if _has_constant_border(g) else 0.0)
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


def _has_constant_border(g: Geometry) -> bool:
    return g.padding_mode == "constant" and g.value != 0.0 and any(map(any, g.padding))


chain_operator.register_autograd(_backward, setup_context=_save)


@chain_operator.register_vmap
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
