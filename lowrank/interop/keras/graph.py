"""Structure of Keras models: their layers, and models with other layers in place of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.interop.keras.convolutions import is_convolution
from lowrank.interop.keras.files import library
from lowrank.interop.keras.runs import first_argument


def is_graph(layer: Any) -> bool:
    """Return whether a layer is a Sequential or functional model, whose graph Keras knows."""
    keras = library()
    if not isinstance(layer, keras.Model) or not (
        isinstance(layer, keras.Sequential) or hasattr(layer, "operations")
    ):
        return False
    owner = next(c for c in type(layer).__mro__ if "call" in vars(c))
    return owner.__module__.partition(".")[0] == "keras"  # a subclass may run another graph


def leaves(parent: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the layer and its parent of all layers that are no models themselves.

    A layer of a nested model, or of a TimeDistributed layer, is called MODEL/LAYER.
    """
    for inner in _inner(parent) or []:
        name = f"{prefix}{inner.name}"
        if _inner(inner) is None:
            yield name, inner, parent
        else:
            yield from leaves(inner, f"{name}/")


def _inner(layer: Any) -> list[Any] | None:
    """Return the layers of a model or of a TimeDistributed layer; None of other layers."""
    if is_graph(layer):
        return list(layer.layers)
    if type(layer) is library().layers.TimeDistributed:
        return [layer.layer]
    return None


def rebuild(model: Any, new: Mapping[int, Sequence[Any]]) -> Any:
    """Return a copy of a model with sequences of layers in place of some layers.

    Parameters
    ----------
    model : keras.Model
        Sequential or functional model; it is not changed.
    new : mapping of int to sequence of keras.layers.Layer
        New layers by the ``id`` of the layer that they replace.

    Returns
    -------
    keras.Model
        Model with copies of all other layers and of their weights.
    """
    copies = _Copies(new)
    copy = copies.of(model)[-1]
    for old, layer in copies.leaves:
        for variable, value in zip(layer.variables, old.variables, strict=True):
            variable.assign(value)
    return copy


class _Copies:
    """Copies of layers; a shared layer has one."""

    def __init__(self, new: Mapping[int, Sequence[Any]]) -> None:
        self._known = {key: list(layers) for key, layers in new.items()}
        self.leaves: list[tuple[Any, Any]] = []

    def of(self, layer: Any) -> list[Any]:
        """Return the layers in place of a layer: one, unless it is replaced."""
        if id(layer) not in self._known:
            self._known[id(layer)] = [self._copy(layer)]
        return self._known[id(layer)]

    def _copy(self, layer: Any) -> Any:
        keras = library()
        if not is_graph(layer) and _inner(layer) is not None:
            options = {"name": layer.name, "dtype": layer.dtype_policy}
            inner = self.of(layer.layer)
            if len(inner) > 1:
                inner = [keras.Sequential(inner, name=layer.layer.name)]
            return self._finish(layer, type(layer)(inner[0], **options))
        if isinstance(layer, keras.Sequential) and is_graph(layer):
            inputs = [
                keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
                for x in layer.inputs or ()
            ]
            inner = [new for old in layer.layers for new in self.of(old)]
            return self._finish(layer, keras.Sequential([*inputs, *inner], name=layer.name))
        if is_graph(layer):
            heads: dict[int, list[Any]] = {}

            def last(old: Any) -> Any:
                *head, end = self.of(old)
                heads[id(end)] = head
                return end

            def call(end: Any, *args: Any, **kwargs: Any) -> Any:
                if not heads[id(end)]:
                    return end(*args, **kwargs)
                x = first_argument(args, kwargs)
                for one in heads[id(end)]:
                    x = one(x)
                return end(x)

            return self._finish(
                layer, keras.models.clone_model(layer, clone_function=last, call_function=call)
            )
        copy = type(layer).from_config(layer.get_config())
        if hasattr(layer, "variables"):  # an operation has none
            self.leaves.append((layer, copy))
        return copy

    def _finish(self, old: Any, copy: Any) -> Any:
        if not old.trainable:
            copy.trainable = False
        return copy


def as_array(variable: Any) -> Array:
    """Return the values of a variable."""
    return np.asarray(library().ops.convert_to_numpy(variable.value))


def norm_gain(layer: Any, parent: Any) -> Array | None:
    """Return the gain of the batch norm that is the only user of a layer's output, or None."""
    keras = library()
    nodes: list[Any] = getattr(layer, "_outbound_nodes", [])
    if len(nodes) != 1 or len(layer._inbound_nodes) != 1:
        return None
    norm, x = nodes[0].operation, nodes[0].input_tensors[0]
    is_output = any(x is y for y in getattr(parent, "outputs", ()))
    is_norm = type(norm) is keras.layers.BatchNormalization
    if is_output or not is_norm or layer.activation is not keras.activations.linear:
        return None
    is_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    if norm.axis not in ((1, 1 - x.ndim) if is_first else (-1, x.ndim - 1)):
        return None
    variance = as_array(norm.moving_variance).astype(np.float64)
    gain = 1.0 if norm.gamma is None else as_array(norm.gamma)
    scale = np.asarray(gain / np.sqrt(variance + norm.epsilon), np.float32)
    return scale if np.isfinite(scale).all() else None


def reason_to_leave_out(layer: Any) -> str | None:
    """Return why a layer cannot be replaced although it is, or has, a convolution; or None."""
    kind = type(layer).__name__
    own = getattr(library().layers, kind, None) is type(layer)
    if own and is_convolution(kind):
        if layer.quantization_mode is not None:
            return f"it is quantized to {layer.quantization_mode}"
        return "it has LoRA weights" if getattr(layer, "lora_enabled", False) else None
    bases = [c.__name__ for c in type(layer).__mro__[1:] if is_convolution(c.__name__)]
    if bases:
        return f"it is a {bases[0]} with code of its own, of class {kind}"
    inner = [
        x for x in layer._flatten_layers(include_self=False) if is_convolution(type(x).__name__)
    ]
    if inner:
        return f"code of {kind} runs its layers {', '.join(x.name for x in inner)}"
    parts = layer._flatten_layers(include_self=True)
    if any(isinstance(x, library().layers.RNN) for x in parts):
        return f"{kind} computes products with weights that are in no layer"
    return None
