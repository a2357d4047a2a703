"""Weights files: the tensors of a checkpoint, and the convolutions among them."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowrank import io
from lowrank._typing import Array, Ints
from lowrank.core.geometry import Geometry, as_integers
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization, chain, dense

ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth")


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """One convolution of a weights file.

    Attributes
    ----------
    name : str
        Name in the file or in its manifest.
    conv : Factorization
        One dense stage, or a chain that lowrank saved.
    input_size : tuple of int or None
        Spatial size of its input in the network, None if the manifest does not give it.
    bias : ndarray or None
        Bias in the file.  `conv` does not have it if its length does not fit, such as that of a
        transposed convolution without a manifest.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.weights import layers
    >>> [(x.name, x.input_size) for x in layers(demo.WEIGHTS)]
    [('conv1', (8, 8)), ('conv2', (8, 8)), ('conv3', (4, 4))]
    """

    name: str
    conv: Factorization
    input_size: Ints | None
    bias: Array | None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read all tensors of a weights file.

    Parameters
    ----------
    path : path
        ``.safetensors``, ``.npz``, ``.npy`` (one tensor, named after the file), or a PyTorch
        state dict, ``.pt`` or ``.pth``, for which PyTorch must be installed.

    Returns
    -------
    dict of str to ndarray
        Tensors by name; bfloat16 is converted to float32.

    Raises
    ------
    ValueError
        If the file does not have the format of its ending, or holds objects other than tensors.
    OSError
        If the file cannot be read.
    ImportError
        If PyTorch is needed and missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from lowrank.interop.weights import read_weights
    >>> path = pathlib.Path(tempfile.mkdtemp(), "layers.npz")
    >>> np.savez(path, conv1=np.zeros((8, 3, 3, 3)))
    >>> {name: w.shape for name, w in read_weights(path).items()}
    {'conv1': (8, 3, 3, 3)}
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a weights file")
    if ending == ".safetensors":
        return io.read_tensors(path)[0]
    if ending in (".pt", ".pth"):
        return _state_dict(path)
    try:
        _check_sizes(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if ending == ".npz":
                raise ValueError("it is a single array")
            return {path.stem: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as why:
        if "pickle" in str(why):
            raise ValueError(
                f"{path}: not a plain NumPy file, or one with Python objects, which are not "
                "loaded: save the arrays alone, with numpy.save or numpy.savez"
            ) from None
        raise ValueError(f"{path}: not a valid {ending} file: {why}") from None


def layers(
    path: str | os.PathLike[str],
    only: str | None = None,
    about: str | os.PathLike[str] | None = None,
) -> list[StoredLayer]:
    """Find the convolutions of a weights file.

    Parameters
    ----------
    path : path
        Weights file, see :func:`read_weights`.  Its manifest is a file ``NAME.json`` beside it:
        ``{"conv_layers": [{"name", "weight", "bias", "stride", "padding", "dilation", "groups",
        "transposed", "in_size", "out_size"}]}``, where only ``"weight"``, the name of a tensor,
        is required.  ``"padding"`` is one number, or one [before, after] pair per axis; the
        output of a transposed convolution is cropped or padded at the end to ``"out_size"``.
        Entries with the same ``"of"`` are the stages of a chain of that name, in order, as
        :class:`lowrank.interop.weights.WeightsModel` writes them.
    only : str, optional
        Name of the only layer to return; entries of other layers are not checked.
    about : path, optional
        Path of the manifest, if it is not beside the file.

    Returns
    -------
    list of StoredLayer
        Layers of the manifest.  Without a manifest, every floating-point tensor of 3 to 5 axes
        with stride 1, a padding that keeps the size, one group, and the bias of the same name.
        The chains of a file that :func:`lowrank.save` wrote.

    Raises
    ------
    ValueError, OSError, ImportError
        As :func:`read_weights`; also if the manifest does not fit the weights.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from lowrank.interop.weights import layers
    >>> path = pathlib.Path(tempfile.mkdtemp(), "net.npz")
    >>> np.savez(path, **{"conv1.weight": np.zeros((8, 3, 3, 3)), "fc.weight": np.zeros((10, 8))})
    >>> [(layer.name, layer.conv.output_shape((32, 32))) for layer in layers(path)]
    [('conv1', (8, 32, 32))]
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        tensors, metadata = io.read_tensors(path)
        if io.holds_chains(metadata):
            chains = io.load(path).items()
            return [StoredLayer(n, f, None, f.bias) for n, f in chains if only in (None, n)]
    else:
        tensors = read_weights(path)
    manifest = path.with_suffix(".json") if about is None else Path(about)
    if about is not None or manifest.exists():
        return _manifest_layers(manifest, tensors, only)
    stored = []
    for name, tensor in tensors.items():
        if tensor.ndim in (3, 4, 5) and tensor.dtype.kind == "f" and tensor.size:
            stem = name.removesuffix("weight")
            layer = stem.rstrip(".") or path.stem
            if only not in (None, layer):
                continue
            bias = tensors.get(stem + "bias") if stem != name else None
            fits = bias is not None and bias.shape == tensor.shape[:1]
            conv = _conv(f"{path}: {name}", tensor, bias if fits else None, {"padding": "same"})
            stored.append(StoredLayer(layer, conv, None, bias))
    return stored


