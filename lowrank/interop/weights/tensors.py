"""Trained weights out of files: the tensors of a checkpoint, and the convolutions among them."""

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
        As the file or its description calls it.
    conv : Factorization
        One dense stage, or a chain that lowrank saved.
    input_size : tuple of int or None
        Spatial size of its input in the network, where the description says so.
    bias : ndarray or None
        As the file holds it; `conv` is without it where its length does not fit, such as that
        of a transposed convolution that nothing describes.

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
        bfloat16 becomes float32.

    Raises
    ------
    ValueError
        If the file is not what its ending says, or holds objects other than tensors.
    OSError
        If it cannot be read.
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
        raise ValueError(f"{path}: weights come from {', '.join(ENDINGS)}, not {ending!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a weights file")
    if ending == ".safetensors":
        return io.read_tensors(path)[0]
    if ending in (".pt", ".pth"):
        return _state_dict(path)
    try:
        _check_sizes(path)
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            if ending == ".npz":
                raise ValueError("it is a single array")
            return {path.stem: found}
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as why:
        if "pickle" in str(why):
            raise ValueError(
                f"{path}: not a plain NumPy file, or one with Python objects, which are not "
                "loaded: save the arrays alone, with numpy.save or numpy.savez"
            ) from None
        raise ValueError(f"{path}: not a file that {ending} promises: {why}") from None


def layers(
    path: str | os.PathLike[str],
    only: str | None = None,
    about: str | os.PathLike[str] | None = None,
) -> list[StoredLayer]:
    """Find the convolutions of a weights file.

    Parameters
    ----------
    path : path
        See :func:`read_weights`.  A file ``NAME.json`` beside ``NAME.safetensors`` describes the
        layers: ``{"conv_layers": [{"name", "weight", "bias", "stride", "padding", "dilation",
        "groups", "transposed", "in_size", "out_size"}]}``, of which all but the weight's tensor
        name may be missing; ``padding`` is one number or a [before, after] pair an axis, and
        the output of a transposed convolution is cut or grown at the end to ``out_size``.
        Entries with the same ``"of"`` are the stages of a chain of that name, in order, as
        :class:`lowrank.interop.weights.WeightsModel` writes them.
    only : str, optional
        The layer of this name alone, if there is one; the others are not looked at.
    about : path, optional
        The description, if it stands elsewhere.

    Returns
    -------
    list of StoredLayer
        As described; without a description every floating-point tensor of 3 to 5 axes, with
        stride 1 and a padding that keeps the size, one group, and the bias that is named so.
        For a file that :func:`lowrank.save` wrote, its chains.

    Raises
    ------
    ValueError, OSError, ImportError
        As :func:`read_weights`; and if the description does not fit the weights.

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
    described = path.with_suffix(".json") if about is None else Path(about)
    if about is not None or described.exists():
        return _described(described, tensors, only)
    found = []
    for name, tensor in tensors.items():
        if tensor.ndim in (3, 4, 5) and tensor.dtype.kind == "f" and tensor.size:
            stem = name.removesuffix("weight")
            short = stem.rstrip(".") or path.stem
            if only not in (None, short):
                continue
            bias = tensors.get(stem + "bias") if stem != name else None
            fits = bias is not None and bias.shape == tensor.shape[:1]
            conv = _conv(f"{path}: {name}", tensor, bias if fits else None, {"padding": "same"})
            found.append(StoredLayer(short, conv, None, bias))
    return found


def _described(about: Path, tensors: Mapping[str, Array], only: str | None) -> list[StoredLayer]:
    """Layers as the file `about` describes them."""
    described = manifest(about)
    found: list[tuple[str, list[Any]]] = []
    chains: dict[str, list[Any]] = {}
    for entry in described["conv_layers"]:
        name = str(entry.get("of") or entry.get("name", entry["weight"]))
        if only not in (None, name):
            continue
        for key in ("weight", "bias"):
            if entry.get(key) is not None and entry[key] not in tensors:
                raise ValueError(
                    f"{about}: layer {name!r} wants a tensor {entry[key]!r}, not there"
                )
        if not entry.get("of"):
            found.append((name, [entry]))
        elif name in chains:
            chains[name].append(entry)
        else:
            found.append((name, chains.setdefault(name, [entry])))
    of = described.get("chains")
    if not isinstance(of, dict | None):
        raise ValueError(f"{about}: 'chains' is no table")
    return [
        _chain(about, name, entries, (of or {}).get(name), tensors)
        if entries[0].get("of")
        else _plain(about, name, entries[0], tensors)
        for name, entries in found
    ]


def manifest(about: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description of a weights file.

    Parameters
    ----------
    about : path
        A JSON file, see :func:`layers`.

    Returns
    -------
    dict
        With ``"conv_layers"``, a list of tables that name tensors.

    Raises
    ------
    ValueError
        If it describes no layers.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.weights import manifest
    >>> manifest(demo.WEIGHTS.with_suffix(".json"))["conv_layers"][0]["weight"]
    'conv1.weight'
    """
    try:
        found = json.loads(Path(about).read_text("utf-8"))
        for entry in found["conv_layers"]:
            if not isinstance(entry["weight"], str) or not isinstance(
                entry.get("bias"), str | None
            ):
                raise TypeError("the name of a tensor is no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as why:
        raise ValueError(
            f"{about}: does not describe layers, {{'conv_layers': [{{'weight': ...}}]}}: {why!r}"
        ) from None
    return dict(found)


_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "value", "output_padding")


