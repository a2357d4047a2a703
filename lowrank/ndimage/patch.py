"""Replacement of SciPy's filters in code that calls them."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scipy import ndimage

from lowrank.ndimage.arguments import NAMES

_lock = threading.Lock()
_depth = 0
_replaced: dict[str, Callable[..., Any]] = {}


@contextmanager
def patched() -> Iterator[None]:
    """Replace the functions of scipy.ndimage by those of this module, within a `with` block.

    Yields
    ------
    None

    Notes
    -----
    Code that looks the functions up in the module at each call uses them: ``ndimage.sobel(image)``
    after ``from scipy import ndimage``, as scikit-image does.  Names that were imported before
    (``from scipy.ndimage import sobel``) stay SciPy's.  The module is that of the whole process, so
    all threads see the replacement.  Blocks may be nested and overlap across threads: the last one
    that ends restores the functions, also after an exception.

    Examples
    --------
    >>> import lowrank
    >>> from scipy import ndimage
    >>> with lowrank.ndimage.patched():
    ...     ndimage.sobel is lowrank.ndimage.sobel
    True
    >>> ndimage.sobel is lowrank.ndimage.sobel
    False
    """
    global _depth
    with _lock:
        if not _depth:
            ours = importlib.import_module("lowrank.ndimage")
            for name in NAMES:
                _replaced[name] = getattr(ndimage, name)
                setattr(ndimage, name, getattr(ours, name))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for name, function in _replaced.items():
                    setattr(ndimage, name, function)
