"""Manifests of weights files: read and check them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank._typing import Array, Ints
from lowrank.core.cost import stage_costs
from lowrank.core.stage import Stage
from lowrank.interop.common import check_exists, one_line

#: Keys of a geometry, in entries of layers and in records of chains.
GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "value", "output_padding")
Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return type(value) is int  # not bool


def _is_integers(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, list) and all(map(_is_integer, value)))


def _is_padding(value: Any) -> bool:
    return _is_integers(value) or (isinstance(value, list) and all(map(_is_integers, value)))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_TEXT: tuple[Check, str] = (_is_text, "text")
_INTEGER: tuple[Check, str] = (_is_integer, "an integer")
_INTEGERS: tuple[Check, str] = (_is_integers, "an integer or a list of integers")
_KINDS: dict[str, tuple[Check, str]] = {
    "stride": _INTEGERS,
    "padding": (_is_padding, "an integer, or a list of integers or of pairs of them"),
    "dilation": _INTEGERS,
    "padding_mode": _TEXT,
    "value": (_is_number, "a finite number"),
    "output_padding": _INTEGERS,
    "groups": _INTEGER,
}
#: Kinds of the values in an entry of a layer; null is as good as no key, but for the weight.
_ENTRY = _KINDS | {
    "name": _TEXT, "of": _TEXT, "weight": _TEXT, "bias": _TEXT, "note": _TEXT,
    "shape": _INTEGERS, "in_size": _INTEGERS, "out_size": _INTEGERS, "shuffle": _INTEGERS,
    "left": _INTEGER, "right": _INTEGER, "macs": _INTEGER,
    "transposed": (_is_flag, "true or false"),
}  # fmt: skip
#: Keys that only the stages of a chain have.
_STAGES = ("left", "right", "shuffle")
#: Kinds of the values in a record of a chain.
_CHAIN = _KINDS | {"family": _TEXT, "variant": _TEXT, "rank": _INTEGERS}
#: Kinds of the values of a manifest; other keys tell about the network and are kept.
_FILE = {"parameters": _INTEGER, "total_conv_macs": _INTEGER}


def read_manifest(about: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a weights file.

    Parameters
    ----------
    about : path
        JSON file, see :func:`lowrank.interop.weights.layers`.

    Returns
    -------
    dict
        Contents of the file; ``"conv_layers"`` is a list of tables that name tensors, of which
        the keys and the types of the values are known.

    Raises
    ------
    ValueError
        If the file does not describe layers, or a key or a type is not known.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.weights import read_manifest
    >>> read_manifest(demo.WEIGHTS.with_suffix(".json"))["conv_layers"][0]["weight"]
    'conv1.weight'
    """
    check_exists(Path(about))
    form = "{'conv_layers': [{'weight': ...}]}"
    try:
        text = Path(about).read_text("utf-8")
        manifest = json.loads(text, object_pairs_hook=_as_table)
    except (ValueError, RecursionError) as why:
        raise ValueError(f"{about}: must describe layers as {form}: {one_line(why)}") from None
    entries = manifest.get("conv_layers") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{about}: must describe layers as {form}")
    for i, entry in enumerate(entries):
        if not isinstance(entry.get("weight"), str):
            raise ValueError(
                f"{about}: must describe layers as {form}: the weight of entry {i} must be the "
                f"name of a tensor, got {entry.get('weight')!r}"
            )
        where = f"{about}: layer {layer_name(entry)!r}"
        _check_values(where, entry, _ENTRY)
        for key in _STAGES:
            if not entry.get("of") and entry.get(key) not in (None, 1, [1, 1]):
                raise ValueError(
                    f"{where}: {key} must be 1 without 'of', which makes an entry a stage of "
                    f"a chain, got {entry[key]}"
                )
    chains = manifest.get("chains", {})
    if not isinstance(chains, dict) or not all(isinstance(c, dict) for c in chains.values()):
        raise ValueError(f"{about}: chains must be a table of tables, got {chains!r:.80}")
    for name, record in chains.items():
        _check_values(f"{about}: chain {name!r}", record, _CHAIN)
    known = {entry["of"] for entry in entries if entry.get("of")}
    if unknown := sorted(chains.keys() - known):
        raise ValueError(
            f"{about}: chains must name layers of several stages, "
            f"{', '.join(sorted(known)) or 'of which there are none'}, got {unknown[0]!r}"
        )
    _check_values(str(about), {k: v for k, v in manifest.items() if k in _FILE}, _FILE)
    return dict(manifest)


def _as_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of JSON, or raise a ValueError if a key is given twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is given twice")
    return table


def layer_name(entry: Any) -> str:
    """Return the name of the layer that an entry of a manifest belongs to."""
    return str(entry.get("of") or entry.get("name") or entry["weight"])


def _check_values(
    where: str, entry: Mapping[str, Any], kinds: Mapping[str, tuple[Check, str]]
) -> None:
    for key, value in entry.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(kinds)}")
        check, allowed = kinds[key]
        if value is not None and not check(value):
            raise ValueError(f"{where}: {key} must be {allowed}, got {value!r:.80}")


def check_entry(about: Path, entry: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Raise unless the tensors of an entry exist and have its shape.

    Parameters
    ----------
    about : path
        Manifest.
    entry : mapping
        Entry of a layer.
    tensors : mapping of str to ndarray
        Tensors of the weights file.

    Raises
    ------
    ValueError
        If there is no such tensor, or the shape is another one.
    """
    where = f"{about}: layer {layer_name(entry)!r}"
    for key in ("weight", "bias"):
        if entry.get(key) is not None and entry[key] not in tensors:
            raise ValueError(f"{where}: no tensor {entry[key]!r} in the weights file")
    shape = list(tensors[entry["weight"]].shape)
    if entry.get("shape") not in (None, shape):
        raise ValueError(
            f"{where}: shape must be {shape}, that of the tensor, got {entry['shape']}"
        )


def check_sizes(
    about: Path,
    name: str,
    entries: Sequence[Mapping[str, Any]],
    stages: Sequence[Stage],
    size: Ints | None,
) -> None:
    """Raise unless sizes and MACs in the entries of a layer follow from its input size.

    Parameters
    ----------
    about : path
        Manifest.
    name : str
        Name of the layer.
    entries : sequence of mapping
        One entry per stage.
    stages : sequence of Stage
        Stages of the layer.
    size : tuple of int or None
        Spatial size of its input; nothing is checked without it.

    Raises
    ------
    ValueError
        If an entry contradicts the others.
    """
    for entry, stage in zip(entries, stages):
        if size is None:
            return
        shape = (stage.in_channels, *size)
        try:
            out = stage.output_shape(shape)[1:]
            (cost,) = stage_costs((stage,), shape)
        except ValueError as why:
            raise ValueError(f"{about}: layer {name!r}: {why}") from None
        for key, value in (("in_size", list(size)), ("out_size", list(out)), ("macs", cost.macs)):
            given = entry.get(key)
            if isinstance(given, int) and key != "macs":
                given = [given] * len(size)
            if given not in (None, value):
                raise ValueError(
                    f"{about}: layer {name!r}: {key} must be {value}, which follows from in_size "
                    f"and the weights, got {entry[key]}"
                )
        size = out
