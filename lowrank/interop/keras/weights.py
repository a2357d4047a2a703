"""Weights of a Keras model in an HDF5 file, in both of Keras's layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowrank._typing import Array
from lowrank.interop.keras.files import KerasFile, copy_item
from lowrank.interop.keras.graph import inner_layers, model_graph, name_of, snake_case

Path = tuple[int, ...]  # indices of the nested models and of the layer
_LIMIT = 64512  # bytes per attribute of HDF5, as in Keras
#: Weights that Keras lists after the trained ones.
_FIXED = ("moving_mean", "moving_variance", "seed_generator_state", "count", "mean", "variance")


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Origin of the weights of a layer that is to be written."""

    path: Path  # path of the layer in the original model
    entry: Any
    weights: tuple[tuple[str, Array], ...] = ()
    new: bool = False


class WeightStore(Protocol):
    """Weights of a model."""

    def arrays(self, path: Path) -> list[Array]:
        """Return the weights of a layer, in Keras's order."""

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Write the weights of the model `config` to the HDF5 file `new`."""


def weight_store(file: KerasFile, hdf5: Any) -> WeightStore:
    """Return the weights in the open HDF5 file of a model."""
    return (ArchiveStore if file.ending == ".keras" else ListStore)(file.config, hdf5)


def _walk(entry: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the layers of a model in Keras's order, nested layers directly after their model."""
    for i in model_graph(entry).layers:
        layer = (inner_layers(entry) or [])[i]
        if ".ops." in str(layer.get("module")):
            continue  # an operation, which Keras does not count among the layers
        yield (*path, i), layer
        if inner_layers(layer) is not None:
            yield from _walk(layer, (*path, i))


class ArchiveStore:
    """``model.weights.h5``: one group per layer, named after its class with a number."""

    def __init__(self, config: Any, file: Any) -> None:
        self._file = file
        old = "_layer_checkpoint_dependencies"  # Keras 2.12, 2.13
        self._word = old if old in file else "layers"
        self._groups = self._group_paths(config)
        self._names = {path: name_of(entry) for path, entry in _walk(config)}

    def _group_paths(self, config: Any) -> dict[Path, str]:
        """Return the path of each layer's group in the HDF5 file."""
        groups: dict[Path, str] = {(): ""}
        counts: dict[str, int] = {}
        for path, entry in _walk(config):
            start = f"{groups[path[:-1]]}/{self._word}/{snake_case(str(entry['class_name']))}"
            n = counts.get(start, 0)
            counts[start] = n + 1
            groups[path] = f"{start}_{n}" if n else start
        return groups

    def arrays(self, path: Path) -> list[Array]:
        """Return the weights of a layer, in Keras's order."""
        group_path = self._groups.get(path)
        if group_path is None or f"{group_path}/vars" not in self._file:
            raise ValueError("its weights are not in the file")
        group = self._file[f"{group_path}/vars"]
        name = group.attrs.get("name")
        if name is not None and str(name) != self._names[path]:
            raise ValueError(f"its weights are those of {name!r} in the file")
        return [group[str(i)][()] for i in range(len(group))]

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Write the weights of the model `config` to the HDF5 file `new`."""
        for name in self._file:
            if name not in (self._word, "optimizer"):
                copy_item(self._file[name], new, name)
        new.require_group(self._word)
        groups = self._group_paths(config)
        for path, entry in _walk(config):
            origin, group_path = origins[id(entry)], groups[path]
            if origin.new:
                group = new.require_group(f"{group_path}/vars")
                group.attrs["name"] = name_of(entry)
                for i, (_, array) in enumerate(origin.weights):
                    group.create_dataset(str(i), data=array)
                continue
            old = self._groups[origin.path]
            if old not in self._file:
                continue
            group = new.require_group(group_path)
            for name in self._file[old]:
                if name != self._word or inner_layers(entry) is None:
                    copy_item(self._file[f"{old}/{name}"], group, name)


class ListStore:
    """``model_weights`` of an ``.h5`` file: one group per layer, with a list of names."""

    def __init__(self, config: Any, file: Any) -> None:
        if "model_weights" not in file:
            raise ValueError("it has no model_weights")
        self._config, self._file, self._group = config, file, file["model_weights"]
        self._top = inner_layers(config) or []

    def _weight_names(self, name: str) -> list[str]:
        return _read_names(self._group[name].attrs, "weight_names") if name in self._group else []

    def arrays(self, path: Path) -> list[Array]:
        """Return the weights of a layer, in Keras's order."""
        top = self._top[path[0]]
        name = name_of(top)
        names = self._weight_names(name)
        if len(path) > 1:
            names = _names_by_layer(top, names, path[:1])[path]
        if not names:
            raise ValueError("its weights are not in the file")
        return [self._group[name][n][()] for n in names]

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Write the weights of the model `config` to the HDF5 file `new`."""
        for key, value in self._file.attrs.items():
            new.attrs[key] = json.dumps(config) if key == "model_config" else value
        for name in self._file:
            if name not in ("model_weights", "optimizer_weights"):
                copy_item(self._file[name], new, name)
        group = new.create_group("model_weights")
        for key, value in self._group.attrs.items():
            if not key.startswith("layer_names"):
                group.attrs[key] = value
        self._check_order()
        top = inner_layers(config) or []
        names = []
        for i in model_graph(config).layers:
            entry = top[i]
            if ".ops." in str(entry.get("module")):
                continue
            origin, name = origins[id(entry)], name_of(entry)
            nested = _walk(entry) if inner_layers(entry) is not None else ()
            if origin.new or any(origins[id(e)].new for _, e in nested):
                self._rewrite(group.create_group(name), entry, origin, origins)
            elif name in self._group:
                copy_item(self._group[name], group, name)
            else:
                continue  # the input of a Sequential model
            names.append(name)
        if "top_level_model_weights" in self._group:
            copy_item(self._group["top_level_model_weights"], group, "top_level_model_weights")
        _write_names(group.attrs, "layer_names", names)

    def _check_order(self) -> None:
        """Raise unless the layers of the original are in Keras's order."""
        stored = [n for n in _read_names(self._group.attrs, "layer_names") if self._weight_names(n)]
        order = [name_of(self._top[i]) for i in model_graph(self._config).layers]
        if stored != [n for n in order if n in stored]:
            raise ValueError("its layers are not in the order of Keras")

    def _rewrite(
        self, group: Any, entry: Any, origin: Origin, origins: Mapping[int, Origin]
    ) -> None:
        """Write the group of a new layer, or of a model with new layers in it."""
        old_entry = self._top[origin.path[0]]
        old_name = name_of(old_entry)
        stored = self._weight_names(old_name)
        colon = ":0" if all(n.endswith(":0") for n in stored) else ""
        if origin.new:
            name = name_of(entry)
            _write_arrays(group, {f"{name}/{kind}{colon}": a for kind, a in origin.weights})
            return
        old_names = _names_by_layer(old_entry, stored, origin.path)
        if _in_order(old_entry, old_names, origin.path) != stored:
            raise ValueError(f"the weights of {old_name!r} are not in the order of Keras")
        arrays: dict[str, Array] = {}
        new_names: dict[Path, list[str]] = {}
        for path, layer in _walk(entry, origin.path):
            layer_origin = origins[id(layer)]
            if layer_origin.new:
                prefix = old_names[layer_origin.path][0].split("/")[:-2]
                name = "/".join([*prefix, name_of(layer)])
                weights = {f"{name}/{kind}{colon}": a for kind, a in layer_origin.weights}
            else:
                names = old_names.get(layer_origin.path, [])
                weights = {n: self._group[old_name][n][()] for n in names}
            new_names[path] = list(weights)
            arrays |= weights
        _write_arrays(group, {n: arrays[n] for n in _in_order(entry, new_names, origin.path)})


