"""Files that are written as a whole: a reader sees the old contents or the new ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path of the same name to write to, which replaces `path` at the end.

    Parameters
    ----------
    path : path
        Target file; see :func:`atomic_write_all`.

    Yields
    ------
    Path
        File to create.
    """
    with atomic_write_all(path) as (part,):
        yield part


@contextmanager
def atomic_write_all(*paths: str | os.PathLike[str]) -> Iterator[tuple[Path, ...]]:
    """Give temporary paths to write to, which replace files of one folder at the end of the block.

    Parameters
    ----------
    *paths : path
        Target files in one folder, in the order in which they appear; the last one is that of
        which errors speak.  A link is followed if it is the only one, and replaced otherwise.

    Yields
    ------
    tuple of Path
        Files to create, with the names of the targets; one that is not created leaves its target
        as it was.

    Raises
    ------
    OSError
        If a file cannot be written: all targets stay as they were, and the message names one.

    Notes
    -----
    The temporary files are in a new folder beside the targets, so that no two writers share one and
    nothing but this folder is ever removed.  Their contents are on disk before the first target is
    replaced.  If a later target cannot be replaced, the earlier ones are restored.
    """
    targets = [Path(os.path.realpath(path)) if len(paths) == 1 else Path(path) for path in paths]
    for path, target in zip(paths, targets):
        if target.is_dir():
            raise IsADirectoryError(f"{path}: is a folder")
        if target.exists() and not target.is_file():
            raise OSError(f"{path}: must be a plain file, got a device, pipe or socket")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {target.parent}")
    with _errors_name(paths[-1], None):
        folder = Path(tempfile.mkdtemp(prefix=".lowrank-", dir=targets[0].parent))
    try:
        parts = tuple(folder / Path(path).name for path in paths)
        with _errors_name(paths[-1], folder):
            yield parts
        for path, part in zip(paths, parts):
            with _errors_name(path, folder), contextlib.suppress(FileNotFoundError):
                _flush(part)
        _replace(paths, parts, targets, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that it is out of the way and not lost.

    Parameters
    ----------
    path : Path
        File or folder.

    Returns
    -------
    Path
        Its new name, which no other file has.
    """
    names = (path.with_name(f"{path.name}.bad{n or ''}") for n in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


def _replace(
    paths: tuple[str | os.PathLike[str], ...],
    parts: tuple[Path, ...],
    targets: list[Path],
    folder: Path,
) -> None:
    """Move parts to their targets; restore the earlier ones if a later one fails."""
    replaced: list[tuple[Path, Path | None]] = []
    try:
        for i, (path, part, target) in enumerate(zip(paths, parts, targets)):
            if not part.exists():
                continue
            with _errors_name(path, folder):
                old = _keep(target, folder / f".old-{i}") if len(parts) > 1 else None
                os.replace(part, target)
            replaced.append((target, old))
    except BaseException:
        for target, old in reversed(replaced):
            if old is None:
                target.unlink()  # it was not there before
            else:
                os.replace(old, target)
        raise
    if os.name == "posix":  # elsewhere folders cannot be opened
        with contextlib.suppress(OSError):  # the files are there: some disks flush no folders
            _flush(targets[0].parent)


def _keep(target: Path, copy: Path) -> Path | None:
    """Keep a file under another name, until it is replaced for good; None if there is none."""
    if not target.exists():
        return None
    try:
        os.link(target, copy)
    except OSError:  # a disk without links
        shutil.copy2(target, copy)
    return copy


def _flush(path: Path) -> None:
    """Wait until a file is on disk, not in the system's memory alone."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors_name(path: str | os.PathLike[str], folder: Path | None) -> Iterator[None]:
    """Let errors of writing name the target, where they name a temporary file or none."""
    try:
        yield
    except OSError as why:
        is_other = folder is not None and why.filename is not None
        if is_other and folder not in Path(str(why.filename)).parents:
            raise
        if why.errno is None:
            if str(path) in str(why):
                raise
            # Of NumPy, which says on a full disk that it wrote less than asked.
            raise OSError(f"{path}: cannot be written: {why}") from None
        raise OSError(why.errno, why.strerror, os.fspath(path)) from None
