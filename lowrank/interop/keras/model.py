"""Models of Keras: layers out of ``.keras`` and ``.h5`` files, chains into them, without Keras.

The forms are those of Keras 3 (``.keras``: an archive of ``config.json``, ``metadata.json`` and
``model.weights.h5``), of Keras 2.12 to 2.15 where it wrote the same, and the older ``.h5`` of
Keras 2 and 3 (attribute ``model_config``, group ``model_weights``).  Files that this writes were
loaded by Keras 3.15.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.compress.model import Chains, Layer, Samples
from lowrank.factorization import Factorization
from lowrank.interop.keras import files as files
from lowrank.interop.keras import graph as graphs
from lowrank.interop.keras import layers as kinds
from lowrank.interop.keras import weights as stores
from lowrank.interop.weights.model import Calibration, check_chains


class KerasModel:
    """The convolutions of a model of Keras, as a :class:`lowrank.compress.Net`.

    Keras is not needed, ``h5py`` is.  The model is not run: every layer is fitted on inputs of
    the *original* network, there are no gradients, and no outputs to compare.  Nothing in the
    file is run either: a Lambda layer is a layer whose output has no known shape.

    Parameters
    ----------
    path : path
        ``.keras``, ``.h5`` or ``.hdf5``: a Sequential or functional model, or models in models.
    input_shape : sequence of int, optional
        Shape of one input of the model, in its own order of axes, where the file leaves it open.
    calibration : path, optional
        An ``.npz`` file with inputs of layers, in arrays that bear their names, of shape
        (batch, channels, \\*spatial) whatever the model's order of axes.

    Attributes
    ----------
    layers : tuple of Layer
        Convolutions, depthwise and transposed ones, and dense layers, in the order in which they
        run; those of a model within the model are called MODEL/LAYER.
    chains : dict of str to Factorization
        Separable convolutions: two stages already, which stay as they are.
    left_out : dict of str to str
        Why others are not among `layers`.
    batches : int
        Calibration batches.

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
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.h5")  # as Keras 2 would write it
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
        self._file = files.read(path)
        self.chains: dict[str, Factorization] = {}
        self.left_out: dict[str, str] = {}
        self._runs: dict[str, graphs.Run] = {}
        given = None if input_shape is None else (None, *input_shape)
        with files.damage(self.path), files.opened(self._file.weights) as opened:
            found = self._found(stores.store(self._file, opened), given)
        convs = {name: layer.conv for name, layer in found.items()}
        self._calibration = Calibration(calibration, convs)
        self.layers = tuple(found.values())

    def _found(self, store: stores.Store, given: graphs.Shape | None) -> dict[str, Layer]:
        """Layers by name; what is none is noted."""
        layers: dict[str, Layer] = {}
        for run in graphs.trace(self._file.config, given):
            name, entry = _named(self._file.config, run.path)
            if name in layers:
                layers[name] = replace(layers[name], times=layers[name].times + 1)
            if name in self._runs:
                continue
            self._runs[name] = run
            config = entry["config"]
            wrapped = config.get("layer") if isinstance(config, dict) else None
            if isinstance(wrapped, dict) and kinds.is_convolution(wrapped):
                self.left_out[name] = f"it is inside a {entry.get('class_name')}"
            if not kinds.is_convolution(entry):
                continue
            try:
                if not run.shapes or run.shapes[0] is None:
                    raise ValueError("its input size is not known")
                f, size = kinds.convolution(entry, store.arrays(run.path), run.shapes[0])
            except (ValueError, TypeError, LookupError, AttributeError) as why:
                self.left_out[name] = str(why)
                continue
            if len(f.stages) > 1:
                self.chains[name] = f
                self.left_out[name] = "it is a depthwise and a pointwise stage already"
            else:
                layers[name] = Layer(name, f, size, _scale(self._file.config, run.path, store))
        return layers

    @property
    def batches(self) -> int:
        """Calibration batches; 0 where there are no data."""
        return self._calibration.batches

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """What layers get, 64 examples at a time; in the original network, whatever `chains` are.

        Parameters
        ----------
        names : sequence of str
            Layers.
        chains : mapping of str to Factorization
            Not looked at: the model is not run.

        Yields
        ------
        dict of str to tuple of ndarray

        Raises
        ------
        ValueError
            If there are no inputs of a layer.
        """
        return self._calibration.inputs(names)

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """None: the model is not run.

        Returns
        -------
        None
        """
        return None

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Nothing: the model is not run.

        Returns
        -------
        iterator
            Of no batch at all.
        """
        return iter(())

    def replaced(self, chains: Chains) -> files.KerasFile:
        """The same model with chains in place of layers.

        A chain becomes convolutions NAME_0, NAME_1, ..., of which the last keeps the layer's name,
        bias and activation.  A depthwise stage and a pointwise one behind it become a separable
        convolution.  What an optimizer had stored is left out, as it belongs to other weights.

        Parameters
        ----------
        chains : mapping of str to Factorization
            By the name of the layer.

        Returns
        -------
        KerasFile
            To be written with its ``save(path)``.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or Keras has no layers for it.
        """
        by_name = {layer.name: layer for layer in self.layers}
        check_chains(chains, by_name)
        config = copy.deepcopy(self._file.config)
        origins: dict[int, stores.Origin] = {}
        _note(config, (), origins)
        for name, f in chains.items():
            path = self._runs[name].path
            model = _at(origins, path[:-1]) if len(path) > 1 else config
            entry = _at(origins, path)
            shape = self._runs[name].shapes[0]
            assert shape is not None  # or it would have been left out
            with files.opened(self._file.weights) as opened:
                dtype = stores.store(self._file, opened).arrays(path)[0].dtype
            made = kinds.layers_of(name, entry, by_name[name], f, shape, dtype)
            _insert(model, entry, made, origins)
        buffer = BytesIO()
        with (
            files.damage(self.path),
            files.opened(self._file.weights) as old,
            files.h5py().File(buffer, "w") as new,
        ):
            stores.store(self._file, old).write(new, config, origins)
        return files.KerasFile(self._file.ending, config, buffer.getvalue(), self._file.members)


def _named(config: Any, path: tuple[int, ...]) -> tuple[str, Any]:
    """Name and entry of a layer somewhere in a model."""
    names = []
    for i in path:
        config = (graphs.inner(config) or [])[i]
        names.append(graphs.name_of(config))
    return "/".join(names), config


def _scale(config: Any, path: tuple[int, ...], store: stores.Store) -> Array | None:
    """Gain of the batch norm that directly follows a layer and nothing else does."""
    for i in path[:-1]:
        config = (graphs.inner(config) or [])[i]
    g = graphs.graph(config)
    layer, at = g.entries[path[-1]], path[-1]
    users = {c.layer for calls in g.calls for c in calls if any(s[0] == at for s in c.sources)}
    if len(users) != 1 or len(g.calls[at]) > 1 or (at, 0) in g.outputs:
        return None
    (user,) = users
    norm = g.entries[user]
    if norm.get("class_name") not in ("BatchNormalization", "SyncBatchNormalization"):
        return None
    if layer["config"].get("activation") not in (None, "linear"):
        return None
    about = norm["config"]
    axis = about.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and axis else axis
    n = 2 if layer["class_name"] == "Dense" else kinds.ndim(layer) + 2
    try:
        arrays = store.arrays((*path[:-1], user))
        *gains, _, variance = arrays
        gain = gains[0] if about.get("scale", True) else np.ones_like(variance)
        scale = gain / np.sqrt(variance + float(about.get("epsilon", 1e-3)))
    except (ValueError, LookupError, TypeError):
        return None
    right = axis in (-1, n - 1) if graphs.spatial_axes(layer["config"], n)[1] > 1 else axis == 1
    fits = right and np.isfinite(scale).all()
    return np.asarray(scale, np.float32) if fits else None


def _note(entry: Any, path: tuple[int, ...], origins: dict[int, stores.Origin]) -> None:
    """Where each layer of a model comes from."""
    for i, within in enumerate(graphs.inner(entry) or []):
        origins[id(within)] = stores.Origin((*path, i), within, ())
        _note(within, (*path, i), origins)


def _at(origins: dict[int, stores.Origin], path: tuple[int, ...]) -> Any:
    return next(o.entry for o in origins.values() if o.path == path and not o.new)


def _insert(
    model: Any, entry: Any, made: list[kinds.New], origins: dict[int, stores.Origin]
) -> None:
    """Put layers in place of one, and wire them; the last takes its name."""
    entries = graphs.inner(model)
    assert entries is not None  # it has the layer
    taken = {graphs.name_of(e) for e in entries}
    origin = origins.pop(id(entry))
    at = next(i for i, e in enumerate(entries) if e is entry)
    name = graphs.name_of(entry)
    fresh: list[Any] = []
    for i, new in enumerate(made):
        called = name
        if i < len(made) - 1:
            called = f"{name}_{i}"
            while called in taken:
                called += "_"
            taken.add(called)
        made_entry = {
            key: value for key, value in entry.items() if key in ("module", "registered_name")
        }
        made_entry |= {"class_name": new.class_name, "config": {"name": called, **new.config}}
        if "module" in entry:
            made_entry["module"] = "keras.layers"
        if "build_config" in entry:
            made_entry["build_config"] = {"input_shape": list(new.shape)}
        if "batch_input_shape" in entry["config"] and not i:
            made_entry["config"]["batch_input_shape"] = entry["config"]["batch_input_shape"]
        if "name" in entry:
            made_entry["name"] = called
        if "inbound_nodes" in entry:
            nodes = entry["inbound_nodes"]
            if i:
                before = fresh[-1]["name"]
                nodes = [_node(n, before, c, new.shape) for c, n in enumerate(nodes)]
            made_entry["inbound_nodes"] = nodes
        fresh.append(made_entry)
        origins[id(made_entry)] = stores.Origin(origin.path, made_entry, new.weights, True)
    entries[at : at + 1] = fresh


def _node(node: Any, before: str, call: int, shape: graphs.Shape) -> Any:
    """A call on the layer `before`, in the form of a call of the layer that is replaced."""
    if not isinstance(node, dict):
        return [[before, call, 0, {}]]
    tensor = {
        "shape": [None, *shape[1:]],
        "dtype": _dtype(node) or "float32",
        "keras_history": [before, call, 0],
    }
    return {"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}


def _dtype(value: Any) -> str | None:
    """The type of the first tensor among the arguments of a call."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return str(value["config"].get("dtype", "float32"))
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(_dtype, value)), None)
    return None
