"""Open and save networks; the ending of a file determines its format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.compress.model import CompressibleModel
from lowrank.interop import weights
from lowrank.interop.batches import InputSize
from lowrank.interop.common import check_exists
from lowrank.interop.weights import ENDINGS as WEIGHTS
from lowrank.interop.weights import StoredLayer, WeightsFile

#: Endings of networks that can be opened; a network is written in the format of the original.
ENDINGS = (".onnx", ".keras", ".h5", ".hdf5", ".safetensors", ".npz")
_FORMATS = ((".onnx",), (".keras",), (".h5", ".hdf5"), (".safetensors", ".npz"))
_KERAS = (".keras", ".h5", ".hdf5")
_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")


def open_model(
    path: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None = None,
    input_size: InputSize | None = None,
) -> CompressibleModel:
    """Open a network.

    Parameters
    ----------
    path : path
        ``.onnx``, ``.keras``, ``.h5`` or ``.hdf5`` file, or ``.safetensors`` or ``.npz`` file
        with a manifest ``NAME.json`` beside it.
    calibration : path, optional
        ``.npz`` file: inputs of the network for ``.onnx``, ``.keras`` and ``.h5``, inputs of
        layers, in arrays named after them, for the others.
    input_size : sequence of int or mapping, optional
        Sizes of the free axes of an ``.onnx`` or Keras network's inputs, without that of the
        batch, such as ``(224, 224)``, if there are no calibration data.

    Returns
    -------
    CompressibleModel

    Raises
    ------
    ValueError
        If the ending is unknown, a file is damaged or hostile, or the data do not fit.
    OSError
        If a file cannot be read.
    ImportError
        If the library that reads the format is not installed.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import open_model
    >>> [layer.name for layer in open_model(demo.WEIGHTS).layers]
    ['conv1', 'conv2', 'conv3']
    """
    path = Path(path)
    check_exists(path)
    ending = _ending(path)
    if calibration is not None and Path(calibration).suffix.lower() != ".npz":
        raise ValueError(f"{calibration}: calibration data come as .npz")
    if ending == ".onnx":
        from lowrank.interop import onnx

        return onnx.open_model(path, calibration, input_size)
    if ending in _KERAS:
        from lowrank.interop.keras import KerasModel

        return KerasModel(path, calibration=calibration, input_size=input_size)
    if input_size is not None:
        raise ValueError(
            f"{path}: an input size is for networks of ONNX and Keras: a weights file has the "
            "in_size of each layer in its manifest"
        )
    return weights.WeightsModel(path, calibration=calibration)


class FileLayers(NamedTuple):
    """Layers of a file.

    Attributes
    ----------
    layers : list of StoredLayer
        Layers and chains.
    left_out : dict of str to str
        Reasons why others are not among them.

    Examples
    --------
    >>> from lowrank.interop.files import FileLayers
    >>> FileLayers([], {}).left_out
    {}
    """

    layers: list[StoredLayer]
    left_out: dict[str, str]


def read_layers(
    path: str | os.PathLike[str],
    only: str | None = None,
    input_size: Sequence[int] | None = None,
) -> FileLayers:
    """Read the layers of a network or of a weights file, whatever their input sizes.

    Parameters
    ----------
    path : path
        File as for :func:`open_model`, a single tensor (``.npy``), or a state dict of PyTorch
        (``.pt``, ``.pth``).
    only : str, optional
        Name of the only layer to return.
    input_size : sequence of int, optional
        Sizes of the free axes of a network's inputs, as for :func:`open_model`; of a weights
        file, input size of all layers with as many spatial axes.

    Returns
    -------
    FileLayers

    Raises
    ------
    ValueError, OSError, ImportError
        As :func:`open_model`.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import read_layers
    >>> [layer.name for layer in read_layers(demo.WEIGHTS).layers]
    ['conv1', 'conv2', 'conv3']
    """
    path = Path(path)
    check_exists(path)
    ending = path.suffix.lower()
    if ending in WEIGHTS:
        stored = weights.layers(path, only)
        if input_size is not None:
            size, axes = tuple(input_size), {x.conv.ndim for x in stored}
            if stored and len(size) not in axes:
                raise ValueError(
                    f"{path}: input size must have as many spatial axes as a layer, "
                    f"{' or '.join(map(str, sorted(axes)))}, got {size}"
                )
            stored = [
                replace(x, input_size=size) if x.conv.ndim == len(size) else x for x in stored
            ]
        return FileLayers(stored, {})
    if ending not in ENDINGS:
        endings = ", ".join(dict.fromkeys((*ENDINGS, *WEIGHTS)))
        raise ValueError(f"{path}: the ending must be one of {endings}, got {ending!r}")
    net: Any = open_model(path, input_size=input_size)
    found = [StoredLayer(x.name, x.conv, x.input_size, x.conv.bias, x.passes) for x in net.layers]
    chains = getattr(net, "chains", {}) | getattr(net, "unsized", {})
    found += [StoredLayer(name, f, None, f.bias) for name, f in chains.items()]
    left_out = {n: why for n, why in getattr(net, "left_out", {}).items() if n not in chains}
    return FileLayers([x for x in found if only in (None, x.name)], left_out)


def check_target(path: str | os.PathLike[str], source: str | os.PathLike[str]) -> Path:
    """Check that a compressed network can be written, before it is computed.

    Parameters
    ----------
    path : path
        File to be written.
    source : path
        Original network; neither it nor its manifest is ever overwritten.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the ending is that of another format, or the original would be overwritten.
    OSError
        If the folder does not exist.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import check_target
    >>> check_target("small.npz", demo.WEIGHTS).name
    'small.npz'
    >>> check_target("small.onnx", demo.WEIGHTS)
    Traceback (most recent call last):
    ...
    ValueError: small.onnx: the network came as .safetensors and is written as .safetensors or .npz
    """
    path, source = Path(path), Path(source)
    check_exists(source)
    allowed = next(endings for endings in _FORMATS if _ending(source) in endings)
    if path.suffix.lower() not in allowed:
        raise ValueError(
            f"{path}: the network came as {source.suffix} and is written as {' or '.join(allowed)}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent}")
    for target in _files_of(path):
        for original in _files_of(source):
            if same_file(target, original):
                raise ValueError(f"{path}: would overwrite {original}, the original")
    return path


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths refer to the same file, which need not exist.

    Parameters
    ----------
    a, b : path

    Returns
    -------
    bool

    Examples
    --------
    >>> from lowrank.interop.files import same_file
    >>> same_file("a.onnx", "./a.onnx"), same_file("a.onnx", "b.onnx")
    (True, False)
    """
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return Path(a).resolve() == Path(b).resolve()


