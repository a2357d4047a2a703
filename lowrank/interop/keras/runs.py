"""Runs of Keras models in which the inputs of layers are recorded, or layers are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lowrank.interop.batches import Feed
from lowrank.interop.common import one_line
from lowrank.interop.keras.files import library

Record = Callable[[Any], None]


class Finished(BaseException):
    """Raised by a record to end a run: Keras adds words to every ``Exception``."""


def run(
    model: Any,
    feed: Feed,
    replaced: Sequence[tuple[Any, Sequence[Any]]] = (),
    inputs: Sequence[tuple[Any, Record]] = (),
    linear: Sequence[tuple[Any, Record]] = (),
) -> list[Any]:
    """Run a model on one batch.

    Parameters
    ----------
    model : keras.Model
        Model; its layers are as before afterwards.
    feed : dict of str to ndarray
        Its inputs, in order.
    replaced : sequence of (Layer, sequence of Layer)
        Layers and those that run in place of them.
    inputs : sequence of (Layer, callable)
        Layers and functions of their inputs.
    linear : sequence of (Layer, callable)
        Layers and functions of their outputs ahead of the activation.  Gradients are tracked if
        there are any.

    Returns
    -------
    list of tensor
        Outputs of the model; none if a function raised `Finished`.

    Raises
    ------
    ValueError
        If Keras fails.
    """
    keras = library()
    structure = getattr(model, "input", None)  # a Sequential model has none
    values = list(feed.values())
    x = values[0] if structure is None else keras.tree.pack_sequence_as(structure, values)
    with ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.set_grad_enabled(bool(linear)))
        for layer, layers in replaced:
            stack.enter_context(_patched(layer, "call", partial(_call_in_turn, layers)))
        for layer, record in inputs:
            stack.enter_context(_patched(layer, "call", partial(_call, record, layer.call)))
        for layer, record in linear:
            function = partial(_activate, record, layer.activation)
            stack.enter_context(_patched(layer, "activation", function))
        try:
            return list(keras.tree.flatten(model(x, training=False)))
        except Finished:
            return []
        except MemoryError:
            raise
        except Exception as why:  # of the libraries that Keras runs on
            raise ValueError(f"Keras does not run the model: {one_line(why)}") from None


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of a call of a layer, which may be given by name."""
    return args[0] if args else kwargs.get("inputs", next(iter(kwargs.values())))


def _call_in_turn(layers: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    x = first_argument(args, kwargs)
    for layer in layers:
        x = layer(x)
    return x


def _call(record: Record, call: Any, *args: Any, **kwargs: Any) -> Any:
    record(first_argument(args, kwargs))
    return call(*args, **kwargs)


def _activate(record: Record, activation: Any, x: Any) -> Any:
    record(x)
    return activation(x)


@contextmanager
def _patched(layer: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one layer while the block runs."""
    own = vars(layer).get(name)
    object.__setattr__(layer, name, function)  # Keras would track it
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(layer, name)
        else:
            object.__setattr__(layer, name, own)
