"""A network out of a file, and into one: the form goes by the file's ending."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lowrank.compress import Net

#: Endings of networks that can be opened; a network is written in the form that it came in.
ENDINGS = (".onnx", ".keras", ".h5", ".hdf5", ".safetensors", ".npz")
_FORMS = ((".onnx",), (".keras",), (".h5", ".hdf5"), (".safetensors", ".npz"))
_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")


def open_model(
    path: str | os.PathLike[str], calibration: str | os.PathLike[str] | None = None
) -> Net:
    """Open a network.

    Parameters
    ----------
    path : path
        ``.onnx``, ``.keras``, ``.h5``, or ``.safetensors`` and ``.npz`` with a manifest
        ``NAME.json`` beside them.
    calibration : path, optional
        An ``.npz`` file: of inputs of the network for ``.onnx``, of inputs of its layers, by
        their names, for the others.

    Returns
    -------
    Net

    Raises
    ------
    ValueError
        If the ending is unknown, a file is damaged or hostile, or the data do not fit.
    OSError
        If a file cannot be read.
    ImportError
        If what reads that form is not installed.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import open_model
    >>> [layer.name for layer in open_model(demo.WEIGHTS).layers]
    ['conv1', 'conv2', 'conv3']
    """
    path = Path(path)
    form = _form(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if calibration is not None and Path(calibration).suffix.lower() != ".npz":
        raise ValueError(f"{calibration}: calibration data come as .npz")
    if form == ".onnx":
        from lowrank.interop import onnx

        return onnx.open_model(path, calibration)
    if form in (".keras", ".h5"):
        from lowrank.interop.keras import KerasModel

        return KerasModel(path, calibration=calibration)
    from lowrank.interop.weights import WeightsModel

    return WeightsModel(path, calibration=calibration)


def check_target(path: str | os.PathLike[str], source: str | os.PathLike[str]) -> Path:
    """Check that a compressed network can be written; before the work, not after it.

    Parameters
    ----------
    path : path
        Where it is to stand.
    source : path
        The network that it is made from; it is never written over, nor is its manifest.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the ending is that of another form, or the original would be written over.
    OSError
        If the folder is not there.

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
    allowed = next(some for some in _FORMS if _form(source) in some)
    if path.suffix.lower() not in allowed:
        raise ValueError(
            f"{path}: the network came as {source.suffix} and is written as {' or '.join(allowed)}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    for mine in _written(path):
        for theirs in _written(source):
            if same_file(mine, theirs):
                raise ValueError(f"{path}: would be written over {theirs}, the original")
    return path


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths are one file, there or not.

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
    except OSError:  # one of them is not there
        return Path(a).resolve() == Path(b).resolve()


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write what ``Net.replaced`` gave: whole, or not at all.

    Parameters
    ----------
    model : onnx.ModelProto, KerasFile or WeightsFile
    path : path
        With an ending of its form.

    Raises
    ------
    ValueError
        If the ending is another one.
    OSError
        If it cannot be written.

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


def fingerprint(net: Net, *paths: str | os.PathLike[str] | None) -> str:
    """What tells a network and its data from others: of its layers' weights, and of files.

    Parameters
    ----------
    net : Net
    *paths : path or None
        Files that count as well.

    Returns
    -------
    str

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.files import fingerprint, open_model
    >>> net = open_model(demo.WEIGHTS)
    >>> fingerprint(net) == fingerprint(open_model(demo.WEIGHTS))
    True
    """
    found = hashlib.sha256()
    for layer in net.layers:
        f = layer.conv
        said = (layer.name, layer.input_size, layer.times, f.geometry, f.groups, f.transposed)
        found.update(repr(said).encode())
        for array in (f.stages[0].weight, f.bias, layer.scale):
            found.update(b"-" if array is None else array.tobytes())
    for path in paths:
        if path is None:
            found.update(b"-")
            continue
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _form(path: Path) -> str:
    ending = path.suffix.lower()
    if ending in _PYTORCH:
        raise ValueError(
            f"{path}: PyTorch's files hold no network, but pieces of one: compress the module in "
            "Python (README, 'Compress a network'), or export it as .onnx"
        )
    if ending not in ENDINGS:
        raise ValueError(f"{path}: networks come as {', '.join(ENDINGS)}, not {ending!r}")
    return ".h5" if ending == ".hdf5" else ending


def _written(path: Path) -> list[Path]:
    """A network's file and those that may go along with it."""
    ending = path.suffix.lower()
    if ending in (".safetensors", ".npz"):
        return [path, path.with_suffix(".json")]
    return [path, path.with_name(path.name + ".data")] if ending == ".onnx" else [path]
