"""Where Keras keeps the weights of each layer in an HDF5 file, in both of its layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowrank._typing import Array
from lowrank.interop.keras import files as files
from lowrank.interop.keras import graph as graphs

Path = tuple[int, ...]  # indices of a layer and of the models that it is in
_LIMIT = 64512  # bytes of an attribute of HDF5
#: What Keras counts among the weights that are not trained.
_FIXED = ("moving_mean", "moving_variance", "seed_generator_state", "count", "mean", "variance")


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where a layer of a model that is to be written has its weights from."""

    path: Path  # in the original
    entry: Any
    weights: tuple[tuple[str, Array], ...] = ()
    new: bool = False


class Store(Protocol):
    """The weights of a model."""

    def arrays(self, path: Path) -> list[Array]:
        """Those of a layer, in Keras's order."""

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Put the weights of a model with other layers into another file."""


def store(file: files.KerasFile, opened: Any) -> Store:
    """The weights of a model, out of its HDF5 file."""
    return (Archived if file.ending == ".keras" else Listed)(file.config, opened)


def _walk(entry: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All layers of a model, in Keras's order, with what is in them behind them."""
    for i in graphs.graph(entry).layers:
        within = (graphs.inner(entry) or [])[i]
        if ".ops." in str(within.get("module")):
            continue  # an operation, which Keras does not count among the layers
        yield (*path, i), within
        if graphs.inner(within) is not None:
            yield from _walk(within, (*path, i))


class Archived:
    """``model.weights.h5``: a group a layer, called by its class and a number."""

    def __init__(self, config: Any, file: Any) -> None:
        self._file = file
        old = "_layer_checkpoint_dependencies"  # Keras 2.12, 2.13
        self._word = old if old in file else "layers"
        self._places = self._placed(config)
        self._names = {path: graphs.name_of(entry) for path, entry in _walk(config)}

    def _placed(self, config: Any) -> dict[Path, str]:
        places: dict[Path, str] = {(): ""}
        counts: dict[str, int] = {}
        for path, entry in _walk(config):
            start = f"{places[path[:-1]]}/{self._word}/{graphs.snake(str(entry['class_name']))}"
            n = counts.get(start, 0)
            counts[start] = n + 1
            places[path] = f"{start}_{n}" if n else start
        return places

    def arrays(self, path: Path) -> list[Array]:
        """Those of a layer, in Keras's order."""
        place = self._places.get(path)
        if place is None or f"{place}/vars" not in self._file:
            raise ValueError("its weights are not in the file")
        group = self._file[f"{place}/vars"]
        called = group.attrs.get("name")
        if called is not None and str(called) != self._names[path]:
            raise ValueError(f"its weights are those of {called!r} in the file")
        return [group[str(i)][()] for i in range(len(group))]

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Put the weights of a model with other layers into another file."""
        for name in self._file:
            if name not in (self._word, "optimizer"):
                files.copy(self._file[name], new, name)
        new.require_group(self._word)
        places = self._placed(config)
        for path, entry in _walk(config):
            origin, place = origins[id(entry)], places[path]
            if origin.new:
                group = new.require_group(f"{place}/vars")
                group.attrs["name"] = graphs.name_of(entry)
                for i, (_, array) in enumerate(origin.weights):
                    group.create_dataset(str(i), data=array)
                continue
            old = self._places[origin.path]
            if old not in self._file:
                continue
            inside = new.require_group(place)
            for name in self._file[old]:
                if name != self._word or graphs.inner(entry) is None:
                    files.copy(self._file[f"{old}/{name}"], inside, name)


class Listed:
    """``model_weights`` of an ``.h5`` file: a group a layer of the model, with a list of names."""

    def __init__(self, config: Any, file: Any) -> None:
        if "model_weights" not in file:
            raise ValueError("it has no model_weights")
        self._config, self._file, self._group = config, file, file["model_weights"]
        self._top = graphs.inner(config) or []

    def _listed(self, name: str) -> list[str]:
        return _texts(self._group[name].attrs, "weight_names") if name in self._group else []

    def arrays(self, path: Path) -> list[Array]:
        """Those of a layer, in Keras's order."""
        top = self._top[path[0]]
        name = graphs.name_of(top)
        names = self._listed(name)
        if len(path) > 1:
            names = _owners(top, names, path[:1])[path]
        if not names:
            raise ValueError("its weights are not in the file")
        return [self._group[name][n][()] for n in names]

    def write(self, new: Any, config: Any, origins: Mapping[int, Origin]) -> None:
        """Put the weights of a model with other layers into another file."""
        for key, value in self._file.attrs.items():
            new.attrs[key] = json.dumps(config) if key == "model_config" else value
        for name in self._file:
            if name not in ("model_weights", "optimizer_weights"):
                files.copy(self._file[name], new, name)
        group = new.create_group("model_weights")
        for key, value in self._group.attrs.items():
            if not key.startswith("layer_names"):
                group.attrs[key] = value
        self._check_order()
        top = graphs.inner(config) or []
        names = []
        for i in graphs.graph(config).layers:
            entry = top[i]
            if ".ops." in str(entry.get("module")):
                continue
            origin, name = origins[id(entry)], graphs.name_of(entry)
            made = {id(e): origins[id(e)] for _, e in [((), entry), *_walk_in(entry)]}
            if any(o.new for o in made.values()):
                self._rewrite(group.create_group(name), entry, origin, made)
            elif name in self._group:
                files.copy(self._group[name], group, name)
            else:
                continue  # the input of a Sequential model
            names.append(name)
        if "top_level_model_weights" in self._group:
            files.copy(self._group["top_level_model_weights"], group, "top_level_model_weights")
        _put_texts(group.attrs, "layer_names", names)

    def _check_order(self) -> None:
        """Whether the layers of the original stand in the order in which Keras should have them."""
        listed = [n for n in _texts(self._group.attrs, "layer_names") if self._listed(n)]
        order = [graphs.name_of(self._top[i]) for i in graphs.graph(self._config).layers]
        if listed != [n for n in order if n in listed]:
            raise ValueError("its layers stand in another order than Keras gives them")

    def _rewrite(self, group: Any, entry: Any, origin: Origin, made: Mapping[int, Origin]) -> None:
        """The group of a layer that is new, or of a model with new layers in it."""
        old_entry = self._top[origin.path[0]]
        old_name = graphs.name_of(old_entry)
        listed = self._listed(old_name)
        colon = ":0" if all(n.endswith(":0") for n in listed) else ""
        if origin.new:
            name = graphs.name_of(entry)
            arrays = {f"{name}/{kind}{colon}": array for kind, array in origin.weights}
            _put(group, arrays)
            return
        owned = _owners(old_entry, listed, origin.path)
        if _in_order(old_entry, owned, origin.path) != listed:
            raise ValueError(
                f"the weights of {old_name!r} stand in an order that Keras does not use"
            )
        arrays = {}
        now: dict[Path, list[str]] = {}
        for path, within in _walk(entry, origin.path):
            was = made[id(within)]
            if not was.new:
                now[path] = owned.get(was.path, [])
                arrays |= {n: self._group[old_name][n][()] for n in now[path]}
                continue
            before = owned[was.path][0].split("/")[:-2]
            name = "/".join([*before, graphs.name_of(within)])
            fresh = {f"{name}/{kind}{colon}": array for kind, array in was.weights}
            now[path] = list(fresh)
            arrays |= fresh
        _put(group, {n: arrays[n] for n in _in_order(entry, now, origin.path)})


