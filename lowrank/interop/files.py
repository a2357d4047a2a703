"""Open and save networks; the ending of a file determines its format."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lowrank.compress.model import CompressibleModel

#: Endings of networks that can be opened; a network is written in the format of the original.
ENDINGS = (".onnx", ".keras", ".h5", ".hdf5", ".safetensors", ".npz")
_FORMATS = ((".onnx",), (".keras",), (".h5", ".hdf5"), (".safetensors", ".npz"))
_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")


def open_model(
    path: str | os.PathLike[str], calibration: str | os.PathLike[str] | None = None
) -> CompressibleModel:
    """Open a network.

    Parameters
    ----------
    path : path
        ``.onnx``, ``.keras``, ``.h5`` or ``.hdf5`` file, or ``.safetensors`` or ``.npz`` file
        with a manifest ``NAME.json`` beside it.
    calibration : path, optional
        ``.npz`` file: inputs of the network for ``.onnx``, inputs of layers, in arrays named
        after them, for the others.

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
    ending = _ending(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if calibration is not None and Path(calibration).suffix.lower() != ".npz":
        raise ValueError(f"{calibration}: calibration data come as .npz")
    if ending == ".onnx":
        from lowrank.interop import onnx

        return onnx.open_model(path, calibration)
    if ending in (".keras", ".h5", ".hdf5"):
        from lowrank.interop.keras import KerasModel

        return KerasModel(path, calibration=calibration)
    from lowrank.interop.weights import WeightsModel

    return WeightsModel(path, calibration=calibration)


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


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model that ``CompressibleModel.replaced`` returned, atomically.

    Parameters
    ----------
    model : onnx.ModelProto, KerasFile or WeightsFile
        New model.
    path : path
        File with an ending of the model's format.

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
    >>> save(net.replaced({"conv2": spatial_svd(net.layers[1].conv, rank=4)}), path)
    >>> len(open_model(path).layers)
    2
    """
    if hasattr(model, "save"):
        model.save(path)
        return
    from lowrank.interop import onnx

    onnx.save(model, path)


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
        record = (layer.name, layer.input_size, layer.times, f.geometry, f.groups, f.transposed)
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