def save(model: Any, path: str | os.PathLike[str]) -> list[Path]:
    """Write a model that ``CompressibleModel.replaced`` returned, atomically.

    Parameters
    ----------
    model : onnx.ModelProto, keras.Model or WeightsFile
        New model.
    path : path
        File with an ending of the model's format.

    Returns
    -------
    list of Path
        Files that were written: that one, and the description of weights or the data of an ONNX
        model beside it.

    Raises
    ------
    ValueError
        If the ending is another one.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from lowrank import demo, spatial_svd
    >>> from lowrank.interop.files import open_model, save
    >>> net = open_model(demo.WEIGHTS)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "small.safetensors")
    >>> new = net.replaced({"conv2": spatial_svd(net.layers[1].conv, rank=4)})
    >>> [file.name for file in save(new, path)]
    ['small.safetensors', 'small.json']
    >>> len(open_model(path).layers)
    2
    """
    path = Path(path)
    ending = _ending(path)
    if isinstance(model, WeightsFile):  # whose endings are its own to check
        model.save(path)
        return _files_of(path)
    if ending == ".onnx":
        from lowrank.interop import onnx

        has_data = onnx.save(model, path)
        return _files_of(path) if has_data else [path]
    if ending in _KERAS:
        from lowrank.interop import keras

        keras.save(model, path)
    else:
        model.save(path)
    return [path]


def fingerprint(net: CompressibleModel, *paths: str | os.PathLike[str] | None) -> str:
    """Return a hash of a network's layers and of files, to recognise them again.

    Parameters
    ----------
    net : CompressibleModel
        Network whose layers are hashed.
    *paths : path or None
        Files whose contents are hashed.

    Returns
    -------
    str
        SHA-256 in hexadecimal digits.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import fingerprint, open_model
    >>> net = open_model(demo.WEIGHTS)
    >>> fingerprint(net) == fingerprint(open_model(demo.WEIGHTS))
    True
    """
    digest = hashlib.sha256()
    for layer in net.layers:
        f = layer.conv
        record = (layer.name, layer.input_size, layer.passes, f.geometry, f.groups, f.transposed)
        digest.update(repr(record).encode())
        for array in (f.stages[0].weight, f.bias, layer.scale):
            digest.update(b"-" if array is None else array.tobytes())
    for path in paths:
        if path is None:
            digest.update(b"-")
            continue
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending in _PYTORCH:
        raise ValueError(
            f"{path}: a PyTorch file holds weights, but no network: compress the module in Python "
            "(README, 'Compress a network'), or export it as .onnx"
        )
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    return ending


def _files_of(path: Path) -> list[Path]:
    """Return a network's file and the files that may accompany it."""
    ending = path.suffix.lower()
    if ending in (".safetensors", ".npz"):
        return [path, path.with_suffix(".json")]
    return [path, path.with_name(path.name + ".data")] if ending == ".onnx" else [path]