def _plain(about: Path, name: str, entry: Any, tensors: Mapping[str, Array]) -> StoredLayer:
    """A layer of one dense kernel."""
    bias = None if entry.get("bias") is None else tensors[entry["bias"]]
    keys = (*_GEOMETRY, "groups", "transposed")
    options = {key: entry[key] for key in keys if entry.get(key) is not None}
    conv = _conv(f"{about}: layer {name!r}", tensors[entry["weight"]], bias, options)
    size, wanted = (_entry_size(about, name, entry, k, conv.ndim) for k in ("in_size", "out_size"))
    if size and wanted and conv.transposed:
        conv = _fitted(conv, size, wanted)
    return StoredLayer(name, conv, size, conv.bias)


def _chain(about: Path, name: str, entries: Any, of: Any, tensors: Mapping[str, Array]) -> StoredLayer:
    """A layer as a chain of stages, the very ones that were written."""
    try:
        stages = tuple(_stage(tensors[entry["weight"]], entry) for entry in entries)
        bias = None if entries[-1].get("bias") is None else tensors[entries[-1]["bias"]]
        if of is None:
            f = chain(stages, bias)
        else:
            f = Factorization(
                stages,
                Geometry.of(stages[0].geometry.ndim, **{key: of[key] for key in _GEOMETRY}),
                as_integers("groups", of["groups"], 1)[0],
                bias,
                str(of["family"]),
                str(of["variant"]),
                as_integers("rank", of["rank"], len(of["rank"])),
            )
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        raise ValueError(f"{about}: chain {name!r} is damaged: {why}") from None
    return StoredLayer(name, f, _entry_size(about, name, entries[0], "in_size", f.ndim), f.bias)


def _stage(weight: Array, entry: Any) -> Stage:
    if not np.isfinite(weight).all():
        raise ValueError(f"{entry['weight']} has weights that are not finite numbers")
    g, left, right = (as_integers(k, entry.get(k, 1), 1)[0] for k in ("groups", "left", "right"))
    a, b = as_integers("shuffle", entry.get("shuffle", 1), 2)
    options = {key: entry[key] for key in _GEOMETRY if entry.get(key) is not None}
    geometry = Geometry.of(weight.ndim - 2, **options)
    return Stage(weight, geometry, g, left, right, (a, b), bool(entry.get("transposed")))


def _entry_size(about: Path, name: str, entry: Any, key: str, ndim: int) -> Ints | None:
    if entry.get(key) is None:
        return None
    try:
        return as_integers(key, entry[key], ndim)
    except (ValueError, TypeError) as why:
        raise ValueError(f"{about}: layer {name!r}: {why}") from None


def _fitted(conv: Factorization, size: Ints, wanted: Ints) -> Factorization:
    """A transposed convolution whose output is cut or grown at the end: TensorFlow's SAME."""
    spare = [n - m for n, m in zip(conv.output_shape(size)[1:], wanted)]
    g = conv.geometry
    geometry = replace(
        g,
        padding=tuple((a, b + max(n, 0)) for (a, b), n in zip(g.padding, spare)),
        output_padding=tuple(o + max(-n, 0) for o, n in zip(g.output_padding, spare)),
    )
    stage = replace(conv.stages[0], geometry=geometry)
    return replace(conv, stages=(stage,), geometry=geometry)


def _conv(what: str, weight: Array, bias: Array | None, options: dict[str, Any]) -> Factorization:
    try:
        return dense(weight, bias, **options)
    except (ValueError, TypeError) as why:
        raise type(why)(f"{what}: {why}") from None


def _check_sizes(path: Path) -> None:
    """Refuse a NumPy file whose arrays claim more than there is, before memory is taken."""
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
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"{name} is of version {version}")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it has pickled objects")
    claimed = math.prod(shape) * dtype.itemsize + file.tell()
    if min(shape, default=0) < 0 or claimed > size:
        raise ValueError(f"{name} of shape {shape} claims {claimed} bytes of {size}")


def _state_dict(path: Path) -> dict[str, Array]:
    """Tensors of a PyTorch state dict, which is read without running what a pickle may hold."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: reading {path.suffix} needs PyTorch: pip install 'lowrank[torch]', "
            "or save the weights as .safetensors"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:
        if "weights" in str(why).lower() and "unpickl" in type(why).__name__.lower():
            raise ValueError(
                f"{path}: a pickle with more than weights in it, which could run any code, is not "
                "loaded: where you trust it, torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        raise ValueError(f"{path}: not a PyTorch state dict ({type(why).__name__})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, torch.Tensor):
        found = {path.stem: found}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a state dict")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
        for name, t in tensors.items()
    }