def layer_name(entry: Any) -> str:
    """Return the name of the layer that an entry of a manifest belongs to."""
    return str(entry.get("of") or entry.get("name", entry["weight"]))


def _manifest_layers(
    about: Path, tensors: Mapping[str, Array], only: str | None
) -> list[StoredLayer]:
    """Return the layers of the manifest `about`."""
    manifest = read_manifest(about)
    layer_entries: list[tuple[str, list[Any]]] = []
    chains: dict[str, list[Any]] = {}
    for entry in manifest["conv_layers"]:
        name = layer_name(entry)
        if only not in (None, name):
            continue
        for key in ("weight", "bias"):
            if entry.get(key) is not None and entry[key] not in tensors:
                raise ValueError(
                    f"{about}: layer {name!r}: no tensor {entry[key]!r} in the weights file"
                )
        if not entry.get("of"):
            layer_entries.append((name, [entry]))
        elif name in chains:
            chains[name].append(entry)
        else:
            layer_entries.append((name, chains.setdefault(name, [entry])))
    records = manifest.get("chains")
    if not isinstance(records, dict | None):
        raise ValueError(f"{about}: 'chains' must be a table")
    return [
        _chain(about, name, entries, (records or {}).get(name), tensors)
        if entries[0].get("of")
        else _dense_layer(about, name, entries[0], tensors)
        for name, entries in layer_entries
    ]


