"""Plans of the operator ``lowrank::chain``: descriptions of chains, and plans that are kept."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank import engine
from lowrank._typing import Ints
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Activation, Epilogue, Stage, abstract_weight
from lowrank.engine.cpu import CpuPlan

MAX_PLANS = 4096  # of all chains


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


class Description(NamedTuple):
    """Description of a chain for ``lowrank::chain``, without its weights.

    Attributes
    ----------
    text : str
        All stages, in JSON.
    stages : tuple of str
        Each stage alone.
    counts : tuple of int
        Number of parameters of each stage: 2 with a bias.
    can_split : bool
        Whether stages can run one by one: no later one has a constant border other than zero.
    """

    text: str
    stages: tuple[str, ...]
    counts: tuple[int, ...]
    can_split: bool


def describe_stages(stages: Sequence[Stage], epilogues: Sequence[Epilogue]) -> Description:
    """Return the description of a chain.

    Parameters
    ----------
    stages : sequence of Stage
        Stages.
    epilogues : sequence of Epilogue
        Bias and activation after each of them.

    Returns
    -------
    Description

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.stage import Epilogue
    >>> from lowrank.interop.torch.plans import describe_stages
    >>> stage = Stage(np.ones((8, 4, 3)), Geometry.of(1))
    >>> describe_stages([stage], [Epilogue()]).text[:24]
    '[{"weight": [8, 4, 3], "'
    """
    entries = [
        {
            "weight": stage.weight.shape, "geometry": asdict(stage.geometry),
            "groups": stage.groups, "outer": stage.outer, "inner": stage.inner,
            "shuffle": stage.shuffle, "transposed": stage.transposed,
            "bias": epilogue.bias is not None, "activation": epilogue.activation,
        }
        for stage, epilogue in zip(stages, epilogues)
    ]  # fmt: skip
    return Description(
        json.dumps(entries),
        tuple(json.dumps([entry]) for entry in entries),
        tuple(1 + (epilogue.bias is not None) for epilogue in epilogues),
        not any(has_constant_border(stage.geometry) for stage in stages[1:]),
    )


@functools.lru_cache(4096)
def read_stages(stages: str) -> tuple[Link, ...]:
    """Return the links of a text of a :class:`Description`."""
    return tuple(_read_link(**entry) for entry in json.loads(stages))


def _read_link(
    weight: list[int], geometry: dict[str, Any], bias: bool, activation: Activation, **rest: Any
) -> Link:
    g = Geometry(**{k: _as_tuple(v) for k, v in geometry.items()})
    rest = {k: _as_tuple(v) for k, v in rest.items()}
    return Link(Stage(abstract_weight(tuple(weight)), g, **rest), bias, activation)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@functools.lru_cache(4096)
def split_description(stages: str) -> tuple[str, ...]:
    """Return the texts of the stages of a chain."""
    return tuple(json.dumps([entry]) for entry in json.loads(stages))


def has_constant_border(g: Geometry) -> bool:
    """Return whether samples other than zero are added."""
    return g.padding_mode == "constant" and g.value != 0.0 and any(map(any, g.padding))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the precision in which a chain is computed: half precisions in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class _Kept:
    """A plan that is kept.

    Attributes
    ----------
    run : engine.Runner
        The plan.
    parameters : list of torch.Tensor
        Copies of the parameters that it holds.
    arrays : list of torch.Tensor
        Weights and biases in the memory that the plan was made from.
    storages : list of StorageWeakRef
        Memory of the parameters.
    users : int
        Number of calls that run it now.
    """

    run: engine.Runner
    parameters: list[torch.Tensor]
    arrays: list[torch.Tensor]
    storages: list[StorageWeakRef]
    users: int = 0


_plans: dict[Any, _Kept] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def use_plan(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    stages: str,
    size: Ints,
    threads: int,
    algorithm: engine.Algorithm,
) -> Iterator[engine.Runner]:
    """Yield a plan for an input and weights: one that is kept, updated if the weights changed.

    Weights are compared, since PyTorch does not count all changes, such as those of ``.data``.
    """
    places = tuple(p.data_ptr() for p in parameters)
    key = stages, size, tuple(x.shape[1:]), compute_dtype(x), threads, algorithm, places
    with _lock:
        kept = _plans.get(key)
        if kept is None or not (
            _has_weights(kept, parameters) or _update(kept, parameters, stages)
        ):
            if kept is None:
                _drop_unused_plans()
            kept = _plans[key] = _make_plan(x, parameters, stages, size, threads, algorithm)
        kept.users += 1
    try:
        yield kept.run
    finally:
        with _lock:
            kept.users -= 1


def _has_weights(kept: _Kept, parameters: Sequence[torch.Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a.detach(), b)
        for a, b in zip(parameters, kept.parameters)
    )


def _update(kept: _Kept, parameters: Sequence[torch.Tensor], stages: str) -> bool:
    """Write new weights to a plan; return False if that needs a new plan."""
    links, mirrored = read_stages(stages), _are_mirrored(stages)
    if kept.users or any(link.stage.transposed and not m for link, m in zip(links, mirrored)):
        return False  # a plan copies the weights of other transposed stages
    for old, new in zip(kept.parameters, parameters):
        if old.dtype != new.dtype:
            return False
        old.copy_(new.detach())
    for old, new in zip(kept.arrays, _as_arrays(stages, kept.parameters, kept.arrays[0].dtype)):
        old.copy_(new)
    return isinstance(kept.run, CpuPlan) and kept.run.repack()


def _drop_unused_plans() -> None:
    """Forget plans whose weights are gone, and the oldest ones of too many."""
    for key, kept in list(_plans.items()):
        if any(storage.expired() for storage in kept.storages):
            _plans.pop(key, None)
    if len(_plans) >= MAX_PLANS:
        _plans.pop(next(iter(_plans)), None)


def _make_plan(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    stages: str,
    size: Ints,
    threads: int,
    algorithm: engine.Algorithm,
) -> _Kept:
    dtype = compute_dtype(x)
    links = read_stages(stages)
    copies = [p.detach().clone(memory_format=torch.contiguous_format) for p in parameters]
    arrays = list(_as_arrays(stages, copies, dtype))
    views = [a.numpy() for a in arrays]
    for view in views:
        view.flags.writeable = False  # stages copy what may change, and `_update` writes to these
    given = iter(views)
    shape = tuple(x.shape[1:])
    planned, epilogues = [], []
    for stage, has_bias, activation in links:
        if size:
            stage = _with_output_size(stage, shape[1:], size)
        stage = _mirrored(stage) or stage
        planned.append(replace(stage, weight=next(given)))
        epilogues.append(Epilogue(next(given) if has_bias else None, activation))
    name = str(dtype).removeprefix("torch.")
    run = engine.plan(planned, shape, name, epilogues, threads, algorithm=algorithm)
    storages = [StorageWeakRef(p.untyped_storage()) for p in parameters]
    return _Kept(run, copies, arrays, storages)


def _as_arrays(
    stages: str, parameters: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yield the weights and biases as a plan takes them."""
    given = iter(parameters)
    for (stage, has_bias, _), is_mirrored in zip(read_stages(stages), _are_mirrored(stages)):
        weight = next(given).to(dtype)
        if is_mirrored:
            weight = weight.unflatten(0, (stage.groups, -1)).swapaxes(1, 2).flatten(0, 1)
            weight = weight.flip(list(range(2, weight.ndim))).contiguous()
        yield weight
        if has_bias:
            yield next(given).to(dtype)


