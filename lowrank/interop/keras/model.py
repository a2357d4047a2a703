"""Keras models: read layers from ``.keras`` and ``.h5`` files and write chains, without Keras.

The formats are those of Keras 3 and of Keras 2.12 to 2.15 (``.keras``: an archive of
``config.json``, ``metadata.json`` and ``model.weights.h5``), and the older ``.h5`` of Keras 2 and
3 (attribute ``model_config``, group ``model_weights``).  Keras 3.15 loads the files that are
written here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.compress.model import Chains, Layer
from lowrank.interop.common import check_chains
from lowrank.interop.keras.files import KerasFile, h5py, open_hdf5, read, read_errors
from lowrank.interop.keras.graph import (
    Run,
    Shape,
    inner_layers,
    model_graph,
    name_of,
    spatial_axes,
    trace,
)
from lowrank.interop.keras.layers import (
    NewLayer,
    as_convolution,
    chain_layers,
    is_convolution,
    spatial_ndim,
)
from lowrank.interop.keras.weights import Origin, WeightStore, weight_store
from lowrank.interop.weights.static import Calibration, StaticModel


class KerasModel(StaticModel):
    """Compressible model of a Keras file.

    ``h5py`` is required, Keras is not.  The model is not run: every layer is fitted on inputs of
    the *original* network, there are no gradients, and no outputs to compare.  No code in the
    file is run either: the output of a Lambda layer has no known shape.

    Parameters
    ----------
    path : path
        ``.keras``, ``.h5`` or ``.hdf5`` file of a Sequential or functional model, also with
        nested models.
    input_shape : sequence of int, optional
        Shape of one input of the model, in the model's order of axes, if the file does not fix
        it.
    calibration : path, optional
        ``.npz`` file of inputs of layers: arrays named after the layers, of shape
        (batch, channels, \\*spatial) for any order of axes of the model.

    Attributes
    ----------
    layers : tuple of Layer
        Convolutions, depthwise and transposed convolutions, and dense layers, in execution
        order; layers of a nested model are called MODEL/LAYER.
    chains : dict of str to Factorization
        Separable convolutions: chains of two stages already, which are not changed.
    left_out : dict of str to str
        Reasons why other layers are not among `layers`.
    batches : int
        Number of calibration batches, 0 without calibration data.

    Raises
    ------
    ValueError
        If a file is damaged or hostile, or the calibration data do not fit.
    OSError
        If a file cannot be read.
    ImportError
        If h5py is not installed.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import h5py
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.interop.keras import KerasModel
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.h5")  # in the format of Keras 2
    >>> about = {"name": "a", "kernel_size": 5, "strides": 1, "filters": 8, "use_bias": False}
    >>> layer = {"class_name": "Conv1D", "config": about | {"batch_input_shape": [None, 20, 3]}}
    >>> with h5py.File(path, "w") as file:
    ...     file.attrs["model_config"] = json.dumps(
    ...         {"class_name": "Sequential", "config": {"name": "net", "layers": [layer]}})
    ...     file["model_weights/a/a/kernel:0"] = np.ones((5, 3, 8), np.float32)
    ...     file["model_weights/a"].attrs["weight_names"] = ["a/kernel:0"]
    ...     file["model_weights"].attrs["layer_names"] = ["a"]
    >>> net = KerasModel(path)
    >>> net.layers[0].conv, net.layers[0].input_size
    (<Factorization dense: 8x3x5, 120 params>, (20,))
    >>> net.replaced({"a": lowrank.channel_svd(net.layers[0].conv, 1)}).save(path)
    >>> [x.name for x in KerasModel(path).layers]
    ['a_0', 'a']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        input_shape: Sequence[int] | None = None,
        calibration: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._file = read(path)
        self.chains = {}
        self.left_out = {}
        self._runs: dict[str, Run] = {}
        shape = None if input_shape is None else (None, *input_shape)
        with read_errors(self.path), open_hdf5(self._file.weights) as file:
            layers = self._find_layers(weight_store(self._file, file), shape)
        convs = {name: layer.conv for name, layer in layers.items()}
        self._calibration = Calibration(calibration, convs)
        self.layers = tuple(layers.values())

    def _find_layers(self, store: WeightStore, input_shape: Shape | None) -> dict[str, Layer]:
        """Return the layers by name; fill `chains` and `left_out` with the others."""
        layers: dict[str, Layer] = {}
        for run in trace(self._file.config, input_shape):
            name, entry = _name_and_entry(self._file.config, run.path)
            if name in layers:
                layers[name] = replace(layers[name], times=layers[name].times + 1)
            if name in self._runs:
                continue
            self._runs[name] = run
            config = entry["config"]
            wrapped = config.get("layer") if isinstance(config, dict) else None
            if isinstance(wrapped, dict) and is_convolution(wrapped):
                self.left_out[name] = f"it is inside a {entry.get('class_name')}"
            if not is_convolution(entry):
                continue
            try:
                if not run.shapes or run.shapes[0] is None:
                    raise ValueError("its input size is not known")
                f, size = as_convolution(entry, store.arrays(run.path), run.shapes[0])
            except (ValueError, TypeError, LookupError, AttributeError) as why:
                self.left_out[name] = str(why)
                continue
            if len(f.stages) > 1:
                self.chains[name] = f
                self.left_out[name] = "it is a depthwise and a pointwise stage already"
            else:
                layers[name] = Layer(name, f, size, _scale(self._file.config, run.path, store))
        return layers

    def replaced(self, chains: Chains) -> KerasFile:
        """Return the model with chains in place of layers.

        A chain becomes convolutions NAME_0, NAME_1, ..., of which the last keeps the layer's
        name, bias and activation.  A depthwise stage followed by a pointwise one becomes a
        separable convolution.  The state of an optimizer is dropped: it belongs to other weights.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Returns
        -------
        KerasFile
            New model; its method ``save(path)`` writes it.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or Keras has no layers for it.
        """
        by_name = {layer.name: layer for layer in self.layers}
        check_chains(chains, by_name)
        config = copy.deepcopy(self._file.config)
        origins: dict[int, Origin] = {}
        _collect_origins(config, (), origins)
        for name, f in chains.items():
            path = self._runs[name].path
            model = _entry_at(origins, path[:-1]) if len(path) > 1 else config
            entry = _entry_at(origins, path)
            shape = self._runs[name].shapes[0]
            assert shape is not None  # other layers are in left_out
            with open_hdf5(self._file.weights) as file:
                dtype = weight_store(self._file, file).arrays(path)[0].dtype
            new_layers = chain_layers(name, entry, by_name[name], f, shape, dtype)
            _insert(model, entry, new_layers, origins)
        buffer = BytesIO()
        with (
            read_errors(self.path),
            open_hdf5(self._file.weights) as old,
            h5py().File(buffer, "w") as new,
        ):
            weight_store(self._file, old).write(new, config, origins)
        return KerasFile(self._file.ending, config, buffer.getvalue(), self._file.members)


