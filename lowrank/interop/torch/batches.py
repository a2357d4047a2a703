"""Batches of inputs in any nesting of tensors, and the way a model is called with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, Any], Any]


def model_input(batch: Any) -> Any:
    """Return the part of a batch that the model takes: the first entry of a tuple or list."""
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def run_model(model: nn.Module, x: Any) -> Any:
    """Call a model with one argument, or with a mapping of arguments by name."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def check_batch(batch: Any) -> Any:
    """Return a calibration batch that holds finite tensors.

    Raises
    ------
    TypeError
        If it holds no tensor.
    ValueError
        If a value is NaN or infinite.
    """
    tensors = tensors_in(batch)
    if not tensors:
        raise TypeError(
            f"a calibration batch must be a tensor, a tuple that begins with one or a mapping of "
            f"them, got {type(batch).__qualname__}"
        )
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("calibration batches must be finite: found NaN or infinity")
    return batch


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Return all tensors in a nested structure, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """Return a nested structure with `function` applied to every tensor."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, function, batch)


def first_examples(batch: Any, count: int) -> Any:
    """Return the first `count` examples of a batch."""
    return map_tensors(lambda t: t[:count] if t.ndim else t, batch)


def first_tensor(output: Any) -> torch.Tensor:
    """Return the first tensor in the output of a model.

    Raises
    ------
    TypeError
        If it holds none.
    """
    if isinstance(output, torch.Tensor):
        return output
    entries = output.values() if isinstance(output, Mapping) else output
    if isinstance(entries, Iterable):
        for entry in entries:
            return first_tensor(entry)
    raise TypeError(f"the model must return a tensor, got {type(output).__qualname__}")


def run_error(batch: Any, cause: Exception) -> ValueError:
    """Return the error to raise when a model fails on a batch."""
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(batch))
    return ValueError(f"the model cannot be run on a batch of shape {shapes}: {cause}")