def _names_by_layer(entry: Any, names: Sequence[str], path: Path) -> dict[Path, list[str]]:
    """Return the names of the weights of each layer in a model, which contain the layer's name."""
    paths: dict[str, list[Path]] = {}
    for layer_path, layer in _walk(entry, path):
        if inner_layers(layer) is None:
            paths.setdefault(name_of(layer), []).append(layer_path)
    by_layer: dict[Path, list[str]] = {p: [] for same in paths.values() for p in same}
    for name in names:
        for part in reversed(name.split("/")[:-1]):
            if part in paths:
                if len(paths[part]) > 1:
                    raise ValueError(f"more than one layer is called {part!r}")
                by_layer[paths[part][0]].append(name)
                break
    return by_layer


def _in_order(entry: Any, names: Mapping[Path, Sequence[str]], path: Path) -> list[str]:
    """Return all names in the order of Keras: weights that are trained first."""
    trained: list[str] = []
    fixed: list[str] = []
    frozen: set[Path] = {path} if _is_frozen(entry) else set()
    for layer_path, layer in _walk(entry, path):
        if layer_path[:-1] in frozen or _is_frozen(layer):
            frozen.add(layer_path)
        for name in names.get(layer_path, ()):
            kind = name.rsplit("/", 1)[-1].removesuffix(":0")
            (fixed if layer_path in frozen or kind in _FIXED else trained).append(name)
    return trained + fixed


def _is_frozen(entry: Any) -> bool:
    config = entry["config"]
    return isinstance(config, dict) and config.get("trainable") is False


def _write_arrays(group: Any, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        group.create_dataset(name, data=array)
    _write_names(group.attrs, "weight_names", list(arrays))


def _read_names(attrs: Any, key: str) -> list[str]:
    """Return a list of names, which Keras splits over several attributes if it is long."""
    names = list(attrs[key]) if key in attrs else []
    n = 0
    while key not in attrs and f"{key}{n}" in attrs:
        names += list(attrs[f"{key}{n}"])
        n += 1
    return [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in names]


def _write_names(attrs: Any, key: str, names: Sequence[str]) -> None:
    data = np.asarray([t.encode() for t in names], dtype=None if names else "S1")
    pieces = 1
    while any(p.nbytes > _LIMIT for p in np.array_split(data, pieces)):
        pieces += 1
    if pieces == 1:
        attrs[key] = data
    else:
        for i, piece in enumerate(np.array_split(data, pieces)):
            attrs[f"{key}{i}"] = piece
