"""Keras files: check files that are not trusted, and load and save models with Keras."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from lowrank import io
from lowrank.core.files import atomic_write
from lowrank.interop.common import check_exists, one_line

ENDINGS = (".keras", ".h5", ".hdf5")
_DEPTH = 64  # nesting of groups; no network needs more
#: Largest compression ratio of a dataset (no weights compress better), and bytes that any file
#: may expand to.
_RATIO, _SPARE = 1000, 1 << 24
_HEAP = b"GCOL\x01\0\0\0"  # signature and version of HDF5's global heaps
#: Libraries that can run a model of Keras, in the order of preference.
_BACKENDS = ("tensorflow", "torch", "jax")
_NEEDS = "Keras models need Keras 3 and a library that runs it: pip install 'lowrank[keras]'"


def library() -> Any:
    """Import Keras, or raise an ImportError that says how to install it.

    Keras runs on the library that the environment variable ``KERAS_BACKEND`` names; without it,
    on TensorFlow, or if that is not installed, on PyTorch or JAX.
    """
    keras = sys.modules.get("keras") or _import()
    if int(keras.__version__.partition(".")[0]) < 3:
        raise ImportError(f"{_NEEDS} (Keras {keras.__version__} is installed)")
    return keras


def _import() -> Any:
    chosen = "KERAS_BACKEND" not in os.environ
    if chosen:  # for Keras alone, which reads it once: not for processes that start later
        installed = [name for name in _BACKENDS if find_spec(name)]
        if not installed:
            raise ImportError(_NEEDS)
        os.environ["KERAS_BACKEND"] = installed[0]
    try:
        return importlib.import_module("keras")
    except ImportError as why:
        raise ImportError(f"{_NEEDS} ({one_line(why)})") from None
    finally:
        if chosen:
            del os.environ["KERAS_BACKEND"]


def load(path: str | os.PathLike[str], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Load a model with Keras, in its safe mode: no code in the file is run.

    Parameters
    ----------
    path : path
        ``.keras``, ``.h5`` or ``.hdf5`` file.
    custom_objects : mapping of str to object, optional
        Classes and functions of the model that are not Keras's own, by name.

    Returns
    -------
    keras.Model
        Model that is not compiled.

    Raises
    ------
    ValueError
        If the file is damaged, would expand far beyond its size, refers to other files, or holds
        objects that Keras does not know.
    OSError
        If the file cannot be read.
    ImportError
        If Keras is not installed.
    """
    path = Path(path)
    check_exists(path)
    ending = _check_ending(path)
    keras = library()
    try:
        data = path.read_bytes()
        if ending == ".keras":
            data = _check_archive(path)
        _check_hdf5(data)
        with _quietly():
            return keras.saving.load_model(
                path, custom_objects=custom_objects, compile=False, safe_mode=True
            )
    except (ImportError, MemoryError, OSError) as why:
        if isinstance(why, OSError) and why.errno is None:  # of HDF5
            raise ValueError(f"{path}: not a readable Keras model: {one_line(why)}") from None
        raise
    except Exception as why:  # HDF5 and Keras have errors of every type for damaged files
        raise ValueError(f"{path}: not a readable Keras model: {_reason(why)}") from None


def _reason(why: Exception) -> str:
    """Return why Keras does not load a model, in one sentence."""
    text = " ".join(str(e) for e in (why, why.__cause__, why.__context__) if e is not None)
    in_python = "load it in Python, and give the model to lowrank.interop.keras.KerasModel"
    if "safe_mode" in text and "lambda" in text.lower():
        return f"its Lambda layers hold code, which is not run: {in_python}"
    found = re.search(r"(?:Could not locate|Unknown) \w+:? '([^']+)'", text)
    return f"{found[1]} is not Keras's own: {in_python}" if found else one_line(why)


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a Keras model, atomically.

    Parameters
    ----------
    model : keras.Model
        Model, such as :meth:`KerasModel.replaced` returns.
    path : path
        ``.keras``, ``.h5`` or ``.hdf5`` file that is written or replaced.

    Raises
    ------
    ValueError
        If the ending is another one.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import os, pathlib, tempfile
    >>> import pytest
    >>> torch = pytest.importorskip("torch")
    >>> _ = os.environ.setdefault("KERAS_BACKEND", "torch")
    >>> keras = pytest.importorskip("keras")
    >>> from lowrank.interop.keras import KerasModel, save
    >>> net = keras.Sequential([keras.Input((20, 3)), keras.layers.Conv1D(8, 5)])
    >>> path = pathlib.Path(tempfile.mkdtemp(), "net.keras")
    >>> save(net, path)
    >>> KerasModel(path).layers[0].input_size
    (20,)
    """
    path = Path(path)
    ending = _check_ending(path)
    with atomic_write(path) as part, _quietly():
        lower = part.with_suffix(ending)  # Keras knows no other spelling
        model.save(lower)
        os.replace(lower, part)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence Keras on what is not compiled, not restored, or an older format."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    return ending


def _check_archive(path: Path) -> bytes:
    """Raise on an archive that leads out of itself or expands too far; return its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            io.check_expansion(path, sum(m.file_size for m in members))
            for member in members:
                parts = member.filename.replace("\\", "/").split("/")
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise ValueError(f"the path {member.filename!r} leads out of the archive")
            names = {m.filename for m in members}
            if len(names) < len(members):
                raise ValueError("two members have the same name")
            for name in ("config.json", "model.weights.h5"):
                if name not in names:
                    raise ValueError(f"it has no {name}")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"its member {damaged} is damaged")
            return archive.read("model.weights.h5")
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


def _check_hdf5(data: bytes) -> None:
    """Raise on links, data in other files, cycles, and sizes that the file cannot hold."""
    import h5py  # which Keras requires

    _check_heaps(data)
    with h5py.File(BytesIO(data), "r") as file:
        _check_objects(h5py, file, len(data))


def _check_objects(hdf: Any, file: Any, size: int) -> None:
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