def _walk_in(entry: Any) -> list[tuple[Path, Any]]:
    return list(_walk(entry)) if graphs.inner(entry) is not None else []


def _owners(entry: Any, names: Sequence[str], path: Path) -> dict[Path, list[str]]:
    """Names of weights of each layer in a model: the layer's name stands in them."""
    paths: dict[str, list[Path]] = {}
    for at, within in _walk(entry, path):
        if graphs.inner(within) is None:
            paths.setdefault(graphs.name_of(within), []).append(at)
    found: dict[Path, list[str]] = {at: [] for same in paths.values() for at in same}
    for name in names:
        for part in reversed(name.split("/")[:-1]):
            if part in paths:
                if len(paths[part]) > 1:
                    raise ValueError(f"more than one layer is called {part!r}")
                found[paths[part][0]].append(name)
                break
    return found


def _in_order(entry: Any, owned: Mapping[Path, Sequence[str]], path: Path) -> list[str]:
    """All names as Keras lists those of a model: what is trained ahead of what is not."""
    trained: list[str] = []
    fixed: list[str] = []
    frozen: set[Path] = {path} if _is_frozen(entry) else set()
    for at, within in _walk(entry, path):
        if at[:-1] in frozen or _is_frozen(within):
            frozen.add(at)
        for name in owned.get(at, ()):
            kind = name.rsplit("/", 1)[-1].removesuffix(":0")
            (fixed if at in frozen or kind in _FIXED else trained).append(name)
    return trained + fixed


def _is_frozen(entry: Any) -> bool:
    config = entry["config"]
    return isinstance(config, dict) and config.get("trainable") is False


def _put(group: Any, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        group.create_dataset(name, data=array)
    _put_texts(group.attrs, "weight_names", list(arrays))


def _texts(attrs: Any, key: str) -> list[str]:
    """A list of names, which Keras cuts in pieces where it is long."""
    found = list(attrs[key]) if key in attrs else []
    n = 0
    while key not in attrs and f"{key}{n}" in attrs:
        found += list(attrs[f"{key}{n}"])
        n += 1
    return [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in found]


def _put_texts(attrs: Any, key: str, texts: Sequence[str]) -> None:
    data = np.asarray([t.encode() for t in texts], dtype=None if texts else "S1")
    pieces = 1
    while any(p.nbytes > _LIMIT for p in np.array_split(data, pieces)):
        pieces += 1
    if pieces == 1:
        attrs[key] = data
    else:
        for i, piece in enumerate(np.array_split(data, pieces)):
            attrs[f"{key}{i}"] = piece