@functools.lru_cache(4096)
def _are_mirrored(stages: str) -> tuple[bool, ...]:
    return tuple(_mirrored(stage) is not None for stage, _, _ in read_stages(stages))


def _mirrored(stage: Stage) -> Stage | None:
    """Return a transposed stage of stride 1 as a plain one, with an abstract weight; or None.

    Its weight has mirrored taps, and rows and columns in exchange.
    """
    g = stage.geometry
    pads = tuple(
        (e - 1 - before, e - 1 - after + added)
        for (before, after), e, added in zip(g.padding, g.extent(stage.kernel), g.output_padding)
    )
    if (
        not stage.transposed
        or max(g.stride) > 1
        or min(map(min, pads)) < 0
        or stage.shuffle != (1, 1)
    ):
        return None
    rows, columns, *kernel = stage.weight.shape
    weight = abstract_weight((stage.groups * columns, rows // stage.groups, *kernel))
    geometry = Geometry(g.stride, pads, g.dilation)
    return replace(stage, weight=weight, geometry=geometry, transposed=False)


def _with_output_size(stage: Stage, input_size: Ints, size: Ints) -> Stage:
    """Return a transposed stage whose output has this size."""
    g = replace(stage.geometry, output_padding=())
    added = tuple(n - m for n, m in zip(size, g.transposed_size(input_size, stage.kernel)))
    return replace(stage, geometry=replace(g, output_padding=added))
