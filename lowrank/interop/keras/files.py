"""Keras files: read archives and HDF5 files that are not trusted, without Keras, and write them."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from lowrank import io
from lowrank.interop.common import one_line

ENDINGS = (".keras", ".h5", ".hdf5")
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_DEPTH = 64  # nesting of groups; no network needs more
#: Largest compression ratio of a dataset (no weights compress better), and bytes that any file
#: may expand to.
_RATIO, _SPARE = 1000, 1 << 24
_HEAP = b"GCOL\x01\0\0\0"  # signature and version of HDF5's global heaps


@dataclass(frozen=True, slots=True, eq=False)
class KerasFile:
    """Contents of the file of a Keras model.

    Attributes
    ----------
    ending : str
        ``".keras"`` or ``".h5"``.
    config : dict
        Configuration of the model: ``class_name``, ``config``.
    weights : bytes
        HDF5 file: that in the archive, or the whole ``.h5`` file.
    members : dict of str to bytes
        Other members of the archive.

    Examples
    --------
    >>> from lowrank.interop.keras.files import KerasFile
    >>> KerasFile(".keras", {"class_name": "Sequential"}, b"", {}).ending
    '.keras'
    """

    ending: str
    config: dict[str, Any]
    weights: bytes
    members: dict[str, bytes]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model in the format of the original, atomically.

        Parameters
        ----------
        path : path
            File with the ending of the original.

        Raises
        ------
        ValueError
            If the ending is another one.
        OSError
            If the file cannot be written.
        """
        path = Path(path)
        if _ending(path) != self.ending:
            raise ValueError(f"{path}: the ending must be {self.ending}, that of the original")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder")
        with io.atomic_write(path) as part:
            if self.ending == ".h5":
                part.write_bytes(self.weights)
                return
            with zipfile.ZipFile(part, "x") as archive:
                for name, data in self.members.items():
                    archive.writestr(name, data)
                archive.writestr(_CONFIG, json.dumps(self.config))
                archive.writestr(_WEIGHTS, self.weights)


def read(path: str | os.PathLike[str]) -> KerasFile:
    """Read the file of a Keras model; no code in it is run, and all sizes in it are checked.

    Parameters
    ----------
    path : path
        ``.keras``, ``.h5`` or ``.hdf5`` file.

    Returns
    -------
    KerasFile

    Raises
    ------
    ValueError
        If the file is damaged, would expand far beyond its size, or refers to other files.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    ending = _ending(path)
    data = path.read_bytes()
    with read_errors(path):
        if ending == ".keras":
            members = _members(path, data)
            for name in (_CONFIG, _WEIGHTS):
                if name not in members:
                    raise ValueError(f"it has no {name}")
            config = _json(members.pop(_CONFIG))
            weights = members.pop(_WEIGHTS)
            with open_hdf5(weights):
                pass
        else:
            members, weights = {}, data
            with open_hdf5(weights) as file:
                if "model_config" not in file.attrs:
                    raise ValueError("it has no model_config, only weights: save the whole model")
                config = _json(file.attrs["model_config"])
        if not isinstance(config, dict) or "config" not in config:
            raise ValueError("its configuration is not that of a model")
    return KerasFile(ending, config, weights, members)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn any error of reading into a ValueError that names the file."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as why:  # HDF5 has errors of every type for damaged files
        raise ValueError(f"{path}: not a readable Keras model: {one_line(why)}") from None


@contextmanager
def open_hdf5(data: bytes) -> Iterator[Any]:
    """Open an HDF5 file in memory, after checking all its links and sizes."""
    _check_heaps(data)
    with h5py().File(BytesIO(data), "r") as file:
        _check(file, len(data))
        yield file


def copy_item(item: Any, parent: Any, name: str) -> None:
    """Copy a group or a dataset into another file, by its values.

    HDF5's own copy also copies objects that it does not understand, and fails on damaged ones.
    """
    if isinstance(item, h5py().Group):
        new = parent.require_group(name)
        for key in item:
            copy_item(item[key], new, key)
    else:
        new = parent.create_dataset(name, data=item[()], dtype=item.dtype)
    for key, value in item.attrs.items():
        new.attrs[key] = value


def h5py() -> Any:
    """Import h5py, or raise an ImportError that says how to install it."""
    try:
        import h5py
    except ImportError:
        raise ImportError("Keras files need h5py: pip install 'lowrank[keras]'") from None
    return h5py


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    return ".h5" if ending == ".hdf5" else ending


def _json(text: Any) -> Any:
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(str(text))
    except RecursionError:
        raise ValueError("its configuration is nested too deep") from None


def _members(path: Path, data: bytes) -> dict[str, bytes]:
    """Return the members of an archive by name."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = archive.infolist()
            io.check_expansion(path, sum(m.file_size for m in members))
            for member in members:
                parts = member.filename.replace("\\", "/").split("/")
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise ValueError(f"the path {member.filename!r} leads out of the archive")
            if len({m.filename for m in members}) < len(members):
                raise ValueError("two members have the same name")
            return {m.filename: archive.read(m) for m in members if not m.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as why:
        raise ValueError(f"its archive is damaged: {why}") from None


def _check_heaps(data: bytes) -> None:
    """Raise on global heaps in which the HDF5 library would loop forever.

    The library walks from object to object by their sizes, and accepts a size of 0.
    """
    start = data.find(_HEAP)
    while start >= 0:
        end = start + int.from_bytes(data[start + 8 : start + 16], "little")
        if not start + 16 <= end <= len(data):
            raise ValueError("a heap is damaged")
        offset = start + 16
        while offset + 16 <= end:
            index = int.from_bytes(data[offset : offset + 2], "little")
            size = int.from_bytes(data[offset + 8 : offset + 16], "little")
            # The size of the free space at the end includes its header, that of an object does not.
            offset += size if index == 0 else 16 + -(-size // 8) * 8
            if offset > end or (index == 0 and size < 16):
                raise ValueError("a heap is damaged")
        start = data.find(_HEAP, start + 1)


def _check(file: Any, size: int) -> None:
    """Raise on links, data in other files, cycles, and sizes that the file cannot hold."""
    hdf = h5py()
    addresses = set()
    total = 0
    queue = [(file, "", 0)]
    while queue:
        group, path, depth = queue.pop()
        if depth > _DEPTH:
            raise ValueError("its groups are nested too deep")
        for name in group:
            where = f"{path}/{name}"
            if not isinstance(group.get(name, getlink=True), hdf.HardLink):
                raise ValueError(f"{where} is a link, which is not followed")
            item = group[name]
            address = hdf.h5o.get_info(item.id).addr
            if address in addresses:
                raise ValueError(f"{where} is the same object as another one")
            addresses.add(address)
            if isinstance(item, hdf.Group):
                queue.append((item, where, depth + 1))
            elif isinstance(item, hdf.Dataset):
                if item.external or item.is_virtual:
                    raise ValueError(f"{where} has its data in other files")
                stored, claimed = item.id.get_storage_size(), item.nbytes
                if claimed > _RATIO * stored or stored > size:
                    raise ValueError(f"{where} claims {claimed} bytes, but has {stored}")
                total += claimed
    if total > 100 * size + _SPARE:
        raise ValueError(f"it would expand to {total} bytes")
