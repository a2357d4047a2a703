"""Weights files: the tensors of a checkpoint, and the convolutions among them."""

from __future__ import annotations

import math
import os
import zipfile
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
from lowrank.interop.common import check_exists, damaged_errors
from lowrank.interop.weights.manifest import (
    GEOMETRY,
    check_entry,
    check_sizes,
    layer_name,
    read_manifest,
)

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
    times : float
        Number of times that one example passes it, in passes at `input_size`.

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
    times: float = 1


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
    check_exists(path)
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    if ending == ".safetensors":
        return io.read_tensors(path)[0]
    if ending in (".pt", ".pth"):
        return _state_dict(path)
    with damaged_errors(path, f"not a valid {ending} file"):
        _check_sizes(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if ending == ".npz":
                raise ValueError("it is a single array")
            return {path.stem: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}


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
        A linear layer has a matrix (out, in).
        Entries with the same ``"of"`` are the stages of a chain of that name, in order, as
        :class:`lowrank.interop.weights.WeightsModel` writes them.
    only : str, optional
        Name of the only layer to return; entries of other layers are not checked.
    about : path, optional
        Path of the manifest, if it is not beside the file.

    Returns
    -------
    list of StoredLayer
        Layers of the manifest.  Without a manifest, every floating-point tensor of 2 to 5 axes: a
        matrix (out, in) as a linear layer, which has the input size (1,), others with stride 1, a
        padding that keeps the size and one group; with the bias of the same name.  The chains of
        a file that :func:`lowrank.save` wrote.

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
    >>> [(layer.name, layer.conv.stages[0].weight.shape) for layer in layers(path)]
    [('conv1', (8, 3, 3, 3)), ('fc', (10, 8, 1))]
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
        if tensor.ndim in (2, 3, 4, 5) and tensor.dtype.kind == "f" and tensor.size:
            stem = name.removesuffix("weight")
            layer = stem.rstrip(".") or path.stem
            if only not in (None, layer):
                continue
            bias = tensors.get(stem + "bias") if stem != name else None
            fits = bias is not None and bias.shape == tensor.shape[:1]
            conv = _conv(f"{path}: {name}", tensor, bias if fits else None, {"padding": "same"})
            stored.append(StoredLayer(layer, conv, (1,) if tensor.ndim == 2 else None, bias))
    return stored


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
        check_entry(about, entry, tensors)
        if not entry.get("of"):
            layer_entries.append((name, [entry]))
        elif name in chains:
            chains[name].append(entry)
        else:
            layer_entries.append((name, chains.setdefault(name, [entry])))
    return [
        _chain(about, name, entries, manifest.get("chains", {}).get(name), tensors)
        if entries[0].get("of")
        else _dense_layer(about, name, entries[0], tensors)
        for name, entries in layer_entries
    ]


def _dense_layer(about: Path, name: str, entry: Any, tensors: Mapping[str, Array]) -> StoredLayer:
    """Return a layer of one dense kernel."""
    bias = None if entry.get("bias") is None else tensors[entry["bias"]]
    weight = tensors[entry["weight"]]
    keys = (*GEOMETRY, "groups", "transposed")
    options = {key: entry[key] for key in keys if entry.get(key) is not None}
    conv = _conv(f"{about}: layer {name!r}", weight, bias, options)
    size, out = (_entry_size(about, name, entry, k, conv.ndim) for k in ("in_size", "out_size"))
    if size is None and weight.ndim == 2:
        size = (1,)
    if size and out and conv.transposed:
        conv = _fit_output(f"{about}: layer {name!r}", conv, size, out)
    check_sizes(about, name, [entry], conv.stages, size)
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
                Geometry.of(stages[0].geometry.ndim, **{key: record[key] for key in GEOMETRY}),
                as_integers("groups", record["groups"], 1)[0],
                bias,
                str(record["family"]),
                str(record["variant"]),
                as_integers("rank", record["rank"], len(record["rank"])),
            )
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        raise ValueError(f"{about}: chain {name!r} is damaged: {why}") from None
    size = _entry_size(about, name, entries[0], "in_size", f.ndim)
    check_sizes(about, name, entries, f.stages, size)
    return StoredLayer(name, f, size, f.bias)


def _stage(weight: Array, entry: Any) -> Stage:
    if not np.isfinite(weight).all():
        raise ValueError(f"{entry['weight']} has weights that are not finite numbers")
    weight = weight[..., None] if weight.ndim == 2 else weight  # of a linear layer
    groups, outer, inner = (
        as_integers(k, entry.get(k, 1), 1)[0] for k in ("groups", "left", "right")
    )
    a, b = as_integers("shuffle", entry.get("shuffle", 1), 2)
    options = {key: entry[key] for key in GEOMETRY if entry.get(key) is not None}
    geometry = Geometry.of(weight.ndim - 2, **options)
    return Stage(weight, geometry, groups, outer, inner, (a, b), bool(entry.get("transposed")))


def _entry_size(about: Path, name: str, entry: Any, key: str, ndim: int) -> Ints | None:
    if entry.get(key) is None:
        return None
    try:
        size = as_integers(key, entry[key], ndim)
        if min(size) < 1:
            raise ValueError(f"{key} must be at least 1 per axis, got {size}")
        return size
    except (ValueError, TypeError) as why:
        raise ValueError(f"{about}: layer {name!r}: {why}") from None


def _fit_output(where: str, conv: Factorization, size: Ints, out: Ints) -> Factorization:
    """Crop or pad the output of a transposed convolution at the end: TensorFlow's SAME."""
    natural = conv.output_shape(size)[1:]
    excess = [n - m for n, m in zip(natural, out)]
    g = conv.geometry
    extent = g.extent(conv.stages[0].kernel)
    if any(x >= e or -x >= s for x, e, s in zip(excess, extent, g.stride)):
        raise ValueError(f"{where}: out_size must be about {natural} for in_size {size}, got {out}")
    geometry = replace(
        g,
        padding=tuple((a, b + max(n, 0)) for (a, b), n in zip(g.padding, excess)),
        output_padding=tuple(o + max(-n, 0) for o, n in zip(g.output_padding, excess)),
    )
    stage = replace(conv.stages[0], geometry=geometry)
    return replace(conv, stages=(stage,), geometry=geometry)


def _conv(where: str, weight: Array, bias: Array | None, options: dict[str, Any]) -> Factorization:
    try:
        return dense(weight[..., None] if weight.ndim == 2 else weight, bias, **options)
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
        raise ValueError(
            "it holds Python objects, which are not loaded: save the arrays alone, with "
            "numpy.save or numpy.savez"
        )
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
