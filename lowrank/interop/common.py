"""Helpers that several file formats share."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowrank.compress.model import Chains, Layer
from lowrank.factorization import Factorization


def check_chains(chains: Chains, layers: Mapping[str, Layer]) -> None:
    """Raise unless every chain has the shapes of the layer that it replaces."""
    for name, f in chains.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} among {', '.join(layers)}")
        if not isinstance(f, Factorization):
            raise TypeError(f"layer {name!r}: a chain must be a Factorization, got {f!r:.80}")
        conv, size = layers[name].conv, layers[name].input_size
        try:
            expected, actual = conv.output_shape(size), f.output_shape(conv.input_shape(size))
        except ValueError as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        if expected != actual:
            raise ValueError(
                f"layer {name!r}: the chain must have output shape {expected}, got {actual}"
            )


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def check_exists(path: Path) -> None:
    """Raise unless a file exists: a better reason than its ending."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")


@contextmanager
def damaged_errors(path: Path, what: str) -> Iterator[None]:
    """Turn any error of reading a damaged file into a ValueError of one line that names it.

    Libraries raise errors of many types for such files: NumPy those of Python's tokenizer.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as why:
        if isinstance(why, OSError) and why.errno not in (None, errno.EINVAL):
            # Of the disk, not of the contents, as positions before the start of a file are.
            raise OSError(why.errno, why.strerror, why.filename or os.fspath(path)) from None
        raise ValueError(f"{path}: {what}: {one_line(why)}") from None
