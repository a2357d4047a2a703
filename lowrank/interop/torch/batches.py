"""Batches of inputs in any nesting of tensors, and the way a model is called with them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, Any], Any]

_CHANGED = (
    "batches must be the same in every pass, got others than in the first: give a list, or a "
    "loader whose random numbers are PyTorch's"
)


class Batches:
    """Calibration batches that are read anew in every pass, one at a time.

    PyTorch's random numbers are the same in every pass, so that loaders that shuffle or augment
    with them yield the same batches; that they do is checked.

    Parameters
    ----------
    source : iterable or callable
        Batches, such as a list or a loader, or a function that returns an iterator over them.  An
        iterator, which can be read only once, is kept as a list.
    prepare : callable
        Function that checks a batch and returns what the model takes.

    Raises
    ------
    TypeError
        If `source` is neither iterable nor a function.
    ValueError
        If there is no batch.
    """

    def __init__(self, source: Any, prepare: Callable[[Any], Any]) -> None:
        if isinstance(source, Iterator):
            source = list(source)
        if not (callable(source) or isinstance(source, Iterable)):
            raise TypeError(
                "batches must be an iterable or a function that returns an iterator, got "
                f"{type(source).__qualname__}"
            )
        self._source, self._prepare = source, prepare
        self._is_stored = isinstance(source, list | tuple)
        own = getattr(source, "generator", None)  # of a DataLoader
        self._generators = [torch.default_generator]
        self._generators += [own] if isinstance(own, torch.Generator) else []
        self._states = [g.get_state() for g in self._generators]
        self._marks: list[int] = []
        for batch in self._read():
            if not self._marks:
                self.first = batch
            self._marks.append(self._mark(batch))
        if not self._marks:
            raise ValueError("batches must hold at least one calibration batch, got none")

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[Any]:
        marks = iter(self._marks)
        for batch in self._read():
            if self._mark(batch) != next(marks, None):
                raise ValueError(_CHANGED)
            yield batch
        if next(marks, None) is not None:
            raise ValueError(_CHANGED)

    def _read(self) -> Iterator[Any]:
        batches: Iterator[Any] | None = None
        states = self._states
        while True:
            before = [g.get_state() for g in self._generators]
            _set_states(self._generators, states)
            try:
                if batches is None:
                    batches = iter(self._source() if callable(self._source) else self._source)
                batch = next(batches)
            except StopIteration:
                return
            finally:
                states = [g.get_state() for g in self._generators]
                _set_states(self._generators, before)
            yield self._prepare(batch)

    def _mark(self, batch: Any) -> int:
        """Return a checksum of the tensors in a batch; 0 if batches cannot change."""
        checksum = 0
        for t in () if self._is_stored else tensors_in(batch):
            values = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(values.numpy(), checksum)
        return checksum


def _set_states(generators: Iterable[torch.Generator], states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators, states):
        generator.set_state(state)


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


def split_examples(batch: Any, most: int) -> list[Any]:
    """Return a batch in parts of at most `most` examples; whole if tensors differ in number."""
    counts = {len(t) for t in tensors_in(batch) if t.ndim}
    if len(counts) != 1 or max(counts) <= most:
        return [batch]

    def part(first: int) -> Any:
        return map_tensors(lambda t: t[first : first + most] if t.ndim else t, batch)

    return [part(first) for first in range(0, counts.pop(), most)]


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
