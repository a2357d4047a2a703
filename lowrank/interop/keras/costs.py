"""MACs of Keras layers that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lowrank._typing import Ints
from lowrank.interop.keras.convolutions import Einsum, is_convolution
from lowrank.interop.keras.files import library


class MacCounter:
    """MACs of one layer and of the layers that its code runs, counted while the model runs.

    Parameters
    ----------
    layer : keras.layers.Layer
        Layer of any class.

    Attributes
    ----------
    watched : list of (Layer, callable)
        Layers, and functions of their inputs, for :func:`lowrank.interop.keras.runs.run`.
    macs : int or None
        MACs of the examples that were run; None if they are not known.
    """

    def __init__(self, layer: Any) -> None:
        self.macs: int | None = 0
        parts = [layer] if counts(layer) else layer._flatten_layers(include_self=False)
        parts = [x for x in parts if counts(x)]
        self.watched: list[tuple[Any, Callable[[Any], None]]] = [
            (part, partial(self._record, part)) for part in parts
        ]

    def _record(self, layer: Any, x: Any) -> None:
        macs = count_macs(layer, tuple(x.shape))
        self.macs = None if macs is None or self.macs is None else self.macs + macs


def counts(layer: Any) -> bool:
    """Return whether a layer is one whose MACs :func:`count_macs` knows."""
    return is_recurrent(layer) or _convolution_of(layer) is not None


def is_recurrent(layer: Any) -> bool:
    """Return whether a layer runs a cell over the steps of its input."""
    return isinstance(layer, library().layers.RNN)


def _convolution_of(layer: Any) -> str | None:
    """Return the class of Keras that a layer is, or is derived from."""
    return next((c.__name__ for c in type(layer).__mro__ if is_convolution(c.__name__)), None)


def count_macs(layer: Any, shape: Ints) -> int | None:
    """Return the MACs of one run of a layer.

    Parameters
    ----------
    layer : keras.layers.Layer
        Convolution, product with a matrix, or recurrent layer.
    shape : tuple of int
        Shape of its input, with the batch.

    Returns
    -------
    int or None
        MACs of all examples; None if they are not known.
    """
    try:
        if is_recurrent(layer):
            cells = getattr(layer.cell, "cells", [layer.cell])
            kernels = [w.shape for c in cells for w in (c.kernel, c.recurrent_kernel)]
            if len(shape) != 3:  # such as a convolution over the steps
                return None
            return math.prod(shape[:2]) * sum(map(math.prod, kernels))
        kind = _convolution_of(layer)
        if kind == "EinsumDense":
            e = Einsum.parse(layer.equation, len(shape))
            lead = math.prod(n for c, n in zip(e.input, shape) if c in e.lead)
            return int(lead * math.prod(layer.kernel.shape))
        if kind == "Dense":
            return int(math.prod(shape[:-1]) * math.prod(layer.kernel.shape))
        outputs = shape if "Transpose" in (kind or "") else layer.compute_output_shape(shape)
        axis = 1 if layer.data_format == "channels_first" else -1
        samples = math.prod(outputs) // outputs[axis]
        kernels = [tuple(w.shape) for w in layer.weights if len(w.shape) > 1]
        return int(samples * sum(map(math.prod, kernels)))
    except (AttributeError, TypeError, ValueError):  # of a class with code of its own
        return None