def read_manifest(about: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a weights file.

    Parameters
    ----------
    about : path
        JSON file, see :func:`layers`.

    Returns
    -------
    dict
        Contents of the file; ``"conv_layers"`` is a list of tables that name tensors.

    Raises
    ------
    ValueError
        If the file does not describe layers.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.weights import read_manifest
    >>> read_manifest(demo.WEIGHTS.with_suffix(".json"))["conv_layers"][0]["weight"]
    'conv1.weight'
    """
    try:
        manifest = json.loads(Path(about).read_text("utf-8"))
        for entry in manifest["conv_layers"]:
            if not isinstance(entry["weight"], str) or not isinstance(
                entry.get("bias"), str | None
            ):
                raise TypeError("the name of a tensor must be a string")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as why:
        raise ValueError(
            f"{about}: does not describe layers, {{'conv_layers': [{{'weight': ...}}]}}: {why!r}"
        ) from None
    return dict(manifest)


_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "value", "output_padding")


def _dense_layer(about: Path, name: str, entry: Any, tensors: Mapping[str, Array]) -> StoredLayer:
    """Return a layer of one dense kernel."""
    bias = None if entry.get("bias") is None else tensors[entry["bias"]]
    keys = (*_GEOMETRY, "groups", "transposed")
    options = {key: entry[key] for key in keys if entry.get(key) is not None}
    conv = _conv(f"{about}: layer {name!r}", tensors[entry["weight"]], bias, options)
    size, out = (_entry_size(about, name, entry, k, conv.ndim) for k in ("in_size", "out_size"))
    if size and out and conv.transposed:
        conv = _fit_output(conv, size, out)
    return StoredLayer(name, conv, size, conv.bias)


def _chain(
    about: Path, name: str, entries: Any, record: Any, tensors: Mapping[str, Array]
) -> StoredLayer:
    """Return a layer that is a chain, with the stages that were written."""
    try:
        stages = tuple(_stage(tensors[entry["weight"]], entry) for entry in entries)
        bias = None if entries[-1].get("bias") is None else tensors[entries[-1]["bias"]]
        if record is None:
            f = chain(stages, bias)
        else:
            f = Factorization(
                stages,
                Geometry.of(stages[0].geometry.ndim, **{key: record[key] for key in _GEOMETRY}),
                as_integers("groups", record["groups"], 1)[0],
                bias,
                str(record["family"]),
                str(record["variant"]),
                as_integers("rank", record["rank"], len(record["rank"])),
            )
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        raise ValueError(f"{about}: chain {name!r} is damaged: {why}") from None
    return StoredLayer(name, f, _entry_size(about, name, entries[0], "in_size", f.ndim), f.bias)


def _stage(weight: Array, entry: Any) -> Stage:
    if not np.isfinite(weight).all():
        raise ValueError(f"{entry['weight']} has weights that are not finite numbers")
    groups, outer, inner = (
        as_integers(k, entry.get(k, 1), 1)[0] for k in ("groups", "left", "right")
    )
    a, b = as_integers("shuffle", entry.get("shuffle", 1), 2)
    options = {key: entry[key] for key in _GEOMETRY if entry.get(key) is not None}
    geometry = Geometry.of(weight.ndim - 2, **options)
    return Stage(weight, geometry, groups, outer, inner, (a, b), bool(entry.get("transposed")))


def _entry_size(about: Path, name: str, entry: Any, key: str, ndim: int) -> Ints | None:
    if entry.get(key) is None:
        return None
    try:
        return as_integers(key, entry[key], ndim)
    except (ValueError, TypeError) as why:
        raise ValueError(f"{about}: layer {name!r}: {why}") from None


def _fit_output(conv: Factorization, size: Ints, out: Ints) -> Factorization:
    """Crop or pad the output of a transposed convolution at the end: TensorFlow's SAME."""
    excess = [n - m for n, m in zip(conv.output_shape(size)[1:], out)]
    g = conv.geometry
    geometry = replace(
        g,
        padding=tuple((a, b + max(n, 0)) for (a, b), n in zip(g.padding, excess)),
        output_padding=tuple(o + max(-n, 0) for o, n in zip(g.output_padding, excess)),
    )
    stage = replace(conv.stages[0], geometry=geometry)
    return replace(conv, stages=(stage,), geometry=geometry)


def _conv(where: str, weight: Array, bias: Array | None, options: dict[str, Any]) -> Factorization:
    try:
        return dense(weight, bias, **options)
    except (ValueError, TypeError) as why:
        raise type(why)(f"{where}: {why}") from None


def _check_sizes(path: Path) -> None:
    """Raise if an array claims more bytes than its file has, before memory is allocated."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            _check_array(file, path.stem, path.stat().st_size)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        io.check_expansion(path, sum(m.file_size for m in members))
        for member in members:
            with archive.open(member) as opened:
                _check_array(opened, member.filename, member.file_size)


def _check_array(file: IO[bytes], name: str, size: int) -> None:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"{name} has the unknown version {version}")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    claimed = math.prod(shape) * dtype.itemsize + file.tell()
    if min(shape, default=0) < 0 or claimed > size:
        raise ValueError(f"{name} of shape {shape} claims {claimed} bytes, the file has {size}")


def _state_dict(path: Path) -> dict[str, Array]:
    """Return the tensors of a PyTorch state dict, without running any code of the pickle."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: reading {path.suffix} needs PyTorch: pip install 'lowrank[torch]', "
            "or save the weights as .safetensors"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:
        if "weights" in str(why).lower() and "unpickl" in type(why).__name__.lower():
            raise ValueError(
                f"{path}: the pickle holds more than weights and could run any code, so it is not "
                "loaded: if you trust it, save torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        raise ValueError(f"{path}: not a PyTorch state dict ({type(why).__name__})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if isinstance(loaded, torch.Tensor):
        loaded = {path.stem: loaded}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
        for name, t in tensors.items()
    }
