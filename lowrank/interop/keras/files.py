"""Keras files, read without Keras and without trust: archives, HDF5, and what is written anew."""

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

ENDINGS = (".keras", ".h5", ".hdf5")
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_DEPTH = 64  # groups in groups, models in models: more is no network
#: A dataset of chunks may be compressed; no weights shrink to less than this share.
_RATIO, _SPARE = 1000, 1 << 24
_HEAP = b"GCOL\x01\0\0\0"  # signature and version of HDF5's global heaps


@dataclass(frozen=True, slots=True, eq=False)
class KerasFile:
    """A model of Keras as its file holds it, ready to be written.

    Attributes
    ----------
    ending : str
        ``".keras"``, or ``".h5"``.
    config : dict
        The model: ``class_name``, ``config``.
    weights : bytes
        An HDF5 file: that of an archive, or the whole.
    members : dict of str to bytes
        What else is in an archive.

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
        """Write the model in the form that it came in.

        Parameters
        ----------
        path : path
            With the original's ending; replaced as a whole or not at all.

        Raises
        ------
        ValueError
            If the ending is another.
        OSError
            If the file cannot be written.
        """
        path = Path(path)
        if _ending(path) != self.ending:
            raise ValueError(f"{path}: the model came as {self.ending} and is written as such")
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
    """Read a model's file; nothing in it is run, and no size in it is believed.

    Parameters
    ----------
    path : path
        ``.keras``, ``.h5`` or ``.hdf5``.

    Returns
    -------
    KerasFile

    Raises
    ------
    ValueError
        If it is damaged, would unpack to far more than it is, or points out of itself.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    ending = _ending(path)
    data = path.read_bytes()
    with damage(path):
        if ending == ".keras":
            members = _members(path, data)
            for name in (_CONFIG, _WEIGHTS):
                if name not in members:
                    raise ValueError(f"there is no {name} in it")
            config = _json(members.pop(_CONFIG))
            weights = members.pop(_WEIGHTS)
            with opened(weights):
                pass
        else:
            members, weights = {}, data
            with opened(weights) as file:
                if "model_config" not in file.attrs:
                    raise ValueError("weights alone, without model_config: save the whole model")
                config = _json(file.attrs["model_config"])
        if not isinstance(config, dict) or "config" not in config:
            raise ValueError("its configuration is no model's")
    return KerasFile(ending, config, weights, members)


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What goes wrong in reading becomes one error that names the file."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as why:  # HDF5 has errors of every type for damaged files
        text = " ".join(str(why).split())
        raise ValueError(f"{path}: not a model of Keras that can be read: {text}") from None


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    """An HDF5 file in memory, after a look at all its links and sizes."""
    _check_heaps(data)
    with h5py().File(BytesIO(data), "r") as file:
        _check(file, len(data))
        yield file


def copy(item: Any, parent: Any, name: str) -> None:
    """Put a group or a dataset into another file, by its values.

    HDF5's own copy takes over what it does not understand, and stumbles over damage in it.
    """
    if isinstance(item, h5py().Group):
        made = parent.require_group(name)
        for key in item:
            copy(item[key], made, key)
    else:
        made = parent.create_dataset(name, data=item[()], dtype=item.dtype)
    for key, value in item.attrs.items():
        made.attrs[key] = value


def h5py() -> Any:
    """The module h5py.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        If it is not installed, with what to do.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError("Keras files need h5py: pip install 'lowrank[keras]'") from None
    return h5py


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: models of Keras end in {', '.join(ENDINGS)}, not {ending!r}")
    return ".h5" if ending == ".hdf5" else ending


def _json(text: Any) -> Any:
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(str(text))
    except RecursionError:
        raise ValueError("its configuration is nested too deep") from None


def _members(path: Path, data: bytes) -> dict[str, bytes]:
    """What an archive holds, by name."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            found = archive.infolist()
            io.check_expansion(path, sum(m.file_size for m in found))
            for member in found:
                parts = member.filename.replace("\\", "/").split("/")
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise ValueError(f"{member.filename!r} points out of it")
            if len({m.filename for m in found}) < len(found):
                raise ValueError("two members have one name")
            return {m.filename: archive.read(m) for m in found if not m.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as why:
        raise ValueError(f"its archive is damaged: {why}") from None


def _check_heaps(data: bytes) -> None:
    """Refuse heaps of texts on which the HDF5 library would go round forever.

    It walks from object to object by their sizes, and does not mind a size of nothing.
    """
    at = data.find(_HEAP)
    while at >= 0:
        end = at + int.from_bytes(data[at + 8 : at + 16], "little")
        if not at + 16 <= end <= len(data):
            raise ValueError("a heap is damaged")
        place = at + 16
        while place + 16 <= end:
            index = int.from_bytes(data[place : place + 2], "little")
            size = int.from_bytes(data[place + 8 : place + 16], "little")
            # The free space at the end counts its own header, an object does not.
            place += size if index == 0 else 16 + -(-size // 8) * 8
            if place > end or (index == 0 and size < 16):
                raise ValueError("a heap is damaged")
        at = data.find(_HEAP, at + 1)


def _check(file: Any, size: int) -> None:
    """Refuse links, data elsewhere, loops, and sizes that the file cannot hold."""
    hdf = h5py()
    seen = set()
    total = 0
    rest = [(file, "", 0)]
    while rest:
        group, path, depth = rest.pop()
        if depth > _DEPTH:
            raise ValueError("its groups are nested too deep")
        for name in group:
            where = f"{path}/{name}"
            if not isinstance(group.get(name, getlink=True), hdf.HardLink):
                raise ValueError(f"{where} is a link to elsewhere")
            item = group[name]
            address = hdf.h5o.get_info(item.id).addr
            if address in seen:
                raise ValueError(f"{where} stands in two places")
            seen.add(address)
            if isinstance(item, hdf.Group):
                rest.append((item, where, depth + 1))
            elif isinstance(item, hdf.Dataset):
                if item.external or item.is_virtual:
                    raise ValueError(f"{where} has its data in other files")
                stored, claimed = item.id.get_storage_size(), item.nbytes
                if claimed > _RATIO * stored or stored > size:
                    raise ValueError(f"{where} claims {claimed} bytes, of which {stored} are there")
                total += claimed
    if total > 100 * size + _SPARE:
        raise ValueError(f"it would unpack to {total} bytes")