def _name_and_entry(config: Any, path: tuple[int, ...]) -> tuple[str, Any]:
    """Return the name and the entry of a layer, which may be in a nested model."""
    names = []
    for i in path:
        config = (inner_layers(config) or [])[i]
        names.append(name_of(config))
    return "/".join(names), config


def _scale(config: Any, path: tuple[int, ...], store: WeightStore) -> Array | None:
    """Return the gain of the batch norm that is the only user of a layer's output, or None."""
    for i in path[:-1]:
        config = (inner_layers(config) or [])[i]
    g = model_graph(config)
    index = path[-1]
    layer = g.entries[index]
    users = {c.layer for calls in g.calls for c in calls if any(s[0] == index for s in c.sources)}
    if len(users) != 1 or len(g.calls[index]) > 1 or (index, 0) in g.outputs:
        return None
    (user,) = users
    norm = g.entries[user]
    if norm.get("class_name") not in ("BatchNormalization", "SyncBatchNormalization"):
        return None
    if layer["config"].get("activation") not in (None, "linear"):
        return None
    settings = norm["config"]
    axis = settings.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and axis else axis
    n = 2 if layer["class_name"] == "Dense" else spatial_ndim(layer) + 2
    try:
        arrays = store.arrays((*path[:-1], user))
        *gains, _, variance = arrays
        gain = gains[0] if settings.get("scale", True) else np.ones_like(variance)
        scale = gain / np.sqrt(variance + float(settings.get("epsilon", 1e-3)))
    except (ValueError, LookupError, TypeError):
        return None
    channels_last = spatial_axes(layer["config"], n)[1] > 1
    is_channel_axis = axis in (-1, n - 1) if channels_last else axis == 1
    fits = is_channel_axis and np.isfinite(scale).all()
    return np.asarray(scale, np.float32) if fits else None


def _collect_origins(entry: Any, path: tuple[int, ...], origins: dict[int, Origin]) -> None:
    """Add the origin of every layer of a model to `origins`, by the identity of its entry."""
    for i, layer in enumerate(inner_layers(entry) or []):
        origins[id(layer)] = Origin((*path, i), layer, ())
        _collect_origins(layer, (*path, i), origins)


def _entry_at(origins: dict[int, Origin], path: tuple[int, ...]) -> Any:
    return next(o.entry for o in origins.values() if o.path == path and not o.new)


def _insert(model: Any, entry: Any, new_layers: list[NewLayer], origins: dict[int, Origin]) -> None:
    """Replace a layer of `model` by connected layers, of which the last takes its name."""
    entries = inner_layers(model)
    assert entries is not None  # `entry` is one of them
    used_names = {name_of(e) for e in entries}
    origin = origins.pop(id(entry))
    index = next(i for i, e in enumerate(entries) if e is entry)
    new_entries: list[Any] = []
    for i, layer in enumerate(new_layers):
        name = name_of(entry)
        if i < len(new_layers) - 1:
            name += f"_{i}"
            while name in used_names:
                name += "_"
            used_names.add(name)
        new = {key: value for key, value in entry.items() if key in ("module", "registered_name")}
        new |= {"class_name": layer.class_name, "config": {"name": name, **layer.config}}
        if "module" in entry:
            new["module"] = "keras.layers"
        if "build_config" in entry:
            new["build_config"] = {"input_shape": list(layer.shape)}
        if "batch_input_shape" in entry["config"] and not i:
            new["config"]["batch_input_shape"] = entry["config"]["batch_input_shape"]
        if "name" in entry:
            new["name"] = name
        if "inbound_nodes" in entry:
            nodes = entry["inbound_nodes"]
            if i:
                source = new_entries[-1]["name"]
                nodes = [_node(n, source, c, layer.shape) for c, n in enumerate(nodes)]
            new["inbound_nodes"] = nodes
        new_entries.append(new)
        origins[id(new)] = Origin(origin.path, new, layer.weights, True)
    entries[index : index + 1] = new_entries


def _node(node: Any, source: str, call: int, shape: Shape) -> Any:
    """Return a call on the output of the layer `source`, in the format of the call `node`."""
    if not isinstance(node, dict):
        return [[source, call, 0, {}]]
    tensor = {
        "shape": [None, *shape[1:]],
        "dtype": _dtype(node) or "float32",
        "keras_history": [source, call, 0],
    }
    return {"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}


def _dtype(value: Any) -> str | None:
    """Return the type of the first tensor among the arguments of a call."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return str(value["config"].get("dtype", "float32"))
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(_dtype, value)), None)
    return None
